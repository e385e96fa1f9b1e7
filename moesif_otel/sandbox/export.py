"""Stored calls as files for other programs: one JSON object a line, or an HTTP archive (HAR 1.2)."""

from __future__ import annotations

import base64
from datetime import datetime, timezone
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import orjson

from moesif_otel.sandbox.bodies import raw_body
from moesif_otel.sandbox.jsontext import read_json, write_json
from moesif_otel.sandbox.rows import Row

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moesif_otel.sandbox.query import Filters
    from moesif_otel.sandbox.store import Store, StoredEvent

__all__ = ["har_of", "lines_of"]


def lines_of(store: Store, filters: Filters) -> Iterator[bytes]:
    """Return the events that fit, one a line, oldest first; a few at a time."""
    for group in store.each_event(filters):
        yield b"".join(stored.event + b"\n" for stored in group)


def har_of(store: Store, filters: Filters) -> Iterator[bytes]:
    """Return the calls that fit as an HTTP archive, oldest first; a few at a time."""
    creator = orjson.dumps({"name": "moesif-otel sandbox", "version": "1"})
    yield b'{"log":{"version":"1.2","creator":' + creator + b',"entries":['
    comma = b""
    for group in store.each_event(filters):
        entries = b",".join(write_json(_entry(stored)) for stored in group)
        yield comma + entries
        comma = b","
    yield b"]}}"


def _entry(stored: StoredEvent) -> dict[str, Any]:
    event = read_json(stored.event)
    row = Row.of_event(event, text=stored.event)
    request, response = event["request"], event.get("response") or {}
    took_ms = max(row.took_ms or 0, 0)
    return {
        "startedDateTime": datetime.fromtimestamp(row.time_ms / 1000, timezone.utc).isoformat(timespec="milliseconds"),
        "time": took_ms,
        "request": {
            "method": request["verb"],
            "url": request["uri"],
            "httpVersion": "HTTP/1.1",
            "cookies": [],
            "headers": _headers(request),
            "queryString": _query(request["uri"]),
            "headersSize": -1,
            "bodySize": -1 if row.request_bytes is None else row.request_bytes,
            **_post_data(request),
        },
        "response": {
            "status": row.status or 0,
            "statusText": _phrase(row.status),
            "httpVersion": "HTTP/1.1",
            "cookies": [],
            "headers": _headers(response),
            "content": _content(response, row),
            "redirectURL": _header(response, "location"),
            "headersSize": -1,
            "bodySize": -1 if row.response_bytes is None else row.response_bytes,
        },
        "cache": {},
        "timings": {"send": 0, "wait": took_ms, "receive": 0},
        **({"serverIPAddress": response["ip_address"]} if response.get("ip_address") else {}),
        "comment": f"{event.get('direction') or 'call'} {event.get('transaction_id') or ''}".strip(),
    }


def _headers(message: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in (message.get("headers") or {}).items()]


def _header(message: Mapping[str, Any], wanted: str) -> str:
    return next((value for name, value in (message.get("headers") or {}).items() if name.lower() == wanted), "")


def _query(uri: str) -> list[dict[str, str]]:
    try:
        pairs = parse_qsl(urlsplit(uri).query, keep_blank_values=True)
        return [{"name": name, "value": value} for name, value in pairs]
    except ValueError:
        return []


def _phrase(status: int | None) -> str:
    try:
        return HTTPStatus(status or 0).phrase
    except ValueError:
        return ""


def _text(message: Mapping[str, Any]) -> tuple[str, str]:
    """Return a body as text and the encoding of that text: empty or `base64`."""
    data = raw_body(message)
    if data is None:
        body = message["body"]
        return (body if isinstance(body, str) else write_json(body).decode()), ""
    try:
        return data.decode(), ""
    except UnicodeDecodeError:
        return base64.b64encode(data).decode(), "base64"


def _post_data(request: Mapping[str, Any]) -> dict[str, Any]:
    if request.get("body") is None:
        return {}
    text, encoding = _text(request)
    found = {"mimeType": _header(request, "content-type"), "text": text}
    return {"postData": {**found, **({"comment": encoding} if encoding else {})}}


def _content(response: Mapping[str, Any], row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {"size": row.response_bytes or 0, "mimeType": _header(response, "content-type")}
    if response.get("body") is not None:
        found["text"], encoding = _text(response)
        if encoding:
            found["encoding"] = encoding
    return found
