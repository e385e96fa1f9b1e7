"""The table of frameworks and servers that are patched to capture calls without code changes.

Frameworks are patched at their `__call__`. Servers are patched where they get their application, for applications
without a framework. A patch is never removed, since others may have wrapped it; while nothing captures, it passes calls
through. Nothing here imports a framework or a server, or raises into an import or a request.
"""

from __future__ import annotations

import functools
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import wrapt

from moesif_otel._capture import INTERNAL
from moesif_otel._capture.patching import Patch, PatchSet, when_imported
from moesif_otel._guard import PROCESS_GUARD, get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

_logger: Final = get_logger(__name__)


class Serving(Protocol):
    """The receiver of the calls that the patches capture (`instrument`)."""

    def prepare(self) -> None:
        """Prepare: a server is about to serve. Never raises."""

    def prepare_tornado(self) -> None:
        """Prepare for Tornado: an application was created. Never raises."""

    def serve(self, app: Any, environ: Any, start_response: Any, framework_app: Any = None) -> Any:
        """Call a WSGI application and capture the call; raises what the application raises."""

    def serve_asgi(self, app: Any, scope: Any, receive: Any, send: Any) -> Any:
        """Return what is to be awaited: an ASGI application's call, captured."""


def _is_wsgi_call(environ: Any, start_response: Any) -> bool:
    # ASGI passes (scope, receive, send), and anything may be called by its own users in other ways.
    return isinstance(environ, dict) and callable(start_response)


