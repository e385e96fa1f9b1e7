"""The processor: the Exchange decides, the span decorates."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections import Counter
from types import SimpleNamespace
from typing import Any

import flask
import pytest
import tornado.web
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind

from moesif_otel._capture.exchange import Exchange, Outcome, current_exchange
from moesif_otel.processor import MoesifSpanProcessor
from moesif_otel.sandbox.server import Sandbox


@pytest.fixture(scope="module")
def moesif() -> Any:
    with Sandbox() as sandbox:
        yield sandbox


class Service:
    """A processor on a provider, and calls that go through both."""

    def __init__(self, sandbox: Sandbox, *, provider: TracerProvider | None = None, **options: Any) -> None:
        sandbox.clear()
        self.sandbox = sandbox
        self.processor = MoesifSpanProcessor({"APPLICATION_ID": "processor", "BASE_URI": sandbox.url, **options})
        self.provider = provider or TracerProvider(shutdown_on_exit=False)
        self.pipeline = self.processor.pipeline
        self.pipeline.watch(self.provider)
        self.tracer = self.provider.get_tracer("test")

    def open(self, direction: Any = "Incoming") -> Exchange:
        exchange = Exchange(self.pipeline, direction, "GET")
        exchange.url = "http://shop.example/x"
        exchange.status = 200
        current_exchange.set(exchange)
        self.pipeline.opened(exchange)
        return exchange

    def events(self) -> list[dict[str, Any]]:
        assert self.processor.force_flush(30_000)
        stats = self.processor.stats()
        assert stats["accepted"] == stats["delivered"] + sum(stats["dropped"].values()) + stats["pending"]
        return self.sandbox.events()


@pytest.fixture(autouse=True)
def _own_context() -> Any:
    token = current_exchange.set(None)
    yield
    current_exchange.reset(token)


def span_id(span: Any) -> str:
    return f"{span.get_span_context().span_id:016x}"


@pytest.mark.parametrize("first", ["span", "exchange"])
def test_span_and_exchange_become_one_event_whoever_ends_first(moesif: Sandbox, first: str) -> None:
    """The event has the ids of the span and the facts of the Exchange, and is sent once."""
    service = Service(moesif)
    exchange = service.open()
    span = service.tracer.start_span("GET /x", kind=SpanKind.SERVER)
    span.set_attribute("shop.cart", 5)
    ends = [span.end, lambda: exchange.finish(Outcome.COMPLETE)]
    for end in ends if first == "span" else reversed(ends):
        end()
    (event,) = service.events()
    assert event["span"]["id"] == span_id(span)
    assert event["response"]["status"] == 200
    assert "shop.cart" in str(event["metadata"])


def test_a_call_without_a_span_is_an_event(moesif: Sandbox) -> None:
    """Sampled out, or nobody made one: ids of its own, the trace of `traceparent` if there is one."""
    service = Service(moesif, provider=TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False))
    exchange = service.open()
    exchange.has_remote_parent = True
    exchange.request_headers = [("Traceparent", "00-" + "a" * 32 + "-" + "b" * 16 + "-00")]
    service.tracer.start_span("sampled out", kind=SpanKind.SERVER).end()
    exchange.finish(Outcome.COMPLETE)
    (event,) = service.events()
    assert event["trace_id"] == "a" * 32
    assert event["span"]["parent_id"] == "b" * 16


def test_a_span_that_does_not_end_is_waited_for_a_moment(moesif: Sandbox) -> None:
    """The event goes without the span's end; a flush does not wait for it, and a late end sends nothing twice."""
    service = Service(moesif)
    exchange = service.open()
    span = service.tracer.start_span("never ends", kind=SpanKind.SERVER)
    exchange.finish(Outcome.COMPLETE)
    assert service.processor.stats()["accepted"] == 0
    (event,) = service.events()
    assert event["span"]["id"] == span_id(span)
    span.end()
    assert len(service.events()) == 1
    assert service.pipeline._bound == {}
    # Without a flush our own thread hands it on by itself.
    exchange = service.open()
    span = service.tracer.start_span("never ends either", kind=SpanKind.SERVER)
    exchange.finish(Outcome.COMPLETE)
    assert len(moesif.wait_for_events(2)) == 2


