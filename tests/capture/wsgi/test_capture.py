"""The WSGI capture: client and application see what they would see without it, and the call is noted."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import json
import weakref
from typing import Any
from wsgiref.handlers import SimpleHandler
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import pytest
from opentelemetry import baggage, propagate, trace
from opentelemetry import context as otel_context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from moesif_otel._capture.exchange import Decision, Outcome, current_exchange
from moesif_otel._capture.wsgi import capture as wsgi_capture
from moesif_otel._capture.wsgi import span as wsgi_span
from moesif_otel._capture.wsgi.capture import WsgiCapture
from moesif_otel._capture.wsgi.span import WsgiServerSpans
from tests.recording import RecordingPipeline


def make_environ(body: bytes = b"", **values: Any) -> dict[str, Any]:
    environ: dict[str, Any] = {"SCRIPT_NAME": "", "REMOTE_ADDR": "10.0.0.9", "PATH_INFO": "/items", "QUERY_STRING": "a=1"}
    setup_testing_defaults(environ)
    if body:
        environ["REQUEST_METHOD"] = "POST"
        environ["CONTENT_LENGTH"] = str(len(body))
        environ["CONTENT_TYPE"] = "application/json"
    environ["wsgi.input"] = io.BytesIO(body)
    environ.update(values)
    return environ


class Server:
    """What a WSGI server does with a result, with everything it sees kept."""

    def __init__(self) -> None:
        self.status: str | None = None
        self.headers: list[tuple[str, str]] | None = None
        self.arguments: tuple[Any, ...] = ()
        self.written: list[bytes] = []

    def start_response(self, *arguments: Any) -> Any:
        self.arguments = arguments
        self.status, self.headers = arguments[:2]
        return self.written.append

    def run(self, call: Any, environ: dict[str, Any]) -> bytes:
        result = call(environ, self.start_response)
        try:
            return b"".join(self.written) + b"".join(result)
        finally:
            if hasattr(result, "close"):
                result.close()


def captured(app: Any, pipeline: RecordingPipeline, **options: Any) -> Any:
    spans = options.pop("spans", None)
    capture = WsgiCapture(pipeline, **options)
    return lambda environ, start_response: capture.call(app, environ, start_response, spans=spans)


def simple_app(environ: dict[str, Any], start_response: Any) -> Any:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello ", b"world"]


@pytest.fixture(params=["no spans", "spans"])
def spans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "no spans":
        return None
    # Another test of the process may have loaded one; here nobody else makes spans.
    monkeypatch.setattr(wsgi_span.WsgiServerSpans, "instrumentations", ())
    provider = TracerProvider(shutdown_on_exit=False)
    provider.finished = InMemorySpanExporter()  # type: ignore[attr-defined]
    provider.add_span_processor(SimpleSpanProcessor(provider.finished))  # type: ignore[attr-defined]
    made = WsgiServerSpans(provider, app=simple_app, given=True)
    made_provider[made] = provider.finished  # type: ignore[attr-defined]
    return made


made_provider: dict[Any, InMemorySpanExporter] = {}


def test_a_list_reaches_the_server_as_the_same_object(spans: Any) -> None:
    """A list or tuple result is returned as it is, captured, and complete at return."""
    for result in ([b"a", b"b"], (b"ab",)):
        pipeline = RecordingPipeline()

        def app(environ: Any, start_response: Any, result: Any = result) -> Any:
            start_response("201 Created", [("X-One", "1"), ("X-One", "2")])
            return result

        server = Server()
        assert captured(app, pipeline, spans=spans)(make_environ(), server.start_response) is result
        assert server.arguments == ("201 Created", [("X-One", "1"), ("X-One", "2")])
        (call,) = pipeline.calls
        assert call.outcome is Outcome.COMPLETE
        assert call.status == 201
        assert call.response_headers == [("X-One", "1"), ("X-One", "2")]
        assert call.response_body.data() == b"ab"
        assert call.url == "http://127.0.0.1/items?a=1"
        assert pipeline.guard.counts() == {}


def test_a_stream_leaves_piece_by_piece(spans: Any) -> None:
    """Each piece is sent on when the application yields it, none is asked for ahead of the server."""
    pipeline, steps = RecordingPipeline(), []

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        for piece in (b"one", b"", b"two"):
            steps.append(piece)
            yield piece

    server = Server()
    result = captured(app, pipeline, spans=spans)(make_environ(), server.start_response)
    assert steps == []
    iterator = iter(result)
    assert next(iterator) == b"one"
    assert steps == [b"one"]
    assert server.status == "200 OK"
    assert pipeline.calls == []
    assert list(iterator) == [b"", b"two"]
    (call,) = pipeline.calls
    result.close()
    assert pipeline.calls == [call]
    assert call.outcome is Outcome.COMPLETE
    assert call.response_body.data() == b"onetwo"


def test_a_joined_response_is_whole() -> None:
    """`b"".join(response)` asks twice for an iterator before the first piece; an iterable that can be used once is."""

    class Once:
        def __init__(self) -> None:
            self.pieces = [b"one ", b"two"]

        def __iter__(self) -> Any:
            pieces, self.pieces = self.pieces, []
            return iter(pieces)

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return Once()

    pipeline = RecordingPipeline()
    response = captured(app, pipeline)(make_environ(), Server().start_response)
    assert b"".join(response) == b"one two"
    assert pipeline.calls[0].response_body.data() == b"one two"


def test_the_contexts_are_the_applications_own_between_the_steps(spans: Any) -> None:
    """Code in a generator sees the Exchange (and the span), the server's thread is clean between steps."""
    pipeline, seen = RecordingPipeline(), []

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        seen.append((current_exchange.get(), trace.get_current_span().get_span_context().is_valid))
        yield b"x"
        seen.append((current_exchange.get(), trace.get_current_span().get_span_context().is_valid))

    result = captured(app, pipeline, spans=spans)(make_environ(), Server().start_response)
    iterator = iter(result)
    next(iterator)
    assert current_exchange.get() is None
    assert not trace.get_current_span().get_span_context().is_valid
    assert list(iterator) == []
    result.close()
    assert seen == [(pipeline.calls[0], spans is not None), (pipeline.calls[0], spans is not None)]


