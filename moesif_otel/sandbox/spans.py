"""Moesif's view of a span that came over OTLP: HTTP spans become events.

Pure functions. This is not the package's own converter (`_events` is): the two are written apart, so that each can
prove the other.

Attributes: https://opentelemetry.io/docs/specs/semconv/http/http-spans/
"""

from __future__ import annotations

import base64
import uuid
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final

from moesif_otel.sandbox.check import Refusal
from moesif_otel.sandbox.jsontext import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moesif_otel.sandbox.otlp import Span

__all__ = ["event_of_span"]

_DIRECTIONS: Final = {"server": "Incoming", "client": "Outgoing"}
_METHOD: Final = ("http.request.method_original", "http.request.method", "http.method")
_STATUS: Final = ("http.response.status_code", "http.status_code")
_URL: Final = ("url.full", "http.url")
_SCHEME: Final = ("url.scheme", "http.scheme")
_HOST: Final = ("server.address", "http.host", "net.host.name", "http.server_name", "net.peer.name")
_PORT: Final = ("server.port", "net.host.port", "net.peer.port")
_CLIENT: Final = ("client.address", "http.client_ip", "net.sock.peer.addr", "net.peer.ip")
_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}
_LAST_NS: Final = 253_402_300_799 * 1_000_000_000
# Attribute to the event's field, for those that are one to one.
_IDENTITY: Final[Mapping[str, tuple[str, ...]]] = {
    "user_id": ("user.id", "enduser.id"),
    "company_id": ("company.id",),
    "session_token": ("session.id",),
    "subscription_id": ("subscription.id",),
}
_HEADER: Final = {"request": "http.request.header.", "response": "http.response.header."}
_BODY: Final = {"request": "http.request.body.content", "response": "http.response.body.content"}
_NAMED: Final = frozenset(
    (
        *_METHOD,
        *_STATUS,
        *_URL,
        *_SCHEME,
        *_HOST,
        *_PORT,
        *_CLIENT,
        *_BODY.values(),
        "url.path",
        "url.query",
        "http.target",
    )
) | {name for names in _IDENTITY.values() for name in names}


def event_of_span(span: Span, application_id: str) -> dict[str, Any] | None:
    """Make an event of an HTTP span.

    Args:
        span: A span of any kind.
        application_id: Part of the event's transaction id, which is the same for the same span.

    Returns:
        The event; None when the span is no HTTP call.

    Raises:
        Refusal: Status 400, for a time that is none.
    """
    attributes = span.attributes
    verb = _first(attributes, _METHOD)
    direction = _DIRECTIONS.get(span.kind)
    if not verb or direction is None:
        return None
    event: dict[str, Any] = {
        "request": {
            "time": _time(span.start_ns),
            "uri": _uri(attributes),
            "verb": str(verb),
            "headers": _headers(attributes, "request"),
            **_body(attributes, "request"),
        },
        "direction": direction,
        "trace_id": span.trace_id,
        "span": {
            "id": span.span_id,
            "parent_id": span.parent_id,
            "links": [{"trace_id": trace_id, "span_id": span_id} for trace_id, span_id in span.links],
            "status": span.status,
        },
        "transaction_id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{application_id}/{span.trace_id}/{span.span_id}")),
        "metadata": _metadata(span),
    }
    address = _first(attributes, _CLIENT)
    if address:
        event["request"]["ip_address"] = str(address)
    status = _first(attributes, _STATUS)
    if isinstance(status, int) and status:
        event["response"] = {
            "time": _time(span.end_ns),
            "status": status,
            "headers": _headers(attributes, "response"),
            **_body(attributes, "response"),
        }
    for field, names in _IDENTITY.items():
        found = _first(attributes, names)
        if found is not None:
            event[field] = str(found)
    return event


def _first(attributes: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((attributes[name] for name in names if attributes.get(name) not in (None, "")), None)


def _time(nanoseconds: int) -> str:
    if not 0 <= nanoseconds <= _LAST_NS:
        raise Refusal(400, "wrong_value", "a span's time must be nanoseconds since 1970, before the year 10000")
    whole = datetime.fromtimestamp(nanoseconds // 1_000_000_000, timezone.utc)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{nanoseconds // 1_000_000 % 1_000:03d}"


def _uri(attributes: Mapping[str, Any]) -> str:
    full = _first(attributes, _URL)
    if full:
        return str(full)
    scheme = str(_first(attributes, _SCHEME) or "http")
    host = str(_first(attributes, _HOST) or "unknown")
    port = str(_first(attributes, _PORT) or "")
    if ":" in host and not host.startswith("[") and host.count(":") > 1:
        host = f"[{host}]"
    if port and port != _DEFAULT_PORTS.get(scheme) and not host.endswith(f":{port}"):
        host = f"{host}:{port}"
    path = attributes.get("url.path")
    if path is None:
        return f"{scheme}://{host}{attributes.get('http.target') or '/'}"
    query = attributes.get("url.query")
    return f"{scheme}://{host}{path}{'?' + str(query) if query else ''}"


def _headers(attributes: Mapping[str, Any], side: str) -> dict[str, str]:
    prefix = _HEADER[side]
    found: dict[str, str] = {}
    for name, value in attributes.items():
        if name.startswith(prefix):
            # Old releases of the instrumentors write underscores for the hyphens of the name.
            header = name[len(prefix) :].replace("_", "-")
            found[header] = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return found


def _body(attributes: Mapping[str, Any], side: str) -> dict[str, Any]:
    content = attributes.get(_BODY[side])
    if content is None:
        return {}
    data = content if isinstance(content, bytes) else str(content).encode("utf-8", "surrogatepass")
    try:
        return {"body": read_json(data), "transfer_encoding": "json"}
    except Refusal:
        return {"body": base64.b64encode(data).decode("ascii"), "transfer_encoding": "base64"}


def _metadata(span: Span) -> dict[str, Any]:
    """Everything that has no field of its own."""
    rest = {
        name: _plain(value)
        for name, value in span.attributes.items()
        if name not in _NAMED and not name.startswith((_HEADER["request"], _HEADER["response"]))
    }
    return {**rest, "span_name": span.name, "resource": {name: _plain(v) for name, v in span.resource.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value
