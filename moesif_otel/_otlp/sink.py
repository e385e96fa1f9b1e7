"""Delivers calls through another OpenTelemetry exporter, such as OTLP to a Collector.

`ExporterSink` gives any exporter the queue, bounds, retries and deadlines of our delivery. A call becomes a masked copy
of its span, only on our intake thread. One sender thread exports, since `export` must not be called concurrently
(OpenTelemetry specification, "Span Exporter"). Sampling and governance do not apply (Moesif's API documentation, OTLP).
"""

from __future__ import annotations

import copy

# For `requests`, which imports it late: one that another thread imports at a fork is locked in the child for ever.
import netrc  # noqa: F401
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import requests
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace.export import SpanExportResult

from moesif_otel._delivery.client import MoesifTransport
from moesif_otel._delivery.delivery import Delivery
from moesif_otel._delivery.outcome import BatchOutcome, PostAnswer, outcome_of_status, retry_after_seconds
from moesif_otel._delivery.queue import Prepared
from moesif_otel._otlp.span_copy import Hide, private_copy
from moesif_otel._pipeline.sink import EVENT_OVERHEAD_BYTES, Sink, held_by_texts
from moesif_otel.errors import MoesifConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

    from moesif_otel._capture.exchange import Exchange
    from moesif_otel._delivery.stats import DropReason
    from moesif_otel._guard import Guard
    from moesif_otel.settings import Settings

_NOT_HONOURED: Final = ("mask_event_model", "spool_directory")
_CLOSE_S: Final = 1.0  # for the exporter's own shutdown where no deadline is known (a process that ends)


class ExporterSink(Sink):
    """Delivers the calls of a pipeline through another OTel exporter.

    Raises:
        MoesifConfigError: MASK_EVENT_MODEL or SPOOL_DIRECTORY is set: there is no event model here, and the Collector
            is what queues on disk.

    Thread-safe. After a fork, the child has its own queue and, for OTLP over HTTP, its own connections.
    """

    def __init__(self, exporter: SpanExporter, settings: Settings) -> None:
        for name in _NOT_HONOURED:
            if getattr(settings, name) is not None:
                raise MoesifConfigError(
                    f"{name.upper()}: does not work with exporter={type(exporter).__name__}; hide data with the "
                    "*_MASKS options, and let the Collector queue on disk",
                    option=name.upper(),
                )
        super().__init__(settings, MoesifTransport(settings))  # profiles go to Moesif itself
        self._hide = Hide(settings)
        self._transport = _ExporterTransport(exporter, self.guard)
        self.delivery = Delivery(
            settings.with_changes(event_worker_count=1),
            prepare=self._prepare,
            on_drop=self._discard,
            transport=self._transport,
            budget=self.budget,
            guard=self.guard,
        )

    def submit(self, exchange: Exchange) -> None:
        """Take over a finished call; all work is our thread's."""
        try:
            self._submit(exchange, EVENT_OVERHEAD_BYTES + held_by_texts(exchange))
        except Exception as exc:
            self._give_up(exchange, exc)
        self.delivery.settle_at_exit()

    submit_later = submit

    def _prepare(self, exchange: Exchange) -> Prepared | DropReason:
        try:
            return Prepared(*private_copy(exchange, self._hide))
        finally:
            exchange.discard()

    def force_flush(self, timeout_s: float) -> bool:
        """Deliver everything that was submitted, and flush the exporter; see `Sink.force_flush`."""
        deadline_s = time.monotonic() + timeout_s
        return super().force_flush(timeout_s) and self._transport.flush(deadline_s - time.monotonic())

    def shutdown(self, timeout_s: float | None = None) -> None:
        """Deliver what is pending, then end the threads and the exporter; see `Sink.shutdown`."""
        timeout_s = self.settings.shutdown_timeout if timeout_s is None else timeout_s
        self._transport.close_by_s = time.monotonic() + timeout_s
        super().shutdown(timeout_s)


