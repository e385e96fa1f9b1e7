"""What the captures of all HTTP clients share: which pipelines get a call, and its way from the sending to its end.

A client's own module knows when a call begins, how its body passes and when that is over; it fills the Exchanges here.
Calls that exporters make (with OpenTelemetry's instrumentation suppressed), that go to Moesif, or that a callback
makes are not captured: the last would go on for ever.
"""

from __future__ import annotations

import os
import threading
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit, urlunsplit

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.instrumentation.utils import is_instrumentation_enabled

from moesif_otel._capture.body import CapturedBody
from moesif_otel._capture.exchange import Exchange, Outcome, chain, current_exchange
from moesif_otel._capture.patching import when_imported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextvars import Token

    from moesif_otel._capture.client_spans import ClientSpans
    from moesif_otel._capture.exchange import CapturePipeline, Headers
    from moesif_otel._capture.patching import PatchSet


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


@dataclass(frozen=True, eq=False)
class Route:
    """One registration of a pipeline.

    Args:
        pipeline: Where the calls go.
        clients: The clients whose calls are wanted.
        everywhere: False for a middleware's pipeline: it does not get calls that were made while an application
            of another pipeline was being served.
        before: Called before each call is captured (looks for the tracer provider).
        spans: Makes spans of the calls, where nobody else does; None makes none.
    """

    pipeline: CapturePipeline
    clients: Sequence[str] = DEFAULT_CLIENTS
    everywhere: bool = True
    before: Callable[[], None] | None = None
    spans: ClientSpans | None = None


_lock = threading.Lock()
_routes: tuple[Route, ...] = ()


def _renew_lock() -> None:
    """Replace, in a forked child, a lock that another thread may have held."""
    global _lock  # noqa: PLW0603 - a lock cannot be reset
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def add_route(route: Route) -> None:
    """Capture the calls of a route's clients from the next one on. Imports no client. Thread-safe."""
    global _routes  # noqa: PLW0603 - replaced as a whole, so that calls read it without a lock
    with _lock:
        _routes = (*_routes, route)
    for name in route.clients:
        when_imported(CLIENTS[name][0], partial(_start, route, name))


def remove_route(route: Route) -> None:
    """Capture for a route no longer; with the last one a client is as it was. Idempotent and thread-safe."""
    global _routes  # noqa: PLW0603 - as above
    with _lock:
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


def begin_call(
    client: str, method: str, url: str, headers: Any, is_part: Callable[[OutgoingCall], bool] | None = None
) -> OutgoingCall | None:
    """Return the record of a call that is about to be sent, or None where nobody wants it. Never raises.

    Args:
        client: One of `CLIENTS`.
        method: HTTP method.
        url: Full URL.
        headers: The request's headers, as a mapping, or None.
        is_part: Says whether this is a part of the call that this thread or task is sending: a redirect's hop, say.
    """
    routes = _routes
    if not routes:
        return None
    try:
        current = _innermost.get()
        if current is not None and (
            current.runs_callbacks or (is_part is not None and current.is_being_sent and is_part(current))
        ):
            return None
        if not is_instrumentation_enabled():
            return None
        chosen = [
            route
            for route in _chosen(routes, client, current_exchange.get())
            if not _goes_to_moesif(url, headers, route.pipeline.settings.base_uri)
        ]
        if not chosen:
            return None
        for route in chosen:
            if route.before is not None:
                route.pipeline.guard.run("looking for a tracer provider", route.before)
        return OutgoingCall(client, chosen, method, sent_url(url))
    except Exception as exc:
        routes[0].pipeline.guard.caught("outgoing call", exc)
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


_MOESIF_HEADER: Final = "X-Moesif-Application-Id"
_URL_ENDS: Final = ("", "/", "?", "#")


def _goes_to_moesif(url: str, headers: Any, base_uri: str) -> bool:
    """Whether a call is one to Moesif itself, made by whichever library."""
    if headers and _MOESIF_HEADER in headers:
        return True
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


# The innermost call that this thread or task is sending, or running callbacks for.
_innermost: ContextVar[OutgoingCall | None] = ContextVar("moesif_otel_outgoing_call", default=None)


def call_being_sent(client: str) -> OutgoingCall | None:
    """Return the call that this thread or task is sending by a client, if there is one."""
    call = _innermost.get()
    return call if call is not None and call.is_being_sent and call.client == client else None


