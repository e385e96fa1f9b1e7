"""Delivery: what an exporter hands its items to, and what it can rely on.

Owns: `Delivery`: submitting, the threads, flush, shutdown, forks.
Threads: `submit` and `wake` from anywhere, finalizers included; one intake thread and `EVENT_WORKER_COUNT` senders of
its own; flush and shutdown from any thread but those.
Never: blocks or raises in `submit`; outlasts a deadline that it was given; shares anything with a forked child.
"""

from __future__ import annotations

import os
import threading
import weakref
from random import SystemRandom
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from opentelemetry.instrumentation.utils import suppress_instrumentation

from moesif_otel.delivery import lifecycle
from moesif_otel.delivery.clock import SystemClock
from moesif_otel.delivery.health import ServerHealth
from moesif_otel.delivery.intake import Intake
from moesif_otel.delivery.lane import FlushMark, Lane, RawItem, Turn
from moesif_otel.delivery.metrics import export_metrics
from moesif_otel.delivery.queue import Batch, BatchQueue, Prepared
from moesif_otel.delivery.report import DeliveryLog
from moesif_otel.delivery.sender import Sender
from moesif_otel.delivery.stats import DropReason
from moesif_otel.delivery.threads import run_intake, run_sender

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from moesif_otel.capture.body import ByteBudget
    from moesif_otel.delivery.clock import Clock
    from moesif_otel.delivery.sender import Transport
    from moesif_otel.delivery.stats import Ledger
    from moesif_otel.guard import Guard
    from moesif_otel.settings import Settings

__all__ = ["Delivery", "Prepared"]

T = TypeVar("T")

_START_AGAIN_S: Final = 1.0  # after the system refused a thread
_JOIN_S: Final = 0.2  # idle threads end at once; one inside a POST is left to end by itself
_SPOOL_SHARE: Final = 0.2  # of the time for a shutdown, kept for writing to disk
_MOST_FOR_SPOOL_S: Final = 1.0
_INLINE_WAIT_S: Final = 0.5
_AFTER_ERROR_S: Final = 1.0


