"""`events.attributes`: the same call as OTLP attributes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from moesif_otel._otlp.span_copy import Hide, private_copy, redacted_attributes
from tests.calls import Calls


def encoded(calls: Calls, attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes as OTLP's own encoder writes them; it drops what it cannot."""
    base = calls.span({})
    span = ReadableSpan(
        name="x",
        context=base.context,
        attributes=attributes,
        resource=Resource.get_empty(),
        instrumentation_scope=InstrumentationScope("x"),
        status=base.status,
        kind=base.kind,
        start_time=1,
        end_time=2,
    )
    proto = encode_spans([span]).resource_spans[0].scope_spans[0].spans[0]
    proto.SerializeToString()
    return {pair.key: pair.value for pair in proto.attributes}


def test_a_whole_call(calls: Calls) -> None:
    """The semantic conventions' names, masked, beside the span's own attributes."""
    exchange = calls.exchange(
        url="https://api.example.com:8443/v1?token=t",
        request_headers=[("host", "api.example.com"), ("Authorization", "Bearer abc")],
        response_headers=[("Content-Type", "application/json")],
        request=b"hello",
        response=b'{"password": "x", "a": 1}',
        response_kept=None,
        peer_address="10.0.0.1",
        user_id="joe",
        company_id="acme",
        session_token="s",
        metadata={"plan": "gold", "nested": {"a": 1}, "none": None, "list": [1, 2], "mixed": [1, "a"]},
    )
    span = calls.span(
        {
            "http.url": "https://x/?token=t",
            "http.request.header.authorization": ["Bearer abc"],
            "tenant": "t1",
            "db.password": "x",
            "http.route": "/v1",
        },
        name="POST /v1",
    )
    exchange.span = span
    assert redacted_attributes(exchange, Hide(calls.settings)) == {
        "tenant": "t1",
        "db.password": "(hidden)",
        "http.route": "/v1",
        "plan": "gold",
        "nested": '{"a":1}',
        "list": [1, 2],
        "mixed": '[1,"a"]',
        "moesif_otel": '{"route":"/v1"}',
        "http.request.method": "POST",
        "url.full": "https://api.example.com:8443/v1?token=(hidden)",
        "url.scheme": "https",
        "url.path": "/v1",
        "url.query": "token=(hidden)",
        "server.address": "api.example.com",
        "server.port": 8443,
        "client.address": "10.0.0.1",
        "http.request.header.host": ["api.example.com"],
        "http.request.header.authorization": ["Bearer (hidden)"],
        "http.request.body.content": "hello",
        "http.response.status_code": 200,
        "http.response.header.content-type": ["application/json"],
        "http.response.body.content": '{"password": "(hidden)", "a": 1}',
        "user.id": "joe",
        "company.id": "acme",
        "session.id": "s",
    }


@pytest.mark.parametrize(
    ("data", "kept", "content"),
    [
        ("Grüße".encode(), None, "Grüße"),
        ("Grüße".encode(), 3, "Gr"),
        (b"\x00\xff\x80\x80\x80\x80", None, None),
        (b'{"a": 1}', None, '{"a": 1}'),
    ],
)
def test_bodies_are_text(calls: Calls, data: bytes, kept: int | None, content: str | None) -> None:
    """Cut at a character's boundary; never base64 in a text; the true size where it is not all."""
    found = redacted_attributes(calls.exchange(request=data, request_kept=kept), Hide(calls.settings))
    assert found.get("http.request.body.content") == content
    assert found.get("http.request.body.size") == (len(data) if kept else None)


def test_events_lose_values_that_name_a_secret(calls: Calls) -> None:
    """Exception messages and stack traces quote data."""
    events = [Event("exception", {"exception.type": "E", "exception.message": "password=hunter2"}, 5)]
    exchange, span = calls.exchange(), calls.span({})
    exchange.span, span._events = span, events
    (found,) = private_copy(exchange, Hide(calls.settings))[0].events
    assert (found.name, dict(found.attributes or {}), found.timestamp) == ("exception", {"exception.type": "E"}, 5)


ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary()


@given(
    st.dictionaries(
        st.text(st.characters(), min_size=1),
        ODD | st.lists(ODD, max_size=3) | st.dictionaries(st.text(), ODD, max_size=2),
        max_size=5,
    ),
    st.text(st.characters()),
    st.binary(max_size=50),
)
def test_otlp_carries_every_attribute(metadata: dict[str, Any], text: str, data: bytes) -> None:
    """OTLP's encoder drops nothing of it, and so logs nothing of it."""
    calls = Calls()
    exchange = calls.exchange(metadata=metadata, url=text, request_headers=[("X", text)], user_id=text, response=data)
    attributes = redacted_attributes(exchange, Hide(calls.settings))
    assert set(encoded(calls, attributes)) == set(attributes)
    json.dumps(attributes)
