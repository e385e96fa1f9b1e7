"""The public span processor: makes a `Pipeline` a part of OpenTelemetry's tracer providers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.trace import SpanProcessor

from moesif_otel._pipeline.middleware import PipelineHandle
from moesif_otel._pipeline.pipeline import Pipeline, pipeline_for
from moesif_otel.errors import MoesifConfigError
from moesif_otel.exporter import MoesifSpanExporter
from moesif_otel.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, Span
    from opentelemetry.sdk.trace.export import SpanExporter


__all__ = ["MoesifSpanProcessor"]


class MoesifSpanProcessor(PipelineHandle, SpanProcessor):
    """Attaches bodies and identity to the calls of a process and hands them to an exporter.

    Add it to your tracer provider, and let `instrument(settings)` or a `MoesifMiddleware` with the same settings
    capture the calls: they and the processor are one pipeline. Spans of other exporters of the provider are not
    touched.

    Args:
        settings: The dict of options that Moesif users know, or a `Settings`; None reads the environment.
        exporter: Where the calls go: by default a `MoesifSpanExporter` of the same settings; any other OTel
            exporter (OTLP, say) gets private copies of the spans with the capture as attributes.

    Raises:
        MoesifConfigError: An option is wrong, or one that hides data differs from the given exporter's, or the
            exporter is none.

    Thread-safe and fork-safe.
    """

    def __init__(
        self, settings: Mapping[str, Any] | Settings | None = None, *, exporter: SpanExporter | None = None
    ) -> None:
        self.settings = settings = Settings.of(settings)
        self.pipeline = self._pipeline = _pipeline_with(settings, exporter)
        self.pipeline.of_processor = self.pipeline.sees_spans = True
        self.pipeline.join(self)

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Bind a starting span to the call it belongs to (`SpanProcessor`)."""
        del parent_context
        self.pipeline.on_start(span)

    def on_end(self, span: ReadableSpan) -> None:
        """Let an ended span decorate its call (`SpanProcessor`)."""
        self.pipeline.on_end(span)


def _pipeline_with(settings: Settings, exporter: SpanExporter | None) -> Pipeline:
    if exporter is None:
        return pipeline_for(settings, of_processor=False)
    if isinstance(exporter, MoesifSpanExporter):
        _check_same_protection(settings, exporter.settings)
        return Pipeline(exporter.sink, settings)
    if isinstance(exporter, type) or not callable(getattr(exporter, "export", None)):
        got = f"the class {exporter.__name__}" if isinstance(exporter, type) else type(exporter).__name__
        raise MoesifConfigError(f"exporter: got {got}, takes an OpenTelemetry SpanExporter")
    from moesif_otel._otlp.sink import ExporterSink

    return Pipeline(ExporterSink(exporter, settings))


# These options hide data, and are applied where an event is made: by the exporter.
_HIDING_FIELDS: Final = (
    *("mask_event_model", "auto_hide_sensitive", "log_binary_body", "authorization_header_name"),
    *("request_body_masks", "response_body_masks", "request_header_masks", "response_header_masks"),
)


def _check_same_protection(settings: Settings, exporters: Settings) -> None:
    """Refuse options that hide data if the exporter has other values for them."""
    for name in _HIDING_FIELDS:
        if getattr(settings, name) != getattr(exporters, name):
            raise MoesifConfigError(
                f"{name.upper()}: differs between the settings of the processor and of its exporter, which applies "
                "it; give both the same value, or do not pass an exporter",
                option=name.upper(),
            )
