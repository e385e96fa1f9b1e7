"""One call made with `requests`, from `send` to the end of the response's body.

Owns: filling the Exchanges of a call (one for each pipeline that captures it) and ending them.
Threads: the one that calls and the one that reads the body; a finalizer when the response is dropped.
Never: raises into the call, reads a body, keeps a response alive.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace
from requests import PreparedRequest, Response

from moesif_otel._capture.body import CapturedBody, LeftOut
from moesif_otel._capture.exchange import Exchange, Outcome, chain, current_exchange
from moesif_otel._capture.requests import facts
from moesif_otel._capture.requests.download import Download, is_teeable
from moesif_otel._capture.requests.upload import UploadSink, original_of, stand_in_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextvars import Token

    from typing_extensions import Self

    from moesif_otel._capture.exchange import Headers, Pipeline
    from moesif_otel._capture.requests.span import ClientSpans

__all__ = ["OutgoingCall", "is_part_of_a_call"]

_innermost: ContextVar[OutgoingCall | None] = ContextVar("moesif_otel_outgoing_call", default=None)


def is_part_of_a_call(session: Any, request: Any, allow_redirects: Any) -> bool:
    """Whether a `send` belongs to a call that is being captured: a redirect's hop, or a second layer of our tap.

    A hook or an adapter may make calls of its own meanwhile: those are calls like any other. Calls that a callback
    of the user's makes while we run it are not captured: it would be called for them too, and so on for ever.
    """
    call = _innermost.get()
    if call is None:
        return False
    if call.runs_callbacks:
        return True
    # `Session.resolve_redirects` sends each hop through the same session, as a new request, and follows itself.
    return call.is_being_sent and (request is call.request or (session is call.session and allow_redirects is False))


class OutgoingCall:
    """One call, as all pipelines that capture it see it.

    Args:
        pipelines: Whose events it becomes; at least one.
        session: The `Session` that sends.
        request: The `PreparedRequest` as given to `send`.
        spans: What makes spans of the call, on one provider each.
    """

    __slots__ = (
        "_around",
        "_spans",
        "_started",
        "_tokens",
        "exchanges",
        "is_being_sent",
        "request",
        "runs_callbacks",
        "session",
    )

    def __init__(
        self,
        pipelines: Sequence[Pipeline],
        session: Any,
        request: PreparedRequest,
        spans: Sequence[ClientSpans] = (),
    ) -> None:
        self.session: Any = session
        self.request: Any = request
        self.is_being_sent = False
        self.runs_callbacks = False
        self.exchanges: list[Exchange] = []
        self._around = current_exchange.get()
        self._spans = spans
        self._started: list[tuple[ClientSpans, Any]] = []
        self._tokens: list[tuple[ContextVar[Any], Token[Any], Any]] = []
        method, url = facts.text_of(request.method), facts.sent_url(request)
        for pipeline in pipelines:
            exchange = Exchange(pipeline, "Outgoing", method)
            # What is sent stands fast when `send` returns; until then only a capture that stops midway looks.
            exchange.url, exchange.request_headers = url, partial(facts.request_headers, request)
            exchange.callback_arguments = (request, None)
            settings = pipeline.settings
            if settings.log_body_outgoing:
                exchange.request_body = CapturedBody(settings.request_max_body_size, pipeline.budget)
                exchange.response_body = CapturedBody(settings.response_max_body_size, pipeline.budget)
            self.exchanges.append(exchange)

    # -- while `requests` sends

    def enter(self) -> None:
        """Make the call current, and see its upload as it passes. Never raises."""
        try:
            self.is_being_sent = True
            self._set(_innermost, self)
            innermost = self._around
            for exchange in self.exchanges:
                # Spans that start now are offered to the whole chain, so all of them must be in it.
                exchange.outer, innermost = innermost, exchange
            self._set(current_exchange, innermost)
            for exchange in self.exchanges:
                _join_trace_of(exchange, self._around)
                exchange.pipeline.opened(exchange)
            self._start_spans()
            self._tee_upload()
        except Exception as exc:
            self._caught("outgoing call", exc)

    def _leave(self, *ends: Any) -> None:
        """Undo `enter`; `ends` are what may lead to requests that carry the stand-in of the body."""
        self.is_being_sent = False
        self.session = None
        while self._tokens:
            variable, token, before = self._tokens.pop()
            try:
                variable.reset(token)
            except ValueError:  # the call came back in another context than it went out from
                variable.set(before)
        for exchange in self.exchanges:
            exchange.outer = _nearest(exchange.pipeline, self._around)
        self._around = None
        try:
            for request in (self.request, *(one for end in ends for one in _requests_of(end))):
                original = original_of(request.body)
                if original is not request.body:
                    request.body = original
        except Exception as exc:
            self._caught("outgoing request body", exc)

    def _set(self, variable: ContextVar[Any], value: Any) -> None:
        before = variable.get()
        self._tokens.append((variable, variable.set(value), before))

    def _start_spans(self) -> None:
        if not self._spans or any(exchange.span is not None for exchange in self.exchanges):
            return  # the call has a span, somebody's
        for spans in {id(spans.provider): spans for spans in self._spans}.values():
            span = spans.start(self.exchanges[0])
            if span is not None:
                self._started.append((spans, span))

    def _end_spans(self, error: BaseException | None = None) -> None:
        while self._started:
            spans, span = self._started.pop()
            try:
                spans.end(span, self.exchanges[0].status, error)
            except Exception as exc:
                self._caught("the span of an outgoing call", exc)

    def _tee_upload(self) -> None:
        body = self.request.body
        wanted = [exchange for exchange in self.exchanges if exchange.request_body is not None]
        if wanted and not _is_plain(body):
            stand_in = stand_in_for(body, UploadSink(wanted, facts.body_position(self.request)))
            if stand_in is not None:
                self.request.body = stand_in

    # -- when `requests` came back

    def failed(self, error: BaseException) -> None:
        """The call raised: no response. Never raises."""
        try:
            answer = getattr(error, "response", None)  # of too many redirects
            self._leave(error, answer)
            last = getattr(error, "request", None)
            if isinstance(last, PreparedRequest):
                self.request = last
            self._note_request()
            cause = facts.cause_of(error)
            if cause != type(error).__qualname__:
                for exchange in self.exchanges:
                    exchange.notes["error_cause"] = cause
        except Exception as exc:
            self._caught("outgoing call that failed", exc)
        self._end_spans(error)
        self._finish(None, Outcome.FAILED, error)

    def answered(self, response: Any) -> None:
        """The call gave a response, whose body may still be to come. Never raises."""
        self._leave(response)
        try:
            if not isinstance(response, Response):
                raise TypeError  # noqa: TRY301 - counted below: an adapter or a patch of its own making
            if isinstance(response.request, PreparedRequest):
                self.request = response.request
            self._note_request()
            self._note_response(response)
            self._end_spans()
            if self._is_streaming(response):
                return
        except Exception as exc:
            self._caught("outgoing response", exc)
            self._end_spans()
        self._finish(response, Outcome.COMPLETE, None)

    def _note_request(self) -> None:
        request, body = self.request, self.request.body
        method, url, headers = facts.text_of(request.method), facts.sent_url(request), facts.request_headers(request)
        for exchange in self.exchanges:
            exchange.method, exchange.url, exchange.request_headers = method, url, headers
            if exchange.request_body is not None and (body is None or _is_plain(body)):
                exchange.request_body.restart()  # what a file gave on an earlier hop is not this request's body
                _add_plain(exchange.request_body, body)

    def _note_response(self, response: Response) -> None:
        for exchange in self.exchanges:
            exchange.status = response.status_code
        headers = facts.response_headers(response)
        redirects = sum(1 for earlier in response.history if earlier.is_redirect)
        for exchange in self.exchanges:
            exchange.response_headers = headers
            if redirects:
                exchange.notes["redirects"] = redirects

    def _is_streaming(self, response: Response) -> bool:
        raw = response.raw
        bodies = [exchange.response_body for exchange in self.exchanges if exchange.response_body is not None]
        content = facts.content_of(response)
        if content is not None:
            decoded = facts.is_decoded(raw)
            for body in bodies:
                body.decoded = decoded
                body.add(content)
            return False
        teeable = is_teeable(raw)
        seen_bytes = facts.bytes_read(raw) if teeable else 0
        if not teeable or seen_bytes:
            # It is no response of urllib3's, or a hook has read from it: the body, or its beginning, cannot be seen.
            for body in bodies:
                body.left_out = LeftOut.UNREADABLE
                body.count(seen_bytes)
        if not teeable or facts.nothing_left(raw):
            return False
        arguments = _LazyArguments(self.exchanges[0], response)
        late = _LateEnd(self, arguments)
        for exchange in self.exchanges:
            exchange.callback_arguments = arguments
        Download(self.exchanges, late.finish).watch(raw, partial(_dropped, tuple(self.exchanges)))
        return True

    # -- the end

    def _finish(self, response: Any, outcome: Outcome, error: BaseException | None) -> None:
        before = _innermost.get()
        self.runs_callbacks = True
        _innermost.set(self)
        try:
            for exchange in self.exchanges:
                if exchange.is_open:  # else the capture has ended before the body
                    exchange.callback_arguments = (self.request, response)
                    exchange.finish(outcome, error)
        finally:
            _innermost.set(before)
            self.runs_callbacks = False

    def _caught(self, kind: str, exc: BaseException) -> None:
        for exchange in self.exchanges[:1]:
            exchange.pipeline.guard.caught(kind, exc)


class _LateEnd:
    """The end of a call whose body came later; it lives as long as urllib3's response, and does not hold it."""

    __slots__ = ("_arguments", "_call")

    def __init__(self, call: OutgoingCall, arguments: _LazyArguments) -> None:
        self._call = call
        self._arguments = arguments

    def finish(self, outcome: Outcome, error: BaseException | None, in_finalizer: bool) -> None:
        """End the call; see `requests_download.Finish`."""
        if in_finalizer:
            _dropped(self._call.exchanges, outcome)
        else:
            _request, response = self._arguments
            self._call._finish(response, outcome, error)


