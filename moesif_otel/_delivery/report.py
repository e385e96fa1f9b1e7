"""What is logged about delivery, and how often: the first line of each cause in full, then one line a minute at most.

A line says what failed, at which address, what it means and what to do. No line has a body, a header, an identity, a
credential, the application id, or an exception's message as it stands.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

from moesif_otel._delivery.outcome import Answer, Outcome
from moesif_otel._guard import get_logger

if TYPE_CHECKING:
    from moesif_otel._delivery.clock import Clock
    from moesif_otel._delivery.stats import Stats

__all__ = ["DeliveryLog", "describe"]

_logger: Final = get_logger(__name__)

_BETWEEN_LINES_S: Final = 60.0
_MAX_CAUSES: Final = 6


def describe(exc: BaseException) -> str:
    """Say what failed on the way to the server: type names from the outside in, and the system's own words.

    Messages of HTTP libraries quote addresses and headers; those of the operating system and of TLS quote no data.
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
    verify = getattr(exc, "verify_message", None)
    if isinstance(verify, str) and verify:
        return verify
    words = getattr(exc, "strerror", None) if isinstance(exc, OSError) else None
    return words if isinstance(words, str) else ""


_WHAT_TO_DO: Final = {
    401: "does not know this application id (401): check APPLICATION_ID",
    402: "says that the Moesif subscription is not active (402): see the billing page of the Moesif portal",
    403: "refuses this application id (403): check APPLICATION_ID, and BASE_URI if that is a proxy",
}


def _number_of(events: int) -> str:
    return "1 event" if events == 1 else f"{events} events"


class DeliveryLog:
    """Writes the lines of one pipeline.

    Args:
        clock: For the minute between lines.
        address: Where events go, as users know it, without credentials.
    """

    def __init__(self, clock: Clock, address: str = "Moesif") -> None:
        self._clock = clock
        self.address = address
        self.after_fork()

    def after_fork(self) -> None:
        """Start anew in a forked child."""
        self._lock = threading.Lock()
        self._next_line_at: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def failure(self, kind: str, text: str, level: int = logging.WARNING) -> None:
        """Log a failure of `kind`: the first at once, then at most one line a minute with the number left out."""
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

    def not_taken(self, answer: Answer, events: int) -> None:
        """Log that events wait for a server that is not there, or are dropped by one that wants none of ours."""
        if answer.outcome is Outcome.SUSPENDED:
            what = _WHAT_TO_DO.get(answer.status or 0, f"takes no events of ours (status {answer.status})")
            self.failure(
                f"suspended {answer.status}",
                f"{self.address} {what}; events are dropped and counted, it is asked again about once a minute",
                logging.ERROR,
            )
            return
        waiting = f"{_number_of(events)} wait and are sent again" if events > 1 else "1 event waits and is sent again"
        if answer.status is None:
            detail = answer.detail or "no answer"
            self.failure(
                f"unreachable {detail}",
                f"{self.address} did not answer ({detail}): {waiting}; "
                "check BASE_URI, and that this machine (its proxy, its firewall) lets the connection through",
            )
            return
        asked = f" and asks to wait {answer.retry_after_s:.0f} s" if answer.retry_after_s is not None else ""
        self.failure(
            f"status {answer.status}", f"{self.address} answered with status {answer.status}{asked}: {waiting}"
        )

    def refused(self, events: int, status: int | None) -> None:
        """Log that the server refuses events for good."""
        whole = "; it refuses all of them: check BASE_URI" if events > 1 else ""
        self.failure(f"rejected {status}", f"{self.address} refuses {_number_of(events)} (status {status}){whole}")

    def waiting(self, events: int, timeout_s: float) -> None:
        """Log what a shutdown waits for."""
        _logger.info(
            "moesif_otel: waiting up to %.1f s (SHUTDOWN_TIMEOUT) for %s to take %s events",
            timeout_s,
            self.address,
            events,
        )

    def recovered(self) -> None:
        """Log that the server takes events again."""
        _logger.info("moesif_otel: %s takes events again", self.address)

    def batch(self, events: int, status: int | None, duration_s: float, outcome: str) -> None:
        """Log one POST, for `DEBUG`."""
        _logger.debug("moesif_otel: %s events, status %s, %s in %.0f ms", events, status, outcome, duration_s * 1000)

    def ended(self, stats: Stats) -> None:
        """Log at shutdown what was lost, if anything was; what is on disk is no loss."""
        spooled = stats["dropped"].get("spooled", 0)
        lost = {r: n for r, n in stats["dropped"].items() if r not in _NO_LOSS}
        if lost or stats["pending"]:
            reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(lost.items())) or "none"
            _logger.warning(
                "moesif_otel: shut down; of %s events %s were delivered, dropped: %s; pending %s; kept on disk %s",
                stats["accepted"],
                stats["delivered"],
                reasons,
                stats["pending"],
                spooled,
            )
        elif spooled:
            _logger.info("moesif_otel: shut down; %s events are kept on disk for the next process", spooled)


# Left out because somebody asked for it, or not lost.
_NO_LOSS: Final = frozenset({"sampled_out", "masked_away", "skip_unknown", "spooled"})
