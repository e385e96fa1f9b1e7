"""The request and the response of an ASGI call, as callbacks get them.

Starlette's own classes where Starlette is installed, as moesifasgi gave them; else plain objects with the same names
for what nearly every callback looks at. Made only where there are callbacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moesif_otel._guard import LATE_IMPORTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moesif_otel._capture.exchange import Exchange

# A router changes these in place; callbacks see the request as it came.
_AS_IT_CAME = ("path", "raw_path", "root_path", "query_string", "headers")


class CallbackObjects:
    """Makes the arguments of callbacks. Thread-safe."""

    __slots__ = ("_request_class", "_response_class")

    def __init__(self) -> None:
        try:
            with LATE_IMPORTS:
                from starlette.requests import Request
                from starlette.responses import Response
        except ImportError:
            self._request_class: Any = None
            self._response_class: Any = None
        else:
            self._request_class, self._response_class = Request, Response

    @staticmethod
    def as_it_came(scope: Any) -> dict[str, Any]:
        """Note what routers change."""
        return {name: scope[name] for name in _AS_IT_CAME if name in scope}

    def request(self, scope: Any, came: dict[str, Any], exchange: Exchange) -> Any:
        """Return the request: what routing and middlewares put into the scope, at the address that it came to.

        Its body is the captured part.
        """
        seen = {"method": "GET", "state": {}, **scope, **came, "type": "http"}
        data = exchange.request_body.data() if exchange.request_body is not None else b""
        if self._request_class is None:
            return PlainRequest(seen, exchange.url, data)
        return self._request_class(seen, _replaying(data))

    def response(self, headers: Any, exchange: Exchange) -> Any:
        """Return the response, or None where none has begun."""
        status = exchange.status
        if status is None:
            return None
        data = exchange.response_body.data() if exchange.response_body is not None else b""
        if self._response_class is None:
            return PlainResponse(status, headers, data)
        response = self._response_class(status_code=status)
        response.body = data
        response.raw_headers = list(headers)
        return response


def _replaying(data: bytes) -> Any:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data, "more_body": False}

    return receive


class _PlainHeaders(Mapping[str, str]):
    """Headers by name in any case; repeated ones joined with a comma."""

    def __init__(self, headers: Any) -> None:
        self._values: dict[str, str] = {}
        for raw_name, raw_value in headers:
            name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
            self._values[name] = f"{self._values[name]}, {value}" if name in self._values else value

    def __getitem__(self, name: str) -> str:
        return self._values[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class PlainRequest:
    """A request where Starlette is not installed.

    Attributes:
        scope: The ASGI scope, with what the application put into it.
        method, url: As they came; `url` is the full URL as text.
        headers: Mapping by name in any case.
        client: Host and port of the client, or None.
        state: What the application keeps in `scope["state"]`.
    """

    __slots__ = ("_body", "client", "headers", "method", "scope", "state", "url")

    def __init__(self, scope: dict[str, Any], url: str, body: bytes) -> None:
        self.scope = scope
        self.method: str = scope.get("method", "GET")
        self.url = url
        self.headers = _PlainHeaders(scope.get("headers", ()))
        self.client = scope.get("client")
        self.state = scope["state"]
        self._body = body

    async def body(self) -> bytes:
        """Return the captured part of the body."""
        return self._body


class PlainResponse:
    """A response where Starlette is not installed: `status_code`, `headers` by name in any case, captured `body`."""

    __slots__ = ("body", "headers", "status_code")

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status_code = status
        self.headers = _PlainHeaders(headers)
        self.body = body
