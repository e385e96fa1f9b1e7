"""One event as one row: what lists, charts and the terminal show of it, and what it can be found by."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import orjson

from moesif_otel.sandbox.check import read_time

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["HIDDEN_MARK", "OUR_KEY", "Row", "body_bytes", "our_facts", "route_of", "search_text", "size_in_words"]

OUR_KEY: Final = "moesif_otel"
"""Key of an event's metadata under which moesif_otel adds its own."""

HIDDEN_MARK: Final = "(hidden)"
"""Written by moesif_otel in the place of a value that it hid."""

_MAX_FIELD_CHARACTERS: Final = 1_000
_MAX_SEARCH_CHARACTERS: Final = 4_000
_MAX_BODY_SEARCH_CHARACTERS: Final = 1_500
_NO_BODY_STATUSES: Final = frozenset({204, 304})
# Parts of a path that name one thing and not a kind of things.
_ID_PART: Final = re.compile(
    r"\d+|[0-9a-fA-F]{8}-?(?:[0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}|[0-9a-fA-F]{16,}|(?=[^/]*\d)[A-Za-z0-9_-]{20,}"
)


@dataclass(frozen=True, slots=True)
class Row:
    """The facts of an event that a person wants to see at one look.

    Attributes:
        time_ms: When the call began, Unix milliseconds.
        path: Path and query of an incoming call; the whole address of an outgoing one.
        route: The path's pattern: the framework's own where the event tells it, else the path with ids left out.
        status: None when no response was seen.
        took_ms: From request to response; None when one of the times is missing.
        request_bytes, response_bytes: Size of the body on the wire: as the event tells it, or its Content-Length; else
            the size of what is in the event. None without a body.
        truncated: Whether a body that was captured was cut or left out.
        sizes_known: Whether both sizes are those on the wire.
        failed: A status of 400 or more, an error in the application, or no answer to an outgoing call.
        outcome: How the call ended where that was not well: `client_aborted`, `error`, …; empty otherwise.
    """

    time_ms: int
    direction: str
    verb: str
    host: str
    path: str
    route: str
    status: int | None
    took_ms: float | None
    user: str
    company: str
    trace_id: str
    span_id: str
    parent_id: str
    weight: int
    request_bytes: int | None
    response_bytes: int | None
    sizes_known: bool
    blocked: bool
    truncated: bool
    hidden: bool
    failed: bool
    outcome: str

    @classmethod
    def of_event(cls, event: Mapping[str, Any], *, text: bytes | None = None) -> Row:
        """Read an event that the sandbox's checks let pass.

        Args:
            event: The event.
            text: The same as JSON, where it is at hand.
        """
        request: Mapping[str, Any] = event["request"]
        response: Mapping[str, Any] = event.get("response") or {}
        ours = our_facts(event)
        outgoing = event.get("direction") == "Outgoing"
        status = response.get("status")
        began, ended = _time_ms(request["time"]), _time_ms(response.get("time"))
        host, path = _host_and_path(request["uri"])
        sizes = [_wire_bytes(message, ours, side, event) for side, message in _sides(event)]
        outcome = ours.get("outcome")
        outcome = outcome[:40] if isinstance(outcome, str) and outcome != "complete" else ""
        span = event.get("span") or {}
        text = orjson.dumps(event) if text is None else text
        weight = event.get("weight")
        return cls(
            time_ms=round(began or 0),
            direction=event.get("direction") or "",
            verb=_short(request["verb"]),
            host=_short(host),
            path=_short(request["uri"] if outgoing else path),
            route=_short(_route(ours, path, host if outgoing else "")),
            status=_bounded(status),
            took_ms=None if began is None or ended is None else ended - began,
            user=_short(event.get("user_id")),
            company=_short(event.get("company_id")),
            trace_id=_short(event.get("trace_id")),
            span_id=_short(span.get("id")),
            parent_id=_short(span.get("parent_id")),
            weight=1 if weight is None else _bounded(weight) or 0,
            request_bytes=sizes[0][0],
            response_bytes=sizes[1][0],
            sizes_known=sizes[0][1] and sizes[1][1],
            blocked=bool(event.get("blocked_by")),
            truncated=any(_is_not_whole(_of_body(ours, side)) for side in ("request", "response")),
            hidden=HIDDEN_MARK.encode() in text or any(_hides_in_base64(message) for _, message in _sides(event)),
            failed=_has_failed(status, outcome, outgoing=outgoing),
            outcome=outcome,
        )


