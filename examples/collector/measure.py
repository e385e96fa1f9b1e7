"""What one process can send: `python measure.py [bytes of a body] [seconds]`; against a running Collector (COLLECTOR).

Calls with a JSON body each way go through the WSGI middleware, as fast as they are taken. It prints the rate
that reached the Collector, CPU time for each call, and what was dropped.
"""

import io
import json
import os
import sys
import time
from wsgiref.util import setup_testing_defaults

from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

from moesif_otel import MoesifSpanProcessor
from moesif_otel.wsgi import MoesifMiddleware

body_bytes = int(sys.argv[1]) if len(sys.argv) > 1 else 4_000
duration_s = float(sys.argv[2]) if len(sys.argv) > 2 else 5.0

address = os.environ.get("COLLECTOR", "http://127.0.0.1:4318")
compression = Compression.Gzip if os.environ.get("GZIP") else Compression.NoCompression
settings = {"APPLICATION_ID": "measured", "EVENT_QUEUE_SIZE": 2_000}
processor = MoesifSpanProcessor(
    settings,
    exporter=OTLPSpanExporter(endpoint=f"{address}/v1/traces", compression=compression),
)
rows = [{"id": number, "name": f"item {number}", "tags": ["a", "b"], "price": number / 7} for number in range(10_000)]
body = json.dumps(rows)[:body_bytes].rpartition("}")[0].encode() + b"}]"


def app(environ, start_response):
    """Answer with the same body."""
    environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "application/json")])
    return [body]


# Equal settings: its calls go through the processor's pipeline, and so to the Collector.
captured_app = MoesifMiddleware(app, settings)


def call():
    """Make one call."""
    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": "/orders", "CONTENT_LENGTH": str(len(body))}
    setup_testing_defaults(environ)
    environ["CONTENT_TYPE"], environ["wsgi.input"] = "application/json", io.BytesIO(body)
    captured_app(environ, lambda *_: None)


started_s, cpu_s = time.monotonic(), time.process_time()
while time.monotonic() - started_s < duration_s:
    for _ in range(100):
        call()
    while processor.stats().pending > 1_500:
        time.sleep(0.002)
flushed = processor.force_flush(20_000)
took_s, cpu_s = time.monotonic() - started_s, time.process_time() - cpu_s
stats = processor.stats()
print(
    f"{len(body)} bytes each way: {stats.delivered / took_s:.0f} calls/s, "
    f"{1e6 * cpu_s / max(1, stats.accepted):.0f} µs of CPU a call, {stats.bytes_sent / took_s / 1e6:.1f} MB/s, "
    f"dropped {stats.dropped}, flushed {flushed}"
)
