"""Where calls are met in an application that knows nothing of Moesif: the table of frameworks and servers.

Frameworks are met at their `__call__`, servers where they learn of their application, for applications of no framework.
A layer stays where it is once put on, and passes through while nobody captures: others may have wrapped it since.
Nothing here imports a framework or a server, or raises into an import or a request.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, Protocol

import wrapt

from moesif_otel._capture.patching import Patch, PatchSet
from moesif_otel._guard import PROCESS_GUARD

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ROWS", "ServedApplication", "Serving", "install"]


class Serving(Protocol):
    """Who takes the calls that the rows meet (`instrument`)."""

    def prepare(self) -> None:
        """Get ready: a server is about to serve. Never raises."""
        ...

    def prepare_tornado(self) -> None:
        """Get ready for Tornado: an application of it was made. Never raises."""
        ...

    def serve(self, app: Any, environ: Any, start_response: Any, framework_app: Any = None) -> Any:
        """Call a WSGI application and capture the call; raises what the application raises."""
        ...


def _is_wsgi_call(environ: Any, start_response: Any) -> bool:
    # ASGI passes (scope, receive, send), and anything may be called by its own users in other ways.
    return isinstance(environ, dict) and callable(start_response)


def _framework_call(serving: Serving, call: Any, app: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Serve `__call__(self, environ, start_response)` of a framework's application."""
    if len(args) != 2 or kwargs or not _is_wsgi_call(*args):
        return call(app, *args, **kwargs)
    return serving.serve(functools.partial(call, app), *args, app)


def _application_of_server(attribute: str) -> Callable[..., None]:
    """Return the layer for a server's `__init__` that keeps its application in `attribute`."""

    def initialise(serving: Serving, init: Any, server: Any, /, *args: Any, **kwargs: Any) -> None:
        init(server, *args, **kwargs)
        _replace_application(serving, server, attribute)

    return initialise


def _replace_application(serving: Serving, server: Any, attribute: str) -> None:
    try:
        app = getattr(server, attribute, None)
        if callable(app) and type(app) is not ServedApplication:
            setattr(server, attribute, ServedApplication(app, serving))
            serving.prepare()
    except Exception as exc:
        PROCESS_GUARD.caught("meeting the application of a server", exc)


# Other workers of gunicorn take ASGI or Tornado applications, or WSGI ones that they put into something else.
_WSGI_WORKERS: Final = frozenset(
    {
        ("gunicorn.workers.sync", "SyncWorker"),
        ("gunicorn.workers.gthread", "ThreadWorker"),
        ("gunicorn.workers.base_async", "AsyncWorker"),
    }
)


def _gunicorn_load_wsgi(serving: Serving, load_wsgi: Any, worker: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `Worker.load_wsgi`, which runs in the worker, after gevent has patched the process."""
    result = load_wsgi(worker, *args, **kwargs)
    if any((cls.__module__, cls.__name__) in _WSGI_WORKERS for cls in type(worker).__mro__):
        _replace_application(serving, worker, "wsgi")
    return result


def _wsgiref_run(serving: Serving, run: Any, handler: Any, application: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `BaseHandler.run(self, application)` (Django's `runserver` inherits it)."""
    if callable(application) and type(application) is not ServedApplication:
        application = ServedApplication(application, serving)
    return run(handler, application, *args, **kwargs)


def _tornado_application(serving: Serving, init: Any, application: Any, /, *args: Any, **kwargs: Any) -> None:
    """Do `Application.__init__`: that Tornado is imported, as its instrumentor does, says nothing."""
    init(application, *args, **kwargs)
    serving.prepare_tornado()


class ServedApplication(wrapt.ObjectProxy):  # type: ignore[type-arg] # not subscriptable in every wrapt 2
    """The application as a server calls it: the same object for everyone who looks at it."""

    def __init__(self, app: Any, serving: Serving) -> None:
        super().__init__(app)
        self._self_serving = serving

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Serve one request."""
        app = self.__wrapped__
        if len(args) != 2 or kwargs or not _is_wsgi_call(*args):
            return app(*args, **kwargs)
        return self._self_serving.serve(app, *args)


ROWS: Final = (
    Patch("flask.app", "Flask.__call__", _framework_call),
    Patch("bottle", "Bottle.__call__", _framework_call),
    Patch("pyramid.router", "Router.__call__", _framework_call),
    Patch("falcon.app", "App.__call__", _framework_call),
    Patch("django.core.handlers.wsgi", "WSGIHandler.__call__", _framework_call),
    Patch("wsgiref.handlers", "BaseHandler.run", _wsgiref_run),
    Patch("werkzeug.serving", "BaseWSGIServer.__init__", _application_of_server("app")),
    Patch("gunicorn.workers.base", "Worker.load_wsgi", _gunicorn_load_wsgi),
    Patch("waitress.server", "BaseWSGIServer.__init__", _application_of_server("application")),
    Patch("cheroot.wsgi", "Server.__init__", _application_of_server("wsgi_app")),
    Patch("gevent.pywsgi", "WSGIServer.__init__", _application_of_server("application")),
    Patch("tornado.web", "Application.__init__", _tornado_application),
)
"""Tried with the versions of the day; a row whose place is not there any more is logged once and left out."""


_installed: Final[list[tuple[Serving, PatchSet]]] = []


def install(serving: Serving) -> None:
    """Put every row on for good: now where its module is there, else when it is imported. Never raises."""
    for row in ROWS:
        # A set for each: one whose place is gone does not keep the others from their work.
        patches = PatchSet([row._replace(around=functools.partial(row.around, serving))])
        _installed.append((serving, patches))  # which hold each other weakly
        PROCESS_GUARD.run(f"preparing for {row.module}", patches.hold, serving)
