"""The command `moesif-otel`, run as a user runs it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import requests

from moesif_otel.cli import main
from tests.sandbox.events import make_event

# Stands before the real packages on the path and makes one of them look absent.
_ABSENT = "import sys; sys.modules[{name!r}] = None; from moesif_otel.cli import main; sys.exit(main({arguments!r}))"


def start(*arguments):
    """Start the command, its output unbuffered and in text."""
    command = [sys.executable, "-X", "dev", "-W", "error", "-m", "moesif_otel", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )


def url_in(line):
    """Find the address in a line."""
    return re.search(r"http://[\d.]+:\d+", line).group(0)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_sandbox_runs_until_it_is_ended(ending):
    """`moesif-otel sandbox` says where it is, takes events, and ends with status 0 and a summary."""
    with start("sandbox", "--port", "0", "--application-id", "mine") as process:
        url = url_in(process.stdout.readline())
        for application_id, status in [("mine", 201), ("other", 401)]:
            headers = {"X-Moesif-Application-Id": application_id}
            answer = requests.post(url + "/v1/events", json=make_event(), headers=headers, timeout=10)
            assert answer.status_code == status
        for _ in range(2):  # a program in between passes it on as well
            process.send_signal(ending)
        out, err = process.stdout.read(), process.stderr.read()
        process.wait(20)
    assert (process.returncode, err) == (0, "")
    assert "MOESIF_APPLICATION_ID=mine" in out
    assert "Received 1 events" in out


def test_sandbox_keeps_a_file(tmp_path):
    """With `--database` what arrived is there at the next start."""
    path = str(tmp_path / "calls.sqlite")
    for before in (0, 1):
        with start("sandbox", "--port", "0", "--database", path) as process:
            url = url_in(process.stdout.readline())
            assert len(requests.get(url + "/api/events", timeout=10).json()) == before
            headers = {"X-Moesif-Application-Id": "a"}
            requests.post(url + "/v1/events", json=make_event(), headers=headers, timeout=10)
            process.send_signal(signal.SIGINT)
            assert process.stderr.read() == ""


def test_a_port_in_use_is_said(capsys):
    """A port that is taken is one line and status 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["sandbox", "--port", str(taken.getsockname()[1])]) == 1
    assert re.fullmatch(r"moesif-otel: cannot listen on 127.0.0.1 port \d+: .*\n", capsys.readouterr().err)


def test_a_file_that_is_no_database_is_said(tmp_path, capsys):
    """A database that cannot be used is one line and status 1."""
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to be looked at " * 10)
    assert main(["sandbox", "--port", "0", "--database", str(path)]) == 1
    assert f"cannot use the database {path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (["sandbox"], "uvicorn"),
        (["sandbox"], "starlette"),
        (["demo"], "uvicorn"),
        (["demo"], "flask"),
        (["demo"], "waitress"),
    ],
)
def test_without_the_extra_it_says_what_to_install(arguments, package):
    """Where a package of the extra is missing, the command says what to install and ends with status 2."""
    code = _ABSENT.format(name=package, arguments=[*arguments, "--port", "0"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'moesif-otel[sandbox]'" in done.stderr
    assert repr(package) in done.stderr


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["sandbox", "--port", "x"], ["sandbox", "--port", "70000"]])
def test_wrong_arguments_are_status_2(arguments, capsys):
    """A wrong call says how to call it."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: moesif-otel" in capsys.readouterr().err


def test_version_and_help(capsys):
    """`--version` and `--help` answer and end with status 0."""
    for argument in ("--version", "--help"):
        with pytest.raises(SystemExit) as ended:
            main([argument])
        assert ended.value.code == 0
    assert "moesif-otel" in capsys.readouterr().out
