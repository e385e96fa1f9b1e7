"""`moesif-otel doctor`: checks the options, what is captured, and whether Moesif can be reached.

Needs no extra. Each check yields findings; if a check itself fails, that is a finding too. Of a value that may be
secret, it shows only that it is set. A program is run in a process of its own (`dry_run`).
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from moesif_otel._autoinstrument.dry_run import RUN_S
from moesif_otel._autoinstrument.instrument import NOT_CAPTURED, NOT_CAPTURED_CLIENTS, is_switched_off
from moesif_otel._capture.callbacks import check_signature
from moesif_otel.errors import MoesifConfigError
from moesif_otel.settings import OPTIONS, ImportedCallback, Settings, nearest, unknown_variables, variable_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Level = Literal["ok", "info", "warning", "error"]

_PROBE_TIMEOUT_S: Final = 5.0
_MOST_CLOCK_SKEW_S: Final = 60.0
_NO_PROVIDER: Final = "opentelemetry.trace.ProxyTracerProvider"


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        level: `error` makes the command end with status 1.
        text: What was found, in one line.
        advice: What to do; empty if there is nothing to do.
        check: Name of the check, set by `diagnose`.
    """

    level: Level
    text: str
    advice: str = ""
    check: str = ""


_NO_FRAMEWORK: Final = "calls of applications without a framework"
# Packages whose calls are captured, and which calls those are.
_CAPTURED: Final = {
    **dict.fromkeys(("flask", "bottle", "pyramid", "falcon", "django"), "incoming calls"),
    **dict.fromkeys(("fastapi", "starlette", "quart", "litestar", "tornado"), "incoming calls"),
    **dict.fromkeys(("gunicorn", "waitress", "werkzeug", "cheroot", "gevent"), _NO_FRAMEWORK),
    **dict.fromkeys(("uvicorn", "hypercorn", "daphne", "granian"), _NO_FRAMEWORK),
    **dict.fromkeys(("requests", "httpx"), "outgoing calls"),
    "aiohttp": "outgoing calls (the client)",
}


def diagnose(program: Sequence[str] = (), *, send: bool = False) -> list[Finding]:
    """Run the checks and return their findings.

    Args:
        program: A command such as `python app.py`, or one word `module:application`; empty for none.
        send: Send one event to Moesif and wait for its acknowledgement.

    Returns:
        The findings, in the order of the checks.
    """
    found: list[Finding] = []
    settings, errors = Settings.of_any()
    usable = settings
    if settings is None:
        usable, errors = _without_errors(errors)
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("options", lambda: _options(settings, errors)),
        ("capture", lambda: _packages(settings)),
        ("opentelemetry", _opentelemetry),
    ]
    if usable is not None:
        checks += [
            ("callbacks", lambda: _callbacks(usable)),
            ("spool", lambda: _spool(usable)),
            ("address", lambda: _address(usable)),
        ]
    if program:
        checks.append(("program", lambda: _program(program, is_captured=settings is not None)))
    if send:
        checks.append(("send", lambda: _send(settings)))
    for name, check in checks:
        try:
            found.extend(replace(each, check=name) for each in check())
        except Exception as exc:
            text = f"this check could not be completed: {type(exc).__qualname__}"
            found.append(Finding("warning", text, check=name))
    return found


def report(findings: Sequence[Finding], *, as_json: bool) -> str:
    """Return the findings as text, one per line, or as JSON."""
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
        yield Finding("error", str(error))
    for prefix, name in unknown_variables(os.environ):
        near = nearest(name)
        advice = f"Did you mean {prefix}{near}?" if near else "Remove it, or correct its name"
        yield Finding("warning", f"{prefix}{name} is not an option and is ignored", advice)
    if settings is None:
        yield Finding("error", "opentelemetry-instrument captures nothing", "Correct the options that are named above")
        return
    changed = {"APPLICATION_ID": "set", **settings.changed()}
    for name, shown in changed.items():
        source = variable_of(name, os.environ)
        yield Finding("ok", f"{name} = {shown} ({source[1] if source else 'given'})")
    left = len(OPTIONS) - len(changed)
    yield Finding("info", f"{left} other options have their defaults; options in the code take precedence over these")


def _without_errors(errors: list[MoesifConfigError]) -> tuple[Settings | None, list[MoesifConfigError]]:
    """Return what the settings would be without the wrong options, and all errors: one run tells everything.

    The settings are None if there is no address or no application id.
    """
    left = dict(os.environ)
    for error in errors:
        while (found := variable_of(error.option or "", left)) is not None:
            del left[found[1]]
    wrong = {error.option for error in errors}
    settings, others = Settings.of_any(environ=left)
    errors = [*errors, *(error for error in others if error.option not in wrong)]
    return None if "BASE_URI" in wrong else settings, errors


# What is there to capture.