def _dropped(exchanges: Sequence[Exchange], outcome: Outcome = Outcome.DROPPED) -> None:
    """End a call whose response was garbage; runs in a finalizer."""
    for exchange in exchanges:
        exchange.finish_from_finalizer(outcome)


class _LazyArguments(tuple):  # type: ignore[type-arg] # noqa: SLOT001 - a tuple's subclass cannot have slots with values
    """What callbacks take while a body is being read: request and response, without keeping either alive.

    When the response is gone they get copies without a body, made at that moment on our own thread.
    """

    _response: weakref.ref[Response]
    _seen: tuple[str, str, Headers]
    _answer: tuple[int, str, Headers]

    def __new__(cls, exchange: Exchange, response: Response) -> Self:
        self = super().__new__(cls, (None, None))
        self._response = weakref.ref(response)
        self._seen = (exchange.method, exchange.url, exchange.request_headers)
        self._answer = (response.status_code, response.url, exchange.response_headers)
        return self

    def __iter__(self) -> Iterator[Any]:
        response = self._response()
        if response is None:
            request = facts.request_without_objects(*self._seen)
            response = facts.response_without_body(request, *self._answer)
        return iter((response.request, response))


def _nearest(pipeline: Pipeline, around: Exchange | None) -> Exchange | None:
    """Give the enclosing Exchange of the same pipeline, else the innermost of any: the parent of a call."""
    return next((one for one in chain(around) if one.pipeline is pipeline), around)


