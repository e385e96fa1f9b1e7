"""Which tracer provider a pipeline works with, and the one processor of ours on each.

Spans start and end in any thread and in finalizers: `on_start` and `on_end` take no lock.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor

from moesif_otel._guard import PROCESS_GUARD

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, Span


def resolve_provider(explicit: Any = None) -> Any:
    """Return the provider to work with: the explicit one, else the global one if it is an SDK provider, else None.

    Without one no span is made: nobody could see it. To be called at the first request, not at construction:
    applications set their provider up in any order.

    Args:
        explicit: The `tracer_provider` that a user gave, or None.
    """
    for provider in (explicit, trace.get_tracer_provider()):
        if callable(getattr(provider, "add_span_processor", None)):
            return provider
    return None


class Dispatcher(SpanProcessor):
    """The one processor of ours on a provider; pipelines come and go, a processor cannot be removed.

    It keeps no pipeline alive. A pipeline counts its own errors; none reaches the application's span. Thread-safe.
    """

    def __init__(self) -> None:
        self._pipelines: tuple[weakref.ref[Any], ...] = ()
        self._lock = threading.RLock()

    def register(self, pipeline: Any) -> None:
        """Let a pipeline see the provider's spans from now on; twice is once."""
        self._replace(pipeline, (weakref.ref(pipeline),))

    def unregister(self, pipeline: Any) -> None:
        """Let it see no more of them."""
        self._replace(pipeline, ())

    def _replace(self, pipeline: Any, by: tuple[weakref.ref[Any], ...]) -> None:
        with self._lock:
            others = tuple(one for one in self._pipelines if one() not in {None, pipeline})
            self._pipelines = others + by

    def renew_lock(self) -> None:
        """Replace the lock in a forked child."""
        self._lock = threading.RLock()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Offer a started span to every pipeline."""
        del parent_context
        for reference in self._pipelines:
            pipeline = reference()
            if pipeline is not None:
                pipeline.on_start(span)

    def on_end(self, span: ReadableSpan) -> None:
        """Tell every pipeline of an ended span."""
        for reference in self._pipelines:
            pipeline = reference()
            if pipeline is not None:
                pipeline.on_end(span)

    def shutdown(self) -> None:
        """Do nothing: the pipelines' owners end them, and at exit they end themselves."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Do nothing: an application that flushes its own telemetry does not wait for Moesif."""
        del timeout_millis
        return True


_dispatchers: Final[weakref.WeakKeyDictionary[Any, Dispatcher]] = weakref.WeakKeyDictionary()
_dispatchers_lock = threading.RLock()  # a signal handler may make a call while its own thread is here


def _renew_locks() -> None:
    """Replace, in a forked child, locks that a thread of the parent may have held."""
    global _dispatchers_lock  # noqa: PLW0603 - a lock cannot be reset
    _dispatchers_lock = threading.RLock()
    for dispatcher in tuple(_dispatchers.values()):
        dispatcher.renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def dispatcher_on(provider: Any) -> Dispatcher:
    """Return the dispatcher of a provider; the first time it is added."""
    with _dispatchers_lock:
        dispatcher = _dispatchers.get(provider)
        if dispatcher is None:
            dispatcher = Dispatcher()
            try:
                provider.add_span_processor(dispatcher)
            except Exception as exc:
                PROCESS_GUARD.caught("adding a span processor to the tracer provider", exc)
            _dispatchers[provider] = dispatcher
        return dispatcher
