"""What Moesif says back, at a WSGI door: rules block and add headers, rates sample, identities are asked for once."""

from __future__ import annotations

import json
import threading
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
import requests

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
    return any(condition() or threading.Event().wait(0.05) for _ in range(200))


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
    assert middleware.force_flush(5_000)
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
    assert middleware.force_flush(5_000)
    sandbox.clear()
    for _ in range(60):
        client.get("/noise")
        client.get("/kept")
    assert middleware.force_flush(5_000)
    events = sandbox.events()
    assert 5 < len(events) < 55
    assert {(event["weight"], event["request"]["uri"]) for event in events} == {(2, "http://127.0.0.1/kept")}
    stats = middleware.stats()
    assert stats["dropped"] == {"sampled_out": 120 - len(events)}
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
