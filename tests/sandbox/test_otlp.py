"""OTLP into the sandbox: what a real OTLP exporter sends, and the same in JSON."""

from __future__ import annotations

import base64
import gzip
import json
import time

import pytest
import requests
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanKind

from moesif_otel.sandbox import Sandbox

NEW = {
    "http.request.method": "POST",
    "url.scheme": "https",
    "server.address": "shop.test",
    "server.port": 8443,
    "url.path": "/orders",
    "url.query": "a=1",
    "http.response.status_code": 201,
    "client.address": "10.0.0.9",
    "user.id": "u1",
    "company.id": "c1",
    "session.id": "s1",
    "http.request.header.content-type": ["application/json"],
    "http.response.header.set_cookie": ["a=1", "b=2"],
    "http.request.body.content": '{"n": 1}',
    "http.response.body.content": "plain text",
    "shop.tier": "gold",
}


@pytest.fixture
def sandbox():
    """Give a sandbox."""
    with Sandbox() as running:
        yield running


def export(sandbox, spans, compression=Compression.Gzip):
    """Send spans, each as kind and attributes, by the SDK and OTel's own exporter."""
    exporter = OTLPSpanExporter(
        sandbox.url + "/v1/traces", headers={"X-Moesif-Application-Id": "app-1"}, compression=compression
    )
    provider = TracerProvider(resource=Resource({"service.name": "shop"}), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    for kind, attributes in spans:
        tracer.start_span("a call", kind=kind, attributes=attributes).end()
    provider.shutdown()


@pytest.mark.parametrize("compression", [Compression.Gzip, Compression.NoCompression])
def test_a_server_span_by_the_stable_conventions(sandbox, compression):
    """Every attribute that has a field of an event is in it, the rest is metadata."""
    export(sandbox, [(SpanKind.SERVER, NEW)], compression)
    (event,) = sandbox.wait_for_events(1)
    request, response = event["request"], event["response"]
    assert (request["verb"], request["uri"]) == ("POST", "https://shop.test:8443/orders?a=1")
    assert request["headers"] == {"content-type": "application/json"}
    assert (request["body"], request["transfer_encoding"]) == ({"n": 1}, "json")
    assert request["ip_address"] == "10.0.0.9"
    assert (response["status"], response["headers"]) == (201, {"set-cookie": "a=1, b=2"})
    assert base64.b64decode(response["body"]) == b"plain text"
    assert (event["user_id"], event["company_id"], event["session_token"]) == ("u1", "c1", "s1")
    assert (event["direction"], len(event["trace_id"]), len(event["span"]["id"])) == ("Incoming", 32, 16)
    assert (event["metadata"]["shop.tier"], event["metadata"]["resource"]["service.name"]) == ("gold", "shop")
    assert sandbox.requests("/v1/traces")[0]["status"] == 200


def test_whole_numbers_of_any_size_stay_exact(sandbox):
    """A JSON body is stored as it is, also where a number has more than 64 bits."""
    export(sandbox, [(SpanKind.SERVER, {**NEW, "http.request.body.content": f'{{"id": {10**40 + 1}}}'})])
    (event,) = sandbox.wait_for_events(1)
    assert event["request"]["body"] == {"id": 10**40 + 1}


def test_a_client_span_by_the_old_conventions(sandbox):
    """The old names make the same event; a span without a status has no response."""
    old = {"http.method": "GET", "http.url": "http://pay.test/charge?x=2", "enduser.id": "u2"}
    export(sandbox, [(SpanKind.CLIENT, old), (SpanKind.CLIENT, {**old, "http.status_code": 404})])
    without, with_response = sandbox.wait_for_events(2)
    assert (without["request"]["uri"], without["direction"], without["user_id"]) == (
        "http://pay.test/charge?x=2",
        "Outgoing",
        "u2",
    )
    assert "response" not in without
    assert with_response["response"]["status"] == 404


def test_other_spans_are_no_events(sandbox):
    """Spans that are no HTTP call are taken and not shown."""
    export(sandbox, [(SpanKind.CLIENT, {"db.system": "x"}), (SpanKind.INTERNAL, NEW), (SpanKind.SERVER, NEW)])
    assert len(sandbox.wait_for_events(1)) == 1
    assert [entry["status"] for entry in sandbox.requests()] == [200, 200, 200]


def json_export(**span):
    """Make an OTLP request in JSON with one span."""
    now = time.time_ns()
    attributes = [
        {"key": "http.request.method", "value": {"stringValue": "GET"}},
        {"key": "url.full", "value": {"stringValue": "http://a.test/x"}},
        {"key": "http.response.status_code", "value": {"intValue": "200"}},
        {"key": "http.request.header.accept", "value": {"arrayValue": {"values": [{"stringValue": "a"}]}}},
        {"key": "blob", "value": {"bytesValue": "AAE="}},
        {"key": "map", "value": {"kvlistValue": {"values": [{"key": "k", "value": {"boolValue": True}}]}}},
    ]
    whole = {
        "traceId": "0af7651916cd43dd8448eb211c80319c",
        "spanId": "b7ad6b7169203331",
        "name": "GET /x",
        "kind": 2,
        "startTimeUnixNano": str(now),
        "endTimeUnixNano": str(now + 5_000_000),
        "attributes": attributes,
        **span,
    }
    return {"resourceSpans": [{"scopeSpans": [{"spans": [whole]}]}]}


def send_json(sandbox, value):
    """Post OTLP in gzip JSON."""
    return requests.post(
        sandbox.url + "/v1/traces",
        data=gzip.compress(json.dumps(value).encode()),
        headers={"Content-Type": "application/json", "Content-Encoding": "gzip", "X-Moesif-Application-Id": "a"},
        timeout=10,
    )


def test_json_is_read_without_protobuf(sandbox):
    """OTLP in JSON gives the event too; the same span again is a duplicate."""
    value = json_export()
    for _ in range(2):
        answer = send_json(sandbox, value)
        assert (answer.status_code, answer.json()) == (200, {})
    (event,) = sandbox.events()
    assert event["request"]["headers"] == {"accept": "a"}
    assert (event["metadata"]["blob"], event["metadata"]["map"]) == ("AAE=", {"k": True})
    assert event["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert sandbox.stats()["duplicates"] == 1


def test_a_span_that_makes_no_good_event_is_a_partial_success(sandbox):
    """A span from long ago is refused alone, and the answer says so as OTLP has it."""
    partial = send_json(sandbox, json_export(startTimeUnixNano="1")).json()["partialSuccess"]
    assert partial["rejectedSpans"] == "1"
    assert "days old" in partial["errorMessage"]
    assert sandbox.events() == []


def test_a_partial_success_in_protobuf(sandbox):
    """The same in protobuf, as an OTLP client reads it."""
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
    from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

    http = [KeyValue(key="http.request.method", value=AnyValue(string_value="GET"))]
    span = Span(
        trace_id=b"a" * 16, span_id=b"b" * 8, kind=Span.SPAN_KIND_SERVER, start_time_unix_nano=1, attributes=http
    )
    spans = ResourceSpans(scope_spans=[ScopeSpans(spans=[span])])
    answer = requests.post(
        sandbox.url + "/v1/traces",
        data=service.ExportTraceServiceRequest(resource_spans=[spans]).SerializeToString(),
        headers={"Content-Type": "application/x-protobuf", "X-Moesif-Application-Id": "a"},
        timeout=10,
    )
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-protobuf")
    assert service.ExportTraceServiceResponse.FromString(answer.content).partial_success.rejected_spans == 1


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/x-protobuf", b"\xff\xff\xff", 400),
        ("application/json", b"{", 400),
        ("application/json", b'{"resourceSpans": [1]}', 400),
        ("application/json", b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "xyz"}]}]}]}', 400),
        ("text/plain", b"", 415),
    ],
)
def test_bad_exports_are_named(sandbox, content_type, body, status):
    """What is no OTLP is answered 400, another content type 415."""
    headers = {"Content-Type": content_type, "X-Moesif-Application-Id": "a"}
    answer = requests.post(sandbox.url + "/v1/traces", data=body, headers=headers, timeout=10)
    assert (answer.status_code, bool(answer.json()["error"]["message"])) == (status, True)
