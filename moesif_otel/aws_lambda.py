"""AWS Lambda: what a handler's call has left to be delivered is delivered before the process is frozen."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from moesif_otel._guard import PROCESS_GUARD
from moesif_otel._pipeline.pipeline import live_pipelines

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["deliver_before_freeze"]

_Handler = TypeVar("_Handler", bound="Callable[..., Any]")

_MAX_WAIT_S: Final = 1.0
_MARGIN_S: Final = 0.2  # Lambda kills what takes longer than its time, and the answer must still get out


def deliver_before_freeze(handler: _Handler) -> _Handler:
    """Deliver, before a Lambda handler returns, what its call has left to be delivered.

    Between two calls Lambda freezes the process with all of its threads, and may end it without a word. Put this around
    the handler; the call itself is captured by the middleware of the application inside:

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
    """

    @functools.wraps(handler, updated=())
    def wrapped(event: Any, context: Any = None, *arguments: Any, **keywords: Any) -> Any:
        try:
            return handler(event, context, *arguments, **keywords)
        finally:
            PROCESS_GUARD.run("delivery before a freeze", _deliver, context)

    return cast("_Handler", wrapped)


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