def test_close_reaches_the_application_as_often_as_the_server_calls_it() -> None:
    """Closing midway is the client leaving: `close()` passes, the call is recorded as aborted, once."""
    pipeline, closes = RecordingPipeline(), []

    class Body:
        def __iter__(self) -> Any:
            return iter([b"a", b"b"])

        def close(self) -> None:
            closes.append(1)

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return Body()

    result = captured(app, pipeline)(make_environ(), Server().start_response)
    assert next(iter(result)) == b"a"
    result.close()
    assert closes == [1]
    assert [call.outcome for call in pipeline.calls] == [Outcome.ABORTED]
    result.close()
    assert closes == [1, 1]
    assert len(pipeline.calls) == 1


def test_close_before_the_first_step_closes_a_generator(spans: Any) -> None:
    """A server that closes without iterating has the application's object closed, and the span ends."""
    pipeline, closes = RecordingPipeline(), []

    class Body:
        def __iter__(self) -> Any:
            raise AssertionError

        def close(self) -> None:
            closes.append(1)

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return Body()

    captured(app, pipeline, spans=spans)(make_environ(), Server().start_response).close()
    assert closes == [1]
    assert [call.outcome for call in pipeline.calls] == [Outcome.ABORTED]
    if spans is not None:
        assert len(made_provider[spans].get_finished_spans()) == 1


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(3), KeyboardInterrupt()])
def test_an_exception_passes_unchanged(spans: Any, error: BaseException) -> None:
    """What the application raises is what the server catches; without a sent status the call has none."""
    pipeline = RecordingPipeline()

    def app(environ: Any, start_response: Any) -> Any:
        raise error

    with pytest.raises(type(error)) as caught:
        captured(app, pipeline, spans=spans)(make_environ(), Server().start_response)
    assert caught.value is error
    (call,) = pipeline.calls
    assert (call.outcome, call.error_type, call.status) == (Outcome.FAILED, type(error).__qualname__, None)
    assert current_exchange.get() is None
    if spans is not None:
        (span,) = made_provider[spans].get_finished_spans()
        assert span.kind is SpanKind.SERVER


def test_an_exception_midway_keeps_the_status_that_was_sent(spans: Any) -> None:
    """After the first piece the client has seen 200; before it the server answers 500 in its place."""
    for pieces, status in (([b"first"], 200), ([b""], None), ([], None)):
        pipeline = RecordingPipeline()

        def app(environ: Any, start_response: Any, pieces: Any = pieces) -> Any:
            start_response("200 OK", [("X-A", "b")])
            yield from pieces
            raise ValueError("midway")

        with pytest.raises(ValueError, match="midway"):
            Server().run(captured(app, pipeline, spans=spans), make_environ())
        (call,) = pipeline.calls
        assert (call.outcome, call.status) == (Outcome.FAILED, status)


