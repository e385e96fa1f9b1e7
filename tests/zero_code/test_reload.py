"""Tornado, and servers that start anew when a file changes: each call is one event, before and after."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from moesif_otel.sandbox.server import Sandbox
from tests.ports import free_port
from tests.zero_code.kit import PROGRAMS, ROOT, Program, command, environment, running, script

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def change_until_seen(path: Path, program: Program, seen: str, text: str, count: int) -> None:
    """Change a file until its reloader says `seen`, and wait until the new process has said `text`.

    A reloader that had not looked yet takes the first change as given, and needs another one.
    """
    deadline = time.monotonic() + 60
    while seen not in program.output:
        assert time.monotonic() < deadline, program.output
        path.write_text(path.read_text() + "\n# changed\n")
        looked_by = time.monotonic() + 3
        while seen not in program.output and time.monotonic() < looked_by:
            time.sleep(0.05)
    program.wait_for_output(text, count)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sandbox, dict[str, Program], list[Any]]]:
    """Three development servers; each serves, sees a file change, and serves again."""
    folder = tmp_path_factory.mktemp("reloaded")
    watched = folder / "watched.py"
    watched.write_text("")
    shutil.copy(PROGRAMS / "reloaded_app.py", folder)
    django = folder / "django"
    django.mkdir()
    for name in ("manage.py", "django_settings.py", "django_urls.py"):
        shutil.copy(PROGRAMS / name, django)
    # Werkzeug looks at the files' times then. With watchdog it watches all of Python's library as well, and where other
    # programs read much of that at the time, the kernel's queue overflows and the change is lost.
    absent = folder / "absent"
    absent.mkdir()
    (absent / "watchdog.py").write_text("raise ImportError")
    with Sandbox() as sandbox:
        programs: dict[str, Program] = {}

        def start(name: str, cwd: Path, *words: str, **values: str) -> None:
            port = free_port()
            values |= {"MOESIF_APPLICATION_ID": name}
            words = tuple(word.format(port=port) for word in words)
            programs[name] = Program(command(*words), environment(sandbox.url, **values), port, cwd)

        start(
            "tornado",
            PROGRAMS,
            *(sys.executable, "tornado_program.py", "{port}", str(watched), "--reload"),
            MOESIF_IDENTIFY_USER="hooks:tornado_user",
            # Events are delivered before the process is replaced, not because their batch was due.
            MOESIF_EVENT_BATCH_TIMEOUT="60",
        )
        start("flask", folder, script("flask"), "--app", "reloaded_app", "run", "--debug", "--port", "{port}", PYTHONPATH=f"{ROOT}{os.pathsep}{absent}")
        start(
            "django",
            django,
            *(sys.executable, "manage.py", "runserver", "127.0.0.1:{port}"),
            DJANGO_SETTINGS_MODULE="django_settings",
        )
        with running(programs):
            answers = [
                programs["tornado"].call("POST", "/echo", b'{"n": 1}', X_User="mary"),
                programs["tornado"].call("GET", "/fail"),
                programs["tornado"].call("GET", "/wsgi"),
                programs["flask"].call("GET", "/pid"),
                programs["django"].call("POST", "/django/echo", b'{"n": 1}'),
            ]
            change_until_seen(watched, programs["tornado"], "restarting", "listening", 2)
            change_until_seen(folder / "reloaded_app.py", programs["flask"], "Detected change", "application made", 3)
            change_until_seen(django / "django_urls.py", programs["django"], "changed, reloading", "development server at http", 2)
            for program in programs.values():
                program.wait_until_it_listens()
            answers += [
                programs["tornado"].call("POST", "/echo", b'{"n": 2}'),
                programs["flask"].call("GET", "/pid"),
                programs["django"].call("POST", "/django/echo", b'{"n": 2}'),
            ]
            sandbox.wait_for_events(3, application_id="tornado")
            sandbox.wait_for_events(2, application_id="flask")
            sandbox.wait_for_events(2, application_id="django")
        yield sandbox, programs, answers


def test_clients_see_what_the_applications_say(reloaded: Any) -> None:
    """Statuses and bodies are the applications' own, before and after the change."""
    _, programs, answers = reloaded
    assert [answer[0] for answer in answers] == [201, 500, 200, 200, 201, 201, 200, 201], [p.output for p in programs.values()]
    assert answers[2][1] == b"from WSGI"
    assert not [name for answer in answers for name in answer[2] if "moesif" in name.lower()]
    for program in programs.values():
        assert "moesif_otel" not in program.output


def test_tornado_applications_are_captured_without_asking(reloaded: Any) -> None:
    """Handlers, errors and a WSGI application inside: one event each; what was pending outlives the reload."""
    sandbox, _, _ = reloaded
    events = sandbox.events(application_id="tornado")
    calls = [(event["request"]["uri"].rpartition("/")[2], event["response"]["status"]) for event in events]
    # The process that came after is killed before its batch is due, so its call is missing, unless another file changed.
    assert sorted(set(calls)) == [("echo", 201), ("fail", 500), ("wsgi", 200)]
    assert len(calls) == len(set(calls)) or calls.count(("echo", 201)) == 2
    assert len({event["transaction_id"] for event in events}) == len(events)
    first = next(event for event in events if event["request"]["uri"].endswith("/echo"))
    assert first["user_id"] == "mary"
    assert first["response"]["body"] == {"got": '{"n": 1}'}


@pytest.mark.parametrize("name", ["flask", "django"])
def test_a_reloader_doubles_nothing(name: str, reloaded: Any) -> None:
    """The process that watches and the one that serves are both instrumented; each call is one event."""
    sandbox, _, _ = reloaded
    events = sandbox.events(application_id=name)
    assert len(events) == 2
    if name == "flask":
        first, second = (event["response"]["body"]["pid"] for event in events)
        assert first != second
