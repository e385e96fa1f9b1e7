"""The sandbox's own API under `/api/`: what arrived, how to behave, what went over the wire, and what changes.

Runs on the server's loop; questions run in its executor.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from moesif_otel.sandbox.behaviour import Behaviour, Behaviours
from moesif_otel.sandbox.check import PROFILE_KINDS, Refusal
from moesif_otel.sandbox.documents import DOCUMENTS, check_document, put_document
from moesif_otel.sandbox.front import read_body
from moesif_otel.sandbox.jsontext import indented, read_json
from moesif_otel.sandbox.query import Filters
from moesif_otel.sandbox.store import MAX_DOCUMENT_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from concurrent.futures import Executor

    from starlette.requests import Request

    from moesif_otel.sandbox.store import Store, StoredRow
    from moesif_otel.sandbox.wire import Wire

__all__ = ["KINDS", "Api", "Backend", "filters_in", "json_answer", "number_in", "read_behaviours", "refused"]

KINDS: Final = (*PROFILE_KINDS, "actions")

_MAX_BEHAVIOUR_BYTES: Final = 64 * 1024
_MAX_ROWS: Final = 1_000
_MAX_STREAMS: Final = 32
_TICK_S: Final = 0.2  # at most so often a page is told of changes
_HEARTBEAT_S: Final = 15.0
_NOTICE_S: Final = 0.5


@dataclass(frozen=True)
class Backend:
    """The collaborators of the sandbox's own pages and API."""

    store: Store
    wire: Wire
    behaviours: Behaviours
    executor: Executor
    is_stopping: Callable[[], bool]

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that takes time in a worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, function, *arguments)


def read_behaviours(value: Any) -> list[Behaviour]:
    """Read one behaviour or a list of them from JSON; raises `Refusal`."""
    items = value if isinstance(value, list) else [value] if value else []
    return [Behaviour.from_json(item) for item in items]