def test_write_is_passed_on_and_captured() -> None:
    """The callable that `start_response` gives works as the server's, and its bytes are captured."""
    pipeline = RecordingPipeline()

    def app(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", [])
        write(b"written ")
        return [b"returned"]

    assert Server().run(captured(app, pipeline), make_environ()) == b"written returned"
    assert pipeline.calls[0].response_body.data() == b"written returned"


def test_a_late_start_response_works(spans: Any) -> None:
    """A generator may call `start_response` at its first step, with a status that has no phrase."""
    pipeline = RecordingPipeline()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("202", [])
        yield b"late"

    server = Server()
    assert server.run(captured(app, pipeline, spans=spans), make_environ()) == b"late"
    assert server.status == "202"
    assert pipeline.calls[0].status == 202
    assert pipeline.guard.counts() == {}


def test_start_response_again_with_exc_info_replaces_the_status() -> None:
    """The second call reaches the server with its `exc_info`, and is the status on record."""
    pipeline, server = RecordingPipeline(), Server()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        start_response("500 Oops", [("X-B", "c")], (ValueError, ValueError(), None))
        return [b"error page"]

    server.run(captured(app, pipeline), make_environ())
    assert server.arguments[0] == "500 Oops"
    assert server.arguments[2][0] is ValueError
    assert pipeline.calls[0].status == 500


def test_a_file_reaches_the_server_as_it_is(spans: Any) -> None:
    """A `wsgi.file_wrapper` result is the very object; its size is known from `Content-Length`."""
    pipeline = RecordingPipeline()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Length", "4")])
        return environ["wsgi.file_wrapper"](io.BytesIO(b"file"))

    environ = make_environ(**{"wsgi.file_wrapper": FileWrapper})
    result = captured(app, pipeline, spans=spans)(environ, Server().start_response)
    assert type(result) is FileWrapper
    (call,) = pipeline.calls
    assert (call.response_body.total_bytes, call.response_body.kept_bytes) == (4, 0)
    if spans is not None:
        assert len(made_provider[spans].get_finished_spans()) == 1


def test_a_result_with_a_length_keeps_it() -> None:
    """Servers derive `Content-Length` from `len(result) == 1`; a list subclass must not lose that, nor its close."""
    pipeline, closes = RecordingPipeline(), []

    class Closing(list):  # type: ignore[type-arg]
        def close(self) -> None:
            closes.append(1)

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return Closing([b"one"])

    result = captured(app, pipeline)(make_environ(), Server().start_response)
    assert len(result) == 1
    assert list(result) == [b"one"]
    result.close()
    assert closes == [1]


def test_a_dropped_response_is_recorded_by_the_finalizer(spans: Any) -> None:
    """A response that the server forgets is handed to our thread; no error, no span left open."""
    pipeline = RecordingPipeline()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        yield b"a"
        yield b"b"

    result = captured(app, pipeline, spans=spans)(make_environ(), Server().start_response)
    next(iter(result))
    del result
    gc.collect()
    (call,) = pipeline.late_calls()
    assert call.outcome is Outcome.DROPPED
    if spans is not None:
        assert made_provider[spans].get_finished_spans() == ()
        call.closing()
        assert len(made_provider[spans].get_finished_spans()) == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda stream: stream.read(),
        lambda stream: b"".join(iter(lambda: stream.read(3), b"")),
        lambda stream: b"".join(iter(stream.readline, b"")),
        lambda stream: b"".join(stream.readlines()),
        lambda stream: b"".join(stream),
        lambda stream: io.BufferedReader(stream).read() if hasattr(stream, "readable") else stream.read(),
        lambda stream: stream.read(4) + (stream.seek(0), stream.read())[1][4:],
    ],
)
def test_the_application_reads_its_input_in_any_way(read: Any) -> None:
    """read, read(n), readline, readlines, iteration, readinto and seeking back give the bytes, captured once."""
    body, pipeline, got = b'{"a": 1}\n{"b": 2}\nend', RecordingPipeline(), []

    def app(environ: Any, start_response: Any) -> Any:
        got.append(read(environ["wsgi.input"]))
        start_response("200 OK", [])
        return []

    Server().run(captured(app, pipeline), make_environ(body))
    assert got == [body]
    assert pipeline.calls[0].request_body.data() == body


def test_an_input_that_is_not_read_is_not_read_for_us() -> None:
    """An upload the application refuses stays in the socket."""
    pipeline = RecordingPipeline()

    class Refused(io.BytesIO):
        def read(self, *size: Any) -> bytes:
            raise AssertionError

        readline = readlines = __iter__ = __next__ = read  # type: ignore[assignment]

    environ = make_environ(b"x" * 100)
    environ["wsgi.input"] = Refused()
    assert Server().run(captured(simple_app, pipeline), environ) == b"hello world"
    assert pipeline.calls[0].request_body.total_bytes == 0


def test_bodies_are_capped_and_their_true_size_is_known() -> None:
    """The first part is kept, up to the option's bytes; the rest is counted."""
    pipeline = RecordingPipeline(REQUEST_MAX_BODY_SIZE=4, RESPONSE_MAX_BODY_SIZE=6)

    def app(environ: Any, start_response: Any) -> Any:
        environ["wsgi.input"].read()
        start_response("200 OK", [])
        yield b"1234"
        yield b"5678"

    Server().run(captured(app, pipeline), make_environ(b"abcdefgh"))
    (call,) = pipeline.calls
    assert (call.request_body.data(), call.request_body.total_bytes) == (b"abcd", 8)
    assert (call.response_body.data(), call.response_body.total_bytes) == (b"123456", 8)
    assert pipeline.budget.held_bytes == 10


