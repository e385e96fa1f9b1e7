"""Shared by the captures of all HTTP clients: which pipelines get a call, and its way from the sending to its end.

A client's own module knows when a call begins, how its body passes and when that is over; it fills the Exchanges here.
Calls that exporters make (with OpenTelemetry's instrumentation suppressed), that go to Moesif, or that a callback
makes are not captured: the last would go on for ever.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar
from urllib.parse import urlsplit, urlunsplit

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.instrumentation.utils import is_instrumentation_enabled

from moesif_otel._capture.client_spans import ClientSpans
from moesif_otel._capture.exchange import Exchange, Outcome, chain, current_exchange
from moesif_otel._capture.patching import when_imported
from moesif_otel._guard import ForkSafeLock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextvars import Token

    from opentelemetry.trace import TracerProvider

    from moesif_otel._capture.body import CapturedBody
    from moesif_otel._capture.exchange import CapturePipeline, Headers
    from moesif_otel._capture.patching import PatchSet


_T = TypeVar("_T")
_Call = TypeVar("_Call", bound="OutgoingCall")

CLIENTS: Final = {
    "requests": ("requests", "moesif_otel._capture.requests.capture"),
    "httpx": ("httpx", "moesif_otel._capture.httpx"),
    "aiohttp": ("aiohttp.client", "moesif_otel._capture.aiohttp"),
    "urllib3": ("urllib3", "moesif_otel._capture.urllib3"),
}
"""The clients whose calls can be captured, by the names that users say: when the first module is imported, the second
one, which has `PATCHES`, is imported and put on."""

DEFAULT_CLIENTS: Final = ("requests", "httpx", "aiohttp")
"""Not urllib3, which others are built on: cloud SDKs and exporters talk through it."""


class Route:
    """One registration of a pipeline.

    Args:
        pipeline: Gets the calls.
        clients: Whose calls.
        everywhere: False for a middleware's: it gets no calls that are made while an application of another pipeline is
            served.
        tracer_provider: The user's, on which spans of the calls are made where nobody else does; by default none are,
            and those of the global provider are seen.
    """

    __slots__ = ("__weakref__", "clients", "everywhere", "pipeline", "spans")

    def __init__(
        self,
        pipeline: CapturePipeline,
        *,
        clients: Sequence[str] = DEFAULT_CLIENTS,
        everywhere: bool = True,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.clients = clients
        self.everywhere = everywhere
        self.spans = None if tracer_provider is None else ClientSpans(tracer_provider)
        if tracer_provider is not None:
            pipeline.watch(tracer_provider)


_lock: Final = ForkSafeLock()
_routes: tuple[Route, ...] = ()


def add_route(route: Route) -> None:
    """Capture the calls of a route's clients from the next one on. Imports no client. Thread-safe."""
    global _routes  # noqa: PLW0603 - replaced as a whole, so that calls read it without a lock
    with _lock.current:
        _routes = (*_routes, route)
    for name in route.clients:
        when_imported(CLIENTS[name][0], partial(_start, route, name))


def remove_route(route: Route) -> None:
    """Capture for a route no longer; with the last one a client is as it was. Idempotent and thread-safe."""
    global _routes  # noqa: PLW0603 - as above
    with _lock.current:
        _routes = tuple(one for one in _routes if one is not route)
    for patches in _PATCHES.values():
        patches.release(route)


_PATCHES: Final[dict[str, PatchSet]] = {}


def _start(route: Route, name: str) -> None:
    """Put the capture of a client on, which is imported now, if its route is still there."""
    if route in _routes:
        patches: PatchSet = import_module(CLIENTS[name][1]).PATCHES
        _PATCHES[name] = patches
        patches.hold(route)


