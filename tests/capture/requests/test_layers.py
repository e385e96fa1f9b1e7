"""Our layer on `Session.send` among those of others: OpenTelemetry's, other libraries', our own of another day."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import requests
import wrapt
from opentelemetry import trace
from opentelemetry.instrumentation.requests import RequestsInstrumentor
from opentelemetry.instrumentation.urllib3 import URLLib3Instrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from moesif_otel._capture.outgoing import remove_route
from moesif_otel._capture.requests.capture import PATCHES
from tests.capture.upstream import RecordingPipeline, add, capturing

ORIGINAL = requests.Session.__dict__["send"]

# Callers here leave responses to the garbage collector, and Python says so, with us or without.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def _clean():
    yield
    for instrumentor in (RequestsInstrumentor(), URLLib3Instrumentor()):
        if instrumentor.is_instrumented_by_opentelemetry:
            instrumentor.uninstrument()
    assert requests.Session.__dict__["send"] is ORIGINAL


class Telemetry:
    """An application's own OpenTelemetry: a provider with an exporter, and metrics."""

    def __init__(self):
        self.provider, self.exporter, self.reader = TracerProvider(), InMemorySpanExporter(), InMemoryMetricReader()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meter_provider = MeterProvider([self.reader])

    def instrument(self, instrumentor=None):
        (instrumentor or RequestsInstrumentor()).instrument(
            tracer_provider=self.provider, meter_provider=self.meter_provider
        )

    @property
    def spans(self):
        return [(s.name, s.kind, s.parent, s.status.status_code, dict(s.attributes)) for s in self.exporter.get_finished_spans()]

    @property
    def call_count(self):
        data = self.reader.get_metrics_data()
        metrics = data.resource_metrics[0].scope_metrics[0].metrics if data and data.resource_metrics else []
        return sum(point.count for metric in metrics for point in metric.data.data_points)


def test_on_and_off():
    """With the last pipeline gone `Session.send` is the very function it was; taking off twice is harmless."""
    first = add(RecordingPipeline())
    layer = requests.Session.__dict__["send"]
    second = add(RecordingPipeline(APPLICATION_ID="second"))
    assert requests.Session.__dict__["send"] is layer is not ORIGINAL
    assert (layer.__name__, layer.__doc__, layer.__wrapped__) == ("send", ORIGINAL.__doc__, ORIGINAL)
    remove_route(first)
    assert requests.Session.__dict__["send"] is layer
    remove_route(second)
    remove_route(second)
    assert requests.Session.__dict__["send"] is ORIGINAL


@pytest.mark.parametrize("stop_first", ["us", "them"])
@pytest.mark.parametrize("start_first", ["us", "them"])
def test_with_the_instrumentor_in_any_order(upstream, start_first, stop_first):
    """Both see each call, once, whoever came first; either goes without taking the other along."""
    telemetry, pipeline = Telemetry(), RecordingPipeline()
    route = None
    if start_first == "us":
        route = add(pipeline)
    telemetry.instrument()
    if route is None:
        route = add(pipeline)
    requests.get(upstream.url + "/redirect/1")
    assert (len(telemetry.spans), len(pipeline.exchanges), telemetry.call_count) == (1, 1, 1)
    if stop_first == "us":
        remove_route(route)
        requests.get(upstream.url + "/json")
        assert (len(telemetry.spans), len(pipeline.exchanges)) == (2, 1)
        RequestsInstrumentor().uninstrument()
    else:
        RequestsInstrumentor().uninstrument()
        requests.get(upstream.url + "/redirect/1")
        assert (len(telemetry.spans), len(pipeline.exchanges)) == (1, 2)
        telemetry.instrument()
        requests.get(upstream.url + "/json")
        assert (len(telemetry.spans), len(pipeline.exchanges)) == (2, 3)
        RequestsInstrumentor().uninstrument()
        remove_route(route)
    requests.get(upstream.url + "/json")
    assert len(telemetry.spans) == 2
    while requests.Session.__dict__["send"] is not ORIGINAL:  # our layer, passing through, where it lay below theirs
        remove_route(add(pipeline))


