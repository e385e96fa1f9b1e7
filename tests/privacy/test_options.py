"""An option that protects data is never accepted and ignored: each one, at each way in, has an effect or is refused."""

from __future__ import annotations

import json
import re
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanKind

from moesif_otel import MoesifMiddleware, MoesifSpanExporter, MoesifSpanProcessor, instrument
from moesif_otel.errors import MoesifConfigError
from moesif_otel.outgoing import start_capture_outgoing
from moesif_otel.sandbox import Sandbox
from moesif_otel.settings import OPTIONS
from moesif_otel.tornado import MoesifMiddleware as TornadoMiddleware

from .planting import Case, Message, text_for
from .reading import found_in
from .serving import send, tornado_application, tornado_server, wsgi_app, wsgi_server
from .watching import Logs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REQUEST_FIELD, RESPONSE_FIELD = text_for("request field"), text_for("response field")
REQUEST_HEADER, RESPONSE_HEADER = text_for("request header"), text_for("response header")
PASSWORD, TOKEN, CUSTOM = text_for("password"), text_for("token"), text_for("custom credentials")
PICTURE = text_for("picture")


def _body(name: str, value: str) -> bytes:
    # Long, so that a limit on the size cuts it: what is left of JSON is no JSON, and is left out.
    return json.dumps({name: value, "password": PASSWORD, "filler": "f" * 3_000}).encode()


def _plain_case() -> Case:
    return Case(
        "a call",
        target="/things?password=" + PASSWORD,
        request=Message(
            [
                ("Content-Type", "application/json"),
                ("Authorization", f"Bearer {TOKEN}"),
                ("X-Login", f"Bearer {CUSTOM}"),
                ("X-Marked", REQUEST_HEADER),
            ],
            _body("marked", REQUEST_FIELD),
        ),
        response=Message([("Content-Type", "application/json"), ("X-Marked", RESPONSE_HEADER)], _body("marked", RESPONSE_FIELD)),
    )


def _picture_case() -> Case:
    picture = Message([("Content-Type", "image/svg+xml")], f"<svg>{PICTURE}</svg>".encode())
    return Case("a picture", request=picture, response=picture)


CASES = [_plain_case(), _picture_case()]

# -- the ways in: each takes options, makes both calls, and gives all that the sandbox got


def _wsgi(options: dict[str, Any], sandbox: Sandbox) -> None:
    middleware = MoesifMiddleware(wsgi_app(CASES), options)
    try:
        with wsgi_server(middleware) as port:
            for number, case in enumerate(CASES):
                send(port, case, number)
        assert middleware.force_flush(30_000)
    finally:
        middleware.shutdown()


def _tornado(options: dict[str, Any], sandbox: Sandbox) -> None:
    middleware = TornadoMiddleware(options)
    try:
        with tornado_server(tornado_application(CASES, log_function=middleware.log_event)) as port:
            for number, case in enumerate(CASES):
                send(port, case, number)
        assert middleware.force_flush(30_000)
    finally:
        middleware.shutdown()


def _outgoing(options: dict[str, Any], sandbox: Sandbox) -> None:
    with wsgi_server(wsgi_app(CASES)) as port, start_capture_outgoing(options) as capture, requests.Session() as session:
        for number, case in enumerate(CASES):
            headers = {**dict(case.request.headers), "X-Case": str(number)}
            session.post(f"http://127.0.0.1:{port}{case.target}", data=case.request.body, headers=headers)
        assert capture.force_flush(30_000)


def _spans(kind: SpanKind) -> Callable[[dict[str, Any], Sandbox], None]:
    def run(options: dict[str, Any], sandbox: Sandbox) -> None:
        provider = TracerProvider(shutdown_on_exit=False)
        exporter = MoesifSpanExporter(**{name.lower(): value for name, value in options.items()})
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        for case in CASES:
            attributes: dict[str, Any] = {"http.request.method": "POST", "url.full": f"https://x.example{case.target}", "http.response.status_code": 200}
            for side, message in (("request", case.request), ("response", case.response)):
                attributes[f"http.{side}.body.content"] = message.body.decode()
                for name, value in message.headers:
                    attributes[f"http.{side}.header.{name.lower()}"] = [value]
            provider.get_tracer("test").start_span("POST", kind=kind, attributes=attributes).end()
        assert exporter.force_flush(30_000)
        provider.shutdown()

    return run


