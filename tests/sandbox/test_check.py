"""What the sandbox asks of an event, a profile and an action: Moesif's documentation, field by field."""

from __future__ import annotations

import copy
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesif_otel.sandbox.check import PROFILE_KINDS, Refusal, check_action, check_event, check_profile
from tests.sandbox.events import make_event, refusal_of

NOW_S = time.time()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
MISSING = object()


def changed(field, value):
    """Make an event with one field, named by its dotted path, set or taken away."""
    event = make_event()
    *way, last = field.split(".")
    place = event
    for name in way:
        place = place[name]
    if value is MISSING:
        del place[last]
    else:
        place[last] = value
    return event


@pytest.mark.parametrize(
    "field",
    [
        "request",
        "request.time",
        "request.uri",
        "request.verb",
        "request.headers",
        "response.time",
        "response.status",
        "response.headers",
    ],
)
@pytest.mark.parametrize("value", [MISSING, None])
def test_required_fields(field, value):
    """A required field that is absent or null is named in the refusal."""
    with pytest.raises(Refusal) as refused:
        check_event(changed(field, value), now_s=NOW_S, index=3)
    assert (refused.value.status, refused.value.code) == (400, "missing_field")
    assert (refused.value.index, refused.value.field) == (3, field)
    assert str(refused.value).startswith(f"item 3: {field} must be ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request", []),
        ("request.time", 1_700_000_000),
        ("request.time", "2024-10-30 04:45:42"),
        ("request.time", "2024-13-30T04:45:42.914"),
        ("request.time", ""),
        ("request.uri", "/orders"),
        ("request.uri", "http://"),
        ("request.verb", ""),
        ("request.verb", 1),
        ("request.headers", []),
        ("request.headers", {"A": 1}),
        ("request.headers", {"A": ["1"]}),
        ("request.ip_address", 1),
        ("request.transfer_encoding", "gzip"),
        ("response", "none"),
        ("response.status", "200"),
        ("response.status", True),
        ("response.status", 200.0),
        ("response.headers", {"A": None}),
        ("user_id", 17),
        ("company_id", {}),
        ("session_token", []),
        ("metadata", "text"),
        ("metadata", []),
        ("direction", "incoming"),
        ("weight", "1"),
        ("weight", -1),
        ("weight", 1.5),
        ("transaction_id", "not-a-uuid"),
        ("transaction_id", "0af7651916cd43dd8448eb211c80319c"),
        ("span", "b7ad6b7169203331"),
        ("trace_id", 5),
    ],
)
def test_wrong_values(field, value):
    """A value of another type or form is named in the refusal."""
    with pytest.raises(Refusal) as refused:
        check_event(changed(field, value), now_s=NOW_S)
    assert (refused.value.status, refused.value.code, refused.value.field) == (400, "wrong_value", field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response", MISSING),
        ("response", None),
        ("request.time", "2024-10-30T04:45:42"),
        ("request.time", "2024-10-30T04:45:42.9Z"),
        ("request.time", "2024-10-30T04:45:42.914123456+01:30"),
        ("request.uri", "https://[::1]:8443/a?b=c"),
        ("request.uri", "http://a.test/odd path \u00e9"),
        ("request.headers", {}),
        ("request.body", [1, None]),
        ("response.status", 799),
        ("user_id", None),
        ("weight", 0),
        ("direction", "Internal"),
        ("transaction_id", MISSING),
        ("something_new", {"x": 1}),
    ],
)
def test_values_that_are_fine(field, value):
    """What is optional can be absent or null, and unknown fields are no fault."""
    check_event(changed(field, value), now_s=NOW_S)


def test_base64_is_looked_at():
    """A body said to be base64 must be."""
    event = make_event()
    event["response"].update(body="AAE=", transfer_encoding="base64")
    check_event(event, now_s=NOW_S)
    for wrong in ("A", "not base64!", {"a": 1}):
        event["response"]["body"] = wrong
        with pytest.raises(Refusal, match=r"response\.body must be base64"):
            check_event(event, now_s=NOW_S)


def test_old_events():
    """An event over the age is refused; without an age any is taken."""
    event = changed("request.time", "2015-01-01T00:00:00.000")
    check_event(event, now_s=NOW_S)
    with pytest.raises(Refusal, match="days old") as refused:
        check_event(event, now_s=NOW_S, max_age_s=86_400)
    assert refused.value.code == "too_old"


@given(JSON)
def test_any_json_is_taken_or_refused(value):
    """No JSON makes the checks fail in another way than with a refusal, as an event, a part of one, or a profile."""
    events = [value, {"request": value}, {**make_event(), "response": value}]
    for field in ("request.time", "request.uri", "request.headers", "transaction_id", "weight"):
        events.append(changed(field, value))
    for event in events:
        before = copy.deepcopy(event)
        refusal = refusal_of(check_event, event, now_s=NOW_S, index=0, max_age_s=1e9)
        assert refusal is None or refusal.as_json()["error"]["message"]
        assert repr(event) == repr(before)
    for kind, required in PROFILE_KINDS.items():
        for profile in (value, dict.fromkeys(required, value)):
            refusal = refusal_of(check_profile, kind, profile)
            assert refusal is None or refusal.status == 400
    for action in (value, {"action_name": "a", "request": value}):
        refusal = refusal_of(check_action, action)
        assert refusal is None or refusal.status == 400


@pytest.mark.parametrize(
    ("kind", "profile", "field"),
    [
        ("users", {"user_id": ""}, "user_id"),
        ("users", {"user_id": 1}, "user_id"),
        ("users", {"user_id": "u", "metadata": "x"}, "metadata"),
        ("users", {"user_id": "u", "campaign": []}, "campaign"),
        ("companies", {"user_id": "u"}, "company_id"),
        ("subscriptions", {"subscription_id": "s", "company_id": "c", "status": "gone"}, "status"),
        ("subscriptions", {"subscription_id": "s", "status": "active"}, "company_id"),
    ],
)
def test_profiles(kind, profile, field):
    """A profile without its id, or with a wrong value, is refused by the field's name."""
    with pytest.raises(Refusal) as refused:
        check_profile(kind, profile)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("action", "field"),
    [
        ({"action_name": "a"}, "request"),
        ({"action_name": "a", "request": {"uri": "http://a.test/"}}, "request.time"),
        ({"action_name": "a", "request": {"time": "2026-01-02T03:04:05.678"}}, "request.uri"),
        ({"request": {}}, "action_name"),
    ],
)
def test_actions(action, field):
    """An action without a required field is refused by the field's name."""
    with pytest.raises(Refusal) as refused:
        check_action(action)
    assert refused.value.field == field
