"""The copy of a call that goes to somebody else's exporter: a plain span that any encoder can take.

Owns: `private_copy`, which parts of a span it has, and what it is taken to weigh.
Threads: our own; pure functions of a finished call.
Never: lets text pass that was not looked through, or that OTLP's encoder refuses together with its whole batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from moesif_otel._events.attributes import redacted_attributes, redacted_events, redacted_name
from moesif_otel._events.serialize import sound_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moesif_otel._capture.exchange import Exchange
    from moesif_otel.settings import Settings

__all__ = ["private_copy"]

# Ids, times, name, resource and protobuf's framing of one span.
_SPAN_BYTES: Final = 1_024
# Batches are closed at 5,000,000 accounted bytes; with this margin they stay below the 4 MiB (4,194,304 bytes) that an
# OTLP receiver over gRPC takes by default (Collector: max_recv_msg_size_mib; over HTTP it is 20 MiB).
_MARGIN: Final = 1.25


_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)


def private_copy(exchange: Exchange, settings: Settings) -> tuple[ReadableSpan, int]:
    """Return a finished call as a plain span, with everything hidden that the settings say, and its weight in bytes.

    Args:
        exchange: The finished Exchange, its ids fixed; it is not needed afterwards. Its span may be None or live.
        settings: What to hide.

    Returns:
        The span, which refers to nothing of the application's request, and about what its OTLP form weighs.
    """
    span: Any = exchange.span
    attributes = redacted_attributes(exchange, span, settings)
    given: dict[str, Any] = {
        "kind": SpanKind.SERVER if exchange.direction == "Incoming" else SpanKind.CLIENT,
        "attributes": attributes,
    }
    if span is None:
        copy = ReadableSpan(
            name=sound_text(redacted_name(exchange.method, settings)),
            context=SpanContext(exchange.trace_id, exchange.span_id, is_remote=False, trace_flags=_SAMPLED),
            parent=_parent_context(exchange),
            # A call without a span of its own has the resource of the spans around it.
            resource=_global_resource(),
            start_time=exchange.started_ns,
            end_time=exchange.ended_ns,
            **given,
        )
    else:
        copy = ReadableSpan(
            name=sound_text(redacted_name(span.name, settings)),
            context=span.context,
            parent=span.parent,
            resource=span.resource,
            events=_events(span.events, settings),
            # What links say beyond their ids is the application's own, and was not looked through.
            links=[Link(link.context) for link in span.links],
            status=_status(span.status or Status(), settings),
            start_time=span.start_time,
            end_time=span.end_time or exchange.ended_ns,
            instrumentation_scope=span.instrumentation_scope,
            **given,
        )
    weight = _SPAN_BYTES + sum(len(name) + _weight(value) for name, value in attributes.items())
    return copy, int(weight * _MARGIN)


def _parent_context(exchange: Exchange) -> SpanContext | None:
    if exchange.parent_span_id is None:
        return None
    return SpanContext(exchange.trace_id, exchange.parent_span_id, is_remote=True, trace_flags=_SAMPLED)


def _events(events: Sequence[Event], settings: Settings) -> list[Event]:
    return [
        Event(
            sound_text(event.name),
            {sound_text(key): _sound(value) for key, value in (event.attributes or {}).items()},
            event.timestamp,
        )
        for event in redacted_events(events, settings)
    ]


def _status(status: Status, settings: Settings) -> Status:
    if status.status_code is not StatusCode.ERROR or not status.description:
        return Status(status.status_code)
    # Usually an exception's message, which quotes data freely: the same rules as for an event's.
    (looked_through,) = redacted_events([Event("status", {"description": status.description})], settings)
    description = (looked_through.attributes or {}).get("description")
    return Status(status.status_code, None if description is None else sound_text(str(description)))


def _sound(value: Any) -> Any:
    return sound_text(value) if isinstance(value, str) else value


def _weight(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, (list, tuple)):
        return sum(map(_weight, value))
    return 16


def _global_resource() -> Resource:
    resource = getattr(trace.get_tracer_provider(), "resource", None)
    return resource if isinstance(resource, Resource) else Resource.get_empty()
