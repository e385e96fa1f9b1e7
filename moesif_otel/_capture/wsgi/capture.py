"""Capture of WSGI calls (PEP 3333): `WsgiCapture` stands around an application and notes each call in an Exchange.

It changes nothing that server or application see, but for one header if told to, raises no error of its own, reads no
body on its own, and waits for nothing. A stream may be iterated and closed in any thread, and dropped by a finalizer.
"""

from __future__ import annotations

import base64
from functools import partial
from io import IOBase
from typing import TYPE_CHECKING, Any, Final

import orjson

from moesif_otel._capture import EXCHANGES_KEY
from moesif_otel._capture.body import BYTES, NO_BODY_STATUSES
from moesif_otel._capture.callbacks import decide
from moesif_otel._capture.exchange import Exchange, Outcome, chain, current_exchange, takes_over
from moesif_otel._capture.wsgi.environ import asks_for_upgrade, headers_of, may_have_body, url_of
from moesif_otel._capture.wsgi.input import read_ahead, tee_input

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moesif_otel._capture.exchange import CapturePipeline, Decision
    from moesif_otel._capture.wsgi.span import WsgiServerSpan, WsgiServerSpans

TRANSACTION_ID_HEADER: Final = "X-Moesif-Transaction-Id"
_TRANSACTION_ID_NAME: Final = TRANSACTION_ID_HEADER.lower()
_ID_HEADER_CHARACTERS: Final = len(TRANSACTION_ID_HEADER)

_enter: Final = current_exchange.set
_leave: Final = current_exchange.reset

_REQUEST_BODY: Final = "moesif.request_body"
_WHOLE: Final = (list.__iter__, tuple.__iter__)
# How servers are told that a handler has taken the connection over (Flask-Sock, Flask-SocketIO, gevent-websocket).
_TAKEN_OVER: Final = (StopIteration, ConnectionError)