def test_log_body_false_touches_no_body() -> None:
    """Without LOG_BODY the application has the server's own input, and nothing of a body is kept."""
    pipeline, inputs = RecordingPipeline(LOG_BODY=False), []

    def app(environ: Any, start_response: Any) -> Any:
        inputs.append(environ["wsgi.input"])
        return simple_app(environ, start_response)

    environ = make_environ(b"secret")
    original = environ["wsgi.input"]
    Server().run(captured(app, pipeline), environ)
    assert inputs == [original]
    assert pipeline.calls[0].request_body is None
    assert pipeline.calls[0].response_body is None


def test_validator_is_clean_on_both_sides(spans: Any) -> None:
    """Wsgiref's validator finds nothing wrong between server and capture, nor between capture and application."""
    pipeline = RecordingPipeline()

    def app(environ: Any, start_response: Any) -> Any:
        assert environ["wsgi.input"].read(5) == b"hello"
        start_response("200 OK", [("Content-Type", "text/plain")])
        return iter([b"a", b"b"])

    call = validator(captured(validator(app), pipeline, spans=spans))
    assert Server().run(call, make_environ(b"hello")) == b"ab"
    assert len(pipeline.calls) == 1
    assert pipeline.guard.counts() == {}


def test_the_transaction_id_header_is_appended_to_a_copy() -> None:
    """The header comes last; the application's own list and its own header of that name stay as they are."""
    pipeline, server = RecordingPipeline(), Server()
    headers = [("Content-Type", "text/plain")]

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", headers)
        return []

    server.run(captured(app, pipeline, transaction_id=lambda exchange: "the-id"), make_environ())
    assert server.headers == [("Content-Type", "text/plain"), ("X-Moesif-Transaction-Id", "the-id")]
    assert headers == [("Content-Type", "text/plain")]
    headers.append(("x-moesif-transaction-id", "mine"))
    server.run(captured(app, pipeline, transaction_id=lambda exchange: "the-id"), make_environ())
    assert server.headers == headers


def test_one_call_is_captured_once_for_each_application_id() -> None:
    """A second capture of the same id passes through, one of another id captures, a middleware replaces a provisional capture."""
    one, two = RecordingPipeline(), RecordingPipeline(APPLICATION_ID="two")
    Server().run(captured(captured(captured(simple_app, one), two), one), make_environ())
    assert (len(one.calls), len(two.calls)) == (1, 1)
    outer, inner = RecordingPipeline(), RecordingPipeline()
    Server().run(captured(captured(simple_app, inner), outer, provisional=True), make_environ())
    assert (len(outer.calls), len(outer.superseded_calls), len(inner.calls)) == (0, 1, 1)


def test_an_error_of_ours_leaves_the_application_alone() -> None:
    """Whatever breaks inside the capture, the client gets the application's answer, and the error is counted."""
    pipeline = RecordingPipeline()
    pipeline.opened = lambda exchange: None  # type: ignore[method-assign]

    class Broken:
        def start(self, environ: Any) -> Any:
            raise RuntimeError

        def observe(self, exchange: Any, path: Any, *, made: bool) -> None:
            raise RuntimeError

    assert Server().run(captured(simple_app, pipeline, spans=Broken()), make_environ()) == b"hello world"
    assert pipeline.guard.counts() == {"the SERVER span of a call": 2}
    pipeline.budget = None  # type: ignore[assignment]
    assert Server().run(captured(simple_app, pipeline), make_environ(b"in")) == b"hello world"
    assert sum(pipeline.guard.counts().values()) > 2


def test_callbacks_find_what_moesifwsgi_documents() -> None:
    """Response headers are an argument; the three environ keys are there, the request body parsed when looked at."""
    pipeline = RecordingPipeline()
    pipeline.callbacks_wanted = True

    def app(environ: Any, start_response: Any) -> Any:
        environ["wsgi.input"].read()
        start_response("200 OK", [("X-User", "u1")])
        return [b"out"]

    Server().run(captured(app, pipeline), make_environ(b'{"name": "n"}'))
    arguments = pipeline.calls[0].identify_arguments
    assert arguments[2] == {"X-User": "u1"}
    environ = arguments[1]
    assert environ["moesif.request_body"]["name"] == "n"
    assert environ["moesif.response_body_chunks"] == [b"out"]
    assert environ["moesif.response_headers"] == {"X-User": "u1"}


def test_a_blocked_call_is_answered_without_the_application() -> None:
    """The rule's status, headers and body reach the client; the application is not called; the call is on record."""
    pipeline, server, called = RecordingPipeline(), Server(), []
    pipeline.decision = lambda exchange, read: Decision(
        blocked=True, status=429, headers=[("X-Q", "1"), ("Content-Length", "2")], body=b"{}", blocked_by="r1"
    )
    call = captured(lambda environ, start_response: called.append(1), pipeline)
    assert server.run(call, make_environ()) == b"{}"
    assert (server.status, server.headers) == ("429 Too Many Requests", [("X-Q", "1"), ("Content-Length", "2")])
    assert called == []
    (exchange,) = pipeline.calls
    assert (exchange.status, exchange.response_body.data()) == (429, b"{}")
    assert server.run(call, make_environ(REQUEST_METHOD="HEAD")) == b""


