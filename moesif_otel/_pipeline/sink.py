"""Turns the calls of a pipeline into events: sampling, conversion, mask, then delivery.

Small events without a mask are made at once, in the thread that ends the call; the others on delivery's intake thread.
Nothing waits or raises here, and an event whose mask failed is never sent.
"""

from __future__ import annotations

import functools
import importlib
import time
from typing import TYPE_CHECKING, Any, Final

from moesif_otel._capture.body import ByteBudget, LeftOut
from moesif_otel._capture.callbacks import check_signature
from moesif_otel._capture.exchange import Exchange
from moesif_otel._delivery.client import MoesifTransport
from moesif_otel._delivery.delivery import Delivery
from moesif_otel._delivery.profiles import Profiles
from moesif_otel._delivery.queue import Prepared
from moesif_otel._delivery.stats import DropReason
from moesif_otel._events.build import EventBuilder
from moesif_otel._events.json_check import load_validator
from moesif_otel._events.serialize import json_bytes, serialize, without_bodies
from moesif_otel._events.spans import attributes_of, call_of_span, weight_of_span
from moesif_otel._guard import LATE_IMPORTS, Guard, get_logger
from moesif_otel._remote.config import FULL_RATE, sampled_weight
from moesif_otel._remote.facts import CallFacts, route_of
from moesif_otel._remote.poller import ConfigPoller

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from moesif_otel._delivery.stats import Stats
    from moesif_otel._pipeline.mask import EventMask
    from moesif_otel.settings import Settings

_logger: Final = get_logger(__name__)

EVENT_OVERHEAD_BYTES: Final = 4_096
"""Bytes charged for a call without its bodies until it is ready to be sent: span, headers and objects."""

EVENTS_SHARE: Final = 8
"""Bodies leave this part of `EVENT_QUEUE_BYTES` to the events themselves: bodies go first, events last."""

_HEADER_OVERHEAD_BYTES: Final = 160
"""Bytes charged for a header besides its characters: two texts and a tuple."""

_MAX_EVENT_BYTES: Final = 1_000_000  # Moesif's limit of one event (API documentation, "limits")

_AT_ONCE_BYTES: Final = 16_384
"""A call that has captured more, or compressed bodies, is not converted in its own thread.

There it makes this one call wait for as long as it takes. On a thread of ours every call would wait for it, at each
point at which it lets go of the interpreter: at saturation p99 is half as much when converted at once, at the same CPU
(also against slices of a millisecond with pauses between). But that thread may run an event loop, and a client can make
16 KB cost some milliseconds, what they decompress to 0.1 s.
"""

_AT_ONCE_URL_CHARACTERS: Final = 4_096

_CONTENT_ENCODING: Final = "content-encoding"
_ENCODING_CHARACTERS: Final = len(_CONTENT_ENCODING)

_UNPREPARED_SHARE: Final = 8
"""Captured bodies that wait for our thread may take this part of `EVENT_QUEUE_BYTES`; beyond it bodies are left out."""


