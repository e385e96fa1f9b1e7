"""Tests of governance in Tornado: what the client gets, what of the handler runs, what is recorded."""

from __future__ import annotations

import json
from typing import Any

import pytest
from opentelemetry.instrumentation.tornado import TornadoInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tornado import web, websocket, wsgi

from moesif_otel._capture.exchange import Decision, Outcome
from tests.capture.tornado.serving import Recorder, capturing, get, recorder, run, serving, talk, without_dates

BODY = b'{"error": "quota"}'


def block(status: int = 429, body: bytes = BODY, headers: list[tuple[str, str]] | None = None) -> Decision:
    """Give a verdict that blocks."""
    own = headers or [("X-Rule", "42"), ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    return Decision(blocked=True, status=status, headers=own, body=body, blocked_by="rule 1")


def add(*headers: tuple[str, str]) -> Decision:
    """Give a verdict that adds headers."""
    return Decision(blocked=False, status=0, headers=list(headers), body=None, blocked_by=None)


class Story(web.RequestHandler):
    """Notes which of its methods ran."""

    ran: list[str] = []

    def prepare(self) -> None:
        self.ran.append("prepare")

    def get(self) -> None:
        self.ran.append("get")
        self.add_header("X-Own", "1")
        self.add_header("X-Own", "2")
        self.write({"served": True})

    def post(self) -> None:
        self.get()

    def on_finish(self) -> None:
        self.ran.append("on_finish")


@web.stream_request_body
class Upload(Story):
    def data_received(self, chunk: bytes) -> None:
        self.ran.append("data_received")


class Socket(websocket.WebSocketHandler):
    def open(self) -> None:
        Story.ran.append("open")


def served(verdict: Any, *requests: bytes, handlers: Any = None, **settings: Any) -> tuple[Recorder, list[bytes]]:
    """Serve requests under a verdict; give what was recorded and what the client got."""
    Story.ran = []
    pipeline = recorder()
    pipeline.decide = verdict if callable(verdict) else lambda exchange, read_ahead: _deciding(exchange, verdict)
    handlers = handlers or [("/", Story), ("/up", Upload), ("/ws", Socket)]

    async def serve(log_function: Any) -> list[bytes]:
        async with serving(web.Application(handlers, log_function=log_function, **settings)) as port:
            return [without_dates(await talk(port, request)) for request in requests]

    with capturing(pipeline) as capture:
        answers = run(serve(capture.log_event))
    return pipeline, answers


def _deciding(exchange: Any, verdict: Decision) -> Decision:
    exchange.blocked_by = verdict.blocked_by
    return verdict


def test_a_blocked_request_is_answered_without_its_handler():
    """Status with its phrase, headers, body; neither `prepare` nor the method runs, `on_finish` does."""
    pipeline, (raw,) = served(block(), get("/"))
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
    assert b"\r\nX-Rule: 42\r\n" in head
    assert head.count(b"Content-Type: application/json") == head.count(b"Content-Type") == 1
    assert head.count(b"Content-Length") == 1
    assert body == BODY
    assert Story.ran == ["on_finish"]
    (seen,) = pipeline.seen
    assert (seen.status, seen.response_body, seen.outcome) == (429, BODY, Outcome.COMPLETE)
    assert pipeline.guard.counts() == {}


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (get("/", method="HEAD"), b""),
        (get("/", method="POST", body=b'{"a": 1}'), BODY),
        (get("/up", method="POST", body=b"x" * 1000), BODY),
        (get("/ws", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA=="), BODY),
        (get("/nowhere"), BODY),
    ],
    ids=["HEAD", "POST", "streamed upload", "websocket", "no route"],
)
def test_every_kind_of_request_can_be_blocked(request_bytes, expected):
    """The rule's answer and nothing of the application, whatever the handler is."""
    pipeline, (raw,) = served(block(), request_bytes)
    assert raw.startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
    assert raw.partition(b"\r\n\r\n")[2] == expected
    assert set(Story.ran) <= {"on_finish"}
    assert [seen.status for seen in pipeline.seen] == [429]


@pytest.mark.parametrize(
    ("status", "phrase"), [(451, b"Unavailable For Legal Reasons"), (299, b"Success"), (599, b"Server Error")]
)
def test_any_status_has_a_phrase(status, phrase):
    """Also those that have none of their own."""
    _, (raw,) = served(block(status), get("/"))
    assert raw.startswith(b"HTTP/1.1 %d %s\r\n" % (status, phrase))


def test_an_answer_without_a_body_has_no_type():
    """204: neither a body nor Tornado's default `Content-Type`."""
    _, (raw,) = served(block(204, b"", [("X-Rule", "1")]), get("/"))
    assert raw.startswith(b"HTTP/1.1 204 No Content\r\n")
    assert b"Content-Type" not in raw
    assert raw.endswith(b"\r\n\r\n")


def test_a_connection_lives_on_after_a_blocked_request():
    """Keep-alive: the next request is served, since the rule has nothing to say about it."""

    def decide(exchange: Any, read_ahead: Any) -> Decision | None:
        return block() if exchange.url.endswith("?blocked") else None

    first = get("/?blocked").replace(b"Connection: close\r\n", b"")
    pipeline, (raw,) = served(decide, first + get("/"))
    assert raw.count(b"HTTP/1.1 ") == 2
    assert raw.endswith(b'{"served": true}')
    assert [seen.status for seen in pipeline.seen] == [429, 200]


def test_header_rules_add_behind_the_applications_own():
    """Order and repetition of the application's stay; a `Content-Type` is not doubled; the event has them too."""
    _, (plain,) = served(lambda exchange, read_ahead: None, get("/"))
    pipeline, (raw,) = served(add(("X-Limit", "5"), ("Content-Type", "text/odd")), get("/"))
    assert raw.replace(b"X-Limit: 5\r\n", b"") == plain
    assert raw.index(b"X-Own: 2") < raw.index(b"X-Limit: 5")
    assert pipeline.seen[0].header("X-Limit") == ["5"]
    assert Story.ran == ["prepare", "get", "on_finish"]


def test_a_fallback_is_governed_too():
    """Blocked before the container is called, or with headers added to what it answers."""
    called = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        called.append(environ["PATH_INFO"])
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"from wsgi"]

    handlers = [("/.*", web.FallbackHandler, {"fallback": wsgi.WSGIContainer(app)})]
    pipeline, (raw,) = served(block(), get("/a"), handlers=handlers)
    assert raw.startswith(b"HTTP/1.1 429 ")
    assert called == []
    assert [(seen.status, seen.response_body) for seen in pipeline.seen] == [(429, BODY)]
    pipeline, (raw,) = served(add(("X-Limit", "5")), get("/b"), handlers=handlers)
    assert b"\r\nX-Limit: 5\r\n" in raw
    assert raw.endswith(b"from wsgi")
    assert pipeline.seen[0].header("X-Limit") == ["5"]


