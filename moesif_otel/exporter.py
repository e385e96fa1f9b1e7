"""The span exporter: takes spans, makes Moesif events of them and hands these to delivery.

Owns: `MoesifSpanExporter`; the order of sampling, conversion, masking and serialising.
Threads: `export` is called by any (also inside a finalizer); everything else runs on delivery's intake thread.
Never: waits, talks to the network in `export`, sends an event whose mask failed.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind

from moesif_otel._capture.body import ByteBudget, LeftOut
from moesif_otel._delivery.client import MoesifTransport
from moesif_otel._delivery.profile_queue import ProfileQueue
from moesif_otel._delivery.stats import DropReason
from moesif_otel._delivery.worker import Delivery, Prepared
from moesif_otel._events.build import event_of, read_call, serialize, without_bodies
from moesif_otel._events.spans import has_http_method
from moesif_otel._pipeline.captured import CapturedSpan
from moesif_otel._pipeline.claims import claims_of
from moesif_otel._pipeline.mask import EventMask
from moesif_otel._pipeline.outlet import EVENT_OVERHEAD_BYTES, Outlet
from moesif_otel._remote import sampling
from moesif_otel._remote.facts import CallFacts, route_of
from moesif_otel._remote.poller import shared_poller
from moesif_otel.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from moesif_otel._delivery.stats import Stats
    from moesif_otel._events.call import Call

__all__ = ["MoesifSpanExporter"]

_logger: Final = logging.getLogger(__name__)

_MAX_EVENT_BYTES: Final = 1_000_000  # Moesif's limit of one event (API documentation, "limits")
_UNPREPARED_SHARE: Final = 8
"""Captured bodies that wait for our thread may take this part of `EVENT_QUEUE_BYTES`; beyond it bodies are left out."""

_HTTP_KINDS: Final = frozenset({SpanKind.SERVER, SpanKind.CLIENT})


class MoesifSpanExporter(Outlet, SpanExporter):
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
        self._set_up(Settings.from_keywords({"application_id": application_id, **options}))

    @classmethod
    def of(cls, settings: Settings) -> MoesifSpanExporter:
        """Make an exporter of validated settings, without a look at the environment."""
        exporter = cls.__new__(cls)
        exporter._set_up(settings)
        return exporter

    def _set_up(self, settings: Settings) -> None:
        self._set_up_outlet(settings)
        # Bodies as the application made them, in its part of the heap, which does not shrink when they go: in a flood
        # they would come on top of the payloads that wait.
        self._unprepared = ByteBudget(settings.event_queue_bytes // _UNPREPARED_SHARE)
        self._mask = EventMask(settings.mask_event_model, self.guard)
        self._claims = claims_of(settings.pipeline_key)
        self.transport = MoesifTransport(settings, on_tags=self._note_tags)
        self._profiles: ProfileQueue | None = None
        self.remote = shared_poller(settings, self.transport)
        self._told: set[str] = set()
        self.delivery: Delivery[ReadableSpan] = Delivery(
            settings,
            prepare=self._prepare,
            on_drop=self._let_go,
            transport=self.transport,
            without_bodies=without_bodies,
            ledger=self._ledger,
            budget=self.budget,
            guard=self.guard,
        )
        self.add_after_fork(self._unprepared.after_fork)

    # What a processor in front of it uses.

    def ensure_started(self) -> None:
        """Start the threads of this process unless they run."""
        super().ensure_started()
        if self.remote is not None:
            self.remote.ensure_started()

    def _note_tags(self, config_etag: str | None, rules_tag: str | None) -> None:
        if self.remote is not None:
            self.remote.note_tags(config_etag, rules_tag)

    def submit_profile(self, path: str, body: bytes) -> bool:
        """Queue one profile POST; False when there is no room."""
        if self._profiles is None:
            # Of two made at the same time one is used by its caller alone: both deliver.
            self._profiles = ProfileQueue(self.settings, self.transport, self.guard)
        return self._profiles.submit(path, body)

    # OpenTelemetry's interface.

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Take spans; returns at once, `SUCCESS` always: what becomes of the events is in `stats()`."""
        for span in spans:
            try:
                if isinstance(span, CapturedSpan):
                    self._submit(span)
                elif self._is_ours_to_send(span):
                    self.ensure_started()
                    self._submit(span)
            except Exception as exc:
                self.guard.caught("export of a span", exc)
        return SpanExportResult.SUCCESS

    def _is_ours_to_send(self, span: ReadableSpan) -> bool:
        if span.kind not in _HTTP_KINDS or not has_http_method(span):
            return False
        context = span.context
        return context is not None and (context.trace_id, context.span_id) not in self._claims

    def _submit(self, span: ReadableSpan) -> None:
        if isinstance(span, CapturedSpan):
            self._hold_unprepared(span)
        self.budget.charge(EVENT_OVERHEAD_BYTES)
        if not self.delivery.submit(span, EVENT_OVERHEAD_BYTES):
            self._let_go(span)

    def _hold_unprepared(self, span: CapturedSpan) -> None:
        kept_bytes = span.exchange.kept_bytes
        waiting_bytes, limit_bytes = self._unprepared.held_bytes + kept_bytes, self._unprepared.limit_bytes
        if waiting_bytes > limit_bytes // 2:
            self.delivery.wake()  # it gathers otherwise
        if kept_bytes and waiting_bytes > limit_bytes:
            span.exchange.leave_bodies_out(LeftOut.MEMORY)
            return
        span.unprepared_bytes = kept_bytes
        self._unprepared.charge(kept_bytes)

    def _let_go(self, span: ReadableSpan) -> None:
        if not isinstance(span, CapturedSpan):
            return
        self._unprepared.release(span.unprepared_bytes)
        span.unprepared_bytes = 0
        span.exchange.discard()

    def _prepare(self, span: ReadableSpan) -> Prepared | DropReason:
        exchange = span.exchange if isinstance(span, CapturedSpan) else None
        base = span.base if isinstance(span, CapturedSpan) else span
        try:
            call = read_call(exchange, base, self.settings)
            if call is None:
                return DropReason.NOT_CONVERTIBLE
            if exchange is None and self._may_be_skipped(call):
                return DropReason.SKIP_UNKNOWN
            if not self._sampled(call):
                return DropReason.SAMPLED_OUT
            event = event_of(call, self.settings, parse_bodies=self._mask.given)
            masked = self._mask.apply(event)
            if isinstance(masked, DropReason):
                return masked
            payload = serialize(masked)
            if len(payload) > _MAX_EVENT_BYTES:
                payload = without_bodies(payload)
        finally:
            if isinstance(span, CapturedSpan):
                self._let_go(span)
        if self.settings.debug:
            _logger.debug("moesif_otel: event %s, %d bytes", event.transaction_id, len(payload))
        return Prepared(payload, len(payload))

    def _may_be_skipped(self, call: Call) -> bool:
        """Whether a bare span is of a call that the user's SKIP, which takes a request, might have left out."""
        incoming = call.direction == "Incoming"
        if (self.settings.skip if incoming else self.settings.skip_outgoing) is None:
            return False
        name = "SKIP" if incoming else "SKIP_OUTGOING"
        if name not in self._told:
            self._told.add(name)
            _logger.warning(
                "moesif_otel: %s cannot be asked about spans alone, so they are not sent (counted as %s); "
                "use MASK_EVENT_MODEL, which may return None, or a capture of ours",
                name,
                DropReason.SKIP_UNKNOWN.value,
            )
        return True

    def _sampled(self, call: Call) -> bool:
        """Decide by the rates that Moesif told, before any body is looked at; the weight goes into the event."""
        if self.remote is None:
            return True
        facts = CallFacts(call.method, route_of(call.url), call.client_address, call.status)
        sampled = sampling.decide(self.remote.config, facts, call.user_id, call.company_id)
        call.weight *= sampled.weight
        return sampled.keep

    def force_flush(self, timeout_millis: int = 5_000) -> bool:
        """Deliver everything that was exported.

        Args:
            timeout_millis: Return after this time at the latest.

        Returns:
            True if everything exported before was delivered or is counted as dropped.
        """
        deadline_s = time.monotonic() + timeout_millis / 1_000
        done = self.delivery.force_flush(timeout_millis / 1_000)
        if self._profiles is not None:
            done = self._profiles.force_flush(max(0.0, deadline_s - time.monotonic())) and done
        return done

    def shutdown(self, timeout_millis: int | None = None) -> None:
        """Deliver what is pending, then end the threads; later spans are counted as dropped (`shutdown`).

        Args:
            timeout_millis: Return after this time at the latest; `SHUTDOWN_TIMEOUT` by default.
        """
        timeout_s = self.settings.shutdown_timeout if timeout_millis is None else timeout_millis / 1_000
        deadline_s = time.monotonic() + timeout_s
        if self._profiles is not None:
            # First, and with half of the time at most: they are few, and events must not starve them.
            self._profiles.shutdown(timeout_s / 2)
        self.delivery.shutdown(max(0.0, deadline_s - time.monotonic()))
        if self.remote is not None:
            self.remote.release()

    def stats(self) -> Stats:
        """Give the counters: `accepted == delivered + sum(dropped.values()) + pending` at any time.

        `profiles` has those of profile calls that did not wait, under the same law.
        """
        stats = super().stats()
        if self._profiles is not None:
            stats["profiles"] = self._profiles.stats()
        if self.remote is not None:
            stats["errors"] = {**stats["errors"], **self.remote.counts()}
        return stats
