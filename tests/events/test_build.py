"""`events.build`: which field of the event comes from where, for Exchanges."""

from __future__ import annotations

import base64
import gzip
import json
import uuid
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import Event
from opentelemetry.trace import Link, SpanContext, StatusCode, TraceFlags

from moesif_otel._capture.exchange import Outcome
from moesif_otel._events.build import moesif_time, transaction_id_for
from moesif_otel._events.serialize import serialize
from tests.calls import Calls, build_event

JSON = [("Content-Type", "application/json")]


def sent(calls: Calls, exchange: Any, span: Any = None, *, parse: bool = False, **options: Any) -> dict[str, Any]:
    """The event as the server reads it."""
    event = build_event(exchange, span, calls.options(**options), parse_bodies=parse)
    assert event is not None
    found: dict[str, Any] = json.loads(serialize(event))
    return found


def test_a_whole_call(calls: Calls) -> None:
    """Every field of a plain call, times in milliseconds UTC."""
    exchange = calls.exchange(
        request_headers=[("Host", "api.example.com"), ("USER-AGENT", "curl/8"), *JSON],
        response_headers=[("content-type", "application/json"), ("X-Odd-name", "v")],
        request=b'{"a":1}',
        response=b"[1]",
        status=201,
        peer_address="10.0.0.1",
        user_id="joe",
        company_id="acme",
        session_token="s",
        metadata={"k": "v"},
        blocked_by="rule",
        parent_span_id=0x11,
    )
    assert sent(calls, exchange, API_VERSION="1.2") == {
        "request": {
            "time": "2024-10-30T04:45:42.914",
            "uri": "https://api.example.com/v1/users?page=2",
            "verb": "POST",
            "headers": {"Host": "api.example.com", "USER-AGENT": "curl/8", "Content-Type": "application/json"},
            "api_version": "1.2",
            "ip_address": "10.0.0.1",
            "body": {"a": 1},
            "transfer_encoding": "json",
        },
        "response": {
            "time": "2024-10-30T04:45:42.939",
            "status": 201,
            "headers": {"content-type": "application/json", "X-Odd-name": "v"},
            "body": [1],
            "transfer_encoding": "json",
        },
        "user_id": "joe",
        "company_id": "acme",
        "session_token": "s",
        "metadata": {"k": "v"},
        "direction": "Incoming",
        "weight": 1,
        "blocked_by": "rule",
        "transaction_id": transaction_id_for(0xABC, 0xDEF, "app-1"),
        "trace_id": f"{0xABC:032x}",
        "span": {"id": f"{0xDEF:016x}", "parent_id": f"{0x11:016x}"},
    }


def test_the_transaction_id_is_the_calls_own() -> None:
    """A UUID that depends on trace, span and application, and on nothing else."""
    made = transaction_id_for(1, 2, "app")
    assert made == transaction_id_for(1, 2, "app") == str(uuid.UUID(made))
    assert uuid.UUID(made).version == 8
    assert (
        len({made, transaction_id_for(1, 2, "other"), transaction_id_for(1, 3, "app"), transaction_id_for(2, 2, "app")})
        == 4
    )


def test_a_transaction_id_that_was_told_is_kept(calls: Calls) -> None:
    """The response header said it already."""
    assert sent(calls, calls.exchange(transaction_id="told"))["transaction_id"] == "told"


def test_repeated_headers_are_joined(calls: Calls) -> None:
    """With a comma, every Set-Cookie too, under the first spelling; cookies with a semicolon."""
    found = sent(
        calls,
        calls.exchange(
            request_headers=[("x-a", "1"), ("X-A", "2"), ("cookie", "a=1"), ("Cookie", "b=2")],
            response_headers=[("Set-Cookie", " a=1; Path=/"), ("set-cookie", " b=2"), ("Vary", "x")],  # as Django writes them
        ),
    )
    assert found["request"]["headers"] == {"x-a": "1, 2", "cookie": "a=1; b=2"}
    assert found["response"]["headers"] == {"Set-Cookie": "a=1; Path=/, b=2", "Vary": "x"}


