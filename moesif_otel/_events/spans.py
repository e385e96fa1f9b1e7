"""Reads spans: bare HTTP spans of any instrumentation as calls, and what a span adds to a captured call.

The HTTP semantic conventions, old and stable. Any thread may read a span that has ended; one that has not may change
meanwhile, and then tells less.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.trace import SpanKind, StatusCode

from moesif_otel._capture.body import ByteBudget, CapturedBody
from moesif_otel._capture.exchange import Exchange, Outcome
from moesif_otel._events.caller import sound_address

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext
    from opentelemetry.util.types import Attributes

    from moesif_otel._capture.exchange import Headers
    from moesif_otel.settings import Settings

_REQUEST_HEADER: Final = "http.request.header."
_RESPONSE_HEADER: Final = "http.response.header."
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}

CONVENTION_PREFIXES: Final = (
    *("http.", "url.", "server.", "client.", "network.", "net.", "user_agent.", "error."),
    *("user.id", "enduser.", "company.", "session.", "otel.", "thread.", "code.", "asgi.", "wsgi.", "moesif."),
)
"""Attributes that the event holds in fields of its own, or that say nothing of the application's."""

_FIELDS: Final = frozenset({"user.id", "enduser.id", "company.id", "session.id", "http.route", "error.type"})
_METHODS: Final = ("http.request.method", "http.method")
_WSGI_SCOPE: Final = "opentelemetry.instrumentation.wsgi"
_MAX_LINKS: Final = 32
_MAX_EXCEPTIONS: Final = 8

# OpenTelemetry specification, "TraceState: probability sampling": a rejection threshold of 56 bits, in up to 14
# hexadecimal digits whose trailing zeros are left out. Probability is 1 - threshold / 2**56.
_DIGITS: Final = 14
_HEXADECIMAL: Final = frozenset("0123456789abcdefABCDEF")
_FULL: Final = 1 << 56
# Its predecessor: `p:n`, probability 2**-n; 63 stands for zero.
_MAX_EXPONENT: Final = 62
_MAX_WEIGHT: Final = (1 << 31) - 1


# Stands where an Exchange has the pipeline that captured it; a bare span has none.
_NO_PIPELINE: Final[Any] = SimpleNamespace(generation=0)


def call_of_span(span: ReadableSpan, settings: Settings) -> Exchange | None:
    """Return a SERVER or CLIENT span with an HTTP method as a finished call; None for any other span.

    Bodies that somebody else captured are held to the options that our own capture obeys.
    """
    if span.kind is not SpanKind.SERVER and span.kind is not SpanKind.CLIENT:
        return None
    attributes = attributes_of(span)
    method = _method(attributes)
    if method is None:
        return None
    incoming = span.kind is SpanKind.SERVER
    call = Exchange(_NO_PIPELINE, "Incoming" if incoming else "Outgoing", method)
    call.outer = None
    call.outcome = Outcome.COMPLETE
    call.span = span
    call.started_ns = span.start_time or 0
    call.ended_ns = span.end_time or call.started_ns
    call.status = _status(span, attributes)
    call.request_headers = request_headers = _headers(attributes, _REQUEST_HEADER)
    call.response_headers = _headers(attributes, _RESPONSE_HEADER)
    agent = _text(attributes, "user_agent.original", "http.user_agent")
    if agent and all(name != "User-Agent" for name, _ in request_headers):
        request_headers.append(("User-Agent", agent))
    call.url = _url(attributes, request_headers)
    if span.context is None or not span.context.is_valid:
        call.fix_ids()  # else all such spans were one event: Moesif knows events by their ids
    peer = _text(attributes, "network.peer.address", "net.sock.peer.addr", "net.peer.ip")
    # Instrumentations up to 0.52b0 write the Host header there, which a client chooses.
    client = sound_address(_text(attributes, "client.address", "http.client_ip") or "") if incoming else None
    call.peer_address = client or peer
    if settings.log_body if incoming else settings.log_body_outgoing:
        call.request_body = _body(attributes, "request", "http.request_content_length", settings.request_max_body_size)
        call.response_body = _body(
            attributes, "response", "http.response_content_length", settings.response_max_body_size
        )
    return call


def weight_of_span(span: ReadableSpan) -> int:
    """Return how many calls a span stands for, as a sampler of this process noted it in the span's trace state.

    A trace state is handed down from parent to child, and the first one may come from a client, who must not choose
    the weight: what a span has in common with its parent counts as 1.
    """
    noted, handed_down = _noted(span.context), _noted(span.parent)
    return 1 if noted == handed_down else weight_of(noted)


