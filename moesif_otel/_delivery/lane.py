"""Everything of one delivery that belongs to one process: a fork replaces it whole.

Owns: `Lane` (queues, locks, health and threads of one process) and `FlushMark`.
Threads: intake, senders, callers of flush and shutdown under `changed`; submitters and finalizers touch `raw`, `bell`
and the flags only, which need no lock.
Never: is shared by parent and child; does work.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from moesif_otel._delivery.clock import Bell

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moesif_otel._delivery.health import ServerHealth
    from moesif_otel._delivery.queue import BatchQueue, Family

__all__ = ["FlushMark", "Lane", "RawItem", "Turn"]

T = TypeVar("T")


class FlushMark:
    """Stands in the raw queue for "everything before me"; done when all of that is settled."""

    __slots__ = ("families",)

    def __init__(self) -> None:
        self.families: Iterable[Family] | None = None

    @property
    def done(self) -> bool:
        """Whether everything that was accepted before the mark is delivered or dropped. Read under the lane's lock."""
        return self.families is not None and all(not family.unsettled for family in self.families)


# Not frozen: made on the request path, and a frozen one takes three times as long. No event is ever shown.
@dataclass(slots=True, repr=False)
class RawItem(Generic[T]):
    """One accepted item before it is prepared, with the bytes that are charged for it and when it came."""

    item: T
    held_bytes: int
    submitted_monotonic_s: float


@dataclass(frozen=True, slots=True)
class Turn:
    """What a sender's turn led to.

    Attributes:
        wait_s: Seconds until the next turn makes sense; 0: at once; None: when something has changed.
        version: The lane's version that this was decided on; if it has changed since, do not wait.
    """

    wait_s: float | None
    version: int


class Lane(Generic[T]):
    """The state of one delivery in one process.

    Args:
        queue: Batches.
        health: What is known of the server.
    """

    __slots__ = (
        "_signals",
        "closing",
        "ended",
        "hand",
        "health",
        "idle",
        "intake_runs",
        "limit_at_s",
        "queue",
        "raw",
        "rejected_in_a_row",
        "replaying",
        "sender_count",
        "shutdown_turn",
        "start_again_at_s",
        "started",
        "starting",
        "stopped",
        "threads",
        "version",
    )

    def __init__(self, queue: BatchQueue, health: ServerHealth) -> None:
        self.raw: deque[RawItem[T] | bytes | FlushMark] = deque()
        self._signals: dict[str, Any] = {}
        # Grows with every change that a waiting thread may want to know of.
        self.version = 0
        self.queue = queue
        self.health = health
        # The item that is being prepared. `list.pop` is atomic: whoever gets it settles it.
        self.hand: list[RawItem[T]] = []
        # Set while the intake sleeps without a time to wake: a submit then rings.
        self.idle = False
        self.rejected_in_a_row = 0
        self.replaying = False
        self.starting = threading.Lock()
        self.start_again_at_s = 0.0
        self.started = False
        self.intake_runs = False
        self.sender_count = 0
        self.threads: list[threading.Thread] = []
        self.shutdown_turn = [True]
        self.closing = False  # nothing new is taken
        self.limit_at_s: float | None = None  # no POST lasts beyond this
        self.stopped = False  # threads end
        self.ended = False  # everything is settled

    # Made at first use, not with the lane: gunicorn's gevent worker patches `threading` after the fork in which a lane
    # is made, and a lock of before that, waited for in a greenlet, would stop the whole worker.

    @property
    def bell(self) -> Bell:
        """Wakes the intake."""
        bell: Bell = self._signals.get("bell") or self._signals.setdefault("bell", Bell())
        return bell

    @property
    def changed(self) -> threading.Condition:
        """Guards queue and state; notified of every change."""
        changed: threading.Condition = self._signals.get("changed") or self._signals.setdefault(
            "changed", threading.Condition()
        )
        return changed

    def note_change(self) -> None:
        """Wake everybody who waits for a change. Call with `changed` held."""
        self.version += 1
        self.changed.notify_all()

    @property
    def runs_by_itself(self) -> bool:
        """Whether threads do the work; else whoever flushes does it."""
        return self.intake_runs and self.sender_count > 0
