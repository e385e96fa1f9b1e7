"""A service with an OpenTelemetry pipeline of its own, and Moesif as one more exporter of it.

MOESIF_APPLICATION_ID=… python app.py          spans become events: method, URL, status, user, headers that are captured
MOESIF_APPLICATION_ID=… python app.py bodies   bodies, too

needs `pip install ../.. fastapi uvicorn flask requests opentelemetry-instrumentation-{fastapi,flask,requests}`
"""

import os
import sys
import threading

import fastapi
import flask
import requests
import uvicorn
from opentelemetry import trace
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.instrumentation.requests import RequestsInstrumentor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from werkzeug.serving import make_server

from moesif_otel import MoesifSpanExporter, MoesifSpanProcessor, instrument

provider = TracerProvider(resource=Resource.create({"service.name": "existing-pipeline"}))
# … the exporters that you have: provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
if "bodies" in sys.argv:
    # The processor delivers every call that `instrument` captures, with bodies, whatever the sampler.
    settings = {
        "APPLICATION_ID": os.environ["MOESIF_APPLICATION_ID"],
        "BASE_URI": os.environ.get("MOESIF_BASE_URI"),
        "CAPTURE_OUTGOING_REQUESTS": True,
    }
    provider.add_span_processor(MoesifSpanProcessor(settings))
    instrument(settings)
# The exporter delivers every other HTTP span of any instrumentation; no call twice.
provider.add_span_processor(BatchSpanProcessor(MoesifSpanExporter(application_id=os.environ["MOESIF_APPLICATION_ID"])))
trace.set_tracer_provider(provider)

api = fastapi.FastAPI()
site = flask.Flask(__name__)
FastAPIInstrumentor().instrument_app(api)
FlaskInstrumentor().instrument_app(site)
RequestsInstrumentor().instrument()
stock = make_server("127.0.0.1", 0, site, threaded=True)


@site.get("/stock/<item>")
def in_stock(item: str):
    """Serve on a WSGI server."""
    # Attributes of the SERVER span that Moesif knows: user.id, company.id, session.id.
    trace.get_current_span().set_attribute("company.id", "warehouse")
    return {"item": item, "left": 3}


@api.get("/items/{item}")
def show(item: str):
    """Serve on an ASGI server."""
    trace.get_current_span().set_attribute("user.id", "mary")
    return requests.get(f"http://127.0.0.1:{stock.server_port}/stock/{item}", timeout=5).json()


if __name__ == "__main__":
    threading.Thread(target=stock.serve_forever, daemon=True).start()
    uvicorn.run(api, port=int(os.environ.get("PORT", "8000")), log_level="warning")