def begin_call(kind: type[_Call], method: str, url: str, headers: Any, *identity: Any) -> _Call | None:
    """Return the record of a call that is about to be sent, or None where nobody wants it. Never raises.

    Args:
        kind: The client's class of calls.
        method: HTTP method.
        url: Full URL.
        headers: The request's headers, as a mapping, or None.
        *identity: Whatever the class knows a call by: see `OutgoingCall.is_part_of`.
    """
    routes = _routes
    if not routes:
        return None
    try:
        current = _innermost.get()
        if current is not None and (
            current.runs_callbacks or (current.is_being_sent and kind.is_part_of(current, *identity))
        ):
            return None
        # Only what somebody put into the context can suppress instrumentation. A call to Moesif itself, made by
        # whichever library, says for which application it is.
        if (otel_context.get_current() and not is_instrumentation_enabled()) or kind.has_header(
            headers, "X-Moesif-Application-Id"
        ):
            return None
        chosen = [
            route
            for route in _chosen(routes, kind.client, current_exchange.get())
            if not _is_below(url, route.pipeline.settings.base_uri)
        ]
        if not chosen:
            return None
        for route in chosen:
            if route.spans is None:
                route.pipeline.watch_global_provider()
        call = kind(chosen, method, url)
        call.identity = identity
        return call
    except Exception as exc:
        routes[0].pipeline.guard.caught("capture of an outgoing call", exc)
        return None


def _chosen(routes: Sequence[Route], client: str, around: Exchange | None) -> Iterable[Route]:
    """Choose one route for each destination: two that deliver to the same application would count a call twice."""
    if len(routes) == 1 and around is None:
        return routes if client in routes[0].clients else ()
    serving = [exchange.pipeline for exchange in chain(around) if exchange.direction == "Incoming"]
    chosen: dict[tuple[str, str], Route] = {}
    for route in routes:
        is_serving = any(route.pipeline is one for one in serving)
        if client not in route.clients or (serving and not is_serving and not route.everywhere):
            continue
        if is_serving or route.pipeline.settings.pipeline_key not in chosen:
            chosen[route.pipeline.settings.pipeline_key] = route
    return chosen.values()


_URL_ENDS: Final = ("", "/", "?", "#")


def _is_below(url: str, base_uri: str) -> bool:
    end = len(base_uri)
    return url[end : end + 1] in _URL_ENDS and url[:end].lower() == base_uri.lower()


def sent_url(url: str) -> str:
    """Return a URL as it goes over the wire: without user name and password, which go as a header."""
    if "@" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


_CAUSE_DEPTH: Final = 12  # requests → urllib3 (two layers) → ssl or socket is five


def cause_of(error: BaseException) -> str:
    """Name the type of the exception at the bottom: clients have one `ConnectionError` for a dozen causes."""
    for _ in range(_CAUSE_DEPTH):
        # Not `__context__`: that leads to whatever the caller was handling when it made the call.
        inner = (getattr(error, "reason", None), *error.args, error.__cause__)
        deeper = next((e for e in inner if isinstance(e, BaseException)), None)
        if deeper is None:
            break
        error = deeper
    return type(error).__qualname__


def restore(variable: ContextVar[Any], token: Token[Any], ours: Any, before: Any) -> None:
    """Set a variable back to what it was before the call, wherever the call comes back."""
    try:
        variable.reset(token)
    except ValueError:  # in another context than it went out from
        if variable.get() is ours:  # in a copy of that; else the context is somebody else's
            variable.set(before)


# The innermost call that this thread or task is sending, or running callbacks for.
_innermost: ContextVar[OutgoingCall | None] = ContextVar("moesif_otel_outgoing_call", default=None)


def call_being_sent(kind: type[_Call]) -> _Call | None:
    """Return the call that this thread or task is sending by a client, if there is one."""
    call = _innermost.get()
    return call if isinstance(call, kind) and call.is_being_sent else None


