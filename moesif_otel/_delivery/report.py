"""What is logged about delivery, and how often.

Owns: the first line of each kind in full, then one line a minute at most; the line at shutdown.
Threads: senders, intake and whoever calls `shutdown`.
Never: logs a body, a header, an identity, a credential, the application id, or an exception's message as it stands.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from moesif_otel._delivery.clock import Clock
    from moesif_otel._delivery.stats import Stats

__all__ = ["DeliveryLog", "describe"]

_logger: Final = logging.getLogger(__name__)

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


class DeliveryLog:
    """Writes the lines of one pipeline.

    Args:
        clock: For the minute between lines.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
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

    def recovered(self) -> None:
        """Log that the server takes events again."""
        _logger.info("moesif_otel: Moesif takes events again")

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
