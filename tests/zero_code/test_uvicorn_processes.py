"""uvicorn with `--reload` and `--workers`: what serves are processes that it starts, each call is one event."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest

from moesif_otel.sandbox.server import Sandbox
from tests.ports import free_port
from tests.zero_code.kit import PROGRAMS, Program, command, environment, running
from tests.zero_code.test_asgi_rows import WITHOUT
from tests.zero_code.test_reload import change_until_seen

if TYPE_CHECKING:
    from collections.abc import Iterator

CALLS = 12


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sandbox, dict[str, list[int]], dict[str, Program]]]:
    """One server is called, sees its file change, and is called again; of the other both workers are called."""
    folder = tmp_path_factory.mktemp("uvicorn")
    shutil.copy(PROGRAMS / "reloaded_asgi_app.py", folder)
    with Sandbox() as sandbox:
        programs = {}
        # uvicorn kills a worker that takes five seconds to start, as on a busy machine.
        for name, words in {"reload": ["--reload"], "workers": ["--workers", "2", "--timeout-worker-healthcheck", "60"]}.items():
            port = free_port()
            uvicorn = (sys.executable, "-m", "uvicorn", "reloaded_asgi_app:app", "--port", str(port), *words)
            # Events are delivered before a process is replaced or ended, not because their batch was due.
            values = {"MOESIF_EVENT_BATCH_TIMEOUT": "60", "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": WITHOUT}
            programs[name] = Program(command(*uvicorn), environment(sandbox.url, name, **values), port, folder)
        pids: dict[str, list[int]] = {}
        with running(programs):
            pids["workers"] = [pid_of(programs["workers"]) for _ in range(CALLS)]
            pids["reload"] = [pid_of(programs["reload"])]
            change_until_seen(folder / "reloaded_asgi_app.py", programs["reload"], "detected changes", "application made", 2)
            pids["reload"].append(pid_of(programs["reload"].wait_until_it_listens()))
        yield sandbox, pids, programs


def pid_of(program: Program) -> int:
    status, body, headers = program.call("GET", "/pid")
    assert status == 200
    assert not [name for name in headers if "moesif" in name.lower()]
    pid: int = json.loads(body)["pid"]
    return pid


@pytest.mark.parametrize("name", ["reload", "workers"])
def test_each_call_is_one_event(name: str, served: Any) -> None:
    """Delivered by the process that served it, the last ones when a SIGTERM ended them all."""
    sandbox, pids, programs = served
    found = [event["response"]["body"]["pid"] for event in sandbox.events(application_id=name)]
    assert sorted(found) == sorted(pids[name]), programs[name].output


def test_a_reload_starts_another_process(served: Any) -> None:
    """Otherwise the tests above would say nothing of it."""
    assert len(set(served[1]["reload"])) == 2


@pytest.mark.parametrize("name", ["reload", "workers"])
def test_nothing_goes_wrong_in_the_processes(name: str, served: Any) -> None:
    """No line of ours is a warning, and there is no traceback."""
    output = served[2][name].output
    ours = [line for line in output.splitlines() if "moesif_otel:" in line]
    assert all("captured the first call" in line for line in ours)
    assert "Traceback" not in output
