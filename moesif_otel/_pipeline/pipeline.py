"""From a finished call to its event: `Pipeline`, of which one settings value has one.

Captures tell it of calls that begin and end, tracer providers of spans that start and end; it joins the two, runs the
callbacks and submits each call to its sink, once. The Exchange decides, the span decorates: a call is submitted when
its Exchange is finished and no span is bound, or the bound span has ended, or has not ended a second later, or is not
worth waiting for (the client left, a WebSocket).

It runs in the application's threads (calls and spans begin and end there), in finalizers, and on the sink's thread
(calls that finalizers ended, spans that did not end). It takes no lock on the way of a call, never waits there, never
raises there, and does not touch the spans that others see.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.trace import SpanKind

from moesif_otel._capture.callbacks import Callbacks, run_steps
from moesif_otel._capture.exchange import AWAITS_SPAN, Exchange, Outcome, current_exchange
from moesif_otel._delivery.process import at_exit
from moesif_otel._events.caller import settle
from moesif_otel._events.spans import has_http_method
from moesif_otel._guard import PROCESS_GUARD, LiveSet, get_logger, show_debug_log
from moesif_otel._pipeline.governance import GovernedRequest
from moesif_otel._pipeline.sink import EventSink
from moesif_otel._pipeline.spans import claims_of, dispatcher_on

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.sdk.trace import ReadableSpan, Span

    from moesif_otel._capture.exchange import Steps
    from moesif_otel._delivery.stats import Stats
    from moesif_otel._pipeline.sink import Sink
    from moesif_otel._pipeline.spans import Dispatcher
    from moesif_otel.settings import Settings

_T = TypeVar("_T")
_logger: Final = get_logger(__name__)

_SPAN_GRACE_S: Final = 1.0
_CALLBACKS_S: Final = 5.0
"""Callbacks that take longer where nobody waits for them have lost: the call goes without their answers."""
_CALLBACKS_AT_EXIT_S: Final = 1.0
_POLL_S: Final = 0.005
_SWEEP_AT: Final = 1_000
_SAID_APART: Final = frozenset({"APPLICATION_ID", "BASE_URI"})
_MAX_LIVE_SPANS: Final = 10_000

_pipelines: Final[LiveSet[Pipeline]] = LiveSet()


def pipeline_for(settings: Settings, *, of_processor: bool) -> Pipeline:
    """Return a pipeline of equal settings that has not been shut down, to be joined; a new one where there is none.

    A `MoesifSpanProcessor` and the middlewares of the same settings are one pipeline, whichever is made first; two
    middlewares are two, each with its own counters and its own end. `of_processor` asks for one that a processor or
    `instrument` opened, else it is one that they have not.
    """
    for one in live_pipelines():
        if one.of_processor is of_processor and one.settings == settings:
            return one
    return Pipeline(EventSink(settings))


@functools.cache
def _watch_exit() -> None:
    """Register our exit handler, once; a sink exists by now, so it runs before delivery's, which takes no more."""
    at_exit(_at_exit)


def live_pipelines() -> tuple[Pipeline, ...]:
    """Return every pipeline of this process that has not been shut down."""
    return tuple(one for one in _pipelines if one.is_live)


def _at_exit() -> None:
    for pipeline in _pipelines:
        PROCESS_GUARD.run("ending open calls at exit", pipeline.end_open_calls, _CALLBACKS_AT_EXIT_S)


class _Finishing(NamedTuple):
    """A call whose callbacks are at work."""

    exchange: Exchange
    due_s: float
    thread_id: int


