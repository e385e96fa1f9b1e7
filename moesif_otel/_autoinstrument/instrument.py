"""Capture without code changes: `instrument` with its handle, and the table of what is patched (`ROWS`).

`opentelemetry-instrument` uses the same. Frameworks are patched at their `__call__`, servers where they get their
application, for applications without a framework. A patch is never removed, since others may have wrapped it; while
nothing captures, it passes calls through.

Calls come from any thread of a server. Nothing here imports a framework or a server, starts a span (an instrumentor may
make one), adds a header, or raises into a request or an import. Delivery is imported late, when the first server or
request needs it.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, Final

import wrapt

from moesif_otel._capture import EXCHANGES_KEY, INTERNAL
from moesif_otel._capture.patching import Patch, PatchSet, when_imported
from moesif_otel._guard import LATE_IMPORTS, PROCESS_GUARD, get_logger
from moesif_otel.errors import install_command
from moesif_otel.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from moesif_otel._capture.asgi.capture import AsgiCapture
    from moesif_otel._capture.outgoing import Route
    from moesif_otel._capture.tornado.capture import TornadoCapture
    from moesif_otel._capture.wsgi.capture import WsgiCapture
    from moesif_otel._delivery.stats import Stats
    from moesif_otel._pipeline.pipeline import Pipeline
    from moesif_otel._pipeline.sink import EventSink

_logger: Final = get_logger(__name__)

_told: Final[set[str]] = set()
_FRAMEWORK_KEY: Final = "moesif_otel.framework"


def instrument(settings: Mapping[str, Any] | Settings | None = None) -> Instrumentation:
    """Capture the calls of this process from code, as `opentelemetry-instrument` does.

    This captures WSGI and ASGI frameworks and servers, and Tornado, imported before or after. With
    `CAPTURE_OUTGOING_REQUESTS` it also captures calls made with `requests`, `httpx` and `aiohttp`. No span is made or
    changed. Spans of OpenTelemetry's instrumentations add detail to the events, if they are made on the global tracer
    provider or on one with a `MoesifSpanProcessor` of the same settings.

    Call it before a server is created; frameworks are captured from the next request on. If there is a
    `MoesifSpanProcessor` with equal settings, it delivers the calls: they share one pipeline, even if that uses another
    exporter.

    Args:
        settings: The dict of options, or a `Settings`; None reads the environment.

    Returns:
        A handle with `stop`, `force_flush` and `stats`.

    Raises:
        MoesifConfigError: An option is wrong; nothing has been changed or started.

    Thread-safe; may be called before a fork.
    """
    handle = Instrumentation(Settings.of(settings, async_callbacks=True))
    handle.pipeline()
    handle.start()
    return handle


class Instrumentation:
    """The capture of this process for one settings value, created by `instrument`. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Filled once, by `dict.setdefault`: no lock that a forked child could inherit held.
        self._made: dict[str, tuple[Pipeline, WsgiCapture]] = {}
        self._route: Route | None = None
        self._asgi: AsgiCapture | None = None
        self._tornado: TornadoCapture | None = None

    def start(self) -> None:
        """Start capturing. Never raises."""
        _add(self)
        if self.settings.capture_outgoing_requests:
            # Calls may be made where nothing is ever served.
            PROCESS_GUARD.run("capture of outgoing calls", self._start_outgoing)
            say_what_is_not_captured(clients=True)
        if self._made:
            # Applications may exist already. Otherwise the first one that is created starts it (`ROWS`).
            when_imported("tornado.web", _weakly(self, Instrumentation.prepare_tornado))
        when_imported("tornado.autoreload", _weakly(self, Instrumentation._flush_before_reload))

    def pipeline(self) -> Pipeline:
        """Return the pipeline: a live one of equal settings, or a new one."""
        return self._pipeline()[0]

    def _pipeline(self) -> tuple[Pipeline, WsgiCapture]:
        made = self._made.get("made")
        if made is None:
            # Late imports: delivery imports `requests`, and makes locks that must come after gevent's patches.
            with LATE_IMPORTS:
                from moesif_otel._capture.wsgi.capture import WsgiCapture
                from moesif_otel._pipeline.pipeline import pipeline_for

            pipeline = pipeline_for(self.settings, of_processor=True)
            made = self._made.setdefault("made", (pipeline, WsgiCapture(pipeline, provisional=True)))
            made[0].of_processor = True
            made[0].join(self)
        return made

    def wrapped(self, app: Any, callback_app: Any) -> Any:
        """Return the WSGI application with our capture around it, for one call. Never raises."""
        try:
            pipeline, capture = self._pipeline()
            pipeline.watch_global_provider()
        except Exception as exc:
            PROCESS_GUARD.caught("preparing the capture", exc)
            return app
        return functools.partial(capture.call, app, callback_app=callback_app)

    def wrapped_asgi(self, app: Any) -> Any:
        """Return the ASGI application with our capture around it, for one connection. Never raises."""
        try:
            pipeline = self.pipeline()
            if self._asgi is None:
                with LATE_IMPORTS:
                    from moesif_otel._capture.asgi.capture import AsgiCapture

                self._asgi = AsgiCapture(pipeline, provisional=True)
            pipeline.watch_global_provider()
        except Exception as exc:
            PROCESS_GUARD.caught("preparing the capture", exc)
            return app
        return functools.partial(self._asgi.serve, app)

    def _start_outgoing(self) -> None:
        from moesif_otel._capture.outgoing import Route, add_route

        self._route = Route(self.pipeline())
        add_route(self._route)

    def prepare_tornado(self) -> None:
        """Start capturing every Tornado application, unless that has started."""
        if self._tornado is not None:
            return
        try:
            from moesif_otel._capture.tornado.capture import TornadoCapture
        except ImportError as exc:
            _logger.error(
                "moesif_otel: calls to Tornado applications are not captured, because %s cannot be imported; install a "
                "supported version: %s",
                exc.name,
                install_command("tornado"),
            )
            return
        pipeline = self.pipeline()
        self._tornado = TornadoCapture(pipeline, before_first=pipeline.watch_global_provider, everywhere=True)
        if self in _handles:
            self._tornado.start()

    def _flush_before_reload(self) -> None:
        # Tornado replaces the process by `exec`, which runs no exit handlers.
        from tornado import autoreload

        autoreload.add_reload_hook(_weakly(self, Instrumentation._flush_to_reload))

    def _flush_to_reload(self) -> None:
        if self._made:
            self.force_flush(int(self.settings.shutdown_timeout * 1_000))

    def force_flush(self, timeout_millis: int = 5_000) -> bool:
        """Deliver every call that has finished.

        Args:
            timeout_millis: Return after this time at the latest.

        Returns:
            True if everything that had finished was delivered or is counted as dropped.
        """
        return self.pipeline().force_flush(timeout_millis / 1_000)

    def stop(self, timeout_millis: int = 5_000) -> None:
        """Stop capturing; the application goes on without it. Idempotent.

        Pending events are delivered, and the pipeline ends if nothing else uses it.

        Args:
            timeout_millis: Return after this time at the latest.
        """
        _remove(self)
        if self._tornado is not None:
            self._tornado.stop()
        if self._route is not None:
            from moesif_otel._capture.outgoing import remove_route

            remove_route(self._route)
        if self._made:
            self.pipeline().leave(self, timeout_millis / 1_000)

    def stats(self) -> Stats:
        """Return the counters: `accepted == delivered + sum(dropped.values()) + pending` at any time."""
        return self.pipeline().stats()


