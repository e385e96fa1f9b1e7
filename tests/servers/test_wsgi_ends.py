"""How server processes end, and what stands between them and Moesif: every event arrives, no request waits."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from moesif_otel.sandbox.server import Sandbox
from tests.ports import free_port
from tests.servers.harness import (
    KINDS,
    RunningServer,
    eventually,
    lines_of,
    read_all,
    request,
    running,
    spawn,
    until_it_listens,
)

if TYPE_CHECKING:
    from pathlib import Path

APP = "tests.servers.apps:application"
# No batch leaves by itself within these tests: what arrives was sent by the end of the process.
ONLY_AT_THE_END = {"SERVERS_OPTIONS": json.dumps({"EVENT_BATCH_TIMEOUT": 600})}
STOPPED_GRACEFULLY = ["gunicorn-sync", "gunicorn-gthread", "gunicorn-gevent", "gunicorn-sync-preload", "uwsgi"]


@pytest.fixture
def sandbox() -> Any:
    with Sandbox() as running_sandbox:
        yield running_sandbox


def _ask(server: RunningServer, count: int, target: str = "/list") -> list[bytes]:
    return [server.exchange(request("GET", f"{target}?n={n}", variant="on")) for n in range(count)]


def _numbers(events: list[dict[str, Any]]) -> list[int]:
    return sorted(int(event["request"]["uri"].rpartition("n=")[2]) for event in events)


@pytest.mark.parametrize("name", STOPPED_GRACEFULLY)
def test_a_graceful_stop_delivers_what_was_pending(name: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """A master that is told to stop: events that waited for their batch are delivered before the workers are gone."""
    env = {"SERVERS_BASE_URI": sandbox.url, **ONLY_AT_THE_END}
    # uWSGI's SIGTERM is no graceful stop: a worker that it meets in a request, be it after the last byte, runs no exit
    # hooks. Its graceful stop is a letter in the master's fifo.
    fifo = tmp_path / "fifo"
    more = ("--master-fifo", str(fifo)) if name == "uwsgi" else ()
    with running(KINDS[name], APP, *more, env=env) as server:
        _ask(server, 7)
        assert sandbox.events() == []
        if more:
            fifo.write_text("q")
            server.process.wait(60)
    assert _numbers(sandbox.events()) == list(range(7))


def test_recycled_workers_deliver_before_they_go(sandbox: Sandbox) -> None:
    """With gunicorn --max-requests each worker's events arrive, once each, and the next worker goes on."""
    env = {"SERVERS_BASE_URI": sandbox.url, **ONLY_AT_THE_END}
    with running(KINDS["gunicorn-sync"], APP, "--max-requests", "5", env=env) as server:
        answers = _ask(server, 13, "/pid")
    assert len({answer.rpartition(b"\n")[2] for answer in answers}) >= 2
    assert _numbers(sandbox.events()) == list(range(13))


def test_a_worker_that_times_out_delivers_what_it_had(sandbox: Sandbox, tmp_path: Path) -> None:
    """When gunicorn ends a worker that hangs in a request, its pending events arrive, the hanging call among them."""
    env = {"SERVERS_BASE_URI": sandbox.url, **ONLY_AT_THE_END}
    marker = tmp_path / "hanging"
    with running(KINDS["gunicorn-sync"], APP, "--timeout", "2", env=env) as server:
        _ask(server, 3)
        with server.connect() as client:
            client.sendall(request("GET", f"/hang?marker={marker}&n=3", variant="on"))
            assert eventually(lambda: lines_of(marker))
            read_all(client)
        events = sandbox.wait_for_events(4)
    assert _numbers(events) == [0, 1, 2, 3]
    hung = next(event for event in events if "/hang" in event["request"]["uri"])
    assert hung["metadata"]["moesif_otel"]["outcome"] in {"error", "unfinished"}


