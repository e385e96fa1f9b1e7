"""Every ASGI framework under every server, on real sockets: the client gets the same bytes, each call is one event."""

from __future__ import annotations

import base64
import contextlib
import signal
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from moesif_otel.sandbox import Sandbox
from tests.servers.harness import (
    ASGI_SERVERS,
    RunningServer,
    ServerKind,
    leave,
    read_until,
    request,
    spawn,
    until_it_listens,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

APP = "tests.servers.asgi_composite:application"
SERVERS = {
    kind.name: kind
    for kind in (
        *ASGI_SERVERS,
        ServerKind("hypercorn-trio", "{py} -m hypercorn {app} -b 127.0.0.1:{port} --log-level warning -k trio"),
        ServerKind("gunicorn", "{py} -m gunicorn {app} -k uvicorn_worker.UvicornWorker -b 127.0.0.1:{port} --log-level warning --no-control-socket"),
    )
}  # fmt: skip
ASYNCIO_ONLY = ("quart", "litestar", "falcon", "django")
JSON = "Content-Type: application/json"


def cases(server: str, side: str) -> dict[str, bytes]:
    """What is sent, by the path that the event will have."""
    found = {}
    for framework in ("fastapi", "starlette", "quart", "litestar", "falcon", "mounted", "plain"):
        if server == "hypercorn-trio" and framework in ASYNCIO_ONLY:
            continue
        # Starlette's streams hang on hypercorn's trio worker, also without us.
        for path in ("fail",) if server == "hypercorn-trio" and framework != "plain" else ("stream", "fail"):
            found[f"/{framework}/{path}"] = request("GET", f"/{side}/{framework}/{path}")
        echo = request("POST", f"/{side}/{framework}/echo?q=%C3%A4", JSON, body=b'{"n": 1}')
        found[f"/{framework}/echo?q=%C3%A4"] = echo
    if server != "hypercorn-trio":
        found["/django/items/7"] = request("POST", f"/{side}/django/items/7", JSON, body=b'{"n": 1}')
        found["/django/stream_async"] = request("GET", f"/{side}/django/stream_async")
        found["/django/boom"] = request("GET", f"/{side}/django/boom")
    chunked = b"".join(b"%x\r\n%s\r\n" % (50_000, bytes(50_000)) for _ in range(6)) + b"0\r\n\r\n"
    head = request("POST", f"/{side}/fastapi/upload", "Transfer-Encoding: chunked", "Content-Type: application/octet-stream")
    found["/fastapi/upload"] = head + chunked
    return found


def parts_of(answer: bytes) -> tuple[list[bytes], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return [line for line in head.split(b"\r\n") if not line.lower().startswith(b"date:")], body


class Served(NamedTuple):
    """What one server answered, and what its process wrote."""

    bare: dict[str, bytes]
    ours: dict[str, bytes]
    said: str


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Sandbox, dict[str, Served]]]:
    """All servers side by side; each asked everything, with and without us, then ended by SIGTERM at once."""
    with Sandbox() as sandbox, contextlib.ExitStack() as stack:
        running: dict[str, RunningServer] = {}
        for name, kind in SERVERS.items():
            env = {"SERVERS_BASE_URI": sandbox.url, "SERVERS_APPLICATION_ID": name}
            running[name] = server = spawn(kind, APP, env=env)
            stack.callback(server.output.unlink, missing_ok=True)
            stack.callback(server.stop, signal.SIGKILL)
        found: dict[str, Served] = {}
        for name, server in running.items():
            until_it_listens(server)
            bare, ours = (
                {path: server.exchange(raw) for path, raw in cases(name, side).items()} for side in ("bare", "ours")
            )
            if name != "hypercorn-trio":
                with server.connect() as client:
                    client.sendall(request("GET", "/ours/plain/forever"))
                    read_until(client, b"200", at_least_bytes=200_000)
                    leave(client)
            server.stop()
            found[name] = Served(bare, ours, server.said())
        yield sandbox, found


@pytest.mark.parametrize("server", SERVERS)
def test_a_client_gets_the_same_bytes(server: str, served: Any) -> None:
    """Status line, headers in their order, chunks; only the date may differ."""
    bare, ours, said = served[1][server]
    for path, expected in bare.items():
        assert expected.startswith(b"HTTP/1.1 "), said
        assert parts_of(ours[path]) == parts_of(expected), path


@pytest.mark.parametrize("server", SERVERS)
def test_each_call_is_one_event(server: str, served: Any) -> None:
    """All of them have been delivered when the process has ended, also without a lifespan."""
    sandbox, found = served
    _, answers, said = found[server]
    events: dict[str, Any] = {}
    for event in sandbox.events(application_id=server):
        path = event["request"]["uri"].partition("shop.example:8443")[2]
        assert path not in events, said
        events[path] = event
    forever = events.pop("/plain/forever", None)
    assert set(events) == set(answers), said
    for path, answer in answers.items():
        response = events[path]["response"]
        assert response["status"] == int(answer.split()[1])
        if "echo" in path:
            assert events[path]["request"]["body"] == {"n": 1}
            assert response["body"] == {"by": path.split("/")[1], "got": {"n": 1}}
        if "stream" in path:
            whole = b"one two" if path.startswith("/django") else b"one two three"
            assert base64.b64decode(response["body"]) == whole
    assert events["/fastapi/upload"]["response"]["body"] == {"size": 300_000}
    assert events["/fastapi/upload"]["metadata"]["moesif_otel"]["request_body"]["size_bytes"] == 300_000
    if server != "hypercorn-trio":
        assert forever["response"]["status"] == 200
        assert forever["metadata"]["moesif_otel"]["outcome"] == "client_aborted"


@pytest.mark.parametrize("server", SERVERS)
def test_nothing_goes_wrong_in_the_processes(server: str, served: Any) -> None:
    """Of ours there is one line at most; each failure of an application is told as often with us as without."""
    said = served[1][server].said
    ours = [line for line in said.splitlines() if "moesif_otel:" in line]
    assert all("captured the first call" in line for line in ours)
    assert said.count("\nLookupError") % 2 == 0, said