class OutgoingCall:
    """One call, as all pipelines that capture it see it: an Exchange for each.

    A client's own class says how its requests, responses and bodies are seen. A context manager around the sending,
    which ends a call that raises; `answered` takes the response of one that did not:

        with call:
            response = send(...)
        return call.answered(response)

    Used by the thread or task that sends, and by the one that reads the body; a finalizer when the response is dropped.
    """

    __slots__ = (
        "__weakref__",
        "_around",
        "_context",
        "_spans",
        "_tokens",
        "exchanges",
        "identity",
        "is_being_sent",
        "request",
        "runs_callbacks",
    )

    client: ClassVar[str]
    """Its name among `CLIENTS`."""

    def __init__(self, routes: Sequence[Route], method: str, url: str) -> None:
        url = sent_url(url)
        self.request: Any = None
        """The request as callbacks get it; None once the body of the response is all that is still to come."""
        self.identity: tuple[Any, ...] = ()
        """As `begin_call` was given it; empty once there is a response."""
        self.is_being_sent = False
        self.runs_callbacks = False
        self.exchanges: list[Exchange] = []
        self._around = current_exchange.get()
        self._spans = [route.spans for route in routes if route.spans is not None]
        self._context: Any = None
        self._tokens: list[tuple[ContextVar[Any], Token[Any], Any, Any]] = []
        for route in routes:
            exchange = Exchange(route.pipeline, "Outgoing", method)
            exchange.url = url
            if route.pipeline.settings.log_body_outgoing:
                exchange.capture_request_body()
                exchange.capture_response_body()
            self.exchanges.append(exchange)

    # What a client's class says. Errors are counted by the caller.

    @staticmethod
    def is_part_of(call: OutgoingCall, *identity: Any) -> bool:
        """Tell whether what is about to be sent is a part of a call that is being sent, such as a redirect."""
        raise NotImplementedError

    @staticmethod
    def has_header(headers: Any, name: str) -> bool:
        """Tell whether a request's headers have this one."""
        return bool(headers) and name in headers

    def _see_upload(self) -> None:
        """See the request's body as it is sent."""

    def _note_failure(self, error: BaseException) -> None:
        """Note the request of a call that raised, as it went out."""

    def _note_answer(self, response: Any) -> None:
        """Note request, status and headers."""
        raise NotImplementedError

    def _awaits_body(self, response: Any) -> bool:
        """Take the response's body; True if something else ends the call, such as a body that is still to come."""
        raise NotImplementedError

    def _shown(self, response: Any) -> Any:
        """Return what callbacks get as the response."""
        return response

    # While the client sends.

    def sends(self, request: Any, read_headers: Callable[[Any], Headers], source: Any) -> None:
        """Take what is about to be sent, as `note_request` takes it once the client has added to it. Never raises."""
        self.request = request
        guard = self.exchanges[0].pipeline.guard
        headers = guard.run("capture of outgoing request headers", read_headers, source) or []
        for exchange in self.exchanges:
            exchange.request_headers = headers

    def __enter__(self) -> None:
        """Make the call current in this thread or task. Never raises."""
        try:
            self.is_being_sent = True
            self.set_arguments(self.request, None)
            around = innermost = self._around
            outer_call = _innermost.get()
            for exchange in self.exchanges:
                # Spans that start now are offered to the whole chain, so all of them must be in it.
                exchange.outer, innermost = innermost, exchange
            self._tokens = [
                (current_exchange, current_exchange.set(innermost), innermost, around),
                (_innermost, _innermost.set(self), self, outer_call),
            ]
            for exchange in self.exchanges:
                if around is not None:
                    _join_trace_of(exchange, around)
                exchange.pipeline.opened(exchange)
            if self._spans:
                self._context = otel_context.get_current()
        except Exception as exc:
            self.caught("capture of an outgoing call", exc)
        try:
            self._see_upload()
        except Exception as exc:
            self.caught("capture of an outgoing request body", exc)

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """End a call that raised instead of giving a response. Never raises."""
        if error is None:
            return
        try:
            cause = cause_of(error)
            if cause != type(error).__qualname__:
                for exchange in self.exchanges:
                    exchange.notes["error_cause"] = cause
            self._note_failure(error)
        except Exception as exc:
            self.caught("capture of a failed outgoing call", exc)
        if isinstance(error, GeneratorExit):
            # The task was destroyed, perhaps by garbage collection in the midst of anything else.
            self._leave_context()
            self.dropped(Outcome.FAILED, error)
            return
        self.leave(error)
        self.finish(self.request, None, Outcome.FAILED, error)

    def answered(self, response: _T) -> _T:
        """Take the response, whose body may still be to come, and return it. Never raises."""
        try:
            self._note_answer(response)
            self.leave()
            if self._awaits_body(response):
                self.request = None
                return response
        except Exception as exc:
            self.caught("capture of an outgoing response", exc)
            self.leave()
        self.finish(self.request, self._shown(response), Outcome.COMPLETE)
        return response

    def leave(self, error: BaseException | None = None) -> None:
        """Undo `__enter__`: there is a response now, or the call failed. Never raises."""
        if not self.is_being_sent:
            return
        if self._spans:
            self._make_spans(error)
        self._leave_context()

    def _leave_context(self) -> None:
        self.is_being_sent = False
        self.identity = ()
        while self._tokens:
            restore(*self._tokens.pop())
        around, self._around = self._around, None
        for exchange in self.exchanges:
            exchange.outer = None if around is None else _nearest(exchange.pipeline, around)

    def _make_spans(self, error: BaseException | None) -> None:
        # Only now is it known whether an instrumentor, however well hidden, has made one of this call.
        try:
            context, self._context = self._context, None
            if context is not None and all(exchange.span is None for exchange in self.exchanges):
                for spans in {id(spans.provider): spans for spans in self._spans}.values():
                    spans.make(self.client, self.exchanges[0], context, error)
        except Exception as exc:
            self.caught("the span of an outgoing call", exc)

    # What is seen of it.

    def note_request(self, method: str, url: str, headers: Headers) -> None:
        """Note the request as it was sent."""
        url = sent_url(url)
        for exchange in self.exchanges:
            exchange.method, exchange.url, exchange.request_headers = method, url, headers

    def note_response(self, status: int, headers: Headers, redirects: int = 0) -> None:
        """Note the response's status and headers."""
        for exchange in self.exchanges:
            exchange.status = status
            exchange.response_headers = headers
            if redirects:
                exchange.notes["redirects"] = redirects

    @property
    def request_bodies(self) -> list[CapturedBody]:
        """The request bodies that are still to be fed."""
        return [e.request_body for e in self.exchanges if e.request_body is not None and e.is_open]

    @property
    def response_bodies(self) -> list[CapturedBody]:
        """The response bodies that are still to be fed."""
        return [e.response_body for e in self.exchanges if e.response_body is not None and e.is_open]

    def take_piece(self, piece: bytes | bytearray | memoryview) -> None:
        """Take a piece of the response's body as it passes. Never raises."""
        try:
            for body in self.response_bodies:
                body.add(piece)
        except Exception as exc:
            self.caught("capture of an outgoing response body", exc)

    def take_body(self, content: bytes, *, decoded: bool) -> None:
        """Take a response body that the client has read as a whole."""
        for body in self.response_bodies:
            body.decoded = decoded
            body.add(content)

    # The end.

    @property
    def has_callbacks(self) -> bool:
        """Tell whether callbacks will look at the call's request and response."""
        return any(exchange.pipeline.has_callbacks(exchange) for exchange in self.exchanges)

    def set_arguments(self, request: Any, response: Any) -> None:
        """Set what callbacks get where `finish` is never called."""
        for exchange in self.exchanges:
            exchange.callback_arguments = (request, response)

    def finish(self, request: Any, response: Any, outcome: Outcome, error: BaseException | None = None) -> None:
        """End the call; callbacks run now, with `request` and `response`. The first end counts. Never raises."""
        before = _innermost.get()
        self.runs_callbacks = True
        _innermost.set(self)
        try:
            for exchange in self.exchanges:
                if exchange.is_open:  # else the capture has ended before the body
                    exchange.callback_arguments = (request, response)
                    exchange.finish(outcome, error)
        finally:
            _innermost.set(before)
            self.runs_callbacks = False

    def dropped(self, outcome: Outcome = Outcome.DROPPED, error: BaseException | None = None) -> None:
        """End a call whose response, or whose task, was garbage; runs in a finalizer."""
        for exchange in self.exchanges:
            exchange.finish_from_finalizer(outcome, error)

    def drop_with(self, carrier: Any, dropped: Callable[[], None] | None = None) -> weakref.finalize[..., Any]:
        """End the call as dropped when garbage collection takes what carries the body, unless that is detached."""
        finalizer = weakref.finalize(carrier, dropped or self.dropped)
        finalizer.atexit = False
        return finalizer

    def caught(self, kind: str, exc: BaseException) -> None:
        """Count an error of ours."""
        self.exchanges[0].pipeline.guard.caught(kind, exc)


def _nearest(pipeline: CapturePipeline, around: Exchange) -> Exchange:
    """Return the enclosing Exchange of the same pipeline, else the innermost of any: the parent of a call."""
    return next((one for one in chain(around) if one.pipeline is pipeline), around)


def _join_trace_of(exchange: Exchange, around: Exchange) -> None:
    """Let a call belong to the trace of the call it is made in, when a span of another trace is current."""
    outer = _nearest(exchange.pipeline, around)
    if outer.span_id and trace.get_current_span().get_span_context().trace_id != outer.trace_id:
        exchange.trace_id, exchange.parent_span_id = outer.trace_id, outer.span_id
