"""A bare HTTP span of any instrumentation, as a `Call`.

Owns: the HTTP semantic conventions, old and stable, and what a span tells of its trace.
Threads: any; pure functions of spans that have ended.
Never: takes a span for a call that is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from opentelemetry.trace import SpanKind, StatusCode

from moesif_otel._events.call import Call, Content
from moesif_otel._events.weight import weight_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.util.types import Attributes

    from moesif_otel._capture.exchange import Headers

__all__ = ["CONVENTION_PREFIXES", "attributes_of", "call_of_span", "decorate", "has_http_method"]

_REQUEST_HEADER: Final = "http.request.header."
_RESPONSE_HEADER: Final = "http.response.header."
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}

CONVENTION_PREFIXES: Final = (
    *("http.", "url.", "server.", "client.", "network.", "net.", "user_agent.", "error."),
    *("user.id", "enduser.", "company.", "session.", "otel.", "thread.", "code.", "asgi.", "wsgi.", "moesif."),
)
"""Attributes that the event holds in fields of its own, or that say nothing of the application's."""

_METHODS: Final = ("http.request.method", "http.method")
_WSGI_SCOPE: Final = "opentelemetry.instrumentation.wsgi"
_MAX_LINKS: Final = 32
_MAX_EXCEPTIONS: Final = 8


def call_of_span(span: ReadableSpan) -> Call | None:
    """Give a SERVER or CLIENT span with a HTTP method as a Call; None for any other span."""
    if span.kind is SpanKind.SERVER:
        direction: Literal["Incoming", "Outgoing"] = "Incoming"
    elif span.kind is SpanKind.CLIENT:
        direction = "Outgoing"
    else:
        return None
    attributes = attributes_of(span)
    method = _method(attributes)
    if method is None:
        return None
    request_headers = _headers(attributes, _REQUEST_HEADER)
    response_headers = _headers(attributes, _RESPONSE_HEADER)
    agent = _text(attributes, "user_agent.original", "http.user_agent")
    if agent and all(name != "User-Agent" for name, _ in request_headers):
        request_headers.append(("User-Agent", agent))
    started_ns = span.start_time or 0
    peer = _text(attributes, "network.peer.address", "net.sock.peer.addr", "net.peer.ip")
    incoming = direction == "Incoming"
    call = Call(
        direction=direction,
        method=method,
        url=_url(attributes, request_headers),
        started_ns=started_ns,
        ended_ns=span.end_time or started_ns,
        status=_status(span, attributes),
        request_headers=request_headers,
        response_headers=response_headers,
        request_body=_content(attributes, "request", "http.request_content_length"),
        response_body=_content(attributes, "response", "http.response_content_length"),
        peer_address=_text(attributes, "client.address", "http.client_ip") or peer if incoming else None,
        server_address=peer if not incoming else None,
    )
    decorate(call, span)
    state = span.context.trace_state if span.context is not None else None
    call.weight = weight_of(state.get("ot") if state else None)
    return call


def attributes_of(span: ReadableSpan) -> Mapping[str, Any]:
    """Give a copy of a span's attributes; nothing, if somebody changes them at this very moment."""
    try:
        return dict(span.attributes or {})
    except (RuntimeError, KeyError):
        # A span that has not ended, at its limit of attributes: the oldest are going.
        return {}


def has_http_method(span: ReadableSpan) -> bool:
    """Whether a span describes an HTTP call, by the old or the stable conventions; reads names only."""
    attributes = span.attributes
    return attributes is not None and any(name in attributes for name in _METHODS)


def decorate(call: Call, span: ReadableSpan) -> None:
    """Add what a span knows: ids, parent, links, status, route, name, exceptions, the application's attributes."""
    context = span.context
    if context is not None and context.is_valid:
        call.trace_id, call.span_id = context.trace_id, context.span_id
        call.parent_span_id = span.parent.span_id if span.parent is not None else None
    if span.links:
        call.links = [
            {"trace_id": f"{link.context.trace_id:032x}", "span_id": f"{link.context.span_id:016x}"}
            for link in span.links[:_MAX_LINKS]
        ]
    if span.status.status_code is not StatusCode.UNSET:
        call.span_status = span.status.status_code.name
    attributes = attributes_of(span)
    call.user_id = call.user_id or _text(attributes, "user.id", "enduser.id")
    call.company_id = call.company_id or _text(attributes, "company.id")
    call.session_token = call.session_token or _text(attributes, "session.id")
    route = _text(attributes, "http.route")
    if route:
        call.ours["route"] = route
    if _says_more(span, call.method, route):
        call.ours["span_name"] = span.name
    error_type = _text(attributes, "error.type")
    if error_type and error_type != str(call.status):
        call.ours["error_type"] = error_type
    call.attributes = {name: value for name, value in attributes.items() if not name.startswith(CONVENTION_PREFIXES)}
    call.exceptions = [_exception(event.attributes) for event in span.events if event.name == "exception"][
        :_MAX_EXCEPTIONS
    ]


def _says_more(span: ReadableSpan, method: str, route: str | None) -> bool:
    """Whether a span's name says more than method, route and path do."""
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
                return int(value)
            except (TypeError, ValueError):
                continue
    # An application that raises leaves a span without a status; its server answers 500.
    failed = span.status.status_code is StatusCode.ERROR or any(event.name == "exception" for event in span.events)
    return 500 if failed and span.kind is SpanKind.SERVER else None


def _content(attributes: Mapping[str, Any], side: str, old_size_name: str) -> Content | None:
    value = attributes.get(f"http.{side}.body.content")
    if not value or not isinstance(value, (str, bytes)):
        return None
    data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    size = attributes.get(f"http.{side}.body.size", attributes.get(old_size_name))
    # A size that is smaller is the size on the wire, compressed.
    return Content(data, size if isinstance(size, int) and size > len(data) else len(data))


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
