"""Sampling: the documented order, weights, and that one bad entry leaves the others alone."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moesifapi.app_config.app_config import AppConfig

from moesif_otel._guard import Guard
from moesif_otel._remote.config import DEFAULT_CONFIG, RemoteConfig, rate_for, sampled_weight
from moesif_otel._remote.facts import CallFacts, route_of

CALL = CallFacts(verb="GET", route="/users/7", ip_address="10.0.0.1", status=200)


def config_of(**members: Any) -> RemoteConfig:
    return RemoteConfig.from_json(json.dumps(members).encode(), Guard())


def entry(rate: float, **conditions: Any) -> dict[str, Any]:
    return {
        "conditions": [{"path": path.replace("__", "."), "value": value} for path, value in conditions.items()],
        "sample_rate": rate,
    }


def test_the_order_is_entry_then_user_then_company_then_general() -> None:
    """The first matching entry wins over the user's rate, that over the company's, that over the general one."""
    config = config_of(
        sample_rate=40,
        user_sample_rate={"u": 20},
        company_sample_rate={"c": 30},
        regex_config=[entry(5, request__verb="POST"), entry(10, request__verb="GET"), entry(15, request__route="/")],
    )
    assert rate_for(config, CALL, "u", "c") == 10
    other = CallFacts(verb="PUT", route="x")
    assert rate_for(config, other, "u", "c") == 20
    assert rate_for(config, other, "x", "c") == 30
    assert rate_for(config, other, None, None) == 40
    assert rate_for(DEFAULT_CONFIG, other) == 100


@pytest.mark.parametrize(
    ("path", "expression", "found"),
    [
        ("request.verb", "^GET$", True),
        ("request.route", "^/users/\\d+$", True),
        ("request.route", "\\?", False),
        ("request.ip_address", "^10\\.", True),
        ("response.status", "^2..$", True),
        ("response.status", 200, True),
        ("response.status", "4", False),
        ("request.headers.x", ".*", False),
        ("no.such.path", ".*", False),
    ],
)
def test_each_documented_path_is_matched_as_text(path: str, expression: Any, found: bool) -> None:
    """Conditions see verb, route, address and status as text; an unknown path never matches."""
    config = config_of(regex_config=[{"conditions": [{"path": path, "value": expression}], "sample_rate": 7}])
    assert (rate_for(config, CALL) == 7) is found


def test_all_conditions_of_an_entry_must_hold() -> None:
    """Conditions are joined by and."""
    config = config_of(regex_config=[entry(7, request__verb="GET", request__route="^/orders")])
    assert rate_for(config, CALL) == 100
    assert rate_for(config, CallFacts(verb="GET", route="/orders/1")) == 7


@pytest.mark.parametrize(
    "bad", [entry(1, request__verb="("), entry(1, request__nothing=".*"), entry(1), {"sample_rate": 1}, 5]
)
def test_a_bad_entry_is_skipped_alone(bad: Any) -> None:
    """An entry that cannot match leaves the next one its turn."""
    assert rate_for(config_of(regex_config=[bad, entry(9, request__verb="GET")]), CALL) == 9


def test_a_catastrophic_entry_is_skipped_alone() -> None:
    """An entry that runs out of time leaves the next one its turn."""
    config = config_of(regex_config=[entry(1, request__route="^(a+)+$"), entry(9, request__verb="GET")])
    assert rate_for(config, CallFacts(verb="GET", route="a" * 4_000 + "!")) == 9


def test_missing_facts_match_nothing() -> None:
    """A call without an answer or address is decided by what is known."""
    config = config_of(regex_config=[entry(1, response__status=".*"), entry(2, request__ip_address=".*")])
    assert rate_for(config, CallFacts(verb="GET", route="/")) == 100


@pytest.mark.parametrize(
    ("rate", "weight"),
    [(100, 1), (80, 1), (50, 2), (33, 3), (34, 2), (10, 10), (1, 100), (0.5, 200), (0, 0), (1e-300, 10**9)],
)
def test_weights_are_floor_of_one_over_the_rate(rate: float, weight: int) -> None:
    """An event that is kept stands for floor(100 / rate) calls; at rate 0 none is kept."""
    assert sampled_weight(config_of(sample_rate=rate), CALL, random=lambda: 0.0) == weight


@pytest.mark.parametrize(
    ("drawn", "rate", "kept"),
    [(0.0, 1, True), (0.5, 50, False), (0.49, 50, True), (0.0, 0, False), (0.999999, 100, True)],
)
def test_a_call_is_kept_when_the_draw_is_under_its_rate(drawn: float, rate: float, kept: bool) -> None:
    """Keep when random * 100 < rate."""
    assert (sampled_weight(config_of(sample_rate=rate), CALL, random=lambda: drawn) > 0) is kept


def test_at_the_full_rate_no_number_is_drawn() -> None:
    """The usual case costs nothing and disturbs no seeded random source."""
    assert sampled_weight(DEFAULT_CONFIG, CALL, random=lambda: pytest.fail("drawn")) == 1


def test_identities_that_are_no_strings() -> None:
    """An id from a callback can be a number, or an object whose text fails: neither raises."""

    class Hostile:
        def __str__(self) -> str:
            raise RuntimeError

    config = config_of(sample_rate=40, user_sample_rate={"7": 20})
    assert rate_for(config, CALL, 7) == 20
    assert rate_for(config, CALL, Hostile()) == 40


@pytest.mark.parametrize(
    ("uri", "route"),
    [
        ("https://h/a/b?c=d", "/a/b"),
        ("https://h", "/"),
        ("https://h?x=1", "/"),
        ("http://[bad/a?b", "http://[bad/a"),
        ("/a?b", "/a"),
    ],
)
def test_the_route_is_the_path_without_query(uri: str, route: str) -> None:
    """As the documentation says; an address that cannot be read is no error."""
    assert route_of(uri) == route


_RATES = st.integers(0, 100)
_ENTRIES = st.lists(
    st.builds(
        lambda conditions, rate: {
            "conditions": [{"path": p, "value": v} for p, v in conditions.items()],
            "sample_rate": rate,
        },
        st.dictionaries(
            st.sampled_from(["request.verb", "request.route", "request.ip_address", "response.status"]),
            st.sampled_from(
                ["GET", "POST", "^/users", "/.+", "users/\\d", "^10", "20[01]", "[ab]", "4..", "(?i)USERS"]
            ),
            min_size=1,
        ),
        _RATES,
    ),
    max_size=4,
)


@given(
    st.fixed_dictionaries(
        {
            "sample_rate": _RATES,
            "user_sample_rate": st.dictionaries(st.sampled_from("uv"), _RATES),
            "company_sample_rate": st.dictionaries(st.sampled_from("cd"), _RATES),
            "regex_config": _ENTRIES,
        }
    ),
    st.sampled_from(["GET", "POST"]),
    st.sampled_from(["/users/7", "/orders", "/a/users"]),
    st.sampled_from(["10.0.0.1", "192.168.0.1"]),
    st.sampled_from([200, 201, 404]),
    st.sampled_from([None, "u", "x"]),
    st.sampled_from([None, "c", "x"]),
)
@settings(max_examples=300, deadline=None)
def test_the_rate_is_that_of_moesifapi(
    raw: dict[str, Any], verb: str, route: str, ip: str, status: int, user_id: str | None, company_id: str | None
) -> None:
    """On valid configurations the Python SDK finds the same rate."""
    event = SimpleNamespace(
        request=SimpleNamespace(verb=verb, uri=f"https://host{route}?q=GET", ip_address=ip),
        response=SimpleNamespace(status=status),
    )
    theirs = AppConfig().get_sampling_percentage(event, raw, user_id, company_id)
    ours = rate_for(config_of(**raw), CallFacts(verb, route_of(event.request.uri), ip, status), user_id, company_id)
    assert ours == theirs
