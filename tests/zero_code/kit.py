"""Starting programs by `opentelemetry-instrument` in processes of their own, and talking to them."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).resolve().parent / "programs"
WAIT_S = 120.0

_ENTRY_POINTS = """\
[opentelemetry_instrumentor]
moesif = moesif_otel._autoinstrument.instrumentor:MoesifInstrumentor

[opentelemetry_traces_exporter]
moesif = moesif_otel._autoinstrument.exporter:AutoSpanExporter

[opentelemetry_environment_variables]
moesif = moesif_otel._autoinstrument.environment
"""


def entry_points_path() -> list[str]:
    """Where a process finds our entry points: nowhere special if the package is installed, else in a folder we make."""
    try:
        found = distribution("moesif-otel").entry_points
    except PackageNotFoundError:
        found = ()
    if any(one.group == "opentelemetry_instrumentor" for one in found):
        return []
    folder = Path(tempfile.gettempdir()) / f"moesif-otel-entry-points-{os.getpid()}"
    info = folder / "moesif_otel-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moesif-otel\nVersion: 0\n")
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)
    return [str(folder)]


def environment(base_uri: str, application_id: str | None = "zero-code", **values: str) -> dict[str, str]:
    """An environment without anything of OpenTelemetry or Moesif but what is said here."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "MOESIF_", "DJANGO_"))}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(PROGRAMS), *entry_points_path()])
    env["PYTHONUNBUFFERED"] = "1"
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    env["NO_PROXY"] = "*"
    env.update(OTEL_TRACES_EXPORTER="none", OTEL_METRICS_EXPORTER="none", OTEL_LOGS_EXPORTER="none")
    env.update(MOESIF_BASE_URI=base_uri, MOESIF_EVENT_BATCH_TIMEOUT="0.1")
    if application_id is not None:
        env["MOESIF_APPLICATION_ID"] = application_id
    env.update(values)
    return env


def command(*words: str) -> list[str]:
    """`opentelemetry-instrument <words>`, the script of this Python's environment."""
    script = Path(sys.executable).with_name("opentelemetry-instrument")
    run = [str(script)] if script.exists() else [
        sys.executable, "-c", "from opentelemetry.instrumentation.auto_instrumentation import run; run()"
    ]
    return [*run, *words]


def script(name: str) -> str:
    """The path of a console script, of this Python's environment first."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or name


class Program:
    """A running process, with what it writes in a file."""

    def __init__(self, words: Sequence[str], env: dict[str, str], port: int = 0, cwd: Path = PROGRAMS) -> None:
        self.port = port
        number, path = tempfile.mkstemp(prefix="moesif-otel-test-", suffix=".log")
        self._log = Path(path)
        self._last_output: str | None = None
        try:
            self.process = subprocess.Popen(
                words, env=env, cwd=cwd, stdout=number, stderr=subprocess.STDOUT, start_new_session=True
            )
        finally:
            os.close(number)

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self._log.read_text(errors="replace") if self._last_output is None else self._last_output

    def wait_until_it_listens(self) -> Program:
        """Wait until a connection to its port is accepted."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return self
            assert self.process.poll() is None, self.output
            time.sleep(0.05)
        raise AssertionError(f"does not listen on {self.port}:\n{self.output}")

    def wait_for_output(self, text: str, count: int = 1) -> None:
        """Wait until it has written a text so many times."""
        deadline = time.monotonic() + WAIT_S
        while self.output.count(text) < count:
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
        """Make one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        try:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.getheaders())
        finally:
            connection.close()

    def wait(self) -> int:
        """Wait for its end; gives the return code."""
        return self.process.wait(WAIT_S)

    def ask_to_stop(self, number: int = signal.SIGTERM) -> None:
        """Send it a signal, if it runs."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def stop(self) -> int | None:
        """End it, and whatever it started (it leads a session of its own)."""
        self.ask_to_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)
        if self._last_output is None:
            self._last_output = self.output
            self._log.unlink()
        return self.process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextlib.contextmanager
def running(programs: dict[str, Program]) -> Iterator[dict[str, Program]]:
    """Programs that started side by side; all of them end with the block."""
    try:
        for program in programs.values():
            if program.port:
                program.wait_until_it_listens()
        yield programs
    finally:
        for program in programs.values():
            program.ask_to_stop()
        for program in programs.values():
            program.stop()
