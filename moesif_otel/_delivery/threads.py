"""The loops of our own threads.

Owns: the intake loop and the sender loop.
Threads: each runs in one daemon thread, suppressed for every instrumentation for its whole life.
Never: keeps a delivery alive that has nothing pending; ends by an exception.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry.instrumentation.utils import suppress_instrumentation

from moesif_otel._delivery.intake import GATHER_S

if TYPE_CHECKING:
    import weakref

    from moesif_otel._delivery.clock import Clock
    from moesif_otel._delivery.lane import Lane, Turn
    from moesif_otel._delivery.worker import Delivery

__all__ = ["run_intake", "run_sender"]


def run_intake(reference: weakref.ref[Delivery[Any]], lane: Lane[Any], clock: Clock) -> None:
    """Prepare items and form batches until the lane stops or nobody has the delivery any more."""
    with suppress_instrumentation():
        while not lane.stopped:
            delivery = reference()
            if delivery is None:
                break
            wait_s = delivery.intake_turn(lane)
            # With anything pending the delivery must outlive its last user; with nothing, this thread must not be
            # what keeps it alive.
            keep = delivery if delivery.has_work(lane) else None
            del delivery
            _rest(lane, clock, wait_s)
            del keep
    lane.stopped = True
    with lane.changed:
        lane.note_change()


def _rest(lane: Lane[Any], clock: Clock, wait_s: float | None) -> None:
    gathering = wait_s is not None and wait_s <= GATHER_S
    lane.idle = not gathering
    # An item that came before `idle` was set did not ring.
    if gathering or not lane.raw:
        clock.wait(lane.bell, wait_s)
    lane.idle = False


def run_sender(reference: weakref.ref[Delivery[Any]], lane: Lane[Any], clock: Clock) -> None:
    """Send batches until the lane stops or nobody has the delivery any more."""
    with suppress_instrumentation():
        while not lane.stopped:
            delivery = reference()
            if delivery is None:
                return
            turn: Turn = delivery.sender_turn(lane)
            del delivery
            if turn.wait_s == 0:
                continue
            with lane.changed:
                if turn.version == lane.version and not lane.stopped:
                    clock.wait(lane.changed, turn.wait_s)
