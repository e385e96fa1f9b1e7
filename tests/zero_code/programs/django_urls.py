"""The one view of the Django project."""

import json

from django.http import JsonResponse
from django.urls import path


def echo(request):
    return JsonResponse({"by": "django", "got": json.loads(request.body)}, status=201)


urlpatterns = [path("django/echo", echo)]
