"""The WSGI middleware: `MoesifMiddleware`, a drop-in for the class of the same name in moesifwsgi."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from moesif_otel._capture.callbacks import check_signatures
from moesif_otel._capture.wsgi.capture import WsgiCapture
from moesif_otel._pipeline.middleware import Middleware
from moesif_otel.errors import MoesifConfigError
from moesif_otel.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.trace import TracerProvider

    from moesif_otel._capture.exchange import Exchange
    from moesif_otel._capture.wsgi.span import WsgiServerSpans

__all__ = ["MoesifMiddleware"]


class MoesifMiddleware(Middleware):
    """WSGI middleware that records API calls in Moesif.

    Drop-in for `moesifwsgi.MoesifMiddleware`: `app.wsgi_app = MoesifMiddleware(app.wsgi_app, settings)`.

    Args:
        app: The WSGI application (PEP 3333).
        settings: Dict of options, `{"APPLICATION_ID": "…", …}`; absent ones are read from the environment.
        tracer_provider: Provider for the SERVER spans; by default the global one if it is an SDK provider at the first
            request, else none: then no spans are made, nobody could see them.

    Raises:
        MoesifConfigError: An option is wrong; nothing has been changed or started.

    Thread-safe. Nothing starts before the first request, so it may be made before a fork (`gunicorn --preload`).
    """

    def __init__(
        self,
        app: Any,
        settings: Mapping[str, Any] | Settings | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        _check_application(app)
        settings = Settings.of(settings)
        check_signatures(settings, ("app", "environ"), identify=("app", "environ", "response_headers"))
        super().__init__(settings, tracer_provider)
        self.app = app
        self._capture = WsgiCapture(
            self._pipeline, transaction_id=None if settings.disabled_transaction_id else self._transaction_id
        )

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Serve one request (PEP 3333): what the application returns and raises passes unchanged."""
        if self._is_shut_down:
            return self.app(environ, start_response)
        spans = self._spans["made"] if self._spans else self._resolve_spans(_span_class)
        return self._capture.call(self.app, environ, start_response, spans=spans)

    def _transaction_id(self, exchange: Exchange) -> str:
        arguments = exchange.callback_arguments  # none where a shutdown has ended the call
        incoming = arguments[1].get("HTTP_X_MOESIF_TRANSACTION_ID") if arguments else None
        return self._transaction_id_of(exchange, incoming)


def _span_class() -> type[WsgiServerSpans]:
    from moesif_otel._capture.wsgi.span import WsgiServerSpans

    return WsgiServerSpans


def _check_application(app: Any) -> None:
    """Refuse what is certainly no WSGI application, and say what to use."""
    if not callable(app):
        raise MoesifConfigError(f"app: got {type(app).__name__}, takes a WSGI application (environ, start_response)")
    call = getattr(type(app), "__call__", None)  # noqa: B004 - a class may have an `async def __call__`
    if inspect.iscoroutinefunction(app) or (not inspect.isfunction(app) and inspect.iscoroutinefunction(call)):
        raise MoesifConfigError(
            f"app: got {type(app).__name__} {getattr(app, '__qualname__', '')}".rstrip()
            + ", an ASGI application (FastAPI, Starlette, Quart, Django's ASGIHandler); use "
            "moesif_otel.asgi.MoesifMiddleware around it"
        )
    try:
        names = tuple(inspect.signature(app).parameters)
    except (TypeError, ValueError):
        return
    if names == ("scope", "receive", "send"):
        raise MoesifConfigError(
            f"app: {type(app).__name__} takes (scope, receive, send), as ASGI applications do; use "
            "moesif_otel.asgi.MoesifMiddleware around it"
        )