def _noted(context: SpanContext | None) -> str | None:
    return context.trace_state.get("ot") if context is not None and context.trace_state else None


def weight_of(entry: str | None) -> int:
    """Return one over the sampling probability of a trace state's `ot` entry, rounded; 1 where it does not tell."""
    for member in (entry or "").split(";"):
        name, _, value = member.partition(":")
        if name == "th" and 0 < len(value) <= _DIGITS and _HEXADECIMAL.issuperset(value):
            threshold = int(value, 16) << 4 * (_DIGITS - len(value))
            return min(max(round(_FULL / (_FULL - threshold)), 1), _MAX_WEIGHT)
        if name == "p" and value.isascii() and value.isdecimal() and len(value) <= 2 and int(value) <= _MAX_EXPONENT:
            return min(1 << int(value), _MAX_WEIGHT)
    return 1


def attributes_of(span: ReadableSpan) -> Mapping[str, Any]:
    """Return a copy of a span's attributes; nothing, if somebody changes them at this very moment."""
    try:
        return dict(span.attributes or {})
    except (RuntimeError, KeyError):
        # A span that has not ended, at its limit of attributes: the oldest are going.
        return {}


def has_http_method(span: ReadableSpan) -> bool:
    """Tell whether a span describes an HTTP call, by the old or the stable conventions; reads names only."""
    attributes = span.attributes
    return attributes is not None and any(name in attributes for name in _METHODS)


@dataclass(slots=True, repr=False)  # a `repr` would show what nobody has inspected
class SpanFacts:
    """The facts that a span adds to its call, not inspected yet.

    Attributes:
        of_span: What the event's `span` has besides ids: `links`, `status`.
        texts: `route`, `span_name` and `error_type`, where they say more than the call does.
        attributes: The application's own.
        exceptions: `{"type": …, "message": …}` of its exception events.
    """

    trace_id: int = 0
    span_id: int = 0
    parent_span_id: int | None = None
    user_id: str | None = None
    company_id: str | None = None
    session_token: str | None = None
    of_span: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    exceptions: list[dict[str, str]] = field(default_factory=list)


_NO_FACTS: Final = SpanFacts()


def facts_of_span(call: Exchange) -> SpanFacts:
    """Return what the span of a call adds to it; where there is no span, nothing."""
    span: Any = call.span
    if span is None:
        return _NO_FACTS
    facts = SpanFacts()
    context = span.context
    if context is not None and context.is_valid:
        facts.trace_id, facts.span_id = context.trace_id, context.span_id
        facts.parent_span_id = span.parent.span_id if span.parent is not None else None
    if span.links:
        facts.of_span["links"] = [
            {"trace_id": f"{link.context.trace_id:032x}", "span_id": f"{link.context.span_id:016x}"}
            for link in span.links[:_MAX_LINKS]
        ]
    code = span.status.status_code
    if code is not StatusCode.UNSET:
        facts.of_span["status"] = code.name
    route = _add_attributes(facts, call, span)
    if _says_more(span, call.method, route):
        facts.texts["span_name"] = span.name
    events = span.events
    if events:
        facts.exceptions = [_exception(event.attributes) for event in events if event.name == "exception"][
            :_MAX_EXCEPTIONS
        ]
    return facts


def _add_attributes(facts: SpanFacts, call: Exchange, span: ReadableSpan) -> str | None:
    """Read the attributes that tell something: to copy them all takes several times as long."""
    attributes = span.attributes
    if not attributes:
        return None
    try:
        telling = {name: attributes[name] for name in attributes if _tells(name)}
    except (RuntimeError, KeyError):
        # A span that has not ended, at its limit of attributes: the oldest are going.
        return None
    if not telling:
        return None
    facts.attributes = {name: value for name, value in telling.items() if name not in _FIELDS}
    facts.user_id = _text(telling, "user.id", "enduser.id")
    facts.company_id = _text(telling, "company.id")
    facts.session_token = _text(telling, "session.id")
    route = _text(telling, "http.route")
    error_type = _text(telling, "error.type")
    if route:
        facts.texts["route"] = route
    if error_type and error_type != str(call.status) and call.error_type is None:
        facts.texts["error_type"] = error_type
    return route


@lru_cache(maxsize=1_024)  # a service has some dozens; one that makes names up pushes out others
def _tells(name: str) -> bool:
    """Tell whether an attribute is the application's own, or has a field in the event."""
    return name in _FIELDS or not name.startswith(CONVENTION_PREFIXES)


