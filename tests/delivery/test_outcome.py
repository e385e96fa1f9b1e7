"""The table from answer to outcome."""

from __future__ import annotations

from datetime import datetime, timezone
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesif_otel._delivery.outcome import (
    BatchOutcome,
    PostAnswer,
    outcome_of_status,
    retry_after_seconds,
)

DOCUMENTED = {
    BatchOutcome.DELIVERED: [200, 201, 202, 204],
    BatchOutcome.RETRY: [407, 408, 425, 429, 500, 502, 503, 504],
    BatchOutcome.SPLIT: [413],
    BatchOutcome.ISOLATE: [400, 404, 405, 406, 410, 422],
    BatchOutcome.SUSPENDED: [401, 402, 403],
}


@pytest.mark.parametrize(("outcome", "status"), [(o, s) for o, statuses in DOCUMENTED.items() for s in statuses])
def test_each_documented_status_has_its_outcome(outcome, status) -> None:
    """Every status that Moesif documents, or that this package promises to know, leads to what it promises."""
    assert outcome_of_status(status) is outcome


@pytest.mark.parametrize(("status", "reason"), [(401, "unauthorized"), (402, "payment_required"), (403, "unauthorized")])
def test_each_suspending_status_has_a_reason(status, reason) -> None:
    """What suspends delivery says for which reason events are dropped meanwhile."""
    assert PostAnswer(BatchOutcome.SUSPENDED, status).suspension == reason


@given(st.integers(-1000, 100_000))
def test_every_number_has_an_outcome(status) -> None:
    """No status, however odd, is without an outcome; 2xx alone is a delivery."""
    outcome = outcome_of_status(status)
    assert (outcome is BatchOutcome.DELIVERED) == (200 <= status < 300)


@pytest.mark.parametrize(("status", "outcome"), [(418, BatchOutcome.ISOLATE), (302, BatchOutcome.RETRY), (599, BatchOutcome.RETRY), (299, BatchOutcome.DELIVERED)])
def test_unknown_statuses_go_by_their_class(status, outcome) -> None:
    """An unknown refusal is looked into, an unknown failure or redirect is retried."""
    assert outcome_of_status(status) is outcome


NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("120", 120.0),
        ("86400", 300.0),
        (" 0 ", 0.0),
        ("Sat, 21 Nov 2026 12:00:30 GMT", 30.0),
        ("Sat, 21 Nov 2026 11:00:00 GMT", 0.0),
        ("Saturday, 21-Nov-26 12:00:05 GMT", 5.0),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("", None),
        ("9" * 400, 300.0),
        ("Sat, 21 Nov 9999 12:00:00 GMT", 300.0),
        ("٣", None),
    ],
)
def test_retry_after_in_both_forms(value, seconds) -> None:
    """Seconds and HTTP dates are read, nonsense is no wish, and nobody can stop us for longer than five minutes."""
    assert retry_after_seconds(value, NOW.timestamp()) == seconds


@given(st.text())
def test_retry_after_never_raises(text) -> None:
    """Any header value gives seconds or None."""
    found = retry_after_seconds(text, NOW.timestamp())
    assert found is None or 0 <= found <= 300


@given(st.integers(0, 300))
def test_retry_after_dates_round_trip(ahead) -> None:
    """A date that many seconds ahead is that many seconds."""
    when = datetime.fromtimestamp(NOW.timestamp() + ahead, timezone.utc)
    assert retry_after_seconds(format_datetime(when, usegmt=True), NOW.timestamp()) == ahead
