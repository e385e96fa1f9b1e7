"""The same event as OTLP attributes, for a pipeline that sends private span copies to a Collector.

Nothing is given here that an event would not carry, and nothing that OTLP's encoder drops with a log line that quotes
it (bytes, mappings, lone surrogates, integers beyond 64 bits).
"""

from __future__ import annotations

from base64 import b64decode
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import orjson
from opentelemetry.sdk.trace import Event

from moesif_otel._events.build import build_event
from moesif_otel._events.serialize import OUR_KEY, plain, sound_text, text_of
from moesif_otel._events.spans import attributes_of
from moesif_otel._redaction.bodies import names_in
from moesif_otel._redaction.names import Verdict
from moesif_otel._redaction.rules import redaction_for
from moesif_otel._redaction.text import redact_text, redact_url, redact_value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from moesif_otel._capture.exchange import Exchange
    from moesif_otel.settings import Settings

__all__ = ["redacted_attributes", "redacted_events", "redacted_name"]

# What the event says itself, looked through; the span's own may hold the same unmasked.
_REPLACED: Final = (
    *("http.request.header.", "http.response.header.", "http.request.body.content", "http.response.body.content"),
    *("http.url", "http.target", "url.full", "url.query", "url.path", "user.id", "enduser.id", "company.id"),
    *("session.id", "http.user_agent", "user_agent.original"),
)
_INT64: Final = 1 << 63


def redacted_attributes(captured: Exchange | None, span: ReadableSpan | None, settings: Settings) -> dict[str, Any]:
    """Return all attributes of a private span copy: the span's own and what was captured, with everything hidden.

    Args:
        captured: The finished Exchange, or None for a bare span.
        span: The span that is copied, or None.
        settings: What to hide.

    Returns:
        By the HTTP semantic conventions: `http.request.method`, `url.full`, `http.request.header.<name>` (lists),
        `http.request.body.content` (text; a binary body is left out), `http.request.body.size` where that is not all,
        the same for the response, `client.address`, `user.id`, `company.id`, `session.id`; the application's metadata
        under its own keys and ours as JSON under `moesif_otel`. Values are what OTLP can carry. Thread-safe.
    """
    attributes = _own(span, settings)
    event = build_event(captured, span, settings, parse_bodies=False)
    if event is None:
        return attributes
    for name, value in _from_metadata(event):
        attributes.setdefault(name, value)
    for name, value in _from_event(event).items():
        carried = _carried(value)
        if carried is not None:
            attributes[name] = carried
    return attributes


def redacted_events(events: Sequence[Event], settings: Settings) -> list[Event]:
    """Return a span's events without the attributes in which a name that counts occurs (messages quote data freely)."""
    rules = redaction_for(settings)

    def safe(name: str, value: Any) -> bool:
        text = text_of(value)
        return all(side.verdict(name) is Verdict.KEEP and not names_in(side, text) for side in rules)

    return [
        Event(
            redacted_name(event.name, settings),
            {key: value for key, value in (event.attributes or {}).items() if safe(key, value)},
            event.timestamp,
        )
        for event in events
    ]


def redacted_name(name: str, settings: Settings) -> str:
    """Return the name of a span or of an event with everything hidden: some have a whole URL in it."""
    rules = redaction_for(settings)
    return redact_text(rules.response, redact_url(rules.request, name))


def _own(span: ReadableSpan | None, settings: Settings) -> dict[str, Any]:
    if span is None:
        return {}
    own: dict[str, Any] = plain(
        {name: value for name, value in attributes_of(span).items() if not name.startswith(_REPLACED)}
    )
    for side in redaction_for(settings):
        own = redact_value(side, own)
    return {name: carried for name, value in own.items() if (carried := _carried(value)) is not None}


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
    ours = event.get("metadata", {}).get(OUR_KEY, {})
    for side in ("request", "response"):
        size = ours.get(f"{side}_body", {}).get("size_bytes")
        if size is not None:
            found[f"http.{side}.body.size"] = size
    return found


def _add_url_parts(found: dict[str, Any], uri: str) -> None:
    try:
        parts = urlsplit(uri)
        found["url.scheme"] = parts.scheme or None
        found["url.path"] = parts.path or None
        found["url.query"] = parts.query or None
        found["server.address"] = parts.hostname
        found["server.port"] = parts.port
    except ValueError:
        # An odd authority: the full URL is there all the same.
        return


def _add_headers(found: dict[str, Any], prefix: str, headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        found[prefix + name.lower()] = [value]


def _text_of_body(part: dict[str, Any]) -> str | None:
    body = part.get("body")
    if body is None:
        return None
    if part["transfer_encoding"] != "base64":
        return orjson.dumps(plain(body)).decode()
    data = b64decode(body)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        # The semantic conventions: cut at a character's boundary, never base64 in a string.
        return data[: error.start].decode() if error.start >= len(data) - 3 else None


def _from_metadata(event: dict[str, Any]) -> list[tuple[str, Any]]:
    found = []
    for key, value in event.get("metadata", {}).items():
        if key == OUR_KEY and isinstance(value, dict):
            # They stand among the attributes already.
            value = {name: inner for name, inner in value.items() if name != "attributes"}  # noqa: PLW2901
            if not value:
                continue
        carried = _carried(value)
        if carried is not None:
            found.append((sound_text(text_of(key)), carried))
    return found


def _carried(value: Any) -> Any:
    """Return a value as OTLP can carry it: text, bool, 64-bit int, float, a list of one of these; else JSON text."""
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
    return orjson.dumps(plain(value)).decode()
