"""The zero-code run starts whatever its options are, and says what is wrong in one line."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from moesif_otel.sandbox.server import Sandbox
from moesif_otel.settings import OPTIONS
from tests.zero_code.kit import Program, command, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

import sys

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OUTGOING = {"MOESIF_CAPTURE_OUTGOING_REQUESTS": "true"}
USER = {"MOESIF_IDENTIFY_USER": "hooks:identify_user"}

# A service has the instrumentations that it needs; to load those of every framework takes two seconds a process.
NOT_ITS_OWN = "aiohttp-client,django,falcon,fastapi,httpx,pyramid,starlette,tornado"

# Name (also the application id) to: the calls, and the environment.
RUNS: dict[str, tuple[list[str], dict[str, str]]] = {
    "no id": (["echo"], {}),
    "no id, exporter": (["echo"], {"OTEL_TRACES_EXPORTER": "moesif"}),
    "wrong": (["echo"], {"MOESIF_BATCH_SIZE": "many", "OTEL_MOESIF_DEBUG": "maybe"}),
    "wrong protective": (["echo"], {"MOESIF_BATCH_SIZE": "many", "OTEL_MOESIF_LOG_BODY": "maybe"}),
    "wrong destination": (["echo"], {"MOESIF_BASE_URI": "localhost:8765"}),
    "switched off": (["echo"], {"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "moesif"}),
    "path not absolute": (["echo"], {"MOESIF_IDENTIFY_USER": ".hooks:identify_user"}),
    "path leads nowhere": (["echo", "echo"], {"MOESIF_IDENTIFY_USER": "nowhere.hooks:identify_user"}),
    "callback": (["echo"], {"OTEL_MOESIF_IDENTIFY_USER": "hooks:identify_user"}),
    "exporter none": (["echo", "fetch"], OUTGOING),
    "exporter moesif": (["echo", "fetch"], {"OTEL_TRACES_EXPORTER": "moesif", **OUTGOING}),
    "exporter otlp,moesif": (
        ["echo", "fetch"],
        {
            "OTEL_TRACES_EXPORTER": "otlp,moesif",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_HEADERS": "X-Moesif-Application-Id=other backend",
            **OUTGOING,
            **USER,
        },
    ),
    "exporter console": (["echo", "fetch"], {"OTEL_TRACES_EXPORTER": "console", **OUTGOING, **USER}),
    "sampler off": (["echo", "traced"], {"OTEL_TRACES_SAMPLER": "always_off"}),
    "sampler ratio": (["echo"] * 6, {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5"}),
    "no distro": (["echo"], {"OTEL_PYTHON_CONFIGURATOR": "nobody"}),
}


class Ended:
    """What a run left behind."""

    def __init__(self, sandbox: Sandbox, name: str, program: Program, returncode: int) -> None:
        self.output, self.returncode = program.output, returncode
        self.events = sandbox.events(application_id=name)
        lines = self.output.splitlines()
        self.lines = [line for line in lines if "moesif_otel" in line]
        self.answers: list[dict[str, Any]] = []
        for line in lines:
            if line.startswith('{"answers"'):
                self.answers = json.loads(line)["answers"]
        self.beside_answers = "\n".join(line for line in lines if not line.startswith('{"answers"'))

    def calls(self) -> list[tuple[str, str]]:
        """Direction and path of each event, sorted."""
        return sorted((event["direction"], event["request"]["uri"].rpartition("/")[2]) for event in self.events)


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Ended]]:
    """All runs, side by side."""
    with Sandbox() as sandbox:
        programs = {}
        for name, (calls, values) in RUNS.items():
            env = environment(sandbox.url, None if name.startswith("no id") else name, **values)
            env["OTEL_EXPORTER_OTLP_ENDPOINT"] = sandbox.url
            if name != "callback":  # which loads whatever is installed
                env["OTEL_PYTHON_DISABLED_INSTRUMENTATIONS"] = NOT_ITS_OWN
            programs[name] = Program(command(sys.executable, "flask_program.py", *calls), env)
        codes = {name: program.wait() for name, program in programs.items()}
        ended = {name: Ended(sandbox, name, programs[name], codes[name]) for name in programs}
        ended["other backend"] = Ended(sandbox, "other backend", programs["exporter otlp,moesif"], 0)
        yield ended
        for program in programs.values():
            program.stop()


@pytest.mark.parametrize("name", RUNS)
def test_the_application_runs(name: str, runs: dict[str, Ended]) -> None:
    """Whatever the options: it serves each call, without a header of ours, and ends well."""
    run = runs[name]
    assert run.returncode == 0, run.output
    assert [answer["status"] for answer in run.answers] == [200] * len(RUNS[name][0])
    assert "Traceback" not in run.output
    assert not [header for answer in run.answers for header, _ in answer["headers"] if "moesif" in header.lower()]


@pytest.mark.parametrize("name", ["no id", "no id, exporter"])
def test_without_an_application_id_one_line_says_what_to_set(name: str, runs: dict[str, Ended]) -> None:
    """One line, also where the exporter lacks it too."""
    (line,) = runs[name].lines
    assert "MOESIF_APPLICATION_ID" in line


def test_a_wrong_harmless_option_is_named_and_its_default_used(runs: dict[str, Ended]) -> None:
    """One error for each, and calls are captured."""
    run = runs["wrong"]
    assert len(run.lines) == 2
    assert "DEBUG: got 'maybe' from OTEL_MOESIF_DEBUG, takes True or False" in run.output
    assert "BATCH_SIZE: got 'many' from MOESIF_BATCH_SIZE, takes a whole number" in run.output
    (event,) = run.events
    assert event["response"]["body"]["secret_answer"] == 42


@pytest.mark.parametrize(
    ("name", "option"), [("wrong protective", "LOG_BODY: got 'maybe'"), ("wrong destination", "BASE_URI: got 'localhost:8765'")]
)
def test_a_wrong_destination_or_protective_option_captures_nothing(name: str, option: str, runs: dict[str, Ended]) -> None:
    """Said once; data never goes where, or as, the user did not mean it to."""
    run = runs[name]
    (line,) = run.lines
    assert "no calls are captured" in line
    assert option in line
    assert run.events == []


def test_otel_sdk_disabled_turns_us_off_too(runs: dict[str, Ended]) -> None:
    """Nothing is captured and nothing is said."""
    assert runs["switched off"].events == []
    assert runs["switched off"].lines == []


def test_a_relative_import_path_is_an_error_that_names_it(runs: dict[str, Ended]) -> None:
    """The call is captured without the callback."""
    run = runs["path not absolute"]
    (line,) = run.lines
    assert "IDENTIFY_USER: got '.hooks:identify_user'" in line
    assert len(run.events) == 1


def test_an_import_path_that_leads_nowhere_is_named(runs: dict[str, Ended]) -> None:
    """An error names it, once; calls are captured without the callback."""
    run = runs["path leads nowhere"]
    assert run.output.count("callback 'nowhere.hooks:identify_user' cannot be imported") == 1
    assert len(run.events) == 2


def test_a_callback_is_imported_after_the_application(runs: dict[str, Ended]) -> None:
    """Its module is not imported early: it may need what the application sets up."""
    run = runs["callback"]
    assert run.output.index("application imported") < run.output.index("hooks imported")
    (event,) = run.events
    assert event["user_id"] == "mary"


@pytest.mark.parametrize("name", ["exporter none", "exporter moesif", "exporter otlp,moesif", "exporter console"])
def test_whatever_else_exports_each_call_is_one_event(name: str, runs: dict[str, Ended]) -> None:
    """With no exporter, ours, ours behind another, or another: incoming and outgoing calls once each, as one trace."""
    run = runs[name]
    assert run.calls() == [
        ("Incoming", "echo"),
        ("Incoming", "fetch"),
        ("Incoming", "upstream?q=1"),
        ("Outgoing", "upstream?q=1"),
    ]
    by_call = dict(zip(run.calls(), sorted(run.events, key=lambda e: (e["direction"], e["request"]["uri"].rpartition("/")[2])), strict=True))
    fetch, upstream, outgoing = (
        by_call[key] for key in [("Incoming", "fetch"), ("Incoming", "upstream?q=1"), ("Outgoing", "upstream?q=1")]
    )
    assert fetch["trace_id"] == outgoing["trace_id"] == upstream["trace_id"]
    assert outgoing["span"]["parent_id"] == fetch["span"]["id"]
    assert upstream["span"]["parent_id"] == outgoing["span"]["id"]
    assert fetch["response"]["body"]["upstream"]["traceparent"].split("-")[1:3] == [fetch["trace_id"], outgoing["span"]["id"]]


def test_other_exporters_get_no_body_and_no_identity(runs: dict[str, Ended]) -> None:
    """Their spans are the instrumentations' own."""
    console = runs["exporter console"].beside_answers
    assert console.count('"kind": "SpanKind.SERVER"') == 3
    assert console.count('"kind": "SpanKind.CLIENT"') == 1
    for secret in ("plum", "mary", "secret_answer", "moesif", "user.id"):
        assert secret not in console
    other = runs["other backend"]
    assert len(other.events) == 4
    for event in other.events:
        assert "body" not in event["request"]
        assert "body" not in event["response"]
        assert event.get("user_id") is None


def test_sampling_of_traces_loses_no_event(runs: dict[str, Ended]) -> None:
    """Every call is an event of weight 1; one that belongs to a trace is linked to it."""
    off = runs["sampler off"]
    assert [event["weight"] for event in off.events] == [1, 1]
    (traced,) = [event for event in off.events if event["trace_id"] == TRACE_ID]
    assert traced["span"]["parent_id"] == PARENT_ID
    assert [event["weight"] for event in runs["sampler ratio"].events] == [1] * 6


def test_without_a_tracer_provider_calls_are_captured_all_the_same(runs: dict[str, Ended]) -> None:
    """Nobody configures OpenTelemetry: no spans, and the event has ids of its own."""
    (event,) = runs["no distro"].events
    assert len(event["trace_id"]) == 32
    assert event["response"]["body"]["secret_answer"] == 42


def test_help_shows_every_option() -> None:
    """`opentelemetry-instrument --help` lists our options as flags."""
    shown = subprocess.run(
        command("--help"), env=environment("http://127.0.0.1:9"), capture_output=True, text=True, check=True, timeout=200
    ).stdout
    for name in OPTIONS:
        assert f"--moesif_{name.lower()}" in shown
