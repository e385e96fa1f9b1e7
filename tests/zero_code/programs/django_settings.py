"""Settings, URLs and a view: a Django project in one file."""

SECRET_KEY = "for tests"
DEBUG = False
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "django_urls"
USE_TZ = True


MIDDLEWARE: list = []
