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
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from moesif_otel._delivery import lifecycle
from moesif_otel._delivery.clock import SystemClock
from moesif_otel._delivery.disk import Disk
from moesif_otel._delivery.drain import Drain
from moesif_otel._delivery.health import ServerHealth
from moesif_otel._delivery.intake import Intake
from moesif_otel._delivery.lane import Lane, RawItem, Turn
from moesif_otel._delivery.metrics import export_metrics
from moesif_otel._delivery.queue import BatchQueue, Prepared
from moesif_otel._delivery.report import DeliveryLog
from moesif_otel._delivery.sender import Sender
from moesif_otel._delivery.spool import Spool
from moesif_otel._delivery.stats import DropReason
from moesif_otel._delivery.threads import run_intake, run_sender

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from moesif_otel._capture.body import ByteBudget
    from moesif_otel._delivery.clock import Clock
    from moesif_otel._delivery.sender import Transport
    from moesif_otel._delivery.stats import Ledger
    from moesif_otel._guard import Guard
    from moesif_otel.settings import Settings

__all__ = ["Delivery", "Prepared"]

T = TypeVar("T")

_START_AGAIN_S: Final = 1.0  # after the system refused a thread
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
        on_drop: Told each item that is given up before it was prepared, other than by `submit`, to let go of it.
        clock: Time; the system's by default.
        random: For the jitter; the system's source by default, which forked children do not share.
        measured: Whether its counters are exported as OpenTelemetry metrics.

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
        on_drop: Callable[[T], None] | None = None,
        clock: Clock | None = None,
        random: Random | None = None,
        measured: bool = True,
    ) -> None:
        self._settings = settings
        self._transport = transport
        self._ledger = ledger
        self._budget = budget
        self._guard = guard
        self._clock: Clock = clock or SystemClock()
        self._uniform = (random or SystemRandom()).uniform
        self._log = DeliveryLog(self._clock)
        self._measure: Callable[[float], None] | None = None if measured else _measure_nothing
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
        self._disk = self._make_disk()
        self._intake: Intake[T] = Intake(
            prepare,
            ledger=ledger,
            budget=budget,
            guard=guard,
            clock=self._clock,
            relieve=self._disk.relieve if self._disk else None,
        )
        self._drain: Drain[T] = Drain(
            self._intake,
            self._sender,
            self._disk,
            transport,
            on_drop=on_drop,
            ledger=ledger,
            budget=budget,
            guard=guard,
            clock=self._clock,
            log=self._log,
        )
        self._after_fork_runs: list[Callable[[], object]] = []
        self._generation = 0
        # The lane is made at its first use, not here and not in the at-fork hook: gevent's workers replace locks and
        # threads after the fork, and a lock from before would stop every greenlet of the process.
        self._pid = os.getpid()
        self._slot: dict[str, Lane[T]] = {}
        self._begun: dict[int, object] = {}
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
        lane = self._lane
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
                self._drain.drop_raw(lane)
            return True
        self._budget.release(held_bytes)
        ledger.drop(reason)
        return False

    def submit_prepared(self, payload: bytes) -> bool:
        """Take one event that is JSON already. Cheap, any thread, but not for finalizers; never raises, never blocks.

        The caller has charged nothing for it: its bytes are charged here, until it is settled.

        Returns:
            False when it was dropped (and counted) at once.
        """
        lane = self._lane
        ledger = self._ledger
        ledger.accept()
        if lane.closing:
            ledger.drop(DropReason.SHUTDOWN)
            return False
        if ledger.pending > self._settings.event_queue_size:
            ledger.drop(DropReason.QUEUE_FULL)
            return False
        self._budget.charge(len(payload))
        lane.raw.append(payload)
        if lane.idle or len(lane.raw) == self._settings.batch_size:
            lane.bell.ring()
        if lane.ended:  # a shutdown swept the queue between the two looks
            self._drain.drop_raw(lane)
        return True

    def wake(self) -> None:
        """Nudge the intake to make a pass soon; finalizer-safe."""
        lane = self._slot.get("lane")
        if lane is not None:
            lane.bell.ring()

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
        self._notice_fork()
        return self._generation

    # -- threads and processes ---------------------------------------------------------------------------------------

    def ensure_started(self) -> None:
        """Start the threads of this process if they do not run. Cheap when they do; not for finalizers."""
        lane = self._lane
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
        except BaseException as exc:  # a callback's SystemExit must not end the thread
            self._guard.caught("delivery.intake", exc)
            return _AFTER_ERROR_S

    def sender_turn(self, lane: Lane[T]) -> Turn:
        """One turn of a sender thread."""
        try:
            turn = self._sender.turn(lane)
            return turn if self._disk is None or turn.wait_s is not None else self._disk.replay(lane, turn)
        except BaseException as exc:  # as above
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
        self._begin_here(os.getpid())

    def _new_lane(self) -> Lane[T]:
        queue = BatchQueue(self._settings.batch_size, self._settings.event_batch_timeout)
        return Lane(queue, ServerHealth(self._uniform))

    def _make_disk(self) -> Disk | None:
        directory = self._settings.spool_directory
        # A transport without a binding (another exporter's) has payloads that are not ours to write.
        binding: str | None = getattr(self._transport, "spool_binding", None)
        if directory is None or binding is None:
            return None
        shared: Any = {"ledger": self._ledger, "clock": self._clock}
        spool = Spool(directory, self._settings.spool_max_bytes, binding, guard=self._guard, **shared)
        return Disk(spool, self._settings, self._sender, budget=self._budget, log=self._log, **shared)

    @property
    def _lane(self) -> Lane[T]:
        """The lane of this process."""
        self._notice_fork()
        lane = self._slot.get("lane")
        # Of several threads that come here first, `setdefault` lets one win.
        return lane if lane is not None else self._slot.setdefault("lane", self._new_lane())

    def _notice_fork(self) -> None:
        # A fork without at-fork hooks (uWSGI).
        pid = os.getpid()
        if self._pid != pid:
            mine = object()
            if self._begun.setdefault(pid, mine) is mine:
                self._begin_here(pid)

    def _begin_here(self, pid: int) -> None:
        self._slot = {}
        self._pid = pid
        for part in (self._ledger, self._budget, self._guard, self._transport, self._log, self._disk):
            if part is not None:
                part.after_fork()
        self._generation += 1
        for run in self._after_fork_runs:
            self._guard.run("delivery.after_fork", run)
        self._begun = {}

    # -- flush -------------------------------------------------------------------------------------------------------

    def force_flush(self, timeout_s: float) -> bool:
        """Send what is waiting now, without back-off.

        Args:
            timeout_s: Most seconds to wait.

        Returns:
            True only if everything accepted before the call is delivered, or dropped and counted. From one of our own
            threads (a callback that flushes) always False, at once.
        """
        lane = self._lane
        if threading.current_thread() in lane.threads:
            return False
        self.ensure_started()
        return self._drain.flush(lane, timeout_s)

    # -- the end -----------------------------------------------------------------------------------------------------

    @property
    def exit_timeout_s(self) -> float:
        """Most seconds that a shutdown at exit takes."""
        return self._settings.shutdown_timeout

    def announce_shutdown(self, timeout_s: float) -> None:
        """Begin to end without waiting: nothing new is taken, what waits is sent now."""
        self._drain.announce(self._lane, timeout_s)

    def shutdown(self, timeout_s: float) -> None:
        """Deliver what can be delivered in time; the rest goes to disk, or is dropped as `shutdown`.

        Args:
            timeout_s: Most seconds that it takes.

        Later submits are dropped as `shutdown`. A second call waits for the first one, in the same bounds.
        """
        lane = self._lane
        if self._ledger.pending:
            self.ensure_started()
        self._drain.shutdown(lane, timeout_s)


def _measure_nothing(_: float) -> None:
    pass
