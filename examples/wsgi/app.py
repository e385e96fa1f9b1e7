"""A plain WSGI service, on the standard library's server, whose calls reach Moesif.

    MOESIF_APPLICATION_ID=... python examples/wsgi/app.py

With MOESIF_BASE_URI=http://127.0.0.1:8765 they go to `moesif-otel sandbox` instead. PORT defaults to 8000.
"""

import json
import os
from wsgiref.simple_server import make_server

from moesif_otel.wsgi import MoesifMiddleware


def application(environ, start_response):
    path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
    if path == "/echo" and method == "POST":
        size = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(size)
        start_response("200 OK", [("Content-Type", environ.get("CONTENT_TYPE", "application/octet-stream"))])
        return [body]
    if path == "/broken":
        raise RuntimeError("the server answers 500, and the call is recorded")
    status, value = ("200 OK", {"up": True}) if path == "/status" else ("404 Not Found", {"error": path})
    start_response(status, [("Content-Type", "application/json")])
    return [json.dumps(value).encode()]


application = MoesifMiddleware(
    application,
    {
        "APPLICATION_ID": os.environ["MOESIF_APPLICATION_ID"],
        "BASE_URI": os.environ.get("MOESIF_BASE_URI", "https://api.moesif.net"),
    },
)

if __name__ == "__main__":
    with make_server("127.0.0.1", int(os.environ.get("PORT", "8000")), application) as server:
        server.serve_forever()
