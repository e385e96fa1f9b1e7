"""Captured calls through somebody else's exporter: complete, private, bounded, and delivered although it fails."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

import pytest
import requests
from opentelemetry import context as otel_context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode

from moesif_otel._capture.exchange import Exchange
from moesif_otel._capture.wsgi.capture import WsgiCapture
from moesif_otel._capture.wsgi.span import WsgiServerSpans
from moesif_otel._otlp.sink import http_session
from moesif_otel.errors import MoesifConfigError
from moesif_otel.processor import MoesifSpanProcessor
from moesif_otel.sandbox.server import Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

FAST = {"APPLICATION_ID": "forwarded", "EVENT_BATCH_TIMEOUT": 0.05}


class Recorder(SpanExporter):
    """An exporter that keeps what it gets, and fails as often as it is told."""

    def __init__(self, failures: int = 0) -> None:
        self.batches: list[list[ReadableSpan]] = []
        self.failures = failures
        self.attempts = 0
        self.at_a_time = threading.Lock()
        self.shut_down = False
        self.instrumented: list[bool] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        assert self.at_a_time.acquire(blocking=False), "two exports at a time"
        try:
            self.attempts += 1
            self.instrumented.append(is_instrumentation_enabled())
            if self.failures:
                self.failures -= 1
                return SpanExportResult.FAILURE
            encode_spans(spans)  # what OTLP's encoder refuses costs the whole batch
            self.batches.append(list(spans))
            return SpanExportResult.SUCCESS
        finally:
            self.at_a_time.release()

    def shutdown(self) -> None:
        self.shut_down = True

    @property
    def spans(self) -> list[ReadableSpan]:
        return [span for batch in self.batches for span in batch]


class Caller:
    """A WSGI application behind a capture of ours, on a provider with another exporter."""

    def __init__(self, exporter: SpanExporter, **options: Any) -> None:
        self.exporter = exporter
        self.processor = MoesifSpanProcessor({**FAST, **options}, exporter=exporter)
        self.other = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.other))
        self.provider.add_span_processor(self.processor)
        self.capture = WsgiCapture(self.processor.pipeline)
        self.server_spans = WsgiServerSpans(self.provider, app=self.app, given=True)
        self.answer: bytes = b'{"answer": 42, "password": "hunter2"}'
        self.during: Any = None

    def app(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        environ["wsgi.input"].read()
        if self.during is not None:
            self.during()
        start_response("200 OK", [("Content-Type", "application/json"), ("X-Two", "a"), ("X-Two", "b")])
        return [self.answer]

    def call(self, body: bytes = b'{"question": 6}', **values: str) -> None:
        import io

        environ: dict[str, Any] = {"REQUEST_METHOD": "POST", "PATH_INFO": "/ask", "QUERY_STRING": "x=1", **values}
        setup_testing_defaults(environ)
        environ["wsgi.input"] = io.BytesIO(body)
        environ["CONTENT_LENGTH"] = str(len(body))
        environ["CONTENT_TYPE"] = "application/json"
        token = otel_context.attach(otel_context.Context())
        try:
            assert self.capture.call(self.app, environ, lambda *_: None, spans=self.server_spans) == [self.answer]
        finally:
            otel_context.detach(token)

    def ended(self) -> dict[str, Any]:
        assert self.processor.force_flush(30_000)
        stats = self.processor.stats()
        self.processor.shutdown(1_000)
        return stats


@pytest.fixture
def caller() -> Iterator[Caller]:
    made = Caller(Recorder(), IDENTIFY_USER=lambda *_: "mary")
    yield made
    made.processor.shutdown(500)


def test_the_copy_says_what_was_captured_and_other_exporters_see_nothing_of_it(caller: Caller) -> None:
    """Bodies, headers, identity by the semantic conventions in ours; the span of the others is as it was."""
    caller.call(HTTP_AUTHORIZATION="Bearer secret", HTTP_X_MINE="1")
    assert caller.ended()["delivered"] == 1
    (copy,), (theirs,) = caller.exporter.spans, caller.other.get_finished_spans()  # type: ignore[attr-defined]
    assert copy.context == theirs.context
    assert copy.name == theirs.name
    assert copy.kind is SpanKind.SERVER
    assert copy.resource == theirs.resource
    attributes = dict(copy.attributes or {})
    assert attributes["http.request.method"] == "POST"
    assert (
        attributes["http.request.body.content"] == '{"question":6}'
        or attributes["http.request.body.content"] == '{"question": 6}'
    )
    assert '"answer"' in attributes["http.response.body.content"]
    assert "hunter2" not in str(attributes)
    assert attributes["http.request.header.x-mine"] == ["1"]
    assert "secret" not in str(attributes["http.request.header.authorization"])
    assert attributes["http.response.header.x-two"] == ["a, b"]
    assert attributes["user.id"] == "mary"
    assert attributes["http.response.status_code"] == 200
    text = str(dict(theirs.attributes or {}))
    assert not any(word in text for word in ("question", "answer", "mary", "x-mine"))


def test_a_call_without_a_span_is_forwarded_too(caller: Caller) -> None:
    """Sampled out or never traced: a span made of what was seen."""
    caller.server_spans = None  # type: ignore[assignment]
    caller.call(HTTP_TRACEPARENT="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")
    assert caller.ended()["delivered"] == 1
    (copy,) = caller.exporter.spans  # type: ignore[attr-defined]
    assert copy.context is not None
    assert copy.parent is not None
    assert f"{copy.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{copy.parent.span_id:016x}" == "b7ad6b7169203331"
    assert copy.end_time is not None
    assert copy.end_time >= (copy.start_time or 0)


def test_a_call_that_cannot_be_taken_is_counted(caller: Caller) -> None:
    """What fails before the queue is a drop with a reason, as it is on the way to Moesif itself."""
    exchange = Exchange(caller.processor.pipeline, "Incoming", "GET")
    exchange.request_headers = 5  # type: ignore[assignment]
    caller.processor.pipeline.sink.submit(exchange)
    stats = caller.ended()
    assert stats["dropped"] == {"not_convertible": 1}
    assert stats["errors"] == {"submitting a call": 1}


def test_odd_text_costs_no_batch_and_secrets_in_messages_do_not_leave(caller: Caller) -> None:
    """Lone surrogates in names, exceptions and statuses; a secret in an exception's message and a span's status."""

    def during() -> None:
        from opentelemetry import trace

        span = trace.get_current_span()
        span.update_name("odd \ud800 name")
        span.set_attribute("mine", "odd \udfff value")
        span.record_exception(ValueError('{"password": "hunter2"}'))
        span.add_event("odd \ud800 event", {"text": "\ud800"})
        span.set_status(Status(StatusCode.ERROR, 'bad {"password": "hunter2"}'))

    caller.during = during
    caller.call()
    caller.during = None
    caller.call()
    assert caller.ended()["delivered"] == 2
    first, _ = caller.exporter.spans  # type: ignore[attr-defined]
    everything = str(
        (
            first.name,
            first.status.description,
            dict(first.attributes or {}),
            [(e.name, dict(e.attributes or {})) for e in first.events],
        )
    )
    assert "hunter2" not in everything
    everything.encode()


def test_nothing_of_the_request_is_kept_alive(caller: Caller) -> None:
    """What waits is the plain copy: no Exchange, and the captured bytes are given back."""
    caller.call()
    caller.ended()
    (copy,) = caller.exporter.spans  # type: ignore[attr-defined]
    assert not hasattr(copy, "exchange")
    assert caller.processor.stats()["held_bytes"] == 0


def test_batches_stay_below_what_a_collector_takes() -> None:
    """Large bodies: many small batches, each well below 4 MiB (gRPC's limit) once encoded."""
    recorder = Recorder()
    caller = Caller(recorder, EVENT_BATCH_TIMEOUT=60, BATCH_SIZE=10_000, RESPONSE_MAX_BODY_SIZE=450_000)
    caller.answer = b'"' + b"\xc3\xa9" * 200_000 + b'"'
    for _ in range(30):
        caller.call()
    assert caller.ended()["delivered"] == 30
    sizes = [len(encode_spans(batch).SerializeToString()) for batch in recorder.batches]
    assert len(sizes) >= 3
    assert max(sizes) < 4_194_304


def test_our_threads_trace_nothing_of_the_export() -> None:
    """The exporter runs with instrumentation suppressed, and is shut down with the pipeline."""
    recorder = Recorder()
    caller = Caller(recorder)
    caller.call()
    caller.ended()
    assert recorder.instrumented == [False]
    assert recorder.shut_down


def test_what_an_exporter_fails_to_take_goes_again() -> None:
    """A `FAILURE` without a status is no reason to lose a batch."""
    recorder = Recorder(failures=2)
    caller = Caller(recorder)
    caller.call()
    deadline = time.monotonic() + 30
    while caller.processor.stats()["delivered"] < 1 and time.monotonic() < deadline:
        caller.processor.force_flush(500)
    stats = caller.ended()
    assert (stats["delivered"], stats["dropped"], recorder.attempts) == (1, {}, 3)


def test_a_hung_exporter_does_not_hold_a_flush_or_the_end() -> None:
    """Flush and shutdown keep their deadline; what was not taken is counted."""
    released = threading.Event()

    class Hung(Recorder):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            released.wait(20)
            return SpanExportResult.FAILURE

        def shutdown(self) -> None:
            released.set()

    caller = Caller(Hung())
    caller.call()
    assert not caller.processor.force_flush(200)
    caller.processor.shutdown(300)
    stats = caller.processor.stats()
    assert stats["accepted"] == 1 == sum(stats["dropped"].values())


def test_calls_wait_for_an_exporter_that_fails_however_often(caplog: pytest.LogCaptureFixture) -> None:
    """Thirty failures without a status, each at a flush of its own, lose nothing: what is refused waits.

    The log names the exporter, and not Moesif or an option that has nothing to do with it.
    """
    recorder = Recorder(failures=30)
    caller = Caller(recorder)
    for _ in range(50):
        caller.call()
    for _ in range(40):
        caller.processor.force_flush(50)
        if not recorder.failures:
            break
    deadline = time.monotonic() + 30
    while caller.processor.stats()["delivered"] < 50 and time.monotonic() < deadline:
        caller.processor.force_flush(500)
    stats = caller.ended()
    assert (stats["delivered"], stats["dropped"]) == (50, {})
    line = next(line for line in caplog.messages if "did not answer" in line)
    assert line.startswith("moesif_otel: the exporter Recorder did not answer (Recorder failed): ")
    assert "check its endpoint," in line


def test_what_waits_for_a_hung_exporter_keeps_to_its_bound() -> None:
    """Large headers and bodies, nothing taken: held to EVENT_QUEUE_BYTES; the rest is refused and counted."""
    going_on = threading.Event()

    class Hung(Recorder):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            going_on.wait(20)
            return SpanExportResult.FAILURE

    caller = Caller(Hung(), EVENT_QUEUE_BYTES=1024 * 1024)
    for n in range(60):
        caller.call(b'{"x": "' + b"y" * 20_000 + b'"}', HTTP_X_LARGE=f"{n}" + "z" * 60_000)
    stats = caller.processor.stats()
    assert stats["held_bytes"] <= 1024 * 1024 * 1.25 + 100_000  # the copy's weight is taken with a margin
    assert stats["dropped"]["queue_full"] > 10
    assert stats["accepted"] == 60 == stats["pending"] + sum(stats["dropped"].values())
    going_on.set()
    caller.processor.shutdown(500)


def test_an_exporter_that_takes_its_time_to_flush_and_to_end_does_not_hold_its_caller() -> None:
    """What an exporter does in `force_flush` and `shutdown` is waited for until the deadline, and no longer."""
    going_on = threading.Event()

    class Slow(Recorder):
        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            return going_on.wait(20)

        def shutdown(self) -> None:
            going_on.wait(20)
            super().shutdown()

    recorder = Slow()
    caller = Caller(recorder)
    caller.call()
    assert not caller.processor.force_flush(200)
    caller.processor.shutdown(200)
    assert not going_on.is_set()
    assert not recorder.shut_down
    assert caller.processor.stats()["delivered"] == 1
    going_on.set()


def test_what_an_exporter_raises_when_it_flushes_or_ends_is_counted() -> None:
    """Neither reaches the application."""

    class Broken(Recorder):
        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            raise RuntimeError

        def shutdown(self) -> None:
            raise RuntimeError

    caller = Caller(Broken())
    caller.call()
    stats = caller.ended()
    assert stats["delivered"] == 1
    errors = caller.processor.stats()["errors"]
    assert errors == {"flush of the exporter": 1, "shutdown of the exporter": 1}


@pytest.mark.parametrize(("option", "value"), [("MASK_EVENT_MODEL", lambda e: e), ("SPOOL_DIRECTORY", "spool")])
def test_options_that_cannot_be_honoured_are_refused(option: str, value: Any) -> None:
    """A mask that would never run, or a disk queue that would stay empty, is a mistake to hear of at once."""
    with pytest.raises(MoesifConfigError, match=option):
        MoesifSpanProcessor({**FAST, option: value}, exporter=Recorder())


@pytest.mark.parametrize(("exporter", "got"), [(object(), "object"), (InMemorySpanExporter, "the class InMemorySpanExporter")])
def test_what_is_no_exporter_is_refused_where_it_is_given(exporter: Any, got: str) -> None:
    """A class in the place of its object would otherwise fail at each export, in the background."""
    with pytest.raises(MoesifConfigError, match=f"exporter: got {got}, takes an OpenTelemetry SpanExporter"):
        MoesifSpanProcessor({"APPLICATION_ID": "otlp"}, exporter=exporter)


# With OpenTelemetry's own exporter.


def otlp(url: str, **options: Any) -> OTLPSpanExporter:
    return OTLPSpanExporter(endpoint=f"{url}/v1/traces", headers={"X-Moesif-Application-Id": "otlp"}, **options)


def test_the_http_exporter_has_the_session_that_tells_statuses() -> None:
    """The canary of a half private shape: without it a poisoned batch is given up much later."""
    assert isinstance(http_session(otlp("http://127.0.0.1:9")), requests.Session)
    assert http_session(Recorder()) is None


def test_otlp_reaches_moesif_as_the_same_event() -> None:
    """Over OTLP/HTTP to `/v1/traces`: bodies, identity, status and trace."""
    with Sandbox() as sandbox:
        caller = Caller(otlp(sandbox.url), IDENTIFY_USER=lambda *_: "mary")
        caller.call(HTTP_HOST="api.example")
        assert caller.ended()["delivered"] == 1
        (event,) = sandbox.wait_for_events(1, application_id="otlp")
    assert event["request"]["verb"] == "POST"
    assert event["request"]["uri"] == "http://api.example/ask?x=1"
    assert event["user_id"] == "mary"
    assert event["response"]["status"] == 200
    assert event["request"]["body"] == {"question": 6}
    assert event["response"]["body"]["answer"] == 42
    (span,) = caller.other.get_finished_spans()
    assert span.context is not None
    assert event["trace_id"] == f"{span.context.trace_id:032x}"


def test_a_collector_that_was_away_gets_everything_later() -> None:
    """Refused connections: the batch waits here when the exporter has given up, and arrives once."""
    sandbox = Sandbox().start()
    sandbox.stop()
    caller = Caller(otlp(sandbox.url, timeout=0.3))
    caller.call()
    assert not caller.processor.force_flush(700)
    with sandbox:
        assert caller.processor.force_flush(30_000)
        assert len(sandbox.events()) == 1
        assert caller.ended()["dropped"] == {}


def test_a_collector_that_refuses_for_good_does_not_block_the_queue() -> None:
    """404 to everything: each call is dropped and counted as rejected."""
    with Sandbox() as sandbox:
        caller = Caller(OTLPSpanExporter(endpoint=f"{sandbox.url}/nowhere"))
        for _ in range(3):
            caller.call()
        assert caller.ended()["dropped"] == {"rejected": 3}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_connections_of_its_own() -> None:
    """Parent and child both deliver after a fork over a connection that was open before it."""
    with Sandbox() as sandbox:
        caller = Caller(otlp(sandbox.url))
        caller.call()
        assert caller.processor.force_flush(30_000)
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside threads; servers fork all the same.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            done = b"0"
            try:
                caller.call()
                done = b"1" if caller.processor.force_flush(8_000) else b"0"
            finally:
                os.write(writing, done)
                os._exit(0)
        caller.call()
        assert caller.processor.force_flush(30_000)
        assert os.read(reading, 1) == b"1"
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)
        assert len(sandbox.wait_for_events(3)) == 3
        assert caller.ended()["delivered"] == 2


def test_the_first_export_imports_nothing() -> None:
    """A child that is forked while our sender imports a module waits for it at its own first request, for ever."""
    program = (
        "import sys, moesif_otel._otlp.sink, requests\n"
        "before = set(sys.modules)\n"
        "requests.utils.get_netrc_auth('http://localhost/')\n"
        "print(set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