class OutgoingCall:
    """One call, as all pipelines that capture it see it: an Exchange for each.

    Used by the thread or task that sends, and by the one that reads the body; a finalizer when the response is dropped.
    """

    __slots__ = (
        "__weakref__",
        "_around",
        "_context",
        "_spans",
        "_tokens",
        "client",
        "exchanges",
        "has_stand_in",
        "identity",
        "is_being_sent",
        "runs_callbacks",
    )

    def __init__(self, client: str, routes: Sequence[Route], method: str, url: str) -> None:
        self.client = client
        self.identity: Any = None
        """What a client's module knows the call by while it is being sent."""
        self.has_stand_in = False
        """Whether something stands for the request's body while it is sent."""
        self.is_being_sent = False
        self.runs_callbacks = False
        self.exchanges: list[Exchange] = []
        self._around = current_exchange.get()
        self._spans = [route.spans for route in routes if route.spans is not None]
        self._context: Any = None
        self._tokens: list[tuple[ContextVar[Any], Token[Any], Any]] = []
        for route in routes:
            pipeline = route.pipeline
            exchange = Exchange(pipeline, "Outgoing", method)
            exchange.url = url
            settings = pipeline.settings
            if settings.log_body_outgoing:
                exchange.request_body = CapturedBody(settings.request_max_body_size, pipeline.budget)
                exchange.response_body = CapturedBody(settings.response_max_body_size, pipeline.budget)
            self.exchanges.append(exchange)

    @property
    def has_callbacks(self) -> bool:
        """Whether callbacks will look at the call's request and response."""
        return any(exchange.pipeline.has_callbacks(exchange) for exchange in self.exchanges)

    @property
    def request_bodies(self) -> list[CapturedBody]:
        """The request bodies that are still to be fed."""
        return [e.request_body for e in self.exchanges if e.request_body is not None and e.is_open]

    @property
    def response_bodies(self) -> list[CapturedBody]:
        """The response bodies that are still to be fed."""
        return [e.response_body for e in self.exchanges if e.response_body is not None and e.is_open]

    # -- while the client sends

    def enter(self) -> None:
        """Make the call current in this thread or task. Never raises."""
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
            if self._spans:
                self._context = otel_context.get_current()
        except Exception as exc:
            self.caught("outgoing call", exc)

    def failed(self, request: Any, error: BaseException) -> None:
        """End a call that raised instead of giving a response. Never raises."""
        try:
            cause = cause_of(error)
            if cause != type(error).__qualname__:
                for exchange in self.exchanges:
                    exchange.notes["error_cause"] = cause
        except Exception as exc:
            self.caught("outgoing call that failed", exc)
        self.leave(error)
        self.finish(request, None, Outcome.FAILED, error)

    def leave(self, error: BaseException | None = None) -> None:
        """Undo `enter`: there is a response now, or the call failed. Never raises."""
        if self._spans:
            self._make_spans(error)
        self.is_being_sent = False
        self.identity = None
        while self._tokens:
            variable, token, before = self._tokens.pop()
            try:
                variable.reset(token)
            except ValueError:  # the call came back in another context than it went out from
                variable.set(before)
        for exchange in self.exchanges:
            exchange.outer = _nearest(exchange.pipeline, self._around)
        self._around = None

    def _set(self, variable: ContextVar[Any], value: Any) -> None:
        before = variable.get()
        self._tokens.append((variable, variable.set(value), before))

    def _make_spans(self, error: BaseException | None) -> None:
        # Only now is it known whether an instrumentor, however well hidden, has made one of this call.
        try:
            context, self._context = self._context, None
            if context is not None and all(exchange.span is None for exchange in self.exchanges):
                for spans in {id(spans.provider): spans for spans in self._spans}.values():
                    spans.make(self.client, self.exchanges[0], context, error)
        except Exception as exc:
            self.caught("the span of an outgoing call", exc)

    def note_request(self, method: str, url: str, headers: Headers) -> None:
        """Note the request as it was sent."""
        for exchange in self.exchanges:
            exchange.method, exchange.url, exchange.request_headers = method, sent_url(url), headers

    def take_body(self, content: bytes, *, decoded: bool) -> None:
        """Take a response body that the client has read as a whole."""
        for body in self.response_bodies:
            body.decoded = decoded
            body.add(content)

    def note_response(self, status: int, headers: Headers, redirects: int = 0) -> None:
        """Note the response's status and headers."""
        for exchange in self.exchanges:
            exchange.status = status
            exchange.response_headers = headers
            if redirects:
                exchange.notes["redirects"] = redirects

    # -- the end

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

    def dropped(self, outcome: Outcome = Outcome.DROPPED) -> None:
        """End a call whose response was garbage; runs in a finalizer."""
        for exchange in self.exchanges:
            exchange.finish_from_finalizer(outcome)

    def caught(self, kind: str, exc: BaseException) -> None:
        """Count an error of ours."""
        self.exchanges[0].pipeline.guard.caught(kind, exc)


def _nearest(pipeline: CapturePipeline, around: Exchange | None) -> Exchange | None:
    """Return the enclosing Exchange of the same pipeline, else the innermost of any: the parent of a call."""
    return next((one for one in chain(around) if one.pipeline is pipeline), around)


def _join_trace_of(exchange: Exchange, around: Exchange | None) -> None:
    """Let a call belong to the trace of the call it is made in, when a span of another trace is current."""
    outer = _nearest(exchange.pipeline, around)
    if outer is not None and outer.span_id and trace.get_current_span().get_span_context().trace_id != outer.trace_id:
        exchange.trace_id, exchange.parent_span_id = outer.trace_id, outer.span_id
