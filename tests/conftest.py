"""What all tests share: hypothesis without stop-watches, and a maker of calls.

These machines are noisy, so no example has a deadline and slow drawing is no failure; in CI the examples are the same
in each run, so that a red run tells of the change and not of the dice.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from tests.calls import Calls

settings.register_profile(
    "moesif_otel", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("moesif_otel")


@pytest.fixture(scope="session")
def calls() -> Calls:
    """Maker of calls; holds nothing between tests."""
    return Calls()
