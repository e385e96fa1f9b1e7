"""The command `moesif-otel`, run as a user runs it."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import requests

from moesif_otel.cli import main
from tests.sandbox.commands import complaints, start
from tests.sandbox.events import make_event

# Stands before the real packages on the path and makes one of them look absent.
_ABSENT = "import sys; sys.modules[{name!r}] = None; from moesif_otel.cli import main; sys.exit(main({arguments!r}))"


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
        process.wait(60)
    assert (process.returncode, complaints(err)) == (0, "")
    assert "MOESIF_APPLICATION_ID=mine" in out
    assert re.search(r"^\d\d:\d\d:\d\d    200 -   GET     /orders\?page=1 .*5 ms", out, re.MULTILINE)
    assert "Events received: 1, duplicates: 0, requests refused: 1" in out


def test_sandbox_shows_calls_that_come_as_soon_as_it_listens(capsys, monkeypatch):
    """A call that arrives before the first lines are written has its line."""
    from moesif_otel.sandbox import Sandbox

    started = Sandbox.start

    def start_and_send(sandbox):
        started(sandbox)
        headers = {"X-Moesif-Application-Id": "a"}
        requests.post(sandbox.url + "/v1/events", json=make_event(), headers=headers, timeout=10)
        signal.raise_signal(signal.SIGTERM)
        return sandbox

    monkeypatch.setattr(Sandbox, "start", start_and_send)
    assert main(["sandbox", "--port", "0"]) == 0
    assert capsys.readouterr().out.count("/orders?page=1") == 1


@pytest.mark.parametrize("arguments", [["demo", "--once", "--port", "0"], ["sandbox", "--port", "0"]])
def test_a_reader_that_leaves_is_no_failure(arguments):
    """`… | head -1` gets its line; the command ends with status 0 and says nothing."""
    with start(*arguments) as process:
        url = url_in(process.stdout.readline())
        process.stdout.close()
        if arguments[0] == "sandbox":
            headers = {"X-Moesif-Application-Id": "a"}
            requests.post(url + "/v1/events", json=make_event(), headers=headers, timeout=10)
        assert complaints(process.stderr.read()) == ""
        assert process.wait(60) == 0


def tail_lines(process, number):
    """Read so many lines of calls."""
    found = []
    while len(found) < number:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        if re.match(r"(\x1b\[2m)?\d\d:\d\d", line):
            found.append(line)
    return found


def test_tail_follows_with_filters():
    """`tail` prints the last calls that fit and those that come, without what could steer a terminal; Ctrl-C ends it."""
    from moesif_otel.sandbox import Sandbox

    with Sandbox() as sandbox:
        post = {"url": sandbox.url + "/v1/events", "headers": {"X-Moesif-Application-Id": "a"}, "timeout": 10}
        for user in ("ann", "bob", "ann"):
            requests.post(json=make_event(user_id=user), **post)
        with start("tail", "--url", sandbox.url, "--user", "ann", "-n", "5", "--color", "never") as process:
            assert len(tail_lines(process, 2)) == 2
            evil = make_event(user_id="ann")
            evil["request"]["uri"] = "http://a.test/\x1b[2J\x1b]0;owned\x07\u202e"
            requests.post(json=make_event(user_id="bob"), **post)
            requests.post(json=evil, **post)
            (line,) = tail_lines(process, 1)
            assert line.isprintable() or line[:-1].isprintable()
            assert "owned" in line
            sandbox.clear()
            requests.post(json=make_event(user_id="ann", company_id="again"), **post)
            assert "again" in tail_lines(process, 1)[0]
            sandbox.stop()
            assert "does not answer any more; waiting for it" in process.stderr.readline()
            sandbox.start()
            requests.post(json=make_event(user_id="ann", company_id="back"), **post)
            assert "back" in tail_lines(process, 1)[0]
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            assert complaints(process.stderr.read()) == ""
        requests.post(json=make_event(user_id="ann", company_id="again"), **post)
        with start("tail", "--url", sandbox.url, "--json", "-n", "1") as process:
            assert json.loads(process.stdout.readline())["company"] == "again"
            process.send_signal(signal.SIGINT)
        with start("tail", "--url", sandbox.url, "--color", "always", "-n", "1") as process:
            process.stdout.readline()
            assert "\x1b[32;1m   200\x1b[0m" in process.stdout.readline()
            process.send_signal(signal.SIGINT)


def test_tail_says_what_is_not_there(capsys):
    """No sandbox, another server, a wrong filter: one line and status 1."""
    from moesif_otel.sandbox import Sandbox

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert main(["tail", "--url", f"http://127.0.0.1:{unused.getsockname()[1]}"]) == 1
    assert "start one with `moesif-otel sandbox`" in capsys.readouterr().err
    with Sandbox() as sandbox:
        assert main(["tail", "--url", sandbox.url, "--status", "bad"]) == 1
        assert "status takes statuses such as 404, 5xx or none, separated by commas" in capsys.readouterr().err
        assert main(["tail", "--url", sandbox.url.removeprefix("http://"), "--status", "bad"]) == 1
        assert "status takes" in capsys.readouterr().err  # the scheme may be left out
        assert main(["tail", "--url", sandbox.url + "/nothing"]) == 1
        assert "is not a sandbox" in capsys.readouterr().err


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
            assert complaints(process.stderr.read()) == ""


def test_a_port_in_use_is_said(capsys):
    """A port that is taken is one line and status 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["sandbox", "--port", str(taken.getsockname()[1])]) == 1
    words = r"moesif-otel: cannot listen on 127.0.0.1 port \d+: .*; --port 0 takes a free one\n"
    assert re.fullmatch(words, capsys.readouterr().err)


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
        (["sandbox"], "jinja2"),
        (["tail"], "uvicorn"),
        (["demo"], "uvicorn"),
        (["demo"], "flask"),
        (["demo"], "waitress"),
    ],
)
def test_without_the_extra_it_says_what_to_install(arguments, package):
    """Where a package of the extra is missing, the command says what to install and ends with status 2."""
    port = [] if arguments == ["tail"] else ["--port", "0"]
    code = _ABSENT.format(name=package, arguments=[*arguments, *port])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    # Right for a clone, a wheel and a Git address: no index has the package yet.
    assert re.search(r"pip install '[a-z]+>=", done.stderr)
    assert "moesif-otel[" not in done.stderr
    assert repr(package) in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: command"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["sandbox", "--port", "x"], "argument --port: takes a whole number from 0 to 65535, got 'x'"),
        (["sandbox", "--port", "70000"], "got '70000'"),
        (["sandbox", "--application-id", " "], "argument --application-id: takes an application id, got nothing"),
        (["sandbox", "--allow-host", "http://x/"], "argument --allow-host: takes a host name without scheme and port, got 'http://x/'"),
        (["tail", "-n", "-3"], "argument -n/--number: takes a whole number from 0 to 99999, got '-3'"),
    ],
)
def test_wrong_arguments_are_status_2(arguments, expected, capsys):
    """A wrong call says how to call it, and what the wrong argument takes."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "usage: moesif-otel" in said
    assert expected in said


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk_is_said():
    """Output that cannot be written is one line and status 1, no traceback."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "moesif_otel", "sandbox", "--port", "0"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (1, "moesif-otel: cannot write the output: No space left on device\n")


