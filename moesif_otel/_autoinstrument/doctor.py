"""`moesif-otel doctor`: what is set, what is met, and whether Moesif can be reached, one finding a line.

Needs no extra. Each check returns findings and raises nothing: what a check itself cannot do is a finding too. A value
that may be secret is never shown, only whether it is set. A program that is named is run by
`moesif_otel._autoinstrument.dry_run`, in a process of its own.
"""

from __future__ import annotations

import contextlib
import email.utils
import importlib.metadata
import importlib.util
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from moesif_otel._autoinstrument.targets import NOT_CAPTURED, NOT_CAPTURED_CLIENTS
from moesif_otel.settings import OPTIONS, ImportedCallback, Settings, nearest, unknown_variables, variable_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from moesif_otel.errors import MoesifConfigError

__all__ = ["Finding", "diagnose", "report"]

Level = Literal["ok", "info", "warning", "error"]

_PROBE_TIMEOUT_S: Final = 5.0
_RUN_S: Final = 5.0
_MOST_CLOCK_SKEW_S: Final = 60.0


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        level: `error` makes the command end with status 1.
        check: What was looked at.
        text: What was found, in one line.
        advice: What to do; empty where there is nothing.
    """

    level: Level
    check: str
    text: str
    advice: str = ""


class _Package(NamedTuple):
    """A package whose calls are captured."""

    module: str
    distribution: str
    how: str


_PACKAGES: Final = (
    _Package("flask", "flask", "incoming calls"),
    _Package("bottle", "bottle", "incoming calls"),
    _Package("pyramid", "pyramid", "incoming calls"),
    _Package("falcon", "falcon", "incoming calls (WSGI)"),
    _Package("django", "django", "incoming calls"),
    _Package("fastapi", "fastapi", "incoming calls"),
    _Package("starlette", "starlette", "incoming calls"),
    _Package("quart", "quart", "incoming calls"),
    _Package("litestar", "litestar", "incoming calls"),
    _Package("tornado", "tornado", "incoming calls"),
    _Package("gunicorn", "gunicorn", "applications of no framework"),
    _Package("waitress", "waitress", "applications of no framework"),
    _Package("werkzeug", "werkzeug", "applications of no framework"),
    _Package("cheroot", "cheroot", "applications of no framework"),
    _Package("gevent", "gevent", "applications of no framework"),
    _Package("uvicorn", "uvicorn", "applications of no framework"),
    _Package("hypercorn", "hypercorn", "applications of no framework"),
    _Package("daphne", "daphne", "applications of no framework"),
    _Package("granian", "granian", "applications of no framework"),
    _Package("requests", "requests", "outgoing calls"),
    _Package("httpx", "httpx", "outgoing calls"),
    _Package("aiohttp", "aiohttp", "outgoing calls (the client)"),
)


def diagnose(program: Sequence[str] = (), *, send: bool = False) -> list[Finding]:
    """Look at everything and return what was found.

    Args:
        program: A command such as `python app.py`, or one word `module:application`; empty for none.
        send: Send one event to Moesif and wait for its acknowledgement.

    Returns:
        The findings, in the order of the checks.
    """
    found: list[Finding] = []
    settings, errors = Settings.of_any()
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("options", lambda: _options(settings, errors)),
        ("capture", lambda: _packages(settings)),
        ("opentelemetry", _opentelemetry),
    ]
    if settings is not None:
        checks += [
            ("callbacks", lambda: _callbacks(settings)),
            ("spool", lambda: _spool(settings)),
            ("address", lambda: _address(settings)),
        ]
    if program:
        checks.append(("program", lambda: _program(program)))
    if send:
        checks.append(("send", lambda: _send(settings)))
    for name, check in checks:
        try:
            found.extend(check())
        except Exception as exc:
            found.append(Finding("warning", name, f"this check failed: {type(exc).__qualname__}"))
    return found


def report(findings: Sequence[Finding], *, as_json: bool) -> str:
    """Return the findings as text: one a line, or JSON."""
    if as_json:
        return json.dumps(
            {"ok": not any(f.level == "error" for f in findings), "findings": [asdict(f) for f in findings]}
        )
    return "\n".join(
        f"{found.level:<8}{found.check:<15}{found.text}{'. ' + found.advice if found.advice else ''}"
        for found in findings
    )


# Options.


def _options(settings: Settings | None, errors: list[MoesifConfigError]) -> Iterator[Finding]:
    for error in errors:
        yield Finding("error", "options", str(error))
    for prefix, name in unknown_variables(os.environ):
        near = nearest(name)
        advice = f"Did you mean {prefix}{near}?" if near else "Remove it, or correct its name"
        yield Finding("warning", "options", f"{prefix}{name} is no option and is ignored", advice)
    if settings is None:
        yield Finding("error", "options", "without these nothing is captured under opentelemetry-instrument")
        return
    changed = {"APPLICATION_ID": "set", **settings.changed()}
    for name, shown in changed.items():
        source = variable_of(name, os.environ)
        yield Finding("ok", "options", f"{name} = {shown} ({source[0] if source else 'given'})")
    left = len(OPTIONS) - len(changed)
    yield Finding("info", "options", f"{left} other options have their defaults; a dict in the code wins over these")


# What is there to capture.


def _packages(settings: Settings | None) -> Iterator[Finding]:
    outgoing = settings is not None and settings.capture_outgoing_requests
    for package in _PACKAGES:
        if not _is_installed(package.module):
            continue
        version = _version(package.distribution)
        if package.how.startswith("outgoing") and not outgoing:
            advice = "Set MOESIF_CAPTURE_OUTGOING_REQUESTS=true to record the calls that the service makes"
            yield Finding("info", "capture", f"{package.module} {version}: {package.how} are off", advice)
        else:
            yield Finding("ok", "capture", f"{package.module} {version}: {package.how}")
    for module, advice in (NOT_CAPTURED | NOT_CAPTURED_CLIENTS).items():
        if _is_installed(module):
            yield Finding("info", "capture", f"{module}: not captured by itself", f"{advice[0].upper()}{advice[1:]}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"


# OpenTelemetry's side.


def _opentelemetry() -> Iterator[Finding]:
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        yield Finding("error", "opentelemetry", "OTEL_SDK_DISABLED is true: nothing is captured", "Unset it")
    if not _is_installed("opentelemetry.instrumentation.auto_instrumentation"):
        yield Finding(
            "info",
            "opentelemetry",
            "the command opentelemetry-instrument is not installed",
            "For a run with no code change: pip install opentelemetry-instrumentation",
        )
        return
    names = [point.name for point in importlib.metadata.entry_points(group="opentelemetry_instrumentor")]
    disabled = {name.strip() for name in os.environ.get("OTEL_PYTHON_DISABLED_INSTRUMENTATIONS", "").split(",")}
    if disabled & {"moesif", "*"}:
        yield Finding(
            "error",
            "opentelemetry",
            "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS switches us off",
            "Take moesif, or *, out of it",
        )
    in_order = ", ".join(name for name in names if name not in disabled)
    yield Finding("ok", "opentelemetry", f"instrumentations in the order they load: {in_order or 'none'}")
    yield from _pipeline()


def _pipeline() -> Iterator[Finding]:
    """What the zero-code run would make: asked of a process that it starts."""
    found = _dry_run([])
    if found is None:
        yield Finding("warning", "opentelemetry", "the zero-code set-up failed in a trial run", "Look at its output")
        return
    yield Finding("ok", "opentelemetry", f"tracer provider: {found['provider']}; sampler: {found['sampler']}")
    for exporter in ("TRACES", "METRICS", "LOGS"):
        chosen = os.environ.get(f"OTEL_{exporter}_EXPORTER")
        if chosen:
            yield Finding("info", "opentelemetry", f"OTEL_{exporter}_EXPORTER = {chosen}")


# Callbacks, spool.


def _callbacks(settings: Settings) -> Iterator[Finding]:
    sys.path.insert(0, str(Path.cwd()))  # as `python app.py` in this folder has it
    try:
        for option in OPTIONS.values():
            callback = getattr(settings, option.field_name)
            if not isinstance(callback, ImportedCallback):
                continue
            try:
                callback.resolve()
            except Exception as exc:
                level: Level = "error"
                yield Finding(
                    level,
                    "callbacks",
                    f"{option.name}: {callback.path} cannot be imported: {type(exc).__qualname__}: {exc}",
                )
                continue
            yield Finding("ok", "callbacks", f"{option.name}: {callback.path}")
    finally:
        sys.path.pop(0)


def _spool(settings: Settings) -> Iterator[Finding]:
    if settings.spool_directory is None:
        yield Finding(
            "info",
            "spool",
            "off: events that are undelivered when the process ends are lost",
            "SPOOL_DIRECTORY keeps them",
        )
        return
    folder = Path(settings.spool_directory)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield Finding(
            "error", "spool", f"{folder} cannot be written by this user", "Change its owner, or SPOOL_DIRECTORY"
        )
        return
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    size = sum(path.stat().st_size for path in files)
    yield Finding("ok", "spool", f"{folder} can be written; {len(files)} files of {size} bytes lie in it")


# The way to Moesif.


def _address(settings: Settings) -> Iterator[Finding]:
    address = urlsplit(settings.base_uri)
    host, secure = address.hostname or "", address.scheme.lower() == "https"
    port = address.port or (443 if secure else 80)
    proxy = None if proxy_bypass(host) else getproxies().get(address.scheme.lower())
    if proxy:
        shown = urlsplit(proxy)
        yield Finding("info", "address", f"goes through the proxy {shown.hostname}:{shown.port} (from the environment)")
    else:
        yield from _connect(host, port, secure=secure)
    yield from _probe(settings)


def _connect(host: str, port: int, *, secure: bool) -> Iterator[Finding]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as exc:
        yield Finding(
            "error", "address", f"DNS: {host} has no address ({exc.strerror})", "Check BASE_URI and the name server"
        )
        return
    yield Finding("ok", "address", f"DNS: {host} is {', '.join(sorted({str(entry[4][0]) for entry in found}))}")
    try:
        with socket.create_connection((host, port), timeout=_PROBE_TIMEOUT_S) as connection:
            yield Finding("ok", "address", f"TCP: port {port} is open")
            if secure:
                yield _tls(connection, host)
    except OSError as exc:
        yield Finding(
            "error",
            "address",
            f"TCP: {host} port {port}: {exc.strerror or exc}",
            "Check BASE_URI and the firewall; is the server running?",
        )


def _tls(connection: socket.socket, host: str) -> Finding:
    authorities = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE") or _certifi()
    try:
        with ssl.create_default_context(cafile=authorities).wrap_socket(connection, server_hostname=host) as tls:
            return Finding("ok", "address", f"TLS: {tls.version()}, certificate is valid")
    except ssl.SSLError as exc:
        return Finding(
            "error",
            "address",
            f"TLS: {exc.reason or exc}",
            "Behind a proxy that opens TLS set REQUESTS_CA_BUNDLE to its certificate",
        )


def _certifi() -> str | None:
    try:
        import certifi
    except ImportError:
        return None
    return certifi.where()


_ANSWERS: Final = {
    401: ("error", "the application id is not accepted", "Copy it again from the Moesif portal"),
    402: ("error", "the subscription is not active", "Look at the plan in the Moesif portal"),
    403: ("error", "access is refused", "Is a proxy or firewall in between?"),
    404: ("error", "there is no Moesif at this path", "Check the path of BASE_URI"),
    407: ("error", "the proxy wants a password", "Put it into the proxy's address"),
}


def _probe(settings: Settings) -> Iterator[Finding]:
    import requests

    headers = {"X-Moesif-Application-Id": settings.application_id}
    started_s = time.monotonic()
    try:
        answer = requests.get(
            f"{settings.base_uri}/v1/config", headers=headers, timeout=_PROBE_TIMEOUT_S, allow_redirects=False
        )
    except requests.RequestException as exc:
        yield Finding(
            "error",
            "address",
            f"no answer from {settings.shown_address}: {type(exc).__name__}",
            "Events wait until it answers",
        )
        return
    took_millis = (time.monotonic() - started_s) * 1_000
    if answer.status_code in {200, 304}:
        yield Finding(
            "ok", "address", f"{settings.shown_address} answers, and accepts the application id ({took_millis:.0f} ms)"
        )
    else:
        level, meaning, advice = _ANSWERS.get(
            answer.status_code, ("warning", "not what Moesif answers", "Is this address a Moesif, or a secure proxy?")
        )
        yield Finding(level, "address", f"{settings.shown_address} answers {answer.status_code}: {meaning}", advice)  # type: ignore[arg-type]
    date = email.utils.parsedate_to_datetime(answer.headers["Date"]) if "Date" in answer.headers else None
    if date is not None:
        skew_s = time.time() - date.timestamp()
        if abs(skew_s) > _MOST_CLOCK_SKEW_S:
            yield Finding(
                "warning",
                "address",
                f"this machine's clock is off by {skew_s:.0f} s",
                "Events are shown at the wrong time: set the clock",
            )
        else:
            yield Finding("ok", "address", "the clocks agree within a minute")


def _send(settings: Settings | None) -> Iterator[Finding]:
    if settings is None:
        yield Finding("error", "send", "nothing sent: the options are wrong")
        return
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.trace import SpanKind

    from moesif_otel._pipeline.sink import EventSink
    from moesif_otel.exporter import MoesifSpanExporter

    # What the user's callbacks would do to a call that is none is not what is asked.
    exporter = MoesifSpanExporter.of(
        EventSink(settings.with_changes(skip=None, mask_event_model=None, spool_directory=None))
    )
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    attributes: dict[str, str | int] = {
        "http.request.method": "GET",
        "url.full": "https://doctor.moesif-otel.invalid/moesif-otel/doctor",
        "http.response.status_code": 200,
    }
    with provider.get_tracer("moesif_otel.doctor").start_as_current_span(
        "doctor", kind=SpanKind.SERVER, attributes=attributes
    ):
        pass
    exporter.force_flush(int(settings.export_timeout * 1_000))
    stats = exporter.stats()
    exporter.shutdown(1_000)
    if stats["delivered"] == 1:
        yield Finding("ok", "send", "one event was sent and acknowledged: look for GET /moesif-otel/doctor")
    else:
        why = ", ".join(stats["dropped"]) or "no answer came in time"
        yield Finding("error", "send", f"the event was not delivered: {why}")


# The program.


def _program(program: Sequence[str]) -> Iterator[Finding]:
    found = _dry_run(program)
    if found is None:
        yield Finding("error", "program", f"{' '.join(program)} did not run to a report", "Run it without us first")
        return
    if found["error"]:
        yield Finding("error", "program", f"it ended with {found['error']}")
    yield Finding(
        "ok" if found["captured"] else "warning",
        "program",
        f"captured in it: {', '.join(found['captured']) or 'nothing'}",
    )
    for line in found["application"]:
        yield Finding("info", "program", line)
    for line in found["twice"]:
        yield Finding("warning", "program", line, "Keep one of them")
    if found["provider_changed"]:
        yield Finding(
            "info", "program", f"it sets its own tracer provider: {found['provider']}; sampler: {found['sampler']}"
        )


def _dry_run(program: Sequence[str]) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        command = [sys.executable, "-m", "moesif_otel._autoinstrument.dry_run", str(path), *program]
        # A program that ignores its end has written its report before.
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(  # noqa: S603 - the user's own program
                command,
                timeout=_RUN_S + 20,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        try:
            loaded: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return loaded