def test_the_body_is_there_for_rules_that_ask():
    """Up to the cap, and the handler has it whole; a streamed upload is not waited for."""
    bodies = []

    def decide(exchange: Any, read_ahead: Any) -> None:
        bodies.append(read_ahead())

    served(decide, get("/", method="POST", body=b'{"a": 1}'), get("/up", method="POST", body=b"abc"), get("/"))
    assert bodies == [b'{"a": 1}', None, None]
    assert Story.ran.count("data_received") == 1


def test_what_tornado_refuses_itself_is_not_called_blocked():
    """A missing XSRF token is answered 403 by Tornado; the event does not say that a rule did it."""
    pipeline = served(block(), get("/", method="POST", body=b"a=1"), xsrf_cookies=True)[0]
    (exchange_seen,) = pipeline.seen
    assert exchange_seen.status == 403


def test_an_answer_that_cannot_be_given_lets_the_request_through():
    """Fail open: the handler serves it, the error is counted, nothing of the answer is left."""
    bad = block(headers=[("X-Rule", "1"), ("X-Broken", "line\r\nbreak")])
    pipeline, (raw,) = served(bad, get("/"))
    assert raw.startswith(b"HTTP/1.1 200 OK")
    assert b"X-Rule" not in raw
    assert raw.endswith(b'{"served": true}')
    assert pipeline.guard.counts() == {"the response to a blocked request": 1}


def test_rules_that_raise_let_the_request_through():
    """An error in the pipeline is counted and no more."""

    def decide(exchange: Any, read_ahead: Any) -> None:
        raise ZeroDivisionError

    pipeline, (raw,) = served(decide, get("/"))
    assert json.loads(raw.rpartition(b"\r\n")[2]) == {"served": True}
    assert pipeline.guard.counts() == {"governance rules": 1}


def test_the_applications_instrumentation_sees_a_request_that_finished_early():
    """One SERVER span with the status, and a count of active requests that comes back to zero."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    TornadoInstrumentor().instrument(tracer_provider=provider, meter_provider=MeterProvider([reader]))
    try:
        _, (raw,) = served(block(), get("/"))
        points = [
            point.value
            for resource in reader.get_metrics_data().resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == "http.server.active_requests"
            for point in metric.data.data_points
        ]
    finally:
        TornadoInstrumentor().uninstrument()
    assert raw.startswith(b"HTTP/1.1 429 ")
    assert [span.attributes["http.status_code"] for span in exporter.get_finished_spans()] == [429]
    assert points == [0]
    assert Story.ran == ["on_finish"]
