"""From raw items to batches of compact payloads, and the housekeeping between.

Owns: the intake's pass: prepare, charge, batch, housekeeping, spilling to disk when memory is nearly full.
Threads: one intake thread a lane; the thread of a caller of flush or shutdown when there is none.
Never: sends; waits; loses an item whose preparation raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from moesif_otel._delivery.lane import FlushMark, Lane, RawItem
from moesif_otel._delivery.queue import Prepared
from moesif_otel._delivery.stats import DropReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._capture.body import ByteBudget
    from moesif_otel._delivery.clock import Clock
    from moesif_otel._delivery.stats import Ledger
    from moesif_otel._guard import Guard

__all__ = ["GATHER_S", "Intake"]

T = TypeVar("T")

GATHER_S: Final = 0.1
"""How long the intake lets items gather after a pass that had some: a wake-up for each would take the interpreter
away from the requests, and captured objects are held a little longer only."""

_WHILE_PENDING_S: Final = 0.5  # housekeeping runs at least this often while anything is pending


class Intake(Generic[T]):
    """Prepares items and forms batches.

    Args:
        prepare: Makes one item ready, or says why it is dropped.
        ledger: Where drops are counted.
        budget: Where the payload is charged in place of the item.
        guard: Where errors of `prepare` and of housekeeping are counted.
        clock: Time.
        relieve: Called in each pass; writes batches to disk when memory is nearly full.
    """

    def __init__(
        self,
        prepare: Callable[[T], Prepared | DropReason],
        *,
        ledger: Ledger,
        budget: ByteBudget,
        guard: Guard,
        clock: Clock,
        relieve: Callable[[Lane[Any]], None] | None,
    ) -> None:
        self._prepare = prepare
        self._ledger = ledger
        self._budget = budget
        self._guard = guard
        self._clock = clock
        self._relieve = relieve
        self.housekeeping: list[Callable[[], float | None]] = []

    def work(self, lane: Lane[T]) -> float | None:
        """Make one pass over what is there.

        Returns:
            Seconds until the next pass makes sense; 0: at once; None: when an item comes.
        """
        took = self._take_raw(lane)
        wishes = [self._wish_of(run) for run in tuple(self.housekeeping)]
        with lane.changed:
            due_at_s = lane.queue.due_at()
            if due_at_s is not None and (lane.closing or due_at_s <= self._clock.monotonic()):
                lane.queue.close()
                lane.note_change()
                due_at_s = None
        if self._relieve is not None:
            self._guard.run("delivery.relieve", self._relieve, lane)
        if due_at_s is not None:
            wishes.append(due_at_s - self._clock.monotonic())
        if took:
            wishes.append(GATHER_S)
        if self._ledger.pending:
            wishes.append(_WHILE_PENDING_S)
        return min((max(0.0, wish) for wish in wishes if wish is not None), default=None)

    def _wish_of(self, run: Callable[[], float | None]) -> float | None:
        return self._guard.run("delivery.housekeeping", run)

    def _take_raw(self, lane: Lane[T]) -> bool:
        raw = lane.raw
        # Only what is there now: a producer that is faster than we are must not keep batches from closing.
        count = len(raw)
        for _ in range(count):
            try:
                entry = raw.popleft()
            except IndexError:  # shutdown has taken the rest
                break
            if isinstance(entry, FlushMark):
                with lane.changed:
                    lane.queue.close()
                    entry.families = lane.queue.unsettled_families()
                    lane.note_change()
            elif isinstance(entry, bytes):
                self._add_prepared(lane, entry)
            else:
                self._take(lane, entry)
        return bool(count)

    def _add_prepared(self, lane: Lane[T], payload: bytes) -> None:
        with lane.changed:
            if not lane.stopped:
                if lane.queue.add(Prepared(payload, len(payload)), self._clock.monotonic(), self._clock.time()):
                    lane.note_change()
                return
        self._budget.release(len(payload))
        self._ledger.drop(DropReason.SHUTDOWN)

    def _take(self, lane: Lane[T], entry: RawItem[T]) -> None:
        lane.hand = [entry]
        result: Any = DropReason.NOT_CONVERTIBLE
        try:
            result = self._prepare(entry.item)
        except BaseException as exc:
            self._guard.caught("delivery.prepare", exc)
            # A mask that calls `sys.exit` must not end our thread: it is caught there, and passes in anybody else's.
            if not isinstance(exc, Exception):
                raise
        finally:
            self._settle_or_add(lane, entry, result)

    def _settle_or_add(self, lane: Lane[T], entry: RawItem[T], result: Any) -> None:
        with lane.changed:
            try:
                lane.hand.pop()
            except IndexError:
                return  # shutdown did not wait for it, and has counted it
            if lane.stopped:  # shutdown looked just before the item came into our hand
                result = DropReason.SHUTDOWN
            if isinstance(result, Prepared):
                self._budget.charge(result.size_bytes - entry.held_bytes)
                age_s = self._clock.monotonic() - entry.submitted_monotonic_s
                if lane.queue.add(result, entry.submitted_monotonic_s, self._clock.time() - age_s):
                    lane.note_change()
                return
        self._budget.release(entry.held_bytes)
        self._ledger.drop(result if isinstance(result, DropReason) else DropReason.NOT_CONVERTIBLE)
