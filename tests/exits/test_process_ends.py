"""Processes that end, fork, or are killed: what arrives at a real server."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.delivery.delivery_kit import Rig, settings
from tests.exits.driver import EVENTS
from tests.faults.fault_server import FaultServer, Hang, Status

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX processes")


def start(url, way, *arguments, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.exits.driver", url, way, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(url, way, *arguments) -> tuple[int, str]:
    process = start(url, way, *arguments)
    _, errors = process.communicate(timeout=200)
    return process.returncode, errors


def ids(*starts) -> list[str]:
    return sorted(f"{n:036d}" for first in starts for n in range(first, first + EVENTS))


@pytest.mark.parametrize(
    ("way", "code"),
    [
        ("by_return", 0),
        ("by_sys_exit", 3),
        ("by_exception", 1),
        ("by_ctrl_c", -signal.SIGINT),
        ("by_sigterm_handler", 0),
        ("by_exit_in_thread", 0),
        ("by_return_without_threads", 0),
        ("by_flush_and_os_exit", 0),
    ],
)
def test_a_process_that_ends_delivers_everything(way, code) -> None:
    """By return, `sys.exit`, an unhandled exception, Ctrl-C, a signal handler that exits: every event arrives, once."""
    with FaultServer() as server:
        got, errors = run(server.url, way)
        assert got == code, errors
        assert sorted(server.acknowledged) == ids(0)
        if code == 0:
            assert errors == ""


def test_os_exit_delivers_nothing_and_hangs_nothing() -> None:
    """`os._exit` runs no exit hook: what was waiting is lost with the process (the README says so)."""
    with FaultServer() as server:
        assert run(server.url, "by_os_exit")[0] == 0
        assert len(server.acknowledged) in (0, 25)


@pytest.mark.parametrize("then", [Hang(), Status(503)], ids=["hang", "503"])
def test_exit_with_a_server_that_does_not_take_them(then) -> None:
    """The process ends within SHUTDOWN_TIMEOUT, with the exit code it had, and says on its log how many it lost."""
    with FaultServer(then=then) as server:
        started = time.monotonic()
        code, errors = run(server.url, "by_return")
        assert code == 0
        assert f"shutdown {EVENTS}" in errors
        assert "Traceback" not in errors
        assert time.monotonic() - started < 20  # not a measure of speed: EXPORT_TIMEOUT and the server would take longer


@pytest.mark.parametrize(
    ("way", "starts"),
    [
        ("fork_then_both", [0, 100, 200]),
        ("fork_after_sending", [0, 100, 200, 300]),
        ("fork_while_everything_is_locked", [0, 100]),
        ("multiprocessing_fork", [0, 100]),
        ("multiprocessing_without_flush", [100, 200]),
    ],
)
def test_parent_and_children_each_deliver_their_own_once(way, starts) -> None:
    """Constructed, or even sending, before the fork: nothing is lost, nothing sent twice, nobody waits for a lock of another process."""
    with FaultServer() as server:
        code, errors = run(server.url, way)
        assert code == 0, errors
        assert sorted(server.acknowledged) == ids(*starts)
        assert "Traceback" not in errors
        # No two processes have used one connection.
        users = {}
        for request in server.requests:
            users.setdefault(request.connection, set()).update(int(i) // 100 for i in request.ids)
        assert all(len(processes) == 1 for processes in users.values()) or way == "fork_then_both"


def test_what_a_process_could_not_send_the_next_one_sends(tmp_path) -> None:
    """With SPOOL_DIRECTORY, a process that ends while the server is away leaves its events to the next."""
    with FaultServer(then=Hang()) as server:
        code, errors = run(server.url, "by_return", str(tmp_path))
        assert code == 0, errors
        assert "shutdown" not in errors
        assert len(list(tmp_path.iterdir())) == 2
        server.then = Status(201)
        finish(server, tmp_path, EVENTS)
        assert sorted(server.acknowledged) == ids(0)
        assert list(tmp_path.iterdir()) == []


def finish(server, directory, count) -> Rig:
    """Run a delivery in this process until the folder is empty."""
    from moesif_otel._delivery.client import MoesifTransport

    changes = {"spool_directory": str(directory), "event_batch_timeout": 60.0, "batch_size": 25}
    made = settings(base_uri=server.url, **changes)
    rig = Rig(MoesifTransport(made), base_uri=server.url, **changes)
    with rig:
        rig.delivery.ensure_started()
        ends_at = time.monotonic() + 90  # thousands of files, on a machine that may be busy
        while any(p.suffix == ".batch" for p in Path(directory).iterdir()) and time.monotonic() < ends_at:
            time.sleep(0.02)
            rig.delivery._disk._replay_at_s = 0.0  # the pauses are tested elsewhere
            state = rig.delivery._state
            with state.lock:
                state.note_change()
    return rig


@pytest.mark.timeout(240)
def test_kill_9_in_a_loop(tmp_path) -> None:
    """Processes that spool are killed at random moments: every batch that was on disk arrives, whole, each id once."""
    dice = random.Random(7)
    on_disk: set[str] = set()
    with FaultServer() as server:
        server.refuse()
        for round_ in range(5):
            process = start(server.url, "spool_writer", str(tmp_path), DRIVER_START=str(round_ * 1_000_000))
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.1 + dice.random() * 0.4)
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=200)
            assert process.returncode == -signal.SIGKILL
        for path in tmp_path.glob("*.batch"):
            on_disk |= ids_in(path)
        assert on_disk
        server.listen()
        rig = finish(server, tmp_path, len(on_disk))
        assert set(server.acknowledged) == on_disk
        assert len(server.acknowledged) == len(on_disk)
        assert rig.stats.delivered == rig.stats.replayed == len(on_disk)
        assert not rig.stats.dropped


@pytest.mark.timeout(240)
def test_kill_9_while_files_are_written_and_sent(tmp_path) -> None:
    """Two processes on one folder, with a server that comes and goes, are killed at any moment: what is on disk then, arrives."""
    dice = random.Random(11)
    with FaultServer() as server:
        for round_ in range(3):
            pair = [
                start(server.url, "spool_writer", str(tmp_path), DRIVER_START=str((2 * round_ + n) * 1_000_000))
                for n in range(2)
            ]
            for process in pair:
                assert process.stdout.readline() == "ready\n"
            for _ in range(3):
                server.refuse()
                time.sleep(dice.random() * 0.3)
                server.listen()
                time.sleep(dice.random() * 0.1)
            for process in pair:
                process.send_signal(signal.SIGKILL)
                process.communicate(timeout=200)
        on_disk = {i for path in tmp_path.glob("*.batch") for i in ids_in(path)}
        assert on_disk
        before = set(server.acknowledged)
        finish(server, tmp_path, len(on_disk))
        assert on_disk <= set(server.acknowledged)
        # Nothing else came of it, and nothing was damaged: no event under another id.
        assert set(server.acknowledged) == before | on_disk
        assert not list(tmp_path.glob("*.batch"))
        assert not list(tmp_path.glob("*.unreadable"))


def ids_in(path) -> set[str]:
    import re

    return {match.decode() for match in re.findall(rb"\"transaction_id\": \"(\d{36})\"", path.read_bytes())}


@pytest.mark.parametrize("way", ["spans", "handlers"])
@pytest.mark.parametrize("server_is_there", [True, False])
def test_what_comes_after_our_exit_handler(way, server_is_there) -> None:
    """Exit handlers run last in, first out: a provider, or handlers, from before our import still deliver through us.

    With a server that hangs, the process ends within SHUTDOWN_TIMEOUT all the same.
    """
    with FaultServer(then=Status(201) if server_is_there else Hang()) as server:
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "tests.exits.late", server.url, way],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        if server_is_there:
            assert len(server.acknowledged) == 20, done.stderr
        else:
            assert time.monotonic() - started < 25
