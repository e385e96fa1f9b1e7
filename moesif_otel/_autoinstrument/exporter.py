"""The exporter for `OTEL_TRACES_EXPORTER=moesif` and configuration files.

`AutoSpanExporter` is a `MoesifSpanExporter` for a process that must start even if its options are wrong. If the capture
without code changes has a pipeline with equal options, it delivers through that one. It never raises.
"""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from moesif_otel._autoinstrument.instrument import read_settings, sink_of

# For its exit handler: registered before the tracer provider's, it runs after that one's last export.
from moesif_otel._delivery import process  # noqa: F401 - see above
from moesif_otel._guard import LATE_IMPORTS, PROCESS_GUARD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from moesif_otel.exporter import MoesifSpanExporter


class AutoSpanExporter(SpanExporter):
    """Sends HTTP spans to Moesif as `moesif_otel.MoesifSpanExporter` does, or nothing without an application id.

    Args:
        options: Options in lower case; absent ones are read from the environment. A wrong one is logged, see
            `read_settings`.

    Thread-safe.
    """

    def __init__(self, **options: Any) -> None:
        self._settings = read_settings(options)
        # Filled once, by `dict.setdefault`, and late, as in `instrument`.
        self._made: dict[str, tuple[MoesifSpanExporter, bool]] = {}
        if self._settings is not None and os.environ.get("OTEL_CONFIG_FILE"):
            # The provider of a configuration file is created first, so its exit handler runs after delivery has ended.
            atexit.register(self._flush_provider)

    def _exporter(self) -> tuple[MoesifSpanExporter, bool] | None:
        made = self._made.get("made")
        if made is None and self._settings is not None:
            with LATE_IMPORTS:
                from moesif_otel._pipeline.sink import EventSink
                from moesif_otel.exporter import MoesifSpanExporter

            found = sink_of(self._settings)
            made = (MoesifSpanExporter.of(found or EventSink(self._settings)), found is not None)
            made = self._made.setdefault("made", made)
        return made

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Submit spans for delivery; return at once."""
        found = PROCESS_GUARD.run("creating the exporter", self._exporter)
        return SpanExportResult.SUCCESS if found is None else found[0].export(spans)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Deliver everything that was exported, within the time limit."""
        found = self._made.get("made")
        return found is None or found[0].force_flush(timeout_millis)

    def shutdown(self) -> None:
        """Deliver what is pending; end delivery unless it is shared with the capture."""
        found = self._made.get("made")
        if found is None or self._settings is None:
            return
        exporter, shared = found
        if shared:
            exporter.force_flush(int(self._settings.shutdown_timeout * 1_000))
        else:
            exporter.shutdown()

    def _flush_provider(self) -> None:
        flush = getattr(trace.get_tracer_provider(), "force_flush", None)
        if callable(flush) and self._settings is not None:
            PROCESS_GUARD.run("flushing spans at exit", flush, int(self._settings.shutdown_timeout * 1_000))
