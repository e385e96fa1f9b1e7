"""No planted secret leaves the process: not on the wire, on disk, in logs, metrics, `repr`s or others' spans."""

from __future__ import annotations

import json
import re
import socket
from typing import TYPE_CHECKING, Any

import pytest
import requests
from opentelemetry import metrics as otel_metrics
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind

from moesif_otel import MoesifMiddleware, MoesifSpanExporter, MoesifSpanProcessor, instrument
from moesif_otel._delivery import metrics
from moesif_otel._delivery.metrics import Instruments
from moesif_otel.outgoing import start_capture_outgoing
from moesif_otel.sandbox import Sandbox
from moesif_otel.tornado import MoesifMiddleware as TornadoMiddleware

from .planting import OPTIONS, TAGS, Case, planted_cases, text_for
from .reading import found_in
from .serving import send_all, tornado_application, tornado_server, wsgi_app, wsgi_server
from .watching import Logs, Others, Relay, assert_absent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

APPLICATION_ID = text_for("application id")
USER, COMPANY, SESSION = text_for("user"), text_for("company"), text_for("session")
IDENTITIES = [USER, COMPANY, SESSION]
CALLBACK_ERROR = text_for("what a callback's exception quotes")


class Watch:
    """Everything that leaves during a test but the wire's and the disk's."""

    def __init__(self, logs: Logs, reader: InMemoryMetricReader, capfd: pytest.CaptureFixture[str]) -> None:
        self.logs = logs
        self._reader = reader
        self._capfd = capfd
        self.others = Others()
        self.shown: list[str] = []

    def show(self, *things: Any) -> None:
        """Note how public objects present themselves, and their counters."""
        for thing in things:
            self.shown += [repr(thing), str(thing), f"{thing!a}"]
            if hasattr(thing, "stats"):
                self.shown += [repr(thing.stats()), json.dumps(thing.stats(), default=repr)]

    def assert_silent(self, cases: list[Case]) -> None:
        """Nobody but Moesif may know any of it."""
        secrets = [APPLICATION_ID, CALLBACK_ERROR, *IDENTITIES]
        for case in cases:
            secrets += case.secrets
        assert_absent("logs", self.logs.lines, secrets)
        out, err = self._capfd.readouterr()
        assert_absent("console", out + err, [s for s in secrets if s not in _shown_by_the_application(cases)])
        assert_absent("repr and stats", self.shown, secrets)
        data = self._reader.get_metrics_data()
        assert data is not None
        assert_absent("metrics", data.to_json(), secrets)
        # URLs and exceptions on spans are the application's own telemetry, and the same without us.
        of_the_spans = {secret for case in cases for secret in case.url_secrets}
        assert_absent("other exporters' spans", self.others.everything(), [s for s in secrets if s not in of_the_spans])
        # Controls of bodies and of headers are in no span of others either.
        kept = [control for case in cases for control in case.controls if "?" not in case.target]
        assert_absent("other exporters' spans", self.others.everything(), kept)


