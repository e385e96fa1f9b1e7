"""One batch at a time to the server, and what its answer leads to.

Owns: the step from `Outcome` to what becomes of a batch: settled, back in the queue, cut, stripped, dropped.
Threads: senders; the thread of a caller of flush or shutdown when there are none.
Never: waits; sends without a permit of `ServerHealth`; holds the lane's lock while it sends.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, Protocol

from moesif_otel._delivery.lane import Turn
from moesif_otel._delivery.outcome import SUSPENSION_REASONS, Answer, Outcome
from moesif_otel._delivery.queue import MAX_BATCH_BYTES, Batch, Prepared
from moesif_otel._delivery.report import describe
from moesif_otel._delivery.stats import DropReason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moesif_otel._capture.body import ByteBudget
    from moesif_otel._delivery.clock import Clock
    from moesif_otel._delivery.health import Permit
    from moesif_otel._delivery.lane import Lane
    from moesif_otel._delivery.report import DeliveryLog
    from moesif_otel._delivery.stats import Ledger
    from moesif_otel._guard import Guard

__all__ = ["Sender", "Transport"]

# When this many events in a row were refused one by one and none was taken, it is not the events: a wrong address
# answers 404 to everything. From then on a refused batch is not taken apart, until something is delivered.
HOPELESS_EVENTS: Final = 200
# A POST that would have less time than this before the deadline is not begun.
_LEAST_POST_S: Final = 0.02

_INTERRUPTED: Final = Answer(Outcome.RETRY, detail="interrupted")

_WHAT_TO_DO: Final = {
    401: "Moesif does not know this application id (401): check APPLICATION_ID",
    402: "the Moesif subscription is not active (402): see the billing page of the Moesif portal",
    403: "Moesif, or a proxy on the way, refuses this application id (403): check APPLICATION_ID and BASE_URI",
}


class Transport(Protocol):
    """How a batch goes out."""

    def send(self, payloads: Sequence[Any], timeout_s: float) -> Answer:
        """Make one attempt that lasts at most `timeout_s` seconds."""
        ...

    def close(self) -> None:
        """Let go of connections; a later `send` may open new ones."""
        ...

    def after_fork(self) -> None:
        """Forget, in a forked child, every connection of the parent without touching it."""
        ...


class Sender:
    """Sends the batches of a lane.

    Args:
        transport: Where they go.
        export_timeout_s: Longest one POST may last.
        without_bodies: Gives the same event without its bodies; None: events have none to leave out.
        ledger: Where everything is counted.
        budget: Where the bytes of settled events are given back.
        guard: Where errors of the transport are counted.
        clock: Time.
        log: Where failures are logged.
        on_duration: Told the seconds of each POST.
    """

    def __init__(
        self,
        transport: Transport,
        export_timeout_s: float,
        *,
        without_bodies: Callable[[bytes], bytes] | None,
        ledger: Ledger,
        budget: ByteBudget,
        guard: Guard,
        clock: Clock,
        log: DeliveryLog,
        on_duration: Callable[[float], None],
    ) -> None:
        self._transport = transport
        self._export_timeout_s = export_timeout_s
        self._without_bodies = without_bodies
        self._ledger = ledger
        self._budget = budget
        self._guard = guard
        self._clock = clock
        self._log = log
        self._on_duration = on_duration

    def turn(self, lane: Lane[Any], limit_at_s: float | None = None) -> Turn:
        """Send, cut or drop one batch, if one waits and the server may be asked.

        Args:
            lane: Whose batches.
            limit_at_s: Monotonic time that no POST may outlast.

        Returns:
            When to take the next turn.
        """
        with lane.changed:
            version = lane.version
            if not lane.queue.has_ready:
                return Turn(None, version)
            timeout_s = self._time_for_post(lane, limit_at_s)
            if timeout_s < _LEAST_POST_S:
                return Turn(None, version)
            oversize = lane.queue.first_weighs > MAX_BATCH_BYTES
            permit = None if oversize else lane.health.ask(self._clock.monotonic())
            if permit is not None and not permit.go and permit.drop is None:
                return Turn(permit.wait_s, version)
            batch = lane.queue.take()
        if permit is None:
            self._split(lane, batch, posted=False)
        elif permit.drop is not None:
            self._drop(lane, batch, permit.drop)
        else:
            answer = _INTERRUPTED
            try:
                answer = self.attempt(batch.payloads, batch.size_bytes, timeout_s)
            finally:  # also when Ctrl-C ends an attempt in the application's own thread
                self._apply(lane, batch, permit, answer)
        return Turn(0.0, version)

    def _time_for_post(self, lane: Lane[Any], limit_at_s: float | None) -> float:
        limits = [at for at in (limit_at_s, lane.limit_at_s) if at is not None]
        if not limits:
            return self._export_timeout_s
        return min(self._export_timeout_s, min(limits) - self._clock.monotonic())

    def attempt(self, payloads: Sequence[Any], size_bytes: int, timeout_s: float) -> Answer:
        """Make one POST, timed, counted and guarded."""
        started_s = self._clock.monotonic()
        try:
            answer = self._transport.send(payloads, timeout_s)
        except Exception as exc:
            self._guard.caught("delivery.send", exc)
            answer = Answer(Outcome.RETRY, detail=describe(exc))
        duration_s = self._clock.monotonic() - started_s
        self._ledger.count("batches")
        self._ledger.count("bytes_sent", size_bytes)
        self._guard.run("delivery.metrics", self._on_duration, duration_s)
        self._log.batch(len(payloads), answer.status, duration_s, answer.outcome.value)
        return answer

    def _apply(self, lane: Lane[Any], batch: Batch, permit: Permit, answer: Answer) -> None:
        outcome = answer.outcome
        self.note_health(lane, permit, answer, len(batch))
        if outcome is Outcome.DELIVERED:
            self._deliver(lane, batch)
        elif outcome is Outcome.RETRY:
            with lane.changed:
                lane.queue.put_back(batch)
                lane.note_change()
        elif outcome is Outcome.SPLIT:
            self._split(lane, batch, posted=answer.status is not None)
        elif outcome is Outcome.ISOLATE:
            self._isolate(lane, batch, answer.status)
        else:
            self._drop(lane, batch, SUSPENSION_REASONS.get(answer.status or 0, DropReason.UNAUTHORIZED))

    def note_health(self, lane: Lane[Any], permit: Permit, answer: Answer, events: int) -> None:
        """Tell the lane's health what an answer says about the server, and log what is worth a line."""
        now_s = self._clock.monotonic()
        cause = f"status {answer.status}" if answer.status is not None else (answer.detail or "no answer")
        recovered = False
        with lane.changed:
            if answer.outcome is Outcome.RETRY:
                lane.health.failed(permit.epoch, now_s, answer.retry_after_s)
            elif answer.outcome is Outcome.SUSPENDED:
                reason = SUSPENSION_REASONS.get(answer.status or 0, DropReason.UNAUTHORIZED)
                lane.health.suspended(permit.epoch, now_s, reason, answer.retry_after_s)
            else:
                recovered = lane.health.worked(permit.epoch)
            lane.note_change()
        if lane.ended:
            return  # a late answer: the events are accounted for already
        if recovered:
            self._log.recovered()
        if answer.outcome is Outcome.RETRY:
            self._ledger.count("retries")
            asked = f", it asks for {answer.retry_after_s:.0f} s" if answer.retry_after_s is not None else ""
            self._log.failure(
                f"retry {cause}", f"Moesif did not take {events} events: {cause}{asked}; they wait and are sent again"
            )
        elif answer.outcome is Outcome.SUSPENDED:
            what = _WHAT_TO_DO.get(answer.status or 0, f"Moesif wants no events ({cause})")
            self._log.failure(
                f"suspended {answer.status}",
                f"{what}; events are dropped and counted, and it is tried again about once a minute",
                logging.ERROR,
            )

    def _deliver(self, lane: Lane[Any], batch: Batch) -> None:
        with lane.changed:
            settled = lane.queue.settle(batch)
            lane.rejected_in_a_row = 0
            if settled:
                self._ledger.deliver(len(batch))
                self._budget.release(batch.size_bytes)
            lane.note_change()

    def _drop(self, lane: Lane[Any], batch: Batch, reason: DropReason) -> None:
        with lane.changed:
            if lane.queue.settle(batch):
                self._ledger.drop(reason, len(batch))
                self._budget.release(batch.size_bytes)
            lane.note_change()

    def _split(self, lane: Lane[Any], batch: Batch, *, posted: bool) -> None:
        if len(batch) > 1:
            with lane.changed:
                if posted:
                    lane.queue.learn_limit(batch.size_bytes)
                lane.queue.put_back(batch, *batch.halves())
                lane.note_change()
            return
        smaller = None if batch.stripped else self.stripped(batch.events[0])
        if smaller is None:
            self._log.failure("too large", "an event is more than Moesif takes, even without its bodies; it is dropped")
            self._drop(lane, batch, DropReason.TOO_LARGE)
            return
        piece = batch.replaced(smaller)
        with lane.changed:
            if lane.queue.put_back(batch, piece):
                self._budget.charge(piece.size_bytes - batch.size_bytes)
            lane.note_change()

    def stripped(self, event: Prepared) -> Prepared | None:
        """Give an event without its bodies; None when that makes it no smaller, or cannot be done."""
        if self._without_bodies is None or not isinstance(event.payload, bytes):
            return None
        payload = self._guard.run("delivery.without_bodies", self._without_bodies, event.payload)
        if payload is None or len(payload) >= len(event.payload):
            return None
        return Prepared(payload, len(payload))

    def _isolate(self, lane: Lane[Any], batch: Batch, status: int | None) -> None:
        if len(batch) > 1 and lane.rejected_in_a_row < HOPELESS_EVENTS:
            with lane.changed:
                lane.queue.put_back(batch, *batch.halves())
                lane.note_change()
            return
        lane.rejected_in_a_row += len(batch)
        whole = "; it refuses every event: check BASE_URI" if len(batch) > 1 else ""
        self._log.failure(f"rejected {status}", f"Moesif refuses {len(batch)} events (status {status}){whole}")
        self._drop(lane, batch, DropReason.REJECTED)
