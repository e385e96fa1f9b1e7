"""A program whose tracer provider, or whose exit handlers, came before `moesif_otel`: `python -m tests.exits.late URL WAY`."""

from __future__ import annotations

import atexit
import sys

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind

url, way = sys.argv[1:3]
calls = []


def at_exit() -> None:
    for call in calls:
        call()


atexit.register(at_exit)
provider = TracerProvider()  # registers its exit handler
CALLS = 20
OPTIONS = {"application_id": "planted-application-id", "base_uri": url, "shutdown_timeout": 3.0}


def spans() -> None:
    from moesif_otel import MoesifSpanExporter

    provider.add_span_processor(BatchSpanProcessor(MoesifSpanExporter(**OPTIONS)))
    tracer = provider.get_tracer("late")
    for n in range(CALLS):
        attributes = {"http.request.method": "GET", "url.full": f"http://shop.example/{n}", "http.response.status_code": 200}
        tracer.start_span("GET", kind=SpanKind.SERVER, attributes=attributes).end()


def handlers() -> None:
    from wsgiref.util import setup_testing_defaults

    from moesif_otel.wsgi import MoesifMiddleware

    def app(environ, start_response):
        start_response("200 OK", [])
        return [b"ok"]

    wrapped = MoesifMiddleware(app, {name.upper(): value for name, value in OPTIONS.items()})

    def call() -> None:
        environ = {}
        setup_testing_defaults(environ)
        assert list(wrapped(environ, lambda *_: None)) == [b"ok"]

    call()
    calls.extend([call] * (CALLS - 1))


globals()[way]()