def _shown_by_the_application(cases: list[Case]) -> set[str]:
    return {secret for case in cases for secret in case.url_secrets}


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Watch]:
    """Logs, metrics and console from here on."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(metrics, "_instruments", [Instruments(provider)])
    with Logs().listening() as logs:
        yield Watch(logs, reader, capfd)
    provider.shutdown()


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(max_event_age_s=None) as running:
        yield running


@pytest.fixture
def relay(sandbox: Sandbox) -> Iterator[Relay]:
    running = Relay(sandbox.url)
    yield running
    running.close()


def _fail(*_: Any) -> Any:
    try:
        raise KeyError(CALLBACK_ERROR)
    except KeyError as inner:
        raise RuntimeError(f"could not look {CALLBACK_ERROR} up") from inner


def _options(base_uri: str, **more: Any) -> dict[str, Any]:
    return {
        **OPTIONS,
        "APPLICATION_ID": APPLICATION_ID,
        "BASE_URI": base_uri,
        "DEBUG": True,
        "EVENT_BATCH_TIMEOUT": 0.05,
        "SKIP": _fail,
        "SKIP_OUTGOING": _fail,
        "GET_METADATA": _fail,
        "GET_METADATA_OUTGOING": _fail,
        "IDENTIFY_USER": lambda *_: USER,
        "IDENTIFY_COMPANY": lambda *_: COMPANY,
        "GET_SESSION_TOKEN": lambda *_: SESSION,
        "IDENTIFY_USER_OUTGOING": lambda *_: USER,
        "IDENTIFY_COMPANY_OUTGOING": lambda *_: COMPANY,
        "GET_SESSION_TOKEN_OUTGOING": lambda *_: SESSION,
        **more,
    }


def _assert_wire(relay: Relay, cases: list[Case], *, unseen: tuple[str, ...] = ()) -> None:
    """On the wire: the application id in its header alone, no secret anywhere, and every control."""
    sent = relay.sent
    assert sent
    for request in sent:
        ids = [value for name, value in request.headers if name == "x-moesif-application-id"]
        assert ids == [APPLICATION_ID]
    everything = [request.without_header("x-moesif-application-id") for request in sent]
    secrets = [secret for case in cases for secret in case.secrets]
    assert_absent("the wire", everything, [APPLICATION_ID, CALLBACK_ERROR, *secrets])
    events = [request for request in sent if request.body]
    assert_present("the wire", b"\n".join(request.head + b"\r\n\r\n" for request in events), events, [*IDENTITIES, *_controls(cases, unseen)])


def assert_present(where: str, _heads: bytes, events: list[Any], wanted: list[str]) -> None:
    """Each of `wanted` can be read in what was sent."""
    found: set[str] = set()
    for request in events:
        found.update(found_in(request.body, wanted))
    missing = [TAGS.get(one, one) for one in wanted if one not in found]
    assert not missing, f"{where}: not there: {missing}"


def _controls(cases: list[Case], unseen: tuple[str, ...] = ()) -> list[str]:
    return [control for case in cases for control in case.controls if case.name not in unseen]


def test_wsgi(watch: Watch, relay: Relay) -> None:
    """A real WSGI server, with callbacks that fail and quote, and DEBUG on."""
    cases = planted_cases()
    middleware = MoesifMiddleware(wsgi_app(cases), _options(relay.url), watch.others.provider)
    with wsgi_server(middleware) as port:
        send_all(port, cases)
    assert middleware.force_flush(30_000)
    watch.show(middleware, middleware.settings)
    middleware.shutdown()
    stats = middleware.stats()
    assert stats["delivered"] == stats["accepted"] == len(cases)
    _assert_wire(relay, cases)
    watch.assert_silent(cases)
    assert len(watch.others.memory.get_finished_spans()) == len(cases)


def test_tornado(watch: Watch, relay: Relay) -> None:
    """A real Tornado server, likewise."""
    cases = planted_cases()
    middleware = TornadoMiddleware(_options(relay.url), tracer_provider=watch.others.provider)
    with tornado_server(tornado_application(cases, log_function=middleware.log_event)) as port:
        send_all(port, cases)
    assert middleware.force_flush(30_000)
    watch.show(middleware, middleware.settings)
    middleware.shutdown()
    stats = middleware.stats()
    assert stats["delivered"] == stats["accepted"] == len(cases)
    _assert_wire(relay, cases)
    watch.assert_silent(cases)


def test_outgoing(watch: Watch, relay: Relay) -> None:
    """Calls made with `requests`, one of them to nowhere."""
    cases = [case for case in planted_cases() if case.raises is None]
    refused = Case("a call to nowhere", method="GET")
    refused.target = f"/?token={refused.url('a')}"
    with (
        wsgi_server(wsgi_app(cases)) as port,
        start_capture_outgoing(_options(relay.url), tracer_provider=watch.others.provider) as capture,
        requests.Session() as session,
    ):
        for number, case in enumerate(cases):
            body: Any = case.request.body
            response = session.request(
                case.method,
                f"http://127.0.0.1:{port}{case.target}",
                headers={**dict(case.request.headers), "X-Case": str(number)},
                data=(body[at : at + 9] for at in range(0, len(body), 9)) if case.request.chunked else body,
                allow_redirects=False,
                stream=number % 2 == 0,
            )
            assert response.status_code == case.status
            assert response.content or not case.response.body
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            with pytest.raises(requests.ConnectionError):
                session.get(f"http://127.0.0.1:{closed.getsockname()[1]}{refused.target}")
        assert capture.force_flush(30_000)
        watch.show(capture)
    _assert_wire(relay, [*cases, refused])
    watch.assert_silent([*cases, refused])


def test_outgoing_error_pages(watch: Watch, relay: Relay) -> None:
    """Nothing of a failed call's exception, which quotes the whole URL, is in an event or a log."""
    case = Case("a host that is none", method="GET")
    with start_capture_outgoing(_options(relay.url)) as capture:
        with pytest.raises(requests.RequestException):
            requests.get(f"http://user:{case.header('a')}@127.0.0.1:1/x?password={case.url('b')}", timeout=5)
        assert capture.force_flush(30_000)
        watch.show(capture)
    assert_absent("the wire", [one.without_header("x-moesif-application-id") for one in relay.sent], case.secrets)
    watch.assert_silent([case])


