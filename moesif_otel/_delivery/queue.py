"""Batches: how events gather into them, wait, go out, come back and are settled once.

Used by intake and senders, always under the process state's lock; it has none of its own.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final, NamedTuple

# Most bytes of JSON in one POST. Moesif takes 50 MB, its older documentation says far less: stay well below.
MAX_BATCH_BYTES: Final = 5_000_000

# A batch that has this much is sent, also where `BATCH_SIZE` events are not together: what waits is memory, and beyond
# some hundred KB a POST costs no less for each byte.
_FULL_BATCH_BYTES: Final = 1_000_000
# After a 413 batches are formed smaller, but not below this: many small POSTs would cost more than they save.
_LEAST_BATCH_BYTES: Final = 200_000
# … and with each delivered batch a little larger again: some forty to twice the size.
_GROWTH: Final = 64


class Prepared(NamedTuple):
    """One event, ready to be sent."""

    payload: Any  # bytes of JSON for Moesif; any object for another transport
    size_bytes: int  # what it weighs in a batch and in memory

    def __repr__(self) -> str:  # crash reporters show local variables
        return "<Prepared>"


class Family:
    """Counts how many events of what was one batch are not settled; its pieces may be in several places."""

    __slots__ = ("sequence", "unsettled")

    def __init__(self, events: int) -> None:
        self.unsettled = events
        self.sequence = 0


class Batch:
    """Some events that travel together, in the order in which they came."""

    def __init__(self, events: list[Prepared], first_time_s: float) -> None:
        self.events = events
        self.size_bytes = sum([event.size_bytes for event in events])
        self.first_time_s = first_time_s  # when its first event came, seconds since the epoch
        self.family = Family(len(events))  # shared by all pieces of one batch
        self.origin: Any = None  # the file that it comes from; None for fresh events
        self.stripped = False  # the bodies have been left out
        self.failures = 0  # how often the server failed on it
        self.strikes = 0  # how often it did so and took another batch since the time before
        self.deliveries_before = 0  # what the queue's `deliveries` was at its last failure

    def __len__(self) -> int:
        return len(self.events)

    @property
    def payloads(self) -> list[Any]:
        """The batch as the transport gets it."""
        return [event.payload for event in self.events]

    def halves(self) -> tuple[Batch, Batch]:
        """Return its two halves, in order; for a batch of two or more."""
        middle = len(self.events) // 2
        return self._piece(self.events[:middle]), self._piece(self.events[middle:])

    def replaced(self, event: Prepared) -> Batch:
        """Return a batch of one with another form of its event, bodies left out."""
        piece = self._piece([event])
        piece.stripped = True
        return piece

    def _piece(self, events: list[Prepared]) -> Batch:
        piece = Batch(events, self.first_time_s)
        piece.family, piece.origin, piece.stripped = self.family, self.origin, self.stripped
        piece.strikes, piece.deliveries_before = self.strikes, self.deliveries_before
        return piece


class BatchQueue:
    """Batches that form, wait and are out: at most `BATCH_SIZE` events each, which gather for `EVENT_BATCH_TIMEOUT`."""

    def __init__(self, max_events: int, max_age_s: float) -> None:
        self.max_events = max_events
        self.max_age_s = max_age_s
        self.max_bytes = _FULL_BATCH_BYTES
        self.deliveries = 0  # grows with each batch that the server took
        self.last_sequence = 0  # of the youngest family so far
        self._open: list[Prepared] = []
        self._open_bytes = 0
        self._open_since_s = 0.0  # monotonic
        self._open_time_s = 0.0
        self._ready: deque[Batch] = deque()
        self._replayed: deque[Batch] = deque()  # from disk: sent when nothing fresh is ready
        self._out: dict[Batch, None] = {}
        self._families: dict[Family, None] = {}

    def add(self, event: Prepared, now_monotonic_s: float, now_s: float) -> bool:
        """Put an event into the open batch; return whether a batch became ready."""
        weight = event.size_bytes + 1  # the comma after it
        ready = False
        if self._open and self._open_bytes + weight > self.max_bytes:
            ready = self.close()
        if not self._open:
            self._open_since_s, self._open_time_s = now_monotonic_s, now_s
        self._open.append(event)
        self._open_bytes += weight
        if len(self._open) >= self.max_events or self._open_bytes >= self.max_bytes:
            ready = self.close()
        return ready

    def due_at(self) -> float | None:
        """Return the (monotonic) time at which the open batch has gathered for long enough, if there is one."""
        return self._open_since_s + self.max_age_s if self._open else None

    def close(self) -> bool:
        """Make the open batch ready; return whether there was one."""
        if not self._open:
            return False
        batch = Batch(self._open, self._open_time_s)
        self._open, self._open_bytes = [], 0
        self.last_sequence += 1
        batch.family.sequence = self.last_sequence
        self._families[batch.family] = None
        self._ready.append(batch)
        return True

    def add_replayed(self, batch: Batch) -> None:
        """Have a batch from disk sent when nothing fresh is ready; no flush waits for it."""
        self._replayed.append(batch)

    @property
    def has_fresh(self) -> bool:
        """Tell whether a batch of this process's own events waits to be sent."""
        return bool(self._ready)

    @property
    def next(self) -> Batch | None:
        """The batch that is sent next."""
        waiting = self._ready or self._replayed
        return waiting[0] if waiting else None

    @property
    def is_empty(self) -> bool:
        """Tell whether nothing fresh forms or waits, and nothing is out; may be read without the lock."""
        return not (self._open or self._ready or self._out)

    @property
    def has_out(self) -> bool:
        """Tell whether a batch is on its way."""
        return bool(self._out)

    def take(self) -> Batch:
        """Take the next batch out; it stays known until it is settled or put back."""
        batch = (self._ready or self._replayed).popleft()
        self._out[batch] = None
        return batch

    def put_back(self, batch: Batch, *pieces: Batch, last: bool = False) -> bool:
        """Put a batch that is out, or what it was cut into, back in front (or behind all others).

        Return False when somebody else settled it meanwhile.
        """
        if not self._leave(batch):
            return False
        line = self._ready if batch.origin is None else self._replayed
        if last:
            line.extend(pieces or (batch,))
        else:
            line.extendleft(reversed(pieces or (batch,)))
        return True

    def settle(self, batch: Batch, *, delivered: bool = False) -> bool:
        """Forget a batch that is out; return False when somebody else has: then its events are not to be counted."""
        if delivered:
            self.deliveries += 1
            if self.max_bytes < _FULL_BATCH_BYTES:
                self.max_bytes = min(_FULL_BATCH_BYTES, self.max_bytes + self.max_bytes // _GROWTH)
        if not self._leave(batch):
            return False
        self._count_down(batch)
        return True

    def settle_all(self) -> list[Batch]:
        """Settle every fresh batch, those that are out too; return them, oldest first."""
        self.close()
        batches = [batch for batch in (*self._out, *self._ready) if batch.origin is None]
        self._ready.clear()
        for batch in batches:
            self._out.pop(batch, None)
            self._count_down(batch)
        return batches

    def take_replayed(self) -> list[Batch]:
        """Take out what is left of a file; nothing while a piece of it is on its way."""
        if any(batch.origin is not None for batch in self._out):
            return []
        left = list(self._replayed)
        self._replayed.clear()
        return left

    def learn_limit(self, refused_bytes: int) -> None:
        """Form smaller batches after the server has refused one of `refused_bytes` as too large."""
        self.max_bytes = min(self.max_bytes, max(_LEAST_BATCH_BYTES, refused_bytes // 2))

    def is_settled(self, sequence: int) -> bool:
        """Tell whether every family up to that number is settled."""
        oldest = next(iter(self._families), None)
        return oldest is None or oldest.sequence > sequence

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
