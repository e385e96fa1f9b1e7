"""One event as one row: what the page and the demo show of it.

Owns: `Row`, and how it is read from an event's JSON.
Threads: any; a value.
Never: fails on an event that `check.py` let pass.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Row", "size_in_words"]


@dataclass(frozen=True, slots=True)
class Row:
    """What a person wants to see of an event.

    Attributes:
        path: Path and query of an incoming call; the whole address of an outgoing one.
        status: None when no response was seen.
        took_ms: From request to response; None when one of the times is missing.
        request_bytes, response_bytes: Size of the body: the true one where the event tells it (its body is a part
            only), else of what is in the event (JSON: as compact text); None without a body.
    """

    verb: str
    path: str
    status: int | None
    took_ms: float | None
    user: str
    company: str
    request_bytes: int | None
    response_bytes: int | None
    blocked: bool

    @classmethod
    def of_event(cls, event: Mapping[str, Any]) -> Row:
        """Read an event."""
        request: Mapping[str, Any] = event["request"]
        response: Mapping[str, Any] = event.get("response") or {}
        return cls(
            verb=request["verb"],
            path=_path(request["uri"], event.get("direction") == "Outgoing"),
            status=response.get("status"),
            took_ms=_took_ms(request["time"], response.get("time")),
            user=event.get("user_id") or "",
            company=event.get("company_id") or "",
            request_bytes=_true_bytes(event, "request_body") or _body_bytes(request),
            response_bytes=_true_bytes(event, "response_body") or _body_bytes(response),
            blocked=bool(event.get("blocked_by")),
        )


def _path(uri: str, whole: bool) -> str:
    if whole:
        return uri
    try:
        parts = urlsplit(uri)
    except ValueError:
        return uri
    return f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"


def _took_ms(began: str, ended: str | None) -> float | None:
    if not ended:
        return None
    try:
        # Times of ours have milliseconds and no zone; others may have what Python 3.10 cannot read.
        difference = datetime.fromisoformat(ended) - datetime.fromisoformat(began)
    except (TypeError, ValueError):
        return None
    return difference.total_seconds() * 1000


def _true_bytes(event: Mapping[str, Any], side: str) -> int | None:
    """Read what moesif_otel says of a body of which the event has a part, or nothing."""
    found: Any = event.get("metadata")
    for name in ("moesif_otel", side, "size_bytes"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, int) else None


def _body_bytes(message: Mapping[str, Any]) -> int | None:
    body = message.get("body")
    if body is None:
        return None
    if message.get("transfer_encoding") == "base64" and isinstance(body, str):
        try:
            return len(base64.b64decode(body))
        except (binascii.Error, ValueError):
            return len(body)
    return len(orjson.dumps(body))


def size_in_words(size_bytes: int | None) -> str:
    """Give a size as a person reads it: `812 B`, `4.1 KB`; `-` without a body."""
    if size_bytes is None:
        return "-"
    if size_bytes < 1_000:
        return f"{size_bytes} B"
    size = size_bytes / 1_000
    for unit in ("KB", "MB"):
        if size < 1_000:
            return f"{size:.1f} {unit}"
        size /= 1_000
    return f"{size:.1f} GB"
