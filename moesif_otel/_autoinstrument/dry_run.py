"""Runs a program as `opentelemetry-instrument` would, for a few seconds, and reports what is in it to the doctor.

It runs as a process of its own: `python -m moesif_otel._autoinstrument.dry_run REPORT [PROGRAM …]`. The program is a
command such as `python app.py`, or one word `module:application`, which is imported but not served. The report is JSON.
It is written when the program has ended or its time is over; then the process exits at once.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import shlex
import shutil
import sys
import threading
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moesif_otel.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

RUN_S: Final = 5.0

_FRAMEWORKS: Final = {
    "flask.app": "Flask",
    "bottle": "Bottle",
    "pyramid.router": "Pyramid",
    "falcon.app": "Falcon",
    "django.core.handlers.wsgi": "Django",
    "django.core.handlers.asgi": "Django (ASGI)",
    "fastapi.applications": "FastAPI",
    "starlette.applications": "Starlette",
    "quart.app": "Quart",
    "litestar.app": "Litestar",
    "tornado.web": "Tornado",
}
_CLIENTS: Final = {"requests.sessions": "requests", "httpx": "httpx", "aiohttp.client": "aiohttp"}
_REPLACED: Final = ("moesifwsgi", "moesiftornado", "moesifpythonrequest", "moesifasgi", "moesifdjango")


class _Report:
    """The report, which is written once."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._once = threading.Lock()
        self.provider_before: Any = None
        self.application: list[str] = []
        self.modules_before: frozenset[str] = frozenset()

    def write(self, error: str = "") -> None:
        """Write the report and exit the process, whatever is running in it."""
        if not self._once.acquire(blocking=False):
            threading.Event().wait()  # another thread is writing, and ends the process
        found = None
        with contextlib.suppress(BaseException):  # without a report the doctor says that nothing could be examined
            found = self._found(error)
        with contextlib.suppress(OSError):
            Path(self._path).write_text(json.dumps(found))
        os._exit(0)

    def _found(self, error: str) -> dict[str, Any]:
        from opentelemetry import trace

        provider = trace.get_tracer_provider()
        sampler = getattr(provider, "sampler", None)
        settings, _ = Settings.of_any()
        outgoing = settings is not None and settings.capture_outgoing_requests
        names = {**_FRAMEWORKS, **(_CLIENTS if outgoing else {})}
        middlewares, twice = _middlewares()
        used = _used_packages(self.modules_before)
        return {
            "error": error,
            "provider": f"{type(provider).__module__}.{type(provider).__qualname__}",
            "provider_changed": provider is not self.provider_before,
            "sampler": sampler.get_description() if sampler is not None else "none",
            "captured": [
                name for module, name in names.items() if module in sys.modules and module.partition(".")[0] in used
            ],
            "application": [*self.application, *middlewares],
            "twice": twice,
        }


def _used_packages(before: frozenset[str]) -> set[str]:
    """Name the packages of modules that the program has loaded, and of what these have imported.

    That a module is loaded says nothing: OpenTelemetry's instrumentations load the frameworks that are installed.
    """
    used = set()
    for name, module in tuple(sys.modules.items()):
        if name in before and name != "__main__":
            continue
        used.add(name.partition(".")[0])
        for value in tuple(getattr(module, "__dict__", {}).values()):
            # Asked of the type: a proxy's own attributes may raise.
            kind = type(value)
            if kind is types.ModuleType:
                origins = [value.__name__]
            elif kind is types.FunctionType:
                origins = [value.__module__]
            else:  # the bases, too: instrumentations derive classes of their own from the frameworks'
                origins = [one.__module__ for one in (value if issubclass(kind, type) else kind).__mro__]
            used.update(str(origin).partition(".")[0] for origin in origins)
    return used


def _middlewares() -> tuple[list[str], list[str]]:
    """Describe the middlewares in the process, and what records calls a second time."""
    classes = tuple(
        found
        for name in ("wsgi", "tornado", "asgi", "django")
        if (found := getattr(sys.modules.get(f"moesif_otel.{name}"), "MoesifMiddleware", None)) is not None
    )
    living = [each for each in gc.get_objects() if classes and type(each) in classes]
    lines, twice = [], []
    for each in living:
        shown = ", ".join(f"{name} = {text}" for name, text in each.settings.changed().items()) or "all defaults"
        lines.append(f"{type(each).__module__}.MoesifMiddleware to {each.settings.shown_address} with {shown}")
        inner, depth = getattr(each, "app", None), 0
        while inner is not None and depth < 50:
            if type(inner) in classes and inner.settings.pipeline_key == each.settings.pipeline_key:
                twice.append("a MoesifMiddleware wraps another one with the same application id")
                break
            inner, depth = getattr(inner, "wsgi_app", None) or getattr(inner, "app", None), depth + 1
    twice += [f"{name} is loaded too, and records the same calls" for name in _REPLACED if name in sys.modules]
    return lines, twice


def main(arguments: Sequence[str]) -> None:
    """Run the program for at most `RUN_S` seconds, and write the report.

    Args:
        arguments: The path of the report, then the program; without a program only the setup is reported.
    """
    report = _Report(arguments[0])
    program = list(arguments[1:])
    timer = threading.Timer(RUN_S, report.write)
    timer.daemon = True
    try:
        from opentelemetry import trace
        from opentelemetry.instrumentation.auto_instrumentation import initialize

        from moesif_otel._autoinstrument import environment

        environment.prepare(os.environ)
        initialize()
        report.provider_before = trace.get_tracer_provider()
        report.modules_before = frozenset(sys.modules)
        timer.start()  # not before: the set-up takes its time on a busy machine, and is no part of the program
        _run(program, report)
    except SystemExit as exc:
        report.write("" if exc.code in {None, 0} else f"exit status {exc.code}")
    except BaseException as exc:
        report.write(_words_of(exc))
    report.write()


def _words_of(exc: BaseException) -> str:
    """Name an exception, and the name that was not found; a message may quote anything."""
    name = getattr(exc, "name", None) if isinstance(exc, (ImportError, AttributeError, NameError)) else None
    return f"{type(exc).__qualname__} ({name})" if name else type(exc).__qualname__


def _run(program: list[str], report: _Report) -> None:
    if not program:
        return
    sys.path.insert(0, str(Path.cwd()))
    if len(program) == 1 and not Path(program[0]).exists():
        program = shlex.split(program[0])  # quoted as a whole
    if len(program) == 1 and ":" in program[0]:
        module, _, attribute = program[0].partition(":")
        found: Any = importlib.import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
        report.application.append(f"{program[0]} is a {type(found).__module__}.{type(found).__qualname__}")
        return
    if Path(program[0]).name.startswith("python"):
        program = program[1:]
    if program[:1] == ["-m"]:
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    elif program:
        sys.argv = program
        path = program[0] if Path(program[0]).exists() else shutil.which(program[0])
        if path is None:
            report.write(f"FileNotFoundError ({program[0]})")
            return
        sys.path.insert(0, str(Path(path).resolve().parent))  # as Python does, and `run_path` does not
        runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
