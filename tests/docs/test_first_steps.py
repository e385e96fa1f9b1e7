"""The steps of the README and of *Getting started*, followed as they stand there, in a new virtual environment.

Only ports are changed, so that the test disturbs nobody who uses them.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.docs.run_page import blocks
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GETTING_STARTED = (ROOT / "docs" / "getting-started.md").read_text()


def commands(page: str) -> list[str]:
    """Return the shell lines of a page in their order."""
    return [line for block in re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL) for line in block.splitlines()]


class Newcomer:
    """Somebody with a clone and a new virtual environment."""

    def __init__(self, folder: Path) -> None:
        self.clone = folder / "clone"
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for name in files.decode().split("\0"):
            if name and (ROOT / name).is_file():
                target = self.clone / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes((ROOT / name).read_bytes())
        self.environment = folder / "environment"
        subprocess.run([sys.executable, "-m", "venv", str(self.environment)], check=True)
        self.ports = {"8765": free_port(), "5000": free_port()}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "MOESIF_", "PYTHON"))}
        self.environ = {
            **kept,
            "PATH": f"{self.environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "VIRTUAL_ENV": str(self.environment),
            "FLASK_RUN_PORT": str(self.ports["5000"]),
            "PYTHONUNBUFFERED": "1",
        }
        self.running: list[subprocess.Popen[str]] = []

    def port(self, name: str) -> int:
        return self.ports[name]

    def start(self, line: str) -> subprocess.Popen[str]:
        """Type a line of a page that goes on until it is ended."""
        for number, port in self.ports.items():
            line = line.replace(number, str(port))
        process = subprocess.Popen(
            ["bash", "-c", line],
            cwd=self.clone,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.running.append(process)
        return process

    def finish(self, line: str, timeout_s: float = 300) -> tuple[int, str]:
        """Type a line and wait for its end."""
        process = self.start(line)
        output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output

    def end(self, process: subprocess.Popen[str]) -> str:
        """Press Ctrl-C."""
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=200)
        return output

    def leave(self) -> None:
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def until(told: Callable[[], object], timeout_s: float = 60) -> object:
    """Wait until `told` returns something true."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            found = told()
        except OSError:
            found = None
        if found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


@pytest.mark.timeout(600)
def test_the_first_hour(tmp_path: Path) -> None:
    """Install, demo, a program of one's own with the sandbox, the doctor: each line works as it stands."""
    newcomer = Newcomer(tmp_path)
    try:
        install, sandbox, run, doctor = commands(GETTING_STARTED)
        assert install.endswith("&& moesif-otel demo")
        assert commands(README)[0].endswith("&& moesif-otel demo")

        status, output = newcomer.finish(install.replace("moesif-otel demo", "moesif-otel demo --once"))
        assert status == 0, output

        (newcomer.clone / "app.py").write_text(blocks(GETTING_STARTED)[0][1])
        moesif = newcomer.start(sandbox)
        assert until(lambda: get(f"http://localhost:{newcomer.port('8765')}/api/stats"))
        service = newcomer.start(run)
        assert until(lambda: get(f"http://localhost:{newcomer.port('5000')}/hello")) == '{"hello":"world"}\n'
        assert until(lambda: "/hello" in get(f"http://localhost:{newcomer.port('8765')}/api/events"))

        newcomer.environ |= {"MOESIF_APPLICATION_ID": "any-id", "MOESIF_BASE_URI": f"http://localhost:{newcomer.port('8765')}"}
        status, output = newcomer.finish(doctor)
        assert "accepts the application id" in output
        assert "captured in it: Flask" in output
        newcomer.end(service)
        newcomer.end(moesif)
    finally:
        newcomer.leave()