def _otlp(options: dict[str, Any], sandbox: Sandbox) -> None:
    headers = {"X-Moesif-Application-Id": options["APPLICATION_ID"]}
    processor = MoesifSpanProcessor(options, exporter=OTLPSpanExporter(f"{sandbox.url}/v1/traces", headers=headers))
    handle = instrument(options)
    try:
        with wsgi_server(wsgi_app(CASES)) as port:
            for number, case in enumerate(CASES):
                send(port, case, number)
        assert processor.force_flush(30_000)
    finally:
        handle.stop()
        processor.shutdown()


WAYS_IN: dict[str, Callable[[dict[str, Any], Sandbox], None]] = {
    "wsgi": _wsgi,
    "tornado": _tornado,
    "outgoing": _outgoing,
    "server spans": _spans(SpanKind.SERVER),
    "client spans": _spans(SpanKind.CLIENT),
    "otlp": _otlp,
}
_INCOMING = frozenset(WAYS_IN) - {"outgoing", "client spans"}
_OUTGOING = frozenset(WAYS_IN) - _INCOMING


def _true(*_: Any) -> bool:
    return True


def _mask(event: Any) -> Any:
    for part in (event.request, event.response):
        if isinstance(part.body, dict):
            part.body.pop("marked", None)
    return event


class Protecting:
    """An option that protects: what to set it to, what is there without and not with it, at which ways in."""

    def __init__(
        self,
        value: Any,
        *gone: str,
        ways_in: frozenset[str] = frozenset(WAYS_IN),
        refused_by: frozenset[str] = frozenset(),
        without: dict[str, Any] | None = None,
    ) -> None:
        self.value = value
        self.gone = gone
        self.ways_in = ways_in
        self.refused_by = refused_by
        self.without = without or {}


_BODIES = (REQUEST_FIELD, RESPONSE_FIELD)
PROTECTING: dict[str, Protecting] = {
    "SKIP": Protecting(_true, REQUEST_FIELD, REQUEST_HEADER, ways_in=_INCOMING),
    "SKIP_OUTGOING": Protecting(_true, REQUEST_FIELD, REQUEST_HEADER, ways_in=_OUTGOING),
    "MASK_EVENT_MODEL": Protecting(_mask, *_BODIES, refused_by=frozenset({"otlp"})),
    "LOG_BODY": Protecting(False, *_BODIES, ways_in=_INCOMING),
    "LOG_BODY_OUTGOING": Protecting(False, *_BODIES, ways_in=_OUTGOING),
    "REQUEST_MAX_BODY_SIZE": Protecting(10, REQUEST_FIELD),
    "RESPONSE_MAX_BODY_SIZE": Protecting(10, RESPONSE_FIELD),
    "REQUEST_BODY_MASKS": Protecting(["MARKED"], REQUEST_FIELD),
    "RESPONSE_BODY_MASKS": Protecting("Mar_ked", RESPONSE_FIELD),
    "REQUEST_HEADER_MASKS": Protecting(["x-MARKED"], REQUEST_HEADER),
    "RESPONSE_HEADER_MASKS": Protecting(["X_Marked"], RESPONSE_HEADER),
    "AUTO_HIDE_SENSITIVE": Protecting(True, PASSWORD, TOKEN, without={"AUTO_HIDE_SENSITIVE": False}),
    "AUTHORIZATION_HEADER_NAME": Protecting("X-Login", CUSTOM),
    "LOG_BINARY_BODY": Protecting(False, PICTURE, without={"LOG_BINARY_BODY": True}),
}
# Options that take no data away: where it goes, who is named, how much waits how long.
OTHERS = frozenset(
    {
        *("APPLICATION_ID", "BASE_URI", "API_VERSION", "DISABLED_TRANSACTION_ID", "ACCEPT_TRANSACTION_ID", "DEBUG", "AUTHORIZATION_USER_ID_FIELD"),
        *("IDENTIFY_USER", "IDENTIFY_COMPANY", "GET_METADATA", "GET_SESSION_TOKEN", "CAPTURE_OUTGOING_REQUESTS"),
        *("IDENTIFY_USER_OUTGOING", "IDENTIFY_COMPANY_OUTGOING", "GET_METADATA_OUTGOING", "GET_SESSION_TOKEN_OUTGOING"),
        *("EVENT_QUEUE_SIZE", "EVENT_QUEUE_BYTES", "EVENT_WORKER_COUNT", "BATCH_SIZE", "EVENT_BATCH_TIMEOUT"),
        *("EXPORT_TIMEOUT", "SHUTDOWN_TIMEOUT", "SPOOL_DIRECTORY", "SPOOL_MAX_BYTES"),
    }
)