def test_a_rules_headers_come_behind_the_applications() -> None:
    """Order and repetition of the application's own headers stay as they are."""
    pipeline, server = RecordingPipeline(), Server()
    pipeline.decision = lambda exchange, read: Decision(
        blocked=False, status=0, headers=[("X-Plan", "gold")], body=None, blocked_by=None
    )

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Set-Cookie", "a=1"), ("X", "y"), ("Set-Cookie", "b=2")])
        return [b""]

    server.run(captured(app, pipeline), make_environ())
    assert server.headers == [("Set-Cookie", "a=1"), ("X", "y"), ("Set-Cookie", "b=2"), ("X-Plan", "gold")]
    assert pipeline.calls[0].response_headers == server.headers


def test_a_rule_may_look_into_the_body_first() -> None:
    """What was read for a rule is what the application reads, and is captured once."""
    pipeline, got = RecordingPipeline(), []
    pipeline.decision = lambda exchange, read: got.append(read())

    def app(environ: Any, start_response: Any) -> Any:
        got.append(environ["wsgi.input"].read(4))
        start_response("200 OK", [])
        return []

    class Socket:
        def __init__(self, data: bytes) -> None:
            self.read = io.BytesIO(data).read

    environ = make_environ(b"body")
    environ["wsgi.input"] = Socket(b"body")
    Server().run(captured(app, pipeline), environ)
    assert got == [b"body", b"body"]
    assert (pipeline.calls[0].request_body.data(), pipeline.calls[0].request_body.total_bytes) == (b"body", 4)


def test_a_mark_that_is_no_response_comes_back_as_it_is() -> None:
    """Gunicorn's gevent worker knows `ALREADY_HANDLED`, a bare `object()`, by identity."""
    mark = object()
    for upgrade, outcome, status in ((True, Outcome.UPGRADED, 101), (False, Outcome.COMPLETE, None)):
        pipeline = RecordingPipeline()
        environ = make_environ(HTTP_UPGRADE="websocket", HTTP_CONNECTION="keep-alive, Upgrade") if upgrade else make_environ()
        assert captured(lambda *_: mark, pipeline)(environ, Server().start_response) is mark
        (call,) = pipeline.calls
        assert (call.outcome, call.status) == (outcome, status)
        assert pipeline.guard.counts() == {}


@pytest.mark.parametrize("how", [StopIteration, ConnectionError, None])
def test_a_websocket_is_an_upgrade(how: Any) -> None:
    """Flask-Sock and Flask-SocketIO answer on the connection itself and end by an exception or an empty response."""
    pipeline = RecordingPipeline()

    def app(environ: Any, start_response: Any) -> Any:
        if how is not None:
            raise how
        return []

    environ = make_environ(HTTP_UPGRADE="websocket", HTTP_CONNECTION="Upgrade")
    if how is None:
        assert captured(app, pipeline)(environ, Server().start_response) == []
    else:
        with pytest.raises(how):
            captured(app, pipeline)(environ, Server().start_response)
    (call,) = pipeline.calls
    assert (call.outcome, call.status) == (Outcome.UPGRADED, 101)
    # Any other exception, or a response, is what it says.
    pipeline = RecordingPipeline()
    environ = make_environ(HTTP_UPGRADE="websocket", HTTP_CONNECTION="Upgrade")
    with pytest.raises(ZeroDivisionError):
        captured(lambda *_: 1 / 0, pipeline)(environ, Server().start_response)
    assert pipeline.calls[0].outcome is Outcome.FAILED
    Server().run(captured(simple_app, pipeline), environ)
    assert (pipeline.calls[1].outcome, pipeline.calls[1].status) == (Outcome.COMPLETE, 200)


def test_a_generator_keeps_its_own_context_between_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Span and baggage that it made current are there at its next step; the server's thread is clean between."""
    monkeypatch.setattr(wsgi_span.WsgiServerSpans, "instrumentations", ())
    provider = TracerProvider(shutdown_on_exit=False)
    seen: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        token = otel_context.attach(baggage.set_baggage("tenant", "acme"))
        with provider.get_tracer("app").start_as_current_span("inner") as span:
            yield b"a"
            seen.append((trace.get_current_span() is span, baggage.get_baggage("tenant")))
            yield b"b"
        otel_context.detach(token)
        seen.append((trace.get_current_span().get_span_context().span_id != 0, baggage.get_baggage("tenant")))

    pipeline = RecordingPipeline()
    spans = WsgiServerSpans(provider, app=app, given=True)
    for piece in captured(app, pipeline, spans=spans)(make_environ(), Server().start_response):
        seen.append(piece)
        assert not trace.get_current_span().get_span_context().is_valid
        assert baggage.get_baggage("tenant") is None
    assert seen == [b"a", (True, "acme"), b"b", (True, None)]


