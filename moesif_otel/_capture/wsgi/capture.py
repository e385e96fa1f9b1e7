"""The WSGI tap: one call from the server to the application and back, noted in an Exchange.

Owns: `WsgiTap`, which stands around an application (PEP 3333), and the record of one call.
Threads: those of the server; a stream may be iterated and closed in others, and dropped by a finalizer.
Never: changes what server or application see (but for one header, if told to), raises an error of its own, reads a
body, waits.
"""

from __future__ import annotations

import base64
from functools import partial
from io import IOBase
from typing import TYPE_CHECKING, Any, Final

import orjson
import wrapt
from opentelemetry import context as otel_context

from moesif_otel._capture.body import CapturedBody
from moesif_otel._capture.exchange import Exchange, Outcome, current_exchange
from moesif_otel._capture.wsgi.environ import header_source, may_have_body, url_source
from moesif_otel._capture.wsgi.input import InputTee
from moesif_otel._capture.wsgi.read_ahead import read_ahead
from moesif_otel._capture.wsgi.response import ResponseStream, SizedResponseStream

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Token

    from moesif_otel._capture.exchange import Decision, Pipeline
    from moesif_otel._capture.wsgi.span import ServerSpan, ServerSpans

__all__ = ["EXCHANGES_KEY", "TRANSACTION_ID_HEADER", "WsgiTap"]

EXCHANGES_KEY: Final = "moesif_otel.exchanges"
"""Where an environ carries the Exchanges of its call, against capturing one call twice."""

TRANSACTION_ID_HEADER: Final = "X-Moesif-Transaction-Id"
_TRANSACTION_ID_NAME: Final = TRANSACTION_ID_HEADER.lower()

_NO_BODY_STATUSES: Final = frozenset({204, 304})
_WHOLE: Final = (list.__iter__, tuple.__iter__)


class WsgiTap:
    """Captures the calls that go through it.

    Args:
        pipeline: Whose calls they are.
        transaction_id: Gives the id for `X-Moesif-Transaction-Id`, or None to add no such header.
        provisional: Stand back where a `MoesifMiddleware` of the same application id is inside.
        governs: Whether governance rules are asked here, and not further inside.
        offer_to_callbacks: Prepares the arguments of callbacks at the end of a call.

    Thread-safe.
    """

    __slots__ = ("_pipeline", "_provisional", "governs", "offer_to_callbacks", "transaction_id")

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        transaction_id: Callable[[Exchange], str] | None = None,
        provisional: bool = False,
        governs: bool = True,
        offer_to_callbacks: Callable[[Exchange], None] | None = None,
    ) -> None:
        self._pipeline = pipeline
        self.governs = governs
        self.offer_to_callbacks = offer_to_callbacks or _offer_to_callbacks
        self.transaction_id = transaction_id
        self._provisional = provisional

    def call(
        self,
        app: Any,
        environ: dict[str, Any],
        start_response: Any,
        *,
        callback_app: Any = None,
        spans: ServerSpans | None = None,
    ) -> Any:
        """Call the application as the server would, and note what passes.

        Args:
            app: The WSGI application.
            environ: The server's environ.
            start_response: The server's `start_response`.
            callback_app: What the users' callbacks get as `app`; the application by default.
            spans: Makes the SERVER span, or None where the framework's instrumentor does.

        Returns:
            What the application returned, or an iterable that passes the same pieces on.

        Raises:
            Whatever the application raises, unchanged.
        """
        try:
            call = self._open(environ, start_response, app if callback_app is None else callback_app, spans)
        except Exception as exc:
            self._pipeline.guard.caught("capture of a WSGI call", exc)
            call = None
        if call is None:
            return app(environ, start_response)
        return call.run(app, environ)

    def _open(
        self, environ: dict[str, Any], start_response: Any, callback_app: Any, spans: ServerSpans | None
    ) -> _Call | None:
        pipeline = self._pipeline
        present: tuple[Exchange, ...] = environ.get(EXCHANGES_KEY, ())
        if present and not self._take_over(present):
            return None
        exchange = Exchange(pipeline, "Incoming", environ.get("REQUEST_METHOD", "GET"))
        exchange.provisional = self._provisional
        exchange.url = url_source(environ)
        exchange.request_headers = header_source(environ)
        exchange.peer_address = environ.get("REMOTE_ADDR") or None
        exchange.has_remote_parent = "HTTP_TRACEPARENT" in environ
        exchange.callback_arguments = (callback_app, environ)
        settings = pipeline.settings
        if settings.log_body:
            exchange.response_body = CapturedBody(settings.response_max_body_size, pipeline.budget)
            if "wsgi.input" in environ and may_have_body(environ):
                body = exchange.request_body = CapturedBody(settings.request_max_body_size, pipeline.budget)
                environ["wsgi.input"] = InputTee(environ["wsgi.input"], body, pipeline.guard)
        environ[EXCHANGES_KEY] = (*present, exchange)
        return _Call(exchange, start_response, self, spans)

    def _take_over(self, present: tuple[Exchange, ...]) -> bool:
        key = self._pipeline.settings.pipeline_key
        for exchange in present:
            if exchange.pipeline.settings.pipeline_key != key:
                continue
            if not exchange.provisional or self._provisional:
                return False
            exchange.supersede()
        return True


