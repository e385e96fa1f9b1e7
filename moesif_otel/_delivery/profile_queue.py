"""Profile calls that do not wait: queued, retried and counted as events are.

Owns: `ProfileQueue`, a delivery of its own beside that of events.
Threads: one intake and one sender, started at the first call that does not wait.
Never: mixes with the events' counters; writes to the spool (profiles are upserts, made again by their owner).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from moesif_otel._capture.body import ByteBudget
from moesif_otel._delivery.stats import Ledger
from moesif_otel._delivery.worker import Delivery, Prepared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moesif_otel._delivery.client import MoesifTransport
    from moesif_otel._delivery.outcome import Answer
    from moesif_otel._delivery.stats import Stats
    from moesif_otel._guard import Guard
    from moesif_otel.settings import Settings

__all__ = ["ProfileQueue"]


class _Post(NamedTuple):
    path: str
    body: bytes


class ProfileQueue:
    """Delivers profile POSTs behind the caller's back.

    Args:
        settings: The pipeline's: bounds and times are the events' own.
        transport: Makes the POSTs.
        guard: Where errors are counted.

    Thread-safe and fork-safe.
    """

    def __init__(self, settings: Settings, transport: MoesifTransport, guard: Guard) -> None:
        self._budget = ByteBudget(settings.event_queue_bytes)
        self._ledger = Ledger()
        self._delivery: Delivery[_Post] = Delivery(
            settings.with_changes(batch_size=1, event_worker_count=1, spool_directory=None),
            prepare=lambda post: Prepared(post, len(post.body)),
            transport=_PostTransport(transport),
            ledger=self._ledger,
            budget=self._budget,
            guard=guard,
            measured=False,
        )

    def submit(self, path: str, body: bytes) -> bool:
        """Queue one POST; False when there is no room, which is counted."""
        self._delivery.ensure_started()
        self._budget.charge(len(body))
        return self._delivery.submit(_Post(path, body), len(body))

    def force_flush(self, timeout_s: float) -> bool:
        """Deliver what is queued, within the time."""
        return self._delivery.force_flush(timeout_s)

    def shutdown(self, timeout_s: float) -> None:
        """Deliver what is queued, then end the threads."""
        self._delivery.shutdown(timeout_s)

    def stats(self) -> Stats:
        """Give the counters, which obey the same law as the events'."""
        return self._ledger.snapshot()


class _PostTransport:
    def __init__(self, transport: MoesifTransport) -> None:
        self._transport = transport

    def send(self, payloads: Sequence[_Post], timeout_s: float) -> Answer:
        (post,) = payloads
        return self._transport.post_json(post.path, post.body, timeout_s)

    def close(self) -> None:
        """Leave the connections to the events' delivery, whose transport this is."""

    def after_fork(self) -> None:
        """Likewise."""
