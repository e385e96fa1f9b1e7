"""Delivery before an ASGI server's process ends, without a blocking call on its event loop.

uvicorn ends itself by the signal that it got, and granian's workers run no exit handlers: what is pending then would be
lost. So it is delivered before the application's `lifespan.shutdown.complete` reaches the server; and, for applications
that take no part in lifespan, at the end of the shutdown of these two.
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from moesif_otel._capture import INTERNAL
from moesif_otel._capture.patching import Patch, PatchSet
from moesif_otel._guard import PROCESS_GUARD, LiveSet

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    from moesif_otel._capture.exchange import CapturePipeline

    Send = Callable[[MutableMapping[str, Any]], Awaitable[Any]]

_ENDS: Final = frozenset({"lifespan.shutdown.complete", "lifespan.shutdown.failed"})

_delivered_at_shutdown: Final[weakref.WeakSet[CapturePipeline]] = weakref.WeakSet()


async def run_in_thread(function: Callable[..., Any], *args: Any) -> None:
    """Call a blocking function in a thread of its own: the loop's may all be busy with the application's work."""
    trio = sys.modules.get("trio")
    if asyncio._get_running_loop() is not None:  # typeshed names it; the public one raises where there is none
        executor = ThreadPoolExecutor(1, thread_name_prefix="moesif-otel-flush")
        try:
            await asyncio.get_running_loop().run_in_executor(executor, function, *args)
        finally:
            executor.shutdown(wait=False)
    elif trio is not None:
        await trio.to_thread.run_sync(function, *args, limiter=trio.CapacityLimiter(1))


def delivering_send(pipeline: CapturePipeline, send: Send) -> Send:
    """Return a lifespan's `send` that delivers what is pending before it says that the shutdown is complete."""
    _delivered_at_shutdown.discard(pipeline)

    async def deliver_and_send(message: MutableMapping[str, Any]) -> Any:
        try:
            is_end = message["type"] in _ENDS
        except (KeyError, TypeError):
            is_end = False  # the server says what is wrong with such a message
        if is_end:
            await _deliver(pipeline)
        return await send(message)

    return deliver_and_send


async def _deliver(pipeline: CapturePipeline) -> None:
    if pipeline in _delivered_at_shutdown:
        return  # by a layer further inside; where Moesif cannot be reached it would take the same time again
    try:
        await run_in_thread(pipeline.force_flush, pipeline.settings.shutdown_timeout)
        _delivered_at_shutdown.add(pipeline)
    except Exception as exc:
        PROCESS_GUARD.caught("delivery at the end of an ASGI server", exc)


async def _shut_down(shutdown: Any, server: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do a server's own shutdown, then deliver what no lifespan has."""
    result = await shutdown(server, *args, **kwargs)
    if not getattr(server, INTERNAL, False):
        for pipeline in _pipelines:
            await _deliver(pipeline)
    return result


_shutdowns: Final = PatchSet(
    [
        Patch("uvicorn.server", "Server.shutdown", _shut_down),
        Patch("granian.asgi", "LifespanProtocol.shutdown", _shut_down),
    ]
)
_pipelines: Final[LiveSet[CapturePipeline]] = LiveSet()


def deliver_at_shutdown(pipeline: CapturePipeline) -> None:
    """Deliver what is pending in a pipeline when a server shuts down, also without a lifespan. Never raises."""
    _pipelines.add(pipeline)
    PROCESS_GUARD.run("patching ASGI servers", _shutdowns.hold, pipeline)
