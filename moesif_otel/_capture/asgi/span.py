"""The SERVER span of an ASGI call, made by OpenTelemetry's own middleware beside the call.

The middleware is a coroutine that is advanced by hand in a copied context, around a stand-in application that pauses.
It is told the messages that the application sent, and never touches the application, the server, or their exceptions.
Its spans of single messages are left out, and so are request metrics, which are the application's own business.
"""

from __future__ import annotations

import types
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any

from opentelemetry import context as otel_context
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.metrics import NoOpMeterProvider

from moesif_otel._capture.server_spans import ServerSpanChoice, end_beside_call

if TYPE_CHECKING:
    from collections.abc import Generator

    from opentelemetry.context import Context
    from opentelemetry.trace import TracerProvider


_starting: ContextVar[AsgiServerSpan | None] = ContextVar("moesif_otel_starting_asgi_span", default=None)


class AsgiServerSpan:
    """One run of the middleware beside one call."""

    __slots__ = ("_coroutine", "_own", "context")

    def __init__(self, middleware: Any, scope: dict[str, Any]) -> None:
        self.context: Context | None = None
        self._own = copy_context()
        self._coroutine: Any = self._own.run(self._start, middleware, scope)

    def _start(self, middleware: Any, scope: dict[str, Any]) -> Any:
        _starting.set(self)
        try:
            coroutine = middleware(scope, _receive_nothing, _send_nowhere)
            coroutine.send(None)
        finally:
            _starting.set(None)
        return coroutine

    def note_start(self) -> None:
        """Keep the context in which the span is current."""
        self.context = otel_context.get_current()

    def send(self, message: Any) -> None:
        """Tell the span a message of the response; raises what the middleware raises."""
        if self._coroutine is not None:
            self._own.run(self._coroutine.send, message)

    def end(self, error: BaseException | None = None) -> None:
        """End the span in the context it began in, with an exception event where there was one."""
        coroutine, self._coroutine = self._coroutine, None
        if coroutine is None:
            return
        if error is None:
            end_beside_call(None, self._own.run, coroutine.send, None)
        else:
            end_beside_call(error, self._own.run, coroutine.throw, error)


async def _stand_in_app(_scope: Any, _receive: Any, send: Any) -> None:
    span = _starting.get()
    if span is not None:
        span.note_start()
    while (message := await _next_message()) is not None:
        await send(message)


@types.coroutine
def _next_message() -> Generator[None, Any, Any]:
    return (yield)


async def _receive_nothing() -> Any:
    return {"type": "http.disconnect"}


async def _send_nowhere(_message: Any) -> None:
    return None


class AsgiServerSpans(ServerSpanChoice):
    """Makes SERVER spans of ASGI calls on one provider, where nobody else does."""

    __slots__ = ("_middleware",)

    middleware_class = OpenTelemetryMiddleware
    # FastAPI itself makes SERVER spans where it has `fastapi.telemetry`.
    instrumentations = (
        "fastapi.telemetry",
        *(f"opentelemetry.instrumentation.{name}" for name in ("django", "fastapi", "starlette")),
    )

    def __init__(self, provider: TracerProvider, *, app: Any, given: bool) -> None:
        super().__init__(provider, app=app, given=given)
        self._middleware = OpenTelemetryMiddleware(
            _stand_in_app,
            tracer_provider=provider,
            meter_provider=NoOpMeterProvider(),
            exclude_spans=["receive", "send"],
        )

    def start(self, scope: Any) -> AsgiServerSpan | None:
        """Start the span of a call, or None where it is not ours to make."""
        return AsgiServerSpan(self._middleware, dict(scope)) if self.is_ours(scope.get("path")) else None
