"""The span processor: joins what the taps saw with the spans that OpenTelemetry made of it.

Owns: `MoesifSpanProcessor`, the pipeline of one settings value; binding spans to Exchanges; when a call is passed on.
Threads: the application's (spans start and end there), the pipeline's own (calls that finalizers ended, spans that did
not end), and finalizers.
Never: changes a span that others see, raises, waits; takes a lock on the way of a span or a finalizer.

The Exchange decides, the span decorates: a call is handed on when its Exchange is finished and no span is bound, or the
bound span has ended, or has not ended a second later, or is not worth waiting for (the client left, a WebSocket).
"""

from __future__ import annotations

import atexit
import queue
import time
import weakref
from typing import TYPE_CHECKING, Any, Final, TypeVar

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.trace import SpanKind

from moesif_otel._capture.callbacks import Callbacks
from moesif_otel._capture.exchange import Exchange, Outcome, current_exchange
from moesif_otel._events.spans import has_http_method
from moesif_otel._guard import PROCESS_GUARD
from moesif_otel._otlp.exporter import ForwardingExporter
from moesif_otel._pipeline import governance as govern
from moesif_otel._pipeline.claims import claims_of
from moesif_otel._pipeline.sink import EventSink
from moesif_otel._pipeline.trace_ids import fix_ids
from moesif_otel.exporter import MoesifSpanExporter
from moesif_otel.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, Span
    from opentelemetry.sdk.trace.export import SpanExporter

    from moesif_otel._delivery.stats import Stats
    from moesif_otel._remote.verdict import Verdict

__all__ = ["MoesifSpanProcessor", "live_processor"]

_T = TypeVar("_T")
_SPAN_GRACE_S: Final = 1.0
_MAX_LIVE_SPANS: Final = 10_000

_processors: Final[weakref.WeakSet[MoesifSpanProcessor]] = weakref.WeakSet()


def live_processor(settings: Settings) -> MoesifSpanProcessor | None:
    """Give a processor of equal settings that has not been shut down, or None: what `instrument` joins."""
    joinable = (one for one in tuple(_processors) if one.is_live and one.may_be_joined)
    return next((one for one in joinable if one.settings == settings), None)


def _at_exit() -> None:
    for processor in tuple(_processors):
        PROCESS_GUARD.run("ending open calls at exit", processor.end_open_calls)


# Registered after delivery's exit handler (imported above), so it runs before that one takes no more.
atexit.register(_at_exit)


