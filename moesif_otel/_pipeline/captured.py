"""The private copy of a span that carries what was captured of its call.

Owns: `CapturedSpan`.
Threads: made where the call ended; read on our own threads.
Never: is handed to any exporter but the pipeline's own; changes the span that it copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, Status, TraceFlags

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moesif_otel._capture.exchange import Exchange

__all__ = ["CapturedSpan"]

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class CapturedSpan(ReadableSpan):
    """A span with its Exchange; made from the Exchange alone where there was no span.

    Args:
        exchange: The finished Exchange; its ids are fixed.
        base: The bound span, ended or not, or None.

    `ReadableSpan`'s constructor is half private: `tests/test_captured.py` is its canary.
    """

    def __init__(self, exchange: Exchange, base: ReadableSpan | None) -> None:
        # No `super().__init__()` here: most copies go to our own exporter, which looks at the two parts only, and the
        # copying is no work for the request path (5 of its microseconds).
        self.exchange = exchange
        self.base = base
        self._merged: dict[str, Any] | None = None
        self.unprepared_bytes = 0  # what the exporter counts it for until it is prepared

    def __getattr__(self, name: str) -> Any:
        # The first look at anything of `ReadableSpan` (its properties read underscored attributes) makes the copy.
        if "_name" in self.__dict__ or not name.startswith("_") or name.startswith("__"):
            raise AttributeError(name)
        self._copy(self.exchange, self.base)
        return getattr(self, name)

    def _copy(self, exchange: Exchange, base: ReadableSpan | None) -> None:
        kind = SpanKind.SERVER if exchange.direction == "Incoming" else SpanKind.CLIENT
        if base is None:
            super().__init__(
                name=exchange.method,
                context=SpanContext(exchange.trace_id, exchange.span_id, is_remote=False, trace_flags=_SAMPLED),
                parent=_parent_context(exchange),
                resource=_EMPTY_RESOURCE,
                kind=kind,
                start_time=exchange.started_ns,
                end_time=exchange.ended_ns,
            )
        else:
            super().__init__(
                name=base.name,
                context=base.context,
                parent=base.parent,
                resource=base.resource,
                events=base.events,
                links=base.links,
                kind=kind,
                status=base.status or Status(),
                start_time=base.start_time,
                end_time=base.end_time or exchange.ended_ns,
                instrumentation_scope=base.instrumentation_scope,
            )

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The span's attributes and, by the HTTP semantic conventions, what was captured; masked, made when asked."""
        if self._merged is None:
            # Late: only pipelines with somebody else's exporter ask.
            from moesif_otel._events.attributes import redacted_attributes

            self._merged = redacted_attributes(self.exchange, self.base, self.exchange.pipeline.settings)
        return self._merged


def _parent_context(exchange: Exchange) -> SpanContext | None:
    if exchange.parent_span_id is None:
        return None
    return SpanContext(exchange.trace_id, exchange.parent_span_id, is_remote=True, trace_flags=_SAMPLED)


_EMPTY_RESOURCE = Resource.get_empty()
