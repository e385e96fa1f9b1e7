"""Flush and shutdown: waiting for what was accepted, in time, and accounting for the rest.

Owns: the waits of `force_flush` and `shutdown`, doing the threads' work where there are none, the last settlement.
Threads: callers of flush and shutdown.
Never: outlasts its deadline; says True while anything accepted before is neither delivered nor counted as dropped.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from opentelemetry.instrumentation.utils import suppress_instrumentation

from moesif_otel._delivery.lane import FlushMark, Lane, RawItem
from moesif_otel._delivery.stats import DropReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._capture.body import ByteBudget
    from moesif_otel._delivery.clock import Clock
    from moesif_otel._delivery.disk import Disk
    from moesif_otel._delivery.intake import Intake
    from moesif_otel._delivery.queue import Batch
    from moesif_otel._delivery.report import DeliveryLog
    from moesif_otel._delivery.sender import Sender, Transport
    from moesif_otel._delivery.stats import Ledger
    from moesif_otel._guard import Guard

__all__ = ["Drain"]

T = TypeVar("T")

_JOIN_S: Final = 0.2  # idle threads end at once; one inside a POST is left to end by itself
_SPOOL_SHARE: Final = 0.2  # of the time for a shutdown, kept for writing to disk
_MOST_FOR_SPOOL_S: Final = 1.0
_LEAST_FOR_SPOOL_S: Final = 0.25  # even where the whole time is less: a batch takes a millisecond
_INLINE_WAIT_S: Final = 0.5


class Drain(Generic[T]):
    """Brings a lane to rest.

    Args:
        intake: Prepares what is raw.
        sender: Sends what is ready.
        disk: Keeps what cannot be sent; None: it is dropped.
        transport: Closed at the end.
        on_drop: Told each raw item that is given up.
        ledger: Where everything is counted.
        budget: Where bytes are given back.
        guard: Where errors are counted.
        clock: Time.
        log: For the line at the end.
    """

    def __init__(
        self,
        intake: Intake[T],
        sender: Sender,
        disk: Disk | None,
        transport: Transport,
        *,
        on_drop: Callable[[T], None] | None,
        ledger: Ledger,
        budget: ByteBudget,
        guard: Guard,
        clock: Clock,
        log: DeliveryLog,
    ) -> None:
        self._intake = intake
        self._sender = sender
        self._disk = disk
        self._transport = transport
        self._on_drop = on_drop
        self._ledger = ledger
        self._budget = budget
        self._guard = guard
        self._clock = clock
        self._log = log

    # -- flush

    def flush(self, lane: Lane[T], timeout_s: float) -> bool:
        """Wait for everything accepted so far; gives whether all of it is settled."""
        deadline_s = self._clock.monotonic() + timeout_s
        return self._await(lane, self._mark(lane), deadline_s)

    def _mark(self, lane: Lane[T]) -> FlushMark:
        mark = FlushMark()
        lane.raw.append(mark)
        with lane.changed:
            lane.health.hurry()
            lane.note_change()
        lane.bell.ring()
        return mark

    def _await(self, lane: Lane[T], mark: FlushMark, deadline_s: float) -> bool:
        while True:
            wait_s = None if lane.runs_by_itself else self._work_inline(lane, deadline_s)
            with lane.changed:
                if mark.done:
                    return True
                left_s = deadline_s - self._clock.monotonic()
                if lane.ended:
                    return not self._ledger.pending
                if left_s <= 0 or _is_hopeless(lane, mark, deadline_s):
                    return False
                if wait_s != 0:
                    self._clock.wait(lane.changed, left_s if wait_s is None else min(left_s, wait_s))

    def _work_inline(self, lane: Lane[T], deadline_s: float) -> float:
        """Do a turn of the threads' work in the caller's thread; gives seconds until the next one, 0: at once."""
        with suppress_instrumentation():
            if not lane.intake_runs:
                self._intake.work(lane)
            if lane.sender_count:
                return _INLINE_WAIT_S
            turn = self._sender.turn(lane, deadline_s)
        if turn.wait_s == 0:
            return 0.0
        return _INLINE_WAIT_S if turn.wait_s is None else turn.wait_s

    # -- the end

    def announce(self, lane: Lane[T], timeout_s: float) -> None:
        """Take nothing new, and send what waits now, each POST within the time that is left."""
        with lane.changed:
            lane.closing = True
            lane.limit_at_s = self._clock.monotonic() + timeout_s
            lane.health.hurry()
            lane.note_change()
        lane.bell.ring()

    def shutdown(self, lane: Lane[T], timeout_s: float) -> None:
        """Deliver what can be delivered in time, settle the rest, end the threads."""
        deadline_s = self._clock.monotonic() + timeout_s
        try:
            lane.shutdown_turn.pop()
        except IndexError:
            self._await_end(lane, deadline_s)
            return
        self.announce(lane, timeout_s)
        try:
            if threading.current_thread() not in lane.threads and (self._ledger.pending or lane.raw):
                self._await(lane, self._mark(lane), deadline_s - self._time_for_spool(timeout_s))
        finally:  # also when Ctrl-C ends the wait: what is left is still accounted for
            self._end(lane, deadline_s)

    def _await_end(self, lane: Lane[T], deadline_s: float) -> None:
        with lane.changed:
            while not lane.ended and (left_s := deadline_s - self._clock.monotonic()) > 0:
                self._clock.wait(lane.changed, left_s)

    def _time_for_spool(self, timeout_s: float) -> float:
        return 0.0 if self._disk is None else min(_MOST_FOR_SPOOL_S, timeout_s * _SPOOL_SHARE)

    def _end(self, lane: Lane[T], deadline_s: float) -> None:
        lane.stopped = True
        self.drop_raw(lane)
        with lane.changed:
            # What is being prepared or sent right now is settled here: whoever has it finds out, and does not count.
            in_hand = lane.hand.pop() if lane.hand else None
            batches = lane.queue.settle_all(out_too=True)
        if in_hand is not None:
            self._drop_one(in_hand, let_go=False)
        write_until_s = max(deadline_s, self._clock.monotonic() + _LEAST_FOR_SPOOL_S)
        for batch in batches:
            self._give_up(batch, write_until_s)
        with lane.changed:
            lane.ended = True
            lane.note_change()
        lane.bell.ring()
        self.drop_raw(lane)
        self._join(lane, deadline_s)
        self._guard.run("delivery.close", self._transport.close)
        self._log.ended(self._ledger.snapshot())

    def _join(self, lane: Lane[T], deadline_s: float) -> None:
        until_s = min(deadline_s, self._clock.monotonic() + _JOIN_S)
        for thread in lane.threads:
            left_s = until_s - self._clock.monotonic()
            if left_s > 0 and thread is not threading.current_thread():
                thread.join(left_s)

    def _give_up(self, batch: Batch, write_until_s: float) -> None:
        kept = False
        if self._disk is not None and self._clock.monotonic() < write_until_s:
            kept = bool(self._guard.run("delivery.keep", self._disk.keep, batch))
        if not kept:
            self._ledger.drop(DropReason.SHUTDOWN, len(batch))
        self._budget.release(batch.size_bytes)

    def drop_raw(self, lane: Lane[T]) -> None:
        """Drop everything that has not been prepared. Lock-free."""
        while True:
            try:
                entry = lane.raw.popleft()
            except IndexError:
                return
            if isinstance(entry, RawItem):
                self._drop_one(entry, let_go=True)
            elif isinstance(entry, bytes):
                self._budget.release(len(entry))
                self._ledger.drop(DropReason.SHUTDOWN)

    def _drop_one(self, entry: RawItem[T], *, let_go: bool) -> None:
        self._budget.release(entry.held_bytes)
        self._ledger.drop(DropReason.SHUTDOWN)
        if let_go and self._on_drop is not None:
            self._guard.run("delivery.on_drop", self._on_drop, entry.item)


def _is_hopeless(lane: Lane[Any], mark: FlushMark, deadline_s: float) -> bool:
    # The server has asked for more time than there is, and nothing is on its way: waiting changes nothing.
    return (
        mark.families is not None
        and not lane.queue.has_out
        and lane.health.suspended_for is None
        and lane.health.opens_at() >= deadline_s
    )
