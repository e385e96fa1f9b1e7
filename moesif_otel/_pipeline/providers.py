"""Which tracer provider a pipeline works with, and the one processor of ours on each.

Owns: the resolution of a provider, private providers, `Dispatcher` and the table of dispatchers.
Threads: any; spans start and end in all of them, and in finalizers.
Never: makes a private provider current in an application, takes a lock in `on_start` or `on_end`.
"""

from __future__ import annotations

import inspect
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from opentelemetry import trace
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from moesif_otel._guard import PROCESS_GUARD

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, Span

    from moesif_otel.processor import MoesifSpanProcessor

__all__ = ["Dispatcher", "ResolvedProvider", "dispatcher_on", "resolve_provider"]


class ResolvedProvider(NamedTuple):
    """A provider, and whether the application's own telemetry lives on it."""

    provider: TracerProvider
    shared: bool


def resolve_provider(explicit: Any = None) -> ResolvedProvider:
    """Choose the provider: the explicit one, else the global one if it is an SDK provider, else a private one.

    To be called at the first request, not at construction: applications set their provider up in any order.

    Args:
        explicit: The `tracer_provider` that a user gave, or None.

    Returns:
        The provider. A private one keeps every span, has no exporter but ours and is never set globally.
    """
    if explicit is not None and _takes_processors(explicit):
        return ResolvedProvider(explicit, shared=True)
    current = trace.get_tracer_provider()
    if _takes_processors(current):
        return ResolvedProvider(current, shared=True)  # type: ignore[arg-type] # duck-typed SDK provider
    return ResolvedProvider(_private_provider(), shared=False)


def _takes_processors(provider: Any) -> bool:
    return callable(getattr(provider, "add_span_processor", None))


def _private_provider() -> TracerProvider:
    # The SDK can count spans (OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED): ours are not the application's.
    parameters = inspect.signature(TracerProvider.__init__).parameters
    silent: dict[str, Any] = {"meter_provider": NoOpMeterProvider()} if "meter_provider" in parameters else {}
    # An empty resource: no detectors run, nothing of the host's environment is read for spans nobody else sees.
    return TracerProvider(sampler=ALWAYS_ON, resource=Resource.get_empty(), shutdown_on_exit=False, **silent)


class Dispatcher(SpanProcessor):
    """The one processor of ours on a provider; pipelines come and go, a processor cannot be removed.

    Thread-safe. An error in a pipeline is counted there and never reaches the application's span.
    """

    def __init__(self) -> None:
        self._pipelines: tuple[MoesifSpanProcessor, ...] = ()
        self._lock = threading.Lock()

    def register(self, pipeline: MoesifSpanProcessor) -> None:
        """Let a pipeline see the provider's spans from now on; twice is once."""
        with self._lock:
            if pipeline not in self._pipelines:
                self._pipelines = (*self._pipelines, pipeline)

    def unregister(self, pipeline: MoesifSpanProcessor) -> None:
        """Let it see no more of them."""
        with self._lock:
            self._pipelines = tuple(one for one in self._pipelines if one is not pipeline)

    def renew_lock(self) -> None:
        """Replace the lock in a forked child."""
        self._lock = threading.Lock()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Offer a started span to every pipeline."""
        for pipeline in self._pipelines:
            pipeline.on_start(span, parent_context)

    def on_end(self, span: ReadableSpan) -> None:
        """Tell every pipeline of an ended span."""
        for pipeline in self._pipelines:
            pipeline.on_end(span)

    def shutdown(self) -> None:
        """Do nothing: the pipelines' doors end them, and at exit they end themselves."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Flush every pipeline, all within the time."""
        deadline_s = time.monotonic() + timeout_millis / 1_000
        done = True
        for pipeline in self._pipelines:
            remaining_millis = max(0, int((deadline_s - time.monotonic()) * 1_000))
            done = pipeline.force_flush(remaining_millis) and done
        return done


_dispatchers: Final[weakref.WeakKeyDictionary[Any, Dispatcher]] = weakref.WeakKeyDictionary()
_dispatchers_lock = threading.Lock()


def _renew_locks() -> None:
    """Replace, in a forked child, locks that a thread of the parent may have held."""
    global _dispatchers_lock  # noqa: PLW0603 - a lock cannot be reset
    _dispatchers_lock = threading.Lock()
    for dispatcher in tuple(_dispatchers.values()):
        dispatcher.renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def dispatcher_on(provider: Any) -> Dispatcher:
    """Give the dispatcher of a provider, adding it when it is the first time."""
    with _dispatchers_lock:
        dispatcher = _dispatchers.get(provider)
        if dispatcher is None:
            dispatcher = Dispatcher()
            try:
                provider.add_span_processor(dispatcher)
            except Exception as exc:
                PROCESS_GUARD.caught("adding our processor to a tracer provider", exc)
            _dispatchers[provider] = dispatcher
        return dispatcher
