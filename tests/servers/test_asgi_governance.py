"""Governance of WebSockets and streams on real servers: what a client of each gets, and what is recorded."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING, Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from moesif_otel.sandbox import Sandbox
from tests.servers.harness import ASGI_SERVERS, eventually, read_all, read_until, request, spawn, until_it_listens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers.harness import RunningServer

APP = "tests.servers.governed_asgi:application"
SERVERS = {kind.name: kind for kind in ASGI_SERVERS}
# The others know only one way to refuse a handshake: 403 without a body.
TELLS_THE_RULES_ANSWER = ("uvicorn", "hypercorn", "granian")
# The others leave out what an application sends with `websocket.accept`.
SENDS_HEADERS_AT_ACCEPT = ("uvicorn", "hypercorn")


def rule(name: str, path: str, value: str, *, block: bool, response: dict[str, Any]) -> dict[str, Any]:
    conditions = [{"path": path, "value": value}]
    return {
        "_id": name, "type": "regex", "state": 2, "name": name, "block": block,
        "regex_config": [{"conditions": conditions}], "response": response,
    }  # fmt: skip


QUOTA = {"status": 429, "headers": {"X-Quota": "none"}, "body": {"error": "quota"}}
RULES = [
    rule("blocks", "request.route", "/(socket|stream)/blocked", block=True, response=QUOTA),
    rule("adds", "request.route", "/(socket|stream)/headers", block=False, response={"headers": {"X-Quota": "5"}}),
    rule("unreadable", "request.body.$unreadable", ".+", block=True, response=QUOTA),
]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        running.put_rules(RULES)
        yield running


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, sandbox: Sandbox) -> Iterator[RunningServer]:
    """A server whose rules have arrived."""
    with contextlib.ExitStack() as stack:
        env = {"SERVERS_BASE_URI": sandbox.url, "SERVERS_APPLICATION_ID": request.param}
        running = spawn(SERVERS[request.param], APP, env=env)
        stack.callback(running.output.unlink, missing_ok=True)
        stack.callback(running.stop, signal.SIGKILL)
        running.name = request.param  # type: ignore[attr-defined]
        until_it_listens(running)
        assert eventually(lambda: b" 429 " in running.exchange(get("/stream/blocked"))), running.said()
        yield running


def get(path: str) -> bytes:
    return request("GET", path)


def event_of(sandbox: Sandbox, server: Any, path: str) -> dict[str, Any]:
    def found() -> list[dict[str, Any]]:
        events = sandbox.events(application_id=server.name)
        return [event for event in events if event["request"]["uri"].endswith(path)]

    events: list[dict[str, Any]] = eventually(found)
    return events[-1]


def test_a_blocked_handshake_is_refused(server: Any, sandbox: Sandbox) -> None:
    """With the rule's answer where the server can send one, else with the 403 of a closed handshake."""
    with pytest.raises(InvalidStatus) as caught:
        connect(f"ws://127.0.0.1:{server.port}/socket/blocked")
    response = caught.value.response
    event = event_of(sandbox, server, "/socket/blocked")
    assert event["blocked_by"] == "blocks"
    assert event["response"]["status"] == response.status_code
    if server.name in TELLS_THE_RULES_ANSWER:
        assert (response.status_code, response.body, response.headers["x-quota"]) == (429, b'{"error":"quota"}', "none")
    else:
        assert response.status_code == 403


def test_a_handshake_gets_the_headers_of_a_rule(server: Any, sandbox: Sandbox) -> None:
    """Behind the application's own; what passes over the socket is not touched, or recorded."""
    with connect(f"ws://127.0.0.1:{server.port}/socket/headers") as socket:
        assert socket.response is not None
        if server.name in SENDS_HEADERS_AT_ACCEPT:
            assert (socket.response.headers["x-own"], socket.response.headers["x-quota"]) == ("1", "5")
        socket.send("hello")
        assert socket.recv() == "HELLO"
    event = event_of(sandbox, server, "/socket/headers")
    assert event["response"]["status"] == 101
    assert "hello" not in str(event).lower()


def test_a_handshake_has_no_body_that_could_not_be_read(server: Any) -> None:
    """A rule about unreadable bodies leaves WebSockets alone."""
    with connect(f"ws://127.0.0.1:{server.port}/socket") as socket:
        socket.send("hello")
        assert socket.recv() == "HELLO"


def test_a_blocked_stream_is_not_begun(server: Any, sandbox: Sandbox) -> None:
    """The client gets the rule's answer alone."""
    head, _, body = server.exchange(get("/stream/blocked")).partition(b"\r\n\r\n")
    assert b" 429 " in head
    assert b"x-quota: none" in head.lower()
    assert body == b'{"error":"quota"}'
    assert event_of(sandbox, server, "/stream/blocked")["blocked_by"] == "blocks"


def test_a_stream_with_the_headers_of_a_rule_is_not_held_back(server: Any, sandbox: Sandbox) -> None:
    """The first piece is there before the application makes the second."""
    with server.connect() as client:
        client.sendall(get("/stream/headers"))
        got = read_until(client, b"first;")
        assert b"x-quota: 5" in got.lower()
        server.exchange(get("/go"))
        assert b"second" in read_all(client)
    event = event_of(sandbox, server, "/stream/headers")
    assert event["response"]["headers"]["x-quota"] == "5"
    assert "blocked_by" not in event