def json_answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Make an answer with a JSON body that nobody keeps."""
    return Response(
        orjson.dumps(value), status, {"Cache-Control": "no-store", **(headers or {})}, media_type="application/json"
    )


def filters_in(request: Request) -> Filters:
    """Read the filters from the query; a form may give several statuses. Raises `Refusal`."""
    return Filters.read({**request.query_params, "status": ",".join(request.query_params.getlist("status"))})


def number_in(request: Request, name: str) -> int | None:
    """Read a whole number from the query; raises `Refusal`."""
    text = request.query_params.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise Refusal(400, "wrong_value", f"{name} must be a whole number", field=name)
    return int(text)


async def refused(_: Request, error: Exception) -> Response:
    """Answer a refusal."""
    assert isinstance(error, Refusal)  # noqa: S101 - the handler is registered for it alone
    return json_answer(error.as_json(), error.status)


class Api:
    """The routes under `/api/`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._store = backend.store
        self._streams = 0
        self.routes = [
            Route("/api/events", self._events, methods=["GET"]),
            Route("/api/events/{sequence:int}", self._event, methods=["GET"]),
            Route("/api/events", self._clear, methods=["DELETE"]),
            Route("/api/calls", self._calls, methods=["GET"]),
            Route("/api/stream", self._stream, methods=["GET"]),
            Route("/api/profiles", self._profiles, methods=["GET"]),
            Route("/api/requests", self._requests, methods=["GET"]),
            Route("/api/stats", self._stats, methods=["GET"]),
            Route("/api/behaviour", self._behaviour, methods=["GET", "PUT", "DELETE"]),
            Route("/api/documents/{name}", self._document, methods=["GET", "PUT"]),
        ]

    async def _events(self, request: Request) -> Response:
        since, limit = number_in(request, "since") or 0, number_in(request, "limit")
        filters = filters_in(request)
        if limit is not None:
            found = await self._backend.run(
                lambda: self._store.events(application_id=filters.application_id, since=since, limit=limit)
            )
            last = found[-1].sequence if found else since
            text = orjson.dumps([orjson.Fragment(stored.event) for stored in found])
            return Response(text, headers={"X-Sandbox-Sequence": str(last)}, media_type="application/json")
        last = await self._backend.run(self._store.last_sequence)
        groups = self._store.each_event(filters, since=since, until=last)

        async def array() -> AsyncIterator[bytes]:
            opening = b"["
            while (group := await self._backend.run(next, groups, None)) is not None:
                yield opening + b",".join(stored.event for stored in group)
                opening = b","
            yield b"[]" if opening == b"[" else b"]"

        headers = {"X-Sandbox-Sequence": str(max(last, since)), "Cache-Control": "no-store"}
        return StreamingResponse(array(), headers=headers, media_type="application/json")

    async def _event(self, request: Request) -> Response:
        sequence = _bounded(request.path_params["sequence"])
        found = await self._backend.run(self._store.event, sequence)
        if found is None:
            raise Refusal(404, "not_found", f"no event {sequence}")
        text = found.event
        if request.query_params.get("pretty") != "0":  # for a person: the page links here
            text = indented(read_json(text)).encode()
        return Response(text, media_type="application/json")

    async def _calls(self, request: Request) -> Response:
        """Answer with rows, newest first, as the page lists them; `after` and `before` are sequence numbers."""
        filters = filters_in(request)
        limit = min(number_in(request, "limit") or 100, _MAX_ROWS)
        before, after = number_in(request, "before"), number_in(request, "after")
        last = await self._backend.run(self._store.last_sequence)
        found = await self._backend.run(lambda: self._store.rows(filters, before=before, after=after, limit=limit))
        newest = max(last, found[0].sequence if found else 0)  # one may have come between the two
        return json_answer({"calls": [_row_as_json(stored) for stored in found], "last": newest})

    async def _clear(self, _: Request) -> Response:
        await self._backend.run(self._store.clear)
        self._backend.wire.clear()
        return Response(status_code=204)

    async def _stream(self, _: Request) -> Response:
        """Tell of changes as server-sent events: how much is there now, not what; pages ask for what they show."""
        if self._streams >= _MAX_STREAMS:
            raise Refusal(503, "too_many_streams", f"at most {_MAX_STREAMS} pages can follow changes at a time")
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._changes(), headers=headers, media_type="text/event-stream")

    async def _changes(self) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended meanwhile
                loop.call_soon_threadsafe(changed.set)

        self._streams += 1
        stop = self._store.listen(tell)
        try:
            yield b"retry: 1000\n\n"
            silent_s = 0.0
            changed.set()
            while not self._backend.is_stopping():
                try:
                    await asyncio.wait_for(changed.wait(), _NOTICE_S)
                except asyncio.TimeoutError:
                    silent_s += _NOTICE_S
                    if silent_s >= _HEARTBEAT_S:
                        silent_s = 0.0
                        yield b": still here\n\n"
                    continue
                changed.clear()
                silent_s = 0.0
                yield b"data: " + orjson.dumps(await self._backend.run(self._state)) + b"\n\n"
                await asyncio.sleep(_TICK_S)
        finally:
            self._streams -= 1
            stop()

    def _state(self) -> dict[str, Any]:
        return {
            "last": self._store.last_sequence(),
            "stored": self._store.count_events(),
            "rejected": self._backend.wire.stats()["rejected"],
        }

    async def _profiles(self, request: Request) -> Response:
        kind = request.query_params.get("kind", "users")
        if kind not in KINDS:
            raise Refusal(400, "wrong_value", f"kind must be one of {', '.join(KINDS)}", field="kind")
        application_id = request.query_params.get("application_id") or None
        found = await self._backend.run(self._store.profiles, kind, application_id)
        return json_answer([orjson.Fragment(profile) for profile in found])

    async def _requests(self, request: Request) -> Response:
        wanted = request.query_params.get("application_id") or None
        entries = self._backend.wire.requests()
        return json_answer([entry for entry in entries if wanted is None or entry["application_id"] == wanted])

    async def _stats(self, request: Request) -> Response:
        application_id = request.query_params.get("application_id") or None
        stored = await self._backend.run(self._store.count_events, application_id)
        return json_answer({**self._backend.wire.stats(), "stored": stored})

    async def _behaviour(self, request: Request) -> Response:
        if request.method != "GET":
            body = await _body(request, _MAX_BEHAVIOUR_BYTES) if request.method == "PUT" else b""
            self._backend.behaviours.replace(read_behaviours(read_json(body or b"[]")))
        return json_answer(self._backend.behaviours.as_json())

    async def _document(self, request: Request) -> Response:
        """Read or put the configuration or the rules, with the checks of an editor."""
        name = request.path_params["name"]
        if name not in DOCUMENTS:
            raise Refusal(404, "not_found", "the documents are config and rules")
        application_id = request.query_params.get("application_id", "")
        if request.method == "PUT":
            body = await _body(request, MAX_DOCUMENT_BYTES)
            faults = check_document(name, read_json(body))
            if faults:
                error = {"code": "wrong_document", "message": f"{len(faults)} to mend", "faults": faults[:50]}
                return json_answer({"error": error}, 422)
            await self._backend.run(put_document, self._store, application_id, name, body)
        document = await self._backend.run(self._store.document, application_id, name, DOCUMENTS[name].default)
        headers = {DOCUMENTS[name].tag_header: document.tag, "Cache-Control": "no-store"}
        return Response(document.body, headers=headers, media_type="application/json")


def _bounded(sequence: int) -> int:
    return min(sequence, (1 << 63) - 1)


def _row_as_json(stored: StoredRow) -> dict[str, Any]:
    known = {"sequence": stored.sequence, "application_id": stored.application_id, "received_s": stored.received_s}
    return {**known, **asdict(stored.row)}


async def _body(request: Request, limit_bytes: int) -> bytes:
    body = await read_body(request.receive, limit_bytes)
    if body is None or len(body) > limit_bytes:
        raise Refusal(413, "too_large", f"the body must have at most {limit_bytes} bytes")
    return body