def test_only_the_span_joins_the_applications_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's baggage and trace state do not go out with the application's own calls, as without us."""
    monkeypatch.setattr(wsgi_span.WsgiServerSpans, "instrumentations", ())
    provider = TracerProvider(shutdown_on_exit=False)
    carriers: list[dict[str, str]] = []

    def app(environ: Any, start_response: Any) -> Any:
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        carriers.append(carrier)
        return simple_app(environ, start_response)

    environ = make_environ(
        HTTP_TRACEPARENT="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", HTTP_BAGGAGE="tenant=evil"
    )
    pipeline = RecordingPipeline()
    spans = WsgiServerSpans(provider, app=app, given=True)
    Server().run(captured(app, pipeline, spans=spans), environ)
    assert set(carriers[0]) == {"traceparent"}
    assert carriers[0]["traceparent"].startswith("00-0af7651916cd43dd8448eb211c80319c-")


def test_a_call_in_flight_at_a_shutdown_ends_its_span(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Exchange ends with the pipeline, the span when the application has ended: its children are no orphans."""
    monkeypatch.setattr(wsgi_span.WsgiServerSpans, "instrumentations", ())
    provider = TracerProvider(shutdown_on_exit=False)
    finished = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(finished))
    pipeline = RecordingPipeline()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        yield b"a"
        yield b"b"

    spans = WsgiServerSpans(provider, app=app, given=True)
    result = captured(app, pipeline, spans=spans)(make_environ(), Server().start_response)
    iterator = iter(result)
    next(iterator)
    pipeline.open[0].finish(Outcome.UNFINISHED)
    assert list(iterator) == [b"b"]
    result.close()
    assert len(finished.get_finished_spans()) == 1
    assert len(pipeline.calls) == 1


@pytest.mark.parametrize("result", [list, iter], ids=["list", "stream"])
def test_what_is_no_text_costs_nothing_but_itself(result: Any) -> None:
    """Header values and environ keys of other types, pieces that are no bytes: no error, and the rest is recorded."""
    pipeline, server = RecordingPipeline(), Server()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Length", 5), ("X-A", "b"), (b"X-Bytes", None)])
        return result([b"he", None, 7, bytearray(b"llo"), object()])

    environ = make_environ(HTTP_X_NUMBER=5)
    environ[7] = environ["wsgi", "tuple"] = "odd"  # type: ignore[index]
    call = captured(app, pipeline, transaction_id=lambda exchange: "the-id")
    got = call(environ, server.start_response)
    assert [type(piece) for piece in got] == [bytes, type(None), int, bytearray, object]
    getattr(got, "close", lambda: None)()
    (exchange,) = pipeline.calls
    assert exchange.response_body.data() == b"hello"
    assert ("Content-Length", "5") in exchange.response_headers
    assert ("X-A", "b") in exchange.response_headers
    assert ("X-Number", "5") in exchange.request_headers
    assert pipeline.guard.counts() == {}
    assert (exchange.outcome, exchange.status) == (Outcome.COMPLETE, 200)


def test_a_number_as_content_length_is_a_whole_body() -> None:
    """Werkzeug takes it; closing after so many bytes is no abort."""
    pipeline = RecordingPipeline()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Length", 5)])
        yield b"hello"
        yield b""

    result = captured(app, pipeline)(make_environ(), Server().start_response)
    next(iter(result))
    result.close()
    assert pipeline.calls[0].outcome is Outcome.COMPLETE


def test_an_answer_that_is_iterable_twice_stays_so() -> None:
    """Whoever goes over it again gets it again; the first pass is the one on record."""
    pipeline = RecordingPipeline()

    class Twice:
        def __iter__(self) -> Any:
            return iter([b"a", b"b"])

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return Twice()

    result = captured(app, pipeline)(make_environ(), Server().start_response)
    assert b"".join(iter(result)) == b"".join(result) == b"ab"
    assert pipeline.calls[0].response_body.data() == b"ab"


def test_a_frameworks_own_answer_comes_back_as_it_is() -> None:
    """Django's `bytes(application(environ, start_response))`: the very object, captured at once."""

    class HttpResponse:
        streaming = False
        content = b"whole"
        closed = 0

        def __iter__(self) -> Any:
            return iter([self.content])

        def __bytes__(self) -> bytes:
            return self.content

        def close(self) -> None:
            self.closed += 1

    pipeline, response = RecordingPipeline(), HttpResponse()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return response

    assert captured(app, pipeline)(make_environ(), Server().start_response) is response
    assert bytes(response) == b"whole"
    (call,) = pipeline.calls
    assert (call.response_body.data(), call.outcome, response.closed) == (b"whole", Outcome.COMPLETE, 0)