@pytest.mark.parametrize(
    ("outcome", "status", "direction", "expected"),
    [
        (Outcome.COMPLETE, 200, "Incoming", 200),
        (Outcome.FAILED, None, "Incoming", 500),
        (Outcome.FAILED, 200, "Incoming", 200),
        (Outcome.FAILED, None, "Outgoing", None),
        (Outcome.ABORTED, None, "Incoming", None),
        (Outcome.ABORTED, 200, "Incoming", 200),
        (Outcome.UPGRADED, 101, "Incoming", 101),
        (Outcome.UNFINISHED, None, "Incoming", None),
    ],
)
def test_status_and_outcome(
    calls: Calls, outcome: Outcome, status: int | None, direction: str, expected: int | None
) -> None:
    """What the client saw; 500 where the app raised before any status; no response where none was sent."""
    found = sent(calls, calls.exchange(outcome=outcome, status=status, direction=direction, error=KeyError("secret")))
    assert found.get("response", {}).get("status") == expected
    ours = found["metadata"]["moesif_otel"]
    assert ours["error_type"] == "KeyError"
    assert ours.get("outcome") == (None if outcome is Outcome.COMPLETE else outcome.value)
    assert "secret" not in json.dumps(found)


def test_nothing_to_say_is_not_said(calls: Calls) -> None:
    """No metadata of ours on a plain call."""
    assert "metadata" not in sent(calls, calls.exchange())


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"a": 1}, {"a": 1, "moesif_otel": {"outcome": "error"}}),
        (None, {"moesif_otel": {"outcome": "error"}}),
        ([1], {"value": [1], "moesif_otel": {"outcome": "error"}}),
        ({"moesif_otel": {"x": 1}}, {"moesif_otel": {"x": 1, "outcome": "error"}}),
        ({"moesif_otel": "x"}, {"moesif_otel": {"outcome": "error"}}),
    ],
)
def test_our_metadata_lies_under_one_key(calls: Calls, metadata: Any, expected: Any) -> None:
    """The user's stays under its own keys; what is no mapping is kept as a value; the user's dict is not changed."""
    before = json.dumps(metadata)
    assert sent(calls, calls.exchange(outcome=Outcome.FAILED, metadata=metadata))["metadata"] == expected
    assert json.dumps(metadata) == before


@pytest.mark.parametrize(("given", "expected"), [(5, "5"), (b"joe", "joe"), (uuid.UUID(int=1), str(uuid.UUID(int=1)))])
def test_identities_become_text(calls: Calls, given: Any, expected: str) -> None:
    """Callbacks return what their users' models hold."""
    found = sent(calls, calls.exchange(user_id=given, company_id=given, session_token=given))
    assert (found["user_id"], found["company_id"], found["session_token"]) == (expected, expected, expected)


@pytest.mark.parametrize("falsy", [None, "", 0, [], False])
def test_a_falsy_user_is_read_from_the_header(calls: Calls, falsy: Any) -> None:
    """And its credentials are hidden all the same; outgoing credentials are this service's own."""
    headers = [("Authorization", "Basic " + base64.b64encode(b"joe:hunter2").decode())]
    found = sent(calls, calls.exchange(user_id=falsy, request_headers=headers))
    assert found["user_id"] == "joe"
    assert found["request"]["headers"] == {"Authorization": "Basic (hidden)"}
    assert "user_id" not in sent(calls, calls.exchange(request_headers=headers, direction="Outgoing"))


def test_the_span_decorates(calls: Calls) -> None:
    """Ids, parent, links, status, route, name, exceptions and the app's attributes; times and status do not change."""
    link = Link(SpanContext(0x5, 0x6, is_remote=True, trace_flags=TraceFlags(1)))
    span = calls.span(
        {
            "http.route": "/v1/users",
            "http.response.status_code": 500,
            "tenant": "x",
            "user.id": "from-span",
            "error.type": "OSError",
        },
        name="users.list",
        parent=0x99,
        links=(link,),
        status=StatusCode.ERROR,
        events=(Event("exception", {"exception.type": "OSError", "exception.message": "disk"}), Event("other", {})),
    )
    found = sent(calls, calls.exchange(), span)
    assert found["trace_id"] == f"{0x1234:032x}"
    assert found["span"] == {
        "id": f"{0x77:016x}",
        "parent_id": f"{0x99:016x}",
        "links": [{"trace_id": f"{0x5:032x}", "span_id": f"{0x6:016x}"}],
        "status": "ERROR",
    }
    assert found["response"]["status"] == 200
    assert found["user_id"] == "from-span"
    assert found["metadata"]["moesif_otel"] == {
        "route": "/v1/users",
        "span_name": "users.list",
        "error_type": "OSError",
        "attributes": {"tenant": "x"},
        "exceptions": [{"type": "OSError", "message": "disk"}],
    }
    assert found["transaction_id"] == transaction_id_for(0x1234, 0x77, "app-1")


