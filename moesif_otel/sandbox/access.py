"""Decides who may talk to the sandbox: checks Host and Origin before everything else.

A web page that a developer happens to visit can make his browser send requests to this machine, and with a name that is
made to point here (DNS rebinding) even read the answers. Captured calls may hold credentials, and rules can block the
developer's own service: so a request is answered only for a name that nobody else can own, and what a browser sends
must come from the sandbox's own page. Programs send no Origin and are not concerned.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import orjson

from moesif_otel.sandbox.check import Refusal

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Access"]

# Names that no public name server gives out; Docker's `host.docker.internal` is one.
_PRIVATE_ENDINGS: Final = (".localhost", ".internal", ".local")
_SINGLE_LABEL: Final = re.compile(r"[a-z0-9_-]+", re.ASCII)
_PORTS: Final = {"http": 80, "https": 443}
_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"same-origin"),
)


class Access:
    """Stands before an ASGI application and refuses what another site's page asks for.

    Args:
        app: The application.
        any_machine: Whether the sandbox listens beyond this machine: names without a dot, as containers have, are
            taken then.
        allowed_hosts: More names to take.
    """

    _moesif_otel_internal = True  # not to be captured by the process that it runs in

    def __init__(self, app: ASGIApp, *, any_machine: bool, allowed_hosts: Collection[str] = ()) -> None:
        self._app = app
        self._any_machine = any_machine
        self._allowed_hosts = frozenset(host.lower().rstrip(".") for host in allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI), or refuse it; every answer tells the browser not to guess types or share it."""
        if scope["type"] != "http":
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name.lower() for name, _ in message.get("headers", ())}
                added = [(name, value) for name, value in _HEADERS if name not in known]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        refusal = self.refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send_safely)
            return
        body = orjson.dumps(refusal.as_json())
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await send_safely({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send_safely({"type": "http.response.body", "body": body})

    def refusal(self, scope: Any) -> Refusal | None:
        """Return why a request is not answered; None when it is."""
        headers: dict[bytes, str] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, value.decode("latin-1").strip())
        host = headers.get(b"host", "")
        if not self._is_own(host):
            return Refusal(
                421, "wrong_host", "use localhost or an IP address, or start the sandbox with --allow-host NAME"
            )
        origin = headers.get(b"origin")
        if origin is not None and not _is_same(origin, scope.get("scheme", "http"), host):
            return Refusal(403, "wrong_origin", "a page of another site may not talk to the sandbox")
        # What a browser fetches for another site without an Origin: scripts, images, frames, forms by GET. A link that
        # a person follows to the page is fine.
        site = headers.get(b"sec-fetch-site", "none").lower()
        is_visit = headers.get(b"sec-fetch-mode") == "navigate" and headers.get(b"sec-fetch-dest") == "document"
        if site in {"cross-site", "same-site"} and not (is_visit and scope["method"] == "GET"):
            return Refusal(403, "wrong_origin", "a page of another site may not talk to the sandbox")
        return None

    def _is_own(self, host: str) -> bool:
        if not host:  # HTTP/1.0; a browser always names one
            return True
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name == "localhost" or name.endswith(_PRIVATE_ENDINGS) or name in self._allowed_hosts:
            return True
        if self._any_machine and _SINGLE_LABEL.fullmatch(name):
            return True
        try:
            ipaddress.ip_address(name.partition("%")[0])
        except ValueError:
            return False
        return True


def _is_same(origin: str, scheme: str, host: str) -> bool:
    """Tell whether an Origin is the address that the request was sent to."""
    try:
        found, own = urlsplit(origin), urlsplit(f"{scheme}://{host}")
        return (found.scheme, found.hostname, found.port or _PORTS.get(found.scheme)) == (
            own.scheme,
            own.hostname,
            own.port or _PORTS.get(own.scheme),
        )
    except ValueError:
        return False