class MoesifSpanProcessor(SpanProcessor):
    """Attaches bodies and identity to the calls of a process and hands them to an exporter.

    Add it to your tracer provider, and let `instrument(settings)` or a `MoesifMiddleware` with the same settings
    capture the calls; spans of other exporters of the provider are not touched.

    Args:
        settings: The dict of options that Moesif users know, or a `Settings`; None reads the environment.
        exporter: Where the calls go: by default a `MoesifSpanExporter` of the same settings; any other OTel
            exporter (OTLP, say) gets private copies of the spans with the capture as attributes.

    Raises:
        MoesifConfigError: An option is wrong, or one that hides data differs from the given exporter's.

    Thread-safe and fork-safe.
    """

    def __init__(
        self, settings: Mapping[str, Any] | Settings | None = None, *, exporter: SpanExporter | None = None
    ) -> None:
        if settings is None:
            settings = Settings.from_keywords({})
        elif not isinstance(settings, Settings):
            settings = Settings.from_mapping(settings)
        self.settings: Settings = settings
        self.sink: EventSink | ForwardingExporter
        if exporter is None:
            self.sink = EventSink(settings)
        elif isinstance(exporter, MoesifSpanExporter):
            settings.check_protects_as(exporter.settings)
            self.sink = exporter.sink
        else:
            self.sink = ForwardingExporter(exporter, settings)
        self.guard = self.sink.guard
        self.budget = self.sink.budget
        self._claims = claims_of(settings.pipeline_key)
        self._callbacks = {
            "Incoming": Callbacks(settings, "Incoming", self.guard),
            "Outgoing": Callbacks(settings, "Outgoing", self.guard),
        }
        # Keyed by span id (64 random bits). Plain dicts: single operations on them are atomic.
        self._bound: dict[int, Exchange] = {}
        self._live: dict[int, None] = {}
        self._waiting: dict[int, tuple[float, Exchange]] = {}
        self._opened: dict[int, weakref.ref[Exchange]] = {}
        self._late: queue.SimpleQueue[Exchange] = queue.SimpleQueue()
        # Grows in a forked child. A plain number: to ask delivery each time is to ask for the process id each time.
        self.generation = 0
        self.is_live = True
        # A door that made its processor also ends it: nobody else may count on that one.
        self.may_be_joined = True
        _processors.add(self)
        self.sink.delivery.add_housekeeping(_weakly(self, MoesifSpanProcessor.housekeeping))
        self.sink.delivery.add_after_fork(_weakly(self, MoesifSpanProcessor.after_fork))

    # The taps' side.

    def has_callbacks(self, exchange: Exchange) -> bool:
        """Whether a callback will look at this Exchange."""
        return self._callbacks[exchange.direction].any

    def opened(self, exchange: Exchange) -> None:
        """Take note of a new Exchange: threads start, the span that is current may be its own."""
        try:
            self.sink.ensure_started()
            # Where no at-fork hook runs (uWSGI) the line above is the first to notice a fork.
            exchange.generation = self.generation
            key = id(exchange)
            self._opened[key] = weakref.ref(exchange, lambda _ref, key=key: self._opened.pop(key, None))  # type: ignore[misc]
            self._bind_current(exchange)
        except Exception as exc:
            self.guard.caught("opening a call", exc)

    def govern(self, exchange: Exchange, read_ahead: Callable[[], bytes | None]) -> Verdict | None:
        """Ask the governance rules about a request; None when there are none, or none has anything to say."""
        remote = self.sink.remote
        if remote is None:
            return None
        rules = remote.rules
        if not rules:
            return None
        try:
            return govern.decide(rules, remote.config, exchange, self._callbacks["Incoming"], read_ahead)
        except Exception as exc:
            self.guard.caught("governance", exc)
            return None

    def finished(self, exchange: Exchange) -> None:
        """Run the callbacks, then hand the call on or wait a moment for its span."""
        try:
            self._opened.pop(id(exchange), None)
            if not exchange.is_ours:
                exchange.discard()
                return
            callbacks = self._callbacks[exchange.direction]
            if callbacks.any:
                callbacks.run(exchange)
                if exchange.skipped:
                    self._unbind(exchange)
                    exchange.discard()
                    self.sink.count("skipped")
                    return
            fix_ids(exchange)
            exchange.let_go()
            self._hand_on_or_wait(exchange)
        except Exception as exc:
            self.guard.caught("finishing a call", exc)
            exchange.discard()

    def finished_late(self, exchange: Exchange) -> None:
        """Take a call that a finalizer ended; the rest happens on our own thread."""
        self._late.put(exchange)
        self.sink.delivery.wake()

    def superseded(self, exchange: Exchange) -> None:
        """Forget a call that another pipeline delivers."""
        self._opened.pop(id(exchange), None)
        self._unbind(exchange)
        exchange.discard()

    def _hand_on_or_wait(self, exchange: Exchange) -> None:
        span = exchange.span
        outcome = exchange.outcome
        if span is None or _has_ended(exchange) or outcome is None or not outcome.awaits_span:
            self._hand_on(exchange)
            return
        self._waiting[id(exchange)] = (time.monotonic() + _SPAN_GRACE_S, exchange)
        if _has_ended(exchange):  # just now, in another thread that did not see us waiting
            self._hand_on(exchange)
        else:
            self.sink.delivery.wake()

    def _hand_on(self, exchange: Exchange) -> None:
        try:
            exchange.emit_token.pop()
        except IndexError:
            return
        self._waiting.pop(id(exchange), None)
        span = exchange.span
        if span is not None:
            self._bound.pop(_span_id(span), None)
        self.sink.submit(exchange)

    # The spans' side.

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Bind a starting span to the Exchange it belongs to (`SpanProcessor`)."""
        del parent_context
        try:
            kind = span.kind
            exchange = current_exchange.get()
            while exchange is not None:
                if exchange.pipeline is self and exchange.is_open and self._offer(exchange, span, kind):
                    return
                exchange = exchange.outer
            if kind is SpanKind.SERVER or kind is SpanKind.CLIENT:
                self._live[_span_id(span)] = None
                if len(self._live) > _MAX_LIVE_SPANS:
                    self._live.pop(next(iter(self._live)), None)
        except Exception as exc:
            self.guard.caught("binding a span", exc)

    def on_end(self, span: ReadableSpan) -> None:
        """Let an ended span decorate its call (`SpanProcessor`); lock-free, a finalizer may end spans."""
        try:
            span_id = _span_id(span)
            exchange = self._bound.pop(span_id, None)
            if exchange is None:
                self._live.pop(span_id, None)
                return
            exchange.span = span
            exchange.span_ended = True
            if id(exchange) in self._waiting:
                self._hand_on(exchange)
        except Exception as exc:
            self.guard.caught("the end of a span", exc)

    def _offer(self, exchange: Exchange, span: Span, kind: SpanKind) -> bool:
        """Bind `span` to `exchange` if it describes that very call; True when the span has found its place."""
        if exchange.direction == "Outgoing":
            if kind is not SpanKind.CLIENT or exchange.span is not None:
                return False
        elif kind is not SpanKind.SERVER and (kind is not SpanKind.INTERNAL or not has_http_method(span)):
            return False
        if exchange.span is None:
            self._bind(exchange, span)
        elif exchange.span is not span:
            exchange.inner_server_span = True
        return True

    def _bind(self, exchange: Exchange, span: Span) -> None:
        context = span.get_span_context()
        exchange.span = span
        exchange.trace_id, exchange.span_id = context.trace_id, context.span_id
        parent = span.parent
        exchange.parent_span_id = parent.span_id if parent is not None else None
        self._bound[context.span_id] = exchange
        self._claims.add(context.trace_id, context.span_id)

    def _bind_current(self, exchange: Exchange) -> None:
        """Bind the span that was current before the tap opened, where it is this call's own.

        Its instrumentor's patch then lies outside our tap.
        """
        if exchange.span is not None:
            return
        span: Any = trace.get_current_span()
        context = span.get_span_context()
        if not context.is_valid:
            return
        wanted = SpanKind.CLIENT if exchange.direction == "Outgoing" else SpanKind.SERVER
        nested = exchange.direction == "Incoming" and exchange.outer is not None
        if context.span_id in self._live and getattr(span, "kind", None) is wanted and not nested:
            self._live.pop(context.span_id, None)
            self._bind(exchange, span)
        elif exchange.trace_id == 0:
            # Somebody's span around the call: the event joins its trace.
            exchange.trace_id, exchange.parent_span_id = context.trace_id, context.span_id
            outer = exchange.outer
            if outer is not None and outer.pipeline is self and outer.span is None and not outer.trace_id:
                # A span that was sampled out, or that another provider made: the call being served is in that trace.
                fix_ids(outer)
                outer.trace_id, outer.span_id = context.trace_id, context.span_id
                self._claims.add(context.trace_id, context.span_id)

    def _unbind(self, exchange: Exchange) -> None:
        span = exchange.span
        if span is not None:
            self._bound.pop(_span_id(span), None)
        exchange.span = None

    # Our own thread's side.

    def housekeeping(self) -> float | None:
        """Finish what finalizers left and hand on calls whose span does not end; gives seconds to the next wish."""
        while True:
            try:
                exchange = self._late.get_nowait()
            except queue.Empty:
                break
            closing, exchange.closing = exchange.closing, None
            if closing is not None:
                self.guard.run("the end of a dropped call", closing)
            self.finished(exchange)
        now = time.monotonic()
        soonest: float | None = None
        for due, exchange in tuple(self._waiting.values()):
            if due <= now:
                self.guard.run("handing a call on", self._hand_on, exchange)
            else:
                soonest = due if soonest is None else min(soonest, due)
        return None if soonest is None else soonest - now

    def force_flush(self, timeout_millis: int = 5_000) -> bool:
        """Deliver every call that has finished.

        Calls still running (a stream, say) are not waited for; they are delivered after they end.

        Args:
            timeout_millis: Return after this time at the latest.

        Returns:
            True if everything that had finished was delivered or is counted as dropped.
        """
        self._hand_on_everything()
        return self.sink.force_flush(timeout_millis / 1_000)

    def shutdown(self, timeout_millis: int | None = None) -> None:
        """End the pipeline: running calls are sent as far as they came (`unfinished`), then everything is delivered.

        Args:
            timeout_millis: Return after this time at the latest; `SHUTDOWN_TIMEOUT` by default. What could not be
                delivered goes to the spool if there is one, and is counted otherwise.
        """
        self.is_live = False
        self.end_open_calls()
        self.sink.shutdown(None if timeout_millis is None else timeout_millis / 1_000)

    def end_open_calls(self) -> None:
        """Hand on the calls that are being served as far as they came, and those that wait for their span."""
        for reference in tuple(self._opened.values()):
            exchange = reference()
            if exchange is not None:
                self.guard.run("ending an open call", exchange.finish, Outcome.UNFINISHED)
        self._hand_on_everything()

    def _hand_on_everything(self) -> None:
        self.guard.run("housekeeping", self.housekeeping)
        for _due, exchange in tuple(self._waiting.values()):
            self.guard.run("handing a call on", self._hand_on, exchange)

    def after_fork(self) -> None:
        """Forget, in a forked child, the calls that the parent serves and delivers."""
        self.generation += 1
        self._bound, self._live, self._waiting, self._opened = {}, {}, {}, {}
        self._late = queue.SimpleQueue()

    def stats(self) -> Stats:
        """Give the counters: `accepted == delivered + sum(dropped.values()) + pending` at any time."""
        return self.sink.stats()


def _weakly(processor: MoesifSpanProcessor, method: Callable[[MoesifSpanProcessor], _T]) -> Callable[[], _T | None]:
    """Make a function that delivery may keep without keeping the processor."""
    reference = weakref.ref(processor)

    def run() -> _T | None:
        found = reference()
        return method(found) if found is not None else None

    return run


def _has_ended(exchange: Exchange) -> bool:
    return exchange.span_ended


def _span_id(span: Any) -> int:
    span_id: int = span.get_span_context().span_id
    return span_id
