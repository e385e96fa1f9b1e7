"""The guard: counts everything, logs each kind once, quotes no data, never blocks."""

from __future__ import annotations

import linecache
import logging
import os
import re
import subprocess
import sys
import threading
import time
from typing import Final

import pytest

from moesif_otel import _guard
from moesif_otel._guard import ForkSafeLock, Guard, LiveSet, place_of


def fail() -> None:
    raise ValueError("a secret in the message")


def test_every_error_is_counted_and_the_first_of_a_kind_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """One line a kind and exception type, with type and place, without the message."""
    guard = Guard()
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            assert guard.run("one thing", fail) is None
        guard.run("another", fail)
    assert guard.counts() == {"one thing": 3, "another": 1}
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "ValueError at test_guard.py:" in lines[0]
    assert "in fail" in lines[0]
    assert "secret" not in "".join(lines) + "".join(str(record.exc_info) for record in caplog.records)


def test_run_gives_the_result_and_lets_base_exceptions_pass() -> None:
    """Only `Exception` is ours to stop: an exit or an interrupt of the application passes."""
    guard = Guard()
    assert guard.run("sum", sum, (1, 2)) == 3
    with pytest.raises(KeyboardInterrupt):
        guard.run("exit", _interrupt)
    assert guard.counts() == {}


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_no_count_is_lost_between_threads() -> None:
    """Counts of many threads add up, also while somebody reads."""
    guard = Guard()
    exc = ValueError()

    def work() -> None:
        for _ in range(2_000):
            guard.caught("k", exc)
            guard.counts()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert guard.counts() == {"k": 8_000}


def test_a_finalizer_inside_a_fold_does_not_deadlock() -> None:
    """An error reported while this very thread folds is kept for the next fold."""
    guard = Guard()
    with guard._counts._lock:
        for _ in range(1_000):
            guard.count("k")
        guard.caught("k", ValueError())
    assert guard.counts() == {"k": 1_001}


