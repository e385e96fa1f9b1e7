"""The sandbox's page: lists, one call, profiles, the wire, and the editors of configuration and rules.

Every view is made on the server from templates that escape all they are given, and works at its own address without a
script; the scripts replace parts of it as things change. A strict policy tells the browser to run nothing but the files
in `static`: what is shown came from anywhere.
"""

from __future__ import annotations

import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import jinja2
from starlette.applications import Starlette
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from moesif_otel.sandbox.api import Api, Backend, filters_in, number_in, refused
from moesif_otel.sandbox.bodies import tree_of
from moesif_otel.sandbox.check import Refusal
from moesif_otel.sandbox.detail import detail_of
from moesif_otel.sandbox.documents import DOCUMENTS
from moesif_otel.sandbox.export import har_of, lines_of
from moesif_otel.sandbox.jsontext import indented, read_json
from moesif_otel.sandbox.overview import HEIGHT, WIDTH, WINDOWS, overview_of
from moesif_otel.sandbox.people import PAGE_ROWS, actions_of, people_of, subscriptions_of
from moesif_otel.sandbox.query import DIRECTIONS, STATUS_CHOICES, Filters
from moesif_otel.sandbox.rows import size_in_words

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from concurrent.futures import Executor

    from starlette.requests import Request
    from starlette.types import Scope

    from moesif_otel.sandbox.behaviour import Behaviours
    from moesif_otel.sandbox.store import Store
    from moesif_otel.sandbox.wire import Wire

__all__ = ["PAGE_HEADERS", "Site"]

PAGE_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types sandbox"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
}

_HERE: Final = Path(__file__).parent
_LIST_ROWS: Final = 100
_COUNTED_ROWS: Final = 10_000
_WIRE_ROWS: Final = 100
_PROFILE_NODES: Final = 100  # of each of the fifty profiles on a page
_VERBS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
_TABS: Final = (
    ("calls", "/", "Calls"),
    ("users", "/users", "Users"),
    ("companies", "/companies", "Companies"),
    ("subscriptions", "/subscriptions", "Subscriptions"),
    ("actions", "/actions", "Actions"),
    ("wire", "/wire", "Wire"),
    ("rules", "/rules", "Rules & config"),
)


