"""The public span exporter: hands the HTTP spans of anybody's OpenTelemetry pipeline to an `EventSink`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind

from moesif_otel._events.spans import has_http_method
from moesif_otel._pipeline.sink import EventSink
from moesif_otel._pipeline.spans import claims_of
from moesif_otel.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from moesif_otel._delivery.stats import Stats

__all__ = ["MoesifSpanExporter"]

_HTTP_KINDS: Final = frozenset({SpanKind.SERVER, SpanKind.CLIENT})


class MoesifSpanExporter(SpanExporter):
    """Sends the HTTP spans of an OpenTelemetry pipeline to Moesif.

    Works behind any span processor: `provider.add_span_processor(BatchSpanProcessor(MoesifSpanExporter(...)))`.
    SERVER and CLIENT spans with an HTTP method become events; others are ignored, and so are spans whose calls a
    `MoesifSpanProcessor` or a `MoesifMiddleware` of the same application id delivers.

    Args:
        application_id: Your Moesif application id; `MOESIF_APPLICATION_ID` by default.
        **options: Every option of the README's table as a snake_case keyword; each absent one is read from its
            environment variable (`MOESIF_BASE_URI`, …), so that the class can be made without arguments.

    Raises:
        MoesifConfigError: An option is wrong, or there is no application id.

    Thread-safe and fork-safe.
    """

    def __init__(self, application_id: str | None = None, **options: Any) -> None:
        self._set_up(EventSink(Settings.of({"application_id": application_id, **options})))

    @classmethod
    def of(cls, sink: EventSink) -> MoesifSpanExporter:
        """Make an exporter that hands spans to a sink which may have other users."""
        exporter = cls.__new__(cls)
        exporter._set_up(sink)
        return exporter

    def _set_up(self, sink: EventSink) -> None:
        self.sink = sink
        self.settings = sink.settings
        self._claims = claims_of(sink.settings.pipeline_key)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Take spans; returns at once, `SUCCESS` always: what becomes of the events is in `stats()`."""
        for span in spans:
            try:
                if self._is_ours_to_send(span):
                    self.sink.submit_span(span)
            except Exception as exc:
                self.sink.guard.caught("export of a span", exc)
        return SpanExportResult.SUCCESS

    def _is_ours_to_send(self, span: ReadableSpan) -> bool:
        if span.kind not in _HTTP_KINDS or not has_http_method(span):
            return False
        context = span.context
        return context is not None and (context.trace_id, context.span_id) not in self._claims

    def force_flush(self, timeout_millis: int = 5_000) -> bool:
        """Deliver everything that was exported.

        Args:
            timeout_millis: Return after this time at the latest.

        Returns:
            True if everything exported before was delivered or is counted as dropped.
        """
        return self.sink.force_flush(timeout_millis / 1_000)

    def shutdown(self, timeout_millis: int | None = None) -> None:
        """Deliver what is pending, then end the threads; later spans are counted as dropped (`shutdown`).

        Args:
            timeout_millis: Return after this time at the latest; `SHUTDOWN_TIMEOUT` by default.
        """
        self.sink.shutdown(None if timeout_millis is None else timeout_millis / 1_000)

    def stats(self) -> Stats:
        """Return the counters: `accepted == delivered + sum(dropped.values()) + pending` at any time.

        `profiles` has those of profile calls that did not wait; they add up in the same way.
        """
        return self.sink.stats()