def _attributes(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = {
        "http.request.method": case.method,
        "url.full": f"https://x.example{case.target}",
        "url.query": case.target.partition("?")[2],
        "http.response.status_code": case.status,
        "user.id": USER,
        "company.id": COMPANY,
        "session.id": SESSION,
        "app.password": case.body("attribute"),
        "app.note": f"token={case.body('note')}",
        "app.kept": case.kept("attribute"),
    }
    for side, message in (("request", case.request), ("response", case.response)):
        try:
            found[f"http.{side}.body.content"] = message.body.decode()
        except UnicodeDecodeError:
            continue
        for name, value in message.headers:
            key = f"http.{side}.header.{name.lower()}"
            found[key] = [*found.get(key, []), value]
    return found


@pytest.mark.parametrize("kind", [SpanKind.SERVER, SpanKind.CLIENT])
def test_bare_spans(watch: Watch, relay: Relay, kind: SpanKind) -> None:
    """The exporter alone, behind a batch processor, with bodies and headers that somebody else captured."""
    cases = [case for case in planted_cases() if case.raises is None and not case.name.startswith("coded")]
    binary = ("multipart", "JSON under other types", "cut in the middle of a value", "content that is left out")
    cases = [case for case in cases if case.name not in binary]
    keywords = {name.lower(): value for name, value in _options(relay.url).items() if not callable(value)}
    exporter = MoesifSpanExporter(**keywords)
    others = Others()
    others.provider.add_span_processor(BatchSpanProcessor(exporter))
    tracer = others.provider.get_tracer("test")
    for case in cases:
        with tracer.start_as_current_span(f"GET /x?token={case.url('name')}", kind=kind, attributes=_attributes(case)) as span:
            span.record_exception(ValueError(f"no login with password={case.url('exception')}"))
    others.provider.force_flush()
    assert exporter.force_flush(30_000)
    watch.show(exporter, exporter.settings)
    others.provider.shutdown()
    assert exporter.stats()["delivered"] == len(cases)
    # What the cap hides on the wire no cap hides on a span.
    _assert_wire(relay, cases)
    watch.assert_silent(cases)


def test_otlp_copies(watch: Watch, sandbox: Sandbox, relay: Relay) -> None:
    """Captured calls that go to a Collector by OTLP: its protobuf, and what a reader of it finds."""
    cases = planted_cases()
    options = _options(relay.url)
    otlp = OTLPSpanExporter(f"{relay.url}/v1/traces", headers={"X-Moesif-Application-Id": APPLICATION_ID})
    processor = MoesifSpanProcessor(options, exporter=otlp)
    watch.others.provider.add_span_processor(processor)
    tracer = watch.others.provider.get_tracer("test")
    secret_name = Case("a span's own words")

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        # Stands for an instrumentor: the span's name, attributes and events are the application's.
        with tracer.start_as_current_span(
            f"GET /x?token={secret_name.url('name')}",
            kind=SpanKind.SERVER,
            attributes={"http.request.method": environ["REQUEST_METHOD"], "app.password": secret_name.url("attribute")},
        ) as span:
            span.add_event(f"login?password={secret_name.url('event')}", {"detail": f"secret={secret_name.url('detail')}"})
            return wsgi_app(cases)(environ, start_response)

    handle = instrument(options)
    try:
        with wsgi_server(app) as port:
            send_all(port, cases)
        assert processor.force_flush(30_000)
        watch.show(processor, handle)
    finally:
        handle.stop()
        processor.shutdown()
    stats = processor.stats()
    assert stats["delivered"] == stats["accepted"] == len(cases)
    _assert_wire(relay, [*cases, secret_name])
    received = json.dumps(sandbox.events())
    assert_absent("what the Collector reads", received, [s for c in [*cases, secret_name] for s in c.secrets])
    watch.assert_silent([*cases, secret_name])


def test_spool(watch: Watch, tmp_path: Any) -> None:
    """Events that wait on disk are masked; no file or file name tells the application id."""
    cases = planted_cases()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        base_uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        options = _options(base_uri, SPOOL_DIRECTORY=str(tmp_path / "spool"))
        middleware = MoesifMiddleware(wsgi_app(cases), options, watch.others.provider)
        with wsgi_server(middleware) as port:
            send_all(port, cases)
        watch.show(middleware)
        middleware.shutdown(3_000)
    assert middleware.stats()["spooled"] == len(cases)
    files = [path for path in (tmp_path / "spool").rglob("*") if path.is_file()]
    assert files
    secrets = [APPLICATION_ID, CALLBACK_ERROR, *(secret for case in cases for secret in case.secrets)]
    assert_absent("file names", [str(path) for path in files], [*secrets, *IDENTITIES])
    found: set[str] = set()
    for path in files:
        data = path.read_bytes()
        events = list(_events_of(data))
        assert_absent("the spool", [data, *events], secrets)
        for event in events:
            found.update(found_in(event, _controls(cases)))
        assert path.stat().st_mode & 0o077 == 0
    missing = [TAGS.get(one, one) for one in _controls(cases) if one not in found]
    assert not missing
    watch.assert_silent(cases)


def _events_of(data: bytes) -> Iterator[bytes]:
    for match in re.finditer(rb'\{"request":', data):
        text = data[match.start() :].decode("utf-8", "replace")
        event, _ = json.JSONDecoder().raw_decode(text)
        yield json.dumps(event).encode()


def _mask_that_fails(event: Any) -> Any:
    raise ValueError(json.dumps([event.request.headers, event.request.body, event.user_id], default=repr))


def _mask_that_says_nothing(event: Any) -> Any:
    return [event.request.body]


@pytest.mark.parametrize("mask", [_mask_that_fails, _mask_that_says_nothing])
def test_failing_masks(watch: Watch, relay: Relay, mask: Callable[[Any], Any]) -> None:
    """A mask that fails lets no byte of an event out; its exception quotes the event and is not quoted."""
    cases = planted_cases()
    middleware = MoesifMiddleware(wsgi_app(cases), _options(relay.url, MASK_EVENT_MODEL=mask), watch.others.provider)
    with wsgi_server(middleware) as port:
        send_all(port, cases)
    assert middleware.force_flush(30_000)
    watch.show(middleware)
    middleware.shutdown()
    stats = middleware.stats()
    assert stats["dropped"] == {"mask_failed": len(cases)}
    # What is polled from Moesif has no body.
    assert not any(request.body for request in relay.sent)
    assert_absent("logs", watch.logs.lines, _controls(cases))
    watch.assert_silent(cases)
    failures = [line for line in watch.logs.ours if "MASK_EVENT_MODEL" in line and "first call" not in line]
    assert len(failures) == 1
    assert "test_every_byte.py:" in failures[0] or "returned list instead of the event" in failures[0]


def test_global_meters_are_the_applications() -> None:
    """The meters of this test are its own: nothing was set globally."""
    assert not isinstance(otel_metrics.get_meter_provider(), MeterProvider)
