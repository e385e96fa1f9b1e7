"""Forks around the middleware: parent and children each deliver their own calls, once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moesif_otel.sandbox.server import Sandbox
from tests.servers.harness import ROOT, clean_environ

# {when}: what has happened before the fork; {how}: how the children are made and end.
PROGRAM = """
import io, multiprocessing, os, sys, threading
from wsgiref.util import setup_testing_defaults
from moesif_otel.wsgi import MoesifMiddleware

WHEN, HOW, URL = sys.argv[1:]

def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["QUERY_STRING"].encode()]

def make():
    return MoesifMiddleware(app, {"APPLICATION_ID": "forks", "BASE_URI": URL})

def ask(middleware, query):
    environ = {"QUERY_STRING": query, "wsgi.input": io.BytesIO()}
    setup_testing_defaults(environ)
    assert b"".join(middleware(environ, lambda *_: None)) == query.encode()

def child(middleware, name):
    middleware = middleware or make()
    for n in range(20):
        ask(middleware, f"{name}-{n}")
    # multiprocessing's children, and those that leave by os._exit, run no exit hooks.
    assert middleware.force_flush(30_000)
    stats = middleware.stats()
    assert (stats["accepted"], stats["delivered"], stats["pending"]) == (20, 20, 0), stats

middleware = None if WHEN == "imported" else make()
stop = threading.Event()
if WHEN == "sending":
    # Requests go on in other threads at the moment of the fork.
    def busy(number):
        n = 0
        while not stop.is_set():
            ask(middleware, f"busy-{number}-{n}")
            n += 1
        sent.append(n)
    sent = []
    threads = [threading.Thread(target=busy, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    while middleware.stats()["accepted"] < 50:
        pass
if HOW == "os.fork":
    pids = []
    for number in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                child(middleware, f"child{number}")
                os._exit(0)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
else:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=child, args=(middleware, f"child{number}")) for number in range(3)]
    for one in children:
        one.start()
    for one in children:
        one.join()
    assert [one.exitcode for one in children] == [0, 0, 0]
stop.set()
if WHEN == "sending":
    for thread in threads:
        thread.join()
child_of_none = middleware or make()
for n in range(20):
    ask(child_of_none, f"parent-{n}")
print(sum(sent) if WHEN == "sending" else 0)
"""


def run(program: str, *arguments: str, warnings: str = "ignore::DeprecationWarning") -> str:
    """Run a program in a process of its own, which must end well, and return what it printed."""
    command = [sys.executable, "-W", warnings, "-c", program, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environ(), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    return done.stdout


@pytest.mark.parametrize("how", ["os.fork", "multiprocessing"])
@pytest.mark.parametrize("when", ["imported", "constructed", "sending"])
def test_parent_and_children_deliver_their_own_calls_once(when: str, how: str) -> None:
    """After import, after construction and in the middle of sending; the parent's exit delivers the rest of its own."""
    with Sandbox(max_events=500_000) as sandbox:
        said = run(PROGRAM, when, how, sandbox.url)
        queries = [event["request"]["uri"].partition("?")[2] for event in sandbox.events()]
        duplicates = sandbox.stats()["duplicates"]
    ours = sorted(query for query in queries if not query.startswith("busy"))
    names = ("child0", "child1", "child2", "parent")
    assert ours == sorted(f"{name}-{n}" for name in names for n in range(20))
    assert len(queries) - len(ours) == int(said)
    assert duplicates == 0


IN_A_CALL = """
import io, os, sys
from wsgiref.util import setup_testing_defaults
from moesif_otel.wsgi import MoesifMiddleware

def app(environ, start_response):
    environ["wsgi.input"].read()
    start_response("200 OK", [])
    yield b"a" * 1_000
    pids.append(os.fork())
    yield b"b" * 1_000

pids = []
middleware = MoesifMiddleware(app, {"APPLICATION_ID": "forks", "BASE_URI": sys.argv[1]})
environ = {"REQUEST_METHOD": "POST", "CONTENT_LENGTH": "500"}
setup_testing_defaults(environ)
environ["wsgi.input"] = io.BytesIO(b"c" * 500)
assert len(b"".join(middleware(environ, lambda *_: None))) == 2_000
assert middleware.force_flush(30_000)
print(len(pids) and bool(pids[0]), middleware.stats()["accepted"], middleware.stats()["held_bytes"], flush=True)
if pids[0]:
    os.waitpid(pids[0], 0)
else:
    os._exit(0)
"""


def test_a_call_that_forks_is_the_parents() -> None:
    """The child serves it to its end, but does not deliver it, and gives no bytes back that it has not taken."""
    with Sandbox() as sandbox:
        said = run(IN_A_CALL, sandbox.url)
        assert sorted(said.splitlines()) == ["False 0 0", "True 1 0"]
        (event,) = sandbox.events()
    assert event["response"]["status"] == 200


COPIED_GREENLETS = """
from gevent.monkey import patch_all
patch_all()
import os, sys, gevent
from wsgiref.util import setup_testing_defaults
from moesif_otel.wsgi import MoesifMiddleware

def app(environ, start_response):
    start_response("200 OK", [])
    return [b""]

middleware = MoesifMiddleware(app, {"APPLICATION_ID": "forks", "BASE_URI": sys.argv[1], "EVENT_BATCH_TIMEOUT": 0.5})
for n in range(20):
    environ = {}
    setup_testing_defaults(environ)
    middleware(environ, lambda *_: None)
gevent.sleep(0.1)
pid = os.fork()
if pid == 0:
    gevent.sleep(1.5)
    stats = middleware.stats()
    os._exit(stats["accepted"] + stats["delivered"] + stats["pending"] + sum(stats["dropped"].values()))
assert os.waitpid(pid, 0)[1] == 0
assert middleware.force_flush(30_000)
assert middleware.stats()["delivered"] == 20
"""


def test_greenlets_that_gevent_copies_into_a_child_deliver_nothing_of_the_parents() -> None:
    """Threads end at a fork; greenlets go on in the child, with what they were about to send."""
    pytest.importorskip("gevent")
    with Sandbox() as sandbox:
        run(COPIED_GREENLETS, sandbox.url, warnings="ignore")
        assert len(sandbox.events()) == 20
        assert sandbox.stats()["duplicates"] == 0