def _join_trace_of(exchange: Exchange, around: Exchange | None) -> None:
    """Let a call belong to the trace of the call it is made in, when a span of another trace is current."""
    outer = _nearest(exchange.pipeline, around)
    if outer is not None and outer.span_id and trace.get_current_span().get_span_context().trace_id != outer.trace_id:
        exchange.trace_id, exchange.parent_span_id = outer.trace_id, outer.span_id


def _requests_of(end: Any) -> Iterator[Any]:
    """Give the requests that a response or an exception leads to: a redirect copies the body from one to the next."""
    for one in (end, *(end.history if isinstance(end, Response) else ())):
        request = getattr(one, "request", None)
        if isinstance(request, PreparedRequest):
            yield request


_PLAIN: Final = (bytes, str, bytearray, memoryview)


def _is_plain(body: Any) -> bool:
    """Whether a body is all there, in memory, as it will be sent (urllib3 looks for `read` before the buffer)."""
    if body is None or isinstance(body, _PLAIN):
        return True
    if hasattr(body, "read"):
        return False
    try:
        memoryview(body).release()
    except TypeError:
        return False
    return True


def _add_plain(captured: CapturedBody, body: Any) -> None:
    if body is None:
        return
    if isinstance(body, str):
        # The true size of a long text needs no copy of it while it is ASCII, as forms are.
        head = body if len(body) <= captured.max_bytes or not body.isascii() else body[: captured.max_bytes]
        data = head.encode(facts.TEXT_ENCODING, "replace")
        captured.add(data)
        captured.count(len(body) - len(head))
    elif isinstance(body, (bytes, bytearray)):
        captured.add(body)
    else:
        captured.add(memoryview(body).cast("B"))