def test_notes_of_the_tap_are_told(calls: Calls) -> None:
    """Facts for metadata.moesif_otel."""
    assert sent(calls, calls.exchange(notes={"detached": True}))["metadata"]["moesif_otel"] == {"detached": True}


@pytest.mark.parametrize("parse", [True, False])
def test_a_truncated_body_says_so(calls: Calls, parse: bool) -> None:
    """True size and kept size, the first part as base64."""
    found = sent(calls, calls.exchange(request=b"x" * 1_000, request_kept=100), parse=parse)
    assert base64.b64decode(found["request"]["body"]) == b"x" * 100
    assert found["metadata"]["moesif_otel"]["request_body"] == {
        "size_bytes": 1_000,
        "kept_bytes": 100,
        "truncated": True,
    }


def test_a_body_that_memory_had_no_room_for_says_so(calls: Calls) -> None:
    """The budget was spent: the size is told."""
    exchange = calls.exchange(response=b"")
    exchange.response_body.total_bytes = 5_000
    from moesif_otel._capture.body import LeftOut

    exchange.response_body.left_out = LeftOut.MEMORY
    assert sent(calls, exchange)["metadata"]["moesif_otel"]["response_body"] == {
        "size_bytes": 5_000,
        "left_out": "memory_limit",
    }


@pytest.mark.parametrize(
    "content_type", ["image/png", "VIDEO/mp4; x=y", "application/zip", "font/woff2", "audio/ogg", "application/pdf"]
)
def test_content_of_no_use_is_left_out(calls: Calls, content_type: str) -> None:
    """Its size and type are sent; LOG_BINARY_BODY brings it back."""
    exchange = calls.exchange(response=b"\x89PNG", response_headers=[("Content-Type", content_type)])
    found = sent(calls, exchange)
    assert "body" not in found["response"]
    assert found["metadata"]["moesif_otel"]["response_body"] == {
        "size_bytes": 4,
        "left_out": "content_type",
        "content_type": content_type.partition(";")[0].lower(),
    }
    assert base64.b64decode(sent(calls, exchange, LOG_BINARY_BODY=True)["response"]["body"]) == b"\x89PNG"


def test_compressed_json_is_read(calls: Calls) -> None:
    """By the Content-Encoding header, in any spelling of its name."""
    headers = [("content-type", "application/json"), ("CONTENT-ENCODING", "gzip")]
    found = sent(calls, calls.exchange(response=gzip.compress(b'{"a":1}'), response_headers=headers))
    assert found["response"]["body"] == {"a": 1}


def test_parsed_bodies_are_for_masks(calls: Calls) -> None:
    """A mask sees Python values; without one, JSON is embedded as it came."""
    exchange = calls.exchange(request=b'{"a" : 1.0}', request_headers=JSON)
    assert build_event(exchange, None, calls.settings, parse_bodies=True)["request"]["body"] == {"a": 1.0}
    fragment = build_event(exchange, None, calls.settings, parse_bodies=False)["request"]["body"]
    assert orjson.dumps(fragment) == b'{"a" : 1.0}'


@pytest.mark.parametrize(
    "odd",
    [
        ("X-List", ["a"]),
        ("Cookie", ["a"]),
        ("Set-Cookie", ("a", "b")),
        ("Authorization", {"password": "x"}),
        (("X", "Y"), "a"),
        (b"X-Bytes", b"a"),
    ],
)
def test_headers_that_are_no_text_cost_no_event_and_stay_as_they_are(calls: Calls, odd: Any) -> None:
    """A value or name of another type is shown as text; the application's own object is not changed."""
    before = repr(odd)
    pairs: Any = [("X-Plain", "a"), odd, (odd[0], "b")]
    exchange = calls.exchange(request_headers=pairs, response_headers=pairs)
    event = sent(calls, exchange)
    assert repr(odd) == before
    assert event["request"]["headers"]["X-Plain"] == "a"
    assert len(event["response"]["headers"]) == 2


def test_odd_text_of_wsgi_survives(calls: Calls) -> None:
    """Latin-1 texts and undecodable bytes in URL, header and method become valid JSON."""
    found = sent(
        calls,
        calls.exchange(url="https://x/\xff\udc80?q=\udcff", request_headers=[("X", "\xe9\udc80")], method="G\udcffT"),
    )
    assert found["request"]["uri"].startswith("https://x/\xff")