class Pipeline:
    """Joins the calls and the spans of one settings value (the sink's by default) and submits them to a sink.

    Thread-safe and fork-safe.
    """

    def __init__(self, sink: Sink, settings: Settings | None = None) -> None:
        self.sink = sink
        self.settings: Settings = settings or sink.settings
        self.guard = sink.guard
        self.budget = sink.budget
        self._claims = claims_of(self.settings.pipeline_key)
        self._callbacks = {
            "Incoming": Callbacks(self.settings, "Incoming", self.guard),
            "Outgoing": Callbacks(self.settings, "Outgoing", self.guard),
        }
        # Keyed by span id (64 random bits). Plain dicts and sets: single operations on them are atomic.
        self._bound: dict[int, Exchange] = {}
        self._live: dict[int, None] = {}
        self._waiting: dict[int, tuple[float, Exchange]] = {}
        # Calls being served; weak, since a capture may lose one. Entries of lost ones are swept now and then.
        self._opened: set[weakref.ref[Exchange]] = set()
        self._finishing: dict[int, _Finishing] = {}
        self._late_work: queue.SimpleQueue[Exchange] = queue.SimpleQueue()
        self._late_thread: threading.Thread | None = None
        self._look_is_due = False  # whether our own thread will look at the calls that wait
        self._housekeepers: set[int] = set()  # threads that have taken calls which are in no table for a moment
        self._late: queue.SimpleQueue[Exchange] = queue.SimpleQueue()
        # Grows in a forked child. A plain number: to ask delivery each time is to ask for the process id each time.
        self.generation = 0
        self.is_live = True
        self._is_silent = True
        self.of_processor = False
        self.sees_spans = False
        self._owners: weakref.WeakSet[Any] = weakref.WeakSet()
        self._dispatchers: list[Dispatcher] = []
        self._global_provider: Any = None  # the one that was looked at last
        self.awaits_global_provider = False  # whether calls came before the application had set one up
        if self.settings.debug:
            show_debug_log()
        _watch_exit()
        _pipelines.add(self)
        sink.delivery.add_housekeeping(_weakly(self, Pipeline.housekeeping))
        sink.delivery.add_after_fork(_weakly(self, Pipeline.after_fork))

    # Who uses it.

    def join(self, owner: Any) -> None:
        """Note one who uses the pipeline; it lives until the last of them has left it or is gone."""
        self._owners.add(owner)

    def leave(self, owner: Any, timeout_s: float | None = None) -> None:
        """Take leave, within a time: the last owner ends the pipeline, the others only deliver what has finished."""
        self._owners.discard(owner)
        if len(self._owners):
            self.force_flush(self.settings.shutdown_timeout if timeout_s is None else timeout_s)
        else:
            self.shutdown(timeout_s)

    def watch_global_provider(self) -> None:
        try:
            provider = trace.get_tracer_provider()
            if provider is not self._global_provider:
                self._global_provider = provider
                self.watch(provider)
        except Exception as exc:
            self.guard.caught("looking for a tracer provider", exc)

    def watch(self, provider: Any) -> None:
        if not callable(getattr(provider, "add_span_processor", None)):
            return
        try:
            span: Any = trace.get_current_span()
            if span.is_recording() and getattr(span, "kind", None) is SpanKind.SERVER:
                # An instrumentation around us has started it for the very call that has us look for a provider.
                self._live[_span_id(span)] = None
            dispatcher = dispatcher_on(provider)
            if dispatcher not in self._dispatchers and self.is_live:
                self._dispatchers.append(dispatcher)
                self.sees_spans = True
                dispatcher.register(self)
        except Exception as exc:
            self.guard.caught("watching a tracer provider", exc)

    def _say_what_is_captured(self, exchange: Exchange) -> None:
        settings = self.settings
        options = ", ".join(f"{name}={text}" for name, text in settings.changed().items() if name not in _SAID_APART)
        _logger.info(
            "moesif_otel: captured the first call (%s, %s); events are sent to %s; options: %s",
            exchange.direction.lower(),
            _name_of(exchange),
            settings.shown_address,
            options or "defaults",
        )

    # The captures' side: see `CapturePipeline`.

    def has_callbacks(self, exchange: Exchange) -> bool:
        return self._callbacks[exchange.direction].any

    def opened(self, exchange: Exchange) -> None:
        try:
            self.sink.delivery.ensure_started()
            # Where no at-fork hook runs (uWSGI) the line above is the first to notice a fork.
            exchange.generation = self.generation
            self._opened.add(weakref.ref(exchange))
            self._bind_current(exchange)
            if self._is_silent:
                self._is_silent = False
                self._say_what_is_captured(exchange)
        except Exception as exc:
            self.guard.caught("opening a call", exc)

    @property
    def has_rules(self) -> bool:
        remote = self.sink.remote
        return remote is not None and bool(remote.rules)

    def governed(self, exchange: Exchange) -> GovernedRequest | None:
        remote = self.sink.remote
        if remote is None or not remote.rules:
            return None
        return GovernedRequest(remote.rules, remote.config, exchange)

    def identifying(self, exchange: Exchange) -> Steps:
        return self._callbacks[exchange.direction].identifying(exchange)

    def calling_back(self, exchange: Exchange) -> Steps:
        exchange.callbacks_done = True
        return self._callbacks[exchange.direction].steps(exchange)

    def finished(self, exchange: Exchange) -> None:
        try:
            self._opened.discard(weakref.ref(exchange))
            if exchange.generation != self.generation:
                exchange.discard()
                return
            callbacks = self._callbacks[exchange.direction]
            if callbacks.any and not exchange.callbacks_done:
                try:
                    run_steps(callbacks.steps(exchange))
                except BaseException:  # SystemExit and KeyboardInterrupt are the application's, the call is ours
                    self._hand_over(exchange)
                    raise
            self._hand_over(exchange)
        except Exception as exc:
            self.guard.caught("finishing a call", exc)
            exchange.discard()

    def finishing(self, exchange: Exchange) -> Steps:
        """Do what `finished` does, in steps, for callers that can await: see `Callbacks.steps`.

        Closed early, it hands the call over without the callbacks that have not run; so do a flush whose time is over
        and the end of the pipeline while it is suspended. A call whose SKIP has not answered is not sent.
        """
        if exchange.generation != self.generation:
            exchange.discard()
            return
        self._finishing[id(exchange)] = _Finishing(exchange, time.monotonic() + _CALLBACKS_S, threading.get_ident())
        self._opened.discard(weakref.ref(exchange))
        try:
            callbacks = self._callbacks[exchange.direction]
            if callbacks.any and not exchange.callbacks_done:
                yield from callbacks.steps(exchange)
        except Exception as exc:
            self.guard.caught("finishing a call", exc)
        finally:
            self._end_finishing(exchange)

    def _end_finishing(self, exchange: Exchange) -> None:
        if self._finishing.pop(id(exchange), None) is not None:
            self.guard.run("finishing a call", self._hand_over, exchange)

    def finished_late(self, exchange: Exchange) -> None:
        self._late.put(exchange)
        self.sink.delivery.wake()

    def _hand_over(self, exchange: Exchange) -> None:
        if exchange.skipped or (exchange.skipped is None and self._callbacks[exchange.direction].may_skip):
            self._unbind(exchange)
            exchange.discard()
            self.sink.delivery.ledger.add("skipped")
            return
        settle(exchange)
        exchange.fix_ids()
        exchange.release()
        self._submit_or_wait(exchange)

    def superseded(self, exchange: Exchange) -> None:
        self._opened.discard(weakref.ref(exchange))
        self._unbind(exchange)
        exchange.discard()

    def _submit_or_wait(self, exchange: Exchange) -> None:
        if exchange.span is None or exchange.span_ended or exchange.outcome not in AWAITS_SPAN:
            self._submit(exchange)
            return
        self._waiting[id(exchange)] = (time.monotonic() + _SPAN_GRACE_S, exchange)
        if _has_ended(exchange):  # just now, in another thread that did not see us waiting
            self._submit(exchange)
        elif not self._look_is_due:  # one that is due comes within the second that this call waits, and sees it
            self.sink.delivery.wake()

    def _submit(self, exchange: Exchange, *, now: bool = True) -> None:
        if not exchange.take_submission():
            return
        span = exchange.span
        if span is not None:
            self._waiting.pop(id(exchange), None)
            self._bound.pop(_span_id(span), None)
        if now:
            self.sink.submit(exchange)
        else:
            self.sink.submit_later(exchange)

    # The spans' side.

    def on_start(self, span: Span) -> None:
        """Bind a starting span to the Exchange it belongs to."""
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
            self.guard.caught("joining a span to its call", exc)

    def on_end(self, span: ReadableSpan) -> None:
        """Let an ended span decorate its call; lock-free, a finalizer may end spans."""
        try:
            span_id = _span_id(span)
            exchange = self._bound.pop(span_id, None)
            if exchange is None:
                self._live.pop(span_id, None)
                return
            exchange.span = span
            exchange.span_ended = True
            if id(exchange) in self._waiting:
                self._submit(exchange, now=False)
        except Exception as exc:
            self.guard.caught("handling the end of a span", exc)

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

    def bind(self, exchange: Exchange, span: Any) -> None:
        """Bind the span that a capture made for this very call, where `on_start` has not seen it as that."""
        if span.is_recording() and exchange.is_open:
            self._live.pop(_span_id(span), None)
            self._bind(exchange, span)

    def answering(self, exchange: Exchange) -> None:
        """Bind the current span while the application answers, where `on_start` ran in another thread.

        The SDK's `ConcurrentMultiSpanProcessor` runs processors in threads of its own. Never raises.
        """
        try:
            # One that does not record was sampled out; its ids are no parent of the call, which has the caller's.
            if exchange.span is None and exchange.is_open and trace.get_current_span().is_recording():
                self._bind_current(exchange)
        except Exception as exc:
            self.guard.caught("joining a span to its call", exc)

    def _bind(self, exchange: Exchange, span: Span) -> None:
        context = span.get_span_context()
        exchange.span = span
        exchange.trace_id, exchange.span_id = context.trace_id, context.span_id
        parent = span.parent
        exchange.parent_span_id = parent.span_id if parent is not None else None
        self._bound[context.span_id] = exchange
        self._claims.add(context.trace_id, context.span_id)

    def _bind_current(self, exchange: Exchange) -> None:
        """Bind the span that was current before the capture began, where it is this call's own.

        Its instrumentor's patch then lies outside our capture.
        """
        if exchange.span is not None or not otel_context.get_current():
            return
        span: Any = trace.get_current_span()
        context = span.get_span_context()
        if not context.is_valid:
            return
        wanted = SpanKind.CLIENT if exchange.direction == "Outgoing" else SpanKind.SERVER
        nested = exchange.direction == "Incoming" and exchange.outer is not None and not exchange.same_request
        if context.span_id in self._live and getattr(span, "kind", None) is wanted and not nested:
            self._live.pop(context.span_id, None)
            self._bind(exchange, span)
        elif exchange.trace_id == 0:
            # Somebody's span around the call: the event joins its trace.
            exchange.trace_id, exchange.parent_span_id = context.trace_id, context.span_id
            outer = exchange.outer
            if outer is not None and outer.pipeline is self and outer.span is None and not outer.trace_id:
                # A span that was sampled out, or that another provider made: the call being served is in that trace.
                outer.fix_ids()
                outer.trace_id, outer.span_id = context.trace_id, context.span_id
                self._claims.add(context.trace_id, context.span_id)

    def _unbind(self, exchange: Exchange) -> None:
        span = exchange.span
        if span is not None:
            self._bound.pop(_span_id(span), None)
        exchange.span = None

    # Our own thread's side.

    def housekeeping(self) -> float | None:
        """Look after calls on our own thread; return in how many seconds to look again, None for no need."""
        if self.awaits_global_provider and self.is_live:
            self.watch_global_provider()
            self.awaits_global_provider = not self._dispatchers
        self._look_is_due = False  # before looking: who comes later asks for a look of its own
        wait_s = self._look_after_calls()
        self._look_is_due = wait_s is not None
        return wait_s

    def _look_after_calls(self) -> float | None:
        """Finish what finalizers left, submit calls whose span does not end; return when the next one is due."""
        here = threading.get_ident()
        self._housekeepers.add(here)
        try:
            self._take_late_calls()
            return self._submit_overdue()
        finally:
            self._housekeepers.discard(here)

    def _take_late_calls(self) -> None:
        while True:
            try:
                exchange = self._late.get_nowait()
            except queue.Empty:
                break
            closing, exchange.closing = exchange.closing, None
            if closing is not None:
                self.guard.run("ending a garbage-collected call", closing)
            if self._callbacks[exchange.direction].any and not exchange.callbacks_done:
                self._finishing[id(exchange)] = _Finishing(exchange, time.monotonic() + _CALLBACKS_S, 0)
                self._late_work.put(exchange)
            else:
                self.finished(exchange)
        self._run_late_callbacks()
        for reference in tuple(self._opened) if len(self._opened) > _SWEEP_AT else ():
            if reference() is None:
                self._opened.discard(reference)

    def _submit_overdue(self) -> float | None:
        now = time.monotonic()
        soonest: float | None = None
        for finishing in tuple(self._finishing.values()):
            if finishing.due_s <= now:
                self._end_finishing(finishing.exchange)
            else:
                soonest = finishing.due_s if soonest is None else min(soonest, finishing.due_s)
        for due, exchange in tuple(self._waiting.values()):
            if due <= now:
                self.guard.run("submitting a call", self._submit, exchange)
            else:
                soonest = due if soonest is None else min(soonest, due)
        return None if soonest is None else soonest - now

    def _run_late_callbacks(self) -> None:
        """Have the callbacks of calls that finalizers ended run on a thread of their own: one may wait or hang."""
        thread = self._late_thread
        if self._late_work.empty() or (thread is not None and thread.is_alive()):
            return
        thread = threading.Thread(target=self._late_callbacks, name="moesif-otel-callbacks", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # at the end of the process no thread can be started (Python 3.12 and later)
            self._late_callbacks()
        else:
            self._late_thread = thread

    def _late_callbacks(self) -> None:
        with suppress_instrumentation():
            while True:
                try:
                    exchange = self._late_work.get_nowait()
                except queue.Empty:
                    return
                if id(exchange) in self._finishing:
                    try:
                        run_steps(self._callbacks[exchange.direction].steps(exchange))
                    except BaseException as exc:  # a SystemExit would end this thread before its work is done
                        self.guard.caught("callbacks of a garbage-collected call", exc)
                    self._end_finishing(exchange)

    def force_flush(self, timeout_s: float) -> bool:
        """Deliver every call that has finished, within a time; True if all were delivered or are counted as dropped."""
        deadline_s = time.monotonic() + timeout_s
        self._settle(deadline_s - timeout_s / 2)
        return self.sink.force_flush(max(0.0, deadline_s - time.monotonic()))

    def shutdown(self, timeout_s: float | None = None) -> None:
        """End the pipeline: running calls are sent as far as they came (`unfinished`), then everything is delivered."""
        if timeout_s is None:
            timeout_s = self.settings.shutdown_timeout
        deadline_s = time.monotonic() + timeout_s
        self.is_live = False
        dispatchers, self._dispatchers = self._dispatchers, []
        for dispatcher in dispatchers:
            dispatcher.unregister(self)
        self.end_open_calls(timeout_s / 2)
        self.sink.shutdown(max(0.0, deadline_s - time.monotonic()))

    def end_open_calls(self, timeout_s: float) -> None:
        """Submit the calls that are being served as far as they came, and those that wait for their span.

        Their callbacks, which may wait for anything, run on a thread of their own and get `timeout_s` seconds.
        """
        for reference in tuple(self._opened):
            exchange = reference()
            if exchange is not None and exchange.close(Outcome.UNFINISHED):
                self._late.put(exchange)
        self._settle(time.monotonic() + timeout_s, for_good=True)

    def _settle(self, deadline_s: float, *, for_good: bool = False) -> None:
        """Submit all that has finished; callbacks that are at work get until the deadline."""
        self.guard.run("background work of the pipeline", self._look_after_calls)
        here = {threading.get_ident()}
        while self._housekeepers - here and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        begun = tuple(self._finishing.items())
        others = [(key, one) for key, one in begun if one.thread_id not in here]
        while any(self._finishing.get(key) is one for key, one in others) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        # Calls whose callbacks have begun meanwhile are no part of a flush: they keep their time.
        for key, one in tuple(self._finishing.items()) if for_good else begun:
            if self._finishing.get(key) is one:
                self._end_finishing(one.exchange)
        for _due, exchange in tuple(self._waiting.values()):
            self.guard.run("submitting a call", self._submit, exchange)

    def after_fork(self) -> None:
        """Forget, in a forked child, the calls that the parent serves and delivers."""
        self.generation += 1
        for reference in tuple(self._opened):
            exchange = reference()
            for body in () if exchange is None else (exchange.request_body, exchange.response_body):
                if body is not None:
                    body.discard()  # in the budget of the parent, which has it, too
        self._bound, self._live, self._waiting, self._finishing, self._opened = {}, {}, {}, {}, set()
        self._late, self._late_work, self._late_thread = queue.SimpleQueue(), queue.SimpleQueue(), None
        self._housekeepers, self._look_is_due = set(), False

    def stats(self) -> Stats:
        """Return the counters of the sink."""
        return self.sink.stats()


def _weakly(pipeline: Pipeline, method: Callable[[Pipeline], _T]) -> Callable[[], _T | None]:
    """Make a function that delivery may keep without keeping the pipeline."""
    reference = weakref.ref(pipeline)

    def run() -> _T | None:
        found = reference()
        return method(found) if found is not None else None

    return run


_NO_FRAMEWORKS: Final = frozenset({"__main__", "abc", "builtins", "collections", "moesif_otel", "typing"})


def _name_of(exchange: Exchange) -> str:
    """Name what serves or makes a call by the package of its object: `flask`, `tornado`, `requests`."""
    arguments = exchange.callback_arguments
    subject = getattr(arguments[0], "__self__", arguments[0]) if arguments else exchange
    # Of the user's own class (a Tornado handler) the framework's base counts.
    for kind in reversed(type(subject).__mro__):
        name = kind.__module__.partition(".")[0]
        if name not in _NO_FRAMEWORKS:
            return name
    return exchange.method


def _has_ended(exchange: Exchange) -> bool:
    return exchange.span_ended


def _span_id(span: Any) -> int:
    span_id: int = span.get_span_context().span_id
    return span_id
