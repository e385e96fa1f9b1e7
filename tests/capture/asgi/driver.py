"""A server's side of ASGI, scripted: what an application is given, and what it sent."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

DISCONNECT = {"type": "http.disconnect"}


def http_scope(method: str = "GET", path: str = "/items", **values: Any) -> dict[str, Any]:
    """A scope as uvicorn makes it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": str(path).encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"shop.example"), (b"user-agent", b"probe")],
        "client": ("10.0.0.9", 4711),
        "server": ("127.0.0.1", 8000),
        "state": {},
        **values,
    }


def websocket_scope(**values: Any) -> dict[str, Any]:
    """A scope of a handshake."""
    scope = http_scope(path="/socket", type="websocket", scheme="ws", subprotocols=[], **values)
    del scope["method"]
    return scope


def request(body: bytes = b"", *, more: bool = False) -> dict[str, Any]:
    """One message of a request."""
    return {"type": "http.request", "body": body, "more_body": more}


class Connection:
    """What a server does for one call.

    Args:
        incoming: The messages that `receive` gives, then it waits for ever; an exception is raised.
        fails_at: `send` raises this error at the message of this number.
    """

    def __init__(self, *incoming: Any, fails_at: tuple[int, BaseException] | None = None) -> None:
        self.incoming = deque(incoming or (request(),))
        self.fails_at = fails_at
        self.sent: list[dict[str, Any]] = []
        self.received = 0
        self.ended: Any = None

    async def receive(self) -> dict[str, Any]:
        if not self.incoming:
            await asyncio.sleep(3600)
        self.received += 1
        message = self.incoming.popleft()
        if isinstance(message, BaseException):
            raise message
        return message

    async def send(self, message: dict[str, Any]) -> None:
        if self.fails_at is not None and len(self.sent) == self.fails_at[0]:
            raise self.fails_at[1]
        # A snapshot: what the application does to the message later is no longer the server's affair.
        self.sent.append(dict(message))

    async def serve(self, app: Any, scope: dict[str, Any]) -> Connection:
        """Have the application serve the call; notes what it returned or raised."""
        try:
            self.ended = ("returned", await app(scope, self.receive, self.send))
        except BaseException as exc:
            self.ended = ("raised", exc)
        return self

    @property
    def seen(self) -> Any:
        """All that a server can see of a call."""
        kind, value = self.ended
        return self.sent, self.received, kind, repr(value)
