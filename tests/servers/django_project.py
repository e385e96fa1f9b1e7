"""A Django project in one module: for tests in this process, and served by real servers in others.

`wsgi` and `asgi` are made when they are asked for, of the MIDDLEWARE that the settings have then.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import django
from django.conf import settings
from django.http import (
    FileResponse,
    Http404,
    HttpResponse,
    HttpResponseNotModified,
    JsonResponse,
    StreamingHttpResponse,
)
from django.urls import include, path
from django.utils.functional import SimpleLazyObject

OURS = "moesif_otel.django.MoesifMiddleware"
BEFORE = (
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.gzip.GZipMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
)


def moesif_options(**options):
    return {"APPLICATION_ID": "django", "EVENT_BATCH_TIMEOUT": 0.05, "DISABLED_TRANSACTION_ID": True, **options}


if not settings.configured:
    settings.configure(
        DEBUG=False,
        SECRET_KEY="for tests",
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF="tests.servers.django_project",
        MIDDLEWARE=[*BEFORE],
        SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
        INSTALLED_APPS=["django.contrib.staticfiles"],
        STATIC_URL="/static/",
        STATICFILES_DIRS=[str(Path(__file__).parent)],
        LOGGING_CONFIG=None,
        USE_TZ=True,
    )
    django.setup()


class User:
    """As much of a user as is looked at."""

    is_authenticated = True

    def get_username(self):
        return "mary"


def lazy_user(get_response):
    """Do what AuthenticationMiddleware does: the user is looked up in the session at the first look."""

    def find(request):
        request._cached_user = User() if request.session.get("a") else None
        return request._cached_user

    def middleware(request):
        request.user = SimpleLazyObject(lambda: find(request))
        return get_response(request)

    return middleware


class Gate:
    """A middleware that keeps what it calls under a name of its own; `turn_away` answers, `wait` comes before the view."""

    turn_away = False
    wait = None

    def __init__(self, get_response):
        self.application = get_response

    def __call__(self, request):
        if Gate.turn_away:
            return JsonResponse({"full": True}, status=429)
        if Gate.wait is not None:
            Gate.wait()
        return self.application(request)


def echo(request, number):
    answer = JsonResponse({"number": number, "got": json.loads(request.body or b"null")}, status=201)
    answer.set_cookie("a", "1")
    answer.set_cookie("b", "2")
    return answer


async def echo_async(request, number):
    await asyncio.sleep(0)
    return JsonResponse({"number": number, "got": json.loads(request.body or b"null")}, status=201)


def upload(request):
    return JsonResponse({"size": len(request.FILES["file"].read()), "field": request.POST["field"]})


def read(request):
    return HttpResponse(b"|".join(iter(lambda: request.read(7), b"")), content_type="text/plain")


def boom(request):
    raise LookupError("secret")


def missing(request):
    raise Http404


def stream(request):
    return StreamingHttpResponse(iter([b"one ", b"two"]), content_type="text/plain")


async def stream_async(request):
    async def pieces():
        for piece in (b"one ", b"two"):
            await asyncio.sleep(0)
            yield piece

    return StreamingHttpResponse(pieces(), content_type="text/plain")


def forever(request):
    async def pieces():
        while True:
            yield bytes(65_536)
            await asyncio.sleep(0.001)

    endless = pieces() if hasattr(request, "scope") else (bytes(65_536) for _ in iter(int, 1))
    return StreamingHttpResponse(endless, content_type="application/octet-stream")


def file(request):
    return FileResponse(Path(__file__).open("rb"), content_type="text/plain")


def long(request):
    return HttpResponse(b"x" * 5000, content_type="text/plain")


def fresh(request):
    return HttpResponseNotModified()


def login(request):
    request.user = User()
    request.session["a"] = 1
    return HttpResponse(b"in", content_type="text/plain")


views = [
    path("items/<int:number>", echo),
    path("async/items/<int:number>", echo_async),
    *(path(view.__name__, view) for view in (upload, read, boom, missing, stream, stream_async, forever, file, long, fresh, login)),
]
urlpatterns = [*views, path("django/", include(views))]


def __getattr__(name):
    if name == "wsgi":
        from django.core.wsgi import get_wsgi_application

        return get_wsgi_application()
    if name == "asgi":
        from django.core.asgi import get_asgi_application

        return get_asgi_application()
    raise AttributeError(name)
