"""Decides what an answer of the server means for a batch. Nothing here looks at the body of an answer."""

from __future__ import annotations

from datetime import timezone
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from moesif_otel._delivery.stats import DropReason

if TYPE_CHECKING:
    from collections.abc import Mapping


class BatchOutcome(Enum):
    """The next step for a batch that was sent."""

    DELIVERED = "delivered"  # taken; forget it
    RETRY = "retry"  # the server, or the way to it, is not there now; the batch waits and goes again
    SPLIT = "split"  # too large; halve it, then leave bodies out, then give up
    ISOLATE = "isolate"  # something in it is wrong; halve it to find out what, deliver the rest
    SUSPENDED = "suspended"  # nothing of ours is wanted until somebody changes a setting; do not storm


# Documented by Moesif: 201, 400, 401, 402, 404, 405, 406, 410, 429, 500, 502, 503 (API documentation, "errors").
# The others come from proxies and gateways on the way (RFC 9110 section 15, RFC 6585, RFC 8470).
_STATUS_OUTCOMES: Final[Mapping[int, BatchOutcome]] = {
    401: BatchOutcome.SUSPENDED,
    402: BatchOutcome.SUSPENDED,
    403: BatchOutcome.SUSPENDED,
    407: BatchOutcome.RETRY,  # a proxy of this site wants credentials: nothing is wrong with the events
    408: BatchOutcome.RETRY,
    413: BatchOutcome.SPLIT,
    425: BatchOutcome.RETRY,
    429: BatchOutcome.RETRY,
}
# 3xx: a POST is never sent to another place (it carries the application id); a captive portal or a moved BASE_URI
# may come right again, and until then the bounds hold.
_CLASS_OUTCOMES: Final[Mapping[int, BatchOutcome]] = {
    2: BatchOutcome.DELIVERED,
    3: BatchOutcome.RETRY,
    4: BatchOutcome.ISOLATE,
    5: BatchOutcome.RETRY,
}

_MAX_RETRY_AFTER_S: Final = 300.0  # a wrong clock or header must not stop delivery for a day


class PostAnswer(NamedTuple):
    """The result of one POST."""

    outcome: BatchOutcome
    status: int | None = None  # None: no answer came
    retry_after_s: float | None = None  # what the server asked to wait
    config_etag: str | None = None
    rules_tag: str | None = None
    detail: str = ""  # for the log, why no answer came; type names and system messages, no data

    @property
    def cause(self) -> str:
        """The reason for which it was not taken, for the log."""
        return f"status {self.status}" if self.status is not None else (self.detail or "no answer")

    @property
    def suspension(self) -> DropReason:
        """The reason for which events are dropped while this answer suspends delivery."""
        return DropReason.PAYMENT_REQUIRED if self.status == 402 else DropReason.UNAUTHORIZED


def outcome_of_status(status: int) -> BatchOutcome:
    """Return the outcome of any HTTP status: its own, else that of its class; anything odd is retried."""
    return _STATUS_OUTCOMES.get(status) or _CLASS_OUTCOMES.get(status // 100, BatchOutcome.RETRY)


def retry_after_seconds(value: str | None, now_s: float) -> float | None:
    """Read a `Retry-After` header (RFC 9110 section 10.2.3): seconds, or an HTTP date, measured against `now_s`.

    Return seconds to wait, from 0 to five minutes; None when it is absent or unreadable.
    """
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text), _MAX_RETRY_AFTER_S) if len(text) < 18 else _MAX_RETRY_AFTER_S
    try:
        when = parsedate_to_datetime(text)
        if when.tzinfo is None:  # RFC 5322's "-0000"; an HTTP date is always UTC
            when = when.replace(tzinfo=timezone.utc)
        return min(max(0.0, when.timestamp() - now_s), _MAX_RETRY_AFTER_S)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
