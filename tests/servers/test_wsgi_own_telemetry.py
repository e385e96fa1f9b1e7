"""The application's own OpenTelemetry is the same with and without us, from the first request on.

`own_telemetry.py` runs a Flask application with its own provider, sampler and instrumentation, in many arrangements.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.servers.harness import ROOT, clean_environ
from tests.servers.own_telemetry import PATHS, combinations


@pytest.fixture(scope="module")
def recorded() -> dict[tuple[Any, ...], Any]:
    # The SDK's own span metrics are part of what must not change.
    env = {**clean_environ(), "OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED": "true"}
    command = [sys.executable, "-m", "tests.servers.own_telemetry"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3_000:]
    return {tuple(key): found for key, found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize(("arrangement", "sampler", "provider"), list(combinations()))
def test_nothing_of_the_applications_telemetry_changes(
    recorded: dict[tuple[Any, ...], Any], arrangement: str, sampler: str, provider: str
) -> None:
    """Answers, spans (kind, parent, sampling, attributes), metrics and outgoing headers are those without us."""
    without = recorded[arrangement, sampler, provider, False]
    with_us = recorded[arrangement, sampler, provider, True]
    assert with_us["answers"] == without["answers"]
    assert with_us["spans"] == without["spans"]
    assert with_us["outgoing"] == without["outgoing"]
    assert with_us["metrics"] == without["metrics"]
    # The arrangement is worth something: the application records, unless its sampler says no.
    assert without["metrics"]
    assert without["outgoing"]
    assert bool(without["spans"]) or sampler == "ratio 0"


def test_every_call_becomes_an_event(recorded: dict[tuple[Any, ...], Any]) -> None:
    """Sampled out, with or without a span: each call is accepted for delivery once."""
    accepted = {found["accepted"] for key, found in recorded.items() if key[3]}
    assert accepted == {len(PATHS)}
