"""One WSGI application that passes each call on to an application of one framework, or answers itself."""

import json
import os

import bottle
import falcon
import flask
from pyramid.config import Configurator
from pyramid.response import Response

flask_app = flask.Flask("flask_app")


@flask_app.post("/flask/echo")
def flask_echo():
    return {"by": "flask", "got": flask.request.get_json()}, 201


@flask_app.get("/flask/stream")
def flask_stream():
    return flask.Response((piece for piece in ("one ", "two")), content_type="text/plain")


@flask_app.get("/flask/fail")
def flask_fail():
    raise LookupError


bottle_app = bottle.Bottle()


@bottle_app.post("/bottle/echo")
def bottle_echo():
    bottle.response.status = 201
    return {"by": "bottle", "got": bottle.request.json}


def pyramid_echo(request):
    return Response(json={"by": "pyramid", "got": request.json_body}, status=201)


with Configurator() as config:
    config.add_route("echo", "/pyramid/echo")
    config.add_view(pyramid_echo, route_name="echo", request_method="POST")
    pyramid_app = config.make_wsgi_app()


class FalconEcho:
    def on_post(self, request, response):
        response.media = {"by": "falcon", "got": request.media}
        response.status = falcon.HTTP_201


falcon_app = falcon.App()
falcon_app.add_route("/falcon/echo", FalconEcho())


def make_django_app():
    if not os.environ.get("DJANGO_SETTINGS_MODULE"):
        return None
    from django.core.wsgi import get_wsgi_application

    return get_wsgi_application()


django_app = make_django_app()


def plain_app(environ, start_response):
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    answer = json.dumps({"by": "plain", "got": json.loads(body or b"null")}).encode()
    start_response("201 Created", [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
    return [answer]


APPS = {
    "flask": flask_app,
    "bottle": bottle_app,
    "pyramid": pyramid_app,
    "falcon": falcon_app,
    "django": django_app,
    "plain": plain_app,
}


def application(environ, start_response):
    return APPS[environ["PATH_INFO"].split("/")[1]](environ, start_response)
