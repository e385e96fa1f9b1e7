"""The undocumented members of Tornado that we use, each in one function.

`tests/capture/tornado/test_shape.py` is the canary of every function here. Tried on Tornado 6.0.4 and 6.6.1.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from tornado import web  # while that is being imported, `tornado.web` is no attribute of `tornado` yet
from tornado.http1connection import HTTP1Connection

if TYPE_CHECKING:
    from collections.abc import Callable

    from tornado.web import RequestHandler


class UnknownShape(Exception):  # noqa: N818 - it is a finding about Tornado, not an error of a user's
    """Tornado does not look as it did when this was written; nothing more is captured."""


def check_tornado() -> None:
    """Check, once, the method that the capture stands around.

    Raises:
        UnknownShape: `RequestHandler._execute` is gone or takes other arguments.
    """
    execute = getattr(web.RequestHandler, "_execute", None)
    try:
        parameters = list(inspect.signature(execute).parameters.values())  # type: ignore[arg-type]
    except (TypeError, ValueError) as exc:
        raise UnknownShape("RequestHandler._execute") from exc
    second = parameters[1] if len(parameters) > 1 else None
    # Somebody else's wrapper may say no more than `*args`.
    if second is None or (second.name != "transforms" and second.kind is not second.VAR_POSITIONAL):
        raise UnknownShape("RequestHandler._execute")


def is_finished(handler: RequestHandler) -> bool:
    """Tell whether the handler has finished its response, or has given its connection away."""
    return bool(_member(handler, "_finished"))


def finishes_by_itself(handler: RequestHandler) -> bool:
    """Tell whether Tornado finishes the response when the handler's method returns."""
    return bool(_member(handler, "_auto_finish"))


def headers_of(handler: RequestHandler) -> Any:
    """Return the response's headers as they stand."""
    return _member(handler, "_headers")


def streams_request_body(handler: RequestHandler) -> bool:
    """Tell whether the handler's class is decorated with `tornado.web.stream_request_body`."""
    # The decorator sets it; a class without the decorator has no such attribute.
    return bool(getattr(type(handler), "_stream_request_body", False))


def close_callback_of(connection: Any) -> Callable[[], None] | None:
    """Return what the connection calls when the client leaves; None when it calls nothing, or is none of Tornado's."""
    if not isinstance(connection, HTTP1Connection) and not hasattr(connection, "_close_callback"):
        return None
    callback: Callable[[], None] | None = _member(connection, "_close_callback")
    return callback


def client_is_gone(connection: Any) -> bool:
    """Tell whether the connection's stream is closed; to be asked before a write, since the last write may close it."""
    try:
        return bool(connection.stream.closed())
    except AttributeError:  # no connection of Tornado's
        return False


def _member(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError as exc:
        raise UnknownShape(f"{type(owner).__qualname__}.{name}") from exc