def _says_more(span: ReadableSpan, method: str, route: str | None) -> bool:
    """Tell whether a span's name says more than method, route and path do."""
    if span.name in {f"{method} {route}", method, f"HTTP {method}", route}:
        return False
    scope = span.instrumentation_scope
    # OpenTelemetry's WSGI middleware names its spans by method and path, unless the application renames them.
    return scope is None or scope.name != _WSGI_SCOPE or not span.name.startswith(f"{method} /")


def _exception(attributes: Attributes) -> dict[str, str]:
    found = attributes or {}
    kind, message = _text(found, "exception.type"), _text(found, "exception.message")
    return {name: text for name, text in (("type", kind), ("message", message)) if text}


def _method(attributes: Mapping[str, Any]) -> str | None:
    method = _text(attributes, *_METHODS)
    if method == "_OTHER":
        # The convention's word for a method that it does not know.
        return _text(attributes, "http.request.method_original") or method
    return method


def _status(span: ReadableSpan, attributes: Mapping[str, Any]) -> int | None:
    for name in ("http.response.status_code", "http.status_code"):
        value = attributes.get(name)
        if value is not None:
            try:
                status = int(value)
            except (TypeError, ValueError, OverflowError):
                continue
            if 100 <= status <= 999:
                return status
    # An application that raises leaves a span without a status; its server answers 500.
    failed = span.status.status_code is StatusCode.ERROR or any(event.name == "exception" for event in span.events)
    return 500 if failed and span.kind is SpanKind.SERVER else None


def _body(attributes: Mapping[str, Any], side: str, old_size_name: str, max_bytes: int) -> CapturedBody | None:
    value = attributes.get(f"http.{side}.body.content")
    if not value or not isinstance(value, (str, bytes)):
        return None
    data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    size = attributes.get(f"http.{side}.body.size", attributes.get(old_size_name))
    # A size that is smaller is the size on the wire, compressed.
    body = CapturedBody(max_bytes, ByteBudget(len(data)))  # the span holds them anyway
    body.add(data)
    if isinstance(size, int) and size > len(data):
        body.count(size - len(data))
    return body


def _headers(attributes: Mapping[str, Any], prefix: str) -> Headers:
    found: Headers = []
    for key, value in attributes.items():
        if key.startswith(prefix):
            # Old releases wrote `x_request_id` where the conventions say `x-request-id`.
            name = key[len(prefix) :].replace("_", "-").title()
            values = value if isinstance(value, (list, tuple)) else (value,)
            found.extend((name, str(single)) for single in values)
    return found


def _url(attributes: Mapping[str, Any], request_headers: Headers) -> str:
    full = _text(attributes, "url.full", "http.url")
    if full and "://" in full[:16]:
        return full
    scheme = _text(attributes, "url.scheme", "http.scheme") or "http"
    return f"{scheme}://{_host(attributes, request_headers, scheme)}{_target(attributes, full)}"


def _target(attributes: Mapping[str, Any], partial: str | None) -> str:
    path = _text(attributes, "url.path")
    if path is not None:
        query = _text(attributes, "url.query")
        target = f"{path}?{query.lstrip('?')}" if query else path
    else:
        target = _text(attributes, "http.target") or partial or "/"
    return target if target.startswith(("/", "?")) else f"/{target}"


def _host(attributes: Mapping[str, Any], request_headers: Headers, scheme: str) -> str:
    host = _text(attributes, "server.address")
    port = attributes.get("server.port")
    if not host:
        host = _text(attributes, "http.host") or dict(request_headers).get("Host")
        if host:
            return host
        host = _text(attributes, "net.host.name", "net.peer.name", "http.server_name", "net.host.ip")
        port = attributes.get("net.host.port", attributes.get("net.peer.port"))
    if not host:
        return "unknown"
    if ":" in host and not host.startswith("["):
        # An IPv6 address, or a host that brings its port.
        return f"[{host}]{_port(port, scheme)}" if host.count(":") > 1 else host
    return host + _port(port, scheme)


def _port(port: Any, scheme: str) -> str:
    return f":{port}" if port and str(port) != str(_DEFAULT_PORTS.get(scheme)) else ""


def _text(attributes: Mapping[str, Any], *names: str) -> str | None:
    for name in names:
        value = attributes.get(name)
        if isinstance(value, str):
            if value:
                return value
        elif isinstance(value, (bool, int, float)):
            return str(value)
    return None
