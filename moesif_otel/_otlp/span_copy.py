"""Builds the private copy of a call for another exporter: a plain span that any encoder accepts.

It has the data of the call's event and of the span itself, all of it inspected: attributes and their names, span
events, status, resource. Values are limited to types that OTLP's encoder accepts. Others it would drop with a log line
that quotes them, or it would refuse the whole batch.
"""

from __future__ import annotations

from base64 import b64decode
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import orjson
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from moesif_otel._events.build import builder_for
from moesif_otel._events.serialize import OUR_KEY, plain, sound_text, text_of
from moesif_otel._events.spans import attributes_of
from moesif_otel._redaction.bodies import names_in
from moesif_otel._redaction.names import Verdict
from moesif_otel._redaction.rules import redaction_for
from moesif_otel._redaction.text import redact_text, redact_url, redact_value

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moesif_otel._capture.exchange import Exchange
    from moesif_otel.settings import Settings

# Ids, times, resource and protobuf's framing of one span; the same of a span event or a link.
_SPAN_BYTES: Final = 1_024
_PART_BYTES: Final = 64
# Batches are closed at 5,000,000 accounted bytes; with this margin they stay below the 4 MiB (4,194,304 bytes) that an
# OTLP receiver over gRPC takes by default (Collector: max_recv_msg_size_mib; over HTTP it is 20 MiB).
_MARGIN: Final = 1.25
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
# The event has these, inspected; the span's own attributes may hold the same data unmasked.
_REPLACED: Final = (
    *("http.request.header.", "http.response.header.", "http.request.body.content", "http.response.body.content"),
    *("http.url", "http.target", "url.full", "url.query", "url.path", "user.id", "enduser.id", "company.id"),
    *("session.id", "http.user_agent", "user_agent.original"),
)
# A command line may hold secrets (`-p hunter2`), in a form that cannot be recognized.
_COMMAND: Final = "process.command"
_INT64: Final = 1 << 63
_UINT64: Final = 1 << 64


def private_copy(exchange: Exchange, hide: Hide) -> tuple[ReadableSpan, int]:
    """Return a finished call as a plain span with everything hidden, and roughly the size of its OTLP form in bytes.

    The copy has no references to the application's request. The call's own span may be None, or live.
    """
    span: Any = exchange.span
    attributes = redacted_attributes(exchange, hide)
    given: dict[str, Any] = {
        "kind": SpanKind.SERVER if exchange.direction == "Incoming" else SpanKind.CLIENT,
        "attributes": attributes,
    }
    if span is None:
        copy = ReadableSpan(
            name=hide.text(exchange.method),
            context=SpanContext(exchange.trace_id, exchange.span_id, is_remote=False, trace_flags=_SAMPLED),
            parent=_parent_context(exchange),
            # A call without a span gets the resource of the global provider, as the spans around it have.
            resource=hide.resource(getattr(trace.get_tracer_provider(), "resource", None)),
            start_time=exchange.started_ns,
            end_time=exchange.ended_ns,
            **given,
        )
    else:
        copy = ReadableSpan(
            name=hide.text(span.name),
            context=span.context,
            parent=span.parent,
            resource=hide.resource(span.resource),
            events=[_event(event, hide) for event in span.events],
            # Attributes of links were not inspected: only their ids are copied.
            links=[Link(link.context) for link in span.links],
            status=_status(span.status or Status(), hide),
            start_time=_nanoseconds(span.start_time) or exchange.started_ns,
            end_time=_nanoseconds(span.end_time) or exchange.ended_ns,
            instrumentation_scope=_scope(span.instrumentation_scope, hide),
            **given,
        )
    parts = (attributes, *(event.attributes or {} for event in copy.events))
    weight = _SPAN_BYTES + _weight([copy.name, copy.status.description])
    weight += _PART_BYTES * (len(copy.events) + len(copy.links))
    weight += sum(len(name) + _weight(value) for part in parts for name, value in part.items())
    return copy, int(weight * _MARGIN)


