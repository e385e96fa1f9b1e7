"""An Exchange, decorated by its span, as a `Call`.

Owns: `call_of_exchange`, and what an Exchange's end means for the event's status.
Threads: any; the Exchange is finished.
Never: lets the span override what the tap saw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesif_otel._capture.exchange import Outcome
from moesif_otel._events.call import Call, Content
from moesif_otel._events.spans import decorate

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from moesif_otel._capture.body import CapturedBody
    from moesif_otel._capture.exchange import Exchange

__all__ = ["call_of_exchange"]


def call_of_exchange(exchange: Exchange, span: ReadableSpan | None) -> Call:
    """Give an Exchange as a Call: times, status and outcome from the Exchange, ids and attributes from the span."""
    call = Call(
        direction=exchange.direction,
        method=exchange.method,
        url=exchange.url,
        started_ns=exchange.started_ns,
        ended_ns=exchange.ended_ns or exchange.started_ns,
        status=_status(exchange),
        request_headers=exchange.request_headers,
        response_headers=exchange.response_headers,
        request_body=_content(exchange.request_body),
        response_body=_content(exchange.response_body),
        peer_address=exchange.peer_address if exchange.direction == "Incoming" else None,
        server_address=exchange.peer_address if exchange.direction == "Outgoing" else None,
        user_id=exchange.user_id,
        company_id=exchange.company_id,
        session_token=exchange.session_token,
        metadata=exchange.metadata,
        blocked_by=exchange.blocked_by,
        transaction_id=exchange.transaction_id,
        trace_id=exchange.trace_id,
        span_id=exchange.span_id,
        parent_span_id=exchange.parent_span_id,
    )
    if span is not None:
        decorate(call, span)
    if exchange.notes:
        call.ours.update(exchange.notes)
    if exchange.outcome is not None and exchange.outcome is not Outcome.COMPLETE:
        call.ours["outcome"] = exchange.outcome.value
    if exchange.error_type is not None:
        call.ours["error_type"] = exchange.error_type
    return call


def _status(exchange: Exchange) -> int | None:
    """Give the status that was sent, or that the server is about to send: 500 when the application raised."""
    if exchange.status is None and exchange.direction == "Incoming" and exchange.outcome is Outcome.FAILED:
        return 500
    return exchange.status


def _content(body: CapturedBody | None) -> Content | None:
    if body is None or not body.total_bytes:
        return None
    left_out = None if body.left_out is None else body.left_out.value
    return Content(body.data(), body.total_bytes, left_out, body.decoded)
