"""The configuration is read piece by piece; a bad piece is left out, counted, and the rest holds."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesif_otel._guard import Guard
from moesif_otel._remote.config import DEFAULT_CONFIG, RemoteConfig
from moesif_otel._remote.rules import MalformedError

DOCUMENTED = {
    "org_id": "421:67",
    "app_id": "46:73",
    "sample_rate": 95,
    "block_bot_traffic": False,
    "user_sample_rate": {"user_1234": 80},
    "company_sample_rate": {},
    "user_rules": {"12345": [{"rules": "62fd061e51f905712d73f72d", "values": {"0": "gold", "1": "created"}}]},
    "company_rules": {"67890": [{"rules": "62fe6f3bf199ee4cf35762d7"}]},
    "ip_addresses_blocked_by_name": {},
    "regex_config": [{"conditions": [{"path": "request.route", "value": "/.*"}], "sample_rate": 80}],
    "billing_config_jsons": {},
}


def read(config: Any, guard: Guard | None = None) -> RemoteConfig:
    return RemoteConfig.from_json(json.dumps(config).encode(), guard or Guard())


def test_the_documented_configuration_is_read_whole() -> None:
    """The example of Moesif's documentation comes through, and nothing of it is left out."""
    guard = Guard()
    config = read(DOCUMENTED, guard)
    assert config.sample_rate == 95
    assert config.user_sample_rates == {"user_1234": 80}
    assert config.user_rules["12345"] == {"62fd061e51f905712d73f72d": {"0": "gold", "1": "created"}}
    assert list(config.company_rules["67890"].values()) == [{}]
    assert config.sample_rules[0].rate == 80
    assert guard.counts() == {}


def test_before_the_first_answer_everything_is_kept() -> None:
    """The default is rate 100 and no rules."""
    assert DEFAULT_CONFIG.sample_rate == 100
    assert not DEFAULT_CONFIG.sample_rules
    assert not DEFAULT_CONFIG.user_rules


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"5", b"\xff\xfe", b'"text"'])
def test_an_answer_that_is_no_object_is_malformed_as_a_whole(data: bytes) -> None:
    """Such an answer raises, so that the poller keeps the last good one."""
    with pytest.raises(MalformedError):
        RemoteConfig.from_json(data, Guard())


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("sample_rate", "95"),
        ("sample_rate", True),
        ("sample_rate", None),
        ("user_sample_rate", [1]),
        ("user_sample_rate", {"u": "x"}),
        ("company_sample_rate", 5),
        ("user_rules", []),
        ("user_rules", {"u": {}}),
        ("user_rules", {"u": [5]}),
        ("user_rules", {"u": [{"rules": 5}]}),
        ("company_rules", {"c": [{}]}),
        ("company_rules", {"c": [{"rules": "x", "values": 5}]}),
        ("regex_config", {}),
        ("regex_config", [5]),
        ("regex_config", [{"conditions": "x", "sample_rate": 5}]),
        ("regex_config", [{"conditions": [{"path": "request.verb"}], "sample_rate": 5}]),
        ("regex_config", [{"conditions": [{"path": 5, "value": "x"}], "sample_rate": 5}]),
        ("regex_config", [{"conditions": [{"path": "request.verb", "value": "("}], "sample_rate": 5}]),
        ("regex_config", [{"conditions": [{"path": "request.verb", "value": "x"}], "sample_rate": "5"}]),
        ("regex_config", [{"conditions": [{"path": "request.verb", "value": "x"}]}]),
    ],
)
def test_a_malformed_piece_is_left_out_alone_and_counted(member: str, value: Any) -> None:
    """Each wrong piece is counted; every other member of the configuration still holds."""
    guard = Guard()
    config = read({**DOCUMENTED, member: value}, guard)
    assert sum(guard.counts().values()) == 1
    good = read(DOCUMENTED)
    held = {
        "sample_rate": config.sample_rate == good.sample_rate,
        "user_sample_rate": config.user_sample_rates == good.user_sample_rates,
        "user_rules": config.user_rules == good.user_rules,
        "company_rules": config.company_rules == good.company_rules,
        "regex_config": len(config.sample_rules) == len(good.sample_rules),
    }
    assert all(ok for name, ok in held.items() if name != member)


def test_the_first_of_a_kind_is_logged_without_data(caplog: pytest.LogCaptureFixture) -> None:
    """A thousand bad entries make one line in the log, and it quotes no identity."""
    with caplog.at_level(logging.WARNING):
        guard = Guard()
        read({"user_sample_rate": {f"secret{n}": "x" for n in range(1_000)}}, guard)
    assert len(caplog.records) == 1
    assert "secret" not in caplog.text
    assert guard.counts() == {"configuration user_sample_rate entry": 1_000}


@pytest.mark.parametrize(("given_rate", "held_rate"), [(150, 100), (-1, 0), (0, 0), (0.5, 0.5), (1e308, 100)])
def test_rates_are_held_to_0_to_100(given_rate: float, held_rate: float) -> None:
    """A rate outside per cent is brought to the nearest end."""
    assert read({"sample_rate": given_rate}).sample_rate == held_rate


def test_values_of_a_cohort_entry_become_text() -> None:
    """Numbers and booleans are values too; null and structures are missing."""
    config = read({"user_rules": {"u": [{"rules": "r", "values": {"a": 5, "b": True, "c": None, "d": {}, "e": 1.5}}]}})
    assert config.user_rules["u"]["r"] == {"a": "5", "b": "true", "e": "1.5"}


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 500)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(DOCUMENTED)), _JSON))
@settings(max_examples=200, deadline=None)
def test_no_object_makes_reading_fail(raw: dict[str, Any]) -> None:
    """Whatever its members hold, an object is read, and its rates are per cent."""
    config = read(raw)
    rates = [config.sample_rate, *config.user_sample_rates.values(), *config.company_sample_rates.values()]
    assert all(0 <= rate <= 100 for rate in [*rates, *(rule.rate for rule in config.sample_rules)])
