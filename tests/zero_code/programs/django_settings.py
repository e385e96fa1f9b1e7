"""Settings, URLs and a view: a Django project in one file."""

SECRET_KEY = "for tests"
DEBUG = False
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "django_urls"
USE_TZ = True
# So that a test sees when a change was seen.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "loggers": {"django.utils.autoreload": {"handlers": ["console"], "level": "INFO", "propagate": False}},
}


MIDDLEWARE: list = []
