"""What became of every event: counted once, by reason, with a law that always holds.

Owns: `DropReason` (why an event was not delivered), `Ledger` (the counts) and `Stats` (one reading of them).
Threads: any, and finalizers: writing never blocks, since a finalizer may interrupt a writer of its own thread.
Never: takes a blocking lock to write; forgets an entry; knows what an event is.

The law, in every snapshot: `accepted == delivered + sum(dropped.values()) + pending`.

*Spooled events.* An event that is written to disk leaves this process's books as dropped for the reason `spooled`: the
one reason that is no loss. Whoever settles it later (this process or another) accepts it and delivers or drops it in
one step, and counts it in `replayed`. So the law holds in each process by itself, whatever becomes of the others, and
over all of them `delivered` is the number of events that Moesif took.
"""

from __future__ import annotations

import threading
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from moesif_otel._capture.body import ByteBudget
    from moesif_otel._guard import Guard

__all__ = ["DropReason", "Ledger", "Stats"]

_SNAPSHOT_WAIT_S: Final = 1.0


class DropReason(str, Enum):
    """Why an event was not delivered by this process; the values are the keys of `Stats.dropped`."""

    QUEUE_FULL = "queue_full"
    """`EVENT_QUEUE_SIZE` events were waiting."""
    TOO_LARGE = "too_large"
    """One event, without its bodies, is still more than the server takes."""
    REJECTED = "rejected"
    """The server refused this very event (400, 404, 405, 406, 410, 422)."""
    UNAUTHORIZED = "unauthorized"
    """The server does not know the application id (401, 403)."""
    PAYMENT_REQUIRED = "payment_required"
    """The Moesif subscription is not active (402)."""
    MASK_FAILED = "mask_failed"
    """`MASK_EVENT_MODEL` raised or returned another type: never sent unmasked."""
    MASKED_AWAY = "masked_away"
    """`MASK_EVENT_MODEL` returned None: skipped on purpose."""
    SKIP_UNKNOWN = "skip_unknown"
    """`SKIP` (`SKIP_OUTGOING`) is set, and there is only a span: no request that it could be asked about."""
    SAMPLED_OUT = "sampled_out"
    """The sampling rate set in Moesif left it out."""
    NOT_CONVERTIBLE = "not_convertible"
    """It could not be made into an event: a defect of ours, see `errors`."""
    SHUTDOWN = "shutdown"
    """Still waiting when `SHUTDOWN_TIMEOUT` was over, or submitted after the shutdown."""
    SPOOLED = "spooled"
    """Written to `SPOOL_DIRECTORY`: no loss, see the module's docstring."""
    SPOOL_FULL = "spool_full"
    """`SPOOL_MAX_BYTES` were on disk: the oldest made room."""
    SPOOL_UNREADABLE = "spool_unreadable"
    """Its file on disk was damaged and has been set aside."""
    EXPIRED = "expired"
    """On disk for longer than the server takes events (30 days)."""


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
_DROPPED: Final = "dropped"
_OTHER: Final = "other"
_ONE_ACCEPTED: Final = (_ACCEPTED, "", 1)


class Ledger:
    """Counts what was accepted, delivered and dropped.

    Args:
        budget: Where `held_bytes` is read; 0 without.
        guard: Where `errors` is read; empty without.

    Thread-safe and finalizer-safe: an entry is appended to a deque (atomic), and folded into the sums by whoever gets
    the lock without waiting.
    """

    __slots__ = (
        "__weakref__",
        "_accepted",
        "_budget",
        "_counts",
        "_deferred",
        "_delivered",
        "_dropped",
        "_dropped_total",
        "_guard",
        "_lock",
    )

    def __init__(self, *, budget: ByteBudget | None = None, guard: Guard | None = None) -> None:
        self._budget = budget
        self._guard = guard
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._deferred: deque[tuple[str, str, int]] = deque()
        self._accepted = 0
        self._delivered = 0
        self._dropped_total = 0
        self._dropped: dict[str, int] = {}
        self._counts: dict[str, int] = {}

    def accept(self, n: int = 1) -> None:
        """Take responsibility for `n` events."""
        self._enter(_ONE_ACCEPTED if n == 1 else (_ACCEPTED, "", n))

    def deliver(self, n: int = 1) -> None:
        """Note that the server took `n` events."""
        self._enter((_DELIVERED, "", n))

    def drop(self, reason: DropReason, n: int = 1) -> None:
        """Note that `n` events were given up."""
        self._enter((_DROPPED, reason.value, n))

    def count(self, name: str, n: int = 1) -> None:
        """Count something that is not part of the law (`retries`, `batches`, `skipped`, …); it appears in `Stats`."""
        self._enter((_OTHER, name, n))

    @property
    def pending(self) -> int:
        """Events accepted and neither delivered nor dropped yet; cheap."""
        if self._deferred:
            self._fold_if_free()
        return self._accepted - self._delivered - self._dropped_total

    def snapshot(self) -> Stats:
        """Read everything at one moment; the law holds in what it gives."""
        # A signal handler may have interrupted a writer of this very thread: never wait for ever.
        held = self._lock.acquire(timeout=_SNAPSHOT_WAIT_S)
        try:
            if held:
                self._fold()
            accepted, delivered, dropped = self._accepted, self._delivered, dict(self._dropped)
            counts = dict(self._counts)
        finally:
            if held:
                self._lock.release()
        return Stats(
            {
                **dict.fromkeys(_ALWAYS_THERE, 0),
                **counts,
                "accepted": accepted,
                "delivered": delivered,
                "dropped": dropped,
                "pending": accepted - delivered - sum(dropped.values()),
                "held_bytes": self._budget.held_bytes if self._budget is not None else 0,
                "errors": self._guard.counts() if self._guard is not None else {},
            }
        )

    def after_fork(self) -> None:
        """Start from nothing in a forked child: what the parent accepted, the parent settles."""
        self._reset()

    def _enter(self, entry: tuple[str, str, int]) -> None:
        self._deferred.append(entry)
        self._fold_if_free()

    def _fold_if_free(self) -> None:
        # Not `with`: a finalizer may interrupt a holder of the lock in its own thread.
        lock = self._lock
        if lock.acquire(blocking=False):
            try:
                self._fold()
            finally:
                lock.release()

    def _fold(self) -> None:
        deferred = self._deferred
        while deferred:
            kind, key, n = deferred.popleft()
            if kind is _ACCEPTED:
                self._accepted += n
            elif kind is _DELIVERED:
                self._delivered += n
            elif kind is _DROPPED:
                self._dropped[key] = self._dropped.get(key, 0) + n
                self._dropped_total += n
            else:
                self._counts[key] = self._counts.get(key, 0) + n
