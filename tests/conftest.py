"""What all tests share: hypothesis without stop-watches.

These machines are noisy, so no example has a deadline and slow drawing is no failure; in CI the examples are the same
in each run, so that a red run tells of the change and not of the dice.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "moesif_otel", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("moesif_otel")
