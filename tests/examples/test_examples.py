"""Each WSGI example, run as its first line says, called by a client, its events read from the sandbox."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from moesif_otel.sandbox import Sandbox
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


class Service:
    """A running example: calls it, and ends it so that what it captured is delivered."""

    def __init__(self, name, sandbox, *arguments):
        port = free_port()
        environ = {
            **os.environ,
            "MOESIF_APPLICATION_ID": f"id-of-{name}",
            "MOESIF_BASE_URI": sandbox.url,
            "PORT": str(port),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        self.url = f"http://127.0.0.1:{port}"
        self.sandbox = sandbox
        self.calls = []
        command = [sys.executable, str(EXAMPLES / name / "app.py"), *arguments]
        self.process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
        self.errors = ""
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"the example did not start: {self.errors}")
            time.sleep(0.05)

    def call(self, verb, path, **keywords):
        """Make one call."""
        self.calls.append((verb, path))
        return requests.request(verb, self.url + path, timeout=10, **keywords)

    def end(self):
        """Press Ctrl-C."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            _, self.errors = self.process.communicate(timeout=200)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()

    def events(self, count):
        """End the service and give the events in the order of the calls.

        The exit delivers them, whatever the batch's time. They may arrive in another order: a client has its answer
        before the server's thread is done with the call, and the next call has another thread.
        """
        self.end()
        made = {call: number for number, call in enumerate(self.calls)}
        return sorted(self.sandbox.wait_for_events(count), key=lambda event: made.get(path_of(event)[:2], len(made)))


@pytest.fixture
def run():
    """Start examples against a sandbox."""
    started = []
    with Sandbox() as sandbox:

        def start(name, *arguments):
            started.append(Service(name, sandbox, *arguments))
            return started[-1]

        yield start
        for service in started:
            service.end()


def path_of(event):
    """Give verb, path and status."""
    request = event["request"]
    return request["verb"], "/" + request["uri"].split("/", 3)[3], event["response"]["status"]


def paths(events):
    """Give verb, path and status of each event."""
    return [path_of(event) for event in events]


def test_flask(run):
    """Answers are the app's own; user, metadata, the mask, JSON bodies and a stream are in the events."""
    service = run("flask")
    made = service.call("POST", "/books", json={"title": "dune"}, headers={"X-User-Id": "u1", "X-Shelf": "b"})
    assert (made.status_code, made.json()) == (201, {"id": 2, "title": "dune"})
    assert service.call("GET", "/books/2").json() == {"id": 2, "title": "dune"}
    assert service.call("GET", "/books/9").status_code == 404
    feed = service.call("GET", "/feed")
    assert feed.text == '{"line": 0}\n{"line": 1}\n{"line": 2}\n'
    events = service.events(4)
    assert paths(events) == [
        ("POST", "/books", 201),
        ("GET", "/books/2", 200),
        ("GET", "/books/9", 404),
        ("GET", "/feed", 200),
    ]
    first = events[0]
    assert (first["user_id"], first["metadata"]["shelf"]) == ("u1", "b")
    assert first["request"]["body"] == {"title": "Dune"}
    assert first["response"]["body"] == {"id": 2, "title": "dune"}
    assert base64.b64decode(events[3]["response"]["body"]) == feed.content
    assert made.headers["X-Moesif-Transaction-Id"] == first["transaction_id"]
    assert {entry["application_id"] for entry in service.sandbox.requests()} == {"id-of-flask"}


def test_bottle(run):
    """The user comes from Basic, the company from the callback; what SKIP names is no event."""
    service = run("bottle")
    assert service.call("GET", "/hello/you", auth=("ann", "pw"), headers={"X-Company-Id": "acme"}).json() == {
        "hello": "you"
    }
    assert service.call("POST", "/sum", json={"numbers": [1, 2, 3]}).json() == {"sum": 6}
    assert service.call("GET", "/health").text == "ok"
    assert service.call("GET", "/secret").status_code == 403
    events = service.events(3)
    assert paths(events) == [("GET", "/hello/you", 200), ("POST", "/sum", 200), ("GET", "/secret", 403)]
    assert (events[0]["user_id"], events[0]["company_id"]) == ("ann", "acme")
    assert (events[1]["request"]["body"], events[1]["response"]["body"]) == ({"numbers": [1, 2, 3]}, {"sum": 6})


def test_pyramid(run):
    """The session token, the version and both cookies are in the events, errors of the framework too."""
    service = run("pyramid")
    made = service.call("PUT", "/cities/quito", json={"country": "EC"}, headers={"X-Session": "s1"})
    assert (made.status_code, dict(made.cookies)) == (201, {"last": "quito", "seen": "1"})
    assert service.call("GET", "/cities/quito").json() == {"country": "EC"}
    assert service.call("GET", "/cities/rome").json() == {"error": "no such city"}
    events = service.events(3)
    assert paths(events) == [("PUT", "/cities/quito", 201), ("GET", "/cities/quito", 200), ("GET", "/cities/rome", 404)]
    assert (events[0]["session_token"], events[0]["request"]["api_version"]) == ("s1", "2.1")
    cookies = next(v for k, v in events[0]["response"]["headers"].items() if k.lower() == "set-cookie")
    assert "last=quito" in cookies
    assert "seen=1" in cookies


def test_plain_wsgi(run):
    """A plain app on the standard library's server: JSON, text and an exception of the app."""
    service = run("wsgi")
    assert service.call("GET", "/status").json() == {"up": True}
    assert service.call("POST", "/echo", data="grüße".encode(), headers={"Content-Type": "text/plain"}).content == (
        "grüße".encode()
    )
    assert service.call("GET", "/broken").status_code == 500
    events = service.events(3)
    assert paths(events) == [("GET", "/status", 200), ("POST", "/echo", 200), ("GET", "/broken", 500)]
    for side in ("request", "response"):
        assert base64.b64decode(events[1][side]["body"]).decode() == "grüße"
    assert "the call is recorded" in service.errors  # the app's own traceback, as without us
