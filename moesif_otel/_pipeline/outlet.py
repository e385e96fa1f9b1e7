"""Where a pipeline's calls go: what the processor needs of an exporter that delivers by itself.

Owns: `Outlet`, the base of `MoesifSpanExporter` and `ForwardingExporter`.
Threads: any; see `delivery.worker.Delivery`.
Never: knows what is delivered, or to whom.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from moesif_otel._capture.body import ByteBudget
from moesif_otel._delivery.stats import Ledger
from moesif_otel._guard import Guard

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._delivery.stats import Stats
    from moesif_otel._delivery.worker import Delivery
    from moesif_otel._remote.poller import ConfigPoller
    from moesif_otel.settings import Settings

__all__ = ["EVENT_OVERHEAD_BYTES", "Outlet"]

EVENT_OVERHEAD_BYTES: Final = 4_096
"""What a call without its bodies is taken to hold until it is made ready to be sent: span, headers and objects."""

_EVENTS_SHARE: Final = 8
"""Bodies leave this part of `EVENT_QUEUE_BYTES` to the events themselves: bodies go first, events last."""


class Outlet:
    """A delivery with its bounds and counters. Thread-safe and fork-safe."""

    delivery: Delivery[Any]
    remote: ConfigPoller | None = None
    """What Moesif says back; None where sampling and governance do not apply."""

    def _set_up_outlet(self, settings: Settings) -> None:
        self.settings = settings
        self.guard = Guard()
        self.budget = ByteBudget(settings.event_queue_bytes - settings.event_queue_bytes // _EVENTS_SHARE)
        self._ledger = Ledger()

    @property
    def generation(self) -> int:
        """Grows in a forked child."""
        return self.delivery.generation

    def ensure_started(self) -> None:
        """Start the threads of this process unless they run."""
        self.delivery.ensure_started()

    def wake(self) -> None:
        """Let housekeeping run soon."""
        self.delivery.wake()

    def add_housekeeping(self, run: Callable[[], float | None]) -> None:
        """Have `run` called on the intake thread now and then."""
        self.delivery.add_housekeeping(run)

    def add_after_fork(self, run: Callable[[], None]) -> None:
        """Have `run` called in a forked child before anything else happens there."""
        self.delivery.add_after_fork(run)

    def count(self, name: str) -> None:
        """Count something that is no event's fate."""
        self._ledger.count(name)

    def stats(self) -> Stats:
        """Give the counters: `accepted == delivered + sum(dropped.values()) + pending` at any time."""
        stats = self._ledger.snapshot()
        stats["held_bytes"] = self.budget.held_bytes
        stats["errors"] = self.guard.counts()
        return stats