class Delivery(Generic[T]):
    """Delivers items: bounded, in batches, with retry, each one counted.

    Args:
        settings: Bounds, sizes and times.
        prepare: Makes an item ready to be sent, or says why it is dropped; runs on the intake thread. When it raises,
            the item is dropped as `not_convertible`.
        transport: Where batches go.
        without_bodies: For a 413: gives the same payload without its bodies; None when there are none.
        ledger: Where everything is counted. `submit` accepts: nobody else does that for an item.
        budget: Where bytes are held and given back.
        guard: Where errors are counted.
        clock: Time; the system's by default.
        random: For the jitter; the system's source by default, which forked children do not share.

    Thread-safe.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        prepare: Callable[[T], Prepared | DropReason],
        transport: Transport,
        without_bodies: Callable[[bytes], bytes] | None = None,
        ledger: Ledger,
        budget: ByteBudget,
        guard: Guard,
        clock: Clock | None = None,
        random: Random | None = None,
    ) -> None:
        self._settings = settings
        self._transport = transport
        self._ledger = ledger
        self._budget = budget
        self._guard = guard
        self._clock: Clock = clock or SystemClock()
        self._uniform = (random or SystemRandom()).uniform
        self._log = DeliveryLog(self._clock)
        self._measure: Callable[[float], None] | None = None
        self._sender = Sender(
            transport,
            settings.export_timeout,
            without_bodies=without_bodies,
            ledger=ledger,
            budget=budget,
            guard=guard,
            clock=self._clock,
            log=self._log,
            on_duration=self._note_duration,
        )
        self._intake: Intake[T] = Intake(
            prepare, ledger=ledger, budget=budget, guard=guard, clock=self._clock, relieve=self._relieve
        )
        self._after_fork_runs: list[Callable[[], object]] = []
        self._generation = 0
        self._lanes: dict[int, Lane[T]] = {}
        self._lane = self._new_lane(os.getpid())
        lifecycle.watch(self)

    # -- taking items ------------------------------------------------------------------------------------------------

    def submit(self, item: T, held_bytes: int) -> bool:
        """Take one item for delivery. Lock-free, finalizer-safe; never raises, never blocks.

        Args:
            item: Anything that `prepare` takes.
            held_bytes: What the caller has charged to the budget for it; given back when it is dropped, replaced by
                the size of its payload when it is prepared.

        Returns:
            False when it was dropped (and counted) at once.
        """
        lane = self._lane_here()
        ledger = self._ledger
        ledger.accept()
        if lane.closing:
            reason = DropReason.SHUTDOWN
        elif ledger.pending > self._settings.event_queue_size:
            reason = DropReason.QUEUE_FULL
        else:
            lane.raw.append(RawItem(item, held_bytes, self._clock.monotonic()))
            if lane.idle or len(lane.raw) == self._settings.batch_size:
                lane.bell.ring()
            if lane.ended:  # a shutdown swept the queue between the two looks
                self._drop_raw(lane)
            return True
        self._budget.release(held_bytes)
        ledger.drop(reason)
        return False

    def wake(self) -> None:
        """Nudge the intake to make a pass soon; finalizer-safe."""
        self._lane.bell.ring()

    def add_housekeeping(self, run: Callable[[], float | None]) -> None:
        """Have `run` called on the intake thread at each pass.

        Args:
            run: Returns the seconds until it wants to be called again, or None for no wish; what it raises is counted.
                While anything is pending it is called every half second at least.
        """
        self._intake.housekeeping.append(run)

    def add_after_fork(self, run: Callable[[], object]) -> None:
        """Have `run` called in a forked child before anything else of ours happens there."""
        self._after_fork_runs.append(run)

    @property
    def generation(self) -> int:
        """Grows in a forked child, also where no at-fork hook ran."""
        self._lane_here()
        return self._generation

    # -- threads and processes ---------------------------------------------------------------------------------------

    def ensure_started(self) -> None:
        """Start the threads of this process if they do not run. Cheap when they do; not for finalizers."""
        lane = self._lane_here()
        if lane.started or lane.closing:
            return
        if self._clock.monotonic() < lane.start_again_at_s or not lane.starting.acquire(blocking=False):
            return
        try:
            if not lane.started:
                self._start(lane)
        finally:
            lane.starting.release()

    def _start(self, lane: Lane[T]) -> None:
        reference = weakref.ref(self, lambda _: lane.bell.ring())
        try:
            if not lane.intake_runs:
                self._start_thread(lane, run_intake, "moesif-otel-intake", reference)
                lane.intake_runs = True
            while lane.sender_count < self._settings.event_worker_count:
                self._start_thread(lane, run_sender, f"moesif-otel-sender-{lane.sender_count + 1}", reference)
                lane.sender_count += 1
            lane.started = True
        except RuntimeError as exc:
            # The process ends (Python 3.12 and later), or may have no more threads: flush and shutdown do the work.
            self._guard.caught("delivery.start_thread", exc)
            lane.start_again_at_s = self._clock.monotonic() + _START_AGAIN_S
        if self._measure is None:
            self._measure = self._guard.run("delivery.metrics", export_metrics, self, self._ledger) or _measure_nothing

    def _start_thread(
        self, lane: Lane[T], target: Callable[..., None], name: str, reference: weakref.ref[Delivery[T]]
    ) -> None:
        thread = threading.Thread(target=target, args=(reference, lane, self._clock), name=name, daemon=True)
        lane.threads.append(thread)
        try:
            thread.start()
        except BaseException:
            lane.threads.remove(thread)
            raise

    def intake_turn(self, lane: Lane[T]) -> float | None:
        """One pass of the intake thread; gives seconds until the next one."""
        try:
            return self._intake.work(lane)
        except Exception as exc:
            self._guard.caught("delivery.intake", exc)
            return _AFTER_ERROR_S

    def sender_turn(self, lane: Lane[T]) -> Turn:
        """One turn of a sender thread."""
        try:
            return self._sender.turn(lane)
        except Exception as exc:
            self._guard.caught("delivery.sender", exc)
            return Turn(_AFTER_ERROR_S, lane.version)

    def has_work(self, lane: Lane[T]) -> bool:
        """Whether something waits that only our threads will bring to an end."""
        return bool(lane.raw or not lane.queue.is_empty)

    def _note_duration(self, duration_s: float) -> None:
        if self._measure is not None:
            self._measure(duration_s)

    def after_fork(self) -> None:
        """Begin anew in a forked child: what the parent holds is the parent's."""
        self._begin_here(self._new_lane(os.getpid()))

    def _new_lane(self, pid: int) -> Lane[T]:
        queue = BatchQueue(self._settings.batch_size, self._settings.event_batch_timeout)
        return Lane(pid, queue, ServerHealth(self._uniform))

    def _lane_here(self) -> Lane[T]:
        lane = self._lane
        pid = os.getpid()
        if lane.pid == pid:
            return lane
        # A fork without at-fork hooks (uWSGI). Of several threads that come here first, `setdefault` lets one win.
        fresh = self._new_lane(pid)
        if self._lanes.setdefault(pid, fresh) is fresh:
            self._begin_here(fresh)
        return self._lanes[pid]

    def _begin_here(self, lane: Lane[T]) -> None:
        for part in (self._ledger, self._budget, self._guard, self._transport, self._log):
            part.after_fork()
        self._generation += 1
        for run in self._after_fork_runs:
            self._guard.run("delivery.after_fork", run)
        self._lanes = {lane.pid: lane}
        self._lane = lane

    # -- flush -------------------------------------------------------------------------------------------------------

    def force_flush(self, timeout_s: float) -> bool:
        """Send what is waiting now, without back-off.

        Args:
            timeout_s: Most seconds to wait.

        Returns:
            True only if everything accepted before the call is delivered, or dropped and counted. From one of our own
            threads (a callback that flushes) always False, at once.
        """
        lane = self._lane_here()
        deadline_s = self._clock.monotonic() + timeout_s
        if threading.current_thread() in lane.threads:
            return False
        self.ensure_started()
        mark = self._mark(lane)
        return self._await(lane, mark, deadline_s)

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
            wait_s: float | None = None
            if not lane.runs_by_itself:
                wait_s = self._work_inline(lane, deadline_s)
            with lane.changed:
                if mark.done:
                    return True
                left_s = deadline_s - self._clock.monotonic()
                if left_s <= 0 or lane.ended or self._is_hopeless(lane, mark, deadline_s):
                    return False
                if wait_s != 0:
                    self._clock.wait(lane.changed, left_s if wait_s is None else min(left_s, wait_s))

    def _is_hopeless(self, lane: Lane[T], mark: FlushMark, deadline_s: float) -> bool:
        # The server has asked for more time than there is, and nothing is on its way: waiting changes nothing.
        health = lane.health
        return (
            mark.families is not None
            and not lane.queue.has_out
            and health.suspended_for is None
            and health.opens_at() >= deadline_s
        )

    def _work_inline(self, lane: Lane[T], deadline_s: float) -> float | None:
        """Do one turn of the threads' work in the caller's thread; gives seconds until the next one, 0: at once."""
        with suppress_instrumentation():
            if not lane.intake_runs:
                self._intake.work(lane)
            if lane.sender_count:
                return _INLINE_WAIT_S
            turn = self._sender.turn(lane, deadline_s)
        with lane.changed:
            if turn.wait_s is not None and (turn.wait_s == 0 or turn.version != lane.version):
                return 0.0
        return min(_INLINE_WAIT_S, turn.wait_s) if turn.wait_s else _INLINE_WAIT_S

    # -- the end -----------------------------------------------------------------------------------------------------

    @property
    def exit_timeout_s(self) -> float:
        """Most seconds that a shutdown at exit takes."""
        return self._settings.shutdown_timeout

    def announce_shutdown(self, timeout_s: float) -> None:
        """Begin to end without waiting: nothing new is taken, what waits is sent now."""
        lane = self._lane_here()
        with lane.changed:
            lane.closing = True
            lane.limit_at_s = self._clock.monotonic() + timeout_s
            lane.health.hurry()
            lane.note_change()
        lane.bell.ring()

    def shutdown(self, timeout_s: float) -> None:
        """Deliver what can be delivered in time; the rest goes to disk, or is dropped as `shutdown`.

        Args:
            timeout_s: Most seconds that it takes.

        Later submits are dropped as `shutdown`. A second call waits for the first one, in the same bounds.
        """
        lane = self._lane_here()
        deadline_s = self._clock.monotonic() + timeout_s
        try:
            lane.shutdown_turn.pop()
        except IndexError:
            self._await_end(lane, deadline_s)
            return
        if self._ledger.pending:
            self.ensure_started()
        self.announce_shutdown(timeout_s)
        try:
            if threading.current_thread() not in lane.threads:
                self._await(lane, self._mark(lane), deadline_s - self._time_for_spool(timeout_s))
        finally:  # also when Ctrl-C ends the wait: what is left is still counted
            self._end(lane, deadline_s)

    def _await_end(self, lane: Lane[T], deadline_s: float) -> None:
        with lane.changed:
            while not lane.ended and (left_s := deadline_s - self._clock.monotonic()) > 0:
                self._clock.wait(lane.changed, left_s)

    def _time_for_spool(self, timeout_s: float) -> float:
        return 0.0

    def _end(self, lane: Lane[T], deadline_s: float) -> None:
        lane.stopped = True
        self._drop_raw(lane)
        with lane.changed:
            if lane.hand:
                self._drop_one(lane.hand.pop())
            batches = lane.queue.settle_all(out_too=True)
        for batch in batches:
            self._give_up(batch)
        with lane.changed:
            lane.ended = True
            lane.note_change()
        lane.bell.ring()
        self._drop_raw(lane)
        join_until_s = min(deadline_s, self._clock.monotonic() + _JOIN_S)
        for thread in lane.threads:
            left_s = join_until_s - self._clock.monotonic()
            if left_s > 0 and thread is not threading.current_thread():
                thread.join(left_s)
        self._guard.run("delivery.close", self._transport.close)
        self._log.ended(self._ledger.snapshot())

    def _give_up(self, batch: Batch) -> None:
        self._ledger.drop(DropReason.SHUTDOWN, len(batch))
        self._budget.release(batch.size_bytes)

    def _drop_raw(self, lane: Lane[T]) -> None:
        while True:
            try:
                entry = lane.raw.popleft()
            except IndexError:
                return
            if isinstance(entry, RawItem):
                self._drop_one(entry)

    def _drop_one(self, entry: RawItem[T]) -> None:
        self._budget.release(entry.held_bytes)
        self._ledger.drop(DropReason.SHUTDOWN)

    # -- memory and disk ---------------------------------------------------------------------------------------------

    def _relieve(self, lane: Lane[T]) -> None:
        pass


def _measure_nothing(_: float) -> None:
    pass