def _weakly(handle: Instrumentation, method: Callable[[Instrumentation], None]) -> Callable[[], None]:
    """Make a function for an import hook, which cannot be removed, that does nothing once the handle has stopped."""
    reference = weakref.ref(handle)

    def run() -> None:
        found = reference()
        if found is not None and found in _handles:
            method(found)

    return run


# Options of the zero-code run: never a reason for an application not to start.


def is_switched_off() -> bool:
    """Return whether `OTEL_SDK_DISABLED` is true (OTel specification: only "true", in any case)."""
    return os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def read_settings(options: Mapping[str, Any]) -> Settings | None:
    """Return `Settings.of_any(options)`, and log each error once."""
    settings, errors = Settings.of_any(options)
    for error in errors:
        if str(error) not in _told:
            _told.add(str(error))
            _logger.error(
                "moesif_otel: %s: %s",
                "no calls are captured" if settings is None else "a wrong option is ignored, and its default is used",
                error,
            )
    return settings


# The handles that capture, newest first.

_handles: tuple[Instrumentation, ...] = ()


def _add(handle: Instrumentation) -> None:
    global _handles  # noqa: PLW0603 - replaced as a whole, so that calls read it without a lock
    if handle not in _handles:
        # The newest is the outermost. Of two with the same application id the outermost captures the call, so options
        # in code, set later than the environment, take precedence.
        _handles = (handle, *_handles)
    if not _installed:
        install()


