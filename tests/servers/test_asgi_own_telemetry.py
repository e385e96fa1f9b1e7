"""An ASGI application's own spans, metrics, sampling and outgoing headers are the same with us as without us."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.servers.harness import ROOT, clean_environ

ARRANGEMENTS = (
    "fastapi_itself", "fastapi_itself_wrapped", "fastapi_instrumented_then_we", "we_then_fastapi_instrumented",
    "starlette_instrumented_then_we", "we_then_starlette_instrumented", "otel_outside", "otel_inside",
    "otel_inside_hidden", "django_instrumented",
)  # fmt: skip


@pytest.fixture(scope="module")
def recorded() -> dict[tuple[str, str, bool], Any]:
    """What was recorded, by arrangement, sampler, and whether we were there."""
    words = [sys.executable, "-m", "tests.servers.asgi_own_telemetry"]
    done = subprocess.run(words, cwd=ROOT, env=clean_environ(), capture_output=True, text=True, check=True, timeout=200)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(name, sampler, with_us): found for name, sampler, with_us, found in lines}


@pytest.mark.parametrize("sampler", ["always on", "ratio 0"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_an_applications_own_telemetry_does_not_change(arrangement: str, sampler: str, recorded: Any) -> None:
    """Whoever makes the SERVER span, and in whichever order everything was set up."""
    expected = recorded[arrangement, sampler, False]
    assert expected["spans"]
    assert recorded[arrangement, sampler, True] == expected
