"""What odd and hostile senders can cost the sandbox: bounded work, bounded memory, and never an answer of 500."""

from __future__ import annotations

import gzip
import json
import time
import zlib

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from moesif_otel.sandbox import Sandbox
from moesif_otel.sandbox.ingest import Call, Ingest, decode_body
from moesif_otel.sandbox.store import Store
from moesif_otel.sandbox.wire import Wire
from tests.sandbox.events import make_event

HEADERS = {"x-moesif-application-id": "a", "content-type": "application/json"}


@pytest.fixture(scope="module")
def sandbox():
    """Give one sandbox for the module."""
    with Sandbox() as running:
        yield running


def send(sandbox, method, path, body):
    """Send bytes and give the answer."""
    answer = requests.request(method, sandbox.url + path, data=body, headers=HEADERS, timeout=20)
    assert answer.status_code != 500, answer.text
    return answer


def nested(depth, opening="[", closing="]"):
    """Give JSON so many levels deep."""
    return opening * depth + closing * depth


def test_gzip_of_many_members_costs_what_it_is_long():
    """Zlib is handed each byte of a body of many members a bounded number of times."""
    handed = 0
    real = zlib.decompressobj

    class Counting:
        def __init__(self, wbits):
            self._inner = real(wbits=wbits)

        def decompress(self, data, limit):
            nonlocal handed
            handed += len(data)
            return self._inner.decompress(data, limit)

        def __getattr__(self, name):
            return getattr(self._inner, name)

    member = gzip.compress(b"")
    body = member * (400_000 // len(member)) + gzip.compress(b"x" * 100_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesif_otel.sandbox.ingest.zlib.decompressobj", Counting)
        assert decode_body(body, "gzip") == b"x" * 100_000
    assert handed < 40 * len(body)  # 512 bytes a member of 20; quadratic would be 10,000 times


@pytest.mark.parametrize("depth", [200, 240, 260, 600, 1_023, 1_030, 20_000])
@pytest.mark.parametrize(
    ("path", "wrap"),
    [
        ("/v1/events", lambda deep: json.dumps({**make_event(), "metadata": {"x": "DEEP"}}).replace('"DEEP"', deep)),
        ("/v1/events/batch", lambda deep: "[" + json.dumps({**make_event(), "metadata": {"x": "DEEP"}}).replace('"DEEP"', deep) + "]"),
        ("/v1/users", lambda deep: '{"user_id": "u", "metadata": {"x": ' + deep + "}}"),
        ("/v1/actions", lambda deep: '{"action_name": "a", "request": {"time": "2026-01-01T00:00:00", "uri": "http://a/"}, "metadata": {"x": ' + deep + "}}"),
        ("/v1/rules", lambda deep: deep),
        ("/v1/config", lambda deep: '{"x": ' + deep + "}"),
        ("/v1/traces", lambda deep: '{"resourceSpans": [{"scopeSpans": [{"spans": [{"attributes": [{"key": "a", "value": ' + deep + "}]}]}]}]}"),
    ],
)  # fmt: skip
def test_depth_is_taken_or_refused(sandbox, path, wrap, depth):
    """However deep JSON is, it is stored and shown, or refused with the reason; 200 levels are taken."""
    method = "PUT" if path in {"/v1/rules", "/v1/config"} else "POST"
    answer = send(sandbox, method, path, wrap(nested(depth)))
    if depth > 254 and path != "/v1/traces":
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_deep")
    elif depth == 200:
        assert answer.status_code in ({200, 400} if path == "/v1/traces" else {200, 201})
    for view in ("/", "/users", "/actions", "/rules", "/api/events", "/export.har", "/api/profiles?kind=users"):
        assert requests.get(sandbox.url + view, timeout=20).status_code == 200
    for stored in sandbox.stored_events():
        assert requests.get(f"{sandbox.url}/fragments/call/{stored.sequence}", timeout=20).status_code == 200
    sandbox.clear()
    sandbox.put_rules([])
    sandbox.put_config({})


@pytest.mark.parametrize("when", ["0001-01-01T00:00:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "0000-01-01T00:00:00", "2026-13-01T00:00:00"])  # fmt: skip
def test_times_at_the_edge(when):
    """A time at the edge of the calendar is taken or refused, in events and in actions, and shown."""
    with Sandbox(max_event_age_s=None) as sandbox:
        event = make_event()
        event["request"]["time"] = event["response"]["time"] = when
        assert send(sandbox, "POST", "/v1/events", json.dumps(event)).status_code in {201, 400}
        action = {"action_name": "a", "request": {"time": when, "uri": "http://a/"}}
        assert send(sandbox, "POST", "/v1/actions", json.dumps(action)).status_code in {201, 400}
        for view in ("/", "/export.har", "/actions", "/?call=1"):
            assert requests.get(sandbox.url + view, timeout=10).status_code == 200


@pytest.mark.parametrize(
    "nanoseconds", ["99999999999999999999", 1 << 80, -5, 1e300, "x", None, [], 253402300800000000000]
)
def test_otlp_times(sandbox, nanoseconds):
    """A span's time that is none refuses that span, or the request, and is no fault of the server."""
    span = {"traceId": "ab" * 16, "spanId": "cd" * 8, "kind": 2, "startTimeUnixNano": nanoseconds, "endTimeUnixNano": nanoseconds,
            "attributes": [{"key": "http.request.method", "value": {"stringValue": "GET"}}, {"key": "url.full", "value": {"stringValue": "http://a/"}}]}  # fmt: skip
    body = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]})
    assert send(sandbox, "POST", "/v1/traces", body).status_code in {200, 400}


