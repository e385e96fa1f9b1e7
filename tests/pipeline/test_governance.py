"""What Moesif says back, at a WSGI middleware: rules block and add headers, rates sample; and in steps, one by one."""

from __future__ import annotations

import gzip
import io
import json
import threading
from types import SimpleNamespace
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from moesif_otel._capture.callbacks import decide
from moesif_otel._guard import Guard
from moesif_otel._pipeline.governance import GovernedRequest
from moesif_otel._remote.config import DEFAULT_CONFIG, RemoteConfig
from moesif_otel._remote.governance import RuleSet
from moesif_otel.sandbox.server import Sandbox
from moesif_otel.wsgi import MoesifMiddleware

ID = "governed"


@pytest.fixture
def sandbox() -> Any:
    with Sandbox() as running:
        yield running


class Client:
    """Calls a WSGI callable in-process and keeps what came back."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def get(self, path: str, **environ: Any) -> tuple[str, dict[str, str], bytes]:
        values: dict[str, Any] = {"PATH_INFO": path, "SCRIPT_NAME": "", "QUERY_STRING": "", **environ}
        setup_testing_defaults(values)
        seen: list[Any] = []
        result = self.app(values, lambda status, headers, exc_info=None: seen.extend((status, headers)))
        body = b"".join(result)
        if hasattr(result, "close"):
            result.close()
        return seen[0], dict(seen[1]), body


def put(sandbox: Any, what: str, value: Any) -> None:
    answer = requests.put(f"{sandbox.url}/v1/{what}", json=value, headers={"X-Moesif-Application-Id": ID}, timeout=5)
    assert answer.status_code == 200


def app(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"served"]


def until(condition: Any) -> bool:
    return any(condition() or threading.Event().wait(0.05) for _ in range(600))


def test_a_users_rule_blocks_with_early_identity_asked_for_once(sandbox: Any) -> None:
    """The cohort's user is blocked with merged values; others pass; IDENTIFY_USER runs once a call."""
    put(sandbox, "config", {"sample_rate": 100, "user_rules": {"bob": [{"rules": "r1", "values": {"0": "7"}}]}})
    rule = {
        "_id": "r1", "type": "user", "state": 2, "block": True, "applied_to": "matching",
        "variables": [{"name": "0", "path": "user_id"}],
        "response": {"status": 402, "headers": {"X-Quota": "{{0}}"}, "body": {"message": "quota {{0}}"}},
    }  # fmt: skip
    put(sandbox, "rules", [rule])
    asked: list[str] = []

    def identify(app: Any, environ: Any) -> str:
        asked.append(environ["HTTP_X_USER"])
        return str(environ["HTTP_X_USER"])

    middleware = MoesifMiddleware(app, {"APPLICATION_ID": ID, "BASE_URI": sandbox.url, "IDENTIFY_USER": identify})
    client = Client(middleware)
    assert until(lambda: client.get("/a", HTTP_X_USER="bob")[0].startswith("402"))
    calls = len(asked)
    status, headers, body = client.get("/blocked", HTTP_X_USER="bob")
    assert (status, headers["X-Quota"], json.loads(body)) == ("402 Payment Required", "7", {"message": "quota 7"})
    assert headers["Content-Type"] == "application/json"
    assert client.get("/free", HTTP_X_USER="eve")[2] == b"served"
    assert len(asked) == calls + 2
    assert middleware.force_flush(30_000)
    events = {event["request"]["uri"].rpartition("/")[2]: event for event in sandbox.events()}
    assert (events["blocked"]["blocked_by"], events["blocked"]["user_id"]) == ("r1", "bob")
    assert events["blocked"]["response"]["status"] == 402
    assert "blocked_by" not in events["free"]
    middleware.shutdown()


def test_rates_decide_what_is_sent_and_weigh_it(sandbox: Any) -> None:
    """A matching entry's rate comes first: 0 keeps nothing, 50 weighs 2; what is sampled out is counted."""
    entry = {"conditions": [{"path": "request.route", "value": "^/noise"}], "sample_rate": 0}
    half = {"conditions": [{"path": "response.status", "value": "200"}], "sample_rate": 50}
    put(sandbox, "config", {"sample_rate": 100, "regex_config": [entry, half]})
    middleware = MoesifMiddleware(app, {"APPLICATION_ID": ID, "BASE_URI": sandbox.url})
    client = Client(middleware)
    client.get("/first")
    assert until(lambda: middleware._pipeline.sink.remote.config.sample_rules)
    assert middleware.force_flush(30_000)
    # The first call is weighed when our thread converts it: the rates may have come before.
    first_left_out = middleware.stats()["dropped"].get("sampled_out", 0)
    sandbox.clear()
    for _ in range(60):
        client.get("/noise")
        client.get("/kept")
    assert middleware.force_flush(30_000)
    events = sandbox.events()
    assert 5 < len(events) < 55
    assert {(event["weight"], event["request"]["uri"]) for event in events} == {(2, "http://127.0.0.1/kept")}
    stats = middleware.stats()
    assert stats["dropped"] == {"sampled_out": first_left_out + 120 - len(events)}
    assert stats["accepted"] == stats["delivered"] + stats["dropped"]["sampled_out"] == 121
    middleware.shutdown()


