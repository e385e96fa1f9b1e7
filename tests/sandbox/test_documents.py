"""What the page's editors say of rules and configuration before they are in force."""

from __future__ import annotations

import pytest
import requests

from moesif_otel.sandbox import Sandbox
from moesif_otel.sandbox.demo_traffic import COMPANY_RULES, RULES
from moesif_otel.sandbox.documents import check_document

RULE = {"_id": "r", "type": "regex", "block": True, "response": {"status": 403, "headers": {}, "body": {}}}


def condition(path="request.route", value="^/a"):
    """Give a rule with one condition."""
    return {**RULE, "regex_config": [{"conditions": [{"path": path, "value": value}]}]}


@pytest.mark.parametrize(
    ("rules", "field"),
    [
        ({}, ""),
        ([1], "[0]"),
        ([{**RULE, "_id": ""}], "[0]._id"),
        ([RULE, RULE], "[1]._id"),
        ([{**RULE, "type": "other"}], "[0].type"),
        ([{**RULE, "block": "yes"}], "[0].block"),
        ([{**RULE, "aplied_to": "matching"}], "[0].aplied_to"),
        ([{**RULE, "applied_to": "some"}], "[0].applied_to"),
        ([{**RULE, "variables": [1]}], "[0].variables"),
        ([{**RULE, "regex_config": {}}], "[0].regex_config"),
        ([{**RULE, "regex_config": [{}]}], "[0].regex_config[0].conditions"),
        ([condition(path="request.rout")], "[0].regex_config[0].conditions[0].path"),
        ([condition(value="(")], "[0].regex_config[0].conditions[0].value"),
        ([condition(value=7)], "[0].regex_config[0].conditions[0].value"),
        ([{**RULE, "response": None}], "[0].response"),
        ([{**RULE, "response": {"status": "403"}}], "[0].response.status"),
        ([{**RULE, "response": {"status": 42}}], "[0].response.status"),
        ([{**RULE, "response": {"status": 403, "headers": {"A": 1}}}], "[0].response.headers"),
    ],
)
def test_wrong_rules_are_named(rules, field):
    """Each fault is told with its place."""
    assert field in [fault["field"] for fault in check_document("rules", rules)]


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ([], ""),
        ({"sample_rate": 101}, "sample_rate"),
        ({"sample_rate": True}, "sample_rate"),
        ({"user_sample_rate": {"u": "x"}}, "user_sample_rate.u"),
        ({"company_sample_rate": []}, "company_sample_rate"),
        ({"user_rules": {"u": {}}}, "user_rules.u"),
        ({"user_rules": {"u": [{}]}}, "user_rules.u[0].rules"),
        ({"regex_config": [{"conditions": [{"path": "request.body.x", "value": "a"}], "sample_rate": 5}]}, "regex_config[0].conditions[0].path"),
        ({"regex_config": [{"conditions": []}]}, "regex_config[0].sample_rate"),
    ],
)  # fmt: skip
def test_wrong_configurations_are_named(config, field):
    """Each fault is told with its place."""
    assert field in [fault["field"] for fault in check_document("config", config)]


def test_good_documents_pass():
    """What the demo uses, and what nobody edited, has no fault."""
    assert check_document("rules", list(RULES)) == []
    assert check_document("rules", []) == []
    assert check_document("config", {"sample_rate": 50, "company_rules": COMPANY_RULES}) == []
    with Sandbox() as sandbox:
        known = requests.get(sandbox.url + "/api/documents/config", timeout=10).json()
        assert check_document("config", known) == []


def test_the_editor_asks_more_than_the_api():
    """A wrong rule is refused by the editor and changes nothing; Moesif's own path takes it, to try a client against."""
    with Sandbox() as sandbox:
        wrong = [condition(value="(")]
        answer = requests.put(sandbox.url + "/api/documents/rules", json=wrong, timeout=10)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "wrong_document")
        assert requests.get(sandbox.url + "/api/documents/rules", timeout=10).json() == []
        assert requests.put(sandbox.url + "/v1/rules", json=wrong, timeout=10).status_code == 200
        assert requests.put(sandbox.url + "/api/documents/other", json=[], timeout=10).status_code == 404
        assert requests.put(sandbox.url + "/api/documents/rules", data=b"[", timeout=10).status_code == 400
        one = requests.put(sandbox.url + "/api/documents/rules?application_id=a", json=[RULE], timeout=10)
        assert one.json() == [RULE]
        assert one.headers["X-Moesif-Rules-Tag"]
        headers = {"X-Moesif-Application-Id": "b"}
        assert requests.get(sandbox.url + "/v1/rules", headers=headers, timeout=10).json() == wrong
