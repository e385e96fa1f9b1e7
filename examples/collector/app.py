"""A service that sends its calls by OTLP to a Collector beside it, which forwards them to Moesif.

MOESIF_APPLICATION_ID=… otelcol-contrib --config collector.yaml
MOESIF_APPLICATION_ID=… python app.py

needs `pip install '../..[otlp]' flask`. README.md has the sizes.
"""

import os

import flask
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider

from moesif_otel import MoesifSpanProcessor, instrument

COLLECTOR = os.environ.get("COLLECTOR", "http://127.0.0.1:4318")

settings = {
    "APPLICATION_ID": os.environ["MOESIF_APPLICATION_ID"],
    "IDENTIFY_USER": lambda app, environ: environ.get("HTTP_X_USER"),
    "REQUEST_BODY_MASKS": ["card"],
}
to_collector = OTLPSpanExporter(endpoint=f"{COLLECTOR}/v1/traces", compression=Compression.Gzip)
provider = TracerProvider(resource=Resource.create({"service.name": "orders"}))
# Private copies, with bodies and identity, go to this exporter alone. Others of the provider never see them.
provider.add_span_processor(MoesifSpanProcessor(settings, exporter=to_collector))
trace.set_tracer_provider(provider)
instrument(settings)

app = flask.Flask(__name__)


@app.post("/orders")
def order():
    """Take an order."""
    return {"taken": flask.request.get_json()["item"]}, 201


if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "5000")))
