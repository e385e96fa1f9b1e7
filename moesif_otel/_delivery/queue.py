"""Batches: how events gather into them, wait, go out, come back and are settled once.

Owns: `Prepared`, `Batch`, `Family` (the pieces of what was one batch) and `BatchQueue`.
Threads: intake and senders, always under the lane's lock; it has no lock of its own.
Never: sends; counts in the ledger; lets a batch be settled twice.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["MAX_BATCH_BYTES", "Batch", "BatchQueue", "Family", "Prepared"]

MAX_BATCH_BYTES: Final = 5_000_000
"""Most bytes of JSON in one POST. Moesif takes 50 MB, its older documentation says far less: stay well below."""

# After a 413 batches are formed smaller, but never so small that the cure costs more than the disease.
_LEAST_BATCH_BYTES: Final = 200_000


@dataclass(frozen=True, slots=True, repr=False)  # no event is ever shown
class Prepared:
    """One event, ready to be sent.

    Attributes:
        payload: Bytes of JSON for Moesif; any object for another transport.
        size_bytes: What it weighs in a batch and in memory.
    """

    payload: Any
    size_bytes: int


class Family:
    """Counts how many events of what was one batch are not settled; its pieces may be in several places."""

    __slots__ = ("unsettled",)

    def __init__(self, events: int) -> None:
        self.unsettled = events


class Batch:
    """Some events that travel together, in the order in which they came.

    Args:
        events: What is sent.
        first_monotonic_s: When its first event was submitted, on the monotonic clock.
        first_time_s: The same on the wall clock.
        family: The batch that it is a piece of; a new one by default.
        stripped: Whether the bodies have been left out.
    """

    __slots__ = ("events", "family", "first_monotonic_s", "first_time_s", "size_bytes", "stripped")

    def __init__(
        self,
        events: list[Prepared],
        first_monotonic_s: float,
        first_time_s: float,
        family: Family | None = None,
        *,
        stripped: bool = False,
    ) -> None:
        self.events = events
        self.size_bytes = sum(event.size_bytes for event in events)
        self.first_monotonic_s = first_monotonic_s
        self.first_time_s = first_time_s
        self.family = Family(len(events)) if family is None else family
        self.stripped = stripped

    def __len__(self) -> int:
        return len(self.events)

    @property
    def payloads(self) -> list[Any]:
        """What the transport is given."""
        return [event.payload for event in self.events]

    def halves(self) -> tuple[Batch, Batch]:
        """Give its two halves, in order; for a batch of two or more."""
        middle = len(self.events) // 2
        first, second = (
            Batch(part, self.first_monotonic_s, self.first_time_s, self.family, stripped=self.stripped)
            for part in (self.events[:middle], self.events[middle:])
        )
        return first, second

    def replaced(self, event: Prepared) -> Batch:
        """Give a batch of one with another form of its event, bodies left out."""
        return Batch([event], self.first_monotonic_s, self.first_time_s, self.family, stripped=True)


class BatchQueue:
    """Batches that form, wait and are out.

    Args:
        max_events: Most events in a batch (`BATCH_SIZE`).
        max_age_s: How long a batch may gather after its first event (`EVENT_BATCH_TIMEOUT`).
    """

    __slots__ = (
        "_families",
        "_open",
        "_open_bytes",
        "_open_since",
        "_out",
        "_ready",
        "max_age_s",
        "max_bytes",
        "max_events",
    )

    def __init__(self, max_events: int, max_age_s: float) -> None:
        self.max_events = max_events
        self.max_age_s = max_age_s
        self.max_bytes = MAX_BATCH_BYTES
        self._open: list[Prepared] = []
        self._open_bytes = 0
        self._open_since = (0.0, 0.0)
        self._ready: deque[Batch] = deque()
        self._out: dict[Batch, None] = {}
        self._families: dict[Family, None] = {}

    def add(self, event: Prepared, submitted_monotonic_s: float, submitted_time_s: float) -> bool:
        """Put an event into the open batch; gives whether a batch became ready."""
        weight = event.size_bytes + 1  # the comma after it
        ready = False
        if self._open and self._open_bytes + weight > self.max_bytes:
            ready = self.close()
        if not self._open:
            self._open_since = (submitted_monotonic_s, submitted_time_s)
        self._open.append(event)
        self._open_bytes += weight
        if len(self._open) >= self.max_events or self._open_bytes >= self.max_bytes:
            ready = self.close()
        return ready

    def due_at(self) -> float | None:
        """Give the (monotonic) time at which the open batch has gathered for long enough; None when there is none."""
        return self._open_since[0] + self.max_age_s if self._open else None

    def close(self) -> bool:
        """Make the open batch ready; gives whether there was one."""
        if not self._open:
            return False
        batch = Batch(self._open, *self._open_since)
        self._open, self._open_bytes = [], 0
        self._families[batch.family] = None
        self._ready.append(batch)
        return True

    @property
    def has_ready(self) -> bool:
        """Whether a batch waits to be sent."""
        return bool(self._ready)

    @property
    def first_weighs(self) -> int:
        """Bytes of JSON of the batch that is sent next; one must be ready."""
        return self._ready[0].size_bytes + len(self._ready[0])

    @property
    def is_empty(self) -> bool:
        """Whether nothing forms, waits or is out; may be read without the lock."""
        return not (self._open or self._ready or self._out)

    @property
    def has_out(self) -> bool:
        """Whether a batch is on its way."""
        return bool(self._out)

    @property
    def events_held(self) -> int:
        """Events in it, in any state."""
        return len(self._open) + sum(map(len, self._ready)) + sum(map(len, self._out))

    def take(self) -> Batch:
        """Take the first ready batch out; it stays known until it is settled or put back."""
        batch = self._ready.popleft()
        self._out[batch] = None
        return batch

    def put_back(self, batch: Batch, *pieces: Batch) -> bool:
        """Put a batch that is out, or what it was cut into, back at the front; False when it was settled meanwhile."""
        if not self._leave(batch):
            return False
        self._ready.extendleft(reversed(pieces or (batch,)))
        return True

    def settle(self, batch: Batch) -> bool:
        """Forget a batch that is out; False when somebody else settled it: then its events are not to be counted."""
        if not self._leave(batch):
            return False
        self._count_down(batch)
        return True

    def settle_all(self, *, out_too: bool) -> list[Batch]:
        """Settle every batch that waits, and those that are out; gives them, oldest first."""
        self.close()
        batches = [*self._out, *self._ready] if out_too else list(self._ready)
        self._ready.clear()
        if out_too:
            self._out.clear()
        for batch in batches:
            self._count_down(batch)
        return batches

    def learn_limit(self, refused_bytes: int) -> None:
        """Form smaller batches after the server has refused one of `refused_bytes` as too large."""
        self.max_bytes = min(self.max_bytes, max(_LEAST_BATCH_BYTES, refused_bytes // 2))

    def unsettled_families(self) -> Iterable[Family]:
        """Give the families that have events in it."""
        return tuple(self._families)

    def _leave(self, batch: Batch) -> bool:
        if batch not in self._out:
            return False
        del self._out[batch]
        return True

    def _count_down(self, batch: Batch) -> None:
        family = batch.family
        family.unsettled -= len(batch)
        if not family.unsettled:
            self._families.pop(family, None)
