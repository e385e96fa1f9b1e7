"""Where the calls of a pipeline become events: sampling, conversion, mask, then delivery.

`submit` and `submit_span` are called by the application's threads (a span may even end in a finalizer) and return at
once; the rest runs on delivery's intake thread. An event whose mask failed is never sent.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

from moesif_otel._capture.body import ByteBudget, LeftOut
from moesif_otel._capture.exchange import Exchange
from moesif_otel._delivery.client import MoesifTransport
from moesif_otel._delivery.profile_queue import ProfileQueue
from moesif_otel._delivery.stats import DropReason, Ledger
from moesif_otel._delivery.worker import Delivery, Prepared
from moesif_otel._events.build import event_of, read_call, serialize, without_bodies
from moesif_otel._guard import Guard
from moesif_otel._pipeline.mask import EventMask
from moesif_otel._remote import sampling
from moesif_otel._remote.facts import CallFacts, route_of
from moesif_otel._remote.poller import ConfigPoller

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from moesif_otel._delivery.stats import Stats
    from moesif_otel._events.call import Call
    from moesif_otel.settings import Settings

__all__ = ["EVENTS_SHARE", "EVENT_OVERHEAD_BYTES", "EventSink"]

_logger: Final = logging.getLogger(__name__)

EVENT_OVERHEAD_BYTES: Final = 4_096
"""What a call without its bodies is taken to hold until it is ready to be sent: span, headers and objects."""

EVENTS_SHARE: Final = 8
"""Bodies leave this part of `EVENT_QUEUE_BYTES` to the events themselves: bodies go first, events last."""

_MAX_EVENT_BYTES: Final = 1_000_000  # Moesif's limit of one event (API documentation, "limits")
_UNPREPARED_SHARE: Final = 8
"""Captured bodies that wait for our thread may take this part of `EVENT_QUEUE_BYTES`; beyond it bodies are left out."""


class EventSink:
    """Makes Moesif events of finished calls and of bare HTTP spans, and delivers them.

    Args:
        settings: The pipeline's settings.

    Thread-safe and fork-safe.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.guard = Guard()
        self.budget = ByteBudget(settings.event_queue_bytes - settings.event_queue_bytes // EVENTS_SHARE)
        self._ledger = Ledger()
        # Bodies as the application made them, in its part of the heap, which does not shrink when they go: in a flood
        # they would come on top of the payloads that wait.
        self._unprepared = ByteBudget(settings.event_queue_bytes // _UNPREPARED_SHARE)
        self._mask = EventMask(settings.mask_event_model, self.guard)
        self.transport = MoesifTransport(settings, on_tags=self._note_tags)
        self._profiles: ProfileQueue | None = None
        self.remote = ConfigPoller(settings, self.transport)
        self._told: set[str] = set()
        self.delivery: Delivery[Exchange | ReadableSpan] = Delivery(
            settings,
            prepare=self._prepare,
            on_drop=self._discard,
            transport=self.transport,
            without_bodies=without_bodies,
            ledger=self._ledger,
            budget=self.budget,
            guard=self.guard,
        )
        self.delivery.add_after_fork(self._unprepared.after_fork)

    def ensure_started(self) -> None:
        """Start the threads of this process unless they run."""
        self.delivery.ensure_started()
        self.remote.ensure_started()

    def _note_tags(self, config_etag: str | None, rules_tag: str | None) -> None:
        self.remote.note_tags(config_etag, rules_tag)

    def submit_profile(self, path: str, body: bytes) -> bool:
        """Queue one profile POST; False when there is no room."""
        if self._profiles is None:
            # Of two made at the same time one is used by its caller alone: both deliver.
            self._profiles = ProfileQueue(self.settings, self.transport, self.guard)
        return self._profiles.submit(path, body)

    def count(self, name: str) -> None:
        """Count something that is no event's fate."""
        self._ledger.count(name)

    # Taking calls.

    def submit(self, exchange: Exchange) -> None:
        """Take over a finished call with its captured bytes; its span is `exchange.span`. Never raises, never waits."""
        try:
            self._hold_unprepared(exchange)
            self._submit(exchange)
        except Exception as exc:
            self.guard.caught("taking a call", exc)

    def submit_span(self, span: ReadableSpan) -> None:
        """Take a bare HTTP span of somebody's pipeline. Never raises, never waits."""
        try:
            self.ensure_started()
            self._submit(span)
        except Exception as exc:
            self.guard.caught("export of a span", exc)

    def _submit(self, item: Exchange | ReadableSpan) -> None:
        self.budget.charge(EVENT_OVERHEAD_BYTES)
        if not self.delivery.submit(item, EVENT_OVERHEAD_BYTES):
            self._discard(item)

    def _hold_unprepared(self, exchange: Exchange) -> None:
        kept_bytes = exchange.kept_bytes
        waiting_bytes, limit_bytes = self._unprepared.held_bytes + kept_bytes, self._unprepared.limit_bytes
        if waiting_bytes > limit_bytes // 2:
            self.delivery.wake()  # it gathers otherwise
        if kept_bytes and waiting_bytes > limit_bytes:
            exchange.leave_bodies_out(LeftOut.MEMORY)
            return
        self._unprepared.charge(kept_bytes)

    def _discard(self, item: Exchange | ReadableSpan) -> None:
        if isinstance(item, Exchange):
            self._unprepared.release(item.kept_bytes)
            item.discard()

    # Making events of them.

    def _prepare(self, item: Exchange | ReadableSpan) -> Prepared | DropReason:
        exchange, span = (item, item.span) if isinstance(item, Exchange) else (None, item)
        try:
            call = read_call(exchange, span, self.settings)
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
            self._discard(item)
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
        facts = CallFacts(call.method, route_of(call.url), call.client_address, call.status)
        sampled = sampling.decide(self.remote.config, facts, call.user_id, call.company_id)
        call.weight *= sampled.weight
        return sampled.keep

    # Flush, end, counters.

    def force_flush(self, timeout_s: float) -> bool:
        """Deliver everything that was submitted.

        Args:
            timeout_s: Return after this time at the latest.

        Returns:
            True if everything submitted before was delivered or is counted as dropped.
        """
        deadline_s = time.monotonic() + timeout_s
        done = self.delivery.force_flush(timeout_s)
        if self._profiles is not None:
            done = self._profiles.force_flush(max(0.0, deadline_s - time.monotonic())) and done
        return done

    def shutdown(self, timeout_s: float | None = None) -> None:
        """Deliver what is pending, then end the threads; later calls are counted as dropped (`shutdown`).

        Args:
            timeout_s: Return after this time at the latest; `SHUTDOWN_TIMEOUT` by default.
        """
        if timeout_s is None:
            timeout_s = self.settings.shutdown_timeout
        deadline_s = time.monotonic() + timeout_s
        if self._profiles is not None:
            # First, and with half of the time at most: they are few, and events must not starve them.
            self._profiles.shutdown(timeout_s / 2)
        self.delivery.shutdown(max(0.0, deadline_s - time.monotonic()))
        self.remote.release()

    def stats(self) -> Stats:
        """Return the counters: `accepted == delivered + sum(dropped.values()) + pending` at any time.

        `profiles` has those of profile calls that did not wait, under the same law.
        """
        stats = self._ledger.snapshot()
        stats["held_bytes"] = self.budget.held_bytes
        stats["errors"] = {**self.guard.counts(), **self.remote.counts()}
        if self._profiles is not None:
            stats["profiles"] = self._profiles.stats()
        return stats