def test_broken_rules_let_traffic_flow(sandbox: Any) -> None:
    """Malformed and hostile rules are left out one by one; the rest still works; the answers come."""
    good = {"_id": "ok", "type": "regex", "block": False, "state": 2, "response": {"headers": {"X-Ok": "1"}}}
    hostile = [
        {"_id": "bad", "type": "regex", "block": True, "regex_config": [{"conditions": [{"path": "request.route", "value": "("}]}]},
        {"_id": "odd", "type": 7}, None, "text", [],
        {"_id": "slow", "type": "regex", "block": True, "response": {"status": 500},
         "regex_config": [{"conditions": [{"path": "request.route", "value": "^(a+)+$"}]}]},
    ]  # fmt: skip
    put(sandbox, "rules", [*hostile, good])
    middleware = MoesifMiddleware(app, {"APPLICATION_ID": ID, "BASE_URI": sandbox.url})
    client = Client(middleware)
    assert until(lambda: client.get("/x")[1].get("X-Ok") == "1")
    status, _, body = client.get("/" + "a" * 5_000 + "!")
    assert (status, body) == ("200 OK", b"served")
    assert middleware.stats()["errors"]
    middleware.shutdown()


# In steps.


def block(rule_id: str, status: int = 403, kind: str = "regex", **conditions: str) -> dict[str, Any]:
    """A rule that blocks where all conditions hold; `__` stands for a dot."""
    paths = [{"path": path.replace("__", "."), "value": value} for path, value in conditions.items()]
    groups = [{"conditions": paths}] if paths else []
    return {"_id": rule_id, "type": kind, "block": True, "regex_config": groups, "response": {"status": status}}


def rules_of(*rules: dict[str, Any]) -> RuleSet:
    return RuleSet.from_json(json.dumps(rules).encode(), Guard())


def request(method: str = "POST", url: str = "http://h/x", **headers: str) -> Any:
    """What governance looks at of an Exchange."""
    settings = SimpleNamespace(
        authorization_header_name=("authorization",), authorization_user_id_field="sub", request_max_body_size=100_000
    )
    return SimpleNamespace(
        method=method,
        url=url,
        request_headers=[(name.replace("_", "-"), value) for name, value in headers.items()],
        peer_address="10.0.0.1",
        pipeline=SimpleNamespace(settings=settings, guard=Guard()),
        callback_arguments=("app",),
        identify_arguments=(),
        user_id=None,
        company_id=None,
        blocked_by=None,
    )


def test_the_first_look_needs_neither_body_nor_identity_where_no_rule_asks() -> None:
    """Rules on method and route are decided at once; a body condition behind one that fails asks for nothing."""
    rules = rules_of(block("a", request__verb="GET", request__body__x=".*"), block("b", request__route="^/x$"))
    governed = GovernedRequest(rules, DEFAULT_CONFIG, request())
    assert (governed.needs_identity, governed.needs_body) == (False, False)
    verdict = governed.verdict()
    assert verdict is not None
    assert verdict.blocked_by == "b"


def test_identity_comes_before_the_body() -> None:
    """A user rule's body condition asks for the body of that user alone; both are given from outside, at leisure."""
    rules = rules_of(block("u", kind="user", request__body__x="^1$"))
    config = RemoteConfig.from_json(b'{"user_rules": {"bob": [{"rules": "u"}]}}', Guard())
    for user, needs_body in (("bob", True), ("eve", False)):
        exchange = request()
        governed = GovernedRequest(rules, config, exchange)
        assert governed.needs_identity
        assert exchange.identify_arguments == ("app", {})
        exchange.user_id = user
        assert governed.needs_body is needs_body
        if needs_body:
            governed.give_body(b'{"x": 1}')
        assert (governed.verdict() is not None) is needs_body
        assert exchange.blocked_by == ("u" if needs_body else None)


@pytest.mark.parametrize(
    "body",
    [
        b'{"role": "admin", "x": 1e400}',
        b'{"role": "admin", "x": NaN}',
        b'{"role": "admin", "x": -Infinity}',
        b'{"role": "admin", "x": "\\ud800"}',
        b'{"role": "admin", "x": ' + b"9" * 400 + b"}",
        b'{"role": "admin", "x": ' + b"9" * 20_000 + b"}",
        '{"role": "admin"}'.encode("utf-16"),
        b'\xef\xbb\xbf{"role": "admin"}',
        b'{"role": "user", "role": "admin"}',
    ],
)
def test_what_an_applications_parser_takes_hides_nothing(body: bytes) -> None:
    """Numbers that are none, odd text and other charsets of JSON: the other fields are seen all the same."""
    governed = GovernedRequest(rules_of(block("r", request__body__role="^admin$")), DEFAULT_CONFIG, request())
    assert governed.needs_body
    governed.give_body(body)
    assert governed.verdict() is not None