def test_place_of_an_exception_that_was_never_raised() -> None:
    """There is no place to tell, and no error in telling so."""
    assert place_of(ValueError()) == "unknown place"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_a_lock_is_free_in_a_forked_child() -> None:
    """Whoever holds it at the fork: the child gets it at once, and may leave the block that the parent entered."""
    lock = ForkSafeLock()
    with lock.current:
        child = os.fork()
        if child == 0:
            free = lock.current.acquire(timeout=5)
            os._exit(0 if free else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_set_of_live_objects_may_be_gone_over_while_others_add_to_it() -> None:
    """As threads do that make middlewares at the same time; an object that is gone, or removed, is not in it."""
    members: LiveSet[ForkSafeLock] = LiveSet()
    kept, gone = [ForkSafeLock(), ForkSafeLock(), ForkSafeLock()], ForkSafeLock()
    for member in (*kept, gone):
        members.add(member)
    del member, gone
    members.discard(kept.pop())
    members.discard(ForkSafeLock())
    seen = []
    for member in members:
        seen.append(member)
        kept.append(ForkSafeLock())
        members.add(kept[-1])
    assert seen == kept[:2]


def test_the_place_of_an_error_needs_no_source_and_no_limit_of_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read off the traceback alone: nothing is read from disk in a request, whatever `sys.tracebacklimit` is."""
    monkeypatch.setattr(sys, "tracebacklimit", 0, raising=False)
    monkeypatch.setattr(linecache, "getlines", fail)
    with pytest.raises(ValueError, match="secret") as caught:
        fail()
    assert re.fullmatch(r"test_guard\.py:\d+ in fail", place_of(caught.value))


def test_a_fork_waits_for_log_lines_of_other_threads(monkeypatch) -> None:
    """Python renews no lock of a stream in a forked child: its own first log line would wait for ever."""
    writing, go, lines = threading.Event(), threading.Event(), []

    class Handler(logging.Handler):
        def emit(self, record) -> None:
            writing.set()
            go.wait(30)
            lines.append(record.getMessage())

    handler = Handler()
    logging.getLogger("moesif_otel").addHandler(handler)
    try:
        thread = threading.Thread(target=_guard.get_logger("moesif_otel.x").warning, args=("a line",))
        thread.start()
        assert writing.wait(30)
        monkeypatch.setattr(_guard, "_LONGEST_LINE_S", 60.0)
        monkeypatch.setattr(_guard.time, "sleep", lambda _: go.set())
        _guard._wait_for_lines()
        assert lines == ["a line"]
    finally:
        go.set()
        thread.join()
        logging.getLogger("moesif_otel").removeHandler(handler)
    assert _guard._writing == {}


def test_a_handler_that_forks_does_not_wait_for_its_own_line(monkeypatch) -> None:
    """Nor does a fork wait for a line that takes too long: the handler may wait for the thread that forks."""
    monkeypatch.setitem(_guard._writing, threading.get_ident(), time.monotonic())
    monkeypatch.setitem(_guard._writing, -1, time.monotonic() - 2 * _guard._LONGEST_LINE_S)
    monkeypatch.setattr(_guard.time, "sleep", lambda _: pytest.fail("waited"))
    _guard._wait_for_lines()


_SERVE_WATCHED: Final = """
import asyncio, logging, sys
from importlib.abc import MetaPathFinder
from wsgiref.util import setup_testing_defaults

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from moesif_otel import _guard
from moesif_otel._autoinstrument.exporter import AutoSpanExporter
from moesif_otel._autoinstrument.instrument import Instrumentation
from moesif_otel.settings import Settings

# Nobody answers there: on a slow machine our threads have the time to say so.
logging.getLogger("moesif_otel").addHandler(logging.NullHandler())
options = {"APPLICATION_ID": "a", "BASE_URI": "http://127.0.0.1:9"}
serving = False

class Watch(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if serving and not _guard.LATE_IMPORTS._is_owned():
            print(name)

sys.meta_path.insert(0, Watch())
class Provider(TracerProvider):
    def get_tracer(self, *args, **kwargs):
        if serving and not _guard.LATE_IMPORTS._is_owned():
            print("opentelemetry's-locks")
        return super().get_tracer(*args, **kwargs)

    def add_span_processor(self, span_processor):
        if serving and not _guard.LATE_IMPORTS._is_owned():
            print("opentelemetry's-locks")
        super().add_span_processor(span_processor)

trace.set_tracer_provider(Provider())
zero_code = Instrumentation(Settings.of({**options, "IDENTIFY_USER": lambda request, response: None}))
app = lambda environ, start_response: start_response("200 OK", []) and [] or []
environ = {}
setup_testing_defaults(environ)

async def asgi_app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body"})

async def nothing(*_):
    return {"type": "http.request"}

scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
serving = True
zero_code.wrapped(app, app)(dict(environ), lambda *_: None)
asyncio.run(zero_code.wrapped_asgi(asgi_app)(dict(scope), nothing, nothing))
AutoSpanExporter(application_id="b")._exporter()
serving = False
from moesif_otel.asgi import MoesifMiddleware as AsgiMiddleware
from moesif_otel.wsgi import MoesifMiddleware
from moesif_otel._capture.exchange import _random, random_id
from moesif_otel._capture.tornado.spans import YieldingInstrumentation
from moesif_otel._delivery.client import _user_agent
from moesif_otel._events.serialize import sound_text
from moesif_otel._redaction.charsets import decode_text, utf8_of
from moesif_otel._remote.expressions import Pattern
middleware, asgi = MoesifMiddleware(app, options), AsgiMiddleware(asgi_app, options)
serving = True
middleware(dict(environ), lambda *_: None)
asyncio.run(asgi(dict(scope), nothing, nothing))
Pattern("a")
decode_text(bytes([0xC8, 0xD5]), "gbk", cut=False)
utf8_of(bytes([0x22, 0xE8, 0x22]), "windows-1250")
sound_text(chr(0xD800))
_user_agent.__wrapped__()
_random.clear()
random_id(16)
YieldingInstrumentation().hold(app, Provider())
serving = False
import os
sys.stdout.flush()
os._exit(0)
"""


_WATCHED: Final = ("moesif_otel", "opentelemetry", "regex", "encodings", "importlib", "_sha2")


def test_no_call_imports_a_module_that_a_fork_could_leave_half_imported() -> None:
    """A child that is forked while another thread of its parent imports a module waits for it for ever.

    So nothing is imported in a request, or on a thread of ours, without the lock that a fork takes: no module and no
    codec. Nor does OpenTelemetry take a lock there that no child renews.
    """
    found = subprocess.run([sys.executable, "-c", _SERVE_WATCHED], capture_output=True, text=True, timeout=60, check=False)
    assert found.stderr == ""
    assert [name for name in found.stdout.split() if name.startswith(_WATCHED)] == []
