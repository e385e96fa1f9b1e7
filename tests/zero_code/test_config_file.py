"""`OTEL_CONFIG_FILE`: exporter and options of the capture from OpenTelemetry's declarative configuration."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from moesif_otel.sandbox.server import Sandbox
from tests.zero_code.kit import ROOT, Program, command, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("opentelemetry.configuration")

EXAMPLE = ROOT / "examples" / "zero-code" / "otel-config.yaml"
WRONG = """\
file_format: "1.1"
propagator: {composite: [{tracecontext: }]}
tracer_provider:
  processors:
    - batch:
        exporter: {moesif: {application_id: wrong, base_uri: "${MOESIF_BASE_URI}", batch_size: many}}
instrumentation/development:
  python:
    moesif:
      application_id: wrong
      base_uri: ${MOESIF_BASE_URI}
      batch_size: many
      identify_users: hooks:identify_user
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[str, list[Any]]]]:
    """Runs with the example's file, with the same but slow batches, and with one that has mistakes."""
    folder = tmp_path_factory.mktemp("configuration")
    slow, wrong = folder / "slow.yaml", folder / "wrong.yaml"
    slow.write_text(EXAMPLE.read_text().replace("schedule_delay: 1000", "schedule_delay: 60000"))
    wrong.write_text(WRONG)
    started = {
        "example": (EXAMPLE, ["flask_program.py", "echo", "fetch"]),
        "slow": (slow, ["urllib3_program.py"]),
        "wrong": (wrong, ["flask_program.py", "echo"]),
    }
    with Sandbox() as sandbox:
        programs = {
            name: Program(
                command(sys.executable, *words), environment(sandbox.url, name, OTEL_CONFIG_FILE=str(file))
            )
            for name, (file, words) in started.items()
        }
        codes = {name: program.wait() for name, program in programs.items()}
        assert set(codes.values()) == {0}, [program.output for program in programs.values()]
        yield {name: (program.output, sandbox.events(application_id=name)) for name, program in programs.items()}
        for program in programs.values():
            program.stop()


def test_the_example_captures_each_call_once(runs: Any) -> None:
    """Callbacks, outgoing calls and bodies by the file's options; the exporter of the same file sends nothing again."""
    output, events = runs["example"]
    assert "moesif_otel" not in output
    calls = sorted((event["direction"], event["request"]["uri"].rpartition("/")[2]) for event in events)
    assert calls == [
        ("Incoming", "echo"),
        ("Incoming", "fetch"),
        ("Incoming", "upstream?q=1"),
        ("Outgoing", "upstream?q=1"),
    ]
    (echo,) = [event for event in events if event["request"]["uri"].endswith("/echo")]
    assert echo["user_id"] == "mary"
    assert echo["request"]["body"] == {"card": "plum 4711"}


def test_the_exporter_delivers_at_exit_what_its_batch_processor_held(runs: Any) -> None:
    """A provider made from a file ends after our exit handlers would; its last spans arrive all the same."""
    output, events = runs["slow"]
    assert "moesif_otel" not in output
    assert sorted(event["request"]["uri"].rpartition("/")[2] for event in events) == ["hello?n=0", "hello?n=1"]
    assert {event["direction"] for event in events} == {"Outgoing"}


def test_mistakes_are_named_once_and_the_rest_works(runs: Any) -> None:
    """A wrong value has its default, an unknown option its nearest name; calls are captured."""
    output, events = runs["wrong"]
    assert output.count("BATCH_SIZE: got 'many'") == 1
    assert "unknown option 'identify_users' is ignored; did you mean identify_user?" in output
    assert "Traceback" not in output
    (event,) = events
    assert event["response"]["body"]["secret_answer"] == 42
