"""The HTTP side of Moesif's own paths: reading the request, carrying out behaviours, sending the answer.

Runs on the server's loop and must not block it: decoding, checks and storing run in an executor. Nothing here waits for
what stopping the sandbox does not end.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import orjson
from starlette.responses import Response

from moesif_otel.sandbox.check import MAX_BATCH_BYTES, Refusal
from moesif_otel.sandbox.ingest import Answer, Call, Ingest, decode_body
from moesif_otel.sandbox.wire import headers_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Executor

    from starlette.types import Receive, Scope, Send

    from moesif_otel.sandbox.behaviour import Behaviour, Behaviours
    from moesif_otel.sandbox.wire import Wire

__all__ = ["Front", "read_body"]

_T = TypeVar("_T")

# How soon a request that waits notices that the sandbox stops or behaves otherwise.
_NOTICE_S: Final = 0.05


class Front:
    """Serves Moesif's own paths.

    Args:
        ingest: What answers a request.
        behaviours: What to do wrong.
        wire: Where requests are noted.
        executor: Where work that takes time runs.
        is_stopping: Whether the sandbox stops; waits end then.
    """

    def __init__(
        self,
        ingest: Ingest,
        behaviours: Behaviours,
        wire: Wire,
        executor: Executor,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._ingest = ingest
        self._behaviours = behaviours
        self._wire = wire
        self._executor = executor
        self._is_stopping = is_stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        started_s = time.perf_counter()
        headers = headers_of(scope)
        entry = self._wire.begin(scope, headers)
        answer = await self._answer(scope, headers, entry, receive)
        if answer is None:
            await self._leave(scope, receive)
            return
        took_ms = round((time.perf_counter() - started_s) * 1000, 3)
        self._wire.note(entry, status=answer.status, took_ms=took_ms, items=answer.items, error=answer.error)
        response = Response(answer.body, answer.status, dict(answer.headers))
        if answer.body and "content-type" not in response.headers:
            response.headers["content-type"] = answer.content_type
        await response(scope, receive, send)

    async def _answer(
        self, scope: Scope, headers: Mapping[str, str], entry: dict[str, Any], receive: Receive
    ) -> Answer | None:
        """Return the answer; None means that the connection ends without one."""
        body = await read_body(receive, MAX_BATCH_BYTES)
        if body is None:
            return None
        self._wire.note(entry, body_bytes=len(body))
        self._wire.count("body_bytes", len(body))
        try:
            decoded = await self._run(decode_body, body, headers.get("content-encoding"))
        except Refusal as refusal:
            self._wire.count("rejected")
            # The rest of a body that was too long is not read: the connection is of no use any more.
            return Answer.of_refusal(refusal, {"Connection": "close"})
        self._wire.note(entry, decoded_bytes=len(decoded))
        self._wire.count("decoded_bytes", len(decoded))
        call = Call(scope["method"], scope["path"], headers, decoded)
        # Editing configuration and rules is how a user talks to the sandbox: that always works.
        behaviour = None if call.method == "PUT" else self._behaviours.take(call.path, len(decoded))
        if behaviour is None:
            return await self._process(call)
        self._wire.note(entry, misbehaved=True)
        self._wire.count("misbehaved")
        return await self._misbehave(behaviour, call, receive)

    async def _misbehave(self, behaviour: Behaviour, call: Call, receive: Receive) -> Answer | None:
        generation = self._behaviours.generation
        real = await self._process(call) if behaviour.process_first else None
        if behaviour.delay_s:
            end_s = time.monotonic() + behaviour.delay_s
            if not await self._wait(receive, lambda: time.monotonic() >= end_s, behaviour.delay_s):
                return None
        if behaviour.hang and not await self._wait(receive, lambda: self._behaviours.generation != generation):
            return None
        if behaviour.disconnect:
            return None
        extra = dict(behaviour.headers or {})
        if behaviour.status is not None:
            told = {"code": "told_to", "message": "this sandbox was told to answer so"}
            body = orjson.dumps({"error": told}) if behaviour.body is None else behaviour.body.encode()
            return Answer(behaviour.status, body, extra, error=told)
        answer = real or await self._process(call)
        return replace(answer, headers={**answer.headers, **extra})

    async def _wait(self, receive: Receive, is_over: Callable[[], bool], step_s: float = _NOTICE_S) -> bool:
        """Wait until `is_over`; False when the client leaves or the sandbox stops first."""
        gone = asyncio.ensure_future(receive())
        try:
            while not is_over():
                await asyncio.wait({gone}, timeout=min(step_s, _NOTICE_S))
                if gone.done() or self._is_stopping():
                    return False
            return True
        finally:
            gone.cancel()

    async def _process(self, call: Call) -> Answer:
        return await self._run(self._ingest.handle, call)

    async def _run(self, function: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    async def _leave(self, scope: Scope, receive: Receive) -> None:
        """Close the connection without an answer; returning at once would make the server answer 500."""
        self._wire.drop(scope.get("client"))
        while (await receive())["type"] != "http.disconnect":
            pass


async def read_body(receive: Receive, limit_bytes: int) -> bytes | None:
    """Read a body, at most a little over the limit; None when the client left before its end."""
    parts: list[bytes] = []
    size_bytes = 0
    while size_bytes <= limit_bytes:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        parts.append(part)
        size_bytes += len(part)
        if not message.get("more_body", False):
            break
    return b"".join(parts)