class Silent:
    """A Moesif that takes connections and never answers; `released` lets it close them."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                self.connections.append(self._listener.accept()[0])
            except OSError:
                return

    def close(self) -> None:
        self._listener.close()
        for connection in self.connections:
            connection.close()


@pytest.mark.parametrize("name", ["gunicorn-sync", "gunicorn-gevent-preload", "waitress"])
def test_a_silent_moesif_delays_no_answer(name: str) -> None:
    """Every request is answered while Moesif has taken our connection and not answered it."""
    silent = Silent()
    options = json.dumps({"SHUTDOWN_TIMEOUT": 0.5, "EVENT_BATCH_TIMEOUT": 0.01})
    try:
        env = {"SERVERS_BASE_URI": silent.url, "SERVERS_OPTIONS": options}
        with running(KINDS[name], APP, env=env) as server:
            assert all(b"[1, 2, 3]" in answer for answer in _ask(server, 5))
            assert eventually(lambda: silent.connections)
            assert all(b"[1, 2, 3]" in answer for answer in _ask(server, 20))
    finally:
        silent.close()


def test_moesif_that_is_down_at_the_start_gets_the_events_later() -> None:
    """Requests are served while nobody listens at BASE_URI; when Moesif comes up, their events arrive."""
    port = free_port()
    env = {"SERVERS_BASE_URI": f"http://127.0.0.1:{port}"}
    with running(KINDS["gunicorn-gthread"], APP, env=env) as server:
        assert all(b"[1, 2, 3]" in answer for answer in _ask(server, 10))
        with Sandbox(port=port) as sandbox:
            assert _numbers(sandbox.wait_for_events(10, 40)) == list(range(10))


def test_uwsgi_workers_deliver_what_they_serve(sandbox: Sandbox) -> None:
    """Workers that uWSGI forks without Python's fork hooks, after the middleware was made, deliver what they serve."""
    env = {"SERVERS_BASE_URI": sandbox.url}
    with running(KINDS["uwsgi"], APP, env=env) as server:
        pids: set[bytes] = set()
        asked = 0
        while len(pids) < 2 and asked < 200:
            pids.add(_ask_one(server, asked))
            asked += 1
        assert _numbers(sandbox.wait_for_events(asked)) == list(range(asked))


def _ask_one(server: RunningServer, n: int) -> bytes:
    return server.exchange(request("GET", f"/pid?n={n}", variant="on")).rpartition(b"\n")[2]


def test_a_killed_worker_is_replaced_and_goes_on(sandbox: Sandbox) -> None:
    """A kill -9 of a preloaded worker loses what had not left; the next worker, forked from the same master, delivers."""
    env = {"SERVERS_BASE_URI": sandbox.url}
    with running(KINDS["gunicorn-sync-preload"], APP, env=env) as server:
        pid = int(_ask_one(server, 0))
        sandbox.wait_for_events(1)
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: _survives(server)) not in (None, pid)
        assert len(sandbox.wait_for_events(2)) >= 2


def _survives(server: RunningServer) -> int | None:
    try:
        return int(_ask_one(server, 1))
    except (OSError, ValueError):
        return None


def test_a_frozen_process_goes_on_where_it_was() -> None:
    """As containers and Lambda freeze one (SIGSTOP), with an event pending, while its connection to Moesif dies."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        moesif = stack.enter_context(Sandbox(port=port))
        server = stack.enter_context(running(KINDS["gunicorn-gthread"], APP, env={"SERVERS_BASE_URI": moesif.url}))
        _ask(server, 1)
        moesif.wait_for_events(1)
        _ask(server, 2)
        os.killpg(server.process.pid, signal.SIGSTOP)
        moesif.stop()
        after = stack.enter_context(Sandbox(port=port))
        os.killpg(server.process.pid, signal.SIGCONT)
        _ask(server, 3)
        # By their ids: one that was on its way when the process froze may be sent again.
        assert eventually(lambda: len({one["transaction_id"] for one in (*moesif.events(), *after.events())}) == 6, 40)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6(sandbox: Sandbox) -> None:
    """On an IPv6 address URL and client address are right, also without a Host header."""
    try:
        port = free_port("::1")
    except OSError:
        pytest.skip("no IPv6 here")
    kind = KINDS["gunicorn-sync"]
    server = spawn(kind, APP, "-b", f"[::1]:{port}", env={"SERVERS_BASE_URI": sandbox.url})
    server.host, server.port = "::1", port
    try:
        until_it_listens(server)
        server.exchange(request("GET", "/list?n=1", variant="on", version="1.0"))
        (event,) = sandbox.wait_for_events(1)
    finally:
        server.stop()
        server.output.unlink(missing_ok=True)
    assert event["request"]["uri"] == f"http://[::1]:{port}/list?n=1"
    assert event["request"]["ip_address"] == "::1"