def test_an_aborted_call_waits_for_nothing(moesif: Sandbox) -> None:
    """The client left: whether the span ever ends nobody knows."""
    service = Service(moesif)
    exchange = service.open()
    span = service.tracer.start_span("open", kind=SpanKind.SERVER)
    exchange.finish(Outcome.ABORTED)
    assert service.processor.stats()["accepted"] == 1
    span.end()
    assert len(service.events()) == 1


def test_a_span_that_was_current_before_the_tap_is_bound(moesif: Sandbox) -> None:
    """An instrumentor's patch may lie outside ours; a span of an earlier request, or another kind, is none of ours."""
    service = Service(moesif)
    span = service.tracer.start_span("outside", kind=SpanKind.SERVER)
    token = otel_context.attach(trace.set_span_in_context(span))
    try:
        exchange = service.open()
        exchange.finish(Outcome.COMPLETE)
    finally:
        otel_context.detach(token)
    span.end()
    (event,) = service.events()
    assert event["span"]["id"] == span_id(span)
    internal = service.tracer.start_span("somebody's", kind=SpanKind.INTERNAL)
    token = otel_context.attach(trace.set_span_in_context(internal))
    try:
        service.open().finish(Outcome.COMPLETE)
    finally:
        otel_context.detach(token)
    event = service.events()[1]
    assert event["span"]["id"] != span_id(internal)
    assert event["span"]["parent_id"] == span_id(internal)


def test_pipelines_bind_their_own_exchanges_only(moesif: Sandbox) -> None:
    """Two processors on one provider: a span decorates the call of each, no call is sent by the other."""
    one = Service(moesif)
    two = Service(moesif, provider=one.provider, APPLICATION_ID="two")
    first = one.open()
    second = two.open()
    assert second.outer is first
    one.tracer.start_span("shared", kind=SpanKind.SERVER).end()
    second.finish(Outcome.COMPLETE)
    current_exchange.set(first)
    first.finish(Outcome.COMPLETE)
    one.events()
    two.events()
    assert len(moesif.events(application_id="processor")) == len(moesif.events(application_id="two")) == 1


def test_a_finalizer_ends_a_call_on_our_thread(moesif: Sandbox) -> None:
    """Callbacks and delivery happen later; the finalizer itself runs neither."""
    seen: list[str] = []
    service = Service(moesif, IDENTIFY_USER=lambda *_: seen.append("called") or "late-user")
    exchange = service.open()
    exchange.finish_from_finalizer()
    (event,) = service.events()
    assert event["user_id"] == "late-user"
    assert event["metadata"]["moesif_otel"]["outcome"] == "not_read"
    assert seen == ["called"]


def test_nothing_of_a_request_is_kept_after_it(moesif: Sandbox) -> None:
    """Callback arguments, Exchange and spans can be collected once the event is made."""

    class Environ(dict):  # type: ignore[type-arg]
        pass

    service = Service(moesif, GET_METADATA=lambda app, environ: {"n": environ["n"]})
    environ = Environ(n=1)
    kept = [weakref.ref(environ)]
    exchange = service.open()
    exchange.callback_arguments = (None, environ)
    kept.append(weakref.ref(exchange))
    service.tracer.start_span("x", kind=SpanKind.SERVER).end()
    exchange.finish(Outcome.COMPLETE)
    current_exchange.set(None)
    del environ, exchange
    assert len(service.events()) == 1
    gc.collect()
    assert [reference() for reference in kept] == [None, None]
    pipeline = service.pipeline
    assert not any((pipeline._bound, pipeline._waiting, pipeline._opened, pipeline._live))


def test_spans_that_never_end_do_not_gather(moesif: Sandbox) -> None:
    """What is remembered of spans outside any call is bounded."""
    service = Service(moesif)
    for _ in range(10_050):
        service.tracer.start_span("leaked", kind=SpanKind.SERVER)
    assert len(service.pipeline._live) <= 10_000