def test_what_an_answer_does_when_it_is_looked_at_is_its_own_affair() -> None:
    """Attributes that raise: the server gets the pieces, the call is recorded, nothing of ours fails."""

    class Bomb:
        @property
        def streaming(self) -> bool:
            raise RuntimeError

        content = b"never"

        def __getattr__(self, name: str) -> Any:
            if name == "close":
                raise AttributeError
            raise KeyError(name)

        def __iter__(self) -> Any:
            return iter([b"piece"])

    pipeline = RecordingPipeline()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return Bomb()

    assert list(captured(app, pipeline)(make_environ(), Server().start_response)) == [b"piece"]
    (call,) = pipeline.calls
    assert call.response_body.data() == b"piece"
    assert pipeline.guard.counts() == {}


@pytest.mark.parametrize("pieces", [[b"hello"], []], ids=["body", "no body"])
@pytest.mark.parametrize("result", [list, iter], ids=["list", "stream"])
def test_a_header_added_after_start_response_is_sent(result: Any, pieces: list[bytes]) -> None:
    """Wsgiref sends the very list that it was given, at the first piece; with our own header it gets another list."""
    pipeline = RecordingPipeline()

    def app(environ: Any, start_response: Any) -> Any:
        headers = [("Content-Type", "text/plain")]
        start_response("200 OK", headers)
        headers.append(("X-Late", "yes"))
        return result(pieces)

    stdout = io.BytesIO()
    handler = SimpleHandler(io.BytesIO(), stdout, io.StringIO(), make_environ())
    handler.run(captured(app, pipeline, transaction_id=lambda exchange: "the-id"))
    sent = stdout.getvalue()
    assert b"X-Late: yes\r\n" in sent
    assert b"X-Moesif-Transaction-Id: the-id\r\n" in sent
    assert ("X-Late", "yes") in pipeline.calls[0].response_headers


def test_each_try_of_a_retrying_middleware_is_a_call() -> None:
    """An environ that has been used before is captured again, its input too, once the first try is over."""
    pipeline, tries = RecordingPipeline(), []

    def app(environ: Any, start_response: Any) -> Any:
        tries.append(environ["wsgi.input"].read(2))
        start_response("500 Oops" if len(tries) == 1 else "200 OK", [])
        return [b"x"]

    call = captured(app, pipeline)
    environ = make_environ(b"abcd")
    Server().run(call, environ)
    Server().run(call, environ)
    assert [one.status for one in pipeline.calls] == [500, 200]
    assert [one.request_body.data() for one in pipeline.calls] == [b"ab", b"cd"]


def test_two_pipelines_around_one_application_read_along() -> None:
    """Both have the request body, at each try of a middleware between them; the application sees the server's input."""
    outer, inner = RecordingPipeline(), RecordingPipeline(APPLICATION_ID="another")
    seen: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        stream = environ["wsgi.input"]
        seen.append((isinstance(stream, io.BytesIO), stream.read(2)))
        start_response("200 OK", [])
        return [b"x"]

    call = captured(app, inner)

    def twice(environ: Any, start_response: Any) -> Any:
        Server().run(call, environ)
        return call(environ, start_response)

    environ = make_environ(b"abcd")
    Server().run(captured(twice, outer), environ)
    assert seen == [(True, b"ab"), (True, b"cd")]
    assert [one.request_body.data() for one in outer.calls] == [b"abcd"]
    assert [one.request_body.data() for one in inner.calls] == [b"ab", b"cd"]


def test_callbacks_get_the_path_as_the_server_gave_it() -> None:
    """Routers move parts of PATH_INFO to SCRIPT_NAME while the application runs; what else it set is there."""
    pipeline = RecordingPipeline()
    pipeline.callbacks_wanted = True

    def app(environ: Any, start_response: Any) -> Any:
        environ.update(SCRIPT_NAME="/api", PATH_INFO="/health", user="ann")
        return simple_app(environ, start_response)

    environ = make_environ(PATH_INFO="/api/health")
    Server().run(captured(app, pipeline), environ)
    given = pipeline.calls[0].callback_arguments[1]
    assert (given["SCRIPT_NAME"], given["PATH_INFO"], given["user"]) == ("", "/api/health", "ann")
    assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == ("/api", "/health")
    assert not [key for key in environ if key.startswith("moesif.")]


def test_the_input_is_the_servers_own_in_every_other_way() -> None:
    """`with`, attributes of its own, `readinto` of a ctypes buffer; closing it closes the original."""
    pipeline, seen = RecordingPipeline(), []

    class Input(io.BytesIO):
        note = "server's"

    def app(environ: Any, start_response: Any) -> Any:
        stream = environ["wsgi.input"]
        stream.note = "changed"
        buffer = (ctypes.c_char * 4)()
        with stream as entered:
            seen.extend([isinstance(entered, io.BytesIO), entered.readinto(buffer), bytes(buffer), entered.read()])
        seen.append(stream.closed)
        return simple_app(environ, start_response)

    environ = make_environ(b"{} rest")
    environ["wsgi.input"] = original = Input(b"{} rest")
    Server().run(captured(app, pipeline), environ)
    assert seen == [True, 4, b"{} r", b"est", True]
    assert original.note == "changed"
    assert pipeline.calls[0].request_body.data() == b"{} rest"


