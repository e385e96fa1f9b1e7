"""`events.spans`: bare HTTP spans of any instrumentation."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import Event
from opentelemetry.trace import INVALID_SPAN_CONTEXT, SpanKind, StatusCode

from moesif_otel._events.serialize import serialize
from moesif_otel._events.spans import weight_of
from tests.calls import Calls, build_event

OLD = {
    "http.method": "GET",
    "http.scheme": "http",
    "http.host": "api.example.com:8080",
    "http.target": "/v1/users?page=2",
    "net.host.name": "api.example.com",
    "net.host.port": 8080,
    "net.peer.ip": "10.0.0.9",
    "http.user_agent": "curl/8",
    "http.status_code": 404,
    "http.flavor": "1.1",
    "http.server_name": "internal",
    "http.route": "/v1/users",
}
STABLE = {
    "http.request.method": "GET",
    "url.scheme": "http",
    "url.path": "/v1/users",
    "url.query": "page=2",
    "server.address": "api.example.com",
    "server.port": 8080,
    "network.peer.address": "10.0.0.9",
    "user_agent.original": "curl/8",
    "http.response.status_code": 404,
    "http.route": "/v1/users",
    "network.protocol.version": "1.1",
}


def sent(
    calls: Calls, attributes: dict[str, Any], *, options: dict[str, Any] | None = None, **span: Any
) -> dict[str, Any] | None:
    event = build_event(None, calls.span(attributes, **span), calls.options(**(options or {})), parse_bodies=False)
    return None if event is None else json.loads(serialize(event))


@pytest.mark.parametrize("attributes", [OLD, STABLE, {**OLD, **STABLE}], ids=["old", "stable", "both"])
def test_either_convention_makes_the_same_event(calls: Calls, attributes: dict[str, Any]) -> None:
    """OTEL_SEMCONV_STABILITY_OPT_IN changes nothing that Moesif sees."""
    found = sent(calls, attributes)
    assert found is not None
    assert found["request"] == {
        "time": "2024-10-30T04:45:42.914",
        "uri": "http://api.example.com:8080/v1/users?page=2",
        "verb": "GET",
        "headers": {"User-Agent": "curl/8"},
        "ip_address": "10.0.0.9",
    }
    assert found["response"] == {"time": "2024-10-30T04:45:43.000", "status": 404, "headers": {}}
    assert found["direction"] == "Incoming"
    assert found["metadata"] == {"moesif_otel": {"route": "/v1/users"}}


@pytest.mark.parametrize(
    ("attributes", "uri"),
    [
        ({"url.full": "https://x/a?b=c"}, "https://x/a?b=c"),
        ({"http.url": "https://x/a"}, "https://x/a"),
        ({"http.url": "/a", "http.host": "x"}, "http://x/a"),
        (
            {"url.path": "/a", "url.query": "?b", "url.scheme": "https", "server.address": "x", "server.port": 443},
            "https://x/a?b",
        ),
        ({"url.path": "/a", "server.address": "2001:db8::1", "server.port": 81}, "http://[2001:db8::1]:81/a"),
        ({"url.path": "a", "net.host.name": "x", "net.host.port": "81"}, "http://x:81/a"),
        ({"http.target": "/a", "http.server_name": "x"}, "http://x/a"),
        ({"http.target": "/a", "http.request.header.host": ["x:9"]}, "http://x:9/a"),
        ({}, "http://unknown/"),
        ({"url.path": 5, "server.address": True}, "http://True/5"),
    ],
)
def test_the_url_is_put_together(calls: Calls, attributes: dict[str, Any], uri: str) -> None:
    """From whatever there is; Moesif needs one in any case."""
    found = sent(calls, {"http.request.method": "GET", **attributes})
    assert found is not None
    assert found["request"]["uri"] == uri


@pytest.mark.parametrize(
    ("attributes", "kind"),
    [
        ({"db.system": "redis"}, SpanKind.CLIENT),
        ({}, SpanKind.SERVER),
        ({"http.method": "GET"}, SpanKind.INTERNAL),
        ({"http.method": "GET"}, SpanKind.PRODUCER),
        ({"http.request.method": ""}, SpanKind.SERVER),
    ],
)
def test_other_spans_are_ignored(calls: Calls, attributes: dict[str, Any], kind: SpanKind) -> None:
    """Only SERVER and CLIENT spans with a method are calls."""
    assert sent(calls, attributes, kind=kind) is None


def test_nothing_is_no_event(calls: Calls) -> None:
    """Neither Exchange nor span."""
    assert build_event(None, None, calls.settings, parse_bodies=False) is None


def test_client_spans_are_outgoing_calls(calls: Calls) -> None:
    """Their peer is the server; no client address, no user from our own credentials."""
    found = sent(
        calls,
        {
            "http.request.method": "GET",
            "url.full": "https://x/",
            "network.peer.address": "1.2.3.4",
            "http.response.status_code": 200,
            "http.request.header.authorization": ["Basic " + base64.b64encode(b"us:pw").decode()],
        },
        kind=SpanKind.CLIENT,
    )
    assert found is not None
    assert found["direction"] == "Outgoing"
    assert "ip_address" not in found["request"]
    assert found["response"]["ip_address"] == "1.2.3.4"
    assert "user_id" not in found


@pytest.mark.parametrize(
    ("kind", "status", "events", "expected"),
    [
        (SpanKind.SERVER, StatusCode.ERROR, (), 500),
        (SpanKind.SERVER, StatusCode.UNSET, (Event("exception", {}),), 500),
        (SpanKind.SERVER, StatusCode.UNSET, (), None),
        (SpanKind.CLIENT, StatusCode.ERROR, (), None),
    ],
)
def test_a_span_without_status(
    calls: Calls, kind: SpanKind, status: StatusCode, events: Any, expected: int | None
) -> None:
    """An app that raised answers 500; a call that got no answer has no response."""
    found = sent(calls, {"http.request.method": "GET"}, kind=kind, status=status, events=events)
    assert found is not None
    assert found.get("response", {}).get("status") == expected


@pytest.mark.parametrize("told", ["10.0.0.1:8443", "shop.example", "", "x" * 50_000])
def test_a_client_address_that_is_none_is_not_taken(calls: Calls, told: str) -> None:
    """Old instrumentations write the Host header there; what the connection says stands."""
    attributes = {"http.request.method": "GET", "client.address": told, "network.peer.address": "1.2.3.4"}
    found = sent(calls, attributes)
    assert found is not None
    assert found["request"]["ip_address"] == "1.2.3.4"


def test_captured_headers_of_both_spellings(calls: Calls) -> None:
    """Lists and texts, `-` and `_`; client address and user are read from them."""
    found = sent(
        calls,
        {
            "http.request.method": "GET",
            "http.response.status_code": 200,
            "http.request.header.x_forwarded_for": ["9.9.9.9, 1.1.1.1"],
            "http.request.header.authorization": "Basic " + base64.b64encode(b"joe:pw").decode(),
            "http.request.header.accept": ("a", "b"),
            "http.response.header.content_type": ["text/plain"],
            "http.response.header.set-cookie": ["sessionid=abc; Path=/", "b=2"],
            "client.address": "8.8.8.8",
        },
    )
    assert found is not None
    assert found["request"]["headers"] == {
        "X-Forwarded-For": "9.9.9.9, 1.1.1.1",
        "Authorization": "Basic (hidden)",
        "Accept": "a, b",
    }
    assert found["response"]["headers"] == {
        "Content-Type": "text/plain",
        "Set-Cookie": "sessionid=(hidden); Path=/, b=2",
    }
    assert found["request"]["ip_address"] == "9.9.9.9"
    assert found["user_id"] == "joe"


def test_captured_bodies_and_identity(calls: Calls) -> None:
    """`http.*.body.content`, `user.id`, `company.id`, `session.id`; a size that is larger tells of truncation."""
    found = sent(
        calls,
        {
            "http.request.method": "POST",
            "http.response.status_code": 200,
            "http.request.body.content": '{"password": "hunter2", "n": 1}',
            "http.response.body.content": "plain",
            "http.response.body.size": 100,
            "enduser.id": "joe",
            "company.id": "acme",
            "session.id": "s1",
            "tenant.plan": "gold",
        },
        name="POST",
    )
    assert found is not None
    assert found["request"]["body"] == {"password": "(hidden)", "n": 1}
    assert base64.b64decode(found["response"]["body"]) == b"plain"
    assert found["metadata"]["moesif_otel"] == {
        "response_body": {"size_bytes": 100, "kept_bytes": 5, "truncated": True},
        "attributes": {"tenant.plan": "gold"},
    }
    assert (found["user_id"], found["company_id"], found["session_token"]) == ("joe", "acme", "s1")


def test_weight_follows_a_sampler_of_this_process(calls: Calls) -> None:
    """A root span that stands for ten weighs ten, and so does one whose own sampler said so below a parent."""
    found = sent(calls, {"http.request.method": "GET"}, state={"ot": "th:e668"})
    assert found is not None
    assert found["weight"] == 10
    span = calls.span({"http.request.method": "GET"}, state={"ot": "th:e668"}, parent=5, parent_state={"ot": "th:8"})
    event = build_event(None, span, calls.settings, parse_bodies=False)
    assert event is not None
    assert event["weight"] == 10


def test_a_trace_state_of_the_client_is_no_weight(calls: Calls) -> None:
    """What a span has in common with its parent was handed down, from a client maybe."""
    for entry in ("th:ffffffffffffff", "p:62", "th:8"):
        found = sent(calls, {"http.request.method": "GET"}, state={"ot": entry}, parent=5)
        assert found is not None
        assert found["weight"] == 1


@pytest.mark.parametrize(
    ("entry", "weight"),
    [
        (None, 1),
        ("", 1),
        ("th:0", 1),  # everything is kept
        ("th:8", 2),  # half
        ("th:c", 4),
        ("th:e668", 10),
        ("rv:abcdef01234567;th:fd70a4", 100),
        ("th:ffffffffffffff", (1 << 31) - 1),
        ("p:0", 1),
        ("p:3;r:10", 8),
        ("r:10;p:62", (1 << 31) - 1),
        ("p:63", 1),  # zero probability: not a weight
        ("th:", 1),
        ("th:xyz", 1),
        ("th:-8", 1),
        ("th:0x8", 1),
        ("th:1_0", 1),
        ("th:123456789012345", 1),
        ("p:٣", 1),
        ("p:-1", 1),
    ],
)
def test_weight_is_one_over_the_sampling_probability(entry: str | None, weight: int) -> None:
    """By the specification's threshold, or its predecessor's exponent; malformed entries weigh 1."""
    assert weight_of(entry) == weight


@given(st.text(alphabet="thpr:;0123456789abcdefx-", max_size=40))
def test_any_entry_weighs_at_least_one(entry: str) -> None:
    """No entry raises or makes a call disappear."""
    assert 1 <= weight_of(entry) < 1 << 31


def test_a_method_that_the_convention_does_not_know(calls: Calls) -> None:
    """`_OTHER` stands for the original."""
    found = sent(calls, {"http.request.method": "_OTHER", "http.request.method_original": "PURGE"})
    assert found is not None
    assert found["request"]["verb"] == "PURGE"


def test_exceptions_lose_messages_that_name_a_secret(calls: Calls) -> None:
    """A message quotes data freely."""
    events = (
        Event("exception", {"exception.type": "ValueError", "exception.message": "bad password=hunter2"}),
        Event("exception", {"exception.type": "OSError", "exception.message": "disk full"}),
    )
    found = sent(calls, {"http.request.method": "GET"}, events=events)
    assert found is not None
    assert found["metadata"]["moesif_otel"]["exceptions"] == [
        {"type": "ValueError"},
        {"type": "OSError", "message": "disk full"},
    ]


def test_bare_spans_are_looked_through(calls: Calls) -> None:
    """URL, headers, name and the application's attributes."""
    found = sent(
        calls,
        {
            "http.method": "GET",
            "http.url": "https://joe:hunter2@x/a?access_token=hunter2",
            "http.request.header.referer": ["https://x/?api_key=hunter2"],
            "db.password": "hunter2",
            "note": "password=hunter2",
        },
        name="GET /a?token=hunter2",
        kind=SpanKind.CLIENT,
    )
    assert found is not None
    assert "hunter2" not in json.dumps(found)
    assert found["request"]["uri"] == "https://(hidden)@x/a?access_token=(hidden)"


