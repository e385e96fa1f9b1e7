"""The exporter in a pipeline that exists: HTTP spans become events, others are left alone, nothing is sent twice."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExportResult
from opentelemetry.trace import SpanKind

from moesif_otel.errors import MoesifConfigError
from moesif_otel.exporter import MoesifSpanExporter
from moesif_otel.sandbox.server import Sandbox

HTTP = {"http.request.method": "GET", "url.full": "http://api/x", "http.response.status_code": 200}


@pytest.fixture
def sandbox() -> Any:
    with Sandbox() as running:
        yield running


def lawful(stats: Any) -> bool:
    return bool(stats["accepted"] == stats["delivered"] + sum(stats["dropped"].values()) + stats["pending"])


@pytest.mark.parametrize("kind_of_processor", [SimpleSpanProcessor, BatchSpanProcessor])
def test_http_spans_become_events(sandbox: Any, kind_of_processor: Any) -> None:
    """SERVER and CLIENT spans with a method are sent, everything else is ignored."""
    exporter = MoesifSpanExporter(application_id="exporter", base_uri=sandbox.url)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(kind_of_processor(exporter))
    tracer = provider.get_tracer("t")
    tracer.start_span("in", kind=SpanKind.SERVER, attributes=HTTP).end()
    tracer.start_span("out", kind=SpanKind.CLIENT, attributes={"http.method": "PUT", "http.url": "http://b/y"}).end()
    tracer.start_span("db", kind=SpanKind.CLIENT, attributes={"db.system": "x"}).end()
    tracer.start_span("work", attributes=HTTP).end()
    assert provider.force_flush()
    assert exporter.force_flush(30_000)
    events = sandbox.wait_for_events(2, 30)
    assert {(one["direction"], one["request"]["verb"]) for one in events} == {("Incoming", "GET"), ("Outgoing", "PUT")}
    assert (exporter.stats()["accepted"], exporter.stats()["delivered"]) == (2, 2)
    assert lawful(exporter.stats())
    provider.shutdown()


def test_a_second_export_of_a_span_is_the_same_event(sandbox: Any) -> None:
    """The transaction id is derived from the span: Moesif drops the second one."""
    exporter = MoesifSpanExporter(application_id="exporter", base_uri=sandbox.url)
    provider = TracerProvider(shutdown_on_exit=False)
    for _ in range(2):
        provider.add_span_processor(SimpleSpanProcessor(exporter))
    provider.get_tracer("t").start_span("in", kind=SpanKind.SERVER, attributes=HTTP).end()
    assert exporter.force_flush(30_000)
    assert len(sandbox.wait_for_events(1, 30)) == 1
    assert exporter.stats()["delivered"] == 2
    exporter.shutdown()


def test_it_can_be_made_without_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """OTEL_TRACES_EXPORTER=moesif calls the class with nothing: the environment has it all."""
    monkeypatch.setenv("MOESIF_APPLICATION_ID", "from-environment")
    monkeypatch.setenv("MOESIF_BATCH_SIZE", "3")
    exporter = MoesifSpanExporter()
    assert (exporter.settings.application_id, exporter.settings.batch_size) == ("from-environment", 3)
    exporter.shutdown()
    monkeypatch.delenv("MOESIF_APPLICATION_ID")
    with pytest.raises(MoesifConfigError, match="MOESIF_APPLICATION_ID"):
        MoesifSpanExporter()


def test_after_shutdown_spans_are_counted_as_dropped() -> None:
    """Nothing is lost in silence; `export` still says SUCCESS, it is no failure of the span's."""
    exporter = MoesifSpanExporter(application_id="exporter", base_uri="http://127.0.0.1:9")
    exporter.shutdown(100)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    provider.get_tracer("t").start_span("in", kind=SpanKind.SERVER, attributes=HTTP).end()
    assert exporter.stats()["dropped"] == {"shutdown": 1}
    assert lawful(exporter.stats())


def test_a_span_that_cannot_be_read_harms_nobody() -> None:
    """Errors of ours end in the counters."""

    class Broken:
        @property
        def kind(self) -> Any:
            raise RuntimeError

        attributes = HTTP

    exporter = MoesifSpanExporter(application_id="exporter", base_uri="http://127.0.0.1:9")
    assert exporter.export((Broken(),)) is SpanExportResult.SUCCESS  # type: ignore[arg-type]
    assert exporter.stats()["errors"] == {"export of a span": 1}
    exporter.shutdown(100)
