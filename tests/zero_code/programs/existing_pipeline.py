"""A pipeline that exists already: every HTTP instrumentation, with Moesif's exporter behind a batch processor.

The conventions are those of `OTEL_SEMCONV_STABILITY_OPT_IN`. Each client calls its own path of one server.
"""

import asyncio
import os
import threading

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from moesif_otel import MoesifSpanExporter

provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(MoesifSpanExporter(application_id=os.environ["MOESIF_APPLICATION_ID"])))
trace.set_tracer_provider(provider)

import aiohttp  # noqa: E402
import django  # noqa: E402
import fastapi  # noqa: E402
import flask  # noqa: E402
import httpx  # noqa: E402
import requests  # noqa: E402
import tornado.httpclient  # noqa: E402
import tornado.web  # noqa: E402
import urllib3  # noqa: E402
import uvicorn  # noqa: E402
from opentelemetry.instrumentation.aiohttp_client import AioHttpClientInstrumentor  # noqa: E402
from opentelemetry.instrumentation.django import DjangoInstrumentor  # noqa: E402
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor  # noqa: E402
from opentelemetry.instrumentation.flask import FlaskInstrumentor  # noqa: E402
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor  # noqa: E402
from opentelemetry.instrumentation.requests import RequestsInstrumentor  # noqa: E402
from opentelemetry.instrumentation.tornado import TornadoInstrumentor  # noqa: E402
from opentelemetry.instrumentation.urllib3 import URLLib3Instrumentor  # noqa: E402
from werkzeug.serving import make_server  # noqa: E402

DjangoInstrumentor().instrument()
django.setup()
TornadoInstrumentor().instrument()
for instrumentor in (AioHttpClientInstrumentor, HTTPXClientInstrumentor, RequestsInstrumentor, URLLib3Instrumentor):
    instrumentor().instrument()

flask_app = flask.Flask("flask_app")
FlaskInstrumentor().instrument_app(flask_app)


@flask_app.route("/by/<client>", methods=["GET", "POST"])
def by(client):
    if client == "nobody":
        raise LookupError("nobody")
    span = trace.get_current_span()
    span.set_attribute("user.id", f"user of {client}")
    span.set_attribute("company.id", "company 7")
    span.set_attribute("session.id", "session 9")
    span.set_attribute("http.request.body.content", '{"from": "an instrumentation that captures bodies"}')
    with trace.get_tracer("mine").start_as_current_span("work that is no call"):
        return {"hello": client}, 202, {"X-Answer": "yes"}


fastapi_app = fastapi.FastAPI()
FastAPIInstrumentor().instrument_app(fastapi_app)


@fastapi_app.get("/asgi/{name}")
def asgi(name: str):
    return {"hello": name}


class Hello(tornado.web.RequestHandler):
    def get(self):
        self.write({"hello": "tornado"})


from django.core.wsgi import get_wsgi_application  # noqa: E402

django_app = get_wsgi_application()


def serve(app):
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


async def main():
    flask_at, django_at = serve(flask_app), serve(django_app)
    server = uvicorn.Server(uvicorn.Config(fastapi_app, port=0, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn offers no event
        await asyncio.sleep(0.02)
    asgi_at = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    http_server = tornado.web.Application([("/tornado", Hello)]).listen(0, "127.0.0.1")
    tornado_at = f"http://127.0.0.1:{next(iter(http_server._sockets.values())).getsockname()[1]}"

    mine = {"X-Mine": "captured", "Authorization": "Bearer very-secret"}
    call = asyncio.to_thread
    await call(requests.get, f"{flask_at}/by/requests?q=1", headers=mine, timeout=9)
    await call(urllib3.PoolManager().request, "POST", f"{flask_at}/by/urllib3", headers=mine, body=b"{}")
    await call(httpx.get, f"{flask_at}/by/httpx", headers=mine)
    await call(requests.get, f"{flask_at}/by/nobody", timeout=9)
    await call(requests.post, f"{django_at}/django/echo", json={"n": 1}, headers=mine, timeout=9)
    await call(requests.get, f"{asgi_at}/asgi/fastapi", headers=mine, timeout=9)
    async with aiohttp.ClientSession() as session, session.get(f"{flask_at}/by/aiohttp", headers=mine):
        pass
    await tornado.httpclient.AsyncHTTPClient().fetch(f"{tornado_at}/tornado", headers=mine)
    try:
        await call(requests.get, "http://127.0.0.1:9/refused", timeout=9)
    except requests.ConnectionError:
        print("refused", flush=True)
    http_server.stop()
    server.should_exit = True
    await serving


asyncio.run(main())
print("done", provider.force_flush(8000), flush=True)
