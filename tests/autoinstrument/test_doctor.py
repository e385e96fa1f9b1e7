"""The doctor: each thing that can keep calls from arriving is found, named in one line, and told what to do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from moesif_otel._autoinstrument import doctor as doctor_module
from moesif_otel.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

APP = """
from moesif_otel.wsgi import MoesifMiddleware

def plain(environ, start_response):
    start_response("200 OK", [])
    return [b""]

SETTINGS = {"APPLICATION_ID": "the-secret-id", "REQUEST_BODY_MASKS": ["ssn"]}
app = MoesifMiddleware(plain, SETTINGS)
twice = MoesifMiddleware(app, SETTINGS)

def identify_user(app, environ):
    return "u"
"""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(application_ids=["the-secret-id"]) as running:
        yield running


class Doctor:
    """Runs the command in a folder with a program of its own."""

    def __init__(self, folder: Path, base_uri: str) -> None:
        self.folder, self.base_uri = folder, base_uri
        (folder / "program.py").write_text(APP)
        self.output = ""

    def __call__(self, *arguments: str, **values: str) -> tuple[int, list[str]]:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "MOESIF_"))}
        environ |= {"MOESIF_APPLICATION_ID": "the-secret-id", "MOESIF_BASE_URI": self.base_uri, **values}
        ended = subprocess.run(
            [sys.executable, "-m", "moesif_otel", "doctor", *arguments],
            cwd=self.folder,
            env={name: value for name, value in environ.items() if value},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert ended.stderr == ""
        assert "the-secret-id" not in ended.stdout
        self.output = ended.stdout
        return ended.returncode, ended.stdout.splitlines()


@pytest.fixture
def doctor(sandbox: Sandbox, tmp_path: Path) -> Doctor:
    sandbox.clear()
    return Doctor(tmp_path, sandbox.url)


def test_a_sound_set_up_has_no_error(doctor: Doctor, sandbox: Sandbox) -> None:
    """Status 0; every check speaks; with --send one event has arrived."""
    status, lines = doctor("--send", MOESIF_IDENTIFY_USER="program:identify_user")
    assert status == 0, doctor.output
    assert {line.split()[1] for line in lines} == {
        *("options", "capture", "opentelemetry", "callbacks", "spool", "address", "send")
    }
    assert [line for line in lines if line.startswith("error")] == []
    assert "accepts the application id" in doctor.output
    assert "IDENTIFY_USER: program:identify_user" in doctor.output
    (event,) = sandbox.events()
    assert event["request"]["uri"].endswith("/moesif-otel/doctor")


def test_options_say_where_they_come_from(doctor: Doctor) -> None:
    """The variable beside each; the application id is set or not, never shown; a misspelt name is told."""
    status, lines = doctor(OTEL_MOESIF_LOG_BODY="no", MOESIF_REQUEST_BODY_MASK="ssn")
    assert status == 0
    assert "ok      options        LOG_BODY = False (OTEL_MOESIF_LOG_BODY)" in lines
    assert "ok      options        APPLICATION_ID = set (MOESIF_APPLICATION_ID)" in lines
    assert "Did you mean MOESIF_REQUEST_BODY_MASKS?" in doctor.output


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"MOESIF_APPLICATION_ID": ""}, "MOESIF_APPLICATION_ID"),
        ({"MOESIF_LOG_BODY": "maybe"}, "LOG_BODY: got 'maybe' from MOESIF_LOG_BODY, takes True or False"),
        ({"MOESIF_APPLICATION_ID": "another"}, "answers 401: the application id is not accepted"),
        ({"MOESIF_SKIP": "program:absent"}, "SKIP: program:absent cannot be imported"),
        ({"MOESIF_SKIP": "program:plain", "MOESIF_MASK_EVENT_MODEL": "program:plain"}, "MASK_EVENT_MODEL: got plain(environ, start_response), takes a function (event)"),
        ({"MOESIF_IDENTIFY_USER": "program:Nobody"}, "takes a function (app, environ) or a function (request, response)"),
        ({"MOESIF_BASE_URI": "http://no.such.host.invalid"}, "DNS: no.such.host.invalid cannot be resolved"),
        ({"MOESIF_SPOOL_DIRECTORY": "/dev/null/spool"}, "this user cannot write to /dev/null/spool"),
        ({"OTEL_SDK_DISABLED": "true"}, "OTEL_SDK_DISABLED is true"),
        ({"OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "flask,moesif"}, "Remove moesif, or *, from it"),
    ],
)
def test_what_is_wrong_is_an_error(
    values: dict[str, str], expected: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The line says what and what to do; looked at in this process, without the trial run."""
    for name in [name for name in os.environ if name.startswith(("OTEL_", "MOESIF_"))]:
        monkeypatch.delenv(name)
    for name, value in {"MOESIF_APPLICATION_ID": "the-secret-id", "MOESIF_BASE_URI": sandbox.url, **values}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "program.py").write_text(APP + "\nclass Nobody:\n    def __init__(self): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "program", raising=False)
    monkeypatch.setattr(doctor_module, "_dry_run", lambda _program: {"provider": "P", "sampler": "S"})
    found = doctor_module.diagnose()
    lines = doctor_module.report(found, as_json=False).splitlines()
    assert [line for line in lines if line.startswith("error") and expected in line], lines
    assert not any("the-secret-id" in line for line in lines)


def test_a_closed_port_is_named(doctor: Doctor) -> None:
    """Status 1; address and port, and what to check."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    status, _ = doctor(MOESIF_BASE_URI=f"http://127.0.0.1:{port}")
    assert status == 1
    assert f"TCP: 127.0.0.1 port {port}: Connection refused" in doctor.output


def test_an_application_is_looked_into(doctor: Doctor) -> None:
    """`module:application`: the middleware in it, its options, and a second one around the first."""
    status, _ = doctor("--", "program:twice")
    assert status == 0
    assert "moesif_otel.wsgi.MoesifMiddleware to" in doctor.output
    assert "REQUEST_BODY_MASKS = ('ssn',)" in doctor.output
    assert "wraps another one with the same application id" in doctor.output


def test_a_program_is_run_and_ended(doctor: Doctor) -> None:
    """One that serves for ever is ended; one that fails is told by the kind of its error."""
    (doctor.folder / "serve.py").write_text("import flask, time\ntime.sleep(600)")
    status, _ = doctor("--", "python", "serve.py")
    assert status == 0
    assert "captured in it: Flask" in doctor.output
    (doctor.folder / "fails.py").write_text("raise RuntimeError('the-secret-id')")
    status, _ = doctor("--", "python", "fails.py")
    assert status == 1
    assert "the program ended with RuntimeError. Run it on its own" in doctor.output


def test_only_what_the_program_uses_is_captured_in_it(doctor: Doctor) -> None:
    """Instrumentations load the frameworks that are installed; that puts none into a program."""
    (doctor.folder / "plain.py").write_text("import json")
    status, lines = doctor("--", "python", "plain.py")
    assert status == 0
    assert "warning program        captured in it: nothing" in lines
    (doctor.folder / "factory.py").write_text("from flask import Flask\n\ndef make():\n    return Flask(__name__)")
    (doctor.folder / "made.py").write_text("import factory\napp = factory.make()")
    _, lines = doctor("--", "made:app")
    assert "ok      program        captured in it: Flask" in lines


def test_one_run_finds_every_error(doctor: Doctor) -> None:
    """A wrong option does not hide what else is wrong, and nothing is called captured."""
    (doctor.folder / "serve.py").write_text("import flask, time\ntime.sleep(600)")
    values = {"MOESIF_LOG_BODY": "maybe", "MOESIF_BATCH_SIZE": "many", "MOESIF_SKIP": "absent:skip"}
    status, lines = doctor("--", "python", "serve.py", **values)
    assert status == 1
    for expected in ("LOG_BODY: got 'maybe'", "BATCH_SIZE: got 'many'", "SKIP: absent:skip cannot", "accepts the application id"):
        assert expected in doctor.output
    assert not any("captured in it" in line for line in lines)
    assert "info    program        in it: Flask. Only a middleware in its code captures it" in doctor.output


def test_a_program_is_run_as_python_runs_it(doctor: Doctor) -> None:
    """It finds the modules beside it, also from another folder; the command may be one quoted word."""
    (doctor.folder / "source").mkdir()
    (doctor.folder / "source" / "hooks.py").write_text("open('ran', 'w').close()")
    (doctor.folder / "source" / "serve.py").write_text("import hooks")
    status, _ = doctor("--", "python source/serve.py")
    assert status == 0, doctor.output
    assert (doctor.folder / "ran").exists()


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (["python", "absent.py"], "FileNotFoundError (absent.py)"),
        (["absent:app"], "ModuleNotFoundError (absent)"),
        (["program:absent"], "AttributeError (absent)"),
    ],
)
def test_a_name_that_leads_nowhere_is_named(program: list[str], expected: str, tmp_path: Path) -> None:
    """The report says which file, module or attribute there is not."""
    (tmp_path / "program.py").write_text("")
    command = [sys.executable, "-m", "moesif_otel._autoinstrument.dry_run", str(tmp_path / "report.json"), *program]
    subprocess.run(command, cwd=tmp_path, timeout=200, check=True, capture_output=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["error"], report["captured"]) == (expected, [])


def test_json_has_the_same_findings(doctor: Doctor) -> None:
    """For scripts: one object, `ok` as the exit status says."""
    status, lines = doctor("--json", MOESIF_LOG_BODY="maybe")
    (line,) = lines
    found = json.loads(line)
    assert (status, found["ok"]) == (1, False)
    assert {"level", "check", "text", "advice"} == set(found["findings"][0])