def test_a_call_leaves_no_garbage(spans: Any) -> None:
    """Nothing cyclic: what a call made is gone when it is over, without the garbage collector."""
    pipeline = RecordingPipeline()

    def app(environ: Any, start_response: Any) -> Any:
        environ["wsgi.input"].read()
        start_response("200 OK", [("X-A", "b")])
        return [b"a"]

    def stream(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("X-A", "b")])
        yield b"a"

    def once(app: Any) -> None:
        Server().run(captured(app, pipeline, spans=spans), make_environ(b"{}"))
        for exchange in pipeline.calls:
            exchange.discard()
        pipeline.calls.clear()
        pipeline.open.clear()

    for one in (app, stream):
        once(one)
        gc.collect()
        gc.disable()
        try:
            once(one)
            assert gc.collect() == (0 if spans is None else pytest.approx(0, abs=30))
        finally:
            gc.enable()


@pytest.mark.parametrize("headers", [[("Content-Length", "9" * 5_000)], [("a", "b", "c")], [("a",)], [5]])
def test_headers_that_are_none_never_reach_the_server_as_an_error_of_ours(headers: Any) -> None:
    """What a server makes of them is its own affair: `close`, and garbage collection, end the call as ever."""
    pipeline = RecordingPipeline()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", headers)
        yield b"a"
        yield b"b"

    result = captured(app, pipeline)(make_environ(), Server().start_response)
    next(result)
    result.close()
    assert [one.outcome for one in pipeline.calls] == [Outcome.ABORTED]

    result = captured(app, pipeline)(make_environ(), Server().start_response)
    next(result)
    del result
    gc.collect()
    assert [one.outcome for one in pipeline.late_calls()] == [Outcome.DROPPED]


@pytest.mark.parametrize("ruled", [False, True])
def test_headers_that_can_be_read_once_are_the_servers(ruled: bool, spans: Any) -> None:
    """Werkzeug's server reads them when it sends them: an iterator, which PEP 3333 forbids, comes to it whole."""
    pipeline, server = RecordingPipeline(), Server()
    if ruled:
        pipeline.decision = lambda exchange, read: Decision(False, 0, [("X-Plan", "gold")], None, None)

    def app(environ: Any, start_response: Any) -> Any:
        start_response("418 I'm a Teapot", (pair for pair in [("Content-Type", "text/plain"), ("X", "y")]))
        return [b""]

    server.run(captured(app, pipeline, transaction_id=lambda exchange: "the-id", spans=spans), make_environ())
    assert server.headers is not None
    assert list(server.headers)[:2] == [("Content-Type", "text/plain"), ("X", "y")]
    assert [call.status for call in pipeline.calls] == [418]
    assert pipeline.guard.counts() == {}


def test_a_signal_that_raises_as_a_call_begins_leaves_it_current_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call of the same URL in this thread would be taken for a part of it, and not be captured."""

    class Interrupted(Exception):
        pass

    class InterruptedVariable:
        get, reset = current_exchange.get, current_exchange.reset

        def set(self, value: Any) -> Any:
            token = current_exchange.set(value)
            if value is not None and not pipeline.calls:
                raise Interrupted
            return token

    pipeline = RecordingPipeline()
    with monkeypatch.context() as patched:
        patched.setattr(wsgi_capture, "current_exchange", InterruptedVariable())
        with pytest.raises(Interrupted):
            Server().run(captured(simple_app, pipeline), make_environ())
    assert current_exchange.get() is None
    assert Server().run(captured(simple_app, pipeline), make_environ()) == b"hello world"
    assert [call.status for call in pipeline.calls] == [200]


def test_a_stream_can_be_referred_to_weakly() -> None:
    """As a generator can: middlewares attach to a response's end like that."""
    result = captured(lambda environ, start_response: (b"" for _ in ()), RecordingPipeline())(make_environ(), Server().start_response)
    assert weakref.ref(result)() is result


@pytest.mark.parametrize("body", [b'{"name": "n"}', b"no json", b"7", b"null"])
def test_the_parsed_body_of_callbacks_is_a_plain_value(body: bytes) -> None:
    """Callbacks serialize it, copy it, and return it as metadata."""
    pipeline = RecordingPipeline()
    pipeline.callbacks_wanted = True

    def app(environ: Any, start_response: Any) -> Any:
        environ["wsgi.input"].read()
        start_response("200 OK", [])
        return []

    Server().run(captured(app, pipeline), make_environ(body))
    environ = pipeline.calls[0].callback_arguments[1]
    assert "moesif.request_body" in environ
    assert environ.get("absent", 7) == 7
    found = environ.get("moesif.request_body")
    assert environ["moesif.request_body"] is found is dict(environ)["moesif.request_body"]
    with pytest.raises(KeyError):
        environ["absent"]
    assert type(found) in {dict, str, int, type(None)}
    assert json.loads(json.dumps(found)) == copy.deepcopy(found)
