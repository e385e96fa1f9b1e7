"""The SERVER span of a WSGI call, made by OpenTelemetry's own middleware in a context of its own.

The middleware never gets near the application's iterable, the server's `start_response`, or the application's
exceptions: it returns a generator, which loses `len()`, file wrappers and `close()`, and raises on statuses without a
phrase (measured on contrib 0.66b1). It runs beside the call and is told what happened. The end may come in any thread.
"""

from __future__ import annotations

from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware
from opentelemetry.metrics import NoOpMeterProvider

from moesif_otel._capture.server_spans import ServerSpanChoice, end_beside_call

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.context import Context


_starting: ContextVar[WsgiServerSpan | None] = ContextVar("moesif_otel_starting_span", default=None)


class _Aside:
    """Iterated by the middleware in place of the response: nothing, or the exception that ended the call."""

    __slots__ = ("error",)

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self.error is not None:
            raise self.error
        raise StopIteration


class WsgiServerSpan:
    """One run of the middleware beside one call.

    `enter` and `leave` stand around each step of the application.
    """

    __slots__ = ("_aside", "_context", "_generator", "_own", "_respond", "_token", "span")

    span: Any

    def __init__(self, middleware: OpenTelemetryMiddleware, environ: dict[str, Any]) -> None:
        self._aside = _Aside()
        self._respond: Any = None
        self._token: Any = None
        self._own = copy_context()
        self._generator = self._own.run(self._start, middleware, environ)
        # The span alone, on the application's own context: what the middleware extracted holds the caller's baggage and
        # trace state too, which would go out with the application's own calls.
        self._context: Context = trace.set_span_in_context(self.span)

    def _start(self, middleware: OpenTelemetryMiddleware, environ: dict[str, Any]) -> Any:
        _starting.set(self)
        try:
            return middleware(environ, _ignore_response)
        finally:
            _starting.set(None)

    def note_start(self, respond: Any) -> _Aside:
        """Keep the middleware's `start_response` and its span."""
        self._respond = respond
        self.span = trace.get_current_span()
        return self._aside

    def enter(self) -> None:
        """Make the span current, and what the application had made current when it was left."""
        self._token = otel_context.attach(self._context)

    def leave(self) -> None:
        """Restore the server's context."""
        token, self._token = self._token, None
        self._context = otel_context.get_current()
        if token is not None:
            otel_context.detach(token)

    def respond(self, status: str, headers: list[tuple[str, str]]) -> None:
        """Tell the span the status; raises what the middleware raises."""
        # The middleware splits at the blank and takes only text: a status without a phrase is legal here.
        self._own.run(self._respond, status if " " in status else status + " ", list(headers))

    def end(self, error: BaseException | None = None) -> None:
        """End the span in the context it began in, with an exception event where there was one."""
        generator, self._generator = self._generator, None
        if generator is None:
            return
        self._aside.error = error
        try:
            end_beside_call(error, self._own.run, next, generator)
        finally:
            self._aside.error = None


def _ignore_response(_status: str, _headers: list[tuple[str, str]], *_exc_info: Any) -> None:
    return None


def _stand_in_app(_environ: dict[str, Any], start_response: Any) -> Any:
    span = _starting.get()
    return span.note_start(start_response) if span is not None else ()


class WsgiServerSpans(ServerSpanChoice):
    """Makes SERVER spans of WSGI calls on one provider, where nobody else does."""

    __slots__ = ("_middleware",)

    middleware_class = OpenTelemetryMiddleware
    instrumentations = tuple(
        f"opentelemetry.instrumentation.{name}" for name in ("django", "falcon", "flask", "pyramid")
    )

    def __init__(self, provider: trace.TracerProvider, *, app: Any, given: bool) -> None:
        super().__init__(provider, app=app, given=given)
        # Request metrics are the application's own business: a second recording would double them.
        self._middleware = OpenTelemetryMiddleware(
            _stand_in_app, tracer_provider=provider, meter_provider=NoOpMeterProvider()
        )

    def start(self, environ: dict[str, Any]) -> WsgiServerSpan | None:
        """Start the span of a call, or None where it is not ours to make."""
        return WsgiServerSpan(self._middleware, environ) if self.is_ours(environ.get("PATH_INFO")) else None
