"""One request served by a Tornado handler: what fills its Exchange, and when it is over.

Owns: `Call` (the record that both kinds of tee write to), `HandlerCall` (a handler that answers itself), `ResponseTee`.
Threads: the event loop's; a finalizer may end a call.
Never: raises into Tornado, changes a chunk, keeps a handler after the end of its call.

Tornado's order, which `HandlerCall` rests on. Success: transforms, headers, `finish`, `log_function`, `on_finish`,
`_execute` returns. Errors and 404: `log_exception`, transforms, `log_function`, `_execute` returns. The call is over at
the first of: `log_function`; the connection's close callback; the return of `_execute`, where the handler has finished
or would have been finished by Tornado (`_auto_finish = False` handlers go on after it).
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, Final

import tornado.web
from tornado.web import Finish, HTTPError, OutputTransform, RequestHandler

from moesif_otel.capture.body import CapturedBody
from moesif_otel.capture.exchange import Outcome
from moesif_otel.capture.tornado_govern import add_headers
from moesif_otel.capture.tornado_shape import (
    client_is_gone,
    close_callback_of,
    finishes_by_itself,
    is_finished,
    sent_headers,
    streams_request_body,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tornado.httputil import HTTPHeaders

    from moesif_otel.capture.exchange import Decision, Exchange

__all__ = ["Call", "HandlerCall", "ResponseTee", "chained_close"]

_SWITCHING_PROTOCOLS: Final = 101


class Call:
    """One captured request; once it is over only its empty shell is left.

    Args:
        exchange: Its Exchange, open.
        handler: The handler that serves it.
    """

    __slots__ = ("__weakref__", "decision", "exchange", "guard", "handler", "keeps_response")

    def __init__(self, exchange: Exchange, handler: RequestHandler) -> None:
        self.exchange: Exchange | None = exchange
        self.handler: RequestHandler | None = handler
        self.decision: Decision | None = None  # whose headers are to be added
        self.guard = exchange.pipeline.guard
        settings = exchange.pipeline.settings
        # A HEAD response's body is dropped by Tornado after the transforms have seen it.
        self.keeps_response = settings.log_body and exchange.method != "HEAD"
        if settings.log_body:
            exchange.response_body = CapturedBody(settings.response_max_body_size, exchange.pipeline.budget)

    def add_decided_headers(self, headers: HTTPHeaders) -> None:
        """Let governance add its headers to those that are about to be sent."""
        if self.decision is not None and self.exchange is not None and self.exchange.is_open:
            decision, self.decision = self.decision, None
            add_headers(decision, headers)

    def response_piece(self, chunk: bytes) -> None:
        """Note a piece of the response body."""
        exchange = self.exchange
        if chunk and self.keeps_response and exchange is not None and exchange.is_open:
            body = exchange.response_body
            if body is not None:
                body.add(chunk)

    def serve(self, handler: RequestHandler) -> None:
        """Note that another handler answers this request; the users' callbacks get that one."""
        if self.exchange is not None and self.exchange.is_open:
            self.exchange.callback_arguments = (handler,)

    def logged(self) -> None:
        """`log_function` was called: the response has been handed to the connection."""

    def aborted(self) -> None:
        """The client left."""
        self.end(Outcome.ABORTED)

    def executed(self, error: BaseException | None) -> None:
        """`_execute` returned or raised."""

    def end(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """End the call; the first end counts. Never raises."""
        exchange, handler = self.exchange, self.handler
        if exchange is None or handler is None:
            return
        self.exchange = self.handler = None
        try:
            self.close(exchange, handler)
        except Exception as exc:
            self.guard.caught("the end of a Tornado request", exc)
        exchange.finish(outcome, error)

    def close(self, exchange: Exchange, handler: RequestHandler) -> None:
        """Fill in what is known at the end, and take our hooks away."""

    def __del__(self) -> None:
        # A handler with `_auto_finish = False` that forgot its client, or a loop that ended first.
        exchange = getattr(self, "exchange", None)
        if exchange is not None:
            exchange.finish_from_finalizer(Outcome.UNFINISHED)


class HandlerCall(Call):
    """A request whose handler answers through Tornado's transforms.

    Args:
        exchange: Its Exchange, open.
        handler: The handler.
        awaits_log: Whether its application calls our `log_event` at the end.
    """

    __slots__ = ("_awaits_log", "_client_left", "_ended_response", "_had_coding", "_hooks", "_noted_headers")

    def __init__(self, exchange: Exchange, handler: RequestHandler, *, awaits_log: bool) -> None:
        super().__init__(exchange, handler)
        self._awaits_log = awaits_log
        self._client_left = False
        self._ended_response = False
        self._had_coding = False
        self._noted_headers = False
        self._hooks: list[tuple[str, Any]] = []

    # The request.

    def watch(self) -> None:
        """Take the request body, or a place beside its stream, and see the client leave."""
        exchange, handler = self.exchange, self.handler
        if exchange is None or handler is None:
            return
        settings = exchange.pipeline.settings
        if settings.log_body:
            body = CapturedBody(settings.request_max_body_size, exchange.pipeline.budget)
            if streams_request_body(handler):
                exchange.request_body = body
                self._hook("data_received", _teed(handler.data_received, body, exchange))
            elif isinstance(handler.request.body, bytes) and handler.request.body:
                exchange.request_body = body
                body.add(handler.request.body)
        if type(handler).detach is tornado.web.RequestHandler.detach:
            self._hook("detach", self._with_detach(handler.detach))
        connection: Any = handler.request.connection
        if connection is not None:
            previous = close_callback_of(connection)
            if previous is not None:
                connection.set_close_callback(chained_close(previous, self))

    def _hook(self, name: str, function: Any) -> None:
        # On the instance, so that no other request and no class is touched; taken away at the end of the call.
        if self.handler is not None:
            setattr(self.handler, name, function)
            self._hooks.append((name, function))

    def _with_detach(self, detach: Callable[..., Any]) -> Callable[..., Any]:
        def detach_and_end(*args: Any, **kwargs: Any) -> Any:
            stream = detach(*args, **kwargs)
            self.end(Outcome.DETACHED)
            return stream

        return detach_and_end

    # The response, as the tee sees it.

    def response_began(self, status: int, headers: HTTPHeaders, *, finishing: bool) -> None:
        """The first flush: the status is on its way to the client."""
        exchange = self.exchange
        if exchange is None or not exchange.is_open or self._look_for_client():
            return  # over, or answered to nobody
        exchange.status = int(status)
        self._had_coding = "Content-Encoding" in headers
        if not finishing:
            # Should the process end in the middle of the stream. Cookies are added after the transforms: see below.
            exchange.response_headers = list(headers.get_all())

    def response_goes_on(self) -> None:
        """A later flush: the headers have been sent as they stand, later changes reach nobody."""
        self._look_for_client()
        if not self._noted_headers:
            self._note_headers()

    def response_ended(self) -> None:
        """The last flush; `finish` is still running."""
        self._ended_response = True
        if not self._awaits_log:
            try:
                asyncio.get_running_loop().call_soon(self._end_answered)
            except RuntimeError:  # finished outside the loop: the return of `_execute`, or the finalizer, will tell
                return

    def _look_for_client(self) -> bool:
        # A failed write tells the handler before the close callback runs, and `finish` then takes that callback off.
        if not self._client_left and self.handler is not None:
            self._client_left = client_is_gone(self.handler.request.connection)
        return self._client_left

    def response_piece(self, chunk: bytes) -> None:
        """Note a piece of the response body, if there is still somebody to get it."""
        if not self._client_left:
            super().response_piece(chunk)

    def _note_headers(self) -> None:
        exchange, handler = self.exchange, self.handler
        if exchange is not None and handler is not None and exchange.is_open:
            self._fill_headers(exchange, handler)

    def _fill_headers(self, exchange: Exchange, handler: RequestHandler) -> None:
        self._noted_headers = True
        headers = exchange.response_headers = sent_headers(handler)
        body = exchange.response_body
        if body is not None and not self._had_coding:
            # Our tee stands before Tornado's gzip transform.
            body.decoded = any(name.lower() == "content-encoding" for name, _ in headers)

    # The end.

    def logged(self) -> None:
        """The response is complete: an answer, an error page, a WebSocket's 101, or the rest of a failed stream."""
        exchange, handler = self.exchange, self.handler
        if exchange is None or handler is None:
            return
        if self._client_left:
            self.end(Outcome.ABORTED)
            return
        try:
            streamed = self._noted_headers
            if exchange.is_open and exchange.status is None:
                # The transforms were not asked: the handler wrote to the connection itself.
                exchange.status = handler.get_status()
            error = _failure(exchange.status, streamed=streamed)
        except Exception as exc:
            self.guard.caught("the end of a Tornado request", exc)
            error = None
        if error is not None:
            self.end(Outcome.FAILED, error)
        else:
            self.end(Outcome.UPGRADED if exchange.status == _SWITCHING_PROTOCOLS else Outcome.COMPLETE)

    def executed(self, error: BaseException | None) -> None:
        """The handler's task is done: whatever Tornado would still do by itself has been done."""
        handler = self.handler
        if handler is None:
            return
        if error is not None:
            self.end(Outcome.FAILED, error)
        elif self._ended_response:
            self._end_answered()
        elif is_finished(handler):
            self.end(Outcome.DETACHED)
        elif finishes_by_itself(handler):
            self.end(Outcome.ABORTED)  # the client left during an upload that the handler takes as a stream

    def _end_answered(self) -> None:
        self.end(Outcome.ABORTED if self._client_left else Outcome.COMPLETE)

    def close(self, exchange: Exchange, handler: RequestHandler) -> None:
        """Note the headers as they were sent, and take the hooks from the handler."""
        for name, function in self._hooks:
            if handler.__dict__.get(name) is function:
                delattr(handler, name)
        self._hooks = []
        if exchange.is_open and exchange.status is not None and not self._noted_headers:
            self._fill_headers(exchange, handler)


class ResponseTee(OutputTransform):
    """Sees each flushed part of a response, before compression.

    Args:
        call: Whose response it is.
    """

    def __init__(self, call: HandlerCall) -> None:  # Tornado gives transforms the request; this one is made by us
        self._call = call

    def transform_first_chunk(
        self, status_code: int, headers: HTTPHeaders, chunk: bytes, finishing: bool
    ) -> tuple[int, HTTPHeaders, bytes]:
        """Note status and first part, and pass them on as they are."""
        call = self._call
        try:
            call.add_decided_headers(headers)
            call.response_began(status_code, headers, finishing=finishing)
            call.response_piece(chunk)
            if finishing:
                call.response_ended()
        except Exception as exc:
            call.guard.caught("capture of a Tornado response", exc)
        return status_code, headers, chunk

    def transform_chunk(self, chunk: bytes, finishing: bool) -> bytes:
        """Note a later part, and pass it on as it is."""
        call = self._call
        try:
            call.response_goes_on()
            call.response_piece(chunk)
            if finishing:
                call.response_ended()
        except Exception as exc:
            call.guard.caught("capture of a Tornado response", exc)
        return chunk


def chained_close(previous: Callable[[], None], call: Call) -> Callable[[], None]:
    """Give a close callback that does what the connection would have done, then ends the call."""

    def on_close() -> None:
        try:
            previous()
        finally:
            call.aborted()

    return on_close


def _teed(receive: Callable[..., Any], body: CapturedBody, exchange: Exchange) -> Callable[..., Any]:
    """Give a `data_received` that notes each part and hands it to the handler's own."""

    def data_received(chunk: bytes) -> Any:
        try:
            if exchange.is_open:
                body.add(chunk)
        except Exception as exc:
            exchange.pipeline.guard.caught("capture of a Tornado upload", exc)
        return receive(chunk)

    return data_received


def _failure(status: int | None, *, streamed: bool) -> BaseException | None:
    """Give the exception that Tornado is answering for, if this is such an answer.

    `log_function` then runs inside Tornado's `except` clause. A handler that catches its own exception and finishes
    in its `except` clause with an answer of its own has not failed.
    """
    error = sys.exc_info()[1]
    if error is None or isinstance(error, (HTTPError, Finish)):
        return None
    return error if streamed or (status or 0) >= 500 else None