def _framework_call(serving: Serving, call: Any, app: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Serve `__call__(self, environ, start_response)` of a framework's application."""
    if len(args) != 2 or kwargs or not _is_wsgi_call(*args):
        return call(app, *args, **kwargs)
    return serving.serve(functools.partial(call, app), *args, app)


def _asgi_framework_call(serving: Serving, call: Any, app: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Serve `__call__(self, scope, receive, send)` of a framework's application."""
    if len(args) != 3 or kwargs or not isinstance(args[0], MutableMapping) or hasattr(app, INTERNAL):
        return call(app, *args, **kwargs)
    return serving.serve_asgi(functools.partial(call, app), *args)


def _application_of_server(attribute: str, *, asgi: bool = False) -> Callable[..., None]:
    """Return the layer for a server's `__init__` that keeps its application in `attribute`."""

    def initialise(serving: Serving, init: Any, server: Any, /, *args: Any, **kwargs: Any) -> None:
        init(server, *args, **kwargs)
        _replace_application(serving, server, attribute, asgi=asgi)

    return initialise


def _served(serving: Serving, app: Any, *, asgi: bool = False) -> Any:
    """Return an application as a server is to call it."""
    kind = ServedAsgiApplication if asgi else ServedApplication
    return kind(app, serving) if callable(app) and type(app) is not kind else app


def _replace_application(serving: Serving, server: Any, attribute: str, *, asgi: bool = False) -> None:
    try:
        app = getattr(server, attribute, None)
        served = app if hasattr(app, INTERNAL) else _served(serving, app, asgi=asgi)
        if served is not app:
            setattr(server, attribute, served)
            serving.prepare()
    except Exception as exc:
        PROCESS_GUARD.caught("capturing the application of a server", exc)


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


def _uvicorn_load(serving: Serving, load: Any, config: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `Config.load` (also of gunicorn's uvicorn workers), which decides what kind of application it has."""
    result = load(config, *args, **kwargs)
    if config.interface != "wsgi":
        # Inside of what takes the client's address out of headers.
        loaded = config.loaded_app
        if type(loaded).__name__ == "ProxyHeadersMiddleware":
            _replace_application(serving, loaded, "app", asgi=True)
        else:
            _replace_application(serving, config, "loaded_app", asgi=True)
    return result


def _granian_wrap(serving: Serving, wrap: Any, callback: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do what granian's workers call with their ASGI application."""
    serving.prepare()
    return wrap(_served(serving, callback, asgi=True), *args, **kwargs)


def _wsgiref_run(serving: Serving, run: Any, handler: Any, application: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `BaseHandler.run(self, application)` (Django's `runserver` inherits it)."""
    return run(handler, _served(serving, application), *args, **kwargs)


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


class ServedAsgiApplication(wrapt.ObjectProxy):  # type: ignore[type-arg] # as above
    """The ASGI application as a server calls it; the parameters are exactly those that servers look for."""

    def __init__(self, app: Any, serving: Serving) -> None:
        super().__init__(app)
        self._self_serving = serving

    def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        """Serve one connection."""
        return self._self_serving.serve_asgi(self.__wrapped__, scope, receive, send)


ROWS: Final = (
    Patch("flask.app", "Flask.__call__", _framework_call),
    Patch("bottle", "Bottle.__call__", _framework_call),
    Patch("pyramid.router", "Router.__call__", _framework_call),
    Patch("falcon.app", "App.__call__", _framework_call),
    Patch("falcon.asgi.app", "App.__call__", _asgi_framework_call),
    Patch("django.core.handlers.wsgi", "WSGIHandler.__call__", _framework_call),
    Patch("wsgiref.handlers", "BaseHandler.run", _wsgiref_run),
    Patch("werkzeug.serving", "BaseWSGIServer.__init__", _application_of_server("app")),
    Patch("gunicorn.workers.base", "Worker.load_wsgi", _gunicorn_load_wsgi),
    Patch("waitress.server", "BaseWSGIServer.__init__", _application_of_server("application")),
    Patch("cheroot.wsgi", "Server.__init__", _application_of_server("wsgi_app")),
    Patch("gevent.pywsgi", "WSGIServer.__init__", _application_of_server("application")),
    Patch("tornado.web", "Application.__init__", _tornado_application),
    Patch("starlette.applications", "Starlette.__call__", _asgi_framework_call),
    Patch("quart.app", "Quart.__call__", _asgi_framework_call),
    Patch("litestar.app", "Litestar.__call__", _asgi_framework_call),
    Patch("django.core.handlers.asgi", "ASGIHandler.__call__", _asgi_framework_call),
    Patch("uvicorn.config", "Config.load", _uvicorn_load),
    Patch("hypercorn.app_wrappers", "ASGIWrapper.__init__", _application_of_server("app", asgi=True)),
    Patch("daphne.server", "Server.__init__", _application_of_server("application", asgi=True)),
    Patch("granian.server.mp", "_asgi_call_wrap", _granian_wrap),
    Patch("granian.server.mt", "_asgi_call_wrap", _granian_wrap),
    Patch("granian.server.embed", "_asgi_call_wrap", _granian_wrap),
)
"""Tested with current versions; if a patched attribute does not exist, that is logged once and the row is skipped."""


NOT_CAPTURED: Final = {
    "sanic": "use uvicorn or another ASGI server, under which they are captured",
    "cherrypy": "wrap its WSGI application in moesif_otel.wsgi.MoesifMiddleware",
}
"""Frameworks that are not captured automatically on their own servers, and what to do."""

NOT_CAPTURED_CLIENTS: Final = dict.fromkeys(("pycurl", "httplib2"), "use requests, httpx or aiohttp")
"""The same for clients; logged only if outgoing calls are captured."""

_installed: Final[list[tuple[Serving, PatchSet]]] = []


@functools.cache
def say_what_is_not_captured(*, clients: bool) -> None:
    """Log one line, once, for each framework (or client) that the process imports and that is not captured."""
    for module, advice in (NOT_CAPTURED_CLIENTS if clients else NOT_CAPTURED).items():
        what = "calls made with" if clients else "calls served by"
        when_imported(
            module, functools.partial(_logger.warning, "moesif_otel: %s %s are not captured: %s", what, module, advice)
        )


def install(serving: Serving) -> None:
    """Apply every patch for good: now if its module is loaded, else when it is imported. Never raises."""
    say_what_is_not_captured(clients=False)
    for row in ROWS:
        # A set for each row: one that fails does not prevent the others.
        patches = PatchSet([row._replace(around=functools.partial(row.around, serving))])
        _installed.append((serving, patches))  # which refer to each other weakly
        PROCESS_GUARD.run(f"patching {row.module}", patches.hold, serving)
