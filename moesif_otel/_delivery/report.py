"""Logs what happens to events: the first failure of each kind at once, then at most one line per minute.

A line says what failed, at which address, what it means and what to do. No line contains a body, a header, an identity,
a credential, the application id, or an unedited exception message.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

from moesif_otel._delivery.outcome import BatchOutcome, PostAnswer
from moesif_otel._guard import get_logger

if TYPE_CHECKING:
    from moesif_otel._delivery.clock import Clock
    from moesif_otel._delivery.stats import Stats

_logger: Final = get_logger(__name__)

_BETWEEN_LINES_S: Final = 60.0
_MAX_CAUSES: Final = 6


def describe(exc: BaseException) -> str:
    """Describe a failed connection: the exception types from the outside in, and the system's error text.

    Messages of HTTP libraries quote addresses and headers; those of the operating system and of TLS do not.
    """
    names: list[str] = []
    words = ""
    current: BaseException | None = exc
    while current is not None and len(names) < _MAX_CAUSES:
        names.append(type(current).__name__)
        words = _words_of(current) or words
        inner = getattr(current, "reason", None)
        if not isinstance(inner, BaseException):
            inner = next((a for a in current.args if isinstance(a, BaseException)), None)
        current = inner or current.__cause__ or current.__context__
    return " < ".join(names) + (f" ({words})" if words else "")


def _words_of(exc: BaseException) -> str:
    if not isinstance(exc, OSError):
        return ""
    return str(getattr(exc, "verify_message", None) or exc.strerror or "")


_WHAT_TO_DO: Final = {
    401: "does not know this application id (401): check APPLICATION_ID",
    402: "reports that the Moesif subscription is not active (402): see the billing page of the Moesif portal",
    403: "refuses this application id (403): check APPLICATION_ID, and BASE_URI if that is a proxy",
}


def _number_of(events: int) -> str:
    return "1 event" if events == 1 else f"{events} events"


class DeliveryLog:
    """Writes the log lines of one pipeline.

    `address` is that of the server, without credentials, and `setting` what the user can change it by.
    """

    def __init__(self, clock: Clock, address: str, setting: str = "BASE_URI") -> None:
        self._clock = clock
        self.address = address
        self._setting = setting
        self.after_fork()

    def after_fork(self) -> None:
        """Start from zero in a forked child."""
        self._lock = threading.Lock()
        self._next_line_at: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def failure(self, kind: str, text: str, level: int = logging.WARNING) -> None:
        """Log a failure: the first of a kind at once, then at most one per minute, with the number not logged."""
        now = self._clock.monotonic()
        with self._lock:
            due_at = self._next_line_at.get(kind)
            if due_at is not None and now < due_at:
                self._unsaid[kind] = self._unsaid.get(kind, 0) + 1
                return
            self._next_line_at[kind] = now + _BETWEEN_LINES_S
            unsaid = self._unsaid.pop(kind, 0)
        more = f" ({unsaid} more since the last line)" if unsaid else ""
        _logger.log(level, "moesif_otel: %s%s", text, more)

    def not_taken(self, answer: PostAnswer, events: int) -> None:
        """Log that events wait for a server that does not answer, or are dropped since it does not accept any."""
        if answer.outcome is BatchOutcome.SUSPENDED:
            what = _WHAT_TO_DO.get(answer.status or 0) if self._setting == "BASE_URI" else None
            what = what or f"does not accept events (status {answer.status})"
            self.failure(
                f"suspended {answer.status}",
                f"{self.address} {what}; until then events are dropped and counted, and one batch is tried about once "
                "a minute",
                logging.ERROR,
            )
            return
        waiting = f"{_number_of(events)} wait and are sent again" if events > 1 else "1 event waits and is sent again"
        if answer.status is None:
            self.failure(
                f"unreachable {answer.cause}",
                f"{self.address} did not answer ({answer.cause}): {waiting}; "
                f"check {self._setting}, and that the network, proxy and firewall allow the connection",
            )
            return
        asked = f" and asks to wait {answer.retry_after_s:.0f} s" if answer.retry_after_s is not None else ""
        advice = f"; redirects are not followed: check {self._setting}" if answer.status // 100 == 3 else ""
        self.failure(
            f"status {answer.status}", f"{self.address} answered with status {answer.status}{asked}: {waiting}{advice}"
        )

    def refused(self, events: int, status: int | None) -> None:
        """Log that the server refuses events, which are dropped."""
        whole = f" and any other; check {self._setting}" if events > 1 else "; it is dropped, and counted as rejected"
        self.failure(f"rejected {status}", f"{self.address} refuses {_number_of(events)} (status {status}){whole}")

    def waiting(self, events: int, timeout_s: float) -> None:
        """Log that a shutdown waits for the server."""
        _logger.info(
            "moesif_otel: waiting up to %.1f s (SHUTDOWN_TIMEOUT) for %s to accept %s events",
            timeout_s,
            self.address,
            events,
        )

    def recovered(self) -> None:
        """Log that the server accepts events again."""
        _logger.info("moesif_otel: %s accepts events again", self.address)

    def batch(self, events: int, status: int | None, duration_s: float, outcome: str) -> None:
        """Log one POST, for `DEBUG`."""
        count, duration_ms = _number_of(events), duration_s * 1000
        _logger.debug("moesif_otel: %s, status %s, %s in %.0f ms", count, status, outcome, duration_ms)

    def ended(self, stats: Stats) -> None:
        """Log at shutdown what was lost, if anything; events on disk are not lost."""
        spooled = stats["dropped"].get("spooled", 0)
        lost = {r: n for r, n in stats["dropped"].items() if r not in _NO_LOSS}
        if lost or stats["pending"]:
            reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(lost.items())) or "none"
            _logger.warning(
                "moesif_otel: at shutdown, %s of %s events were delivered to %s; dropped: %s; pending: %s; "
                "kept on disk: %s",
                stats["delivered"],
                stats["accepted"],
                self.address,
                reasons,
                stats["pending"],
                spooled,
            )
        elif spooled:
            _logger.info("moesif_otel: at shutdown, %s events are kept on disk for the next process", spooled)


# Left out on purpose, or not lost.
_NO_LOSS: Final = frozenset({"sampled_out", "masked_away", "skip_unknown", "spooled"})