def _remove(handle: Instrumentation) -> None:
    global _handles  # noqa: PLW0603 - as above
    _handles = tuple(one for one in _handles if one is not handle)


def sink_of(settings: Settings) -> EventSink | None:
    """Return the sink of an active capture with equal settings, or None; for spans that were not captured."""
    for handle in _handles:
        if handle.settings == settings:
            sink = handle.pipeline().sink
            from moesif_otel._pipeline.sink import EventSink

            return sink if isinstance(sink, EventSink) else None
    return None


# What the patches do with a call: each handle captures it that has not captured it already.


def _prepare() -> None:
    """Prepare: a server is about to serve. Never raises."""
    for handle in _handles:
        PROCESS_GUARD.run("preparing the capture", handle.pipeline)


def _prepare_tornado() -> None:
    """Prepare for Tornado: an application was created. Never raises."""
    for handle in _handles:
        PROCESS_GUARD.run("capture of Tornado", handle.prepare_tornado)


def _serve(app: Any, environ: Any, start_response: Any, framework_app: Any = None) -> Any:
    """Call a WSGI application and capture the call; raises what the application raises."""
    handles = _handles
    if not handles:
        return app(environ, start_response)
    if framework_app is not None:
        PROCESS_GUARD.run("finding the framework's application", _name_application, environ, framework_app)
    callback_app = app if framework_app is None else framework_app
    for handle in reversed(handles):
        app = handle.wrapped(app, callback_app)
    return app(environ, start_response)


def _name_application(environ: dict[str, Any], app: Any) -> None:
    """Set on calls that were opened at the server the framework's application object, for their callbacks."""
    if _FRAMEWORK_KEY in environ:  # applications in applications: the outermost is the one
        return
    environ[_FRAMEWORK_KEY] = True
    for exchange in environ.get(EXCHANGES_KEY, ()):
        if exchange.provisional and exchange.is_open:
            exchange.callback_arguments = (app, *exchange.callback_arguments[1:])


def _serve_asgi(app: Any, scope: Any, receive: Any, send: Any) -> Any:
    """Return what is to be awaited: an ASGI application's call, captured."""
    for handle in reversed(_handles):
        app = handle.wrapped_asgi(app)
    return app(scope, receive, send)


# What is put around frameworks and servers.


def _is_wsgi_call(environ: Any, start_response: Any) -> bool:
    # ASGI passes (scope, receive, send), and anything may be called by its own users in other ways.
    return isinstance(environ, dict) and callable(start_response)


