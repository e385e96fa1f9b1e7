"""`events.times`: Moesif's form of a time."""

from __future__ import annotations

import pytest

from moesif_otel._events.times import moesif_time


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
