"""Clients and servers on IPv6, under ASGI and Tornado (WSGI: `test_wsgi_ends`): address and URL, with and without Host."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from typing import TYPE_CHECKING, Any

import pytest
from tornado.httpserver import HTTPServer
from tornado.web import Application, RequestHandler

from moesif_otel.sandbox import Sandbox
from moesif_otel.tornado import MoesifMiddleware
from tests.ports import free_port
from tests.servers.harness import ServerKind, read_all, request, spawn, until_it_listens

if TYPE_CHECKING:
    from collections.abc import Iterator

APP = "tests.servers.governed_asgi:application"
SERVERS = {
    "uvicorn": "{py} -m uvicorn {app} --host ::1 --log-level warning --port PORT",
    "hypercorn": "{py} -m hypercorn {app} -b [::1]:PORT --log-level warning",
    "daphne": "{py} -m daphne {app} -b ::1 -v 0 -p PORT",
    "granian": "{py} -m granian --interface asgi {app} --host ::1 --log-level warning --port PORT",
}
HOSTS = ("Host: [::1]:8443", "Host: shop.example", "Host: [::1%25lo]", "")


@pytest.fixture(scope="module", autouse=True)
def _ipv6() -> None:
    try:
        free_port("::1")
    except OSError:
        pytest.skip("no IPv6 here")


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


def requests() -> list[bytes]:
    """With each Host, and without one as HTTP/1.0 allows."""
    found = [request("GET", f"/{n}", *([host] if host else []), version="1.1" if host else "1.0") for n, host in enumerate(HOSTS)]
    return [*found, request("GET", "/forwarded", "Host: shop.example", 'Forwarded: for="[2001:db8::7]:4711"')]


def check(events: list[dict[str, Any]], port: int) -> None:
    told = {event["request"]["uri"].rpartition("/")[2]: event["request"] for event in events}
    addresses = {name: one["ip_address"] for name, one in told.items()}
    assert addresses.pop("forwarded") == "2001:db8::7"
    assert set(addresses.values()) == {"::1"}
    assert told["0"]["uri"] == "http://[::1]:8443/0"
    assert told["1"]["uri"] == "http://shop.example/1"
    # A zone is of the client's machine alone (RFC 6874), so that Host names nobody here; nor does one that is missing.
    # What the server calls itself stands there: Tornado 127.0.0.1, hypercorn nothing.
    names = {f"[::1]:{port}", f"localhost:{port}", "localhost", "127.0.0.1"}
    for number in ("2", "3"):
        assert told[number]["uri"] in {f"http://{name}/{number}" for name in names}


@pytest.mark.parametrize("name", SERVERS)
def test_asgi_servers(name: str, sandbox: Sandbox) -> None:
    """The address is the client's, and the URL is one."""
    port = free_port("::1")
    command = SERVERS[name].replace("PORT", str(port))
    with contextlib.ExitStack() as stack:
        server = spawn(ServerKind(name, command), APP, env={"SERVERS_BASE_URI": sandbox.url, "SERVERS_APPLICATION_ID": name})
        stack.callback(server.output.unlink, missing_ok=True)
        stack.callback(server.stop, signal.SIGKILL)
        server.host, server.port = "::1", port
        until_it_listens(server)
        for raw in requests():
            assert b"served" in server.exchange(raw), server.said()
        check(sandbox.wait_for_events(len(HOSTS) + 1), port)


def test_tornado(sandbox: Sandbox) -> None:
    """As under ASGI."""

    class Handler(RequestHandler):
        def get(self) -> None:
            self.write("served")

    middleware = MoesifMiddleware({"APPLICATION_ID": "tornado", "BASE_URI": sandbox.url, "EVENT_BATCH_TIMEOUT": 0.05})

    def ask(port: int) -> list[bytes]:
        answers = []
        for raw in requests():
            with socket.create_connection(("::1", port), 10) as client:
                client.sendall(raw)
                answers.append(read_all(client))
        return answers

    async def serve() -> tuple[int, list[bytes]]:
        server = HTTPServer(Application([("/.*", Handler)], log_function=middleware.log_event))
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
            listener.setblocking(False)
            server.add_sockets([listener])
            port: int = listener.getsockname()[1]
            answers = await asyncio.to_thread(ask, port)
            server.stop()
        return port, answers

    port, answers = asyncio.run(serve())
    assert all(answer.endswith(b"served") for answer in answers)
    events = sandbox.wait_for_events(len(answers))
    middleware.shutdown()
    check(events, port)
