"""A measured server: starts it, tells what its processes cost, and ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.environments import ROOT, python_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def receiver(mode: str = "healthy") -> Iterator[str]:
    """Run a Moesif of the given mode and return its address; `dead` is an address where nobody listens."""
    if mode == "dead":
        yield f"http://127.0.0.1:{free_port()}"
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.receiver", mode], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


class Server:
    """One worker of one variant.

    Args:
        kind: `gunicorn` (gthread, 4 threads), `uvicorn` or `tornado`.
        variant: As `benchmarks.programs` has them.
        moesif_url: Where it delivers.
    """

    def __init__(self, kind: str, variant: str, moesif_url: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        python = python_of("replaced" if variant == "replaced" else "ours")
        options = {
            "gunicorn": ["-m", "gunicorn", "-k", "gthread", "--threads", "4", "-w", "1", "--keep-alive", "60", "--log-level", "error", "-b", f"127.0.0.1:{self.port}", "benchmarks.programs:wsgi()"],
            "uvicorn": ["-m", "uvicorn", "--factory", "--port", str(self.port), "--log-level", "error", "--no-access-log", "benchmarks.programs:asgi"],
            "tornado": ["-m", "benchmarks.programs", "tornado", str(self.port)],
        }
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "MOESIF_"))}
        environ |= {"VARIANT": variant, "MOESIF_URL": moesif_url, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [python, *options[kind]], cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline_s = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                break
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"{kind} with {variant} did not start")
            time.sleep(0.05)

    @property
    def worker(self) -> int:
        """Process id of the worker: gunicorn's child, else the process itself."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0]) if children else self._process.pid

    def cpu_s(self) -> float:
        """CPU seconds of the worker with all of its threads."""
        fields = Path(f"/proc/{self.worker}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_S

    def memory_mb(self) -> float:
        """Resident memory of the worker."""
        return int(Path(f"/proc/{self.worker}/statm").read_text().split()[1]) * _PAGE_BYTES / 1e6

    def __enter__(self) -> Server:  # noqa: PYI034 - Self comes with Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        # moesifwsgi waits at its exit for a queue that is not empty: nobody is asked to end in peace.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.worker, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
