"""The virtual environments that the variants run in: ours, and one with the packages that it replaces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".benchmarks"
_OTEL = [
    "opentelemetry-sdk",
    "opentelemetry-instrumentation-wsgi",
    "opentelemetry-instrumentation-tornado",
    "opentelemetry-instrumentation-requests",
    "opentelemetry-instrumentation-asgi",
]
_SERVERS = ["flask", "gunicorn", "tornado", "requests", "fastapi", "uvicorn", "starlette"]
PACKAGES = {
    "ours": ["-e", f"{ROOT}[tornado,outgoing,asgi]", *_OTEL, *_SERVERS],
    "replaced": ["moesifwsgi", "moesiftornado", "moesifpythonrequest", "moesifasgi", *_SERVERS, "setuptools<81"],
}


def python_of(name: str) -> str:
    """Return the interpreter of an environment, making it at the first call."""
    folder = FOLDER / name
    python = folder / "bin" / "python"
    done = folder / "complete"
    if not done.exists():
        print(f"making the environment {name!r}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES[name]], check=True)
        done.touch()
    return str(python)


def versions(name: str, packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of packages in an environment; of those that are there."""
    code = (
        "import sys, importlib.metadata as m\n"
        "for p in sys.argv[1:]:\n"
        "    try: print(p, m.version(p))\n"
        "    except m.PackageNotFoundError: pass"
    )
    told = subprocess.run([python_of(name), "-c", code, *packages], check=True, capture_output=True, text=True).stdout
    return dict(line.split() for line in told.splitlines())