def our_facts(event: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what moesif_otel says of the capture itself; empty where it says nothing."""
    metadata = event.get("metadata")
    found = metadata.get(OUR_KEY) if isinstance(metadata, dict) else None
    return found if isinstance(found, dict) else {}


def _sides(event: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for side in ("request", "response"):
        yield side, event.get(side) or {}


def _of_body(ours: Mapping[str, Any], side: str) -> Mapping[str, Any]:
    found = ours.get(f"{side}_body")
    return found if isinstance(found, dict) else {}


def _hides_in_base64(message: Mapping[str, Any]) -> bool:
    body = message.get("body")
    if message.get("transfer_encoding") != "base64" or not isinstance(body, str):
        return False
    try:
        return HIDDEN_MARK.encode() in base64.b64decode(body)
    except (binascii.Error, ValueError):
        return False


def _is_not_whole(facts: Mapping[str, Any]) -> bool:
    left_out = facts.get("left_out")
    return facts.get("truncated") is True or (isinstance(left_out, str) and left_out != "not_read")


def _short(value: Any) -> str:
    return value[:_MAX_FIELD_CHARACTERS] if isinstance(value, str) else ""


def _bounded(number: Any) -> int | None:
    """Return a whole number that a database column can hold."""
    return max(-(1 << 53), min(1 << 53, number)) if isinstance(number, int) else None


def _has_failed(status: int | None, outcome: str, *, outgoing: bool) -> bool:
    return (status is not None and status >= 400) or outcome == "error" or (outgoing and status is None)


def _host_and_path(uri: str) -> tuple[str, str]:
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "", uri
    return parts.netloc.rpartition("@")[2], f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"


def _route(ours: Mapping[str, Any], path: str, host: str) -> str:
    told = ours.get("route")
    return host + (told if isinstance(told, str) and told else route_of(path))


def route_of(path: str) -> str:
    """Return a path's pattern: without its query, with `{id}` for the parts that look like ids."""
    parts = path.partition("?")[0][:_MAX_FIELD_CHARACTERS].split("/")
    return "/".join("{id}" if _ID_PART.fullmatch(part) else part for part in parts)


def _time_ms(text: Any) -> float | None:
    if not isinstance(text, str):
        return None
    try:
        return read_time(text).timestamp() * 1000
    except ValueError:
        return None


def _wire_bytes(
    message: Mapping[str, Any], ours: Mapping[str, Any], side: str, event: Mapping[str, Any]
) -> tuple[int | None, bool]:
    """Return the size of a body and whether it is the one on the wire."""
    told = _of_body(ours, side).get("size_bytes")
    if isinstance(told, int) and not isinstance(told, bool):
        return _bounded(told), True
    size = body_bytes(message)
    is_answer_without = side == "response" and (
        event["request"]["verb"] == "HEAD" or message.get("status") in _NO_BODY_STATUSES
    )
    announced = None if is_answer_without else _content_length(message.get("headers") or {})
    if announced is not None and (size is not None or announced):
        return announced, True
    if size is None:
        return None, True
    # Base64 is the body itself; JSON lost its blanks on the way, or had values hidden in it.
    return size, message.get("transfer_encoding") == "base64"


def _content_length(headers: Mapping[str, str]) -> int | None:
    found = next((value for name, value in headers.items() if name.lower() == "content-length"), "")
    return int(found) if found.isascii() and found.isdigit() and len(found) < 16 else None


def body_bytes(message: Mapping[str, Any]) -> int | None:
    """Return the size of what an event has of a body; JSON as compact text. None without a body."""
    body = message.get("body")
    if body is None:
        return None
    if message.get("transfer_encoding") == "base64" and isinstance(body, str):
        return len(body) // 4 * 3 - body[-2:].count("=")
    try:
        return len(orjson.dumps(body))
    except orjson.JSONEncodeError:
        return len(str(body))


def search_text(event: Mapping[str, Any], row: Row) -> str:
    """Return what the text filter looks at, in lower case: address, names, ids, the start of the bodies."""
    parts = [row.verb, row.host, row.path, row.route, str(row.status or ""), row.user, row.company, row.outcome]
    parts += [str(event.get(name) or "") for name in ("transaction_id", "trace_id", "session_token", "blocked_by")]
    parts += [str(our_facts(event).get("error_type") or "")]
    for _, message in _sides(event):
        body = message.get("body")
        if body is None:
            continue
        if message.get("transfer_encoding") == "base64" and isinstance(body, str):
            head = body[: _MAX_BODY_SEARCH_CHARACTERS // 3 * 4]
            try:
                parts.append(base64.b64decode(head).decode("utf-8", "replace"))
            except (binascii.Error, ValueError):
                continue
        else:
            parts.append(body if isinstance(body, str) else _json_head(body))
    return "\n".join(part[:_MAX_BODY_SEARCH_CHARACTERS] for part in parts).lower()[:_MAX_SEARCH_CHARACTERS]


def _json_head(body: Any) -> str:
    try:
        return orjson.dumps(body).decode()
    except orjson.JSONEncodeError:
        return str(body)


def size_in_words(size_bytes: int | None, *, known: bool = True) -> str:
    """Return a size as a person reads it: `812 B`, `4.1 KB`, `≈4.1 KB` where it is not sure; `-` without a body."""
    if size_bytes is None:
        return "-"
    about = "" if known else "≈"
    if size_bytes < 1_000:
        return f"{about}{size_bytes} B"
    size = size_bytes / 1_000
    for unit in ("KB", "MB"):
        if size < 999.95:
            return f"{about}{size:.1f} {unit}"
        size /= 1_000
    return f"{about}{size:.1f} GB"
