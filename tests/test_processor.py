"""The processor: the Exchange decides, the span decorates."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
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
        assert self.processor.force_flush(10_000)
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
    assert errors["binding a span"] == errors["the end of a span"] == 1


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
