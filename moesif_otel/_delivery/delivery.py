"""Delivery: what a sink hands its items to, and what it can rely on.

One intake thread prepares items and forms batches, `EVENT_WORKER_COUNT` senders send them, and a poller asks for
configuration and rules. All are daemons that start at the first call of a process and hold the delivery weakly: one
that nobody has any more ends, with its threads, when nothing is pending. Where no thread can be started (a process that
ends, on Python 3.12 and later) flush and shutdown do the work in their caller's thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from opentelemetry.instrumentation.utils import suppress_instrumentation

from moesif_otel._delivery.clock import Clock
from moesif_otel._delivery.metrics import export_metrics
from moesif_otel._delivery.process import (
    FORKS_RUN_HOOKS,
    LIVE_DELIVERIES,
    Collaborators,
    FlushMark,
    ProcessState,
    Turn,
    watch_child_exit,
)
from moesif_otel._delivery.queue import BatchQueue, Prepared
from moesif_otel._delivery.report import DeliveryLog
from moesif_otel._delivery.sender import Sender
from moesif_otel._delivery.stats import DropReason, Ledger
from moesif_otel._guard import LATE_IMPORTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._capture.body import ByteBudget
    from moesif_otel._delivery.process import Transport
    from moesif_otel._delivery.spool import Disk
    from moesif_otel._guard import Guard
    from moesif_otel.settings import Settings

T = TypeVar("T")

# How long the intake lets unprepared items gather: a wake-up for each would take the interpreter away from the
# requests, and an item that is prepared after others like it costs half as much (the processor's caches are warm).
_GATHER_S: Final = 0.1
# The intake prepares for so long at a time, then sleeps: a request waits no longer than that for the interpreter, where
# it would wait for a whole switch interval (5 ms).
_SLICE_S: Final = 0.001
_PAUSE_S: Final = 0.000_1
_WAKE_AT_ITEMS: Final = 200  # unprepared ones beyond this do not gather any longer
_WAKE_AT_BYTES: Final = 512 * 1024  # prepared payloads beyond this are batched at once
_AGAIN_S: Final = 1.0  # after the system refused a thread, after an error of ours; to see whether all is settled
_JOIN_S: Final = 0.2  # idle threads end at once; one inside a POST is left to end by itself
_INLINE_WAIT_S: Final = 0.5
_POLL_AGAIN_S: Final = 60.0  # after an error of ours
_SAY_AFTER_S: Final = 1.0  # what a shutdown waits for
_SPOOL_SHARE: Final = 0.2  # of the time for a shutdown, kept for writing to disk
_MOST_FOR_SPOOL_S: Final = 1.0
_LEAST_FOR_SPOOL_S: Final = 0.25  # even where the whole time is less: a batch takes a millisecond


class Delivery(Generic[T]):
    """Delivers items: bounded, in batches, with retry, each one counted in `ledger`.

    Args:
        prepare: Makes an item ready to be sent, or says why it is dropped; runs on the intake thread. When it raises,
            the item is dropped as `not_convertible`.
        transport, budget, guard: Where batches go, what counts the bytes held, what counts errors.
        without_bodies: For a 413: returns the same payload without its bodies; None when there are none.
        on_drop: Told each item that is given up before it was prepared, other than by `submit`, to release it.
        poll: Asks for configuration and rules, on the poller's thread; returns the seconds until it is due again.
        clock: Time; the system's by default.
        measured: Whether its counters are exported as OpenTelemetry metrics.

    Thread-safe. In a forked child it begins anew: what the parent holds is the parent's. `submit`, `accept` and
    `submit_accepted` never wait and never raise.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        prepare: Callable[[T], Prepared | DropReason],
        transport: Transport,
        budget: ByteBudget,
        guard: Guard,
        without_bodies: Callable[[bytes], bytes] | None = None,
        on_drop: Callable[[T], None] | None = None,
        poll: Callable[[], float] | None = None,
        clock: Clock | None = None,
        measured: bool = True,
    ) -> None:
        self.settings = settings
        self.guard = guard
        self.budget = budget
        self.ledger = Ledger(budget=budget, guard=guard)
        self._prepare = prepare
        self._on_drop = on_drop
        self._poll = poll
        self._is_measured = measured
        self._transport = transport
        self._clock = clock or Clock()
        self._log = DeliveryLog(self._clock, transport.address, transport.setting)
        parts = Collaborators(settings, transport, self.ledger, budget, guard, self._clock, self._log)
        self._after_fork_runs: list[Callable[[], object]] = [
            part.after_fork for part in (guard, self.ledger, budget, transport, self._log)
        ]
        self._disk: Disk | None = None
        binding = transport.spool_binding
        if settings.spool_directory is not None and binding is not None:
            with LATE_IMPORTS:  # most services have none
                from moesif_otel._delivery.spool import Disk as SpoolDisk
            self._disk = SpoolDisk(settings.spool_directory, binding, parts)
            self._after_fork_runs.append(self._disk.after_fork)
        self._sender = Sender(parts, self._disk, without_bodies)
        self._housekeeping: list[Callable[[], float | None]] = []
        self._closed = False
        # The state is made at its first use, not here and not in the at-fork hook: see `ProcessState`.
        self._slot: dict[str, ProcessState[T]] = {}
        self._pid = os.getpid()
        self._begun: dict[int, object] = {}
        LIVE_DELIVERIES.add(self)

    # -- taking items

    def submit(self, item: T, held_bytes: int) -> bool:
        """Take one item for `prepare`; return False when it was dropped (and counted) at once. Finalizer-safe.

        The caller has charged `held_bytes` to the budget for it. They are given back when it is dropped, and replaced
        by the size of its payload when it is prepared.
        """
        if not self.accept():
            self.budget.release(held_bytes)
            return False
        state = self._state
        submitted = state.submitted
        submitted.append((item, held_bytes))
        if not state.intake_gathers:
            state.intake_gathers = True
            state.keeper = self
            state.wake_intake.set()
        elif len(submitted) == _WAKE_AT_ITEMS:
            state.wake()
        if state.ended:  # a shutdown swept the queue between the two looks
            self._drop_submitted(state)
        return True

    def submit_accepted(self, payload: bytes) -> None:
        """Take an event that is JSON already, and that `accept` has let in. Not for finalizers.

        The caller has charged nothing for it: its bytes are charged here, until it is settled.
        """
        state = self._state
        size_bytes = len(payload)
        self.budget.charge(size_bytes)
        submitted = state.submitted
        submitted.append(payload)
        state.submitted_bytes += size_bytes
        if state.intake_idle or len(submitted) == self.settings.batch_size or state.submitted_bytes > _WAKE_AT_BYTES:
            state.submitted_bytes = 0
            state.intake_idle = False
            state.keeper = self
            state.wake()
        if state.ended:  # as above
            self._drop_submitted(state)

    def accept(self) -> bool:
        """Take responsibility for one event; return False when it was dropped (and counted) at once."""
        ledger = self.ledger
        state = self._state  # first: where no at-fork hook runs it begins the counters of a forked child anew
        ledger.accept()
        if state.closing:
            ledger.drop(DropReason.SHUTDOWN)
            return False
        if ledger.has_pending(self.settings.event_queue_size + 1):
            ledger.drop(DropReason.QUEUE_FULL)
            return False
        return True

    # -- processes

    @property
    def _state(self) -> ProcessState[T]:
        """The state of this process."""
        if not FORKS_RUN_HOOKS:
            self.notice_fork()
        state = self._slot.get("state")
        if state is None:
            queue = BatchQueue(self.settings.batch_size, self.settings.event_batch_timeout)
            # Of several threads that come here first, `setdefault` lets one win.
            state = self._slot.setdefault("state", ProcessState(queue, closed=self._closed))
        return state

    def notice_fork(self) -> None:
        """Begin anew in a forked child where no at-fork hook ran."""
        pid = os.getpid()
        if self._pid != pid:
            mine = object()
            if self._begun.setdefault(pid, mine) is mine:
                self.after_fork()

    def after_fork(self) -> None:
        """Begin anew in a forked child; one of a pipeline that was shut down stays shut down."""
        parents, self._slot = self._slot.get("state"), {}
        if parents is not None:
            parents.abandon()
        self._pid = os.getpid()
        for run in self._after_fork_runs:
            self.guard.run("starting again after a fork", run)
        self._begun = {}

    def add_after_fork(self, run: Callable[[], object]) -> None:
        """Have `run` called in a forked child before anything else of ours happens there."""
        self._after_fork_runs.append(run)

    # -- threads

    def ensure_started(self) -> None:
        """Start the threads of this process if they do not run. Cheap when they do; not for finalizers."""
        state = self._state
        if state.started or state.closing or self._clock.monotonic() < state.start_again_at_s:
            return
        if state.starting.locked():
            return
        with state.starting:  # released also when a signal handler raises here: see `Counters`
            if not state.started:
                self._start(state)

    def _start(self, state: ProcessState[T]) -> None:
        reference = weakref.ref(self, lambda _: state.wake_intake.set())
        senders = [(f"moesif-otel-sender-{n + 1}", _run_sender) for n in range(self.settings.event_worker_count)]
        pollers = [] if self._poll is None else [("moesif-otel-config", _run_poller)]
        try:
            for name, run in [("moesif-otel-intake", _run_intake), *senders, *pollers][state.running :]:
                state.start_thread(name, run, reference, state, self._clock)
            state.started = True
            self.guard.run("exit handlers", watch_child_exit)
        except RuntimeError as exc:
            # The process may have no more threads, or ends (Python 3.12 and later; a provider of the application may
            # hand over its last spans before our exit handler runs): flush and shutdown do the work.
            if state.exit_left_s is None and "interpreter shutdown" not in str(exc):
                self.guard.caught("starting a delivery thread", exc)
            else:
                self.guard.count("starting a delivery thread")  # nothing that anybody should hear of
            state.start_again_at_s = self._clock.monotonic() + _AGAIN_S
        if self._is_measured and self._sender.on_duration is None:
            self._sender.on_duration = self.guard.run("recording metrics", export_metrics, self, self.ledger)

    def _sender_turn(self, state: ProcessState[T], limit_at_s: float | None = None) -> Turn:
        try:
            turn = self._sender.turn(state, limit_at_s)
            if turn.wait_s is None and self._disk is not None and limit_at_s is None:
                return self._disk.replay(state, turn)
        except BaseException as exc:  # a callback's SystemExit must not end the thread
            if limit_at_s is not None and not isinstance(exc, Exception):
                raise  # the application's own thread: its Ctrl-C is its own
            self.guard.caught("sending a batch", exc)
            return Turn(_AGAIN_S, state.version)
        return turn

    # -- housekeeping: what others want to have run now and then

    def add_housekeeping(self, run: Callable[[], float | None]) -> None:
        """Have `run` called on the intake thread at each pass; it must not wait for anything.

        It returns the seconds until it wants to be called again, or None for no wish. What it raises is counted.
        """
        self._housekeeping.append(run)

    def wake(self) -> None:
        """Have housekeeping run soon; finalizer-safe."""
        state = self._slot.get("state")
        if state is not None:
            state.wake()

    def wake_poller(self) -> None:
        """Have `poll` run soon; never blocks."""
        self._state.wake_poller.set()

    def _run_or_count(self, run: Callable[[], float | None], kind: str) -> float | None:
        try:
            return run()
        except BaseException as exc:  # a callback's SystemExit must not end the thread
            self.guard.caught(kind, exc)
            return None

    # -- the intake

    def _intake_turn(self, state: ProcessState[T]) -> float | None:
        """Make one pass over what was submitted; return the seconds until the next one, None: when an item comes."""
        try:
            state.intake_token.pop()
        except IndexError:
            return _GATHER_S  # a flush is at it, in its own thread
        try:
            return self._intake_pass(state)
        finally:
            state.intake_token.append(True)

    def _intake_pass(self, state: ProcessState[T]) -> float | None:
        gathers = self._take_submitted(state)
        wishes = [self._run_or_count(run, "background work of delivery") for run in tuple(self._housekeeping)]
        with state.lock:
            due_at_s = state.queue.due_at()
            if due_at_s is not None and (state.closing or due_at_s <= self._clock.monotonic()):
                state.queue.close()
                state.note_batch()
                due_at_s = None
        if self._disk is not None:
            self.guard.run("moving batches to SPOOL_DIRECTORY", self._disk.relieve, state)
        wishes += [None if due_at_s is None else due_at_s - self._clock.monotonic(), _GATHER_S if gathers else None]
        return min((max(0.0, wish) for wish in wishes if wish is not None), default=None)

    def _take_submitted(self, state: ProcessState[T]) -> bool:
        """Take what there is now; return whether unprepared items were among it."""
        submitted = state.submitted
        unprepared = False
        slice_ends_s = self._clock.monotonic() + _SLICE_S
        # No more than that: a producer that is faster than we are must not keep batches from closing.
        for _ in range(len(submitted)):
            try:
                entry = submitted.popleft()
            except IndexError:  # shutdown has taken the rest
                break
            if isinstance(entry, bytes):
                self._add(state, Prepared(entry, len(entry)))
            elif isinstance(entry, FlushMark):
                with state.lock:
                    state.queue.close()
                    entry.sequence = state.queue.last_sequence
                    state.note_change()
            else:
                unprepared = True
                if self._clock.monotonic() > slice_ends_s:
                    self._clock.sleep(_PAUSE_S)
                    slice_ends_s = self._clock.monotonic() + _SLICE_S
                self._make_ready(state, entry)
        return unprepared

    def _add(self, state: ProcessState[T], event: Prepared) -> None:
        with state.lock:
            if not state.stopped:
                if state.queue.add(event, self._clock.monotonic(), self._clock.time()):
                    state.note_batch()
                return
        self._drop_charged(event.size_bytes)

    def _make_ready(self, state: ProcessState[T], entry: tuple[T, int]) -> None:
        state.in_hand = [entry]
        result: Any = DropReason.NOT_CONVERTIBLE
        try:
            result = self._prepare(entry[0])
        except BaseException as exc:
            self.guard.caught("preparing an event", exc)
            # A mask that calls `sys.exit` must not end our thread: it is caught there, and passes in anybody else's.
            if not isinstance(exc, Exception):
                raise
        finally:
            self._settle_or_add(state, entry, result)

    def _settle_or_add(self, state: ProcessState[T], entry: tuple[T, int], result: Any) -> None:
        try:
            state.in_hand.pop()
        except IndexError:
            return  # shutdown did not wait for it, and has counted it
        held_bytes = entry[1]
        if isinstance(result, Prepared):
            self.budget.charge(result.size_bytes - held_bytes)
            self._add(state, result)
            return
        self.budget.release(held_bytes)
        self.ledger.drop(result if isinstance(result, DropReason) else DropReason.NOT_CONVERTIBLE)

    # -- flush

    def force_flush(self, timeout_s: float) -> bool:
        """Send what is waiting now, without back-off, and wait for it, at most `timeout_s` seconds.

        Return True only if everything accepted before the call is delivered, or dropped and counted. From one of our
        own threads (a callback that flushes) always return False, at once.
        """
        state = self._state
        if threading.current_thread() in state.threads:
            return False
        self.ensure_started()
        return self._await(state, self._clock.monotonic() + timeout_s)

    def _await(self, state: ProcessState[T], deadline_s: float, *, said: bool = True) -> bool:
        """Wait until everything submitted so far is settled; return whether it is."""
        mark = FlushMark()
        state.submitted.append(mark)
        with state.lock:
            state.health.hurry()
            state.note_change()
        state.wake()
        say_at_s = self._clock.monotonic() + _SAY_AFTER_S
        while True:
            wait_s = None if state.running > 1 else self._work_inline(state, deadline_s)
            with state.lock:
                if mark.sequence is not None and state.queue.is_settled(mark.sequence):
                    return True
                now_s = self._clock.monotonic()
                left_s = deadline_s - now_s
                if state.ended:
                    return not self.ledger.pending
                if left_s <= 0 or state.is_hopeless(mark, deadline_s):
                    return False
                if not said:
                    wait_s = min(say_at_s - now_s, left_s if wait_s is None else wait_s)
                if wait_s != 0:
                    self._clock.wait(state.progress, left_s if wait_s is None else max(0.0, min(left_s, wait_s)))
            if not said and self._clock.monotonic() >= say_at_s:
                said = True
                self._log.waiting(self.ledger.pending, max(0.0, deadline_s - self._clock.monotonic()))

    def _work_inline(self, state: ProcessState[T], deadline_s: float) -> float:
        """Do a turn of the work of threads that do not run, and return the seconds until the next one; 0: at once."""
        with suppress_instrumentation():
            if not state.running:
                self._intake_turn(state)
            turn = self._sender_turn(state, deadline_s)
        return _INLINE_WAIT_S if turn.wait_s is None else turn.wait_s

    # -- the end

    def shutdown(self, timeout_s: float | None = None) -> None:
        """Deliver what can be delivered in `timeout_s` seconds; the rest goes to disk, or is dropped as `shutdown`.

        The default is `SHUTDOWN_TIMEOUT`. Later submits are dropped as `shutdown`. A second call waits for the first
        one, in the same bounds.
        """
        state = self._state
        if timeout_s is None:
            timeout_s = self.settings.shutdown_timeout
        if state.exit_left_s is not None:
            timeout_s = min(timeout_s, state.exit_left_s)
        if self.ledger.pending:
            self.ensure_started()
        deadline_s = self._clock.monotonic() + timeout_s
        try:
            state.shutdown_turn.pop()
        except IndexError:
            with state.lock:
                while not state.ended and (left_s := deadline_s - self._clock.monotonic()) > 0:
                    self._clock.wait(state.progress, left_s)
            return
        state.closing = self._closed = True
        try:
            self._await_pending(state, timeout_s)
        finally:  # also when Ctrl-C ends the wait: what is left is still accounted for
            self._end(state, deadline_s)

    def _await_pending(self, state: ProcessState[T], timeout_s: float) -> bool:
        """Wait for what is pending, each POST within the time that is left; return whether all of it is settled."""
        now_s = self._clock.monotonic()
        state.limit_at_s = now_s + timeout_s
        if threading.current_thread() in state.threads or not (self.ledger.pending or state.submitted):
            return not self.ledger.pending
        for_spool_s = 0.0 if self._disk is None else min(_MOST_FOR_SPOOL_S, timeout_s * _SPOOL_SHARE)
        return self._await(state, now_s + timeout_s - for_spool_s, said=False)

    def _end(self, state: ProcessState[T], deadline_s: float) -> None:
        state.stopped = True
        self._give_up_all(state, deadline_s)
        with state.lock:
            state.ended = True
            state.note_change()
        state.wake()
        self._drop_submitted(state)
        until_s = min(deadline_s, self._clock.monotonic() + _JOIN_S)
        for thread in state.threads[: 1 + self.settings.event_worker_count]:  # the poller may be in a request
            left_s = until_s - self._clock.monotonic()
            if left_s > 0 and thread is not threading.current_thread():
                thread.join(left_s)
        self.guard.run("closing connections", self._transport.close)
        self._log.ended(self.ledger.snapshot())

    def _give_up_all(self, state: ProcessState[T], deadline_s: float) -> None:
        """Settle what is not delivered: to disk, or dropped."""
        self._drop_submitted(state)
        # What is being prepared or sent right now is settled here: whoever has it finds out, and does not count.
        with contextlib.suppress(IndexError):
            self._drop_charged(state.in_hand.pop()[1])
        with state.lock:
            batches = state.queue.settle_all()
        write_until_s = max(deadline_s, self._clock.monotonic() + _LEAST_FOR_SPOOL_S)
        for batch in batches:
            self.budget.release(batch.size_bytes)
            kept: bool | None = False
            if self._disk is not None and self._clock.monotonic() < write_until_s:
                kept = self.guard.run("writing a batch to SPOOL_DIRECTORY", self._disk.keep, batch)
            if not kept:
                self.ledger.drop(DropReason.SHUTDOWN, len(batch))
        if self._disk is not None and state.stopped:
            self.guard.run("returning batches to SPOOL_DIRECTORY", self._disk.take_back, state)

    def _drop_submitted(self, state: ProcessState[T]) -> None:
        """Drop everything that has not been prepared. Lock-free."""
        while True:
            try:
                entry = state.submitted.popleft()
            except IndexError:
                return
            if isinstance(entry, bytes):
                self._drop_charged(len(entry))
            elif not isinstance(entry, FlushMark):
                self._drop_charged(entry[1])
                if self._on_drop is not None:
                    self.guard.run("cleaning up after a dropped event", self._on_drop, entry[0])

    def _drop_charged(self, held_bytes: int) -> None:
        self.budget.release(held_bytes)
        self.ledger.drop(DropReason.SHUTDOWN)

    # -- the end of the process

    # `atexit` runs what was registered last first. A tracer provider, or the application, that came before us still has
    # its last spans and calls to hand over when our entry runs: so that entry delivers, but does not shut down.

    def begin_exit(self) -> None:
        """Send what waits now, without waiting for it."""
        state = self._state
        if state.closing:
            return
        state.exit_left_s = self.settings.shutdown_timeout
        with state.lock:
            state.limit_at_s = self._clock.monotonic() + state.exit_left_s
            state.health.hurry()
            state.queue.close()
            state.note_change()
        state.wake()

    def finish_exit(self) -> None:
        """Bring what was accepted to an end, within what is left of `SHUTDOWN_TIMEOUT`; later calls are still taken."""
        state = self._state
        left_s = state.exit_left_s
        if state.closing or left_s is None or not (self.ledger.pending or state.submitted):
            return
        started_s = self._clock.monotonic()
        self.ensure_started()
        settled = False
        try:
            settled = self._await_pending(state, left_s)
        finally:
            if not settled:
                self._give_up_all(state, started_s + left_s)
                self._log.ended(self.ledger.snapshot())
            state.exit_left_s = max(0.0, left_s - (self._clock.monotonic() - started_s))
            state.limit_at_s = None

    def settle_at_exit(self) -> None:
        """Deliver a call that ends after our exit handler has run; at any other time does nothing."""
        state = self._slot.get("state")
        if state is not None and state.exit_left_s is not None:
            self.finish_exit()


