"""Running small Tornado applications on real sockets, and a pipeline that notes what their capture saw."""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import tornado.netutil
from tornado import httpserver

from moesif_otel._capture.body import ByteBudget
from moesif_otel._capture.tornado.capture import TornadoCapture
from moesif_otel._guard import Guard
from moesif_otel.settings import Settings
from tests.recording import Asked

if TYPE_CHECKING:
    from moesif_otel._capture.exchange import Exchange, Outcome

GIVE_UP_S = 30.0


@dataclass
class Seen:
    """What an Exchange held when it finished."""

    method: str
    url: str
    request_headers: list[tuple[str, str]]
    request_body: bytes | None
    request_total_bytes: int | None
    status: int | None
    response_headers: list[tuple[str, str]]
    response_body: bytes | None
    response_total_bytes: int | None
    decoded: bool
    outcome: Outcome
    error_type: str | None
    peer_address: str | None
    started_ns: int
    ended_ns: int
    arguments: tuple[Any, ...]
    user_id: str | None
    notes: dict[str, Any]

    def header(self, name: str) -> list[str]:
        return [value for key, value in self.response_headers if key.lower() == name.lower()]


@dataclass(eq=False)
class Recorder:
    """A pipeline that keeps what it is given."""

    settings: Settings
    guard: Guard = field(default_factory=Guard)
    budget: ByteBudget = field(default_factory=lambda: ByteBudget(64 * 1024 * 1024))
    generation: int = 0
    seen: list[Seen] = field(default_factory=list)
    late: list[Exchange] = field(default_factory=list)
    superseded_exchanges: list[Exchange] = field(default_factory=list)
    opened_count: int = 0
    decide: Any = None  # a function (exchange, read_ahead) -> Decision, or none

    def opened(self, exchange: Exchange) -> None:
        self.opened_count += 1

    def has_callbacks(self, exchange: Exchange) -> bool:
        return True

    @property
    def has_rules(self) -> bool:
        return self.decide is not None

    def bind(self, exchange: Exchange, span: Any) -> None:
        exchange.span = span

    def answering(self, exchange: Exchange) -> None:
        pass

    def governed(self, exchange: Exchange) -> Asked | None:
        return None if self.decide is None else Asked(self.decide, exchange)

    def finished(self, exchange: Exchange) -> None:
        request, response = exchange.request_body, exchange.response_body
        self.seen.append(
            Seen(
                method=exchange.method,
                url=exchange.url,
                request_headers=exchange.request_headers,
                request_body=None if request is None else request.data(),
                request_total_bytes=None if request is None else request.total_bytes,
                status=exchange.status,
                response_headers=exchange.response_headers,
                response_body=None if response is None else response.data(),
                response_total_bytes=None if response is None else response.total_bytes,
                decoded=response is not None and response.decoded,
                outcome=exchange.outcome,
                error_type=exchange.error_type,
                peer_address=exchange.peer_address,
                started_ns=exchange.started_ns,
                ended_ns=exchange.ended_ns,
                arguments=exchange.callback_arguments,
                user_id=exchange.user_id,
                notes=exchange.notes,
            )
        )
        exchange.discard()

    def finished_late(self, exchange: Exchange) -> None:
        self.late.append(exchange)

    def superseded(self, exchange: Exchange) -> None:
        self.superseded_exchanges.append(exchange)
        exchange.discard()


def recorder(**options: Any) -> Recorder:
    """Make a recording pipeline of the given options."""
    return Recorder(Settings.of({"APPLICATION_ID": "an application id of tests", **options}))


@contextlib.contextmanager
def capturing(pipeline: Recorder | None = None, **options: Any):
    """Run with a started capture."""
    capture = TornadoCapture(pipeline or recorder(**options))
    capture.start()
    try:
        yield capture
    finally:
        capture.stop()


@contextlib.asynccontextmanager
async def serving(app: Any, **server_options: Any):
    """Serve an application on a free port."""
    server = httpserver.HTTPServer(app, **server_options)
    sockets = tornado.netutil.bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    try:
        yield sockets[0].getsockname()[1]
    finally:
        server.stop()
        await server.close_all_connections()


async def talk(port: int, *requests: bytes, give_up_s: float = GIVE_UP_S) -> bytes:
    """Send raw requests on one connection and give all that came back until the server closed it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for request in requests:
            writer.write(request)
        await writer.drain()
        return await asyncio.wait_for(reader.read(), give_up_s)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def get(path: str, *headers: str, method: str = "GET", body: bytes = b"") -> bytes:
    """Give a raw request, after which the server closes the connection."""
    lines = [f"{method} {path} HTTP/1.1", "Host: api.example.com:8080", "Connection: close", *headers]
    if body or method in {"POST", "PUT", "PATCH"}:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def without_dates(raw: bytes) -> bytes:
    """Leave out what differs from second to second: a header, and the time in gzip's own (RFC 1952, 2.3)."""
    raw = re.sub(rb"\r\nDate: [^\r]*", b"", raw)
    return re.sub(rb"\x1f\x8b\x08\x00....", b"\x1f\x8b\x08\x00\0\0\0\0", raw, flags=re.DOTALL)


def run(coroutine: Any) -> Any:
    """Run a coroutine in a loop of its own, for a limited time."""
    return asyncio.run(asyncio.wait_for(coroutine, GIVE_UP_S * 2))


async def eventually(condition: Any) -> None:
    """Let the loop turn until something is true."""

    async def turn() -> None:
        while not condition():  # noqa: ASYNC110 - conditions are about anything
            await asyncio.sleep(0.001)

    await asyncio.wait_for(turn(), GIVE_UP_S)
