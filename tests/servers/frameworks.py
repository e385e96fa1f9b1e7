"""The same small API in five frameworks, each behind `MoesifMiddleware` unless `SERVERS_BASE_URI` is unset."""

from __future__ import annotations

import json
import os


def make_flask():
    import flask

    app = flask.Flask("frameworks")

    @app.route("/items/<int:number>", methods=["GET", "POST"])
    def items(number):
        answer = flask.jsonify(number=number, got=flask.request.get_json(silent=True))
        answer.set_cookie("a", "1")
        answer.set_cookie("b", "2")
        return answer

    @app.route("/stream")
    def stream():
        return flask.Response((piece for piece in ("one ", "two")), mimetype="text/plain")

    @app.route("/file")
    def file():
        return flask.send_file(__file__, mimetype="text/plain", conditional=True)

    @app.route("/boom")
    def boom():
        raise RuntimeError

    @app.route("/upload", methods=["POST"])
    def upload():
        return {"size": len(flask.request.files["file"].read()), "field": flask.request.form["field"]}

    return app, "wsgi_app"


def make_bottle():
    import bottle

    app = bottle.Bottle()

    @app.route("/items/<number:int>", method=["GET", "POST"])
    def items(number):
        bottle.response.set_cookie("a", "1")
        bottle.response.set_cookie("b", "2")
        return {"number": number, "got": bottle.request.json}

    @app.route("/stream")
    def stream():
        bottle.response.content_type = "text/plain"
        yield "one "
        yield "two"

    @app.route("/file")
    def file():
        folder, name = os.path.split(__file__)
        return bottle.static_file(name, folder)

    @app.route("/boom")
    def boom():
        raise RuntimeError

    @app.route("/upload", method="POST")
    def upload():
        return {"size": len(bottle.request.files["file"].file.read()), "field": bottle.request.forms["field"]}

    return app, None


def make_pyramid():
    from pyramid.config import Configurator
    from pyramid.response import FileResponse, Response

    def items(request):
        number = int(request.matchdict["number"])
        answer = Response(json_body={"number": number, "got": request.json_body if request.body else None})
        answer.set_cookie("a", "1")
        answer.set_cookie("b", "2")
        return answer

    def stream(request):
        return Response(app_iter=iter([b"one ", b"two"]), content_type="text/plain")

    def file(request):
        return FileResponse(__file__, request=request, content_type="text/plain")

    def boom(request):
        raise RuntimeError

    def upload(request):
        size = len(request.POST["file"].file.read())
        return Response(json_body={"size": size, "field": request.POST["field"]})

    views = {"items": items, "stream": stream, "file": file, "boom": boom, "upload": upload}
    with Configurator() as config:
        for name, view in views.items():
            config.add_route(name, f"/{name}/{{number}}" if name == "items" else f"/{name}")
            config.add_view(view, route_name=name)
        return config.make_wsgi_app(), None


def make_falcon():
    import falcon

    class Items:
        def on_get(self, request, response, number):
            response.media = {"number": number, "got": request.get_media(None)}
            response.set_cookie("a", "1")
            response.set_cookie("b", "2")

        on_post = on_get

    class Stream:
        def on_get(self, request, response):
            response.content_type = "text/plain"
            response.stream = iter([b"one ", b"two"])

    class File:
        def on_get(self, request, response):
            response.content_type = "text/plain"
            response.set_stream(open(__file__, "rb"), os.path.getsize(__file__))

    class Boom:
        def on_get(self, request, response):
            raise RuntimeError

    class Upload:
        def on_post(self, request, response):
            found = {part.name: part.stream.read() for part in request.get_media()}
            response.media = {"size": len(found["file"]), "field": found["field"].decode()}

    app = falcon.App()
    app.add_route("/items/{number:int}", Items())
    app.add_route("/stream", Stream())
    app.add_route("/file", File())
    app.add_route("/boom", Boom())
    app.add_route("/upload", Upload())
    return app, None


def make_django():
    import django
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.http import FileResponse, JsonResponse, StreamingHttpResponse
    from django.urls import path

    def items(request, number):
        answer = JsonResponse({"number": number, "got": json.loads(request.body) if request.body else None})
        answer.set_cookie("a", "1")
        answer.set_cookie("b", "2")
        return answer

    def stream(request):
        return StreamingHttpResponse(iter([b"one ", b"two"]), content_type="text/plain")

    def file(request):
        return FileResponse(open(__file__, "rb"), content_type="text/plain")

    def boom(request):
        raise RuntimeError

    def upload(request):
        return JsonResponse({"size": len(request.FILES["file"].read()), "field": request.POST["field"]})

    urls = type("urls", (), {})
    urls.urlpatterns = [
        path("items/<int:number>", items),
        *(path(view.__name__, view) for view in (stream, file, boom, upload)),
    ]
    settings.configure(ROOT_URLCONF=urls, ALLOWED_HOSTS=["*"], SECRET_KEY="x", LOGGING_CONFIG=None)
    django.setup()
    return get_wsgi_application(), None


def make(name):
    app, attribute = globals()[f"make_{name}"]()
    base_uri = os.environ.get("SERVERS_BASE_URI")
    if base_uri:
        from moesif_otel.wsgi import MoesifMiddleware

        options = {
            "APPLICATION_ID": name,
            "BASE_URI": base_uri,
            "EVENT_BATCH_TIMEOUT": 0.1,
            "DISABLED_TRANSACTION_ID": True,
        }
        if attribute is None:
            return MoesifMiddleware(app, options)
        setattr(app, attribute, MoesifMiddleware(getattr(app, attribute), options))
    return app


application = make(os.environ["SERVERS_FRAMEWORK"])
