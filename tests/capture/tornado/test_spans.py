"""Tests of our activation of Tornado's instrumentor: it makes spans, and gives way to the application's own."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from opentelemetry.instrumentation import tornado as instrumentation
from opentelemetry.instrumentation.tornado import TornadoInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tornado import httpclient, web

from moesif_otel._capture.tornado.spans import YieldingInstrumentation
from tests.capture.tornado.serving import get, run, serving, talk


class Holder:
    """Somebody who wants spans."""


class Plain(web.RequestHandler):
    def get(self) -> None:
        self.write("ok")


@pytest.fixture
def provider():
    """Give a provider that keeps its spans."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    provider.finished = exporter.get_finished_spans
    return provider


@pytest.fixture
def ours():
    """Give an activation that is undone in any case, the application's too."""
    ours = YieldingInstrumentation()
    yield ours
    ours._deactivate()
    if TornadoInstrumentor().is_instrumented_by_opentelemetry:
        TornadoInstrumentor().uninstrument()


def serve_once() -> None:
    """Serve one request."""

    async def serve() -> None:
        async with serving(web.Application([("/", Plain)], log_function=lambda handler: None)) as port:
            assert b"200 OK" in await talk(port, get("/"))

    run(serve())


def patched() -> list[Any]:
    """Give what the instrumentor replaces."""
    return [vars(web.RequestHandler)["__init__"], vars(httpclient.AsyncHTTPClient)["fetch"]]


def test_spans_are_made_while_somebody_holds_and_tornado_is_restored(provider, ours):
    """The canary too: the flag of the instrumentor, its one instance, and its undoing."""
    before = patched()
    a, b = Holder(), Holder()
    assert ours.hold(a, provider)
    assert ours.hold(b, provider)
    assert "instrument" in vars(TornadoInstrumentor())
    serve_once()
    assert [span.name for span in provider.finished()] == ["GET /"]
    ours.release(a)
    assert "instrument" in vars(TornadoInstrumentor())
    ours.release(b)
    assert patched() == before
    assert "instrument" not in vars(TornadoInstrumentor())
    assert not TornadoInstrumentor().is_instrumented_by_opentelemetry
    serve_once()
    assert len(provider.finished()) == 1


def test_an_application_that_instruments_later_finds_tornado_as_without_us(provider, ours, caplog):
    """Its call is not ignored, its hooks run, its provider gets the spans, once, and its end is an end."""
    before = patched()
    holder = Holder()
    ours.hold(holder, provider)
    serve_once()
    theirs = TracerProvider()
    exporter = InMemorySpanExporter()
    theirs.add_span_processor(SimpleSpanProcessor(exporter))
    hooked = []
    instrumentor = TornadoInstrumentor()
    assert not instrumentor.is_instrumented_by_opentelemetry
    with caplog.at_level(logging.WARNING):
        instrumentor.instrument(tracer_provider=theirs, server_request_hook=lambda span, handler: hooked.append(span))
    assert caplog.records == []
    assert instrumentor.is_instrumented_by_opentelemetry
    serve_once()
    assert (len(provider.finished()), len(exporter.get_finished_spans()), len(hooked)) == (1, 1, 1)
    instrumentor.uninstrument()
    assert patched() == before
    ours.release(holder)
    assert patched() == before


def test_request_metrics_are_the_applications_own(provider, ours, monkeypatch):
    """While the instrumentor is ours no time is spent on them; once it is the application's they are all recorded."""
    looked = []
    real = instrumentation._create_metric_attributes_old
    monkeypatch.setattr(
        instrumentation, "_create_metric_attributes_old", lambda handler: looked.append(handler) or real(handler)
    )
    ours.hold(Holder(), provider)
    serve_once()
    assert (len(provider.finished()), looked) == (1, [])
    reader = InMemoryMetricReader()
    TornadoInstrumentor().instrument(tracer_provider=provider, meter_provider=MeterProvider([reader]))
    serve_once()
    metrics = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
    durations = next(one for one in metrics if one.name == "http.server.duration")
    assert [point.count for point in durations.data.data_points] == [1]
    assert looked


def test_an_active_instrumentor_is_left_alone(provider, ours):
    """What the application activated is neither activated again nor undone."""
    instrumentor = TornadoInstrumentor()
    instrumentor.instrument(tracer_provider=TracerProvider())
    theirs = patched()
    holder = Holder()
    assert not ours.hold(holder, provider)
    ours.release(holder)
    assert patched() == theirs


def test_a_second_provider_goes_without(provider, ours):
    """The instrumentor is process-wide: the first provider has it."""
    first = Holder()
    assert ours.hold(first, provider)
    assert not ours.hold(Holder(), TracerProvider())


def test_users_can_switch_the_instrumentation_off(provider, ours, monkeypatch):
    """The environment variable that `opentelemetry-instrument` knows is kept to."""
    monkeypatch.setenv("OTEL_PYTHON_DISABLED_INSTRUMENTATIONS", "requests, tornado")
    assert not ours.hold(Holder(), provider)
    assert "instrument" not in vars(TornadoInstrumentor())
