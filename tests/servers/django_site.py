"""The Django project as real servers import it: `application` for WSGI, `asgi` for ASGI; `SERVERS_OURS` adds ours."""

import os

from tests.servers import django_project

from django.conf import settings  # isort: skip - it is configured above

settings.ALLOWED_HOSTS = ["shop.example"]
if os.environ.get("SERVERS_OURS"):
    settings.MIDDLEWARE = [*django_project.BEFORE, django_project.OURS]
    settings.MOESIF_MIDDLEWARE = {"DISABLED_TRANSACTION_ID": True, "EVENT_BATCH_TIMEOUT": 0.1}  # the rest: environment

application = django_project.wsgi
asgi = django_project.asgi