def http_session(exporter: SpanExporter) -> requests.Session | None:
    """Return the `requests.Session` of OTLP's HTTP exporter; None for any other exporter, or an unknown version.

    It is private: `tests/otlp/test_sink.py` is its canary. Without it, refused spans are found more slowly.
    """
    older = getattr(exporter, "_session", None)  # up to 1.44
    newer = getattr(getattr(getattr(exporter, "_client", None), "_transport", None), "_session", None)
    return next((found for found in (older, newer) if isinstance(found, requests.Session)), None)


class _ExporterTransport:
    """Delivery's transport over an exporter; interprets its `FAILURE`, and limits how long we wait for it."""

    def __init__(self, exporter: SpanExporter, guard: Guard) -> None:
        self.address = f"the exporter {type(exporter).__name__}"
        self.setting = "its endpoint"
        self.spool_binding: str | None = None
        self.close_by_s: float | None = None
        self._exporter = exporter
        self._guard = guard
        self._last = threading.local()
        self._session = http_session(exporter)
        if self._session is not None:
            self._session.hooks["response"].append(self._note)

    def _note(self, response: requests.Response, **_: Any) -> None:
        self._last.status = response.status_code
        self._last.retry_after = response.headers.get("Retry-After")

    def send(self, payloads: Sequence[ReadableSpan], timeout_s: float) -> PostAnswer:
        """Export one batch; the exporter's own timeout applies."""
        del timeout_s
        self._last.status = self._last.retry_after = None
        if self._exporter.export(payloads) is SpanExportResult.SUCCESS:
            return PostAnswer(BatchOutcome.DELIVERED, self._last.status)
        status: int | None = self._last.status
        if status is not None and status >= 400:
            wait_s = retry_after_seconds(self._last.retry_after, time.time())
            return PostAnswer(outcome_of_status(status), status, retry_after_s=wait_s)
        # No status (gRPC, a user's own exporter, no answer): the spans may be fine. They wait within the bounds of the
        # queue; delivery itself finds a batch that fails while others are accepted.
        return PostAnswer(BatchOutcome.RETRY, detail=f"{type(self._exporter).__name__} failed")

    def flush(self, timeout_s: float) -> bool:
        """Flush the exporter; return False if it returns False, or does not return in time."""
        if timeout_s <= 0:
            return False
        results: list[Any] = []
        millis = int(timeout_s * 1_000)
        ended = self._run_apart("flush of the exporter", lambda: results.append(self._exporter.force_flush(millis)))
        # `SpanExporter.force_flush` as OTel defines it returns None; only False means that something is left.
        return ended.wait(timeout_s) and results != [False]

    def close(self) -> None:
        """Shut the exporter down, and wait for it until the deadline at most."""
        if self._session is not None and self._note in self._session.hooks["response"]:
            self._session.hooks["response"].remove(self._note)
        timeout_s = _CLOSE_S if self.close_by_s is None else self.close_by_s - time.monotonic()
        self._run_apart("shutdown of the exporter", self._exporter.shutdown).wait(max(0.0, timeout_s))

    def _run_apart(self, kind: str, function: Callable[[], Any]) -> threading.Event:
        """Run a function that may take any time on a thread of its own, or here if no thread can be started."""
        ended = threading.Event()

        def run() -> None:
            with suppress_instrumentation():
                self._guard.run(kind, function)
            ended.set()

        try:
            threading.Thread(target=run, name="moesif-otel-exporter", daemon=True).start()
        except RuntimeError:
            run()
        return ended

    def after_fork(self) -> None:
        """Replace the connections in a forked child; the parent's are released, not closed."""
        self._last = threading.local()
        session = self._session
        if session is not None:
            for prefix, adapter in tuple(session.adapters.items()):
                # Copying an adapter makes it an empty pool (its own support for pickling).
                session.adapters[prefix] = copy.copy(adapter)