def redacted_attributes(exchange: Exchange, hide: Hide) -> dict[str, Any]:
    """Return all attributes of a private copy: those of the call's span and those captured, with everything hidden.

    By the HTTP semantic conventions: `http.request.method`, `url.full`, `http.request.header.<name>` (lists),
    `http.request.body.content` (text; a binary body is left out), `http.request.body.size` where that is not all, the
    same for the response, `client.address`, `user.id`, `company.id`, `session.id`; the application's metadata under its
    own keys, and ours as JSON under `moesif_otel`. OTLP can carry all values.
    """
    own = {} if exchange.span is None else attributes_of(exchange.span)
    attributes = hide.attributes({name: value for name, value in own.items() if not name.startswith(_REPLACED)})
    event = builder_for(hide.settings).build(exchange)
    if event is None:
        return attributes
    for name, value in _from_metadata(event, hide):
        if hide.keeps(name):
            attributes.setdefault(sound_text(name), value)
    for name, value in _from_event(event).items():
        carried = _carried(value)
        if carried is not None:
            attributes[name] = carried
    return attributes


class Hide:
    """Hides secrets, as the settings require, in the parts of a span that events do not have. Not thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._rules = redaction_for(settings)
        self._resource: tuple[Any, Resource] = (None, Resource.get_empty())

    def text(self, text: str) -> str:
        """Return a name or a message with its secrets hidden; some contain a whole URL."""
        return sound_text(redact_text(self._rules.response, redact_url(self._rules.request, text)))

    def keeps(self, name: str) -> bool:
        """Return whether an attribute's name has nothing to hide; applications may put data into names."""
        name = sound_text(name)
        return self.text(name) == name

    def values(self, given: Mapping[Any, Any]) -> dict[str, Any]:
        """Return a mapping with values inspected by their names, as in a JSON body."""
        found: dict[str, Any] = plain(dict(given))
        for side in self._rules:
            found = redact_value(side, found)
        return found

    def attributes(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return attributes with their values inspected, without those whose names hold a secret."""
        found = {name: _carried(value) for name, value in self.values(given).items() if self.keeps(name)}
        return {name: value for name, value in found.items() if value is not None}

    def resource(self, resource: Any) -> Resource:
        """Return a resource, inspected; the last one is cached, since a process usually has one."""
        if resource is not self._resource[0]:
            found = Resource.get_empty()
            if isinstance(resource, Resource):
                given = {name: value for name, value in resource.attributes.items() if not name.startswith(_COMMAND)}
                found = Resource(self.attributes(given), resource.schema_url)
            self._resource = (resource, found)
        return self._resource[1]

    def quoting(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return attributes that may quote any data, without those in which a secret's name occurs."""

        def safe(name: str, value: Any) -> bool:
            texts = (name, text_of(value))
            return all(
                side.verdict(name) is Verdict.KEEP and not any(names_in(side, text) for text in texts)
                for side in self._rules
            )

        found = {sound_text(name): _carried(plain(value)) for name, value in given.items() if safe(name, value)}
        return {name: value for name, value in found.items() if value is not None}


def _nanoseconds(time: Any) -> int:
    """Return a time that OTLP can carry; 0 for none, and for what it cannot: spans take whatever they are given."""
    try:
        found = int(time or 0)
    except (TypeError, ValueError, OverflowError):
        return 0
    return found if 0 <= found < _UINT64 else 0


def _event(event: Event, hide: Hide) -> Event:
    return Event(hide.text(event.name), hide.quoting(event.attributes or {}), _nanoseconds(event.timestamp))


def _parent_context(exchange: Exchange) -> SpanContext | None:
    if exchange.parent_span_id is None:
        return None
    return SpanContext(exchange.trace_id, exchange.parent_span_id, is_remote=True, trace_flags=_SAMPLED)


def _status(status: Status, hide: Hide) -> Status:
    if status.status_code is not StatusCode.ERROR or not status.description:
        return Status(status.status_code)
    # Usually an exception's message, which may quote any data.
    return Status(status.status_code, hide.quoting({"description": status.description}).get("description"))


def _scope(scope: InstrumentationScope | None, hide: Hide) -> InstrumentationScope | None:
    if scope is None:
        return None
    version, schema_url = (text and sound_text(text) for text in (scope.version, scope.schema_url))
    attributes = scope.attributes and hide.attributes(scope.attributes)
    return InstrumentationScope(hide.text(scope.name), version, schema_url, attributes)


def _weight(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, (list, tuple)):
        return sum(map(_weight, value))
    return 16


def _from_event(event: dict[str, Any]) -> dict[str, Any]:
    request, response = event["request"], event.get("response")
    found: dict[str, Any] = {
        "http.request.method": request["verb"],
        "url.full": request["uri"],
        "client.address": request.get("ip_address"),
        "http.request.body.content": _text_of_body(request),
        "user.id": event.get("user_id"),
        "company.id": event.get("company_id"),
        "session.id": event.get("session_token"),
    }
    _add_url_parts(found, request["uri"])
    _add_headers(found, "http.request.header.", request["headers"])
    if response is not None:
        found["http.response.status_code"] = response["status"]
        found["http.response.body.content"] = _text_of_body(response)
        found["network.peer.address"] = response.get("ip_address")
        _add_headers(found, "http.response.header.", response["headers"])
    ours = event.get("metadata", {}).get(OUR_KEY)
    for side in ("request", "response"):
        body = ours.get(f"{side}_body") if isinstance(ours, dict) else None  # it may be the application's, and anything
        if isinstance(body, dict):
            found[f"http.{side}.body.size"] = body.get("size_bytes")
    return found


def _add_url_parts(found: dict[str, Any], uri: str) -> None:
    with suppress(ValueError):  # a malformed authority: the full URL is still there
        parts = urlsplit(uri)
        found["url.scheme"] = parts.scheme or None
        found["url.path"] = parts.path or None
        found["url.query"] = parts.query or None
        found["server.address"] = parts.hostname
        found["server.port"] = parts.port


def _add_headers(found: dict[str, Any], prefix: str, headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        found[prefix + sound_text(name.lower())] = [value]


def _text_of_body(part: dict[str, Any]) -> str | None:
    body = part.get("body")
    if body is None:
        return None
    if part["transfer_encoding"] != "base64":
        return orjson.dumps(plain(body, digits=True)).decode()
    data = b64decode(body)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        # The semantic conventions: cut at a character's boundary, never base64 in a string.
        return data[: error.start].decode() if error.start >= len(data) - 3 else None


def _from_metadata(event: dict[str, Any], hide: Hide) -> list[tuple[str, Any]]:
    found = []
    for key, value in event.get("metadata", {}).items():
        if key == OUR_KEY and isinstance(value, dict):
            # They stand among the attributes already.
            ours = {name: inner for name, inner in value.items() if name != "attributes"}
            value = hide.values(ours)  # noqa: PLW2901
            if not value:
                continue
        carried = _carried(value)
        if carried is not None:
            found.append((text_of(key), carried))
    return found


def _carried(value: Any) -> Any:
    """Return a value in a type that OTLP has: text, bool, 64-bit int, float or a list of one of these; else as JSON."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, str):
        return sound_text(value)
    if isinstance(value, int):
        return value if -_INT64 <= value < _INT64 else str(value)
    if isinstance(value, (list, tuple)):
        carried = [_carried(inner) for inner in value]
        kinds = {type(inner) for inner in carried}
        if len(kinds) <= 1 and kinds <= {str, bool, int, float}:
            return carried
    found = plain(value)
    return found if isinstance(found, str) else orjson.dumps(found).decode()