# The loops of our threads. Each holds the delivery only while it works, and ends by no exception.


def _run_intake(reference: weakref.ref[Delivery[Any]], state: ProcessState[Any], clock: Clock) -> None:
    keep: Delivery[Any] | None = None
    with suppress_instrumentation():
        while not state.stopped:
            delivery = keep or reference()
            if delivery is None:
                break
            state.keeper, state.hurried = None, False
            state.intake_gathers, state.intake_idle = True, False
            state.submitted_bytes = 0
            try:
                wait_s = delivery._intake_turn(state)
            except BaseException as exc:  # a callback's SystemExit must not end the thread
                delivery.guard.caught("preparing events", exc)
                wait_s = _AGAIN_S
            state.intake_gathers = wait_s is not None and wait_s <= _GATHER_S
            state.intake_idle = wait_s is None
            # With anything pending, or an item to come that does not wake us, the delivery must outlive its last user;
            # with nothing, this thread must not be what keeps it alive.
            keep = delivery if state.has_work or not state.intake_idle else None
            del delivery
            if state.submitted and not state.intake_gathers:  # came before these were set, and did not wake us
                wait_s = _GATHER_S
            if keep is not None:  # a sender that settles the last batch does not wake us
                wait_s = _AGAIN_S if wait_s is None else min(wait_s, _AGAIN_S)
            if clock.wait(state.wake_intake, wait_s) and not state.hurried:
                clock.wait(state.wake_intake, _GATHER_S)
    state.stopped, state.keeper = True, None
    state.wake_poller.set()
    with state.lock:
        state.note_change()


def _run_sender(reference: weakref.ref[Delivery[Any]], state: ProcessState[Any], clock: Clock) -> None:
    with suppress_instrumentation():
        while not state.stopped:
            delivery = reference()
            if delivery is None:
                return
            turn = delivery._sender_turn(state)
            del delivery
            if turn.wait_s != 0:
                state.wait_for_work(clock, turn)


def _run_poller(reference: weakref.ref[Delivery[Any]], state: ProcessState[Any], clock: Clock) -> None:
    with suppress_instrumentation():
        while not state.stopped:
            delivery = reference()
            if delivery is None or delivery._poll is None:
                return
            wait_s = delivery._run_or_count(delivery._poll, "fetching sampling rates and rules")
            del delivery
            clock.wait(state.wake_poller, _POLL_AGAIN_S if wait_s is None else wait_s)
