"""The programs that are measured: one application, with each variant of capture around it.

Runs in the environment of the variant and imports only what that variant needs. `VARIANT` and `MOESIF_URL` in the
environment say what to make.

    gunicorn benchmarks.programs:wsgi()           python -m benchmarks.programs tornado PORT
    uvicorn --factory benchmarks.programs:asgi    python -m benchmarks.programs calls URL COUNT
"""

from __future__ import annotations

import json
import os
import sys
import time

VARIANT = os.environ.get("VARIANT", "bare")
URL = os.environ.get("MOESIF_URL", "http://127.0.0.1:9")
SETTINGS = {
    "APPLICATION_ID": "benchmark",
    "BASE_URI": URL,
    "LOCAL_MOESIF_BASEURL": URL,  # the packages that are replaced
    "EVENT_QUEUE_SIZE": 1_000_000 if "queue" not in VARIANT else 10_000,
}


def answer(size_bytes: int) -> bytes:
    """Return JSON of about this size."""
    row = {"id": 12345, "name": "A name of some length", "tags": ["a", "b"], "price": 12.5, "active": True}
    return json.dumps({"items": [row] * max(1, size_bytes // (len(json.dumps(row)) + 2))}).encode()


ANSWERS = {size: answer(size) for size in (200, 1_700, 4_000, 40_000)}


def _global_provider():
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider(shutdown_on_exit=False)
    trace.set_tracer_provider(provider)
    return provider


def wsgi():
    """Return the WSGI application of the variant."""
    from flask import Flask, Response, request, stream_with_context

    app = Flask(__name__)

    @app.post("/items/<int:size>")
    def items(size):
        request.get_data()
        body = ANSWERS.get(size) or answer(size)
        return Response(body, mimetype="application/json")

    @app.get("/stream/<int:size>")
    def stream(size):
        piece = b"x" * 65_536
        return Response(stream_with_context(piece for _ in range(size // len(piece))), mimetype="text/plain")

    if VARIANT.startswith("otel"):
        from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware

        app.wsgi_app = OpenTelemetryMiddleware(app.wsgi_app, tracer_provider=_global_provider())
    elif VARIANT.startswith("ours"):
        if "provider" in VARIANT:
            _global_provider()
        from moesif_otel.wsgi import MoesifMiddleware

        app.wsgi_app = MoesifMiddleware(app.wsgi_app, SETTINGS)
    elif VARIANT == "replaced":
        from moesifwsgi import MoesifMiddleware

        app.wsgi_app = MoesifMiddleware(app.wsgi_app, SETTINGS)
    return app


def asgi():
    """Return the ASGI application of the variant."""
    from fastapi import FastAPI, Request
    from fastapi.responses import Response

    app = FastAPI()

    async def items(size, request):
        await request.body()
        return Response(ANSWERS.get(size) or answer(size), media_type="application/json")

    # FastAPI reads these at run time, and cannot find a name of this function in a text.
    items.__annotations__ = {"size": int, "request": Request}
    app.post("/items/{size}")(items)

    if VARIANT.startswith("otel"):
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

        app.add_middleware(OpenTelemetryMiddleware, tracer_provider=_global_provider())
    elif VARIANT.startswith("ours"):
        if "provider" in VARIANT:
            _global_provider()
        from moesif_otel.asgi import MoesifMiddleware

        app.add_middleware(MoesifMiddleware, settings=SETTINGS)
    elif VARIANT == "replaced":
        from moesifasgi import MoesifMiddleware

        app.add_middleware(MoesifMiddleware, settings=SETTINGS)
    elif VARIANT == "bare provider":
        _global_provider()  # FastAPI makes spans of its own then
    return app


def tornado(port):
    """Serve the Tornado application of the variant."""
    import asyncio
    import logging

    import tornado.web

    logging.getLogger("tornado.access").setLevel(logging.WARNING)
    if VARIANT.startswith("otel"):
        from opentelemetry.instrumentation.tornado import TornadoInstrumentor

        TornadoInstrumentor().instrument(tracer_provider=_global_provider())

    class Items(tornado.web.RequestHandler):
        def post(self, size):
            self.set_header("Content-Type", "application/json")
            self.write(ANSWERS.get(int(size)) or answer(int(size)))

    keywords = {}
    if VARIANT.startswith("ours"):
        if "provider" in VARIANT:
            _global_provider()
        from moesif_otel.tornado import MoesifMiddleware

        keywords["log_function"] = MoesifMiddleware(SETTINGS).log_event
    elif VARIANT == "replaced":
        from moesiftornado import MoesifMiddleware

        keywords["log_function"] = MoesifMiddleware(SETTINGS).log_event
    application = tornado.web.Application([(r"/items/(\d+)", Items)], **keywords)

    async def serve():
        application.listen(int(port), "127.0.0.1")
        await asyncio.Event().wait()

    asyncio.run(serve())


def calls(url, count):
    """Make outgoing calls and print the CPU seconds that they took, ours included."""
    import requests

    capture = None
    if VARIANT.startswith(("otel", "ours provider")):
        from opentelemetry.instrumentation.requests import RequestsInstrumentor

        RequestsInstrumentor().instrument(tracer_provider=_global_provider())
    if VARIANT.startswith("ours"):
        from moesif_otel.outgoing import start_capture_outgoing

        capture = start_capture_outgoing(SETTINGS)
    elif VARIANT == "replaced":
        from moesifpythonrequest.start_capture.start_capture import StartCapture

        # It reads its address only with LOCAL_DEBUG.
        StartCapture().start_capture_outgoing({**SETTINGS, "LOCAL_DEBUG": True})
    body = answer(1_700)
    headers = {"Content-Type": "application/json"}
    with requests.Session() as session:
        for _ in range(200):
            session.post(url, data=body, headers=headers).content  # noqa: B018 - read
        started_s = time.process_time()
        for _ in range(int(count)):
            session.post(url, data=body, headers=headers).content  # noqa: B018 - read
        if capture is not None:
            capture.force_flush()
        spent_s = time.process_time() - started_s
    print("\n" + json.dumps({"cpu_us": spent_s / int(count) * 1e6}), flush=True)
    os._exit(0)


def start():
    """Print what import and construction cost: over OpenTelemetry and moesifapi, in milliseconds."""
    import moesifapi  # noqa: F401
    import opentelemetry.instrumentation.wsgi
    import opentelemetry.sdk.trace  # noqa: F401

    started_s = time.perf_counter()
    from moesif_otel.wsgi import MoesifMiddleware

    imported_s = time.perf_counter()
    MoesifMiddleware(lambda environ, start_response: [], SETTINGS)
    print(
        json.dumps(
            {
                "import_ms": (imported_s - started_s) * 1e3,
                "construction_ms": (time.perf_counter() - imported_s) * 1e3,
            }
        )
    )


if __name__ == "__main__":
    {"tornado": tornado, "calls": calls, "start": start}[sys.argv[1]](*sys.argv[2:])
