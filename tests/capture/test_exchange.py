"""Ids of calls without a span: joined to what is around them, else their own."""

from __future__ import annotations

import pytest

from moesif_otel import identify
from moesif_otel._capture.exchange import Exchange, current_exchange, snapshot
from tests.recording import RecordingPipeline

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def exchange_with(traceparent: str | None = None) -> Exchange:
    exchange = Exchange(RecordingPipeline(), "Incoming", "GET")
    if traceparent is not None:
        exchange.request_headers = [("Traceparent", traceparent)]
        exchange.has_remote_parent = True
    return exchange


def test_traceparent_gives_trace_and_parent() -> None:
    """W3C Trace Context: the caller's trace goes on, its span is the parent."""
    exchange = exchange_with(TRACEPARENT)
    exchange.fix_ids()
    assert exchange.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert exchange.parent_span_id == 0xB7AD6B7169203331
    assert 0 < exchange.span_id < 2**64


@pytest.mark.parametrize(
    "bad", ["", "00-" + "0" * 32 + "-b7ad6b7169203331-01", "ff" + TRACEPARENT[2:], TRACEPARENT.upper(), TRACEPARENT + "x"]
)
def test_a_malformed_traceparent_is_no_parent(bad: str) -> None:
    """The call has a trace of its own then."""
    exchange = exchange_with(bad)
    exchange.fix_ids()
    assert exchange.parent_span_id is None
    assert 0 < exchange.trace_id < 2**128


def test_an_inner_call_joins_the_outer_ones_trace() -> None:
    """An outgoing call inside a request is its child, whichever is fixed first; fixing again changes nothing."""
    outer = exchange_with()
    token = current_exchange.set(outer)
    inner = Exchange(outer.pipeline, "Outgoing", "GET")
    current_exchange.reset(token)
    inner.fix_ids()
    ids = (outer.trace_id, outer.span_id)
    outer.fix_ids()
    assert ids == (outer.trace_id, outer.span_id) == (inner.trace_id, inner.parent_span_id)


@pytest.mark.parametrize("odd", [["a", "list"], "text", 5])
def test_metadata_that_is_no_mapping_is_our_error_to_count(odd: object) -> None:
    """`identify` never raises; what it was told before stays, and what it is told beside is taken."""
    exchange = exchange_with()
    token = current_exchange.set(exchange)
    identify(metadata={"kept": 1})
    identify(user_id="mary", metadata=odd)  # type: ignore[arg-type]
    current_exchange.reset(token)
    assert (exchange.user_id, exchange.metadata) == ("mary", {"kept": 1})
    assert exchange.pipeline.guard.counts() == {"metadata of identify()": 1}


def test_a_snapshot_is_a_copy_of_the_same_shape() -> None:
    """What the application does to its own later is not in it; what occurs twice, or in itself, is copied once."""
    shared = [1, (2, {"b": 3})]
    value: dict[str, object] = {"a": shared, "again": shared}
    copy = snapshot(value)
    shared.append("later")
    assert copy == {"a": [1, [2, {"b": 3}]], "again": [1, [2, {"b": 3}]]}
    value["me"] = value["too"] = value  # each level would be twice the work of the one above
    copy = snapshot(value)
    assert copy is copy["me"] is copy["too"] is not value
