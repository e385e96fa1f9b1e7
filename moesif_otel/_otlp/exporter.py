"""Handing private copies to somebody else's exporter: bodies and identity by OTLP to a Collector.

Owns: `ForwardingExporter`, which gives another OTel exporter the queue, bounds and deadlines of our delivery.
Threads: like `exporter.MoesifSpanExporter`.
Never: gives that exporter a span that was not masked.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from moesif_otel._delivery.worker import Delivery, Prepared
from moesif_otel._otlp.span_copy import private_copy
from moesif_otel._otlp.transport import ExporterTransport
from moesif_otel._pipeline.outlet import EVENT_OVERHEAD_BYTES, Outlet
from moesif_otel.errors import MoesifConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moesif_otel._delivery.stats import DropReason
    from moesif_otel._pipeline.captured import CapturedSpan
    from moesif_otel.settings import Settings

__all__ = ["ForwardingExporter"]

_NOT_HONOURED: Final = ("mask_event_model", "spool_directory")


class ForwardingExporter(Outlet):
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

    def __init__(self, exporter: SpanExporter, settings: Settings) -> None:
        for name in _NOT_HONOURED:
            if getattr(settings, name) is not None:
                raise MoesifConfigError(
                    f"{name.upper()}: cannot be honoured with exporter={type(exporter).__name__}; "
                    "use the *_MASKS options, and let the Collector queue on disk"
                )
        self._set_up_outlet(settings)
        self._exporter = exporter
        self.delivery: Delivery[CapturedSpan] = Delivery(
            settings.with_changes(event_worker_count=1),  # exporters are not made to be called by two at a time
            prepare=self._prepare,
            transport=ExporterTransport(exporter, self.guard),
            without_bodies=None,
            ledger=self._ledger,
            budget=self.budget,
            guard=self.guard,
        )

    def export(self, spans: Sequence[CapturedSpan]) -> SpanExportResult:
        """Take captured spans; returns at once."""
        for span in spans:
            self.budget.charge(EVENT_OVERHEAD_BYTES)
            if not self.delivery.submit(span, EVENT_OVERHEAD_BYTES):
                span.exchange.discard()
        return SpanExportResult.SUCCESS

    def _prepare(self, span: CapturedSpan) -> Prepared | DropReason:
        try:
            copy, size_bytes = private_copy(span, self.settings)  # made and masked here, on our thread
        finally:
            span.exchange.discard()
        return Prepared(copy, size_bytes)

    def force_flush(self, timeout_millis: int = 5_000) -> bool:
        """Deliver everything that was exported.

        Args:
            timeout_millis: Return after this time at the latest.

        Returns:
            True if everything exported before was taken by the exporter or is counted as dropped.
        """
        deadline_s = time.monotonic() + timeout_millis / 1_000
        if not self.delivery.force_flush(timeout_millis / 1_000):
            return False
        left_millis = max(0, int((deadline_s - time.monotonic()) * 1_000))
        # `SpanExporter.force_flush` as OTel defines it gives None; only a plain False says that something is left.
        return self.guard.run("flush of the exporter", self._exporter.force_flush, left_millis) is not False

    def shutdown(self, timeout_millis: int | None = None) -> None:
        """Deliver what is pending, then end the threads and the exporter.

        Args:
            timeout_millis: Return after this time at the latest; `SHUTDOWN_TIMEOUT` by default.
        """
        self.delivery.shutdown(self.settings.shutdown_timeout if timeout_millis is None else timeout_millis / 1_000)
