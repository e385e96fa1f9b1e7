"""One request served by a Tornado handler: what fills its Exchange, and when it is over.

Runs on the event loop; a finalizer may end a call. Nothing here raises into Tornado, changes a chunk, or keeps a
handler after the end of its call.

Tornado's order, which `HandlerCall` rests on. Success: transforms, headers, `finish`, `log_function`, `on_finish` (an
instrumentor's span ends), `_execute` returns. Errors and 404: `log_exception`, transforms, `log_function`, `_execute`
returns. The call is over at the first of: `log_function`; the connection's close callback; the return of `_execute`,
where the handler has finished or would have been finished by Tornado (`_auto_finish = False` handlers go on after it).
"""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from tornado.web import Finish, HTTPError, OutputTransform, RequestHandler

from moesif_otel._capture.body import NO_BODY_STATUSES
from moesif_otel._capture.exchange import AWAITS_SPAN, Outcome
from moesif_otel._capture.patching import InstancePatches
from moesif_otel._capture.tornado.shape import (
    UnknownShape,
    client_is_gone,
    close_callback_of,
    finishes_by_itself,
    headers_of,
    is_finished,
    streams_request_body,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tornado.httputil import HTTPHeaders

    from moesif_otel._capture.body import CapturedBody
    from moesif_otel._capture.exchange import Decision, Exchange

_SWITCHING_PROTOCOLS: Final = 101
_FIRST_FINAL_STATUS: Final = 200
_CONNECTION_METHODS: Final = ("write_headers", "write", "finish", "set_close_callback")


class TornadoCall:
    """One captured request; once it is over only its empty shell is left.

    Attributes:
        decision: Whose headers governance adds to those of the response.
        client_left: Whether nobody is there any more to get what is written.
        had_coding: Whether the response had a content coding before it was seen; Tornado may add one afterwards.
    """

    __slots__ = (
        "__weakref__",
        "client_left",
        "decision",
        "exchange",
        "guard",
        "had_coding",
        "handler",
        "hooks",
        "keeps_response",
    )

    def __init__(self, exchange: Exchange, handler: RequestHandler) -> None:
        pipeline = exchange.pipeline
        self.exchange: Exchange | None = exchange
        self.handler: RequestHandler | None = handler
        self.guard = pipeline.guard
        self.decision: Decision | None = None
        self.client_left = False
        self.had_coding = True
        self.hooks: InstancePatches | None = None  # few calls need any
        # A HEAD response's body is dropped by Tornado after the transforms have seen it.
        self.keeps_response = pipeline.settings.log_body and exchange.method != "HEAD"
        if pipeline.settings.log_body:
            exchange.capture_response_body()

    def watch(self, exchange: Exchange, handler: RequestHandler) -> None:
        """Take the request body, and the place from which the call is seen."""
        raise NotImplementedError

    def take_request_body(self, exchange: Exchange, handler: RequestHandler) -> None:
        """Note the body that Tornado has read."""
        data = handler.request.body
        if data and isinstance(data, bytes) and exchange.pipeline.settings.log_body:
            exchange.capture_request_body().add(data)

    def hook(self, owner: Any, name: str, function: Any) -> None:
        """Put a function in the way of an object's method until the call is over."""
        if self.hooks is None:
            self.hooks = InstancePatches()
        self.hooks.put(owner, name, function)

    def and_then_aborted(self, close_callback: Callable[[], None]) -> Callable[[], None]:
        """Return a close callback that does what the connection would have done, then ends the call."""

        def on_close() -> None:
            try:
                close_callback()
            finally:
                self.closed()

        return on_close

    def closed(self) -> None:
        """Note that the connection is closed before its response was complete."""
        self.end(Outcome.ABORTED)

    def add_decided_headers(self, headers: HTTPHeaders) -> None:
        """Let governance add its headers to those that are about to be sent."""
        decision, self.decision = self.decision, None
        if decision is not None and self.exchange is not None and self.exchange.is_open:
            own = list(headers.get_all())
            for name, value in decision.added_to(own)[len(own) :]:
                headers.add(name, value)

    def headers_sent(self, status: int, headers: HTTPHeaders) -> None:
        """Note status and headers as they left."""
        exchange = self.exchange
        if exchange is not None and exchange.is_open:
            exchange.status = int(status)
            exchange.response_headers = list(headers.get_all())
            body = exchange.response_body
            if body is not None and not self.had_coding:
                body.decoded = "Content-Encoding" in headers
            if status in NO_BODY_STATUSES:
                # A handler that writes one all the same breaks the protocol: no client takes it for a body.
                self.keeps_response = False
                if body is not None:
                    body.restart()

    def response_piece(self, chunk: bytes) -> None:
        """Note a piece of the response body, if there is still somebody to get it."""
        exchange = self.exchange
        if chunk and self.keeps_response and not self.client_left and exchange is not None and exchange.is_open:
            body = exchange.response_body
            if body is not None:
                body.add(chunk)

    def serve(self, handler: RequestHandler) -> None:
        """Note that another handler answers this request; the users' callbacks get that one."""
        if self.exchange is not None and self.exchange.is_open:
            self.exchange.callback_arguments = (handler,)

    def logged(self) -> None:
        """`log_function` was called: the response has been handed to the connection."""

    def executed(self, error: BaseException | None) -> None:
        """`_execute` returned or raised."""
        raise NotImplementedError

    def end(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """End the call; the first end counts. Never raises."""
        exchange = self.exchange
        if exchange is None:
            return
        self.exchange = self.handler = None
        if self.hooks is not None:
            self.guard.run("capture of the end of a Tornado request", self.hooks.take_away)
        exchange.finish(outcome, error)

    def end_unseen(self) -> None:
        """Forget a call that cannot be watched: nobody would ever finish it."""
        exchange, self.exchange = self.exchange, None
        if self.hooks is not None:
            self.hooks.take_away()
        if exchange is not None:
            exchange.supersede()

    def __del__(self) -> None:
        # A handler with `_auto_finish = False` that forgot its client, or a loop that ended first.
        exchange = getattr(self, "exchange", None)
        if exchange is not None:
            exchange.finish_from_finalizer(Outcome.UNFINISHED)


class HandlerCall(TornadoCall, OutputTransform):
    """A request whose handler answers through Tornado's transforms, one of which it is itself.

    `awaits_log` says whether its application calls our `log_event` at the end.
    """

    __slots__ = ("_answered", "_awaits_log", "_end", "_ended_response", "_streamed")

    def __init__(self, exchange: Exchange, handler: RequestHandler, *, awaits_log: bool) -> None:
        TornadoCall.__init__(self, exchange, handler)
        self._awaits_log = awaits_log
        self._end: tuple[Outcome, BaseException | None] | None = None  # which waits for the span to end
        self._ended_response = False
        self._answered = False  # while the client was there
        self._streamed = False

    def watch(self, exchange: Exchange, handler: RequestHandler) -> None:
        """Take the request body, or a place beside its stream; notice when the client leaves."""
        if streams_request_body(handler):
            # Of an upload that is malformed, or whose handler raises, Tornado tells the handler alone.
            self.hook(handler, "on_connection_close", self.and_then_aborted(handler.on_connection_close))
        if streams_request_body(handler) and exchange.pipeline.settings.log_body:
            body = exchange.capture_request_body()
            self.hook(handler, "data_received", _teed(handler.data_received, body, exchange))
        else:
            self.take_request_body(exchange, handler)
        connection: Any = handler.request.connection
        close_callback = close_callback_of(connection)
        if close_callback is not None:
            connection.set_close_callback(self.and_then_aborted(close_callback))

    # Tornado calls these with each flushed part of the response, before it is compressed.

    def transform_first_chunk(
        self, status_code: int, headers: HTTPHeaders, chunk: bytes, finishing: bool
    ) -> tuple[int, HTTPHeaders, bytes]:
        """Note status and first part, and pass them on as they are."""
        try:
            if self.decision is not None:
                self.add_decided_headers(headers)
            self.had_coding = "Content-Encoding" in headers
            if not finishing:
                self._streamed = True
            if not finishing or not self._awaits_log:
                self._look_at_headers()
            self._flushed(chunk, finishing=finishing)
        except Exception as exc:
            self.guard.caught("capture of a Tornado response", exc)
        return status_code, headers, chunk

    def transform_chunk(self, chunk: bytes, finishing: bool) -> bytes:
        """Note a later part, and pass it on as it is."""
        try:
            self._flushed(chunk, finishing=finishing)
        except Exception as exc:
            self.guard.caught("capture of a Tornado response", exc)
        return chunk

    def _flushed(self, chunk: bytes, *, finishing: bool) -> None:
        # A failed write tells the handler before the close callback runs, and `finish` then takes that callback off.
        if not self.client_left and self.handler is not None:
            self.client_left = client_is_gone(self.handler.request.connection)
        self.response_piece(chunk)
        if finishing:
            self._ended_response = True
            self._answered = self._answered or not self.client_left
            if not self._awaits_log:
                self._call_soon(self._end_answered)  # else the return of `_execute`, or the finalizer, will tell

    def _look_at_headers(self) -> None:
        """Look at what is sent: the handler goes on and may change it; compression and the framing are in it by then.

        Where `log_function` tells us, it does so before the handler goes on: of a response that is written in one piece
        the handler's own headers stand.
        """
        connection: Any = self.handler.request.connection if self.handler is not None else None
        if connection is None:
            return
        write_headers = connection.write_headers

        def write_and_note(start_line: Any, headers: HTTPHeaders, *args: Any, **kwargs: Any) -> Any:
            result = write_headers(start_line, headers, *args, **kwargs)
            try:
                if not self.client_left:
                    self.headers_sent(start_line.code, headers)
            except Exception as exc:
                self.guard.caught("capture of a Tornado response", exc)
            return result

        self.hook(connection, "write_headers", write_and_note)

    def _take_headers(self, exchange: Exchange, handler: RequestHandler) -> None:
        if exchange.status is None and exchange.is_open:
            self.headers_sent(handler.get_status(), headers_of(handler))

    # The end.

    def logged(self) -> None:
        """The response is complete: an answer, an error page, a WebSocket's 101, or the rest of a failed stream."""
        exchange, handler = self.exchange, self.handler
        if exchange is None or handler is None:
            return
        if self.client_left:
            self.closed()
            return
        error = None
        try:
            self._take_headers(exchange, handler)
            error = _failure(exchange.status, streamed=self._streamed)
        except Exception as exc:
            self.guard.caught("capture of the end of a Tornado request", exc)
        if error is not None:
            outcome = Outcome.FAILED
        else:
            outcome = Outcome.UPGRADED if exchange.status == _SWITCHING_PROTOCOLS else Outcome.COMPLETE
        if exchange.span is not None and not exchange.span_ended and outcome in AWAITS_SPAN:
            # `on_finish`, where it ends, comes next, and the return of `_execute` as a rule: no other thread need wait.
            self._end = (outcome, error)
            if self._call_soon(self._end_as_noted):
                return
        self.end(outcome, error)

    def _call_soon(self, function: Callable[[], None]) -> bool:
        try:
            asyncio.get_running_loop().call_soon(function)
        except RuntimeError:  # finished outside the loop
            return False
        return True

    def _end_as_noted(self) -> None:
        if self._end is not None:
            self.end(*self._end)

    def executed(self, error: BaseException | None) -> None:
        """The handler's task is done: whatever Tornado would still do by itself has been done."""
        handler = self.handler
        if handler is None:
            return
        if self._end is not None:
            self.end(*self._end)
        elif error is not None:
            self.end(Outcome.FAILED, error)
        elif self._ended_response:
            self._end_answered()
        elif is_finished(handler):
            self.end(Outcome.DETACHED)
        elif finishes_by_itself(handler):
            self.end(Outcome.ABORTED)  # the client left during an upload that the handler takes as a stream

    def closed(self) -> None:
        """Note the end of the connection; Tornado closes it for a wrong `Content-Length`, behind the headers."""
        if self._end is None:
            self._take_headers_of_answer()
            self._end = Outcome.ABORTED, None
        self.end(*self._end)

    def _take_headers_of_answer(self) -> None:
        exchange, handler = self.exchange, self.handler
        if self._answered and exchange is not None and handler is not None:
            self.guard.run("capture of the end of a Tornado request", self._take_headers, exchange, handler)

    def _end_answered(self) -> None:
        self._take_headers_of_answer()
        self.end(Outcome.ABORTED if self.client_left else Outcome.COMPLETE)


class ConnectionCall(TornadoCall):
    """A request that a `FallbackHandler` passes to a WSGI container, another application or any other callable.

    Such a handler calls neither transforms nor `log_function`: the connection is the only place left. A connection
    object serves one request (`HTTP1ServerConnection` makes a new one for each), so its own attributes reach nobody
    else; they are taken off after the call. A WSGI container may run its application in other threads, which touch
    nothing here.
    """

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
        if not all(callable(getattr(connection, name, None)) for name in _CONNECTION_METHODS):
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


def _teed(receive: Callable[..., Any], body: CapturedBody, exchange: Exchange) -> Callable[..., Any]:
    """Return a `data_received` that notes each part and hands it to the handler's own."""

    def data_received(chunk: bytes) -> Any:
        try:
            if exchange.is_open:
                body.add(chunk)
        except Exception as exc:
            exchange.pipeline.guard.caught("capture of a Tornado upload", exc)
        return receive(chunk)

    return data_received


def _failure(status: int | None, *, streamed: bool) -> BaseException | None:
    """Return the exception that Tornado is answering for, if this is such an answer.

    `log_function` then runs inside Tornado's `except` clause. A handler that catches its own exception and finishes
    in its `except` clause with an answer of its own has not failed.
    """
    error = sys.exc_info()[1]
    if error is None or isinstance(error, (HTTPError, Finish)):
        return None
    return error if streamed or (status or 0) >= 500 else None
