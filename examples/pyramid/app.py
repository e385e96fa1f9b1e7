"""A Pyramid service whose calls reach Moesif.

    MOESIF_APPLICATION_ID=... python examples/pyramid/app.py

Needs pyramid and waitress beside moesif-otel.
With MOESIF_BASE_URI=http://127.0.0.1:8765 they go to `moesif-otel sandbox` instead. PORT defaults to 8000.
"""

import os

from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPNotFound
from pyramid.response import Response
from waitress import serve

from moesif_otel.wsgi import MoesifMiddleware

CITIES = {"oslo": {"country": "NO"}, "lima": {"country": "PE"}}


def get_city(request):
    city = CITIES.get(request.matchdict["name"])
    if city is None:
        raise HTTPNotFound(json_body={"error": "no such city"})
    return city


def put_city(request):
    CITIES[request.matchdict["name"]] = request.json_body
    response = Response(json_body=request.json_body, status=201)
    response.set_cookie("last", request.matchdict["name"])
    response.set_cookie("seen", "1")
    return response


def get_session_token(app, environ):
    return environ.get("HTTP_X_SESSION")


def make_app():
    with Configurator() as config:
        config.add_route("city", "/cities/{name}")
        config.add_view(get_city, route_name="city", request_method="GET", renderer="json")
        config.add_view(put_city, route_name="city", request_method="PUT")
        app = config.make_wsgi_app()
    return MoesifMiddleware(
        app,
        {
            "APPLICATION_ID": os.environ["MOESIF_APPLICATION_ID"],
            "BASE_URI": os.environ.get("MOESIF_BASE_URI", "https://api.moesif.net"),
            "API_VERSION": "2.1",
            "GET_SESSION_TOKEN": get_session_token,
        },
    )


if __name__ == "__main__":
    serve(make_app(), host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
