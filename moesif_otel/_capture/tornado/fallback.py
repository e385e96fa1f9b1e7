"""Requests that a `FallbackHandler` passes to a WSGI container, another application or any other callable.

Such a handler calls neither transforms nor `log_function`: the connection is the only place left. A connection object
serves one request (`HTTP1ServerConnection` makes a new one for each), so its own attributes reach nobody else; they are
taken off after the call. A WSGI container may run its application in other threads, which touch nothing here.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from moesif_otel._capture import EXCHANGES_KEY
from moesif_otel._capture.exchange import Outcome
from moesif_otel._capture.tornado.call import TornadoCall
from moesif_otel._capture.tornado.shape import UnknownShape, client_is_gone, close_callback_of
from moesif_otel._guard import PROCESS_GUARD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tornado.web import RequestHandler

    from moesif_otel._capture.exchange import Exchange

_METHODS: Final = ("write_headers", "write", "finish", "set_close_callback")
_FIRST_FINAL_STATUS: Final = 200


class ConnectionCall(TornadoCall):
    """A request to a `FallbackHandler`, whose response is seen on its connection."""

    __slots__ = ()

    def __init__(self, exchange: Exchange, handler: RequestHandler) -> None:
        super().__init__(exchange, handler)
        # A WSGI `MoesifMiddleware` of the same application id inside sees the application itself, and takes over.
        exchange.provisional = True

    def watch(self, exchange: Exchange, handler: RequestHandler) -> None:
        """Take the request body and stand on the connection.

        Raises:
            UnknownShape: The connection is none that we know.
        """
        connection: Any = handler.request.connection
        if not all(callable(getattr(connection, name, None)) for name in _METHODS):
            raise UnknownShape(f"{type(connection).__qualname__} of a FallbackHandler")
        self.take_request_body(exchange, handler)
        previous = close_callback_of(connection)
        hook = partial(self.hook, connection)
        hook("write_headers", self._around(connection.write_headers, self._before_headers, self._wrote_headers))
        hook("write", self._around(connection.write, None, self.response_piece))
        hook("finish", self._around(connection.finish, partial(self._before_finish, connection), self._finished))
        set_close_callback = connection.set_close_callback
        hook("set_close_callback", partial(self._set_close_callback, set_close_callback))
        self._set_close_callback(set_close_callback, previous)

    def _around(
        self, method: Callable[..., Any], before: Callable[..., None] | None, after: Callable[..., None]
    ) -> Callable[..., Any]:
        """Return `method` as it is, with `after` told of each call that did not raise."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                self.guard.run("capture of a Tornado response", partial(before, *args, **kwargs))
            result = method(*args, **kwargs)
            self.guard.run("capture of a Tornado response", partial(after, *args, **kwargs))
            return result

        return call

    def _set_close_callback(self, set_close_callback: Callable[..., Any], callback: Callable[[], None] | None) -> None:
        set_close_callback(None if callback is None else self.and_then_aborted(callback))

    def _before_headers(self, start_line: Any, headers: Any, chunk: bytes | None = None) -> None:
        del start_line, chunk
        self.add_decided_headers(headers)

    def _wrote_headers(self, start_line: Any, headers: Any, chunk: bytes | None = None) -> None:
        status = int(start_line.code)
        if status >= _FIRST_FINAL_STATUS or (self.exchange is not None and self.exchange.status is None):
            self.headers_sent(status, headers)
        if chunk:
            self.response_piece(chunk)

    def _before_finish(self, connection: Any) -> None:
        # Afterwards the stream may be closed because all is sent.
        self.client_left = client_is_gone(connection)

    def _finished(self) -> None:
        self.end(Outcome.ABORTED if self.client_left else Outcome.COMPLETE)

    def executed(self, error: BaseException | None) -> None:
        """The handler's task is done; whom it passed the request to may only begin now."""
        if error is not None:
            self.end(Outcome.FAILED, error)


def marked_environ(
    calls_of: Callable[[Any], Iterable[TornadoCall]], environ_of: Any, /, *args: Any, **kwargs: Any
) -> Any:
    """Do `WSGIContainer.environ` (a static method before Tornado 6.3); that of a captured request names its Exchanges.

    `calls_of` finds the calls that capture a request, which is the last of `args`.
    """
    environ = environ_of(*args, **kwargs)
    try:
        exchanges = tuple(call.exchange for call in calls_of(args[-1]) if call.exchange is not None)
        if exchanges:
            environ[EXCHANGES_KEY] = (*environ.get(EXCHANGES_KEY, ()), *exchanges)
    except Exception as exc:
        PROCESS_GUARD.caught("capture of a WSGI application in Tornado", exc)
    return environ