def test_large_whole_numbers_stay_what_they_are(sandbox):
    """Whole numbers beyond 64 bits are given back digit by digit."""
    number = 2**90 + 1
    event = make_event(metadata={"n": number, "negative": -number, "f": 0.1234567890123456789})
    assert send(sandbox, "POST", "/v1/events", json.dumps(event)).status_code == 201
    assert sandbox.events()[-1]["metadata"]["n"] == number
    sequence = sandbox.stored_events()[-1].sequence
    assert str(number) in requests.get(f"{sandbox.url}/fragments/call/{sequence}", timeout=10).text
    sandbox.clear()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ["request", "response", "metadata", "span", "user_id", "company_id", "direction", "weight", "blocked_by", "tags", "trace_id", "transaction_id"]  # fmt: skip


@settings(max_examples=150)
@given(st.sampled_from(FIELDS), json_values, st.sampled_from([None, "request", "response"]), json_values)
def test_any_event_is_answered(field, value, side, inner):
    """Any JSON anywhere in an event is taken or refused; what is taken can be shown whole."""
    store = Store()
    try:
        ingest = Ingest(store, Wire(10), max_event_age_s=None)
        event = make_event()
        event[field] = value
        if side is not None and isinstance(event.get(side), dict):
            event[side] = {**event[side], "body": inner, "headers": {"Content-Type": str(inner)[:50]}}
        answer = ingest.handle(Call("POST", "/v1/events", HEADERS, json.dumps(event).encode("utf-8", "surrogatepass")))
        assert answer.status in {201, 400}
        if answer.status == 201:
            from moesif_otel.sandbox.detail import detail_of
            from moesif_otel.sandbox.export import har_of
            from moesif_otel.sandbox.query import Filters

            detail_of(store, store.events()[0], Filters())
            json.loads(b"".join(har_of(store, Filters())))
    finally:
        store.close()


@settings(max_examples=150)
@given(st.sampled_from(["users", "companies", "subscriptions", "actions", "config", "rules", "traces"]), json_values)
def test_any_profile_or_document_is_answered(kind, value):
    """Any JSON to any other path is taken or refused."""
    store = Store()
    try:
        ingest = Ingest(store, Wire(10))
        method = "PUT" if kind in {"config", "rules"} else "POST"
        body = json.dumps(value).encode("utf-8", "surrogatepass")
        assert ingest.handle(Call(method, f"/v1/{kind}", HEADERS, body)).status in {200, 201, 400, 413}
        if kind == "traces":
            spans = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [value]}]}]}).encode(
                "utf-8", "surrogatepass"
            )
            assert ingest.handle(Call("POST", "/v1/traces", HEADERS, spans)).status in {200, 400}
    finally:
        store.close()


