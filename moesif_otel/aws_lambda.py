"""AWS Lambda: `MoesifLogger` records a handler's calls, `deliver_before_freeze` delivers what others have captured.

Between two calls Lambda freezes the process with all of its threads, and may end it without a word. So whatever a call
has left to be delivered is delivered before its handler returns.
"""

from __future__ import annotations

import functools
import inspect
import os
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from moesif_otel._capture.aws_lambda import LambdaCapture
from moesif_otel._capture.callbacks import check_signatures
from moesif_otel._guard import PROCESS_GUARD
from moesif_otel._pipeline.middleware import Middleware
from moesif_otel._pipeline.pipeline import live_pipelines
from moesif_otel.errors import MoesifConfigError
from moesif_otel.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["MoesifLogger", "deliver_before_freeze"]

_Handler = TypeVar("_Handler", bound="Callable[..., Any]")

_MAX_WAIT_S: Final = 1.0
_MARGIN_S: Final = 0.2  # Lambda kills what takes longer than its time, and the answer must still get out


class MoesifLogger(Middleware):
    """Decorator that records the calls of a Lambda handler in Moesif.

    Drop-in for `moesif_aws_lambda.middleware.MoesifLogger`:

    ```python
    @MoesifLogger({"APPLICATION_ID": "…"})
    def handler(event, context):
        return {"statusCode": 200, "body": "hello"}
    ```

    It records calls that come from API Gateway (payload 1.0 and 2.0), a function URL or a load balancer; other events
    are passed through. They are delivered before the handler returns, as with `deliver_before_freeze`. Callbacks take
    `(event, context)`.

    Args:
        settings: Dict of options, `{"APPLICATION_ID": "…", …}`; absent ones are read from the environment.
            `API_VERSION` is the function's version by default.

    Raises:
        MoesifConfigError: An option is wrong; nothing has been changed or started.
    """

    def __init__(self, settings: Mapping[str, Any] | Settings | None = None) -> None:
        version = os.environ.get("AWS_LAMBDA_FUNCTION_VERSION")
        settings = Settings.of(settings, defaults={"api_version": version} if version else None)
        check_signatures(settings, ("event", "context"))
        super().__init__(settings, None)
        self._capture = LambdaCapture(self._pipeline)

    def __call__(self, handler: _Handler) -> _Handler:
        """Return the handler with the capture around it; what it returns and raises passes unchanged.

        Raises:
            MoesifConfigError: It is no function, or a coroutine function, whose result would not be seen.
        """
        _check(handler)
        # Now, since OpenTelemetry's Lambda instrumentation starts the first call's span before we see the call.
        self._pipeline.watch_global_provider()

        @functools.wraps(handler, updated=())
        def captured(*arguments: Any, **keywords: Any) -> Any:
            self._pipeline.watch_global_provider()
            return self._capture.call(handler, *arguments, **keywords)

        return cast("_Handler", deliver_before_freeze(captured))


def deliver_before_freeze(handler: _Handler) -> _Handler:
    """Deliver, before a Lambda handler returns, what its call has left to be delivered.

    Put this around a handler whose calls are captured by the middleware of the application inside:

    ```python
    handler = deliver_before_freeze(Mangum(MoesifMiddleware(app, settings)))

    @deliver_before_freeze
    def handler(event, context):
        return serverless_wsgi.handle_request(app, event, context)
    ```

    It waits for a second at most, and never beyond the time that the call has left. What is not delivered then waits
    for the next call, or in `SPOOL_DIRECTORY` (`/tmp` survives a freeze).

    Args:
        handler: The handler, `(event, context)`.

    Returns:
        The handler; what it returns and raises passes unchanged.

    Raises:
        MoesifConfigError: As for `MoesifLogger`.
    """
    _check(handler)

    @functools.wraps(handler, updated=())
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        try:
            return handler(*arguments, **keywords)
        finally:
            context = arguments[1] if len(arguments) > 1 else keywords.get("context")
            PROCESS_GUARD.run("delivery at the end of a Lambda call", _deliver, context)

    return cast("_Handler", wrapped)


def _check(handler: Any) -> None:
    if not callable(handler):
        raise MoesifConfigError(f"handler: got {type(handler).__qualname__}, takes a function (event, context)")
    if inspect.iscoroutinefunction(handler):
        raise MoesifConfigError(
            f"handler: {handler.__qualname__} is a coroutine function, takes the function that Lambda calls"
        )


def _deliver(context: Any) -> None:
    wait_s = _MAX_WAIT_S
    remaining_millis = getattr(context, "get_remaining_time_in_millis", None)
    if callable(remaining_millis):
        wait_s = min(wait_s, remaining_millis() / 1_000 - _MARGIN_S)
    deadline_s = time.monotonic() + wait_s
    for pipeline in live_pipelines():
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            return
        pipeline.force_flush(left_s)