@pytest.mark.parametrize("value", [None, "x", 10**30, -1, ["a"]])
def test_odd_attribute_values_do_not_fail(calls: Calls, value: Any) -> None:
    """Whatever an instrumentation writes."""
    for name in (
        *OLD,
        *STABLE,
        "http.request.header.x",
        "user.id",
        "http.request.body.content",
        "http.request.body.size",
    ):
        sent(calls, {"http.request.method": "GET", name: value})


def test_times_that_are_missing(calls: Calls) -> None:
    """A span that somebody made by hand."""
    found = sent(calls, {"http.request.method": "GET"}, start_time=None, end_time=None)
    assert found is not None
    assert found["request"]["time"] == "1970-01-01T00:00:00.000"


def test_spans_without_ids_are_different_events(calls: Calls) -> None:
    """Moesif knows events by their ids, which are made of the span's: of equal ones it would keep one."""
    found = []
    for _ in range(2):
        span = calls.span(STABLE)
        span._context = INVALID_SPAN_CONTEXT
        event = build_event(None, span, calls.settings, parse_bodies=False)
        assert event is not None
        found.append(event["transaction_id"])
    assert found[0] != found[1]


NAMES = st.sampled_from(
    [
        *OLD,
        *STABLE,
        *("url.full", "http.url", "http.request.header.x-forwarded-for", "http.request.header.authorization", "tenant"),
        *("http.request.body.content", "http.response.body.content", "http.request.body.size", "user.id", "error.type"),
        *("http.request.header.content-encoding", "http.response.header.content-length", "client.address"),
    ]
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.binary(max_size=20),
    st.text(st.characters(), max_size=20),
    st.lists(st.one_of(st.none(), st.text(st.characters(), max_size=5), st.integers()), max_size=3),
)


@given(st.dictionaries(NAMES, VALUES, max_size=8), st.sampled_from([SpanKind.SERVER, SpanKind.CLIENT]), st.booleans())
def test_any_attributes_make_an_event(attributes: dict[str, Any], kind: SpanKind, captured: bool) -> None:
    """Alone or beside a capture: whatever an instrumentation wrote, the call is recorded as valid JSON."""
    calls = Calls()
    span = calls.span({**attributes, "http.request.method": "GET"}, kind=kind)
    exchange = calls.exchange(direction="Incoming" if kind is SpanKind.SERVER else "Outgoing") if captured else None
    event = build_event(exchange, span, calls.settings, parse_bodies=False)
    assert event is not None
    assert json.loads(serialize(event))["request"]["uri"]