def _framework_call(call: Any, app: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Serve `__call__(self, environ, start_response)` of a framework's application."""
    if len(args) != 2 or kwargs or not _is_wsgi_call(*args):
        return call(app, *args, **kwargs)
    return _serve(functools.partial(call, app), *args, app)


def _asgi_framework_call(call: Any, app: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Serve `__call__(self, scope, receive, send)` of a framework's application."""
    if len(args) != 3 or kwargs or not isinstance(args[0], MutableMapping) or hasattr(app, INTERNAL):
        return call(app, *args, **kwargs)
    return _serve_asgi(functools.partial(call, app), *args)


def _application_of_server(attribute: str, *, asgi: bool = False) -> Callable[..., None]:
    """Return the layer for a server's `__init__` that keeps its application in `attribute`."""

    def initialise(init: Any, server: Any, /, *args: Any, **kwargs: Any) -> None:
        init(server, *args, **kwargs)
        _replace_application(server, attribute, asgi=asgi)

    return initialise


def _served(app: Any, *, asgi: bool = False) -> Any:
    """Return an application as a server is to call it."""
    kind = ServedAsgiApplication if asgi else ServedApplication
    return kind(app) if callable(app) and type(app) is not kind else app


def _replace_application(server: Any, attribute: str, *, asgi: bool = False) -> None:
    try:
        app = getattr(server, attribute, None)
        served = app if hasattr(app, INTERNAL) else _served(app, asgi=asgi)
        if served is not app:
            setattr(server, attribute, served)
            _prepare()
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


def _gunicorn_load_wsgi(load_wsgi: Any, worker: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `Worker.load_wsgi`, which runs in the worker, after gevent has patched the process."""
    result = load_wsgi(worker, *args, **kwargs)
    if any((cls.__module__, cls.__name__) in _WSGI_WORKERS for cls in type(worker).__mro__):
        _replace_application(worker, "wsgi")
    return result


def _uvicorn_load(load: Any, config: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `Config.load` (also of gunicorn's uvicorn workers), which decides what kind of application it has."""
    result = load(config, *args, **kwargs)
    if config.interface != "wsgi":
        # Inside of what takes the client's address out of headers.
        loaded = config.loaded_app
        if type(loaded).__name__ == "ProxyHeadersMiddleware":
            _replace_application(loaded, "app", asgi=True)
        else:
            _replace_application(config, "loaded_app", asgi=True)
    return result


def _granian_wrap(wrap: Any, callback: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do what granian's workers call with their ASGI application."""
    _prepare()
    return wrap(_served(callback, asgi=True), *args, **kwargs)


def _wsgiref_run(run: Any, handler: Any, application: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `BaseHandler.run(self, application)` (Django's `runserver` inherits it)."""
    return run(handler, _served(application), *args, **kwargs)


def _tornado_application(init: Any, application: Any, /, *args: Any, **kwargs: Any) -> None:
    """Do `Application.__init__`: that Tornado is imported, as its instrumentor does, says nothing."""
    init(application, *args, **kwargs)
    _prepare_tornado()


class ServedApplication(wrapt.ObjectProxy):  # type: ignore[type-arg] # not subscriptable in every wrapt 2
    """The application as a server calls it: the same object for everyone who looks at it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Serve one request."""
        app = self.__wrapped__
        if len(args) != 2 or kwargs or not _is_wsgi_call(*args):
            return app(*args, **kwargs)
        return _serve(app, *args)


class ServedAsgiApplication(wrapt.ObjectProxy):  # type: ignore[type-arg] # as above
    """The ASGI application as a server calls it; the parameters are exactly those that servers look for."""

    def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        """Serve one connection."""
        return _serve_asgi(self.__wrapped__, scope, receive, send)


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

_installed: Final[list[PatchSet]] = []


@functools.cache
def say_what_is_not_captured(*, clients: bool) -> None:
    """Log one line, once, for each framework (or client) that the process imports and that is not captured."""
    for module, advice in (NOT_CAPTURED_CLIENTS if clients else NOT_CAPTURED).items():
        what = "calls made with" if clients else "calls served by"
        when_imported(
            module, functools.partial(_logger.warning, "moesif_otel: %s %s are not captured: %s", what, module, advice)
        )


def install() -> None:
    """Apply every patch for good: now if its module is loaded, else when it is imported. Never raises."""
    say_what_is_not_captured(clients=False)
    for row in ROWS:
        # A set for each row: one that fails does not prevent the others.
        patches = PatchSet([row])
        _installed.append(patches)
        PROCESS_GUARD.run(f"patching {row.module}", patches.hold, patches)