@pytest.mark.parametrize("start_first", ["us", "them"])
def test_the_applications_telemetry_is_the_same(upstream, start_first):
    """Spans, parents, metrics and headers of an instrumented application are those without us."""

    def run():
        telemetry = Telemetry()
        if start_first == "them":
            telemetry.instrument()
        with capturing():
            if start_first == "us":
                telemetry.instrument()
            return calls(telemetry)

    def calls(telemetry):
        upstream.requests.clear()
        requests.get(upstream.url + "/json")
        requests.get(upstream.url + "/redirect/2", headers={"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"})
        list(requests.get(upstream.url + "/gzip", stream=True).iter_content(100))
        with pytest.raises(requests.ConnectionError):
            requests.get("http://127.0.0.1:1/")
        headers = [[name for name, _ in r["headers"]] for r in upstream.requests]
        result = telemetry.spans, telemetry.call_count, headers
        RequestsInstrumentor().uninstrument()
        return result

    telemetry = Telemetry()
    telemetry.instrument()
    without = calls(telemetry)
    assert run() == without
    remove_route(add(RecordingPipeline()))


def test_a_session_that_is_uninstrumented(upstream):
    """`RequestsInstrumentor.uninstrument_session` takes their layer off one session, not ours."""
    telemetry = Telemetry()
    telemetry.instrument()
    with capturing() as pipeline, requests.Session() as session:
        RequestsInstrumentor.uninstrument_session(session)
        session.get(upstream.url + "/redirect/1")
        assert (len(telemetry.spans), len(pipeline.exchanges)) == (0, 1)


def test_excluded_urls_of_the_instrumentor_are_still_captured(upstream):
    """What an application keeps out of its traces is still a call for API analytics."""
    telemetry = Telemetry()
    RequestsInstrumentor().instrument(tracer_provider=telemetry.provider, excluded_urls="json")
    with capturing() as pipeline:
        requests.get(upstream.url + "/json")
    assert (len(telemetry.spans), len(pipeline.exchanges)) == (0, 1)


@pytest.mark.parametrize("kind", ["function", "wrapt", "mock"])
def test_somebody_patches_after_us(upstream, kind):
    """Their patch stays when we stop; ours below it passes through, and works again when we start again."""
    calls = []

    def counted(wrapped, instance, args, kwargs):
        calls.append(args)
        return wrapped(*args, **kwargs)

    pipeline = RecordingPipeline()
    route = add(pipeline)
    ours = requests.Session.__dict__["send"]
    if kind == "wrapt":
        theirs = wrapt.FunctionWrapper(ours, counted)
        assert theirs == ours  # which is why layers are told apart by identity
    elif kind == "function":

        def theirs(self, *args, **kwargs):
            return counted(ours.__get__(self), self, args, kwargs)

    else:
        theirs = mock.Mock(side_effect=lambda request, **kwargs: calls.append(request))
    requests.Session.send = theirs
    try:
        requests.get(upstream.url + "/json")
        remove_route(route)
        assert requests.Session.__dict__["send"] is theirs
        requests.get(upstream.url + "/json")
        route = add(pipeline)
        requests.get(upstream.url + "/json")
        remove_route(route)
    finally:
        requests.Session.send = ours
    assert len(calls) == 3
    assert len(pipeline.exchanges) == (1 if kind == "mock" else 2)
    remove_route(add(pipeline))


@pytest.mark.parametrize("kind", ["function", "wrapt", "mock"])
def test_somebody_patched_before_us(upstream, kind):
    """We call their patch as `requests` would, and put it back."""
    if kind == "wrapt":
        theirs = wrapt.FunctionWrapper(ORIGINAL, lambda wrapped, instance, args, kwargs: wrapped(*args, **kwargs))
    elif kind == "function":

        def theirs(self, *args, **kwargs):
            return ORIGINAL(self, *args, **kwargs)

    else:
        answer = requests.Response()
        answer.status_code = 299
        theirs = mock.Mock(return_value=answer)
    requests.Session.send = theirs
    try:
        without = requests.get(upstream.url + "/json").status_code
        with capturing() as pipeline:
            assert requests.get(upstream.url + "/json").status_code == without
        assert requests.Session.__dict__["send"] is theirs
    finally:
        requests.Session.send = ORIGINAL
    assert pipeline.only.status == without
    if kind == "mock":
        assert [len(call.args) for call in theirs.call_args_list] == [1, 1]


def test_two_layers_of_ours_capture_once(upstream):
    """Below a patch that hides what it wraps there may be an old layer of ours: one call is one call."""
    pipeline = RecordingPipeline()
    route = add(pipeline)
    ours = requests.Session.__dict__["send"]
    requests.Session.send = lambda self, request, **kwargs: ours(self, request, **kwargs)
    try:
        again = add(pipeline)
        requests.get(upstream.url + "/redirect/2")
        assert len(pipeline.exchanges) == 1
        remove_route(again)
        remove_route(route)
    finally:
        requests.Session.send = ours
    remove_route(add(pipeline))