def test_events_are_bounded_by_bytes():
    """Over `max_bytes` the oldest events go; what is counted stays near what is there."""
    with Sandbox(max_bytes=3_000_000) as sandbox:
        for _ in range(8):
            events = [make_event(metadata={"x": "y" * 20_000}) for _ in range(50)]
            send(sandbox, "POST", "/v1/events/batch", json.dumps(events))
        kept = sandbox.events()
        assert kept[-1]["transaction_id"] == events[-1]["transaction_id"]
        assert sum(len(json.dumps(event)) for event in kept) < 3_000_000
        assert len(kept) > 80


def test_profiles_and_actions_are_bounded():
    """Profiles and actions have a bound of their own, and one profile cannot grow without end."""
    with Sandbox(max_bytes=4_000_000) as sandbox:
        for number in range(30):
            users = [{"user_id": f"u{number}-{one}", "metadata": {"x": "y" * 2_000}} for one in range(50)]
            send(sandbox, "POST", "/v1/users/batch", json.dumps(users))
            action = {
                "action_name": "a",
                "metadata": {"x": "y" * 2_000},
                "request": {"time": "2026-01-01T00:00:00", "uri": "u"},
            }
            send(sandbox, "POST", "/v1/actions/batch", json.dumps([action] * 50))
        held = sum(len(json.dumps(one)) for kind in ("users", "actions") for one in sandbox.profiles(kind))
        assert 500_000 < held < 1_100_000
        answers = [
            send(
                sandbox, "POST", "/v1/users", json.dumps({"user_id": "big", "metadata": {f"k{number}": "y" * 300_000}})
            )
            for number in range(5)
        ]
        assert [answer.status_code for answer in answers] == [201, 201, 201, 413, 413]


def test_documents_are_bounded(sandbox):
    """Configurations of many applications are refused beyond a number."""
    url = f"{sandbox.url}/v1/config"
    answers = [
        requests.put(url, json={}, headers={"X-Moesif-Application-Id": f"id-{n}"}, timeout=10).status_code
        for n in range(80)
    ]
    assert answers.count(200) <= 64
    assert answers[-1] == 413


def test_the_wire_log_is_bounded_by_bytes(sandbox):
    """Long headers are shortened in the log, and the log as a whole has a bound."""
    sandbox.clear()
    requests.get(sandbox.url + "/v1/config", headers={**HEADERS, "X-Long": "x" * 30_000}, timeout=10)
    (entry,) = sandbox.requests()
    assert len(entry["headers"]["x-long"]) == 2_000
    wire = Wire(100_000)
    scope = {"headers": [(f"h{n}".encode(), b"x" * 2_000) for n in range(50)], "method": "GET", "path": "/", "query_string": b"", "http_version": "1.1"}  # fmt: skip
    from moesif_otel.sandbox.wire import headers_of

    for _ in range(400):
        wire.begin(scope, headers_of(scope))
    assert len(wire.requests()) < 200


def test_a_file_of_another_version_is_said(tmp_path):
    """A database that an older version made is refused with a sentence, and left as it is."""
    import sqlite3

    path = tmp_path / "old.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE events (sequence INTEGER PRIMARY KEY)")
    connection.close()
    with pytest.raises(sqlite3.DatabaseError, match="another version"):
        Store(str(path))


def test_pages_that_listen_are_bounded_and_end(sandbox):
    """A stream tells of a change; more than a few of them are refused."""
    streams = [requests.get(sandbox.url + "/api/stream", stream=True, timeout=10) for _ in range(40)]
    try:
        assert [answer.status_code for answer in streams].count(503) == 8
        lines = streams[0].iter_lines()
        send(sandbox, "POST", "/v1/events", json.dumps(make_event()))
        end_s = time.monotonic() + 30
        for line in lines:
            if line.startswith(b"data: ") and json.loads(line[6:])["stored"]:
                break
            assert time.monotonic() < end_s
    finally:
        for answer in streams:
            answer.close()
