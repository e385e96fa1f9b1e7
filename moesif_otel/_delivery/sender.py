"""One batch at a time to the server, and what its answer leads to: settled, back in the queue, cut, stripped, dropped.

Senders run it, or who flushes where there are none. It never waits, and never holds the state's lock while it sends.

A failure (5xx, a redirect, no answer) says nothing about the batch as long as everything fails. A batch that fails
while the server takes others steps behind them, is halved, and in the end its one bad event is given up: it must not
hold up the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from moesif_otel._delivery.outcome import BatchOutcome, PostAnswer
from moesif_otel._delivery.process import Turn
from moesif_otel._delivery.queue import MAX_BATCH_BYTES, Batch, Prepared
from moesif_otel._delivery.report import describe
from moesif_otel._delivery.stats import DropReason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moesif_otel._delivery.health import Permit
    from moesif_otel._delivery.process import Collaborators, ProcessState
    from moesif_otel._delivery.spool import Disk

HOPELESS_EVENTS: Final = 200
"""This many events refused one by one, in a row, may not be the events' fault: a wrong address answers 404 to all.
From then on a refused batch is taken apart only if the server takes one of a few events of it."""

_SAMPLES: Final = 3
# A proxy wants credentials, the server wants less or a new connection: no answer to what is in the batch.
_NOT_ITS_FAULT: Final = frozenset({407, 425, 429})
_STRIKES_TO_HALVE: Final = 2
_STRIKES_TO_GIVE_UP: Final = 5
# Answers of a server that worked on the batch, other than a gateway's that found none: now and then it is halved, also
# while nothing shows that the server would take another one.
_GATEWAY_STATUSES: Final = frozenset({502, 503, 504})
_FAILURES_TO_HALVE: Final = 4
_FAILURES_TO_GIVE_UP: Final = 8
# A POST that would have less time than this before the deadline is not begun.
_LEAST_POST_S: Final = 0.02

_INTERRUPTED: Final = PostAnswer(BatchOutcome.RETRY, detail="interrupted")


class Sender:
    """Sends the batches of a process state.

    `disk` is told of batches from disk that are settled. `without_bodies` is None where events have none to leave out.
    """

    def __init__(
        self, parts: Collaborators, disk: Disk | None, without_bodies: Callable[[bytes], bytes] | None
    ) -> None:
        self._parts = parts
        self._disk = disk
        self._without_bodies = without_bodies
        self.on_duration: Callable[[float], None] | None = None  # told the seconds of each POST

    def turn(self, state: ProcessState[Any], limit_at_s: float | None = None) -> Turn:
        """Send, cut or drop one batch, if one waits and the server may be asked; no POST outlasts `limit_at_s`."""
        with state.lock:
            version = state.version
            batch = state.queue.next
            if batch is None:
                return Turn(None, version)
            timeout_s = self._time_for_post(state, limit_at_s)
            if timeout_s < _LEAST_POST_S:
                return Turn(None, version)
            oversize = batch.size_bytes + len(batch) > MAX_BATCH_BYTES
            permit = None if oversize else state.health.ask(self._parts.clock.monotonic())
            # What is safe on disk waits where fresh events are dropped.
            if permit is not None and not permit.go and (permit.drop is None or batch.origin is not None):
                return Turn(permit.wait_s, version)
            state.queue.take()
        if permit is None:
            self._split(state, batch, posted=False)
        elif permit.drop is not None:
            self._settle(state, batch, permit.drop)
        else:
            answer = _INTERRUPTED
            try:
                answer = self._attempt(batch.payloads, batch.size_bytes, timeout_s)
            finally:  # also when Ctrl-C ends an attempt in the application's own thread
                self._apply(state, batch, permit, answer)
                if state.stopped and self._disk is not None and batch.origin is not None:
                    self._parts.guard.run("returning batches to SPOOL_DIRECTORY", self._disk.take_back, state)
        return Turn(0.0, version)

    def _time_for_post(self, state: ProcessState[Any], limit_at_s: float | None) -> float:
        limits = [at for at in (limit_at_s, state.limit_at_s) if at is not None]
        longest_s = self._parts.settings.export_timeout
        return min(longest_s, min(limits) - self._parts.clock.monotonic()) if limits else longest_s

    def _attempt(self, payloads: Sequence[Any], size_bytes: int, timeout_s: float) -> PostAnswer:
        """Make one POST, timed, counted and guarded."""
        parts = self._parts
        started_s = parts.clock.monotonic()
        try:
            answer = parts.transport.send(payloads, timeout_s)
        except Exception as exc:
            parts.guard.caught("sending a batch", exc)
            answer = PostAnswer(BatchOutcome.RETRY, detail=describe(exc))
        duration_s = parts.clock.monotonic() - started_s
        parts.ledger.add("batches")
        parts.ledger.add("bytes_sent", size_bytes)
        if self.on_duration is not None:
            parts.guard.run("recording metrics", self.on_duration, duration_s)
        parts.log.batch(len(payloads), answer.status, duration_s, answer.outcome.value)
        return answer

    def _apply(self, state: ProcessState[Any], batch: Batch, permit: Permit, answer: PostAnswer) -> None:
        outcome = answer.outcome
        self._note_health(state, permit, answer, len(batch))
        if outcome is BatchOutcome.DELIVERED:
            self._settle(state, batch, None)
        elif outcome is BatchOutcome.RETRY:
            self._retry(state, batch, answer)
        elif outcome is BatchOutcome.SPLIT:
            self._split(state, batch, posted=answer.status is not None)
        elif outcome is BatchOutcome.ISOLATE:
            self._isolate(state, batch, answer.status)
        elif batch.origin is not None:
            self._put_back(state, batch)
        else:
            self._settle(state, batch, answer.suspension)

    def _note_health(self, state: ProcessState[Any], permit: Permit, answer: PostAnswer, events: int) -> None:
        """Tell the state's health what an answer says about the server, and log what is worth a line."""
        now_s = self._parts.clock.monotonic()
        recovered = False
        with state.lock:
            if answer.outcome is BatchOutcome.RETRY:
                state.health.failed(permit.epoch, now_s, answer.retry_after_s)
            elif answer.outcome is BatchOutcome.SUSPENDED:
                state.health.suspended(permit.epoch, now_s, answer.suspension, answer.retry_after_s)
            else:
                recovered = state.health.worked(permit.epoch)
            if recovered or answer.outcome in (BatchOutcome.RETRY, BatchOutcome.SUSPENDED):
                state.note_change()
        if answer.outcome is BatchOutcome.RETRY:
            self._parts.ledger.add("retries")
        if state.ended:
            return  # a late answer: the events are accounted for already
        if recovered:
            self._parts.log.recovered()
        elif answer.outcome in (BatchOutcome.RETRY, BatchOutcome.SUSPENDED):
            self._parts.log.not_taken(answer, events)

    # What becomes of a batch.

    def _settle(self, state: ProcessState[Any], batch: Batch, reason: DropReason | None) -> None:
        """Count a batch as dropped for that reason, or, without one, as delivered."""
        ledger = self._parts.ledger
        with state.lock:
            settled = state.queue.settle(batch, delivered=reason is None)
            if reason is None:
                state.refused_in_a_row = 0
            if settled:
                if batch.origin is not None:  # accepted and settled in one step: see `stats`
                    ledger.accept(len(batch))
                    ledger.add("replayed", len(batch))
                if reason is None:
                    ledger.deliver(len(batch))
                else:
                    ledger.drop(reason, len(batch))
                self._parts.budget.release(batch.size_bytes)
            state.progress.notify_all()
        if settled and batch.origin is not None and self._disk is not None and not batch.family.unsettled:
            self._disk.finish(state, batch)

    def _put_back(self, state: ProcessState[Any], batch: Batch, *pieces: Batch, last: bool = False) -> bool:
        with state.lock:
            there = state.queue.put_back(batch, *pieces, last=last)
            state.note_change()
            return there

    def _retry(self, state: ProcessState[Any], batch: Batch, answer: PostAnswer) -> None:
        if answer is _INTERRUPTED or answer.status in _NOT_ITS_FAULT:
            self._put_back(state, batch)
            return
        batch.failures += 1
        if batch.failures > 1 and state.queue.deliveries > batch.deliveries_before:
            batch.strikes += 1
        batch.deliveries_before = state.queue.deliveries
        worked_on = answer.status is not None and answer.status >= 500 and answer.status not in _GATEWAY_STATUSES
        if len(batch) == 1 and (
            batch.strikes >= _STRIKES_TO_GIVE_UP
            or (worked_on and batch.strikes >= _STRIKES_TO_HALVE and batch.failures >= _FAILURES_TO_GIVE_UP)
        ):
            self._parts.log.failure(
                "failed on",
                f"{self._parts.log.address} failed {batch.failures} times on one event ({answer.cause}) while it "
                "accepted others; that event is dropped, and counted as rejected",
            )
            self._settle(state, batch, DropReason.REJECTED)
            return
        # Others were accepted while it failed. When no more of them come to compare it with, its halves are compared.
        suspect = worked_on or batch.strikes > 0
        halve = batch.strikes >= _STRIKES_TO_HALVE or (suspect and not batch.failures % _FAILURES_TO_HALVE)
        pieces = batch.halves() if halve and len(batch) > 1 else ()
        self._put_back(state, batch, *pieces, last=True)

    def _split(self, state: ProcessState[Any], batch: Batch, *, posted: bool) -> None:
        if len(batch) > 1:
            with state.lock:
                if posted:
                    state.queue.learn_limit(batch.size_bytes)
                self._put_back(state, batch, *batch.halves())
            return
        smaller = None if batch.stripped else self._stripped(batch.events[0])
        if smaller is None:
            self._parts.log.failure(
                "too large",
                f"an event is larger than {self._parts.log.address} accepts, even without its bodies; it is dropped",
            )
            self._settle(state, batch, DropReason.TOO_LARGE)
            return
        piece = batch.replaced(smaller)
        if self._put_back(state, batch, piece):
            self._parts.budget.charge(piece.size_bytes - batch.size_bytes)

    def _stripped(self, event: Prepared) -> Prepared | None:
        """Return an event without its bodies; None when that makes it no smaller, or cannot be done."""
        if self._without_bodies is None or not isinstance(event.payload, bytes):
            return None
        payload = self._parts.guard.run("leaving out the bodies of an event", self._without_bodies, event.payload)
        if payload is None or len(payload) >= len(event.payload):
            return None
        return Prepared(payload, len(payload))

    def _isolate(self, state: ProcessState[Any], batch: Batch, status: int | None) -> None:
        if len(batch) > 1 and (state.refused_in_a_row < HOPELESS_EVENTS or self._takes_some_of(state, batch)):
            self._put_back(state, batch, *batch.halves())
            return
        state.refused_in_a_row += len(batch)
        self._parts.log.refused(len(batch), status)
        self._settle(state, batch, DropReason.REJECTED)

    def _takes_some_of(self, state: ProcessState[Any], batch: Batch) -> bool:
        """Ask with a few events of a refused batch, one by one; the server recognizes repeated ones by their ids."""
        for index in range(0, len(batch), max(1, len(batch) // _SAMPLES)):
            timeout_s = self._time_for_post(state, None)
            if timeout_s < _LEAST_POST_S or state.ended:
                return False
            event = batch.events[index]
            if self._attempt([event.payload], event.size_bytes, timeout_s).outcome is BatchOutcome.DELIVERED:
                state.refused_in_a_row = 0
                return True
        return False
