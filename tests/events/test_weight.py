"""`events.weight`: how many calls a sampled span stands for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesif_otel._events.weight import weight_of


@pytest.mark.parametrize(
    ("entry", "weight"),
    [
        (None, 1),
        ("", 1),
        ("th:0", 1),  # everything is kept
        ("th:8", 2),  # half
        ("th:c", 4),
        ("th:e668", 10),
        ("rv:abcdef01234567;th:fd70a4", 100),
        ("th:ffffffffffffff", (1 << 31) - 1),
        ("p:0", 1),
        ("p:3;r:10", 8),
        ("r:10;p:62", (1 << 31) - 1),
        ("p:63", 1),  # zero probability: not a weight
        ("th:", 1),
        ("th:xyz", 1),
        ("th:-8", 1),
        ("th:0x8", 1),
        ("th:1_0", 1),
        ("th:123456789012345", 1),
        ("p:٣", 1),
        ("p:-1", 1),
    ],
)
def test_weight_is_one_over_the_sampling_probability(entry: str | None, weight: int) -> None:
    """By the specification's threshold, or its predecessor's exponent; malformed entries weigh 1."""
    assert weight_of(entry) == weight


@given(st.text(alphabet="thpr:;0123456789abcdefx-", max_size=40))
def test_any_entry_weighs_at_least_one(entry: str) -> None:
    """No entry raises or makes a call disappear."""
    assert 1 <= weight_of(entry) < 1 << 31
