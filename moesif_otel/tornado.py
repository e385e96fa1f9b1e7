"""`MoesifMiddleware` for Tornado, a drop-in for the class of the same name in moesiftornado.

Construction starts no thread; the tracer provider is chosen at the first request.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

from tornado.web import Application, RequestHandler

from moesif_otel._capture.callbacks import check_signatures
from moesif_otel._capture.tornado.capture import TornadoCapture
from moesif_otel._capture.tornado.spans import instrumentation
from moesif_otel._pipeline.middleware import Middleware
from moesif_otel.errors import MoesifConfigError
from moesif_otel.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opentelemetry.trace import TracerProvider


__all__ = ["MoesifMiddleware", "tornado_access_log"]

_BATCH_SIZE: Final = 25  # the default that moesiftornado documents
# What `Application.log_request` looks at: an application that has no `log_function`.
_WITHOUT_LOG_FUNCTION: Final = cast("Application", SimpleNamespace(settings={}))


def tornado_access_log(handler: RequestHandler) -> None:
    """Write the line that Tornado writes to `tornado.access` when an application has no `log_function`.

    Args:
        handler: The handler whose response is complete.
    """
    # Tornado's own code, whichever version is installed, told that there is no `log_function`.
    Application.log_request(_WITHOUT_LOG_FUNCTION, handler)


class MoesifMiddleware(Middleware):
    """Records the API calls of Tornado applications in Moesif.

    Drop-in for `moesiftornado.MoesifMiddleware`:

    ```python
    middleware = MoesifMiddleware({"APPLICATION_ID": "…"})
    application = tornado.web.Application(handlers, log_function=middleware.log_event)
    ```

    `update_user` and the other profile calls (`MoesifClient` says what each takes) raise only for wrong arguments. On a
    running event loop they never wait: what they send is queued, as with `wait=False`.

    Args:
        settings: Dict of options; the README lists them all. `BATCH_SIZE` is 25 by default. Callbacks take the handler
            and must not be coroutine functions: they run when the response is complete; look things up in the handler
            and say `identify(user_id=…)` there.
        tracer_provider: Provider for spans; by default the global one if it is an SDK provider at the first request,
            else none: then no spans are made, and nothing is added to calls of `AsyncHTTPClient`.
        log_function: What to call with the handler after each call. By default Tornado's access log goes on as without
            us; None writes none, as moesiftornado did. What it raises passes to Tornado, as without us.

    Raises:
        MoesifConfigError: An option is wrong; nothing has been changed or started.

    Thread-safe. No thread starts before the first request, so it may be made before a fork.
    """

    def __init__(
        self,
        settings: Mapping[str, Any] | Settings | None = None,
        tracer_provider: TracerProvider | None = None,
        *,
        log_function: Callable[[RequestHandler], Any] | None = tornado_access_log,
    ) -> None:
        if log_function is not None and not callable(log_function):
            raise MoesifConfigError(
                f"log_function: got {type(log_function).__name__}, takes a callable (handler), or None"
            )
        settings = Settings.of(settings, defaults={"batch_size": _BATCH_SIZE})
        check_signatures(settings, ("handler",))
        super().__init__(settings, tracer_provider)
        self._log_function = log_function
        # The capture finds itself here, from the `log_function` of an application.
        self._tornado_capture = TornadoCapture(self._pipeline, before_first=self._resolve)
        self._tornado_capture.start()

    def log_event(self, handler: RequestHandler) -> None:
        """Take the end of a call: give this to `tornado.web.Application(…, log_function=middleware.log_event)`.

        Called from a function or a `log_request` of your own, it records too (the first call without its response
        body, by which it gets to know the application), and the access log is yours to write.

        Args:
            handler: The handler whose response is complete.

        Raises:
            What the `log_function` given at construction raises.
        """
        capture = self._tornado_capture
        capture.log_event(handler)
        log_function = self._log_function
        if log_function is tornado_access_log:
            if capture.is_log_function_of(handler):
                self._pipeline.guard.run("Tornado's access log", log_function, handler)
        elif log_function is not None:
            log_function(handler)

    def _resolve(self) -> None:
        provider = self._provider_to_watch()
        if provider is not None:
            instrumentation.hold(self, provider)

    def stop(self) -> None:
        """Stop capturing; calls that are being served are recorded to their end.

        The last middleware that stops restores Tornado; the applications are served on, and their access log goes on.
        Calls made with `requests` are no longer captured either.
        """
        self._tornado_capture.stop()
        self._stop_outgoing()
        instrumentation.release(self)

    def shutdown(self, timeout_millis: int | None = None) -> None:
        """Stop capturing and deliver what is pending. It waits: on an event loop use `asyncio.to_thread`.

        Args:
            timeout_millis: Return after this time at the latest; `SHUTDOWN_TIMEOUT` by default.
        """
        self.stop()
        super().shutdown(timeout_millis)
