"""The ASGI middleware: `MoesifMiddleware`, a drop-in for the class of the same name in moesifasgi."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from moesif_otel._capture import EXCHANGES_KEY
from moesif_otel._capture.asgi.capture import AsgiCapture
from moesif_otel._capture.callbacks import check_signatures, takes
from moesif_otel._capture.exchange import is_over
from moesif_otel._pipeline.middleware import Middleware
from moesif_otel.errors import MoesifConfigError
from moesif_otel.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.trace import TracerProvider

    from moesif_otel._capture.asgi.span import AsgiServerSpans
    from moesif_otel._capture.exchange import Exchange

__all__ = ["MoesifMiddleware"]

_MAX_LAYERS: Final = 100


class MoesifMiddleware(Middleware):
    """ASGI middleware that records API calls in Moesif.

    Drop-in for `moesifasgi.MoesifMiddleware`:

    ```python
    app.add_middleware(MoesifMiddleware, settings={"APPLICATION_ID": "…"})  # FastAPI, Starlette
    app = MoesifMiddleware(app, {"APPLICATION_ID": "…"})  # any ASGI application
    ```

    Callbacks take `(request, response)`: Starlette's objects where it is installed, else plain ones with the same
    names. They may be coroutine functions; the answer never waits for one, unless a governance rule needs the identity.

    On a running event loop the profile calls (`update_user` and the others) never wait: what they send is queued.

    Args:
        app: The ASGI application.
        settings: Dict of options, `{"APPLICATION_ID": "…", …}`; absent ones are read from the environment.
        tracer_provider: Provider for the SERVER spans; by default the global one if it is an SDK provider at the first
            call, else none: then no spans are made, nobody could see them.

    Raises:
        MoesifConfigError: An option is wrong, or `app` is no ASGI application; nothing has been changed or started.

    Serves any number of event loops (asyncio, uvloop, trio). Nothing starts before the first call, so it may be made
    before a fork.
    """

    def __init__(
        self,
        app: Any,
        settings: Mapping[str, Any] | Settings | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        _check_application(app)
        settings = Settings.of(settings, async_callbacks=True)
        check_signatures(settings, ("request", "response"))
        super().__init__(settings, tracer_provider)
        self.app = app
        self._capture = AsgiCapture(self._pipeline)
        # Framework applications that have us in their middleware, or have not: looked at once.
        self._seen_app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        """Serve one connection (ASGI 3): what passes, is returned and raised is what it would be without us."""
        if self._is_shut_down:
            return await self.app(scope, receive, send)
        if "app" in scope and scope["app"] is not self._seen_app:
            self._stand_outside(scope["app"])
        exchange = self._exchange_around(scope)
        if exchange is not None:
            return await self._capture.serve_inside(self.app, exchange, scope, receive, send)
        spans = self._spans["made"] if self._spans else self._resolve_spans(_span_class)
        return await self._capture.serve(self.app, scope, receive, send, spans=spans)

    def _exchange_around(self, scope: Any) -> Exchange | None:
        """Return the Exchange that a layer of ours further outside has opened for this call."""
        pipeline = self._pipeline
        present: tuple[Exchange, ...] = scope.get(EXCHANGES_KEY, ())
        for exchange in present:
            if exchange.pipeline is pipeline and not exchange.provisional and not is_over(exchange):
                return exchange
        return None

    def _stand_outside(self, app: Any) -> None:
        """Put a layer around all middleware of the Starlette application whose `add_middleware` made us.

        Starlette's own error handling lies outside of us: it answers 500s that we would not see.
        """
        self._seen_app = app
        try:
            stack = getattr(app, "middleware_stack", None)
            if stack is not None and self._is_inside(stack):
                app.middleware_stack = _Outermost(stack, self)
        except Exception as exc:
            self._pipeline.guard.caught("becoming the outermost middleware", exc)

    def _is_inside(self, layer: Any) -> bool:
        """Tell whether we are in these layers, and not around them already; so may be one of another application id."""
        for _ in range(_MAX_LAYERS):
            if type(layer) is _Outermost and layer._middleware is self:
                return False
            if layer is self:
                return True
            layer = getattr(layer, "app", None)
            if layer is None:
                break
        return False

    def _serve_outermost(self, app: Any, scope: Any, receive: Any, send: Any) -> Any:
        if self._is_shut_down:
            return app(scope, receive, send)
        spans = self._spans["made"] if self._spans else self._resolve_spans(_span_class)
        return self._capture.serve(app, scope, receive, send, spans=spans, governs=False)


def _span_class() -> type[AsgiServerSpans]:
    from moesif_otel._capture.asgi.span import AsgiServerSpans

    return AsgiServerSpans


class _Outermost:
    """Captures around all middleware of an application, `app`; the `MoesifMiddleware` somewhere inside governs."""

    def __init__(self, app: Any, middleware: MoesifMiddleware) -> None:
        self.app = app
        self._middleware = middleware

    def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        return self._middleware._serve_outermost(self.app, scope, receive, send)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.app, name)


def _check_application(app: Any) -> None:
    """Refuse what is no ASGI application, and say what to use."""
    if not callable(app):
        raise MoesifConfigError(f"app: got {type(app).__name__}, takes an ASGI application (scope, receive, send)")
    if takes(app, 3) or isinstance(app, type):
        return
    name = getattr(app, "__name__", type(app).__name__)
    if takes(app, 2):
        raise MoesifConfigError(
            f"app: {name} takes two arguments, as WSGI applications do (Flask, Bottle, Pyramid, Django's WSGIHandler); "
            "use moesif_otel.wsgi.MoesifMiddleware"
        )
    if takes(app, 1):
        raise MoesifConfigError(
            f"app: {name} takes one argument; in Django's MIDDLEWARE use moesif_otel.django.MoesifMiddleware, around "
            "an ASGI 2 application asgiref.compatibility.guarantee_single_callable"
        )
