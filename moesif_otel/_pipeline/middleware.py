"""What the doors have in common: a pipeline, its flush and end, its counters, the profile calls, outgoing capture.

Owns: `Door`, the base of both `MoesifMiddleware` classes.
Threads: any; construction starts none.
Never: knows a framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.trace import TracerProvider

from moesif_otel._pipeline.sink import EventSink
from moesif_otel.client import ProfileCalls, ProfileSender
from moesif_otel.errors import MoesifConfigError
from moesif_otel.exporter import MoesifSpanExporter
from moesif_otel.processor import MoesifSpanProcessor

if TYPE_CHECKING:
    from moesif_otel._delivery.stats import Stats
    from moesif_otel.outgoing import OutgoingCapture
    from moesif_otel.settings import Settings

__all__ = ["Door"]


class Door(ProfileCalls):
    """A pipeline and the calls of its users on it.

    Args:
        settings: Validated.
        tracer_provider: The user's, or None.

    Raises:
        MoesifConfigError: `tracer_provider` is none.

    Thread-safe.
    """

    settings: Settings

    def __init__(self, settings: Settings, tracer_provider: TracerProvider | None) -> None:
        if tracer_provider is not None and not isinstance(tracer_provider, TracerProvider):
            raise MoesifConfigError(
                f"tracer_provider: got {type(tracer_provider).__name__}, takes an OpenTelemetry TracerProvider"
            )
        self.settings = settings
        self._explicit_provider = tracer_provider
        sink = EventSink(settings)
        self._processor = MoesifSpanProcessor(settings, exporter=MoesifSpanExporter.of(sink))
        self._processor.may_be_joined = False
        self._set_up_profiles(
            ProfileSender(sink.transport, settings.export_timeout), sink.submit_profile, sink.guard
        )
        self._outgoing: OutgoingCapture | None = None
        if settings.capture_outgoing_requests:
            from moesif_otel.outgoing import start_capture_for

            self._outgoing = start_capture_for(self._processor, tracer_provider)

    def force_flush(self, timeout_millis: int = 5_000) -> bool:
        """Deliver every call that has finished. It waits: on an event loop use `asyncio.to_thread`.

        Args:
            timeout_millis: Return after this time at the latest.

        Returns:
            True if everything that had finished was delivered or is counted as dropped.
        """
        return self._processor.force_flush(timeout_millis)

    def shutdown(self, timeout_millis: int = 5_000) -> None:
        """Stop capturing and deliver what is pending; the application is served on. It waits, as `force_flush` does.

        Args:
            timeout_millis: Return after this time at the latest.
        """
        if self._outgoing is not None:
            self._outgoing.stop()
        self._processor.shutdown(timeout_millis)

    def stats(self) -> Stats:
        """Give the counters: `accepted == delivered + sum(dropped.values()) + pending` at any time."""
        return self._processor.stats()
