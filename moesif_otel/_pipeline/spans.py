"""Ties a pipeline to other people's spans: our processor on their providers, and a record of the spans it has taken.

Spans start and end in any thread and in finalizers: nothing on their way takes a lock.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.trace import SpanProcessor

from moesif_otel._guard import LATE_IMPORTS, PROCESS_GUARD

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, Span


class Dispatcher(SpanProcessor):
    """The one processor of ours on a provider; pipelines come and go, a processor cannot be removed.

    It keeps no pipeline alive. A pipeline counts its own errors; none reaches the application's span. Its `shutdown`
    and `force_flush` do nothing: an application that ends or flushes its own telemetry does not wait for Moesif.
    """

    def __init__(self) -> None:
        self._pipelines: tuple[weakref.ref[Any], ...] = ()

    def register(self, pipeline: Any) -> None:
        """Let a pipeline see the provider's spans from now on; twice is once."""
        self._replace(pipeline, (weakref.ref(pipeline),))

    def unregister(self, pipeline: Any) -> None:
        """Let it see no more of them."""
        self._replace(pipeline, ())

    def _replace(self, pipeline: Any, by: tuple[weakref.ref[Any], ...]) -> None:
        with LATE_IMPORTS:
            self._pipelines = tuple(one for one in self._pipelines if one() not in {None, pipeline}) + by

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


_dispatchers: Final[weakref.WeakKeyDictionary[Any, Dispatcher]] = weakref.WeakKeyDictionary()


def dispatcher_on(provider: Any) -> Dispatcher:
    """Return the dispatcher of a provider; the first time it is added."""
    with LATE_IMPORTS:  # adding takes the provider's own lock
        dispatcher = _dispatchers.get(provider)
        if dispatcher is None:
            dispatcher = Dispatcher()
            PROCESS_GUARD.run("adding a span processor to the tracer provider", provider.add_span_processor, dispatcher)
            _dispatchers[provider] = dispatcher
        return dispatcher


# A batch processor holds 2,048 spans by default (OTel specification, OTEL_BSP_MAX_QUEUE_SIZE); ten times that.
_MAX_CLAIMS: Final = 20_480


class ClaimSet:
    """The spans that a pipeline has taken, so that an exporter of its does not; the oldest are forgotten first."""

    __slots__ = ("_claimed", "_order")

    def __init__(self) -> None:
        # Hashes of the pairs: 64 bits of two random ids tell them apart as well, in half the memory (90 bytes each).
        self._claimed: set[int] = set()
        self._order: deque[int] = deque()

    def add(self, trace_id: int, span_id: int) -> None:
        """Claim a span."""
        key = hash((trace_id, span_id))
        if key in self._claimed:
            return
        self._claimed.add(key)
        self._order.append(key)
        if len(self._order) > _MAX_CLAIMS:
            try:
                self._claimed.discard(self._order.popleft())
            except IndexError:  # another thread made room
                return

    def __contains__(self, key: tuple[int, int]) -> bool:
        return hash(key) in self._claimed


_claims: dict[tuple[str, str], ClaimSet] = {}


def claims_of(pipeline_key: tuple[str, str]) -> ClaimSet:
    """Return the claims of one application id and base URI."""
    # dict.setdefault is atomic: two threads get the same set.
    return _claims.get(pipeline_key) or _claims.setdefault(pipeline_key, ClaimSet())
