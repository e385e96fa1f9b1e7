"""One rule: its merge tags, and how deep it may be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesif_otel._guard import Guard
from moesif_otel._remote.config import RemoteConfig
from moesif_otel._remote.governance import RuleSet
from moesif_otel._remote.rules import Conditions, RuleError, _filled, _has_tags, read_rule

VALUES = {"0": "gold", "plan name": "big", "x": "{{0}}"}


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{{0}}", "gold"),
        ("a {{0}}{{0}} b", "a goldgold b"),
        ("{{plan name}}", "big"),
        ("{{missing}}", "UNKNOWN"),
        ("{{ 0 }}", "{{ 0 }}"),
        ("{{}}", "{{}}"),
        ("{0}", "{0}"),
        ("{{{0}}}", "{{{0}}}".replace("{{0}}", "gold")),
        ("{{x}}", "{{0}}"),
        ({"{{0}}": [{"k": ("{{0}}", 1)[0]}, 5, None, True]}, {"gold": [{"k": "gold"}, 5, None, True]}),
        (5, 5),
        (None, None),
    ],
)
def test_tags_are_replaced_in_keys_values_and_lists(template: Any, filled: Any) -> None:
    """At any depth; what was put in is not looked at again; other template languages are left alone."""
    assert _filled(template, VALUES) == filled


@given(st.text(alphabet="{}0 ax", max_size=20))
def test_text_without_tags_stays(text: str) -> None:
    """Only `{{name}}` changes a text."""
    if not _has_tags(text, 0):
        assert _filled(text, VALUES) == text
    assert isinstance(_filled(text, VALUES), str)


@pytest.mark.parametrize("variables", [[], [{"name": "0"}]])
def test_a_body_that_is_too_deep_to_be_written_is_refused(variables: list[Any]) -> None:
    """When the rule is read, not when a request is to be answered with it."""
    deep: Any = "{{0}}"
    for _ in range(400):
        deep = [deep]
    response = {"status": 403, "body": deep}
    with pytest.raises(RuleError, match="nested too deeply"):
        read_rule(
            {"_id": "r", "type": "regex", "block": True, "variables": variables, "response": response}, Conditions()
        )


def test_so_many_conditions_are_compiled_and_no_more() -> None:
    """A set of rules without end costs a bounded time; what was read before still counts."""
    conditions = Conditions()
    many = [{"path": "request.route", "value": f"^/{n}"} for n in range(3_000)]
    for at in range(0, 2_000, 500):
        read_rule({"_id": "r", "type": "regex", "regex_config": [{"conditions": many[at : at + 500]}]}, conditions)
    with pytest.raises(RuleError, match="over 2,000"):
        read_rule({"_id": "r", "type": "regex", "regex_config": [{"conditions": many[2_000:]}]}, conditions)
    read_rule({"_id": "r", "type": "regex", "regex_config": [{"conditions": many[:500]}]}, conditions)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"block": True, "response": {"status": 403, "body": "x" * 300_000}}, "over 256 KiB"),
        ({"response": {"headers": {f"X-{n}": "1" for n in range(101)}}}, "over 100 response headers"),
        ({"regex_config": [{"conditions": [{"path": "request.verb", "value": "G"}] * 20_001}]}, "over 20,000"),
    ],
)
def test_what_a_rule_may_cost_a_request_is_bounded(more: dict[str, Any], reason: str) -> None:
    """Whoever answers in Moesif's place: no body, header list or list of conditions without end."""
    with pytest.raises(RuleError, match=reason):
        read_rule({"_id": "r", "type": "regex", **more}, Conditions())


def test_a_set_of_rules_is_bounded() -> None:
    """The first 2,000 rules count; a merge value that is too long is UNKNOWN."""
    guard = Guard()
    rules = [{"_id": str(n), "type": "regex"} for n in range(2_010)]
    assert len(RuleSet.from_json(json.dumps(rules).encode(), guard)) == 2_000
    assert guard.counts() == {"governance rule": 1}
    entries = [{"rules": "r", "values": {"long": "x" * 1_001, "short": "x" * 1_000}}]
    config = RemoteConfig.from_json(json.dumps({"user_rules": {"u": entries}}).encode(), Guard())
    assert list(config.user_rules["u"]["r"]) == ["short"]