def test_an_error_of_ours_never_reaches_a_span(moesif: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors run inside the application's `start_span` and `end`: what breaks is counted."""
    service = Service(moesif)

    def fail(*_: Any) -> Any:
        raise RuntimeError

    monkeypatch.setattr(service.pipeline, "_offer", fail)
    monkeypatch.setattr(service.pipeline, "_bound", None)
    exchange = service.open()
    service.tracer.start_span("x", kind=SpanKind.SERVER).end()
    monkeypatch.undo()
    exchange.finish(Outcome.COMPLETE)
    assert len(service.events()) == 1
    errors = service.processor.stats()["errors"]
    assert errors["joining a span to its call"] == errors["handling the end of a span"] == 1


def test_shutdown_tells_open_calls_as_unfinished(moesif: Sandbox) -> None:
    """A stream that runs at the end of the process is an event; a second shutdown does nothing."""
    service = Service(moesif)
    exchange = service.open()
    service.processor.shutdown(5_000)
    service.processor.shutdown(5_000)
    (event,) = moesif.events()
    assert event["metadata"]["moesif_otel"]["outcome"] == "unfinished"
    assert not exchange.is_open
    exchange.finish(Outcome.COMPLETE)
    assert len(moesif.events()) == 1


def test_a_callback_that_hangs_stops_no_delivery(moesif: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callbacks of calls that garbage collection ended run on a thread of their own; what waits too long goes without."""
    release = threading.Event()
    service = Service(moesif, IDENTIFY_USER=lambda *_: release.wait(30) and "late")
    hung = [service.open() for _ in range(3)]
    for exchange in hung:
        exchange.finish_from_finalizer()
    other = Service(moesif, APPLICATION_ID="other")
    other.open().finish(Outcome.COMPLETE)
    assert len(other.events()) == 1
    started = time.monotonic()
    assert service.processor.force_flush(1_000)
    assert time.monotonic() - started < 5
    assert [event.get("user_id") for event in moesif.events(application_id="processor")] == [None] * 3
    release.set()


def test_a_call_that_skip_was_not_asked_about_is_not_sent(moesif: Sandbox) -> None:
    """SKIP leaves calls out on purpose: without its answer nothing goes."""
    release = threading.Event()
    service = Service(moesif, SKIP=lambda *_: release.wait(30))
    service.open().finish_from_finalizer()
    service.open().finish_from_finalizer()
    assert service.processor.force_flush(200)
    release.set()
    assert service.events() == []
    assert service.processor.stats()["skipped"] == 2


def test_callbacks_in_steps(moesif: Sandbox) -> None:
    """What can await drives the callbacks itself; closed early, or flushed meanwhile, the call goes once and without."""

    async def company() -> str:
        return "acme"

    service = Service(moesif, IDENTIFY_USER=lambda *_: "ann", IDENTIFY_COMPANY=lambda *_: company())
    for how in ("whole", "closed", "flushed"):
        exchange = service.open()
        assert exchange.close(Outcome.COMPLETE)
        steps = service.pipeline.finishing(exchange)
        awaitable = next(steps)
        awaitable.close()
        if how == "whole":
            with pytest.raises(StopIteration):
                steps.send("acme")
        elif how == "closed":
            steps.close()
        else:
            service.processor.force_flush(30_000)
            with pytest.raises(StopIteration):
                steps.send("too late")
    events = service.events()
    assert Counter((event.get("user_id"), event.get("company_id")) for event in events) == {("ann", "acme"): 1, ("ann", None): 2}


def test_a_flush_leaves_alone_the_callbacks_that_begin_while_it_waits(moesif: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that finishes during a flush, which waits for another's callbacks, keeps its SKIP and its identity."""

    async def later(said: object) -> object:
        return said

    class Nobody(set[int]):
        def __sub__(self, other: object) -> set[int]:
            return set()

    service = Service(moesif, SKIP=lambda *_: later(False), IDENTIFY_USER=lambda *_: "ann")
    service.pipeline._housekeepers = Nobody()
    begun: list[Any] = []

    def begin() -> None:
        exchange = service.open()
        assert exchange.close(Outcome.COMPLETE)
        begun.append(service.pipeline.finishing(exchange))
        next(begun[-1]).close()

    def end(steps: Any) -> None:
        with pytest.raises(StopIteration):
            steps.send(False)

    def meanwhile(_seconds: float) -> None:
        begin()
        end(begun[0])

    first = threading.Thread(target=begin)
    first.start()
    first.join()
    with monkeypatch.context() as patch:
        patch.setattr("moesif_otel._pipeline.pipeline.time", SimpleNamespace(monotonic=time.monotonic, sleep=meanwhile))
        service.pipeline._settle(time.monotonic() + 30)
    assert len(begun) == 2
    end(begun[1])
    assert [event.get("user_id") for event in service.events()] == ["ann", "ann"]


def test_a_middleware_of_the_same_settings_feeds_the_processor(moesif: Sandbox) -> None:
    """One pipeline, whichever is made first; it ends with the last of the two."""
    from moesif_otel.wsgi import MoesifMiddleware

    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b"x"]

    settings = {"APPLICATION_ID": "joined", "BASE_URI": moesif.url}
    for first in ("processor", "middleware"):
        moesif.clear()
        made: dict[str, Any] = {}
        for name in ("processor", "middleware") if first == "processor" else ("middleware", "processor"):
            made[name] = MoesifSpanProcessor(settings) if name == "processor" else MoesifMiddleware(app, settings)
        processor, middleware = made["processor"], made["middleware"]
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(processor)
        token = current_exchange.set(None)
        list(middleware({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, lambda *_: None))
        current_exchange.reset(token)
        assert processor.stats()["accepted"] == middleware.stats()["accepted"] == 1
        processor.shutdown()
        list(middleware({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, lambda *_: None))
        assert middleware.force_flush()
        assert len(moesif.events()) == 2
        middleware.shutdown()
        assert not middleware._pipeline.is_live


def test_whatever_is_shut_down_or_forgotten_leaves_the_provider(moesif: Sandbox) -> None:
    """No pipeline is kept by a provider: a service that makes a middleware for each tenant does not grow."""
    provider = TracerProvider(shutdown_on_exit=False)
    services = [Service(moesif, provider=provider, APPLICATION_ID=f"tenant-{n}") for n in range(20)]
    pipelines = [weakref.ref(service.pipeline) for service in services]
    for service in services[:10]:
        service.processor.shutdown(100)
    dispatcher = provider._active_span_processor._span_processors[0]
    assert len(dispatcher._pipelines) == 10  # type: ignore[attr-defined]
    del services, service
    gc.collect()
    assert [reference() for reference in pipelines] == [None] * 20
    provider.get_tracer("x").start_span("y").end()


def test_an_applications_flush_does_not_wait_for_moesif() -> None:
    """With a Moesif that is silent, `provider.force_flush()` is True at once; nobody's telemetry pays for ours."""
    provider = TracerProvider(shutdown_on_exit=False)
    processor = MoesifSpanProcessor({"APPLICATION_ID": "silent", "BASE_URI": "http://127.0.0.1:9"})
    processor.pipeline.watch(provider)
    exchange = Exchange(processor.pipeline, "Incoming", "GET")
    processor.pipeline.opened(exchange)
    exchange.finish(Outcome.COMPLETE)
    started = time.monotonic()
    assert provider.force_flush(30_000)
    assert time.monotonic() - started < 1
    processor.shutdown(0)


class _HandlerOfTheUser(tornado.web.RequestHandler):
    """Its module is the user's; what serves it is Tornado."""


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (object.__new__(_HandlerOfTheUser), "(incoming, tornado)"),
        (flask.Flask("shop").wsgi_app, "(incoming, flask)"),
        (object(), "(incoming, GET)"),
    ],
    ids=["tornado", "flask", "nothing known"],
)
def test_the_first_call_names_the_framework(
    argument: object, expected: str, moesif: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    """By what the capture gives to callbacks, whoever wrote its class; else by the method."""
    caplog.set_level(logging.INFO, "moesif_otel")
    service = Service(moesif)
    exchange = Exchange(service.pipeline, "Incoming", "GET")
    exchange.callback_arguments = (argument,)
    service.pipeline.opened(exchange)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert f"captured the first call {expected}" in line
    exchange.finish(Outcome.COMPLETE)
    service.events()


def test_the_first_call_says_what_is_captured(moesif: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """One line at INFO for a pipeline: what, where to, with which options; no application id, no credentials."""
    caplog.set_level(logging.INFO, "moesif_otel")
    service = Service(moesif, LOG_BODY=False)
    service.open().finish(Outcome.COMPLETE)
    service.open().finish(Outcome.COMPLETE)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert "first call" in line
    assert "LOG_BODY=False" in line
    assert moesif.url.rstrip("/") in line
    service.events()
