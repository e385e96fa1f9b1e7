"""Capture of ASGI calls: what stands around an application's `receive` and `send`.

A call runs in the server's own task and context. No message is held back, added, reordered or changed, but for headers
that a governance rule adds; nothing here waits but for the application, the server, and an asynchronous identity
callback that a rule asks for. What is noted of a message is noted once the other side has taken it.

A call is over at the first of: the last message of its response, the client's leaving, the application's return or
exception. Background tasks come after the first of these and are not waited for.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import context as otel_context

from moesif_otel._capture import EXCHANGES_KEY
from moesif_otel._capture.asgi.background import go_on
from moesif_otel._capture.asgi.callback_objects import CallbackObjects
from moesif_otel._capture.asgi.lifespan import deliver_at_shutdown, delivering_send
from moesif_otel._capture.asgi.scope import peer_address, repeatable, text_headers, url_of
from moesif_otel._capture.body import BYTES, NO_BODY_STATUSES
from moesif_otel._capture.callbacks import await_steps
from moesif_otel._capture.exchange import Exchange, Outcome, current_exchange, takes_over

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    from moesif_otel._capture.asgi.span import AsgiServerSpan, AsgiServerSpans
    from moesif_otel._capture.exchange import CapturePipeline, Decision, Headers
    from moesif_otel._guard import Guard

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[Any]]

_CALLS: Final = frozenset({"http", "websocket"})
_FILES: Final = frozenset({"http.response.pathsend", "http.response.zerocopysend"})
_STARTS: Final = frozenset({"http.response.start", "websocket.http.response.start", "websocket.accept"})


class AsgiCapture:
    """Captures the calls that go through it.

    Args:
        pipeline: Whose calls they are.
        provisional: Stand back where a middleware of the same application id is inside.
        objects: Makes the arguments of callbacks; made by the first call that has some, by default.

    Thread-safe; one serves every event loop of a process.
    """

    __slots__ = ("_objects", "_pipeline", "_provisional")

    def __init__(
        self, pipeline: CapturePipeline, *, provisional: bool = False, objects: CallbackObjects | None = None
    ) -> None:
        self._pipeline = pipeline
        self._provisional = provisional
        self._objects = objects
        deliver_at_shutdown(pipeline)

    def serve(
        self,
        app: Any,
        scope: MutableMapping[str, Any],
        receive: Receive,
        send: Send,
        *,
        spans: AsgiServerSpans | None = None,
        governs: bool = True,
    ) -> Awaitable[Any]:
        """Call the application as the server would, and note what passes of a call; deliver at the end of a lifespan.

        Args:
            app: The ASGI application.
            scope, receive, send: The server's.
            spans: Makes the SERVER span, or None where an instrumentation does.
            governs: Whether governance rules are asked here, and not further inside.

        Returns:
            What is to be awaited; what the application returns and raises passes unchanged.
        """
        kind = scope.get("type")
        if kind not in _CALLS:
            if kind == "lifespan":
                send = delivering_send(self._pipeline, send)
            return app(scope, receive, send)  # type: ignore[no-any-return]
        try:
            present = scope.get(EXCHANGES_KEY, ())
            if present and not takes_over(present, self._pipeline, provisional=self._provisional):
                return app(scope, receive, send)  # type: ignore[no-any-return]
            exchange = self._open(scope, is_http=kind == "http")
            if present:
                exchange.same_request = exchange.outer in present
            scope[EXCHANGES_KEY] = (*present, exchange)
            call = (HttpCall if kind == "http" else WebSocketCall)(exchange, receive, send)
            if self._pipeline.has_callbacks(exchange):
                call.offer_to_callbacks(self.callback_objects(), scope)
        except Exception as exc:
            self._pipeline.guard.caught("capture of an ASGI call", exc)
            return app(scope, receive, send)  # type: ignore[no-any-return]
        return call.run(app, scope, exchange, spans, self if governs else None)

    async def serve_inside(self, app: Any, exchange: Exchange, scope: Any, receive: Receive, send: Send) -> Any:
        """Call the application inside a layer of ours that captures: what is left to do here is to govern.

        An exception is noted on its way to the framework's error handling, which answers in the application's place.
        """
        try:
            if self._pipeline.has_rules and not exchange.governed:
                return await self.govern(app, exchange, scope, receive, send)
            return await app(scope, receive, send)
        except Exception as exc:
            if exchange.is_open:
                exchange.error_type = type(exc).__qualname__
            raise

    async def govern(self, app: Any, exchange: Exchange, scope: Any, receive: Receive, send: Send) -> Any:
        """Ask the governance rules about a call, then call the application, or answer in its place."""
        exchange.governed = True
        ahead = _BodyAhead(receive, self._pipeline.settings.request_max_body_size)
        decision = None
        try:
            decision = await self._decide(exchange, scope, ahead)
        except Exception as exc:
            self._pipeline.guard.caught("governance rules", exc)
        if ahead.messages:
            receive = ahead.receive
        if decision is None:
            return await app(scope, receive, send)
        if not decision.blocked:
            return await app(scope, receive, _DecidedSend(send, decision, self._pipeline.guard))
        return await answer_instead(decision, scope, receive, send)

    async def _decide(self, exchange: Exchange, scope: Any, ahead: _BodyAhead) -> Decision | None:
        pipeline = self._pipeline
        governed = pipeline.governed(exchange)
        if governed is None:
            return None
        if governed.needs_identity and pipeline.has_callbacks(exchange):
            request = self.callback_objects().request(scope, {}, exchange)
            exchange.callback_arguments = exchange.identify_arguments = (request, None)
            await await_steps(pipeline.identifying(exchange))
            # What the callbacks did not know yet they are asked again, with the response.
            exchange.identified = False
        if governed.needs_body:
            # A WebSocket's handshake has no body.
            data, whole = await ahead.read() if scope["type"] == "http" else (None, True)
            governed.give_body(data, whole=whole)
        return governed.verdict()

    def callback_objects(self) -> CallbackObjects:
        """Return what makes the arguments of callbacks; the first time it may import Starlette."""
        if self._objects is None:
            self._objects = CallbackObjects()
        return self._objects

    def _open(self, scope: MutableMapping[str, Any], *, is_http: bool) -> Exchange:
        exchange = Exchange(self._pipeline, "Incoming", (scope.get("method") if is_http else None) or "GET")
        if exchange.outer is not None and not exchange.outer.is_open:
            # uvicorn resumes a paused connection in the context of the request that it reads: later ones inherit that.
            exchange.outer = None
        exchange.provisional = self._provisional
        headers = repeatable(scope.get("headers"))
        exchange.url = url_of(scope, headers)
        exchange.request_headers = text_headers(headers)
        exchange.peer_address = peer_address(scope)
        exchange.has_remote_parent = b"traceparent" in [name for name, _ in headers]
        return exchange


class HttpCall:
    """One HTTP call: what passes between server and application."""

    __slots__ = (
        "__weakref__",
        "_exchange",
        "_guard",
        "_has_trailers",
        "_keeps_request_body",
        "_keeps_response_body",
        "_offer",
        "_path",
        "_receive",
        "_rest",
        "_send",
        "_span",
        "_spans",
    )

    def __init__(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        pipeline = exchange.pipeline
        self._exchange: Exchange | None = exchange
        self._guard = pipeline.guard
        self._keeps_request_body = self._keeps_response_body = pipeline.settings.log_body
        self._receive = receive
        self._send = send
        self._has_trailers = False
        self._spans: AsgiServerSpans | None = None  # makes the SERVER span, where no instrumentation does
        self._span: AsgiServerSpan | None = None
        self._offer: tuple[CallbackObjects, Any, dict[str, Any]] | None = None  # what callbacks will be given
        self._rest: Callable[[], Awaitable[Any]] | None = None  # waits for callbacks that are awaited

    def _start_span(self, spans: AsgiServerSpans, scope: Any) -> Any:
        """Start the SERVER span, where it is ours to make, and make it current."""
        self._spans = spans
        self._path: Any = scope.get("path")
        try:
            span = self._span = spans.start(scope)
            return None if span is None or span.context is None else otel_context.attach(span.context)
        except Exception as exc:
            self._guard.caught("a SERVER span", exc)
            return None

    def offer_to_callbacks(self, objects: CallbackObjects, scope: Any) -> None:
        """Remember what callbacks will be given."""
        self._offer = objects, scope, objects.as_it_came(scope)

    async def run(
        self, app: Any, scope: Any, exchange: Exchange, spans: AsgiServerSpans | None, governor: AsgiCapture | None
    ) -> Any:
        """Call the application in this task and context; what it returns and raises passes unchanged.

        `governor` asks the governance rules; None where that is done further inside.
        """
        token = current_exchange.set(exchange)
        attached = None
        try:
            if spans is not None:
                attached = self._start_span(spans, scope)
            exchange.pipeline.opened(exchange)
            if governor is not None and exchange.pipeline.has_rules:
                result = await governor.govern(app, exchange, scope, self.receive, self.send)
            else:
                result = await app(scope, self.receive, self.send)
            if self._exchange is not None:
                # Without the last message of a response: the server answers 500, or cuts it.
                self.end(Outcome.FAILED)
            if self._rest is not None:
                await self._rest()
            return result
        except (Exception, SystemExit, KeyboardInterrupt) as exc:
            self.end(Outcome.FAILED, exc)
            raise
        except GeneratorExit:
            # The task was destroyed, perhaps by garbage collection: no lock, no callback here.
            self.dropped()
            raise
        except BaseException:  # cancelled
            self.end(Outcome.ABORTED)
            raise
        finally:
            try:
                current_exchange.reset(token)
                if attached is not None:
                    otel_context.detach(attached)
            except ValueError:
                pass  # closed in another context than it ran in

    # What the application calls.

    async def receive(self) -> Message:
        """Receive a message from the server, and note it."""
        message = await self._receive()
        if self._exchange is not None:
            try:
                self._received(message, self._exchange)
            except Exception as exc:
                self._guard.caught("capture of a request body", exc)
        return message

    async def send(self, message: Message) -> Any:
        """Send a message to the server, and note it once that has taken it."""
        try:
            result = await self._send(message)
        except OSError:
            # What servers raise once the client is gone (ASGI specification 2.4, "Disconnected client").
            self.end(Outcome.ABORTED)
            raise
        if self._exchange is not None:
            try:
                self._sent(message, self._exchange)
            except Exception as exc:
                self._guard.caught("capture of a response", exc)
        return result

    def _received(self, message: Message, exchange: Exchange) -> None:
        kind = message["type"]
        if kind == "http.request":
            data = message.get("body")
            if data and self._keeps_request_body and (exchange.request_body is not None or exchange.is_open):
                (exchange.request_body or exchange.capture_request_body()).add(data)
        elif kind == "http.disconnect":
            self.end(Outcome.ABORTED)

    def _sent(self, message: Message, exchange: Exchange) -> None:
        kind = message["type"]
        if kind == "http.response.body":
            self._sent_body(message.get("body"), exchange)
            if not message.get("more_body") and not self._has_trailers:
                self.end(Outcome.COMPLETE)
        elif kind == "http.response.start":
            self._sent_start(message, exchange)
        elif kind == "http.response.trailers":
            if not message.get("more_trailers"):
                self.end(Outcome.COMPLETE)
        elif kind in _FILES and not message.get("more_body") and not self._has_trailers:
            self.end(Outcome.COMPLETE)

    def _sent_start(self, message: Message, exchange: Exchange) -> None:
        status = exchange.status = int(message["status"])
        self._has_trailers = bool(message.get("trailers"))
        if status in NO_BODY_STATUSES or exchange.method == "HEAD":
            self._keeps_response_body = False  # no client sees a body that is sent all the same
        headers = repeatable(message.get("headers"))
        exchange.response_headers = text_headers(headers)
        if self._offer is not None:
            self._offer[2]["response_headers"] = headers
        if self._span is not None:
            self._span.send(message)

    def _sent_body(self, data: Any, exchange: Exchange) -> None:
        # One that a shutdown has ended has been sent.
        if data and self._keeps_response_body and (exchange.response_body is not None or exchange.is_open):
            if not isinstance(data, BYTES):
                return  # only the server can say whether it takes that, and as what
            (exchange.response_body or exchange.capture_response_body()).add(data)

    # How it ends. A background task may keep the call for hours, so nothing of the request stays.

    def dropped(self) -> None:
        """Nobody will go on with the call; may run in a finalizer."""
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        if self._span is not None:
            exchange.closing = self._span.end
        self._span = self._spans = self._offer = None
        exchange.finish_from_finalizer(Outcome.ABORTED)

    def end(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """End the call; the first end counts. Never raises."""
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        if self._spans is not None:
            self._end_span(self._spans, exchange, error)
        offer, self._offer = self._offer, None
        if offer is None or exchange.callbacks_done:
            exchange.finish(outcome, error)
            return
        objects, scope, came = offer
        try:
            headers = came.pop("response_headers", ())
            exchange.callback_arguments = exchange.identify_arguments = (
                objects.request(scope, came, exchange),
                objects.response(headers, exchange),
            )
        except Exception as exc:
            self._guard.caught("preparing callbacks", exc)
        if exchange.close(outcome, error):
            try:
                self._rest = go_on(exchange.pipeline.finishing(exchange))
            except Exception as exc:
                self._guard.caught("the end of an ASGI call", exc)

    def _end_span(self, spans: AsgiServerSpans, exchange: Exchange, error: BaseException | None) -> None:
        span, self._span, self._spans = self._span, None, None
        try:
            if span is not None:
                span.end(error)
            spans.observe(exchange, self._path, made=span is not None)
        except Exception as exc:
            self._guard.caught("a SERVER span", exc)


class WebSocketCall(HttpCall):
    """A WebSocket handshake: one call, which is over when it is accepted or denied. Messages are not looked at."""

    __slots__ = ()

    def _received(self, message: Message, exchange: Exchange) -> None:
        del exchange
        if message["type"] == "websocket.disconnect":
            self.end(Outcome.ABORTED)

    def _sent(self, message: Message, exchange: Exchange) -> None:
        kind = message["type"]
        if kind == "websocket.accept":
            exchange.status = 101
            try:
                exchange.response_headers = text_headers(repeatable(message.get("headers")))
            finally:  # some servers take anything there, and send nothing of it
                self.end(Outcome.UPGRADED)
        elif kind == "websocket.close":
            exchange.status = 403  # what servers answer to a close before the handshake
            self.end(Outcome.COMPLETE)
        elif kind == "websocket.http.response.start":
            self._sent_start(message, exchange)
        elif kind == "websocket.http.response.body":
            self._sent_body(message.get("body"), exchange)
            if not message.get("more_body"):
                self.end(Outcome.COMPLETE)


class _DecidedSend:
    """A `send` that puts a governance rule's headers behind the application's own."""

    __slots__ = ("_decision", "_guard", "_send")

    def __init__(self, send: Send, decision: Decision, guard: Guard) -> None:
        self._send = send
        self._decision: Decision | None = decision
        self._guard = guard

    async def __call__(self, message: Message) -> Any:
        decision = self._decision
        if decision is not None:
            try:
                if message["type"] in _STARTS:
                    self._decision = None
                    message = _with_headers(message, decision)
            except Exception as exc:
                self._guard.caught("headers of a governance rule", exc)
        return await self._send(message)


def _with_headers(message: Message, decision: Decision) -> Message:
    own = text_headers(repeatable(message.get("headers")))
    added = _encoded(decision.added_to(own)[len(own) :])
    return {**message, "headers": [*(message.get("headers") or ()), *added]}


def _encoded(headers: Headers) -> list[tuple[bytes, bytes]]:
    # Lower-case names: the specification wants them, and HTTP/2 takes no others.
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]


async def answer_instead(decision: Decision, scope: Any, receive: Receive, send: Send) -> None:
    """Answer a blocked call; the application is not called."""
    kind = "http.response"
    if scope["type"] == "websocket":
        if (await receive())["type"] != "websocket.connect":
            return  # the client has left
        if "websocket.http.response" not in (scope.get("extensions") or ()):
            await send({"type": "websocket.close"})
            return
        kind = "websocket.http.response"
    await send({"type": f"{kind}.start", "status": decision.status, "headers": _encoded(decision.headers)})
    body = b"" if scope.get("method") == "HEAD" else decision.body or b""
    await send({"type": f"{kind}.body", "body": body})


class _BodyAhead:
    """The request body for a rule that looks into it: received before the application asks, then given to it.

    A body longer than `max_bytes` is received no further.
    """

    __slots__ = ("_max_bytes", "_receive", "messages")

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self.messages: deque[Message | Exception] = deque()

    async def read(self) -> tuple[bytes | None, bool]:
        """Receive the body, and say whether it is whole.

        It is not when it is too long, or the client left, or a middleware around us refuses to receive more.
        """
        parts: list[bytes] = []
        size_bytes = 0
        while True:
            try:
                message = await self._receive()
            except Exception as exc:
                self.messages.append(exc)
                return None, False
            self.messages.append(message)
            if message["type"] != "http.request":
                return None, False
            part = message.get("body") or b""
            parts.append(part)
            size_bytes += len(part)
            if size_bytes > self._max_bytes:
                return None, False
            if not message.get("more_body"):
                return b"".join(parts), True

    async def receive(self) -> Message:
        """Receive for the application: first what was read ahead, and the error that ended that."""
        if not self.messages:
            return await self._receive()
        message = self.messages.popleft()
        if isinstance(message, Exception):
            raise message
        return message
