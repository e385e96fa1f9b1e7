"""Handing private copies to somebody else's exporter: bodies and identity by OTLP to a Collector.

Owns: `ForwardingExporter`, which gives another OTel exporter the queue, bounds and deadlines of our delivery.
Threads: like `exporter.MoesifSpanExporter`.
Never: gives that exporter a span that was not masked.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from moesif_otel._capture.body import ByteBudget
from moesif_otel._delivery.stats import Ledger
from moesif_otel._delivery.worker import Delivery, Prepared
from moesif_otel._guard import Guard
from moesif_otel._otlp.span_copy import private_copy
from moesif_otel._otlp.transport import ExporterTransport
from moesif_otel._pipeline.sink import EVENT_OVERHEAD_BYTES, EVENTS_SHARE
from moesif_otel.errors import MoesifConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from moesif_otel._capture.exchange import Exchange
    from moesif_otel._delivery.stats import DropReason, Stats
    from moesif_otel._remote.poller import ConfigPoller
    from moesif_otel.settings import Settings

__all__ = ["ForwardingExporter"]

_NOT_HONOURED: Final = ("mask_event_model", "spool_directory")


class ForwardingExporter:
    """Delivers captured spans through another OTel exporter.

    Sampling and governance do not apply there (Moesif's API documentation, OTLP).

    Args:
        exporter: Any `SpanExporter`, for example OTLP.
        settings: The pipeline's settings. Options that only Moesif's own format can honour are refused.

    Raises:
        MoesifConfigError: MASK_EVENT_MODEL or SPOOL_DIRECTORY is set: there is no event model here, and the Collector
            keeps what is undelivered.

    Thread-safe; after a fork the child has a queue and, for OTLP over HTTP, connections of its own.
    """

    remote: ConfigPoller | None = None
    """Nobody: sampling and governance do not apply here."""

    def __init__(self, exporter: SpanExporter, settings: Settings) -> None:
        for name in _NOT_HONOURED:
            if getattr(settings, name) is not None:
                raise MoesifConfigError(
                    f"{name.upper()}: cannot be honoured with exporter={type(exporter).__name__}; "
                    "use the *_MASKS options, and let the Collector queue on disk"
                )
        self.settings = settings
        self.guard = Guard()
        self.budget = ByteBudget(settings.event_queue_bytes - settings.event_queue_bytes // EVENTS_SHARE)
        self._ledger = Ledger()
        self._exporter = exporter
        self.delivery: Delivery[Exchange] = Delivery(
            settings.with_changes(event_worker_count=1),  # exporters are not made to be called by two at a time
            prepare=self._prepare,
            transport=ExporterTransport(exporter, self.guard),
            without_bodies=None,
            ledger=self._ledger,
            budget=self.budget,
            guard=self.guard,
        )

    def ensure_started(self) -> None:
        """Start the threads of this process unless they run."""
        self.delivery.ensure_started()

    def count(self, name: str) -> None:
        """Count something that is no call's fate."""
        self._ledger.count(name)

    def submit(self, exchange: Exchange) -> None:
        """Take over a finished call with its captured bytes; its span is `exchange.span`. Never raises, never waits."""
        self.budget.charge(EVENT_OVERHEAD_BYTES)
        if not self.delivery.submit(exchange, EVENT_OVERHEAD_BYTES):
            exchange.discard()

    submit_later = submit

    def _prepare(self, exchange: Exchange) -> Prepared | DropReason:
        try:
            copy, size_bytes = private_copy(exchange, self.settings)  # made and masked here, on our thread
        finally:
            exchange.discard()
        return Prepared(copy, size_bytes)

    def force_flush(self, timeout_s: float) -> bool:
        """Deliver everything that was submitted.

        Args:
            timeout_s: Return after this time at the latest.

        Returns:
            True if everything submitted before was taken by the exporter or is counted as dropped.
        """
        deadline_s = time.monotonic() + timeout_s
        if not self.delivery.force_flush(timeout_s):
            return False
        left_millis = max(0, int((deadline_s - time.monotonic()) * 1_000))
        # `SpanExporter.force_flush` as OTel defines it gives None; only a plain False says that something is left.
        return self.guard.run("flush of the exporter", self._exporter.force_flush, left_millis) is not False

    def shutdown(self, timeout_s: float | None = None) -> None:
        """Deliver what is pending, then end the threads and the exporter.

        Args:
            timeout_s: Return after this time at the latest; `SHUTDOWN_TIMEOUT` by default.
        """
        self.delivery.shutdown(self.settings.shutdown_timeout if timeout_s is None else timeout_s)

    def stats(self) -> Stats:
        """Return the counters: `accepted == delivered + sum(dropped.values()) + pending` at any time."""
        stats = self._ledger.snapshot()
        stats["held_bytes"] = self.budget.held_bytes
        stats["errors"] = self.guard.counts()
        return stats
