"""The base of a processor, a middleware and a capture of outgoing calls: a pipeline's flush, shutdown and counters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry.trace import TracerProvider

from moesif_otel.errors import MoesifConfigError

if TYPE_CHECKING:
    from moesif_otel._delivery.stats import Stats
    from moesif_otel._pipeline.pipeline import Pipeline


def check_tracer_provider(given: Any) -> None:
    """Refuse what a user gave as a tracer provider and is none."""
    if given is not None and not isinstance(given, TracerProvider):
        raise MoesifConfigError(f"tracer_provider: got {type(given).__name__}, takes an OpenTelemetry TracerProvider")


class PipelineHandle:
    """Uses a pipeline, which it has joined; the last handle that is shut down ends it.

    Subclasses set `_pipeline`.
    """

    _pipeline: Pipeline

    def force_flush(self, timeout_millis: int = 5_000) -> bool:
        """Deliver every call that has finished. It waits: on an event loop use `asyncio.to_thread`.

        Calls still running (a stream, say) are not waited for; they are delivered after they end.

        Args:
            timeout_millis: Return after this time at the latest.

        Returns:
            True if everything that had finished was delivered or is counted as dropped.
        """
        return self._pipeline.force_flush(timeout_millis / 1_000)

    def shutdown(self, timeout_millis: int | None = None) -> None:
        """Deliver everything; running calls are sent as far as they came (`unfinished`).

        It waits, as `force_flush` does. While others of the same settings use the pipeline, that goes on until the last
        of them is shut down.

        Args:
            timeout_millis: Return after this time at the latest; `SHUTDOWN_TIMEOUT` by default. What could not be
                delivered goes to the spool if there is one, and is counted otherwise.
        """
        self._pipeline.leave(self, None if timeout_millis is None else timeout_millis / 1_000)

    def stats(self) -> Stats:
        """Return the counters: `accepted == delivered + sum(dropped.values()) + pending` at any time."""
        return self._pipeline.stats()