def _packages(settings: Settings | None) -> Iterator[Finding]:
    outgoing = settings is not None and settings.capture_outgoing_requests
    for module, calls in _CAPTURED.items():
        if not _is_installed(module):
            continue
        try:
            version = importlib.metadata.version(module)
        except importlib.metadata.PackageNotFoundError:
            version = "(version unknown)"
        if calls.startswith("outgoing") and not outgoing:
            advice = "Set MOESIF_CAPTURE_OUTGOING_REQUESTS=true to record the calls that your service makes"
            yield Finding("info", f"{module} {version}: {calls} are not captured", advice)
        else:
            yield Finding("ok", f"{module} {version}: {calls}")
    for module, advice in (NOT_CAPTURED | NOT_CAPTURED_CLIENTS).items():
        if _is_installed(module):
            yield Finding("info", f"{module}: not captured automatically", f"{advice[0].upper()}{advice[1:]}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


# OpenTelemetry's side.


def _opentelemetry() -> Iterator[Finding]:
    if is_switched_off():
        yield Finding("error", "OTEL_SDK_DISABLED is true, so nothing is captured", "Unset it")
    if not _is_installed("opentelemetry.instrumentation.auto_instrumentation"):
        yield Finding(
            "info",
            "the command opentelemetry-instrument is not installed",
            "To capture without code changes: pip install opentelemetry-instrumentation",
        )
        return
    names = [point.name for point in importlib.metadata.entry_points(group="opentelemetry_instrumentor")]
    disabled = {name.strip() for name in os.environ.get("OTEL_PYTHON_DISABLED_INSTRUMENTATIONS", "").split(",")}
    if disabled & {"moesif", "*"}:
        yield Finding(
            "error",
            "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS turns moesif-otel off, so nothing is captured",
            "Remove moesif, or *, from it",
        )
    in_order = ", ".join(name for name in names if name not in disabled)
    yield Finding("ok", f"instrumentations, in the order they load: {in_order or 'none'}")
    yield from _pipeline()


def _pipeline() -> Iterator[Finding]:
    """Yield what `opentelemetry-instrument` would set up, found out by a trial run in a process of its own."""
    found = _dry_run([])
    if found is None:
        yield Finding(
            "warning",
            "a trial run of opentelemetry-instrument failed",
            "Run it with a program of yours and look at its output",
        )
        return
    if found["provider"] == _NO_PROVIDER:
        yield Finding("ok", "no tracer provider is set up, so calls are captured without spans")
    else:
        yield Finding("ok", f"tracer provider: {found['provider']}; sampler: {found['sampler']}")
    for exporter in ("TRACES", "METRICS", "LOGS"):
        chosen = os.environ.get(f"OTEL_{exporter}_EXPORTER")
        if chosen:
            yield Finding("info", f"OTEL_{exporter}_EXPORTER = {chosen}")


# Callbacks, spool.


def _callbacks(settings: Settings) -> Iterator[Finding]:
    sys.path.insert(0, str(Path.cwd()))  # as `python app.py` in this folder has it
    try:
        for option in OPTIONS.values():
            callback = getattr(settings, option.field_name)
            if not isinstance(callback, ImportedCallback):
                continue
            try:
                check_signature(option.name, callback.resolve(), *_signatures(option.name))
            except MoesifConfigError as exc:
                yield Finding("error", str(exc))
            except Exception as exc:
                why = f"{type(exc).__qualname__}: {exc}"
                yield Finding("error", f"{option.name}: {callback.path} cannot be imported: {why}")
            else:
                yield Finding("ok", f"{option.name}: {callback.path}")
    finally:
        sys.path.pop(0)


def _signatures(name: str) -> list[tuple[str, ...]]:
    """Return the arguments that a callback may get; which ones depends on the framework."""
    if name == "MASK_EVENT_MODEL":
        return [("event",)]
    if name.endswith("_OUTGOING"):
        return [("request", "response")]
    found: list[tuple[str, ...]] = [("app", "environ"), ("request", "response"), ("handler",)]
    return [*found, ("app", "environ", "response_headers")] if name.startswith("IDENTIFY") else found


def _spool(settings: Settings) -> Iterator[Finding]:
    if settings.spool_directory is None:
        yield Finding(
            "info",
            "off: events that cannot be delivered before the process ends are lost",
            "Set SPOOL_DIRECTORY to keep them",
        )
        return
    folder = Path(settings.spool_directory)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield Finding("error", f"this user cannot write to {folder}", "Change its owner, or SPOOL_DIRECTORY")
        return
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    size = sum(path.stat().st_size for path in files)
    yield Finding("ok", f"{folder} is writable, and contains {len(files)} files ({size} bytes)")


# The way to Moesif.


def _address(settings: Settings) -> Iterator[Finding]:
    address = urlsplit(settings.base_uri)
    host, secure = address.hostname or "", address.scheme.lower() == "https"
    port = address.port or (443 if secure else 80)
    proxy = None if proxy_bypass(host) else getproxies().get(address.scheme.lower())
    if proxy:
        shown = urlsplit(proxy)
        yield Finding("info", f"uses the proxy {shown.hostname}:{shown.port} (from the environment)")
    else:
        yield from _connect(host, port, secure=secure)
    yield from _probe(settings)


def _connect(host: str, port: int, *, secure: bool) -> Iterator[Finding]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as exc:
        yield Finding("error", f"DNS: {host} cannot be resolved ({exc.strerror})", "Check BASE_URI and the name server")
        return
    yield Finding("ok", f"DNS: {host} resolves to {', '.join(sorted({str(entry[4][0]) for entry in found}))}")
    try:
        with socket.create_connection((host, port), timeout=_PROBE_TIMEOUT_S) as connection:
            yield Finding("ok", f"TCP: port {port} is open")
            if secure:
                yield _tls(connection, host)
    except OSError as exc:
        yield Finding(
            "error",
            f"TCP: {host} port {port}: {exc.strerror or exc}",
            "Check BASE_URI and the firewall, and that the server is running",
        )


def _tls(connection: socket.socket, host: str) -> Finding:
    import certifi  # `requests` brings it

    authorities = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE") or certifi.where()
    try:
        with ssl.create_default_context(cafile=authorities).wrap_socket(connection, server_hostname=host) as tls:
            return Finding("ok", f"TLS: {tls.version()}, the certificate is valid")
    except ssl.SSLError as exc:
        return Finding(
            "error", f"TLS: {exc.reason or exc}", "If a proxy intercepts TLS, set REQUESTS_CA_BUNDLE to its certificate"
        )


_ANSWERS: Final = {
    401: ("the application id is not accepted", "Copy it again from the Moesif portal"),
    402: ("the Moesif subscription is not active", "See the billing page of the Moesif portal"),
    403: ("access is refused", "Check APPLICATION_ID, and whether a proxy or firewall refuses the request"),
    404: ("Moesif's API is not at this path", "Check the path of BASE_URI"),
    407: ("the proxy requires a password", "Add user and password to the proxy's address"),
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
            f"no answer from {settings.shown_address}: {type(exc).__name__}",
            "Check BASE_URI, the network and the proxy; until it answers, events wait in memory",
        )
        return
    took_millis = (time.monotonic() - started_s) * 1_000
    if answer.status_code in {200, 304}:
        yield Finding("ok", f"{settings.shown_address} answers, and accepts the application id ({took_millis:.0f} ms)")
    else:
        level: Level = "error" if answer.status_code in _ANSWERS else "warning"
        unexpected = ("an unexpected answer", "Check that BASE_URI is Moesif or a secure proxy")
        meaning, advice = _ANSWERS.get(answer.status_code, unexpected)
        yield Finding(level, f"{settings.shown_address} answers {answer.status_code}: {meaning}", advice)
    date = email.utils.parsedate_to_datetime(answer.headers["Date"]) if "Date" in answer.headers else None
    if date is not None:
        skew_s = time.time() - date.timestamp()
        if abs(skew_s) > _MOST_CLOCK_SKEW_S:
            yield Finding(
                "warning",
                f"this machine's clock is off by {skew_s:.0f} s",
                "Set the clock: Moesif would show events at the wrong time",
            )
        else:
            yield Finding("ok", "the clocks agree within a minute")


def _send(settings: Settings | None) -> Iterator[Finding]:
    if settings is None:
        yield Finding("error", "nothing was sent, because options are wrong", "See the check named options")
        return
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.trace import SpanKind

    from moesif_otel._pipeline.sink import EventSink
    from moesif_otel.exporter import MoesifSpanExporter

    # Without the user's callbacks: they expect a real call.
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
        yield Finding("ok", "one event was sent and acknowledged: look for GET /moesif-otel/doctor in Moesif")
    else:
        why = ", ".join(stats["dropped"]) or "no answer came in time"
        yield Finding("error", f"the event was not delivered: {why}", "See the check named address")


# The program.


def _program(program: Sequence[str], *, is_captured: bool) -> Iterator[Finding]:
    found = _dry_run(program)
    if found is None:
        yield Finding(
            "error",
            f"{' '.join(program)} ended before it could be examined",
            "Check that it runs without opentelemetry-instrument",
        )
        return
    if found["error"]:
        yield Finding("error", f"the program ended with {found['error']}", "Run it on its own to see the whole error")
    names = ", ".join(found["captured"])
    if names and is_captured:
        yield Finding("ok", f"captured in it: {names}")
    elif names:
        advice = "Only a middleware in its code captures it, until the options are right"
        yield Finding("info", f"in it: {names}", advice)
    elif not found["error"]:
        yield Finding("warning", "captured in it: nothing")
    for line in found["application"]:
        yield Finding("info", line)
    for line in found["twice"]:
        yield Finding("warning", line, "Keep one of them")
    if found["provider_changed"]:
        yield Finding("info", f"it sets its own tracer provider: {found['provider']}; sampler: {found['sampler']}")


def _dry_run(program: Sequence[str]) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        command = [sys.executable, "-m", "moesif_otel._autoinstrument.dry_run", str(path), *program]
        # A program that does not end has written its report before.
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(  # noqa: S603 - the user's own program
                command,
                timeout=RUN_S + 40,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        try:
            loaded: dict[str, Any] | None = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return loaded
