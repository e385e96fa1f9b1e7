"""The application's own telemetry is the same with us and without us: spans, sampling, metrics, headers of its calls."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from moesif_otel.sandbox.server import Sandbox
from tests.zero_code.kit import Program, command, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

OWN = "flask,requests,tornado"  # instrumentors that the application activates itself, on its own provider
SCENES = [("global", "on"), ("global", "parent"), ("own", "parent")]
MODES = ["without", "instrument", "processor", "middleware", "zero-code without", "zero-code"]
CALLS_SERVED = 14
"""Ten from outside, four of which lead to a call of the application to itself."""


def start(sandbox: Sandbox, mode: str, provider: str, sampler: str) -> Program:
    """Start the application."""
    words = [sys.executable, "own_telemetry.py", mode if "zero" not in mode else "without", provider, sampler]
    if "zero-code" not in mode:
        return Program(words, environment(sandbox.url, None))
    disabled = OWN if mode == "zero-code" else f"{OWN},moesif"
    env = environment(
        sandbox.url,
        f"{mode} {provider} {sampler}",
        OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=disabled,
        MOESIF_CAPTURE_OUTGOING_REQUESTS="true",
    )
    return Program(command(*words), env)


@pytest.fixture(scope="module", params=SCENES, ids=" ".join)
def scene(request: pytest.FixtureRequest) -> Iterator[tuple[Sandbox, str, dict[str, Any]]]:
    """One provider and sampler, all modes side by side."""
    provider, sampler = request.param
    # In the zero-code run the global provider is the distro's: an application cannot set another.
    modes = [mode for mode in MODES if provider == "own" or "zero" not in mode]
    with Sandbox() as sandbox:
        programs = {mode: start(sandbox, mode, provider, sampler) for mode in modes}
        results = {}
        for mode, program in programs.items():
            assert program.wait() == 0, program.output
            (line,) = [line for line in program.output.splitlines() if line.startswith("RESULT ")]
            assert "moesif_otel" not in program.output, program.output
            results[mode] = json.loads(line.removeprefix("RESULT "))
            program.stop()
        yield sandbox, f"{provider} {sampler}", results


@pytest.mark.parametrize("aspect", ["calls", "headers", "spans", "metrics"])
def test_nothing_of_the_applications_own_changes(aspect: str, scene: Any) -> None:
    """What clients get, what peers are sent, and what the application's backend receives."""
    _, _, results = scene
    for mode, result in results.items():
        assert result[aspect] == results["without"][aspect], mode


def test_every_call_is_an_event_all_the_same(scene: Any) -> None:
    """Also those that are sampled out of the traces."""
    sandbox, name, results = scene
    for mode in results:
        events = sandbox.events(application_id=f"{mode} {name}")
        incoming = [event for event in events if event["direction"] == "Incoming"]
        outgoing = [event for event in events if event["direction"] == "Outgoing"]
        if mode.endswith("without"):
            assert events == []
        elif mode == "middleware":
            assert len(incoming) == CALLS_SERVED - 2  # not the two that Tornado served
        else:
            assert (len(incoming), len(outgoing)) == (CALLS_SERVED, 2)
        assert len({event["transaction_id"] for event in events}) == len(events)


def test_a_call_and_those_it_makes_are_linked_also_where_no_span_of_theirs_is_seen(scene: Any) -> None:
    """Sampled out, or spans of a provider that none of our processors is on: one trace, and the parent is the call."""
    sandbox, name, results = scene
    for mode in results.keys() - {"middleware"}:
        events = sandbox.events(application_id=f"{mode} {name}")
        served = {event["span"]["id"]: event for event in events if event["direction"] == "Incoming"}
        for event in events:
            if event["direction"] == "Outgoing":
                parent = served[event["span"]["parent_id"]]
                assert parent["request"]["uri"].endswith("/fetch")
                assert parent["trace_id"] == event["trace_id"]