def test_an_answer_is_never_before_its_request(calls: Calls) -> None:
    """A clock that was set back does not make a negative duration."""
    found = sent(calls, calls.exchange(ended_ns=1))
    assert found["response"]["time"] == found["request"]["time"]


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (1_730_263_542_914_999_999, "2024-10-30T04:45:42.914"),
        (1_730_263_542_000_000_001, "2024-10-30T04:45:42.000"),
        (0, "1970-01-01T00:00:00.000"),
        (None, "1970-01-01T00:00:00.000"),
        (-5, "1970-01-01T00:00:00.000"),
        (10**30, "9999-12-31T23:59:59.000"),
    ],
)
def test_times_are_utc_with_milliseconds(time_ns: int | None, text: str) -> None:
    """Cut, not rounded: an event never lies in the future. Absurd times stay valid text."""
    assert moesif_time(time_ns) == text


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([("Content-Length", "5")], {"left_out": "not_read", "size_bytes": 5}),
        ([("Transfer-Encoding", "gzip, Chunked")], {"left_out": "not_read"}),
        ([("Content-Length", "0")], None),
        ([("Content-Length", "many")], None),
        ([], None),
    ],
)
def test_a_request_body_that_nobody_read_says_so(calls: Calls, headers: Any, expected: Any) -> None:
    """Announced and never asked for by the application: absent, with the reason; silent with LOG_BODY off."""
    exchange = calls.exchange(request=b"", request_headers=headers)
    found = sent(calls, exchange)
    assert "body" not in found["request"]
    assert found.get("metadata", {}).get("moesif_otel", {}).get("request_body") == expected
    exchange.request_body = None
    assert "metadata" not in sent(calls, exchange)


def test_texts_of_the_span_are_inspected(calls: Calls) -> None:
    """Route, name and error type are free text of the application's."""
    secret = "/a?token=hunter2"
    span = calls.span({"http.route": secret, "error.type": "password=hunter2"}, name=f"GET {secret} x")
    found = sent(calls, calls.exchange(), span)
    assert "hunter2" not in json.dumps(found)
    assert {"route", "span_name", "error_type"} <= set(found["metadata"]["moesif_otel"])


def test_an_event_shows_nothing_of_itself(calls: Calls) -> None:
    """Crash reporters print local variables."""
    assert repr(build_event(calls.exchange(), None, calls.settings, parse_bodies=False)) == "<event>"


class Rude:
    def __str__(self) -> str:
        raise RuntimeError


ODD = st.one_of(
    st.none(), st.integers(), st.floats(), st.binary(), st.text(st.characters()), st.builds(Rude), st.lists(st.text())
)
SOUND = st.text(st.characters(), max_size=20)


@given(
    st.lists(st.one_of(st.tuples(ODD, ODD), st.tuples(SOUND, SOUND), ODD), max_size=5),
    st.lists(st.one_of(st.tuples(SOUND, ODD), st.tuples(SOUND)), max_size=5),
    SOUND,
    SOUND,
    ODD,
    ODD,
)
def test_odd_facts_cost_only_themselves(
    request_headers: Any, response_headers: Any, url: str, method: str, identity: Any, metadata: Any
) -> None:
    """Whatever stands in headers, URL, identity and metadata, the event is there and valid JSON."""
    calls = Calls()
    exchange = calls.exchange(
        url=url,
        method=method,
        request_headers=[*request_headers, ("X-Sound", "kept")],
        response_headers=[*response_headers, ("X-Sound", "kept")],
        user_id=identity,
        company_id=identity,
        metadata=metadata,
        request=b'{"a":1}',
    )
    for parse in (False, True):
        found = sent(calls, exchange, parse=parse)
        assert "kept" in found["request"]["headers"]["X-Sound"]
        assert "kept" in found["response"]["headers"]["X-Sound"]
        assert found["request"]["body"] == {"a": 1}


def test_what_a_mask_does_to_one_event_is_not_in_the_next(calls: Calls) -> None:
    """With `DEBUG` an event names the masks; the names are its own copy."""
    settings = calls.options(DEBUG=True, REQUEST_BODY_MASKS=["ssn"])
    for _ in range(2):
        event = build_event(calls.exchange(), None, settings, parse_bodies=True)
        masks = event["metadata"]["moesif_otel"]["masks"]
        assert masks == {"REQUEST_BODY_MASKS": ("ssn",)}
        masks.clear()
