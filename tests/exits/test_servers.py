"""Real gunicorn and uWSGI: what their workers have captured is delivered whenever and however they end."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.faults.fault_server import FaultServer, Status
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX servers")
needs_gunicorn = pytest.mark.skipif(importlib.util.find_spec("gunicorn") is None, reason="gunicorn is not installed")


@contextlib.contextmanager
def serving(command, url, port, **environment):
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "EVENTS_URL": url, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        ends_at = time.monotonic() + 30
        while time.monotonic() < ends_at and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def gunicorn(port, *options) -> list[str]:
    return [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{port}", "--no-control-socket", *options, "tests.exits.wsgi_app:application"]


def gunicorn_command(port, *options) -> list[str]:
    import gunicorn as package

    command = gunicorn(port, *options)
    if int(package.__version__.partition(".")[0]) < 25:  # the option is younger
        command.remove("--no-control-socket")
    return command


def get(port, query) -> str:
    """Make a request; gives the process id of the worker that answered."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/?{query}", timeout=30) as response:
        pid, _, text = response.read().decode().partition(" ")
    assert text == "ok"
    return pid


def get_from_each(port, workers, at_least) -> int:
    """Make requests until each worker has answered one; gives how many were made, numbered from 1.

    A server that is stopped while a worker is still starting may wait for that worker in vain: not what is tested here.
    """
    seen, made = set(), 0
    ends_at = time.monotonic() + 30
    while (made < at_least or len(seen) < workers) and time.monotonic() < ends_at:
        made += 1
        seen.add(get(port, made))
        if made >= at_least:
            time.sleep(0.02)
    assert len(seen) == workers
    return made


def ids(numbers) -> list[str]:
    return [f"{n:036d}" for n in numbers]


@needs_gunicorn
@pytest.mark.parametrize(
    ("worker", "preload"), [("sync", True), ("gthread", False), ("gthread", True), ("gevent", False), ("gevent", True)]
)
def test_gunicorn_stops(worker, preload) -> None:
    """Two workers, stopped: each event arrives once, also when the app was loaded, and had sent, before the fork."""
    if worker == "gevent":
        pytest.importorskip("gevent")
    port = free_port()
    options = ["-w", "2", "-k", worker, *(["--preload"] if preload else [])]
    extra = {"SEND_AT_IMPORT": "1"} if preload else {}
    with FaultServer() as server:
        with serving(gunicorn_command(port, *options), server.url, port, **extra) as process:
            made = get_from_each(port, 2, 30)
            process.send_signal(signal.SIGTERM)
            errors = process.communicate(timeout=200)[1]
        assert sorted(server.acknowledged) == ids(range(0 if preload else 1, made + 1)), errors
        assert "Traceback" not in errors


@needs_gunicorn
def test_gunicorn_recycles() -> None:
    """`--max-requests`: workers that end in the middle of traffic lose nothing."""
    port = free_port()
    with FaultServer() as server:
        with serving(gunicorn_command(port, "-w", "1", "--max-requests", "7"), server.url, port) as process:
            for n in range(30):
                get(port, n)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=200)
        assert sorted(server.acknowledged) == ids(range(30))


@needs_gunicorn
def test_gunicorn_times_a_worker_out() -> None:
    """A worker that gunicorn aborts for being stuck still delivers what it had."""
    port = free_port()
    with FaultServer() as server:
        with serving(gunicorn_command(port, "-w", "1", "-t", "1"), server.url, port) as process:
            for n in range(5):
                get(port, n)
            with contextlib.suppress(OSError):
                get(port, "5&hang")
            assert server.wait_for_acknowledged(6, timeout=20)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=200)
        assert sorted(server.acknowledged) == ids(range(6))


def uwsgi_command(port) -> list[str]:
    found = shutil.which("uwsgi", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    found = found or shutil.which("pyuwsgi", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("uWSGI is not installed")
    return [found, "--http-socket", f"127.0.0.1:{port}", "--master", "--workers", "2", "--enable-threads", "--die-on-term", "--module", "tests.exits.wsgi_app:application"]


@pytest.mark.parametrize("mode", ["", "--lazy-apps"])
def test_uwsgi_stops(mode) -> None:
    """Under uWSGI forks run no at-fork hooks of Python: the workers find out by their process id, and deliver at exit."""
    port = free_port()
    extra = {} if mode else {"SEND_AT_IMPORT": "1"}
    with FaultServer() as server:
        command = uwsgi_command(port) + ([mode] if mode else [])
        with serving(command, server.url, port, **extra) as process:
            made = get_from_each(port, 2, 30)
            process.send_signal(signal.SIGTERM)
            errors = process.communicate(timeout=200)[1]
        assert sorted(server.acknowledged) == ids(range(1 if mode else 0, made + 1)), errors


@needs_gunicorn
def test_gevent_workers_with_preload_and_posts_that_overlap() -> None:
    """`--preload -k gevent`: POSTs of two senders that are under way at once do not share a deadline."""
    pytest.importorskip("gevent")
    port = free_port()

    def slow(_):
        time.sleep(0.4)
        return Status(201)

    with FaultServer(then=slow) as server:
        options = ["-w", "1", "-k", "gevent", "--preload"]
        with serving(gunicorn_command(port, *options), server.url, port, SEND_AT_IMPORT="1") as process:
            for n in range(1, 151):
                get(port, n)
            process.send_signal(signal.SIGTERM)
            errors = process.communicate(timeout=200)[1]
        assert sorted(server.acknowledged) == ids(range(151)), errors
        assert "Traceback" not in errors
