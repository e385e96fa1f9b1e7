"""The private copy of a span: a canary for `ReadableSpan`, whose constructor and members are half private."""

from __future__ import annotations

import inspect
import logging
import uuid

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from moesif_otel._capture.exchange import Exchange, Outcome
from moesif_otel._otlp.span_copy import Hide, private_copy
from tests.recording import RecordingPipeline

USED = (
    *("name", "context", "parent", "resource", "attributes", "events", "links", "kind", "status"),
    *("start_time", "end_time", "instrumentation_scope"),
)


def make_span():
    provider = TracerProvider(resource=Resource({"service.name": "shop"}), shutdown_on_exit=False)
    other = SpanContext(5, 6, is_remote=True, trace_flags=TraceFlags(1))
    span = provider.get_tracer("scope", "1.0").start_span("GET /x", kind=SpanKind.INTERNAL, links=[Link(other)])
    span.set_attribute("shop.cart", 5)
    span.add_event("exception", {"exception.type": "ValueError"})
    span.set_status(Status(StatusCode.ERROR, "why"))
    return span


def finished(span) -> Exchange:
    exchange = Exchange(RecordingPipeline(), "Incoming", "GET")
    exchange.span = span
    exchange.finish(Outcome.COMPLETE)
    return exchange


SETTINGS = RecordingPipeline().settings


def test_the_constructor_still_takes_what_the_copy_gives() -> None:
    """`ReadableSpan.__init__` has every parameter that we use; on a new release this fails first."""
    assert set(USED) <= set(inspect.signature(ReadableSpan.__init__).parameters)


def test_a_copy_shows_everything_of_its_span() -> None:
    """All that an exporter reads is there, the kind that of the call; the span itself is not touched."""
    span = make_span()
    span.end()
    before = span.to_json()
    copy, _weight = private_copy(finished(span), Hide(SETTINGS))
    for name in USED:
        if name not in {"kind", "attributes", "events", "links", "status"}:
            assert getattr(copy, name) == getattr(span, name), name
    assert (copy.status.status_code, copy.status.description) == (span.status.status_code, span.status.description)
    assert [(one.name, one.timestamp) for one in copy.events] == [(one.name, one.timestamp) for one in span.events]
    assert [one.context for one in copy.links] == [one.context for one in span.links]
    assert copy.kind is SpanKind.SERVER
    assert copy.get_span_context() == span.get_span_context()
    assert '"name": "GET /x"' in copy.to_json()
    assert span.to_json() == before


def test_a_copy_of_a_span_that_has_not_ended_has_an_end() -> None:
    """Exporters compute with `end_time`; the Exchange's end stands in."""
    exchange = finished(make_span())
    assert private_copy(exchange, Hide(SETTINGS))[0].end_time == exchange.ended_ns


def test_without_a_span_the_exchange_makes_one() -> None:
    """Ids, parent, kind and times are the Exchange's."""
    exchange = Exchange(RecordingPipeline(), "Outgoing", "POST")
    exchange.parent_span_id, exchange.trace_id = 7, 9
    exchange.finish(Outcome.COMPLETE)
    exchange.fix_ids()
    made, _weight = private_copy(exchange, Hide(SETTINGS))
    assert (made.name, made.kind) == ("POST", SpanKind.CLIENT)
    assert made.context is not None
    assert made.parent is not None
    assert (made.context.trace_id, made.context.span_id) == (9, exchange.span_id)
    assert (made.parent.span_id, made.parent.trace_id) == (7, 9)
    assert (made.start_time, made.end_time) == (exchange.started_ns, exchange.ended_ns)
    assert made.context.trace_flags.sampled


class Planted(Exception):
    """An exception whose name holds a secret."""


Planted.__qualname__ = "password=hunter2"