def test_every_option_is_one_or_the_other() -> None:
    """A new option must be sorted into one of the two lists, and so be tried here if it protects."""
    assert PROTECTING.keys() | OTHERS == OPTIONS.keys()
    assert not PROTECTING.keys() & OTHERS


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


def _received(way_in: str, options: dict[str, Any], sandbox: Sandbox) -> str:
    sandbox.clear()
    # Nobody else's calls: each run has an application id of its own.
    WAYS_IN[way_in]({"APPLICATION_ID": uuid.uuid4().hex, "BASE_URI": sandbox.url, "EVENT_BATCH_TIMEOUT": 0.05, **options}, sandbox)
    return json.dumps(sandbox.events())


@pytest.mark.parametrize("way_in", WAYS_IN)
def test_each_protects_at_each_way_in(way_in: str, sandbox: Sandbox) -> None:
    """What it protects is there without it and gone with it; or the way in refuses it."""
    without = {}
    for name, option in PROTECTING.items():
        if way_in not in option.ways_in:
            continue
        if way_in in option.refused_by:
            with pytest.raises(MoesifConfigError, match=name):
                _received(way_in, {name: option.value}, sandbox)
            continue
        key = json.dumps(option.without)
        if key not in without:
            without[key] = _received(way_in, option.without, sandbox)
        assert sorted(found_in(without[key], option.gone)) == sorted(option.gone), f"{name}: not there without it"
        assert found_in(_received(way_in, {name: option.value}, sandbox), option.gone) == [], f"{name}: there with it"


def test_a_processor_and_its_exporter_agree() -> None:
    """Masks that a processor was given and its own exporter was not are no masks: refused, naming the option."""
    exporter = MoesifSpanExporter("agree")
    for name in ("REQUEST_BODY_MASKS", "RESPONSE_BODY_MASKS", "REQUEST_HEADER_MASKS", "RESPONSE_HEADER_MASKS"):
        with pytest.raises(MoesifConfigError, match=name):
            MoesifSpanProcessor({"APPLICATION_ID": "agree", name: ["a"]}, exporter=exporter)
    with pytest.raises(MoesifConfigError, match="MASK_EVENT_MODEL"):
        MoesifSpanProcessor({"APPLICATION_ID": "agree", "MASK_EVENT_MODEL": _mask}, exporter=exporter)
    MoesifSpanProcessor({"APPLICATION_ID": "agree", "BATCH_SIZE": 7}, exporter=exporter).shutdown(100)


def test_what_skip_cannot_be_asked_about_is_said(sandbox: Sandbox) -> None:
    """Spans alone, with SKIP: none is sent, each is counted, and the log says once what to use instead."""
    with Logs().listening() as logs:
        provider = TracerProvider(shutdown_on_exit=False)
        exporter = MoesifSpanExporter("skip", base_uri=sandbox.url, skip=_true)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        for kind in (SpanKind.SERVER, SpanKind.SERVER, SpanKind.CLIENT):
            attributes = {"http.request.method": "GET", "url.full": "https://x.example/"}
            provider.get_tracer("test").start_span("GET", kind=kind, attributes=attributes).end()
        assert exporter.force_flush(30_000)
        provider.shutdown()
    stats = exporter.stats()
    assert (stats["dropped"], stats["delivered"]) == ({"skip_unknown": 2}, 1)
    assert len([line for line in logs.ours if re.search(r"\bSKIP\b", line)]) == 1