class _Call:
    """One call: the contexts, the span and the Exchange around it."""

    __slots__ = (
        "_decision",
        "_exchange",
        "_guard",
        "_sent_bytes",
        "_server_start_response",
        "_server_write",
        "_span",
        "_spans",
        "_tap",
    )

    def __init__(
        self,
        exchange: Exchange,
        start_response: Any,
        tap: WsgiTap,
        spans: ServerSpans | None,
    ) -> None:
        self._exchange = exchange
        self._tap = tap
        self._guard = exchange.pipeline.guard
        self._server_start_response = start_response
        self._server_write: Any = None
        self._spans = spans
        self._span: ServerSpan | None = None
        self._sent_bytes = 0
        self._decision: Decision | None = None

    def run(self, app: Any, environ: dict[str, Any]) -> Any:
        """Call the application and take its result."""
        token = current_exchange.set(self._exchange)
        try:
            self._start(environ)
            self._decision = decision = self._govern(environ)
            attached = self._attach()
            try:
                if decision is not None and decision.blocked:
                    result = self._answer_instead(decision)
                else:
                    result = app(environ, self.start_response)
            except BaseException as exc:
                self.failed(exc)
                raise
            finally:
                if attached is not None:
                    otel_context.detach(attached)
        finally:
            current_exchange.reset(token)
        try:
            return self._take(result, environ.get("wsgi.file_wrapper"))
        except Exception as exc:
            self._guard.caught("capture of a WSGI response", exc)
            return result

    def _start(self, environ: dict[str, Any]) -> None:
        try:
            if self._spans is not None:
                self._span = self._spans.start(environ)
        except Exception as exc:
            self._guard.caught("a SERVER span", exc)
        self._exchange.pipeline.opened(self._exchange)

    def _govern(self, environ: dict[str, Any]) -> Decision | None:
        exchange = self._exchange
        if not self._tap.governs:
            return None
        exchange.governed = True
        pipeline = exchange.pipeline
        return pipeline.govern(exchange, partial(read_ahead, environ, pipeline.settings.request_max_body_size))

    def _answer_instead(self, decision: Decision) -> list[bytes]:
        """Answer a blocked request; the application is not called."""
        self.start_response(decision.status_line, decision.headers)
        return [] if self._exchange.method == "HEAD" or not decision.body else [decision.body]

    def _attach(self) -> Token[Any] | None:
        span = self._span
        if span is None or span.context is None or self._spans is None or not self._spans.shared:
            return None
        return otel_context.attach(span.context)

    # What the application calls.

    def start_response(self, status: str, headers: list[tuple[str, str]], *exc_info: Any, **named: Any) -> Any:
        """Pass status and headers on as they are, then note them."""
        decision = self._decision
        if decision is not None and not decision.blocked:
            headers = decision.added_to(headers)
        # PEP 3333 wants them positional, but `exc_info=` works with every server, so it works here.
        write = self._server_start_response(status, self._with_transaction_id(headers), *exc_info, **named)
        try:
            self._note_response(status, headers)
        except Exception as exc:
            self._guard.caught("capture of a status", exc)
        if write is None:
            return None
        self._server_write = write
        return self._write

    def _write(self, data: bytes) -> Any:
        result = self._server_write(data)
        self.piece(data)
        return result

    def _with_transaction_id(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        transaction_id = self._tap.transaction_id
        if transaction_id is None:
            return headers
        try:
            if type(headers) is not list:
                return headers
            for header in headers:
                if header[0].lower() == _TRANSACTION_ID_NAME:
                    return headers
            return [*headers, (TRANSACTION_ID_HEADER, transaction_id(self._exchange))]
        except Exception as exc:
            self._guard.caught("the transaction id header", exc)
        return headers

    def _note_response(self, status: str, headers: list[tuple[str, str]]) -> None:
        exchange = self._exchange
        exchange.status = int(status[:3])
        exchange.response_headers = list(headers)
        if self._span is not None:
            self._span.respond(status, headers)

    # What comes back.

    def _take(self, result: Any, file_wrapper: Any) -> Any:
        kind = type(result)
        # A subclass with a `close` of its own too: gevent's server goes over such a list twice, first for its length.
        if kind is list or kind is tuple or getattr(kind, "__iter__", None) in _WHOLE:
            for chunk in result:
                self.piece(chunk)
            self._finish(Outcome.COMPLETE)
            return result
        if kind is bytes or _is_file(result, file_wrapper):
            # The server sends it without us (sendfile); gunicorn and waitress know only the original object.
            body, length = self._exchange.response_body, self._content_length_bytes()
            if body is not None and length:
                body.count(length)
            self._finish(Outcome.COMPLETE)
            return result
        sized = hasattr(kind, "__len__")
        return SizedResponseStream(self, result) if sized else ResponseStream(self, result)

    def enter(self) -> Any:
        """Make the Exchange and the span current for one step of a stream."""
        return current_exchange.set(self._exchange), self._attach()

    def leave(self, token: Any) -> None:
        """Undo `enter`."""
        exchange_token, attached = token
        if attached is not None:
            otel_context.detach(attached)
        current_exchange.reset(exchange_token)

    def piece(self, chunk: Any) -> None:
        """Note one piece of the body."""
        body = self._exchange.response_body
        try:
            self._sent_bytes += len(chunk)
            if body is not None:
                body.add(chunk)
        except Exception as exc:
            self._guard.caught("capture of a response body", exc)

    def exhausted(self) -> None:
        """The application gave all: the call is complete, whether or not somebody closes it."""
        self._finish(Outcome.COMPLETE)

    def closed(self) -> None:
        """The server is done; before the end of the body that is the client leaving."""
        self._finish(Outcome.COMPLETE if self._is_whole() else Outcome.ABORTED)

    def failed(self, exc: BaseException) -> None:
        """The application raised."""
        if not self._sent_bytes:
            # Nothing has left yet (PEP 3333: headers go with the first piece), so the server answers 500 instead.
            self._exchange.status = None
            self._exchange.response_headers = []
        self._finish(Outcome.FAILED, exc)

    def dropped(self) -> None:
        """Nobody closed the stream; a finalizer tells. No callback, lock or span end here."""
        exchange, span = self._exchange, self._span
        if not exchange.is_open:
            return
        if span is not None:
            # Kept alive until our thread ends it: garbage collection of the middleware's generator would end the
            # span in a foreign context, which OpenTelemetry reports as an error.
            exchange.closing = span.end
        exchange.finish_from_finalizer()

    def _is_whole(self) -> bool:
        exchange = self._exchange
        if exchange.method == "HEAD" or exchange.status in _NO_BODY_STATUSES:
            return True
        length = self._content_length_bytes()
        return length is not None and self._sent_bytes >= length

    def _content_length_bytes(self) -> int | None:
        headers = self._exchange.response_headers
        length = next((value for name, value in headers if name.lower() == "content-length"), "")
        return int(length) if length.isdecimal() else None

    def _finish(self, outcome: Outcome, error: BaseException | None = None) -> None:
        exchange = self._exchange
        if not exchange.is_open:
            return
        span, self._span = self._span, None
        try:
            if span is not None:
                span.end(error)
            if self._spans is not None:
                self._spans.observe(exchange, made=span is not None)
        except Exception as exc:
            self._guard.caught("a SERVER span", exc)
        try:
            if not exchange.callbacks_done and exchange.pipeline.has_callbacks(exchange):
                self._tap.offer_to_callbacks(exchange)
        except Exception as exc:
            self._guard.caught("preparing callbacks", exc)
        exchange.finish(outcome, error)


def _offer_to_callbacks(exchange: Exchange) -> None:
    """Give the callbacks what the documentation of moesifwsgi promises them, in their arguments and in the environ."""
    environ = exchange.callback_arguments[1]
    headers = dict(exchange.response_headers)
    exchange.identify_arguments = (*exchange.callback_arguments, headers)
    environ["moesif.response_headers"] = headers
    response, request = exchange.response_body, exchange.request_body
    environ["moesif.response_body_chunks"] = [response.data()] if response is not None else []
    # Parsed only if a callback looks at it: parsing is no work for the request path.
    environ["moesif.request_body"] = None if request is None else _lazily(partial(_parsed, request.data()))


def _lazily(make: Callable[[], Any]) -> Any:
    proxy = getattr(wrapt, "LazyObjectProxy", None)  # wrapt 2
    return make() if proxy is None else proxy(make)


def _parsed(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except ValueError:
        return base64.b64encode(data).decode("ascii")


def _is_file(result: Any, file_wrapper: Any) -> bool:
    if file_wrapper is None:
        return False
    if isinstance(file_wrapper, type):
        return isinstance(result, file_wrapper)
    # uWSGI's wrapper is a function that notes the file and returns it as it is: a generator is none, a file object is
    # taken for one even if the application did not wrap it.
    return isinstance(result, IOBase) or (hasattr(result, "read") and not hasattr(type(result), "__next__"))
