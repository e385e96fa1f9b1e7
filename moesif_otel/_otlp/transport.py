"""Somebody else's exporter as the transport of our delivery: what its `FAILURE` means for a batch.

Owns: `ExporterTransport`, and the adapter that finds the HTTP session of OTLP's exporter.
Threads: our senders; `after_fork` in a forked child.
Never: waits beyond what the exporter itself waits, touches a parent's connection in a child.
"""

from __future__ import annotations

import copy
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import requests
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from moesif_otel._delivery.outcome import Answer, Outcome, outcome_of_status, retry_after_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from moesif_otel._guard import Guard

__all__ = ["ExporterTransport", "http_session"]

# An exporter that tells no status (gRPC, a user's own) and fails this often in a row for the same span is taken to fail
# because of that span: with the pauses between attempts, which grow to half a minute, that is about ten minutes.
_MOST_ATTEMPTS: Final = 20
_ATTEMPTS: Final = "_moesif_otel_attempts"


def http_session(exporter: SpanExporter) -> requests.Session | None:
    """Find the `requests.Session` of OTLP's HTTP exporter; None for any other exporter, or a shape we do not know.

    Half private: `tests/test_forward.py` is its canary. Without it delivery works on, more slowly to give up.
    """
    older = getattr(exporter, "_session", None)  # up to 1.44
    newer = getattr(getattr(getattr(exporter, "_client", None), "_transport", None), "_session", None)
    return next((found for found in (older, newer) if isinstance(found, requests.Session)), None)


class ExporterTransport:
    """Delivery's transport over an OTel exporter.

    OTLP's exporters try again by themselves for about ten seconds; what fails then waits here, and goes again.

    Args:
        exporter: The exporter.
        guard: Takes what its shutdown raises.

    For one sender: an exporter's `export` is never called twice at a time (OTel specification, "Span Exporter").
    """

    def __init__(self, exporter: SpanExporter, guard: Guard) -> None:
        self._exporter = exporter
        self._guard = guard
        self._last = threading.local()
        self._session = http_session(exporter)
        if self._session is not None:
            self._session.hooks["response"].append(self._note)

    def _note(self, response: requests.Response, **_: Any) -> None:
        self._last.status = response.status_code
        self._last.retry_after = response.headers.get("Retry-After")

    def send(self, payloads: Sequence[ReadableSpan], timeout_s: float) -> Answer:
        """Export one batch; the exporter's own timeout is the one that counts."""
        del timeout_s
        self._last.status = self._last.retry_after = None
        if self._exporter.export(payloads) is SpanExportResult.SUCCESS:
            return Answer(Outcome.DELIVERED, self._last.status)
        status: int | None = self._last.status
        if status is not None and status >= 400:
            wait_s = retry_after_seconds(self._last.retry_after, time.time())
            return Answer(outcome_of_status(status), status, retry_after_s=wait_s)
        return Answer(self._without_status(payloads), detail=f"{type(self._exporter).__name__} failed")

    def _without_status(self, payloads: Sequence[ReadableSpan]) -> Outcome:
        if self._session is not None:
            return Outcome.RETRY  # no answer came: nothing is wrong with the spans
        fewest = _MOST_ATTEMPTS
        for span in payloads:
            attempts = span.__dict__[_ATTEMPTS] = span.__dict__.get(_ATTEMPTS, 0) + 1
            fewest = min(fewest, attempts)
        return Outcome.RETRY if fewest < _MOST_ATTEMPTS else Outcome.ISOLATE

    def close(self) -> None:
        """Shut the exporter down."""
        if self._session is not None and self._note in self._session.hooks["response"]:
            self._session.hooks["response"].remove(self._note)
        self._guard.run("shutdown of the exporter", self._exporter.shutdown)

    def after_fork(self) -> None:
        """Give a forked child connections of its own; the parent's are let go of, not closed."""
        self._last = threading.local()
        session = self._session
        if session is not None:
            for prefix, adapter in tuple(session.adapters.items()):
                # Copying an adapter makes it an empty pool (its own support for pickling).
                session.adapters[prefix] = copy.copy(adapter)
