"""Prints what an application's own OpenTelemetry records, with and without us, in many arrangements.

`python -m tests.servers.own_telemetry` gives one line of JSON for each (arrangement, sampler, provider, with us): the
application's spans, metrics and outgoing headers, ids replaced by places. Each line comes from a forked child, in which
providers and instrumentors can be set up once.
"""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import threading
from wsgiref.util import setup_testing_defaults

import flask
import requests
from opentelemetry import metrics, trace
from opentelemetry.instrumentation.requests import RequestsInstrumentor
from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, TraceIdRatioBased

ARRANGEMENTS = (
    "instrument_app, then we",
    "we, then instrument_app",
    "instrument, then we",
    "own middleware outside",
    "own middleware inside",
    "own middleware inside, hidden",
    "no server instrumentation",
)
SAMPLERS = {
    "ratio 0": lambda: ParentBased(TraceIdRatioBased(0.0)),
    "ratio 1": lambda: ParentBased(TraceIdRatioBased(1.0)),
    "always on": lambda: ParentBased(ALWAYS_ON),
}
PROVIDERS = ("global", "not global", "given to us")
REMOTE = "00-11111111111111111111111111111111-2222222222222222-{}"


class Upstream:
    """Answers any request with 200 and keeps its headers."""

    def __init__(self):
        self.seen = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            connection, _ = self._listener.accept()
            with connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(65_536)
                self.seen.append(head.decode("latin-1").split("\r\n")[1:-2])
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")


def make_app(upstream, tracer):
    app = flask.Flask("shop")

    @app.route("/hello/<name>")
    def hello(name):
        with tracer.start_as_current_span("in the view"):
            requests.get(f"http://127.0.0.1:{upstream.port}/up", timeout=5)
        return {"hello": name}

    @app.route("/boom")
    def boom():
        raise RuntimeError("boom")

    @app.route("/stream")
    def stream():
        def pieces():
            yield "a"
            with tracer.start_as_current_span("in the stream"):
                yield "b"

        return flask.Response(pieces())

    return app


def wrapped(app, options, provider):
    from moesif_otel.wsgi import MoesifMiddleware

    made.append(MoesifMiddleware(app, options, tracer_provider=provider))
    return made[-1]


made = []


def arrange(name, provider, meter_provider, wrap, upstream):
    """Build the application; `wrap` is our middleware, or nothing."""
    own = {"tracer_provider": provider, "meter_provider": meter_provider}
    RequestsInstrumentor().instrument(**own)
    if "instrument" in name.replace("no server instrumentation", ""):
        # Only here: that this module is loaded tells the middleware that a framework may make spans.
        from opentelemetry.instrumentation.flask import FlaskInstrumentor
    if name == "instrument, then we":
        FlaskInstrumentor().instrument(**own)
    app = make_app(upstream, provider.get_tracer("the application's"))
    if name == "instrument_app, then we":
        FlaskInstrumentor().instrument_app(app, **own)
    inner = app.wsgi_app
    if name == "own middleware inside":
        inner = OpenTelemetryMiddleware(inner, **own)
    elif name == "own middleware inside, hidden":
        hidden = {"app": OpenTelemetryMiddleware(inner, **own)}
        inner = lambda environ, start_response: hidden["app"](environ, start_response)  # noqa: E731
    app.wsgi_app = wrap(inner)
    if name == "we, then instrument_app":
        FlaskInstrumentor().instrument_app(app, **own)
    elif name == "own middleware outside":
        app.wsgi_app = OpenTelemetryMiddleware(app.wsgi_app, **own)
    return app


def ask(app, path, **headers):
    environ = {"PATH_INFO": path, "REMOTE_ADDR": "10.0.0.7", "SERVER_PROTOCOL": "HTTP/1.1"}
    setup_testing_defaults(environ)
    environ["wsgi.input"] = io.BytesIO()
    environ["wsgi.errors"] = io.StringIO()
    environ.update(headers)
    told = []
    result = app(environ, lambda status, headers, exc_info=None: told.append(status) or (lambda data: None))
    try:
        body = b"".join(result)
    finally:
        if hasattr(result, "close"):
            result.close()
    return told[-1], len(body)


PATHS = (
    ("/hello/first", {}),
    ("/hello/second", {}),
    ("/hello/sampled", {"HTTP_TRACEPARENT": REMOTE.format("01")}),
    ("/hello/unsampled", {"HTTP_TRACEPARENT": REMOTE.format("00")}),
    ("/missing", {}),
    ("/boom", {}),
    ("/stream", {}),
)