@pytest.mark.parametrize(
    ("body", "whole", "headers", "reason"),
    [
        (b"role=admin", True, {}, "not_json"),
        (b'{"role": "admin"', True, {}, "not_json"),
        (b'{"role": "admin"} x', True, {}, "not_json"),
        (b"[" * 100_000, True, {}, "not_json"),
        (b'{"role": "admin", ', False, {}, "too_large"),
        (None, True, {"content_length": "200000"}, "too_large"),
        (None, True, {"transfer_encoding": "chunked"}, "too_large"),
        (b"\x1f\x8bno", True, {"content_encoding": "gzip"}, "encoded"),
        (gzip.compress(b" " * 1_000_000 + b"{}", mtime=0), True, {"content_encoding": "gzip"}, "encoded"),
        (b"\x00\xff\x01", True, {"content_encoding": "rot13"}, "encoded"),
        (b"", True, {"content_length": "0"}, None),
        (None, True, {}, None),
        (gzip.compress(b'{"role": "user"}', mtime=0), True, {"content_encoding": "gzip"}, None),
    ],
)
def test_a_body_that_cannot_be_read_can_be_blocked_and_is_counted(
    body: bytes | None, whole: bool, headers: dict[str, str], reason: str | None
) -> None:
    """A rule on a key does not apply to it; a rule on `request.body.$unreadable` does, by reason; it is in the counters."""
    rules = rules_of(
        block("key", request__body__role="^admin$"), block("unreadable", 415, **{"request__body__$unreadable": "."})
    )
    exchange = request(**headers)
    governed = GovernedRequest(rules, DEFAULT_CONFIG, exchange)
    assert governed.needs_body
    governed.give_body(body, whole=whole)
    verdict = governed.verdict()
    assert (verdict.blocked_by if verdict else None) == ("unreadable" if reason else None)
    by_reason = rules_of(block("why", 415, **{"request__body__$unreadable": f"^{reason}$"}))
    governed = GovernedRequest(by_reason, DEFAULT_CONFIG, request(**headers))
    governed.give_body(body, whole=whole)
    assert (governed.verdict() is not None) is (reason is not None)
    assert exchange.pipeline.guard.counts() == ({"request body unreadable to governance": 1} if reason else {})


_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just({"deep": [1]})


@given(st.dictionaries(st.text(max_size=3), _VALUES, max_size=4), st.sampled_from(["utf-8", "utf-16", "utf-32-be"]))
def test_what_pythons_json_reads_is_seen(document: dict[str, Any], encoding: str) -> None:
    """Any object that Python's json writes: a rule on a key sees the text of its scalar, whatever lies beside it."""
    key, expected = "planted", "value \u00e9"
    rules = rules_of(block("r", **{f"request__body__{key}": f"^{expected}$"}))
    governed = GovernedRequest(rules, DEFAULT_CONFIG, request())
    governed.give_body(json.dumps({**document, key: expected}).encode(encoding))
    assert governed.verdict() is not None


def test_reading_the_body_may_fail() -> None:
    """The client left while we read: counted, unreadable, and never an error of ours in the application."""

    def read_ahead() -> bytes:
        raise OSError("client gone")

    exchange = request(content_length="5")
    rules = rules_of(block("r", 400, **{"request__body__$unreadable": "too_large"}))
    exchange.pipeline.governed = lambda exchange: GovernedRequest(rules, DEFAULT_CONFIG, exchange)
    verdict = decide(exchange, read_ahead)
    assert verdict is not None
    assert exchange.pipeline.guard.counts() == {
        "reading a request body for governance": 1,
        "request body unreadable to governance": 1,
    }


def test_a_form_cannot_slip_past_a_rule_on_json_unseen(sandbox: Any) -> None:
    """At a middleware: the same field as JSON, as JSON with NaN beside it, and as a form, each blocked by its rule."""
    put(sandbox, "rules", [
        block("key", 403, request__body__role="^admin$"),
        block("other", 415, **{"request__body__$unreadable": "not_json"}),
    ])  # fmt: skip
    middleware = MoesifMiddleware(app, {"APPLICATION_ID": ID, "BASE_URI": sandbox.url})
    client = Client(middleware)

    def post(body: bytes, content_type: str) -> str:
        values = {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body)), "CONTENT_TYPE": content_type}
        return client.get("/x", REQUEST_METHOD="POST", **values)[0][:3]

    assert until(lambda: post(b'{"role": "admin"}', "application/json") == "403")
    assert post(b'{"role": "admin", "x": NaN}', "application/json") == "403"
    assert post(b"role=admin", "application/x-www-form-urlencoded") == "415"
    assert post(b'{"role": "user"}', "application/json") == "200"
    assert middleware.stats()["errors"] == {"request body unreadable to governance": 1}
    middleware.shutdown()
