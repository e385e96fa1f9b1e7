"""Counts what became of every event: once, by reason, so that the sums always agree.

The invariant, in every snapshot: `accepted == delivered + sum(dropped.values()) + pending`.

*Spooled events.* An event that is written to disk leaves this process's books as dropped for the reason `spooled`: the
one reason that is no loss. Whoever settles it later (this process or another) accepts it and delivers or drops it in
one step, and counts it in `replayed`. So it holds in each process by itself, whatever becomes of the others, and
over all of them `delivered` is the number of events that Moesif took.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from moesif_otel._counters import Counters

if TYPE_CHECKING:
    from moesif_otel._capture.body import ByteBudget
    from moesif_otel._guard import Guard


class DropReason(str, Enum):
    """The reason why an event was not delivered by this process; the values are the keys of `Stats.dropped`."""

    QUEUE_FULL = "queue_full"  # `EVENT_QUEUE_SIZE` events were waiting
    TOO_LARGE = "too_large"  # one event, without its bodies, is still more than the server takes
    # the server refused this very event (400, 404, 405, 406, 410, 422), or failed on it again and again (5xx)
    REJECTED = "rejected"
    UNAUTHORIZED = "unauthorized"  # the server does not know the application id (401, 403)
    PAYMENT_REQUIRED = "payment_required"  # the Moesif subscription is not active (402)
    MASK_FAILED = "mask_failed"  # `MASK_EVENT_MODEL` raised or returned another type: never sent unmasked
    MASKED_AWAY = "masked_away"  # `MASK_EVENT_MODEL` returned None: skipped on purpose
    # `SKIP` (`SKIP_OUTGOING`) is set, and there is only a span: no request that it could be asked about
    SKIP_UNKNOWN = "skip_unknown"
    SAMPLED_OUT = "sampled_out"  # the sampling rate set in Moesif left it out
    NOT_CONVERTIBLE = "not_convertible"  # it could not be made into an event: a defect of ours, see `errors`
    SHUTDOWN = "shutdown"  # still waiting when `SHUTDOWN_TIMEOUT` was over, or submitted after the shutdown
    SPOOLED = "spooled"  # written to `SPOOL_DIRECTORY`: no loss, see the module's docstring
    SPOOL_FULL = "spool_full"  # `SPOOL_MAX_BYTES` were on disk: the oldest made room
    SPOOL_UNREADABLE = "spool_unreadable"  # its file on disk was damaged and has been set aside
    EXPIRED = "expired"  # on disk for longer than the server takes events (30 days)


class Stats(dict[str, Any]):
    """One reading of a ledger: a plain dict whose keys can also be read as attributes.

    Keys that are always there: `accepted`, `delivered`, `dropped` (reason to number), `pending`, `held_bytes`,
    `retries`, `batches`, `bytes_sent`, `spooled`, `replayed`, `spool_bytes`, `errors` (kind to number).
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        """Read a key as an attribute."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def lost(self) -> int:
        """Events that were dropped and are not on disk either."""
        dropped: dict[str, int] = self["dropped"]
        return sum(dropped.values()) - dropped.get(DropReason.SPOOLED.value, 0)


_ALWAYS_THERE: Final = ("retries", "batches", "bytes_sent", "spooled", "replayed", "spool_bytes")
_ACCEPTED: Final = "accepted"
_DELIVERED: Final = "delivered"
_SETTLED: Final = "settled"
_FEW: Final = 100  # additions that are not in the sums yet: each is of one event, or of a batch that is settled with it
_MARGIN: Final = 2_000
_DROPPED: Final = "dropped "  # the reason follows: one flat dict of sums


class Ledger(Counters):
    """Counts what was accepted, delivered and dropped. Thread-safe, and safe in finalizers and signal handlers.

    Other names that are added (`retries`, `batches`, `skipped`, …) are outside of the invariant, and appear in `Stats`.
    """

    __slots__ = ("_budget", "_guard")

    def __init__(self, *, budget: ByteBudget | None = None, guard: Guard | None = None) -> None:
        self._budget = budget
        self._guard = guard
        super().__init__()

    def accept(self, n: int = 1) -> None:
        """Take responsibility for `n` events."""
        self.add(_ACCEPTED, n)

    def deliver(self, n: int = 1) -> None:
        """Note that the server took `n` events."""
        self.add(_DELIVERED, n)
        self.add(_SETTLED, n)

    def drop(self, reason: DropReason, n: int = 1) -> None:
        """Note that `n` events were given up."""
        self.add(_DROPPED + reason.value, n)
        self.add(_SETTLED, n)

    @property
    def pending(self) -> int:
        """Events accepted and neither delivered nor dropped yet; cheap."""
        return self.get(_ACCEPTED) - self.get(_SETTLED)

    def has_pending(self, count: int) -> bool:
        """Tell whether `count` events or more are pending; far from it without adding up what others have added."""
        sums = self._sums
        if len(self._deferred) <= _FEW and sums.get(_ACCEPTED, 0) - sums.get(_SETTLED, 0) < count - _MARGIN:
            return False
        return self.pending >= count

    def snapshot(self) -> Stats:
        """Read everything at one moment; the invariant holds in what it returns."""
        sums = self.read()
        sums.pop(_SETTLED, None)
        accepted, delivered = sums.pop(_ACCEPTED, 0), sums.pop(_DELIVERED, 0)
        names = [name for name in sums if name.startswith(_DROPPED)]
        dropped = {name[len(_DROPPED) :]: sums.pop(name) for name in names}
        return Stats(
            {
                **dict.fromkeys(_ALWAYS_THERE, 0),
                **sums,
                "accepted": accepted,
                "delivered": delivered,
                "dropped": dropped,
                "pending": accepted - delivered - sum(dropped.values()),
                "held_bytes": self._budget.held_bytes if self._budget is not None else 0,
                "errors": self._guard.counts() if self._guard is not None else {},
            }
        )
