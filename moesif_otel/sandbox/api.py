"""The sandbox's own API: what arrived, how to behave, what went over the wire.

Owns: the routes under `/api/` and the page at `/`.
Threads: runs on the server's loop; queries run in its executor.
Never: serves a browser page of another site: a request whose Host is a name and not this machine is refused, unless
    the sandbox was made to listen beyond it (captured calls may hold credentials; DNS can be made to lie).
"""

from __future__ import annotations

import asyncio
import ipaddress
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import orjson
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route

from moesif_otel.sandbox.behaviour import Behaviour, Behaviours
from moesif_otel.sandbox.check import PROFILE_KINDS, Refusal
from moesif_otel.sandbox.page import PAGE_HEADERS, render_page

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from moesif_otel.sandbox.store import Store
    from moesif_otel.sandbox.wire import Wire

__all__ = ["KINDS", "Api", "read_behaviours"]

_REFRESH_S: Final = 2
_PAGE_ROWS: Final = 200

KINDS: Final = (*PROFILE_KINDS, "actions")


def read_behaviours(value: Any) -> list[Behaviour]:
    """Read one behaviour or a list of them from JSON; raises `Refusal`."""
    items = value if isinstance(value, list) else [value] if value else []
    return [Behaviour.from_json(item) for item in items]


def _answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, media_type="application/json")


class Api:
    """The routes; `app` is the ASGI app that holds them."""

    def __init__(self, store: Store, wire: Wire, behaviours: Behaviours, executor: Executor, *, any_host: bool) -> None:
        self._store = store
        self._wire = wire
        self._behaviours = behaviours
        self._executor = executor
        self.app = Starlette(
            routes=[
                Route("/", self._page, methods=["GET"]),
                Route("/api/events", self._events, methods=["GET"]),
                Route("/api/events/{sequence:int}", self._event, methods=["GET"]),
                Route("/api/events", self._clear, methods=["DELETE"]),
                Route("/api/profiles", self._profiles, methods=["GET"]),
                Route("/api/requests", self._requests, methods=["GET"]),
                Route("/api/stats", self._stats, methods=["GET"]),
                Route("/api/behaviour", self._behaviour, methods=["GET", "PUT", "DELETE"]),
            ],
            middleware=[] if any_host else [Middleware(_OwnHostOnly)],
            exception_handlers={Refusal: _refused},
        )

    async def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    async def _events(self, request: Request) -> Response:
        since, limit = _number(request, "since") or 0, _number(request, "limit")
        found = await self._run(
            lambda: self._store.events(application_id=_application_id(request), since=since, limit=limit)
        )
        last = str(found[-1].sequence if found else since)
        return _answer([orjson.Fragment(row.event) for row in found], headers={"X-Sandbox-Sequence": last})

    async def _event(self, request: Request) -> Response:
        sequence = request.path_params["sequence"]
        found = await self._run(self._store.event, sequence)
        if found is None:
            raise Refusal(404, "not_found", f"no event {sequence}")
        options = orjson.OPT_INDENT_2  # for a person: the page links here
        return Response(orjson.dumps(orjson.loads(found), option=options), media_type="application/json")

    async def _page(self, request: Request) -> Response:
        application_id = _application_id(request)
        events = await self._run(lambda: self._store.events(application_id=application_id, limit=_PAGE_ROWS))
        stored = await self._run(self._store.count_events, application_id)
        refresh_s = _number(request, "refresh")
        page = await self._run(
            lambda: render_page(
                events,
                {**self._wire.stats(), "stored": stored},
                url=f"{request.url.scheme}://{request.url.netloc}",
                application_id=application_id,
                refresh_s=_REFRESH_S if refresh_s is None else refresh_s,
            )
        )
        return Response(page, headers=dict(PAGE_HEADERS), media_type="text/html")

    async def _clear(self, _: Request) -> Response:
        await self._run(self._store.clear)
        self._wire.clear()
        return Response(status_code=204)

    async def _profiles(self, request: Request) -> Response:
        kind = request.query_params.get("kind", "users")
        if kind not in KINDS:
            raise Refusal(400, "wrong_value", f"kind must be one of {', '.join(KINDS)}", field="kind")
        found = await self._run(self._store.profiles, kind, _application_id(request))
        return _answer([orjson.Fragment(profile) for profile in found])

    async def _requests(self, request: Request) -> Response:
        wanted = _application_id(request)
        return _answer([e for e in self._wire.requests() if wanted is None or e["application_id"] == wanted])

    async def _stats(self, request: Request) -> Response:
        stored = await self._run(self._store.count_events, _application_id(request))
        return _answer({**self._wire.stats(), "stored": stored})

    async def _behaviour(self, request: Request) -> Response:
        if request.method != "GET":
            body = await request.body() if request.method == "PUT" else b""
            try:
                value = orjson.loads(body or b"[]")
            except orjson.JSONDecodeError as error:
                raise Refusal(400, "bad_json", f"the body is not JSON: {error}") from None
            self._behaviours.replace(read_behaviours(value))
        return _answer(self._behaviours.as_json())


def _application_id(request: Request) -> str | None:
    return request.query_params.get("application_id") or None


def _number(request: Request, name: str) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise Refusal(400, "wrong_value", f"{name} must be a whole number", field=name)
    return int(text)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)  # noqa: S101 - the handler is registered for it alone
    return _answer(error.as_json(), error.status)


class _OwnHostOnly:
    """Refuses requests that a browser makes for a name which is not this machine's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_own(dict(scope["headers"]).get(b"host", b"").decode("latin-1")):
            await self._app(scope, receive, send)
            return
        refusal = Refusal(421, "wrong_host", "use localhost or an IP address, or start the sandbox with --host")
        await _answer(refusal.as_json(), refusal.status)(scope, receive, send)


def _is_own(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name in {"", "localhost"} or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