class Site:
    """The page and the API; `app` is the ASGI app that holds them."""

    def __init__(
        self,
        store: Store,
        wire: Wire,
        behaviours: Behaviours,
        executor: Executor,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._backend = Backend(store, wire, behaviours, executor, is_stopping)
        self._store = store
        self._templates = _environment()
        self.app = Starlette(
            routes=[
                Route("/", self._calls, methods=["GET"]),
                Route("/fragments/calls", self._call_list, methods=["GET"]),
                Route("/fragments/rows", self._new_rows, methods=["GET"]),
                Route("/fragments/overview", self._overview, methods=["GET"]),
                Route("/fragments/call/{sequence:int}", self._call, methods=["GET"]),
                Route("/users", self._people, methods=["GET"]),
                Route("/companies", self._people, methods=["GET"]),
                Route("/subscriptions", self._subscriptions, methods=["GET"]),
                Route("/actions", self._actions, methods=["GET"]),
                Route("/wire", self._wire, methods=["GET"]),
                Route("/rules", self._rules, methods=["GET"]),
                Route("/export.ndjson", self._export_lines, methods=["GET"]),
                Route("/export.har", self._export_har, methods=["GET"]),
                *Api(self._backend).routes,
                Mount("/static", _Static(directory=_HERE / "static")),
            ],
            exception_handlers={Refusal: refused},
        )
        # A process that captures itself, a test's say, does not capture what it delivers to.
        vars(self.app)["_moesif_otel_internal"] = True

    def _render(self, name: str, **values: Any) -> Response:
        text = self._templates.get_template(name).render(**values)
        return Response(text.encode("utf-8", "replace"), headers=PAGE_HEADERS, media_type="text/html")

    async def _page(self, request: Request, tab: str, make: Callable[[], dict[str, Any]]) -> Response:
        """Render a whole page in a worker thread: the frame, and what its tab shows."""

        def work() -> Response:
            return self._render(
                f"{tab}.html",
                tab=tab,
                tabs=_TABS,
                url=f"{request.url.scheme}://{request.url.netloc}",
                version=_version(),
                stats={**self._backend.wire.stats(), "stored": self._store.count_events()},
                application_ids=self._store.application_ids(),
                **make(),
            )

        found: Response = await self._backend.run(work)
        return found

    # Calls

    async def _calls(self, request: Request) -> Response:
        filters, before = filters_in(request), number_in(request, "before")
        window = _window(request)
        sequence = number_in(request, "call")

        def make() -> dict[str, Any]:
            return {
                **self._list(filters, before, sequence),
                **self._figures(filters, window),
                "call": self._detail(filters, sequence) if sequence is not None else None,
                "call_wanted": sequence,
                "verbs": _VERBS,
                "statuses": STATUS_CHOICES,
                "directions": DIRECTIONS,
            }

        return await self._page(request, "calls", make)

    async def _call_list(self, request: Request) -> Response:
        filters, before = filters_in(request), number_in(request, "before")
        found: Response = await self._backend.run(
            lambda: self._render("list.html", **self._list(filters, before, number_in(request, "call")))
        )
        return found

    async def _new_rows(self, request: Request) -> Response:
        """Answer with the calls that came after one; a header tells how many more there are."""
        filters, after = filters_in(request), number_in(request, "after") or 0
        count_only = request.query_params.get("count") == "1"

        def work() -> Response:
            number = self._store.count_rows(filters, at_most=_LIST_ROWS + 1, after=after)
            rows = [] if count_only else self._store.rows(filters, after=after, limit=_LIST_ROWS)
            answer = self._render("rows.html", rows=rows, filters=filters, selected=None, is_new=True)
            answer.headers["X-Sandbox-New"] = str(number)
            return answer

        found: Response = await self._backend.run(work)
        return found

    async def _overview(self, request: Request) -> Response:
        filters, window = filters_in(request), _window(request)
        found: Response = await self._backend.run(
            lambda: self._render("overview.html", **self._figures(filters, window))
        )
        return found

    async def _call(self, request: Request) -> Response:
        filters, sequence = filters_in(request), request.path_params["sequence"]

        def work() -> Response:
            call = self._detail(filters, sequence)
            if call is None:
                raise Refusal(404, "not_found", f"no call {sequence}: it may have been deleted")
            return self._render("call.html", call=call, filters=filters)

        found: Response = await self._backend.run(work)
        return found

    def _list(self, filters: Filters, before: int | None, selected: int | None) -> dict[str, Any]:
        last = self._store.last_sequence()  # first: the page asks again for what is newer
        rows = self._store.rows(filters, before=before, limit=_LIST_ROWS + 1)
        older = rows[_LIST_ROWS - 1].sequence if len(rows) > _LIST_ROWS else None
        rows = rows[:_LIST_ROWS]
        number = self._store.count_rows(filters, at_most=_COUNTED_ROWS + 1)
        newer = None
        if before is not None and rows:
            newer = self._store.newer_page_start(filters, rows[0].sequence, _LIST_ROWS)
        return {
            "filters": filters,
            "selected": selected,
            "is_new": False,
            "rows": rows,
            "before": before,
            "older": older,
            "newer": newer,
            "number": number,
            "number_most": _COUNTED_ROWS,
            "last": last,
        }

    def _figures(self, filters: Filters, window: str) -> dict[str, Any]:
        overview = overview_of(self._store, filters, window)
        return {"filters": filters, "overview": overview, "windows": WINDOWS, "width": WIDTH, "height": HEIGHT}

    def _detail(self, filters: Filters, sequence: int) -> Any:
        stored = self._store.event(min(sequence, (1 << 63) - 1))
        return None if stored is None else detail_of(self._store, stored, filters)

    # Profiles

    async def _people(self, request: Request) -> Response:
        kind = request.url.path.strip("/")
        wanted, page = _search(request), number_in(request, "page") or 1
        return await self._page(
            request, kind, lambda: {**_paged(wanted, page), "people": people_of(self._store, kind, wanted, page)}
        )

    async def _subscriptions(self, request: Request) -> Response:
        wanted, page = _search(request), number_in(request, "page") or 1
        return await self._page(
            request,
            "subscriptions",
            lambda: {**_paged(wanted, page), "items": subscriptions_of(self._store, wanted, page)},
        )

    async def _actions(self, request: Request) -> Response:
        wanted, page = _search(request), number_in(request, "page") or 1
        return await self._page(
            request, "actions", lambda: {**_paged(wanted, page), "items": actions_of(self._store, wanted, page)}
        )

    # The wire, rules and configuration

    async def _wire(self, request: Request) -> Response:
        is_refused = request.query_params.get("refused") == "1"
        before = number_in(request, "before")

        def make() -> dict[str, Any]:
            entries = self._backend.wire.requests(before=before)
            if is_refused:
                entries = [entry for entry in entries if entry["error"] or (entry["status"] or 0) >= 400]
            shown = entries[-_WIRE_ROWS:][::-1]
            older = shown[-1]["number"] if len(entries) > len(shown) else None
            return {"entries": shown, "refused": is_refused, "older": older, "before": before}

        return await self._page(request, "wire", make)

    async def _rules(self, request: Request) -> Response:
        application_id = request.query_params.get("application_id", "")

        def make() -> dict[str, Any]:
            documents = {
                name: self._store.document(application_id, name, kind.default).body for name, kind in DOCUMENTS.items()
            }
            blocked = self._store.count_rows(Filters(marks="blocked"), at_most=_COUNTED_ROWS)
            return {
                "application_id": application_id,
                "documents": {name: indented(read_json(text)) for name, text in documents.items()},
                "rules": _rule_lines(read_json(documents["rules"])),
                "behaviours": indented(self._backend.behaviours.as_json()),
                "blocked": blocked,
            }

        return await self._page(request, "rules", make)

    # Files

    async def _export_lines(self, request: Request) -> Response:
        lines = lines_of(self._store, filters_in(request))
        return self._file(lines, "calls.ndjson", "application/x-ndjson")

    async def _export_har(self, request: Request) -> Response:
        return self._file(har_of(self._store, filters_in(request)), "calls.har", "application/json")

    def _file(self, pieces: Iterator[bytes], name: str, media_type: str) -> Response:
        async def content() -> AsyncIterator[bytes]:
            while (piece := await self._backend.run(next, pieces, None)) is not None:
                yield piece

        headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
        return StreamingResponse(content(), headers=headers, media_type=media_type)


class _Static(StaticFiles):
    """The page's own files; asked for again each time, so that none is older than the page."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        answer = await super().get_response(path, scope)
        answer.headers["Cache-Control"] = "no-cache"
        return answer


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters.update(
        size=lambda size_bytes, known=True: size_in_words(size_bytes, known=known),
        ms=_millis,
        clock=lambda time_ms: time.strftime("%H:%M:%S", time.localtime(time_ms / 1000)),
        day=lambda time_ms: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_ms / 1000)),
        iso=lambda time_ms: datetime.fromtimestamp(time_ms / 1000, timezone.utc).isoformat(timespec="milliseconds"),
        kind=_status_kind,
        tree=lambda text: list(tree_of(read_json(text), max_nodes=_PROFILE_NODES)),
        count=lambda number: f"{number:,}",
        zip=lambda names, values: list(zip(names, values, strict=True)),
    )
    return environment


def _millis(took_ms: float | None) -> str:
    if took_ms is None:
        return "–"
    if took_ms < 10_000:
        return f"{took_ms:,.0f} ms"
    return f"{took_ms / 1000:,.1f} s"


def _status_kind(status: int | None) -> str:
    return f"s{status // 100}" if status is not None and 100 <= status <= 599 else "s0"


def _window(request: Request) -> str:
    found = request.query_params.get("window", "5m")
    return found if found in WINDOWS else "5m"


def _search(request: Request) -> str:
    return request.query_params.get("q", "").strip()[:200]


def _paged(wanted: str, page: int) -> dict[str, Any]:
    return {"q": wanted, "page": page, "page_rows": PAGE_ROWS}


def _rule_lines(rules: list[Any]) -> list[dict[str, str]]:
    """Say of each rule in one line what it does."""
    lines = []
    for rule in rules[:100]:
        if not isinstance(rule, dict):
            continue
        groups = rule.get("regex_config")
        conditions = [
            " and ".join(
                f"{condition.get('path')} matches {condition.get('value')}"
                for condition in group.get("conditions") or ()
                if isinstance(condition, dict)
            )
            for group in (groups if isinstance(groups, list) else ())
            if isinstance(group, dict) and isinstance(group.get("conditions"), list)
        ]
        response = rule.get("response")
        status = response.get("status") if isinstance(response, dict) else None
        lines.append(
            {
                "id": str(rule.get("_id", ""))[:200],
                "name": str(rule.get("name") or rule.get("_id") or "(no name)")[:200],
                "type": str(rule.get("type", ""))[:40],
                "effect": f"blocks with {status}" if rule.get("block") is True else "adds headers",
                "when": (" or ".join(filter(None, conditions)) or "any call")[:500],
            }
        )
    return lines


def _version() -> str:
    try:
        return version("moesif-otel")
    except PackageNotFoundError:  # run from a source tree
        return ""