class WsgiCapture:
    """Captures the calls that go through it.

    Args:
        pipeline: Whose calls they are.
        transaction_id: Returns the id for `X-Moesif-Transaction-Id`, or None to add no such header.
        provisional: Stand back where a `MoesifMiddleware` of the same application id is inside.
        governs: Whether governance rules are asked here, and not further inside.
        offer_to_callbacks: Prepares the arguments of callbacks at the end of a call, in another way than WSGI's.

    Thread-safe.
    """

    __slots__ = ("_pipeline", "_provisional", "governs", "offer_to_callbacks", "transaction_id")

    def __init__(
        self,
        pipeline: CapturePipeline,
        *,
        transaction_id: Callable[[Exchange], str] | None = None,
        provisional: bool = False,
        governs: bool = True,
        offer_to_callbacks: Callable[[Exchange], None] | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._provisional = provisional
        self.governs = governs
        self.offer_to_callbacks = offer_to_callbacks
        self.transaction_id = transaction_id

    def call(
        self,
        app: Any,
        environ: dict[str, Any],
        start_response: Any,
        *,
        callback_app: Any = None,
        spans: WsgiServerSpans | None = None,
    ) -> Any:
        """Call the application as the server would, and note what passes.

        Args:
            app: The WSGI application.
            environ: The server's environ.
            start_response: The server's `start_response`.
            callback_app: What the users' callbacks get as `app`; the application by default.
            spans: Makes the SERVER span, or None where nobody would see one or somebody else makes it.

        Returns:
            What the application returned, or an iterable that passes the same pieces on.

        Raises:
            Whatever the application raises, unchanged.
        """
        try:
            call = self._open(environ, start_response, app if callback_app is None else callback_app)
        except Exception as exc:
            self._pipeline.guard.caught("capture of a WSGI call", exc)
            call = None
        if call is None:
            return app(environ, start_response)
        return call.run(app, environ, spans)

    def _open(self, environ: dict[str, Any], start_response: Any, callback_app: Any) -> _WsgiCall | None:
        pipeline = self._pipeline
        present: tuple[Exchange, ...] = environ.get(EXCHANGES_KEY, ())
        if not present and current_exchange.get() is not None:
            present = _bridged(environ)
        if present and not takes_over(present, pipeline, provisional=self._provisional):
            return None
        method = environ.get("REQUEST_METHOD", "GET")
        exchange = Exchange(pipeline, "Incoming", method)
        exchange.url = url_of(environ)
        exchange.request_headers = headers_of(environ)
        exchange.peer_address = environ.get("REMOTE_ADDR") or None
        exchange.has_remote_parent = "HTTP_TRACEPARENT" in environ
        exchange.provisional = self._provisional
        if present:
            exchange.same_request = exchange.outer in present
        exchange.callback_arguments = (callback_app, environ)
        if pipeline.settings.log_body:
            if method != "HEAD":  # no client sees a body that is sent all the same
                exchange.capture_response_body()
            if may_have_body(environ, method) and "wsgi.input" in environ:
                body = exchange.capture_request_body()
                others = [one.request_body for one in present if one.is_open]
                environ["wsgi.input"] = tee_input(environ["wsgi.input"], body, pipeline.guard, others)
        environ[EXCHANGES_KEY] = (*present, exchange)
        return _WsgiCall(self, exchange, start_response, environ.get("PATH_INFO"), environ.get("SCRIPT_NAME"))


def _bridged(environ: dict[str, Any]) -> tuple[Exchange, ...]:
    """Return the open calls of an ASGI application around us that are this very call: adapters pass no mark on."""
    method, url = environ.get("REQUEST_METHOD"), url_of(environ)
    return tuple(
        one
        for one in chain(current_exchange.get())
        if one.direction == "Incoming" and one.is_open and one.method == method and one.url == url
    )


class _WsgiCall:
    """One call: what is around it, and what comes back."""

    __slots__ = (
        "_app_headers",
        "_capture",
        "_decision",
        "_exchange",
        "_header_count",
        "_path",
        "_sent_bytes",
        "_sent_headers",
        "_server_start_response",
        "_server_write",
        "_span",
        "_spans",
        "is_finished",
    )

    def __init__(self, capture: WsgiCapture, exchange: Exchange, start_response: Any, *path: Any) -> None:
        self._capture = capture
        self._exchange = exchange
        self._path = path
        self._server_start_response = start_response
        self._server_write: Any = None
        self._spans: WsgiServerSpans | None = None
        self._span: WsgiServerSpan | None = None
        self._sent_bytes = 0
        self._decision: Decision | None = None
        # The application's list of headers, ours if the server got another one, and how many had been there.
        self._app_headers: Any = ()
        self._sent_headers: list[tuple[str, str]] | None = None
        self._header_count = 0
        self.is_finished = False

    def run(self, app: Any, environ: dict[str, Any], spans: WsgiServerSpans | None) -> Any:
        """Call the application and take its result."""
        exchange = self._exchange
        pipeline = exchange.pipeline
        outer = exchange.outer
        try:
            # Set back by value: a signal handler that raises before a token is kept would leave this call current for
            # all that this thread serves.
            current_exchange.set(exchange)
            if spans is not None:
                self._start_span(spans, environ)
            pipeline.opened(exchange)
            decision = None
            if self._capture.governs:
                exchange.governed = True
                if pipeline.has_rules:
                    self._decision = decision = self._govern(environ)
            span = self._span
            try:
                if span is not None:
                    span.enter()
                if decision is not None and decision.blocked:
                    result = self._answer_instead(decision)
                else:
                    result = app(environ, self.start_response)
            except BaseException as exc:
                self.failed(exc, environ)
                raise
            finally:
                if span is not None:
                    span.leave()
        finally:
            current_exchange.set(outer)
        try:
            return self._take(result, environ)
        except Exception as exc:
            pipeline.guard.caught("capture of a WSGI response", exc)
            self._finish(Outcome.COMPLETE)
            return result

    def _start_span(self, spans: WsgiServerSpans, environ: dict[str, Any]) -> None:
        self._spans = spans
        try:
            self._span = span = spans.start(environ)
            if span is not None and self._exchange.span is None:
                self._exchange.pipeline.bind(self._exchange, span.span)
        except Exception as exc:
            self._exchange.pipeline.guard.caught("the SERVER span of a call", exc)

    def _govern(self, environ: dict[str, Any]) -> Decision | None:
        limit_bytes = self._exchange.pipeline.settings.request_max_body_size
        return decide(self._exchange, partial(read_ahead, environ, limit_bytes))

    def _answer_instead(self, decision: Decision) -> list[bytes]:
        """Answer a blocked request; the application is not called."""
        self.start_response(f"{decision.status} {decision.phrase}", decision.headers)
        return [] if self._exchange.method == "HEAD" or not decision.body else [decision.body]

    # What the application calls.

    def start_response(self, status: str, headers: list[tuple[str, str]], *exc_info: Any, **named: Any) -> Any:
        """Pass status and headers on as they are, then note them."""
        sent = self._headers_to_send(headers)
        # PEP 3333 wants them positional, but `exc_info=` works with every server, so it works here.
        write = self._server_start_response(status, sent, *exc_info, **named)
        exchange = self._exchange
        try:
            # An iterator can be read once: by the server.
            self._app_headers = headers if hasattr(headers, "__len__") else ()
            self._header_count = len(self._app_headers)
            self._sent_headers = None if sent is headers else sent
            exchange.status = int(status[:3])
            if self._span is not None:
                self._span.respond(status, self._app_headers)
            elif exchange.pipeline.sees_spans:
                exchange.pipeline.answering(exchange)
        except Exception as exc:
            exchange.pipeline.guard.caught("capture of a response status", exc)
        if write is None:
            return None
        self._server_write = write
        return self._write

    def _write(self, data: bytes) -> Any:
        self._catch_up_headers()
        result = self._server_write(data)
        self.piece(data)
        return result

    def _headers_to_send(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        decision = self._decision
        if decision is not None and not decision.blocked:
            headers = decision.added_to(headers)
        transaction_id = self._capture.transaction_id
        if transaction_id is None or type(headers) is not list:
            return headers
        try:
            for name, _ in headers:
                if len(name) == _ID_HEADER_CHARACTERS and name.lower() == _TRANSACTION_ID_NAME:
                    return headers
        except (TypeError, ValueError, AttributeError):  # no pairs of texts: the server's to refuse
            return headers
        try:
            return [*headers, (TRANSACTION_ID_HEADER, transaction_id(self._exchange))]
        except Exception as exc:
            self._exchange.pipeline.guard.caught("the transaction id header", exc)
        return headers

    def _catch_up_headers(self) -> None:
        """Add to what the server got what the application has added to its own list since (wsgiref sends it)."""
        sent, headers = self._sent_headers, self._app_headers
        if sent is not None and len(headers) > self._header_count:
            sent.extend(headers[self._header_count :])
            self._header_count = len(headers)

    # What comes back.

    def _take(self, result: Any, environ: dict[str, Any]) -> Any:
        kind = type(result)
        # A subclass with a `close` of its own too: gevent's server goes over such a list twice, first for its length.
        if kind is list or kind is tuple or getattr(kind, "__iter__", None) in _WHOLE:
            self._catch_up_headers()
            for chunk in result:
                self.piece(chunk)
            self._finish(Outcome.COMPLETE if self._is_answered(environ) else Outcome.UPGRADED)
            return result
        if kind is bytes or _is_file(result, environ.get("wsgi.file_wrapper")):
            # The server sends it without us (sendfile); gunicorn and waitress know only the original object.
            self._catch_up_headers()
            body, length = self._exchange.response_body, self._content_length_bytes()
            if body is not None and length:
                body.count(length)
            self._finish(Outcome.COMPLETE)
            return result
        # Asked of the class: an application's own `__getattr__` or property does not run for it.
        if getattr(kind, "streaming", None) is False and type(getattr(result, "content", None)) is bytes:
            # Django's answer: code that calls a framework's application directly gets the framework's own object.
            self._catch_up_headers()
            self.piece(result.content)
            self._finish(Outcome.COMPLETE)
            return result
        if not hasattr(kind, "__iter__") and not hasattr(kind, "__getitem__"):
            # No response: a mark by which the server knows that the connection was taken over.
            self._finish(Outcome.COMPLETE if self._is_answered(environ) else Outcome.UPGRADED)
            return result
        sized = hasattr(kind, "__len__")
        return SizedResponseStream(self, result) if sized else ResponseStream(self, result)

    def _is_answered(self, environ: dict[str, Any]) -> bool:
        """Tell whether the client has an HTTP answer; otherwise a WebSocket handler has talked to it directly."""
        exchange = self._exchange
        if exchange.status is not None or not asks_for_upgrade(environ):
            return True
        exchange.status = 101
        return False

    def enter(self) -> Any:
        """Make the Exchange and the span current for one step of a stream."""
        if self._span is not None:
            self._span.enter()
        return current_exchange.set(self._exchange)

    def leave(self, token: Any) -> None:
        """Undo `enter`."""
        current_exchange.reset(token)
        if self._span is not None:
            self._span.leave()

    def piece(self, chunk: Any) -> None:
        """Note one piece of the body; one that is no bytes is the server's to refuse."""
        if type(chunk) is not bytes and not isinstance(chunk, BYTES):
            return
        body = self._exchange.response_body
        try:
            self._sent_bytes += len(chunk)
            if body is not None:
                body.add(chunk)
        except Exception as exc:
            self._exchange.pipeline.guard.caught("capture of a response body", exc)

    def exhausted(self) -> None:
        """Note that the application gave all: the call is complete, whether or not somebody closes it."""
        if not self._sent_bytes:  # the server sends the headers now
            self._catch_up_headers()
        self._finish(Outcome.COMPLETE)

    def closed(self) -> None:
        """Note that the server is done; before the end of the body that is the client leaving."""
        if self.is_finished:
            return
        is_whole = self._exchange.pipeline.guard.run("capture of the end of a response", self._is_whole)
        self._finish(Outcome.COMPLETE if is_whole else Outcome.ABORTED)

    def failed(self, exc: BaseException, environ: dict[str, Any] | None = None) -> None:
        """Note that the application raised."""
        exchange = self._exchange
        if environ is not None and isinstance(exc, _TAKEN_OVER) and not self._is_answered(environ):
            self._finish(Outcome.UPGRADED)
            return
        if not self._sent_bytes:
            # Nothing has left yet (PEP 3333: headers go with the first piece), so the server answers 500 instead.
            exchange.status = None
            self._app_headers = ()
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
        exchange.pipeline.guard.run("capture of response headers", self._note_headers)
        exchange.finish_from_finalizer()

    def _is_whole(self) -> bool:
        exchange = self._exchange
        if exchange.method == "HEAD" or exchange.status in NO_BODY_STATUSES:
            return True
        length = self._content_length_bytes()
        return length is not None and self._sent_bytes >= length

    def _content_length_bytes(self) -> int | None:
        for name, value in self._app_headers:
            if isinstance(name, str) and name.lower() == "content-length":
                text = str(value)  # Werkzeug takes a number
                return int(text) if text.isdecimal() else None
        return None

    def _note_headers(self) -> None:
        headers = self._app_headers
        decision = self._decision
        if decision is not None and not decision.blocked and headers:
            headers = decision.added_to(headers)
        self._exchange.response_headers = noted = list(headers)
        for name, value in noted:
            if type(name) is not str or type(value) is not str:  # the server refuses it, or sends it as text
                self._exchange.response_headers = [(str(name), str(value)) for name, value in noted]
                return

    def _finish(self, outcome: Outcome, error: BaseException | None = None) -> None:
        self.is_finished = True
        exchange = self._exchange
        spans, self._spans = self._spans, None
        if spans is not None:
            # Also of a call that a shutdown has ended: its children have been told of the span.
            span = self._span
            try:
                if span is not None:
                    span.end(error)
                spans.observe(exchange, self._path[0], made=span is not None)
            except Exception as exc:
                exchange.pipeline.guard.caught("the SERVER span of a call", exc)
        if not exchange.is_open:
            return
        try:
            self._note_headers()
            if not exchange.callbacks_done and exchange.pipeline.has_callbacks(exchange):
                offer = self._capture.offer_to_callbacks
                if offer is None:
                    _offer_to_callbacks(exchange, *self._path)
                else:
                    offer(exchange)
        except Exception as exc:
            exchange.pipeline.guard.caught("preparing callbacks", exc)
        exchange.finish(outcome, error)


class ResponseStream:
    """Passes the pieces of an application's iterable on, one for one, with the call's contexts around each step.

    It never gathers the body, iterates ahead of the server, or closes what the server did not close.
    """

    __slots__ = ("__weakref__", "_call", "_has_begun", "_iterable", "_next")

    def __init__(self, call: _WsgiCall, iterable: Any) -> None:
        self._call = call
        self._iterable = iterable
        self._next: Any = None
        self._has_begun = False

    def __iter__(self) -> Any:
        if self._has_begun:
            # Once more: an iterator goes on where it is, anything else begins again, for the application alone.
            again = iter(self._iterable)
            return self if again is self._iterable else again
        if self._next is not None:
            return self  # `b"".join` asks twice before the first piece
        call = self._call
        token = call.enter()
        try:
            iterator: Iterator[Any] = iter(self._iterable)
            self._next = iterator.__next__
        except BaseException as exc:
            call.failed(exc)
            raise
        finally:
            call.leave(token)
        return self

    def __next__(self) -> Any:
        if self._next is None:
            iter(self)
        self._has_begun = True
        call = self._call
        # As `enter` and `leave` do: a call less each is felt in long streams.
        span = call._span
        if span is not None:
            span.enter()
        token = _enter(call._exchange)
        try:
            chunk = self._next()
        except StopIteration:
            call.exhausted()
            raise
        except BaseException as exc:
            call.failed(exc)
            raise
        finally:
            _leave(token)
            if span is not None:
                span.leave()
        body = call._exchange.response_body
        if call._sent_bytes and type(chunk) is bytes and body is not None and body.kept_bytes >= body.max_bytes:
            size_bytes = len(chunk)
            call._sent_bytes += size_bytes
            body.total_bytes += size_bytes
        else:
            if not call._sent_bytes:
                call._catch_up_headers()
            call.piece(chunk)
        return chunk

    def close(self) -> None:
        """Close the application's iterable, if it can be closed, as often as the server does; then end the call."""
        close = getattr(self._iterable, "close", None)
        if close is None:
            self._call.closed()
            return
        token = self._call.enter()
        try:
            close()
        except BaseException as exc:
            self._call.failed(exc)
            raise
        finally:
            self._call.leave(token)
        self._call.closed()

    def __getattr__(self, name: str) -> Any:
        # Attributes that an outer middleware looks for on the application's own object.
        return getattr(self._iterable, name)

    def __del__(self) -> None:
        if not self._call.is_finished:
            self._call.dropped()


class SizedResponseStream(ResponseStream):
    """For iterables that have a length: servers take `Content-Length` from a response of one piece (PEP 3333).

    Some find the length in a pass of its own and send in a second one (gevent).
    """

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._iterable)


def _offer_to_callbacks(exchange: Exchange, path_info: Any, script_name: Any) -> None:
    """Prepare for the callbacks what the documentation of moesifwsgi promises them, in a copy of the environ.

    Routers move parts of the path to `SCRIPT_NAME`: callbacks get both as the server gave them.
    """
    app, environ = exchange.callback_arguments
    headers = dict(exchange.response_headers)
    response, request = exchange.response_body, exchange.request_body
    environ = _CallbackEnviron(environ)
    environ["PATH_INFO"], environ["SCRIPT_NAME"] = path_info, script_name
    environ["moesif.response_headers"] = headers
    environ["moesif.response_body_chunks"] = [response.data()] if response is not None else []
    environ.request_data = None if request is None else request.data()
    exchange.callback_arguments = (app, environ)
    exchange.identify_arguments = (app, environ, headers)


class _CallbackEnviron(dict[str, Any]):
    """An environ with a `moesif.request_body` that is parsed when a callback asks for it: few do, and it takes long."""

    __slots__ = ("request_data",)

    request_data: bytes | None

    def __missing__(self, key: str) -> Any:
        if key != _REQUEST_BODY:
            raise KeyError(key)
        # The value itself, no proxy: callbacks serialize it, copy it, and return it as metadata.
        value = self[key] = None if self.request_data is None else _parsed(self.request_data)
        return value

    def __contains__(self, key: object) -> bool:
        return key == _REQUEST_BODY or super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key == _REQUEST_BODY else super().get(key, default)


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