def test_version_and_help(capsys):
    """`--version` and `--help` answer and end with status 0."""
    for argument in ("--version", "--help"):
        with pytest.raises(SystemExit) as ended:
            main([argument])
        assert ended.value.code == 0
    assert "moesif-otel" in capsys.readouterr().out


@pytest.fixture
def findings(monkeypatch):
    """Let the doctor find two things at once, without looking."""
    from moesif_otel._autoinstrument import doctor

    found = [doctor.Finding("ok", "API_VERSION = 'v\u00e9'", check="options"), doctor.Finding("ok", "b", check="b")]
    monkeypatch.setattr(doctor, "diagnose", lambda _program, *, send: found)


def test_what_a_terminal_cannot_show_is_escaped(findings, monkeypatch):
    """A value that is not ASCII is no reason to fail."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["doctor"]) == 0
    sys.stdout.flush()
    assert b"API_VERSION = 'v\\xe9'" in raw.getvalue()
    assert logging.getLogger("moesif_otel").level == logging.NOTSET  # as before


def test_a_reader_of_findings_that_leaves_is_no_failure(findings, monkeypatch):
    """Without rich, too, which handles it itself."""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["doctor"]) == 0
        monkeypatch.undo()


def test_closed_output_is_no_failure(monkeypatch):
    """`moesif-otel sandbox >&-`, as some supervisors start it."""
    from moesif_otel.sandbox import Sandbox

    started = Sandbox.start
    monkeypatch.setattr(Sandbox, "start", lambda sandbox: (started(sandbox), signal.raise_signal(signal.SIGTERM)))
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["sandbox", "--port", "0"]) == 0
    sys.stdout.close()
