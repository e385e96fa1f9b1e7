"""A Django project in one file, whose calls reach Moesif.

    MOESIF_APPLICATION_ID=... python examples/django/app.py          (WSGI)
    MOESIF_APPLICATION_ID=... python examples/django/app.py asgi

Needs django and waitress (uvicorn for ASGI) beside moesif-otel.
With MOESIF_BASE_URI=http://127.0.0.1:8765 they go to `moesif-otel sandbox` instead. PORT defaults to 8000.
"""

import json
import os
import sys

import django
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import JsonResponse
from django.urls import path

BOOKS = {1: {"id": 1, "title": "The Left Hand of Darkness"}}


def identify_user(request, response):
    # Without it the user is the name of `request.user`, where a view has looked the user up.
    return request.headers.get("X-User-Id")


def get_metadata(request, response):
    match = request.resolver_match  # None for a URL without a view
    return {"datacenter": "westus", "view": match and match.view_name}


settings.configure(
    SECRET_KEY="an example's",
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
    ROOT_URLCONF=__name__,
    MIDDLEWARE=["django.middleware.common.CommonMiddleware", "moesif_otel.django.MoesifMiddleware"],
    MOESIF_MIDDLEWARE={"IDENTIFY_USER": identify_user, "GET_METADATA": get_metadata},
)
django.setup()


async def get_book(request, book_id):
    book = BOOKS.get(book_id)
    return JsonResponse(book) if book else JsonResponse({"error": "no such book"}, status=404)


def add_book(request):
    book = {"id": len(BOOKS) + 1, "title": json.loads(request.body)["title"]}
    BOOKS[book["id"]] = book
    return JsonResponse(book, status=201)


urlpatterns = [path("books/<int:book_id>", get_book), path("books", add_book)]

if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    if "asgi" in sys.argv:
        import uvicorn

        uvicorn.run(get_asgi_application(), host="127.0.0.1", port=port)
    else:
        from waitress import serve

        serve(get_wsgi_application(), host="127.0.0.1", port=port)