class Sink:
    """Takes the calls of a pipeline: the base of `EventSink`, and of the sink over somebody else's exporter.

    Args:
        settings: The pipeline's settings.
        transport: Moesif, where profiles go in any case.

    A class that inherits it sets `delivery`. Thread-safe and fork-safe.
    """

    delivery: Delivery[Any]
    remote: ConfigPoller | None = None
    """Moesif's configuration; None where sampling and governance do not apply."""

    def __init__(self, settings: Settings, transport: MoesifTransport) -> None:
        self.settings = settings
        self.guard = Guard()
        self.budget = ByteBudget(settings.event_queue_bytes - settings.event_queue_bytes // EVENTS_SHARE)
        self.profiles = Profiles(settings, transport, self.guard)

    def submit(self, exchange: Exchange) -> None:
        """Take over a finished call with its captured bytes; its span is `exchange.span`. Never raises, never waits.

        Not for finalizers: see `submit_later`.
        """
        raise NotImplementedError

    def submit_later(self, exchange: Exchange) -> None:
        """Take over a finished call as `submit` does, leaving all work to our thread; a finalizer may call it."""
        raise NotImplementedError

    def _submit(self, item: Any, held_bytes: int) -> None:
        """Hand an item to delivery, within the bound of memory: bodies go first, calls last."""
        self.budget.charge(held_bytes)
        if not self.budget.has_room(0, self.settings.event_queue_bytes):
            self._leave_bodies_out(item)
            if not self.budget.has_room(0, self.settings.event_queue_bytes):
                self.budget.release(held_bytes)
                self._discard(item)
                self._drop(DropReason.QUEUE_FULL)
                return
        if not self.delivery.submit(item, held_bytes):
            self._discard(item)

    def _leave_bodies_out(self, item: Any) -> None:
        if isinstance(item, Exchange):
            item.leave_bodies_out(LeftOut.MEMORY)

    def _discard(self, item: Any) -> None:
        if isinstance(item, Exchange):
            item.discard()

    def _give_up(self, exchange: Exchange, exc: Exception) -> None:
        self.guard.caught("submitting a call", exc)
        exchange.discard()
        self._drop(DropReason.NOT_CONVERTIBLE)

    def _drop(self, reason: DropReason) -> None:
        self.delivery.ledger.accept()
        self.delivery.ledger.drop(reason)

    def force_flush(self, timeout_s: float) -> bool:
        """Deliver what was submitted, within the time; True if all of it was delivered or is counted as dropped."""
        deadline_s = time.monotonic() + timeout_s
        done = self.delivery.force_flush(timeout_s)
        return self.profiles.force_flush(max(0.0, deadline_s - time.monotonic())) and done

    def shutdown(self, timeout_s: float | None = None) -> None:
        """Deliver what is pending within the time, then end the threads; later calls are dropped (`shutdown`)."""
        if timeout_s is None:
            timeout_s = self.settings.shutdown_timeout
        deadline_s = time.monotonic() + timeout_s
        # First, and with half of the time at most: they are few, and events must not starve them.
        self.profiles.shutdown(timeout_s / 2)
        self.delivery.shutdown(max(0.0, deadline_s - time.monotonic()))

    def stats(self) -> Stats:
        """Return the counters: `accepted == delivered + sum(dropped.values()) + pending` at any time.

        `profiles` has those of profile calls that did not wait; they add up in the same way.
        """
        stats = self.delivery.ledger.snapshot()
        profiles = self.profiles.stats()
        if profiles is not None:
            stats["profiles"] = profiles
        return stats


class EventSink(Sink):
    """Makes Moesif events of finished calls and of bare HTTP spans, and delivers them.

    Args:
        settings: The pipeline's settings.

    Raises:
        MoesifConfigError: `MASK_EVENT_MODEL` does not take one event.

    Thread-safe and fork-safe.
    """

    remote: ConfigPoller

    def __init__(self, settings: Settings) -> None:
        check_signature("MASK_EVENT_MODEL", settings.mask_event_model, ("event",))
        self.transport = MoesifTransport(settings, on_tags=self._note_tags)
        super().__init__(settings, self.transport)
        # Bodies as the application made them, in its part of the heap, which does not shrink when they go: in a flood
        # they would come on top of the payloads that wait.
        self._unprepared = ByteBudget(settings.event_queue_bytes // _UNPREPARED_SHARE)
        self._mask: EventMask | None = None
        if settings.mask_event_model is not None:
            # Late: few pipelines have one, and it brings asyncio and moesifapi's models with it.
            from moesif_otel._pipeline.mask import EventMask

            self._mask = EventMask(settings.mask_event_model, self.guard)
        self._builder = EventBuilder(settings)
        self.remote = ConfigPoller(settings, self.transport, self.guard)
        self._told: set[str] = set()
        self.delivery = Delivery(
            settings,
            prepare=self._prepare,
            on_drop=self._discard,
            transport=self.transport,
            without_bodies=without_bodies,
            poll=self.remote.step,
            budget=self.budget,
            guard=self.guard,
        )
        self.delivery.add_after_fork(self._unprepared.after_fork)
        self.delivery.add_housekeeping(_load_late)

    def _note_tags(self, config_etag: str | None, rules_tag: str | None) -> None:
        if self.remote.note_tags(config_etag, rules_tag):
            self.delivery.wake_poller()

    # Taking calls.

    def submit(self, exchange: Exchange) -> None:
        # A small one is made an event at once, others on our thread.
        try:
            if self._mask is not None or _may_take_long(exchange):
                self.submit_later(exchange)
            else:
                self._make_now(exchange)
        except Exception as exc:
            self._give_up(exchange, exc)
        finally:
            self.delivery.settle_at_exit()

    def submit_later(self, exchange: Exchange) -> None:
        try:
            held_bytes = EVENT_OVERHEAD_BYTES + held_by_texts(exchange)
            for body in (exchange.request_body, exchange.response_body):
                if body is not None:
                    body.seal()  # what is given back when the call is converted is what is reserved here
            bodies = self._unprepared
            if exchange.kept_bytes and not bodies.reserve(exchange.kept_bytes):
                exchange.leave_bodies_out(LeftOut.MEMORY)
            if not bodies.has_room(0, bodies.limit_bytes // 2):
                self.delivery.wake()  # it gathers otherwise
        except Exception as exc:
            self._give_up(exchange, exc)
        else:
            self._submit(exchange, held_bytes)

    def submit_span(self, span: ReadableSpan) -> None:
        """Take a bare HTTP span of somebody's pipeline. Never raises, never waits."""
        try:
            self.delivery.ensure_started()
            if self._mask is None:
                self._make_now(span)
            else:
                self._submit(span, EVENT_OVERHEAD_BYTES + _held_by_attributes(span))
        except Exception as exc:
            self.guard.caught("export of a span", exc)

    def _make_now(self, item: Exchange | ReadableSpan) -> None:
        if not self.delivery.accept():
            super()._discard(item)  # before any work is done for it
            return
        made: bytes | DropReason = DropReason.NOT_CONVERTIBLE
        try:
            made = self._make_guarded(item)
        finally:  # a signal handler may raise: what was accepted is settled all the same
            if isinstance(made, bytes):
                self.delivery.submit_accepted(made)
            else:
                self.delivery.ledger.drop(made)

    def _leave_bodies_out(self, item: Exchange | ReadableSpan) -> None:
        if isinstance(item, Exchange):
            self._unprepared.release(item.kept_bytes)
        super()._leave_bodies_out(item)

    def _discard(self, item: Exchange | ReadableSpan) -> None:
        if isinstance(item, Exchange):
            self._unprepared.release(item.kept_bytes)
        super()._discard(item)

    # Making events of them.

    def _prepare(self, item: Exchange | ReadableSpan) -> Prepared | DropReason:
        if isinstance(item, Exchange):
            self._unprepared.release(item.kept_bytes)
        made = self._make_guarded(item)
        return Prepared(made, len(made)) if isinstance(made, bytes) else made

    def _make_guarded(self, item: Exchange | ReadableSpan) -> bytes | DropReason:
        """Return the event of a call as JSON, or why it is not sent; the call's captured bytes are given back."""
        try:
            return self._make(item)
        except Exception as exc:
            self.guard.caught("conversion of a call", exc)
            return DropReason.NOT_CONVERTIBLE
        finally:
            if isinstance(item, Exchange):
                item.discard()

    def _make(self, item: Exchange | ReadableSpan) -> bytes | DropReason:
        weigh = self._weigh
        if isinstance(item, Exchange):
            call = item
        else:
            found = call_of_span(item, self.settings)
            if found is None:
                return DropReason.NOT_CONVERTIBLE
            if self._may_be_skipped(found):
                return DropReason.SKIP_UNKNOWN
            call = found
            weight = weight_of_span(item)
            if weight != 1:

                def weigh(call: Exchange, address: str | None, user_id: Any) -> int:
                    return weight * self._weigh(call, address, user_id)

        event = self._builder.build(call, parse_bodies=self._mask is not None, weigh=weigh)
        if event is None:
            return DropReason.SAMPLED_OUT
        if self._mask is not None:
            masked = self._mask.apply(event)
            if isinstance(masked, DropReason):
                return masked
            event = masked
        payload = serialize(event)
        if self.settings.debug:
            _logger.debug("moesif_otel: event %s, %d bytes", event["transaction_id"], len(payload))
        size_bytes = len(payload)
        if size_bytes <= _MAX_EVENT_BYTES and self.budget.has_room(size_bytes):
            return payload
        return self._fitted(payload, call)

    def _fitted(self, payload: bytes, call: Exchange) -> bytes | DropReason:
        """Return an event without as many of its bodies as Moesif's limit, or the bound of memory, asks for."""
        # The bodies that it was made of are given back as soon as it is done.
        held_bytes = self.budget.held_bytes - call.kept_bytes
        limit_bytes = min(_MAX_EVENT_BYTES, max(self.budget.limit_bytes - held_bytes, EVENT_OVERHEAD_BYTES))
        for _either_body in range(2):
            if len(payload) > limit_bytes:
                payload = without_bodies(payload)  # the larger one
        return payload if held_bytes + len(payload) <= self.settings.event_queue_bytes else DropReason.QUEUE_FULL

    def _may_be_skipped(self, call: Exchange) -> bool:
        """Tell whether a bare span is of a call that the user's SKIP, which takes a request, might have left out."""
        incoming = call.direction == "Incoming"
        if (self.settings.skip if incoming else self.settings.skip_outgoing) is None:
            return False
        name = "SKIP" if incoming else "SKIP_OUTGOING"
        if name not in self._told:
            self._told.add(name)
            _logger.warning(
                "moesif_otel: spans that moesif_otel did not capture are not sent, because %s is set and there is no "
                "request to call it with (counted as %s); capture the calls with a middleware or "
                "moesif_otel.instrument(), or use MASK_EVENT_MODEL instead, which may return None",
                name,
                DropReason.SKIP_UNKNOWN.value,
            )
        return True

    def _weigh(self, call: Exchange, address: str | None, user_id: Any) -> int:
        """Decide by the rates that Moesif told how many calls an event stands for; 0: it is left out."""
        config = self.remote.config
        if config.sample_rate >= FULL_RATE and not (
            config.sample_rules or config.user_sample_rates or config.company_sample_rates
        ):
            return 1
        facts = CallFacts(call.method, route_of(call.url), address, call.status)
        return sampled_weight(config, facts, user_id, call.company_id)

    # Flush, end, counters.

    def force_flush(self, timeout_s: float) -> bool:
        """Deliver everything that was submitted; see `Sink.force_flush`."""
        if self._mask is not None and self._mask.is_own_thread:
            return False  # the event that it holds would be waited for in vain
        return super().force_flush(timeout_s)

    def shutdown(self, timeout_s: float | None = None) -> None:
        """Deliver what is pending, then end the threads; see `Sink.shutdown`."""
        super().shutdown(timeout_s)
        if self._mask is not None:
            self._mask.tell_end()


@functools.cache
def _load_late() -> None:
    """Import, on our thread, what the first call that needs it would wait for; too slow for the application's start."""
    load_validator()
    for name in ("moesif_otel._redaction.bodies", "moesif_otel._redaction.markup"):
        with LATE_IMPORTS:
            importlib.import_module(name)


def _may_take_long(exchange: Exchange) -> bool:
    kept_bytes = exchange.kept_bytes
    if kept_bytes > _AT_ONCE_BYTES or len(exchange.url) > _AT_ONCE_URL_CHARACTERS:
        return True
    if not kept_bytes:
        return False
    for headers in (exchange.request_headers, exchange.response_headers):
        for name, _ in headers:
            if len(name) == _ENCODING_CHARACTERS and name.lower() == _CONTENT_ENCODING:
                return True
    return False


def held_by_texts(exchange: Exchange) -> int:
    """Return about what URL, headers and metadata of a call hold."""
    held_bytes = len(exchange.url)
    for headers in (exchange.request_headers, exchange.response_headers):
        held_bytes += _HEADER_OVERHEAD_BYTES * len(headers)
        try:
            held_bytes += sum([len(name) + len(value) for name, value in headers])
        except (TypeError, ValueError):
            held_bytes += sum(len(part) for pair in headers for part in pair if isinstance(part, (str, bytes)))
    return held_bytes + (0 if exchange.metadata is None else json_bytes(exchange.metadata))


def _held_by_attributes(span: ReadableSpan) -> int:
    """Return about what the attributes of a span hold."""
    return sum(
        _HEADER_OVERHEAD_BYTES + len(name) + (len(value) if isinstance(value, (str, bytes)) else 0)
        for name, value in attributes_of(span).items()
    )