def test_layers_do_not_pile_up():
    """Starting and stopping over and over leaves nothing behind."""
    gc.collect()
    before = len(PATCHES._layers)
    for _ in range(50):
        remove_route(add(RecordingPipeline()))
    assert (len(PATCHES._layers), requests.Session.__dict__["send"]) == (before, ORIGINAL)


def test_spans_on_a_provider_that_was_named(upstream):
    """A leaf CLIENT span under the current one; never current; nothing on the wire; its error where there is one."""
    telemetry = Telemetry()
    tracer = telemetry.provider.get_tracer("app")
    current = []
    pipelines = [RecordingPipeline(APPLICATION_ID=name) for name in ("a", "b")]
    routes = [add(pipeline, tracer_provider=telemetry.provider) for pipeline in pipelines]
    try:
        with tracer.start_as_current_span("work") as parent:
            requests.get(
                upstream.url + "/status/404",
                hooks={"response": lambda *_, **__: current.append(trace.get_current_span())},
            )
            with pytest.raises(requests.ConnectionError):
                requests.get("http://127.0.0.1:1/")
    finally:
        for route in routes:
            remove_route(route)
    assert current == [parent]
    assert "traceparent" not in dict(upstream.requests[-1]["headers"])
    answered, failed, _work = telemetry.exporter.get_finished_spans()
    assert (answered.name, answered.kind, answered.parent.span_id) == ("GET", SpanKind.CLIENT, parent.context.span_id)
    assert dict(answered.attributes) == {
        "http.method": "GET",
        "http.url": upstream.url + "/status/404",
        "http.status_code": 404,
    }
    assert not answered.status.is_ok
    assert [event.name for event in failed.events] == ["exception"]
    assert {route.spans.provider for route in routes} == {telemetry.provider}


@pytest.mark.parametrize("instrumentor", [RequestsInstrumentor, URLLib3Instrumentor])
def test_no_second_span(upstream, instrumentor):
    """Where an instrumentor makes a span of the call there is none of ours, and its parent is what it was."""
    telemetry = Telemetry()
    telemetry.instrument(instrumentor())
    route = add(RecordingPipeline(), tracer_provider=telemetry.provider)
    try:
        requests.get(upstream.url + "/json")
    finally:
        remove_route(route)
    ((_, kind, parent, *_),) = telemetry.spans
    assert (kind, parent) == (SpanKind.CLIENT, None)


@pytest.mark.parametrize(("opt_in", "old", "stable"), [("", True, False), ("http", False, True), ("http/dup", True, True)])
def test_names_of_attributes_are_the_applications_choice(upstream, monkeypatch, opt_in, old, stable):
    """`OTEL_SEMCONV_STABILITY_OPT_IN` chooses, as for the instrumentors."""
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", opt_in)
    telemetry = Telemetry()
    route = add(RecordingPipeline(), tracer_provider=telemetry.provider)
    try:
        requests.get(upstream.url.replace("//", "//user:secret@") + "/status/500")
    finally:
        remove_route(route)
    ((_, _, _, _, attributes),) = telemetry.spans
    assert "secret" not in str(attributes)
    assert {"http.method", "http.url", "http.status_code"} <= set(attributes) if old else "http.method" not in attributes
    expected = {"http.request.method", "url.full", "http.response.status_code", "server.address", "server.port", "error.type"}
    assert expected <= set(attributes) if stable else not expected & set(attributes)


@pytest.mark.parametrize("first", ["requests", "moesif_otel._capture.requests.capture"])
def test_imported_in_any_order(upstream, first):
    """`requests` before us or after, `from requests import get` included: captured."""
    code = f"""
        import {first}
        from requests import get
        from tests.capture.upstream import capturing
        with capturing() as pipeline:
            get({upstream.url + "/json"!r})
        assert pipeline.only.status == 200
    """
    root = Path(__file__).parents[3]
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=root, env={"PYTHONPATH": str(root)}, check=True, timeout=200
    )


def test_a_hidden_instrumentor_makes_the_only_span(upstream):
    """Where another library's patch hides it, nothing on `Session.send` says that it is there."""
    telemetry = Telemetry()
    telemetry.instrument()
    theirs = requests.Session.__dict__["send"]
    requests.Session.send = lambda self, request, **kwargs: theirs(self, request, **kwargs)
    route = add(RecordingPipeline(), tracer_provider=telemetry.provider)
    try:
        requests.get(upstream.url + "/json")
    finally:
        remove_route(route)
        requests.Session.send = theirs
    assert len(telemetry.spans) == 1
