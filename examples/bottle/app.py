"""A Bottle service whose calls reach Moesif.

    MOESIF_APPLICATION_ID=... python examples/bottle/app.py

Needs bottle and waitress beside moesif-otel.
With MOESIF_BASE_URI=http://127.0.0.1:8765 they go to `moesif-otel sandbox` instead. PORT defaults to 8000.
"""

import os

import bottle
from waitress import serve

from moesif_otel.wsgi import MoesifMiddleware

app = bottle.Bottle()


@app.get("/hello/<name>")
def hello(name):
    return {"hello": name}


@app.post("/sum")
def add():
    numbers = bottle.request.json["numbers"]
    return {"sum": sum(numbers)}


@app.get("/secret")
def secret():
    bottle.response.status = 403
    return {"error": "not for you"}


def skip(app, environ):
    return environ["PATH_INFO"] == "/health"


@app.get("/health")
def health():
    return "ok"


def identify_company(app, environ):
    return environ.get("HTTP_X_COMPANY_ID")


# The user comes from the Authorization header: a Bearer token's `sub`, or the name of Basic.
application = MoesifMiddleware(
    app,
    {
        "APPLICATION_ID": os.environ["MOESIF_APPLICATION_ID"],
        "BASE_URI": os.environ.get("MOESIF_BASE_URI", "https://api.moesif.net"),
        "SKIP": skip,
        "IDENTIFY_COMPANY": identify_company,
    },
)

if __name__ == "__main__":
    serve(application, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
