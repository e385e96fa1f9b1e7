"""When batches go to disk, and when they come back.

Owns: the decision to write (memory nearly full, end of the process) and the paced replay.
Threads: `relieve` on the intake, `replay` on one sender at a time, `keep` in a shutdown.
Never: writes a batch whose payloads are no bytes; replays while anything fresh waits; holds the lane's lock while the
disk works.

A replayed event is accepted by the process that settles it, at that moment: see `stats`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from moesif_otel._delivery.lane import Turn
from moesif_otel._delivery.outcome import Outcome
from moesif_otel._delivery.queue import Batch, Prepared
from moesif_otel._delivery.stats import DropReason

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from moesif_otel._capture.body import ByteBudget
    from moesif_otel._delivery.clock import Clock
    from moesif_otel._delivery.health import Permit
    from moesif_otel._delivery.lane import Lane
    from moesif_otel._delivery.report import DeliveryLog
    from moesif_otel._delivery.sender import Sender
    from moesif_otel._delivery.spool import Claim, Spool
    from moesif_otel._delivery.stats import Ledger
    from moesif_otel.settings import Settings

__all__ = ["Disk"]

_NEARLY_FULL: Final = 0.75  # of either bound: batches begin to go to disk
_EASED: Final = 0.5  # and stop
_FILES_IN_A_ROW: Final = 4
_PAUSE_S: Final = 1.0
_LOOK_AGAIN_S: Final = 30.0
_WRITE_AGAIN_S: Final = 30.0  # after the disk refused


class Disk:
    """Moves batches between a lane and a spool.

    Args:
        spool: The files.
        settings: For the bounds of memory and the time of a POST.
        sender: Sends what is replayed.
        ledger: Where everything is counted.
        budget: Where bytes are held and given back.
        clock: Time.
        log: Where failures are logged.
    """

    def __init__(
        self,
        spool: Spool,
        settings: Settings,
        sender: Sender,
        *,
        ledger: Ledger,
        budget: ByteBudget,
        clock: Clock,
        log: DeliveryLog,
    ) -> None:
        self._spool = spool
        self._settings = settings
        self._sender = sender
        self._ledger = ledger
        self._budget = budget
        self._clock = clock
        self._log = log
        self.after_fork()

    def after_fork(self) -> None:
        """Begin anew in a forked child."""
        self._write_again_at_s = 0.0
        self._replay_at_s = 0.0
        self._files_in_a_row = 0
        self._spool.after_fork()

    # -- out

    def keep(self, batch: Batch) -> bool:
        """Write a batch whose events are settled by the caller; gives whether it is on disk. Counts it."""
        path = self._write(batch.payloads, batch.first_time_s)
        if path is not None:
            self._count_spooled(len(batch))
        return path is not None

    def relieve(self, lane: Lane[Any]) -> None:
        """Write the oldest batches when memory is nearly full, until it is half full."""
        if not self._fuller_than(_NEARLY_FULL) or self._clock.monotonic() < self._write_again_at_s or lane.closing:
            return
        while self._fuller_than(_EASED):
            with lane.changed:
                if not lane.queue.has_ready and not lane.queue.close():
                    return
                batch = lane.queue.take()
            path = self._write(batch.payloads, batch.first_time_s)
            with lane.changed:
                if path is None:
                    lane.queue.put_back(batch)
                elif lane.queue.settle(batch):
                    self._count_spooled(len(batch))
                    self._budget.release(batch.size_bytes)
                    self._replay_at_s = 0.0  # back as soon as there is nothing fresh and the server is there
                else:
                    self._spool.remove(path)  # a shutdown has settled it meanwhile
                lane.note_change()
            if path is None:
                self._write_again_at_s = self._clock.monotonic() + _WRITE_AGAIN_S
                return

    def _fuller_than(self, share: float) -> bool:
        return (
            self._ledger.pending > self._settings.event_queue_size * share
            or self._budget.held_bytes > self._settings.event_queue_bytes * share
        )

    def _write(self, payloads: Sequence[Any], first_time_s: float) -> Path | None:
        if not all(isinstance(payload, bytes) for payload in payloads):
            return None
        path = self._spool.write(payloads, first_time_s)
        if path is None:
            self._log.failure("spool", "a batch could not be written to SPOOL_DIRECTORY")
        return path

    def _count_spooled(self, events: int) -> None:
        self._ledger.drop(DropReason.SPOOLED, events)
        self._ledger.count("spooled", events)

    # -- back

    def replay(self, lane: Lane[Any], turn: Turn) -> Turn:
        """Send one file, if the time has come and the server may be asked; for a sender that has nothing else to do.

        Args:
            lane: Whose health and time limits hold.
            turn: What the sender would do otherwise.

        Returns:
            When to take the next turn.
        """
        now_s = self._clock.monotonic()
        with lane.changed:
            if lane.closing or lane.replaying or lane.version != turn.version:
                return turn
            # Files wait for the server as long as anybody; they are not read before it may be asked.
            open_at_s = max(self._replay_at_s, lane.health.opens_at())
            if now_s < open_at_s:
                return Turn(open_at_s - now_s, turn.version)
            lane.replaying = True
        try:
            return self._replay_one(lane, turn)
        finally:
            with lane.changed:
                lane.replaying = False
                lane.note_change()

    def _replay_one(self, lane: Lane[Any], turn: Turn) -> Turn:
        claim = self._spool.claim()
        if claim is None:
            self._replay_at_s = self._clock.monotonic() + _LOOK_AGAIN_S
            return Turn(_LOOK_AGAIN_S, turn.version)
        with lane.changed:
            permit = lane.health.ask(self._clock.monotonic())
        if not permit.go:
            self._spool.release(claim)  # another sender has found out, or is finding out, that it is down
            return Turn(permit.wait_s or _PAUSE_S, turn.version)
        self._pace()
        self._send(lane, claim, permit)
        return Turn(0.0, turn.version)

    def _pace(self) -> None:
        self._files_in_a_row += 1
        if self._files_in_a_row >= _FILES_IN_A_ROW:
            self._files_in_a_row = 0
            self._replay_at_s = self._clock.monotonic() + _PAUSE_S

    def _send(self, lane: Lane[Any], claim: Claim, permit: Permit) -> None:
        events = [Prepared(payload, len(payload)) for payload in claim.payloads]
        waiting = [Batch(events, 0.0, claim.first_time_s)]
        held_bytes = waiting[0].size_bytes
        self._budget.charge(held_bytes)
        try:
            while waiting and not lane.closing and self._send_piece(lane, waiting, permit):
                pass
        except BaseException:
            self._spool.release(claim)
            raise
        finally:
            self._budget.release(held_bytes)
        left = [event.payload for batch in waiting for event in batch.events]
        # If the rest cannot be written the whole file stays: the server knows by their ids what it has.
        untouched = len(left) == len(events)
        if left and (untouched or self._spool.write(left, claim.first_time_s) is None):
            self._spool.release(claim)
        else:
            self._spool.finish(claim)

    def _send_piece(self, lane: Lane[Any], waiting: list[Batch], permit: Permit) -> bool:
        """Send the first of the pieces; gives whether to go on."""
        piece = waiting[0]
        answer = self._sender.attempt(piece.payloads, piece.size_bytes, self._settings.export_timeout)
        self._sender.note_health(lane, permit, answer, len(piece))
        outcome = answer.outcome
        if outcome is Outcome.DELIVERED:
            self._settle(waiting, None)
        elif outcome in (Outcome.RETRY, Outcome.SUSPENDED):
            return False
        elif len(piece) > 1:
            waiting[:1] = piece.halves()
        elif outcome is Outcome.ISOLATE:
            self._settle(waiting, DropReason.REJECTED)
        else:
            smaller = None if piece.stripped else self._sender.stripped(piece.events[0])
            if smaller is None:
                self._settle(waiting, DropReason.TOO_LARGE)
            else:
                waiting[0] = piece.replaced(smaller)
        return True

    def _settle(self, waiting: list[Batch], reason: DropReason | None) -> None:
        n = len(waiting.pop(0))
        self._ledger.accept(n)
        self._ledger.count("replayed", n)
        if reason is None:
            self._ledger.deliver(n)
        else:
            self._ledger.drop(reason, n)