def test_no_part_of_a_copy_carries_a_secret() -> None:
    """Names and values of attributes and of span events, route, error type, status, scope, resource, command line."""
    resource = Resource(
        {
            "service.name": "shop",
            "api_key": "hunter2",
            "process.command_args": ["python", "-p", "hunter2"],
            "process.command_line": "python -p hunter2",
            "process.command": "hunter2",
            "note": "https://joe:hunter2@h/",
        }
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    span = provider.get_tracer("scope password=hunter2", "1.0").start_span("GET /?password=hunter2")
    for name, value in (
        ("http.request.method", "GET"),
        ("http.route", "/x?password=hunter2"),
        ("error.type", "password=hunter2"),
        ("password=hunter2", "x"),
        ("password", "hunter2"),
        ("list", ["password=hunter2", "ok"]),
        ("kept", "value"),
    ):
        span.set_attribute(name, value)
    span.add_event("password=hunter2", {"password=hunter2": "x", "password": "hunter2", "kept": "1"})
    span.set_status(Status(StatusCode.ERROR, "password=hunter2"))
    span.end()
    exchange = Exchange(RecordingPipeline(), "Incoming", "GET")
    exchange.span, exchange.url, exchange.status = span, "http://h/x?token=hunter2", 500
    exchange.metadata = {"password=hunter2": "x", "kept_too": 1}
    exchange.finish(Outcome.FAILED, Planted())
    copy, _weight = private_copy(exchange, Hide(SETTINGS))
    parts = (copy.name, copy.status.description, dict(copy.attributes or {}), dict(copy.resource.attributes))
    shown = str((*parts, [(one.name, dict(one.attributes or {})) for one in copy.events], copy.instrumentation_scope))
    assert "hunter2" not in shown
    assert dict(copy.resource.attributes) == {
        "service.name": "shop",
        "api_key": "(hidden)",
        "note": "https://(hidden)@h/",
    }
    assert (copy.attributes or {})["kept"] == "value"
    assert (copy.attributes or {})["kept_too"] == 1
    assert [dict(one.attributes or {}) for one in copy.events] == [{"kept": "1"}]
    assert private_copy(exchange, Hide(SETTINGS.with_changes(auto_hide_sensitive=False)))[0].name == span.name


def test_no_part_of_a_copy_costs_its_batch_or_is_quoted_in_the_log(caplog) -> None:
    """Lone surrogates and numbers over 64 bits, in scope, headers and span events: OTLP's encoder takes them all."""
    provider = TracerProvider(shutdown_on_exit=False)
    scope = {"id": 1 << 70, "password": "hunter2"}
    span = provider.get_tracer("\ud800", "\ud800", "\ud800", attributes=scope).start_span("x")
    span.add_event("odd", {"id": 1 << 70, "names": ["\ud800"]})
    span.end()
    exchange = finished(span)
    exchange.request_headers = [("X-\ud800", "a")]
    copy, _weight = private_copy(exchange, Hide(SETTINGS))
    with caplog.at_level(logging.DEBUG):
        (found,) = encode_spans([copy]).resource_spans[0].scope_spans
    assert caplog.text == ""
    assert (found.scope.name, found.scope.version, found.schema_url) == ("\ufffd",) * 3
    values = {pair.key: pair.value.string_value for pair in found.scope.attributes}
    assert values == {"id": str(1 << 70), "password": "(hidden)"}
    (event,) = found.spans[0].events
    assert {pair.key for pair in event.attributes} == {"id", "names"}
    assert "http.request.header.x-\ufffd" in {pair.key for pair in found.spans[0].attributes}


@pytest.mark.parametrize(("time", "carried"), [(1.7e18, 17 * 10**17), (-1, 0), (1 << 64, 0), (float("nan"), 0), ("x", 0)])
def test_times_that_are_none_cost_no_batch(time, carried) -> None:
    """Spans take whatever they are given; OTLP's encoder refuses the batch. The Exchange's own times stand in."""
    span = TracerProvider(shutdown_on_exit=False).get_tracer("x").start_span("x", start_time=time)
    span.add_event("odd", timestamp=time)
    span.end(time)
    exchange = finished(span)
    copy, _weight = private_copy(exchange, Hide(SETTINGS))
    (found,) = encode_spans([copy]).resource_spans[0].scope_spans[0].spans
    assert found.events[0].time_unix_nano == carried
    assert found.start_time_unix_nano == (carried or exchange.started_ns)
    assert found.end_time_unix_nano == (carried or exchange.ended_ns)


def test_metadata_of_any_form_costs_no_call() -> None:
    """The key that is ours may hold anything; what is a text in an event is the same text here."""
    for ours in (5, "x", [1], None, {"request_body": 5}):
        exchange = finished(None)
        exchange.metadata = {"moesif_otel": ours, "order": uuid.UUID(int=1)}
        copy, _weight = private_copy(exchange, Hide(SETTINGS))
        assert (copy.attributes or {})["order"] == str(uuid.UUID(int=1))


def test_span_events_count_in_the_size() -> None:
    """Stack traces that wait with their call, and are in its batch, are within the bounds of both."""
    span = make_span()
    bare = private_copy(finished(span), Hide(SETTINGS))[1]
    for _ in range(10):
        span.add_event("exception", {"exception.stacktrace": "x" * 10_000})
    copy, weight = private_copy(finished(span), Hide(SETTINGS))
    assert weight > bare + 100_000
    assert weight > len(encode_spans([copy]).SerializeToString())
