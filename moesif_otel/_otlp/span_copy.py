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
from opentelemetry.trace import Link, Status, StatusCode

from moesif_otel._events.attributes import redacted_events, redacted_name
from moesif_otel._events.serialize import sound_text

if TYPE_CHECKING:
    from moesif_otel._pipeline.captured import CapturedSpan
    from moesif_otel.settings import Settings

__all__ = ["private_copy"]

# Ids, times, name, resource and protobuf's framing of one span.
_SPAN_BYTES: Final = 1_024
# Batches are closed at 5,000,000 accounted bytes; with this margin they stay below the 4 MiB (4,194,304 bytes) that an
# OTLP receiver over gRPC takes by default (Collector: max_recv_msg_size_mib; over HTTP it is 20 MiB).
_MARGIN: Final = 1.25


def private_copy(span: CapturedSpan, settings: Settings) -> tuple[ReadableSpan, int]:
    """Give a call as a plain span, with everything hidden that the settings say, and its weight in bytes.

    Args:
        span: The captured span; its Exchange is not needed afterwards.
        settings: What to hide.

    Returns:
        The span, which refers to nothing of the application's request, and about what its OTLP form weighs.
    """
    attributes = span.attributes
    # A call without a span of its own has the resource of the spans around it.
    resource = span.resource if span.base is not None else _global_resource()
    copy = ReadableSpan(
        name=sound_text(redacted_name(span.name, settings)),
        context=span.context,
        parent=span.parent,
        resource=resource,
        attributes=attributes,
        events=_events(span, settings),
        # What links say beyond their ids is the application's own, and was not looked through.
        links=[Link(link.context) for link in span.links],
        kind=span.kind,
        status=_status(span, settings),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )
    weight = _SPAN_BYTES + sum(len(name) + _weight(value) for name, value in attributes.items())
    return copy, int(weight * _MARGIN)


def _events(span: CapturedSpan, settings: Settings) -> list[Event]:
    return [
        Event(
            sound_text(event.name),
            {sound_text(key): _sound(value) for key, value in (event.attributes or {}).items()},
            event.timestamp,
        )
        for event in redacted_events(span.events, settings)
    ]


def _status(span: CapturedSpan, settings: Settings) -> Status:
    status = span.status
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