def observe(arrangement, sampler, provider_kind, with_us):
    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    meter_provider = MeterProvider([reader], shutdown_on_exit=False)
    metrics.set_meter_provider(meter_provider)
    provider = TracerProvider(sampler=SAMPLERS[sampler](), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    if provider_kind == "global":
        trace.set_tracer_provider(provider)
    upstream = Upstream()
    options = {"APPLICATION_ID": "own", "BASE_URI": "http://127.0.0.1:9", "SHUTDOWN_TIMEOUT": 0}
    given = provider if provider_kind == "given to us" else None
    app = arrange(
        arrangement,
        provider,
        meter_provider,
        (lambda inner: wrapped(inner, options, given)) if with_us else (lambda inner: inner),
        upstream,
    )
    answers = [ask(app, path, **headers) for path, headers in PATHS]
    finished = sorted(spans.get_finished_spans(), key=lambda span: span.start_time)
    places = {span.context.span_id: place for place, span in enumerate(finished)}
    traces = {}
    for span in finished:
        traces.setdefault(span.context.trace_id, len(traces))
    return {
        "answers": answers,
        "accepted": made[0].stats()["accepted"] if made else None,
        "errors": made[0].stats()["errors"] if made else None,
        "spans": [show_span(span, places, traces, upstream.port) for span in finished],
        "outgoing": [show_outgoing(headers, places, traces) for headers in upstream.seen],
        "metrics": show_metrics(reader),
    }


def show_span(span, places, traces, port):
    parent = span.parent
    return {
        "name": span.name,
        "kind": span.kind.name,
        "trace": traces[span.context.trace_id],
        "parent": None if parent is None else places.get(parent.span_id, f"{parent.span_id:x}"),
        "remote": parent is not None and parent.is_remote,
        "flags": int(span.context.trace_flags),
        "status": span.status.status_code.name,
        "scope": span.instrumentation_scope.name,
        "events": [event.name for event in span.events],
        "attributes": {key: str(value).replace(str(port), "PORT") for key, value in sorted(span.attributes.items())},
    }


def show_outgoing(headers, places, traces):
    shown = []
    for header in headers:
        name, _, value = header.partition(": ")
        if name.lower() == "host":
            continue
        if name.lower() == "traceparent":
            _, trace_id, span_id, flags = value.split("-")
            value = f"{traces.get(int(trace_id, 16), 'unknown')} {places.get(int(span_id, 16), 'unknown')} {flags}"
        shown.append(f"{name}: {value}")
    return shown


def show_metrics(reader):
    data = reader.get_metrics_data()
    rows = []
    for resource in data.resource_metrics if data else ():
        for scope in resource.scope_metrics:
            if scope.scope.name.startswith("moesif_otel"):
                continue  # what we count of our own work is there to be seen
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    attributes = {key: value for key, value in (point.attributes or {}).items() if "port" not in key}
                    number = getattr(point, "count", None)
                    rows.append(
                        [scope.scope.name, metric.name, sorted(map(str, attributes.items())), number or point.value]
                    )
    return sorted(rows, key=str)


def combinations():
    """Every arrangement with every sampler and provider in which we promise that nothing changes.

    Left out: applications that nobody instruments, on a provider that keeps every root span and is the global one or
    was given to us. There our SERVER span above the application's own is what the user asked for.
    """
    for arrangement in ARRANGEMENTS:
        for sampler in SAMPLERS:
            for provider_kind in PROVIDERS:
                bare = arrangement == "no server instrumentation"
                hidden = arrangement == "own middleware inside, hidden"
                if provider_kind == "given to us" and (bare or hidden or sampler == "always on"):
                    continue
                if bare and sampler == "always on" and provider_kind == "global":
                    continue
                if not (bare or hidden) and sampler == "always on":
                    continue
                yield arrangement, sampler, provider_kind


def in_child(*arguments):
    """Run `observe` in a forked child and read what it says."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(readable)
            with os.fdopen(writable, "w") as pipe:
                json.dump(observe(*arguments), pipe)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        text = pipe.read()
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f"failed: {arguments}")
    return json.loads(text)


if __name__ == "__main__":
    import logging

    logging.getLogger("shop").addHandler(logging.NullHandler())
    import moesif_otel.wsgi  # noqa: F401 - so that every child has it at hand

    for arrangement, sampler, provider_kind in combinations():
        for with_us in (False, True):
            found = in_child(arrangement, sampler, provider_kind, with_us)
            sys.stdout.write(json.dumps([[arrangement, sampler, provider_kind, with_us], found]) + "\n")
