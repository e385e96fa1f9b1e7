"""Prints what an ASGI application's own OpenTelemetry records, with and without us, in many arrangements.

`python -m tests.servers.asgi_own_telemetry` gives one line of JSON for each (arrangement, sampler, with us). Each line
comes from a forked child, in which providers and instrumentations can be set up once.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from fastapi import FastAPI
from opentelemetry import metrics, propagate, trace
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.django import DjangoInstrumentor
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.starlette import StarletteInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, TraceIdRatioBased
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from moesif_otel.asgi import MoesifMiddleware
from tests.capture.asgi.driver import Connection, http_scope, request
from tests.servers import django_project

SAMPLERS = {"always on": ParentBased(ALWAYS_ON), "ratio 0": ParentBased(TraceIdRatioBased(0.0))}
REMOTE = b"00-11111111111111111111111111111111-2222222222222222-01"
SETTINGS = {"APPLICATION_ID": "a", "BASE_URI": "http://127.0.0.1:9", "SHUTDOWN_TIMEOUT": 0}


def work():
    """Do what a handler does: a span of its own, and a call that carries the context."""
    with trace.get_tracer("app").start_as_current_span("work"):
        carrier = {}
        propagate.inject(carrier)
        return carrier


async def answer(scope, receive, send):
    body = json.dumps(work()).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def make_fastapi():
    app = FastAPI()
    app.get("/items")(work)
    return app


def make_starlette():
    async def items(_):
        return JSONResponse(work())

    return Starlette(routes=[Route("/items", items)])


def add(app, with_us):
    if with_us:
        app.add_middleware(MoesifMiddleware, settings=SETTINGS)
    return app


def wrap(app, with_us):
    return MoesifMiddleware(app, SETTINGS) if with_us else app


def fastapi_itself(with_us):
    return add(make_fastapi(), with_us)


def fastapi_itself_wrapped(with_us):
    return wrap(make_fastapi(), with_us)


def fastapi_instrumented_then_we(with_us):
    app = make_fastapi()
    FastAPIInstrumentor.instrument_app(app)
    return add(app, with_us)


def we_then_fastapi_instrumented(with_us):
    app = add(make_fastapi(), with_us)
    FastAPIInstrumentor.instrument_app(app)
    return app


def starlette_instrumented_then_we(with_us):
    app = make_starlette()
    StarletteInstrumentor.instrument_app(app)
    return add(app, with_us)


def we_then_starlette_instrumented(with_us):
    app = add(make_starlette(), with_us)
    StarletteInstrumentor.instrument_app(app)
    return app


def otel_outside(with_us):
    return OpenTelemetryMiddleware(wrap(answer, with_us))


def otel_inside(with_us):
    return wrap(OpenTelemetryMiddleware(answer), with_us)


def otel_inside_hidden(with_us):
    inner = OpenTelemetryMiddleware(answer)

    async def hiding(scope, receive, send):
        await inner(scope, receive, send)

    return wrap(hiding, with_us)


def django_instrumented(with_us):
    from django.conf import settings
    from django.core.handlers.asgi import ASGIHandler
    from django.http import JsonResponse
    from django.urls import path

    async def items(_):
        return JsonResponse(work())

    settings.ROOT_URLCONF = type("urls", (), {"urlpatterns": [path("items", items)]})
    settings.MIDDLEWARE = [django_project.OURS] if with_us else []
    settings.MOESIF_MIDDLEWARE = {**SETTINGS, "DISABLED_TRANSACTION_ID": True}
    DjangoInstrumentor().instrument()
    return ASGIHandler()


ARRANGEMENTS = (
    fastapi_itself, fastapi_itself_wrapped, fastapi_instrumented_then_we, we_then_fastapi_instrumented,
    starlette_instrumented_then_we, we_then_starlette_instrumented, otel_outside, otel_inside, otel_inside_hidden,
    django_instrumented,
)  # fmt: skip


async def call_all(app):
    answers = []
    for headers in ([], [(b"traceparent", REMOTE)], []):
        scope = http_scope(path="/items", headers=[(b"host", b"shop.example"), *headers])
        connection = await Connection(request()).serve(app, scope)
        answers.append(json.loads(b"".join(message.get("body", b"") for message in connection.sent)))
    return answers


def record(arrange, sampler, with_us):
    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    provider = TracerProvider(sampler=SAMPLERS[sampler])
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    metrics.set_meter_provider(MeterProvider([reader]))
    answers = asyncio.run(call_all(arrange(with_us)))
    finished = spans.get_finished_spans()
    names = {span.context.span_id: span.name for span in finished}
    found = []
    for span in finished:
        parent = span.parent and names.get(span.parent.span_id, f"{span.parent.span_id:x}")
        attributes = {name: str(value) for name, value in sorted(span.attributes.items())}
        found.append([span.name, span.kind.name, parent, attributes, len(span.events), span.status.status_code.name])
    outgoing = []
    for one in answers:
        _, trace_id, span_id, flags = one.get("traceparent", "---").split("-")
        outgoing.append([trace_id == "1" * 32, names.get(int(span_id or "0", 16)), flags, sorted(one)])
    data = json.loads(reader.get_metrics_data().to_json()) if reader.get_metrics_data() else {}
    points = sorted(
        [metric["name"], sorted(json.dumps(point["attributes"], sort_keys=True) + str(point.get("count")) for point in metric["data"]["data_points"])]
        for resource in data.get("resource_metrics", ())
        for scope in resource["scope_metrics"]
        for metric in scope["metrics"]
        if not metric["name"].startswith("moesif.")  # our own, which say what becomes of events
    )
    return {"spans": found, "outgoing": outgoing, "metrics": points}


def main():
    for arrange in ARRANGEMENTS:
        for sampler in SAMPLERS:
            for with_us in (False, True):
                sys.stdout.flush()
                child = os.fork()
                if not child:
                    try:
                        line = json.dumps([arrange.__name__, sampler, with_us, record(arrange, sampler, with_us)])
                        print(line, flush=True)
                    finally:
                        os._exit(0)
                os.waitpid(child, 0)


if __name__ == "__main__":
    main()
