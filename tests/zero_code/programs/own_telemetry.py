"""An application with telemetry of its own; serves itself some calls and says what its backend and its peers got.

`own_telemetry.py <mode> <provider> <sampler>`: mode `without`, `instrument`, `middleware` or `processor` (ours, from
code; none of them in the zero-code run); provider `global` or `own`; sampler `off`, `on` or `parent`.
"""

import asyncio
import json
import os
import re
import sys
import threading
import urllib.request

MODE, PROVIDER, SAMPLER = sys.argv[1:4]

from opentelemetry import trace  # noqa: E402
from opentelemetry.sdk.metrics import MeterProvider  # noqa: E402
from opentelemetry.sdk.metrics.export import InMemoryMetricReader  # noqa: E402
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, TraceIdRatioBased  # noqa: E402

sampler = {"off": ALWAYS_OFF, "on": ALWAYS_ON, "parent": ParentBased(TraceIdRatioBased(0))}[SAMPLER]
provider = TracerProvider(sampler=sampler)
exporter = InMemorySpanExporter()
provider.add_span_processor(SimpleSpanProcessor(exporter))
if PROVIDER == "global":
    trace.set_tracer_provider(provider)
reader = InMemoryMetricReader()
meters = MeterProvider(metric_readers=[reader])

SETTINGS = {
    "APPLICATION_ID": f"{MODE} {PROVIDER} {SAMPLER}",
    "BASE_URI": os.environ["MOESIF_BASE_URI"],
    "CAPTURE_OUTGOING_REQUESTS": True,
    "DISABLED_TRANSACTION_ID": True,
}
handles = []
if MODE == "instrument":
    import moesif_otel

    handles.append(moesif_otel.instrument(SETTINGS))
elif MODE == "processor":
    import moesif_otel

    ours = moesif_otel.MoesifSpanProcessor(SETTINGS)
    provider.add_span_processor(ours)
    handles.append(moesif_otel.instrument(SETTINGS))
    assert handles[0].pipeline() is ours.pipeline

import flask  # noqa: E402
import requests  # noqa: E402
import tornado.httpclient  # noqa: E402
import tornado.httpserver  # noqa: E402
import tornado.netutil  # noqa: E402
import tornado.web  # noqa: E402
from opentelemetry.instrumentation.flask import FlaskInstrumentor  # noqa: E402
from opentelemetry.instrumentation.requests import RequestsInstrumentor  # noqa: E402
from opentelemetry.instrumentation.tornado import TornadoInstrumentor  # noqa: E402
from werkzeug.serving import make_server  # noqa: E402

app = flask.Flask("own")
seen_headers = []


@app.get("/plain")
def plain():
    span = trace.get_current_span()
    return {"recording": span.is_recording()}


@app.get("/stream")
def stream():
    return flask.Response(piece for piece in ("a", "b"))


@app.get("/fail")
def fail():
    raise LookupError


@app.get("/fetch")
def fetch():
    return {"n": len(requests.get(f"http://127.0.0.1:{port}/peer", timeout=10, headers={"X-Mine": "1"}).content)}


@app.get("/peer")
def peer():
    names = sorted(name for name, _ in flask.request.headers)
    seen_headers.append([names, (flask.request.headers.get("traceparent") or "")[-3:]])
    return "peer"


def instrument_flask():
    FlaskInstrumentor().instrument_app(app, tracer_provider=provider, meter_provider=meters)


if MODE == "middleware":
    from moesif_otel import MoesifMiddleware

    # As its documentation says, around what is there; the application is instrumented afterwards.
    app.wsgi_app = MoesifMiddleware(app.wsgi_app, SETTINGS)
    handles.append(app.wsgi_app)
if not getattr(app, "_is_instrumented_by_opentelemetry", False):
    instrument_flask()
RequestsInstrumentor().instrument(tracer_provider=provider, meter_provider=meters)
TornadoInstrumentor().instrument(tracer_provider=provider, meter_provider=meters)

server = make_server("127.0.0.1", 0, app, threaded=True)
port = server.server_port
threading.Thread(target=server.serve_forever, daemon=True).start()


class Hello(tornado.web.RequestHandler):
    async def get(self):
        answer = await tornado.httpclient.AsyncHTTPClient().fetch(f"http://127.0.0.1:{port}/peer")
        self.write({"status": answer.code})


def call(address, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10) as answer:
            return answer.status, answer.read().decode(), sorted(name for name, _ in answer.getheaders())
    except urllib.error.HTTPError as error:
        return error.code, "", sorted(name for name, _ in error.headers.items())


async def main():
    sockets = tornado.netutil.bind_sockets(0, "127.0.0.1")
    tornado.httpserver.HTTPServer(tornado.web.Application([("/hello", Hello)])).add_sockets(sockets)
    address = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/hello"
    traced = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    calls = []
    for path in ("plain", "stream", "fail", "fetch"):
        for headers in ({}, {"traceparent": traced}):
            calls.append(await asyncio.to_thread(call, f"http://127.0.0.1:{port}/{path}", **headers))
    for headers in ({}, {"traceparent": traced}):
        calls.append(await asyncio.to_thread(call, address, **headers))
    await asyncio.sleep(0.1)
    return calls


calls = asyncio.run(main())
server.shutdown()
for thread in threading.enumerate():
    if "process_request_thread" in thread.name:
        thread.join()

spans = exporter.get_finished_spans()
names = {span.context.span_id: span.name for span in spans}
names[0xB7AD6B7169203331] = "the caller"


def without_ports(value):
    return re.sub(r"(127\.0\.0\.1):\d+", r"\1", str(value))


def described(span):
    return {
        "name": span.name,
        "kind": span.kind.name,
        "parent": None if span.parent is None else names.get(span.parent.span_id, "unknown"),
        "sampled": span.context.trace_flags.sampled,
        "status": span.status.status_code.name,
        "events": [event.name for event in span.events],
        "links": len(span.links),
        "resource": sorted(key for key in span.resource.attributes if "instance" not in key),
        "scope": span.instrumentation_scope.name,
        "attributes": {
            key: without_ports(value) for key, value in sorted(span.attributes.items()) if not key.endswith("port")
        },
    }


def metrics():
    data = reader.get_metrics_data()
    found = []
    for resource in data.resource_metrics if data else []:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    labels = {k: without_ports(v) for k, v in sorted(point.attributes.items()) if not k.endswith("port")}
                    count = getattr(point, "count", getattr(point, "value", None))
                    found.append([metric.name, count, labels])
    return sorted(found, key=json.dumps)


for handle in handles:
    handle.force_flush(5000)
    (getattr(handle, "stop", None) or handle.shutdown)()
print(
    "RESULT "
    + json.dumps(
        {
            "calls": calls,
            "headers": sorted(seen_headers, key=json.dumps),
            "spans": sorted(map(described, spans), key=json.dumps),
            "metrics": metrics(),
        }
    ),
    flush=True,
)
