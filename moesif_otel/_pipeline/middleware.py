"""The base of every `MoesifMiddleware`: its pipeline, flush and shutdown, counters, profile calls, outgoing capture."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from opentelemetry.trace import TracerProvider

from moesif_otel._capture.callbacks import check_signatures
from moesif_otel._events.build import transaction_id_for
from moesif_otel._pipeline.pipeline import Pipeline, live_pipeline
from moesif_otel._pipeline.providers import resolve_provider
from moesif_otel._pipeline.sink import EventSink
from moesif_otel.client import ProfileCalls
from moesif_otel.errors import MoesifConfigError

if TYPE_CHECKING:
    from typing import Any

    from moesif_otel._capture.exchange import Exchange
    from moesif_otel._delivery.stats import Stats
    from moesif_otel.outgoing import OutgoingCapture
    from moesif_otel.settings import Settings


class Middleware(ProfileCalls):
    """The base of the middlewares of all frameworks; it knows none of them.

    On a running event loop the profile calls never wait: what they send is queued, as with `wait=False`.

    Args:
        settings: Validated.
        tracer_provider: The user's, or None.

    Raises:
        MoesifConfigError: `tracer_provider` is none.

    Thread-safe. Construction starts nothing.
    """

    settings: Settings

    def __init__(self, settings: Settings, tracer_provider: TracerProvider | None) -> None:
        if tracer_provider is not None and not isinstance(tracer_provider, TracerProvider):
            raise MoesifConfigError(
                f"tracer_provider: got {type(tracer_provider).__name__}, takes an OpenTelemetry TracerProvider"
            )
        if settings.capture_outgoing_requests:
            check_signatures(settings, ("request", "response"), suffix="_OUTGOING")
        self.settings = settings
        self._explicit_provider = tracer_provider
        self._pipeline = self._find_pipeline()
        self._pipeline.join(self)
        self._is_shut_down = False
        self._profiles, self._profile_guard = self._pipeline.sink.profiles, self._pipeline.sink.guard
        self._outgoing: OutgoingCapture | None = None
        if settings.capture_outgoing_requests:
            from moesif_otel.outgoing import start_capture_for

            self._outgoing = start_capture_for(self._pipeline, tracer_provider)

    def _find_pipeline(self) -> Pipeline:
        return live_pipeline(self.settings, of_processor=True) or Pipeline(EventSink(self.settings))

    def _provider_to_watch(self) -> Any:
        """Choose the tracer provider, at the first request, and let the pipeline see its spans; None without one."""
        provider = resolve_provider(self._explicit_provider)
        if provider is not None:
            self._pipeline.watch(provider)
        return provider

    def _transaction_id_of(self, exchange: Exchange, incoming: str | None) -> str:
        """Fix the event's id, so that a response header can tell it.

        Args:
            exchange: The call.
            incoming: What the request says that the id should be; counts with `ACCEPT_TRANSACTION_ID` only.
        """
        found = _uuid_text(incoming) if self.settings.accept_transaction_id else None
        if found is None:
            exchange.fix_ids()
            found = transaction_id_for(exchange.trace_id, exchange.span_id, self.settings.application_id)
        exchange.transaction_id = found
        return found

    def force_flush(self, timeout_millis: int = 5_000) -> bool:
        """Deliver every call that has finished. It waits: on an event loop use `asyncio.to_thread`.

        Args:
            timeout_millis: Return after this time at the latest.

        Returns:
            True if everything that had finished was delivered or is counted as dropped.
        """
        return self._pipeline.force_flush(timeout_millis / 1_000)

    def shutdown(self, timeout_millis: int | None = None) -> None:
        """Stop capturing and deliver what is pending; the application is served on. It waits, as `force_flush` does.

        Args:
            timeout_millis: Return after this time at the latest; `SHUTDOWN_TIMEOUT` by default.
        """
        self._is_shut_down = True
        outgoing, self._outgoing = self._outgoing, None
        if outgoing is not None:
            outgoing.stop()
        self._pipeline.leave(self, None if timeout_millis is None else timeout_millis / 1_000)

    def stats(self) -> Stats:
        """Return the counters: `accepted == delivered + sum(dropped.values()) + pending` at any time."""
        return self._pipeline.stats()


def _uuid_text(text: str | None) -> str | None:
    if not text:
        return None
    text = text.strip()
    try:
        found = str(uuid.UUID(text))
    except ValueError:
        return None
    return text if text.lower() == found else found
