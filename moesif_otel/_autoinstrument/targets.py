"""Where calls are met in an application that knows nothing of Moesif: the table of frameworks and servers.

Owns: the rows (module, attribute, wrapper), putting each on when its module is imported, `ServedApplication`.
Threads: those that import modules and those of the servers.
Never: imports a framework or a server; raises into an import or a request; opens or ends a call itself.

Frameworks are met at their `__call__`, servers where they learn of their application, for applications of no framework.
A layer stays where it is once put on, and passes through while nobody captures: others may have wrapped it since.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import wrapt

from moesif_otel._guard import PROCESS_GUARD

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ROWS", "Row", "ServedApplication", "Serving", "install", "when_imported"]


class Serving(Protocol):
    """Who takes the calls that the rows meet (`auto`)."""

    def prepare(self) -> None:
        """Get ready: a server is about to serve. Never raises."""
        ...

    def prepare_tornado(self) -> None:
        """Get ready for Tornado: an application of it was made. Never raises."""
        ...

    def serve(self, app: Any, environ: Any, start_response: Any, framework_app: Any = None) -> Any:
        """Call a WSGI application and capture the call; raises what the application raises."""
        ...


class Row(NamedTuple):
    """One place where calls are met."""

    module: str
    attribute: str
    """A class and its method."""
    wrap: Callable[[Serving, Any], Any]


def _is_wsgi_call(environ: Any, start_response: Any) -> bool:
    # ASGI passes (scope, receive, send), and anything may be called by its own users in other ways.
    return isinstance(environ, dict) and callable(start_response)


def _framework_call(serving: Serving, original: Any) -> Any:
    """Make the layer for `__call__(self, environ, start_response)` of a framework's application."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 3 or kwargs or not _is_wsgi_call(args[1], args[2]):
            return original(*args, **kwargs)
        app, environ, start_response = args
        return serving.serve(_bound(original, app), environ, start_response, app)

    return call


def _bound(original: Any, instance: Any) -> Any:
    # As attribute access would bind it: what stands there may be somebody's wrapper, not a plain function.
    return original.__get__(instance, type(instance)) if hasattr(original, "__get__") else original


def _application_of_server(attribute: str) -> Callable[[Serving, Any], Any]:
    """Make a wrapper for a server's `__init__` that keeps its application in `attribute`."""

    def wrap(serving: Serving, original: Any) -> Any:
        @functools.wraps(original)
        def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            _replace_application(serving, self, attribute)

        return initialise

    return wrap


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


def _gunicorn_load_wsgi(serving: Serving, original: Any) -> Any:
    """Make the layer for `Worker.load_wsgi`, which runs in the worker, after gevent has patched the process."""

    @functools.wraps(original)
    def load_wsgi(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if any((cls.__module__, cls.__name__) in _WSGI_WORKERS for cls in type(self).__mro__):
            _replace_application(serving, self, "wsgi")
        return result

    return load_wsgi


def _wsgiref_run(serving: Serving, original: Any) -> Any:
    """Make the layer for `BaseHandler.run(self, application)` (Django's `runserver` inherits it)."""

    @functools.wraps(original)
    def run(self: Any, application: Any, *args: Any, **kwargs: Any) -> Any:
        if callable(application) and type(application) is not ServedApplication:
            application = ServedApplication(application, serving)
        return original(self, application, *args, **kwargs)

    return run


def _tornado_application(serving: Serving, original: Any) -> Any:
    """Make the layer for `Application.__init__`: that Tornado is imported, as its instrumentor does, says nothing."""

    @functools.wraps(original)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        serving.prepare_tornado()

    return initialise


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
    Row("flask.app", "Flask.__call__", _framework_call),
    Row("bottle", "Bottle.__call__", _framework_call),
    Row("pyramid.router", "Router.__call__", _framework_call),
    Row("falcon.app", "App.__call__", _framework_call),
    Row("django.core.handlers.wsgi", "WSGIHandler.__call__", _framework_call),
    Row("wsgiref.handlers", "BaseHandler.run", _wsgiref_run),
    Row("werkzeug.serving", "BaseWSGIServer.__init__", _application_of_server("app")),
    Row("gunicorn.workers.base", "Worker.load_wsgi", _gunicorn_load_wsgi),
    Row("waitress.server", "BaseWSGIServer.__init__", _application_of_server("application")),
    Row("cheroot.wsgi", "Server.__init__", _application_of_server("wsgi_app")),
    Row("gevent.pywsgi", "WSGIServer.__init__", _application_of_server("application")),
    Row("tornado.web", "Application.__init__", _tornado_application),
)
"""Tried with the versions of the day; a row whose place is not there any more is logged once and left out."""


def install(serving: Serving) -> None:
    """Put every row on: now where its module is there, else when it is imported. Never raises."""
    for row in ROWS:
        when_imported(row.module, functools.partial(_put_on, serving, row))


def when_imported(module: str, run: Callable[[], None]) -> None:
    """Call `run` once a module is imported, at once if it is. What it raises is counted, never passed on."""

    def hook(_module: Any) -> None:
        PROCESS_GUARD.run(f"preparing for {module}", run)

    PROCESS_GUARD.run("an import hook", wrapt.register_post_import_hook, hook, module)


def _put_on(serving: Serving, row: Row) -> None:
    class_name, _, method = row.attribute.partition(".")
    owner = getattr(sys.modules[row.module], class_name)
    setattr(owner, method, row.wrap(serving, inspect.getattr_static(owner, method)))
