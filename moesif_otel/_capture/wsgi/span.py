"""The SERVER span of a WSGI call, made by OpenTelemetry's own middleware in a context of its own.

Owns: `ServerSpans` (whether and how spans are made on one provider) and `ServerSpan` (one of them).
Threads: the request's; the end may come from any thread.
Never: lets the middleware near the application's iterable, the server's `start_response`, or the application's
exceptions: it returns a generator, which loses `len()`, file wrappers and `close()`, and raises on statuses
without a phrase (measured on contrib 0.66b1). It runs beside the call and is told what happened.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.propagate import get_global_textmap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.context import Context

    from moesif_otel._capture.exchange import Exchange

__all__ = ["ServerSpan", "ServerSpans"]

_starting: ContextVar[ServerSpan | None] = ContextVar("moesif_otel_starting_span", default=None)

# Instrumentors that make the SERVER span of a WSGI framework themselves.
_FRAMEWORK_INSTRUMENTORS: Final = tuple(
    f"opentelemetry.instrumentation.{name}" for name in ("django", "falcon", "flask", "pyramid")
)
_WRAPPED_APP_ATTRIBUTES: Final = ("wsgi", "app", "application", "wsgi_app", "__wrapped__")


class _Aside:
    """What the middleware iterates in place of the response: nothing, or the exception that ended the call."""

    __slots__ = ("error",)

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self.error is not None:
            raise self.error
        raise StopIteration


class ServerSpan:
    """One run of the middleware beside one call."""

    __slots__ = ("_aside", "_generator", "_own", "_respond", "context")

    def __init__(self, middleware: OpenTelemetryMiddleware, environ: dict[str, Any]) -> None:
        self._aside = _Aside()
        self._respond: Any = None
        self.context: Context | None = None
        self._own = copy_context()
        self._generator = self._own.run(self._start, middleware, environ)

    def _start(self, middleware: OpenTelemetryMiddleware, environ: dict[str, Any]) -> Any:
        _starting.set(self)
        try:
            return middleware(environ, _ignore_response)
        finally:
            _starting.set(None)

    def note_start(self, respond: Any) -> _Aside:
        """Keep the middleware's `start_response` and the context in which its span is current."""
        self._respond = respond
        self.context = otel_context.get_current()
        return self._aside

    def respond(self, status: str, headers: list[tuple[str, str]]) -> None:
        """Tell the span the status; raises what the middleware raises."""
        # The middleware splits at the blank and takes only text: a status without a phrase is legal here.
        self._own.run(self._respond, status if " " in status else status + " ", list(headers))

    def end(self, error: BaseException | None = None) -> None:
        """End the span in the context it began in, with an exception event where there was one."""
        self._aside.error = error
        generator, self._generator = self._generator, None
        if generator is None:
            return
        traceback = error.__traceback__ if error is not None else None
        try:
            self._own.run(next, generator, None)
        except BaseException as exc:
            if exc is not error:
                raise
        finally:
            self._aside.error = None
            if error is not None:
                # Raised once more beside the call, it has gathered frames that the application's log must not show.
                error.__traceback__ = traceback


def _ignore_response(_status: str, _headers: list[tuple[str, str]], *_exc_info: Any) -> None:
    return None


def _stand_in_app(_environ: dict[str, Any], start_response: Any) -> Any:
    span = _starting.get()
    return span.note_start(start_response) if span is not None else ()


class ServerSpans:
    """Makes SERVER spans on one provider, for one application, where nobody else does.

    On a provider that the application shares, a SERVER span of ours above the span of somebody else's instrumentor
    would turn that one INTERNAL. So: none under a valid current span; none where a framework's instrumentor is loaded
    (that one call brings no span may mean an excluded URL); none once a call has brought a SERVER span of its own; and
    on a provider that nobody gave us, none before a call has shown that nobody makes one. On a private provider spans
    are always made, and never made current in the application.

    Args:
        provider: SDK tracer provider.
        shared: Whether the application's own telemetry lives there.
        app: The WSGI application, looked through for an OpenTelemetry middleware inside it.
        given: Whether the user named the provider for us, which asks for spans from the first call on.
    """

    __slots__ = ("_app_has_its_own", "_carriers", "_certain_sampler", "_make", "_middleware", "shared")

    def __init__(self, provider: trace.TracerProvider, *, shared: bool, app: Any, given: bool = True) -> None:
        self.shared = shared
        # Request metrics are the application's own business: a second recording would double them.
        self._middleware = OpenTelemetryMiddleware(
            _stand_in_app, tracer_provider=provider, meter_provider=NoOpMeterProvider()
        )
        self._carriers = tuple(f"HTTP_{field.upper().replace('-', '_')}" for field in get_global_textmap().fields)
        self._certain_sampler = _keeps_every_root(provider)
        self._app_has_its_own = shared and _contains_otel_middleware(app)
        self._make = not shared or given

    def start(self, environ: dict[str, Any]) -> ServerSpan | None:
        """Start the span of a call, or None where it is not ours to make."""
        if self.shared and (
            not self._make
            or self._app_has_its_own
            or trace.get_current_span().get_span_context().is_valid
            or _framework_instrumentor_loaded()
        ):
            return None
        return ServerSpan(self._middleware, environ if self.shared else self._essence(environ))

    def _essence(self, environ: dict[str, Any]) -> dict[str, Any]:
        """Give what a private span needs: its name, and the parent that propagators find.

        Everything else about the request is in the Exchange, and nobody else sees the span: its attributes would be a
        third of the cost of a request.
        """
        get = environ.get
        path = get("PATH_INFO", "")
        found: dict[str, Any] = {
            "REQUEST_METHOD": get("REQUEST_METHOD", ""),
            "PATH_INFO": path,
            "RAW_URI": path or "/",  # present, so that no URL is put together
            "SERVER_NAME": "",
            "wsgi.url_scheme": get("wsgi.url_scheme", ""),
        }
        for name in self._carriers:
            if name in environ:
                found[name] = environ[name]
        return found

    def observe(self, exchange: Exchange, *, made: bool) -> None:
        """Learn from a finished call whether the application brings a SERVER span of its own."""
        if exchange.inner_server_span or (exchange.span is not None and not made):
            self._app_has_its_own = True
        elif self._certain_sampler and not exchange.has_remote_parent:
            # With any other sampler a missing span may be one that was sampled out.
            self._make = True


def _keeps_every_root(provider: Any) -> bool:
    sampler = getattr(provider, "sampler", None)
    describe = getattr(sampler, "get_description", None)
    text = describe() if callable(describe) else ""
    return str(text).startswith(("AlwaysOnSampler", "ParentBased{root:AlwaysOnSampler"))


def _framework_instrumentor_loaded() -> bool:
    return any(name in sys.modules for name in _FRAMEWORK_INSTRUMENTORS)


def _contains_otel_middleware(app: Any) -> bool:
    for _ in range(10):
        if isinstance(app, OpenTelemetryMiddleware):
            return True
        owner = getattr(app, "__self__", app)
        candidates = (_own_attribute(owner, name) for name in _WRAPPED_APP_ATTRIBUTES)
        inner = next((found for found in candidates if callable(found)), None)
        if inner is None:
            return False
        app = inner
    return False


def _own_attribute(owner: Any, name: str) -> Any:
    """Look an attribute up in an object's own `__dict__`: no property or `__getattr__` of the application runs."""
    try:
        return vars(owner).get(name)
    except TypeError:
        return None
