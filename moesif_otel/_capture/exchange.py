"""The Exchange: what has been seen of one request and its response; and `identify`, which speaks of the current one.

The thread or task that serves the request fills it; it may be finished from any thread, once, without a lock. It keeps
no framework objects after the finish.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Mapping
from contextvars import ContextVar
from enum import Enum
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

from moesif_otel._capture.body import CapturedBody

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from opentelemetry.sdk.trace import ReadableSpan, Span

    from moesif_otel._capture.body import ByteBudget, LeftOut
    from moesif_otel._guard import Guard
    from moesif_otel.settings import Settings

Direction = Literal["Incoming", "Outgoing"]
Headers = list[tuple[str, str]]

current_exchange: ContextVar[Exchange | None] = ContextVar("moesif_otel_exchange", default=None)
"""The innermost Exchange of this thread or task; `Exchange.outer` leads to the others."""


class Outcome(str, Enum):
    """The way an Exchange ended."""

    COMPLETE = "complete"
    ABORTED = "client_aborted"  # the client left, or the server closed the response early
    FAILED = "error"  # the application (incoming) or the call (outgoing) raised
    DROPPED = "not_read"  # garbage collection ended it: nobody read the response to its end
    UPGRADED = "upgraded"  # a WebSocket handshake: the call is over, the connection is not
    DETACHED = "detached"  # the handler took the connection over
    UNFINISHED = "unfinished"  # the process, or the capture, ended first


AWAITS_SPAN: Final = frozenset({Outcome.COMPLETE, Outcome.FAILED, Outcome.DROPPED})
"""The outcomes of calls whose span can be expected to end soon."""


# W3C Trace Context, "traceparent": version, trace id, parent id, flags; later versions may append fields.
_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(?:-|$)"
)

_SPAN_ID_BITS: Final = (1 << 64) - 1
_CLASS_PHRASES: Final = {1: "Informational", 2: "Success", 3: "Redirection", 4: "Client Error", 5: "Server Error"}


class Decision(NamedTuple):
    """The decision of governance about one request.

    Attributes:
        blocked: The application must not be called; the response is the rest of this decision.
        status: Status of the response; 0 if not blocked.
        headers: Headers to add; if blocked, all headers of the response, with `Content-Type` and `Content-Length`.
        body: Body of the response; None if not blocked, empty if the rule has none.
        blocked_by: Id of the rule that blocked, for the event.
    """

    blocked: bool
    status: int
    headers: Headers
    body: bytes | None
    blocked_by: str | None

    @property
    def phrase(self) -> str:
        """The reason phrase of the status, or that of its class (RFC 9110, 15)."""
        try:
            return HTTPStatus(self.status).phrase
        except ValueError:
            return _CLASS_PHRASES.get(self.status // 100, "Unknown Status")

    def added_to(self, headers: Headers) -> Headers:
        """Return the application's headers followed by those of this decision. Never raises.

        Order and repetition of the application's headers stay as they are. If they have a `Content-Type`, no second one
        is added: clients interpret two differently.
        """
        try:
            given = list(headers)  # an iterator can be read once
            has_type = any(name.lower() == "content-type" for name, _ in given)
            added = (item for item in self.headers if not (has_type and item[0].lower() == "content-type"))
            return [*given, *added]
        except Exception:  # not pairs of strings: an error of the application, which the server reports
            return headers


if TYPE_CHECKING:
    Steps = Generator[Any, Any, None]
    """Work in steps: yields each awaitable that a callback returned, and is sent its result or thrown its error."""

    class Governed(Protocol):
        """The governance rules asked about one request, in steps (`_pipeline.governance.GovernedRequest`)."""

        needs_identity: bool

        @property
        def needs_body(self) -> bool: ...

        def give_body(self, data: bytes | None, *, whole: bool = True) -> None: ...

        def verdict(self) -> Decision | None: ...

    class CapturePipeline(Protocol):
        """The pipeline that a capture works for, as far as it needs it (`_pipeline.pipeline.Pipeline`)."""

        settings: Settings
        guard: Guard
        budget: ByteBudget
        is_live: bool  # until its shutdown

        @property
        def generation(self) -> int:
            """Grows in a forked child; an Exchange of another generation belongs to another process."""

        def opened(self, exchange: Exchange) -> None:
            """Take note of a new Exchange (binds the current span, starts threads when needed). Never raises."""

        def has_callbacks(self, exchange: Exchange) -> bool:
            """Tell whether callbacks will look at this Exchange's `callback_arguments`."""

        @property
        def has_rules(self) -> bool:
            """Tell whether there are governance rules to ask."""

        @property
        def sees_spans(self) -> bool:
            """Tell whether the pipeline gets the spans of a tracer provider."""

        def watch(self, provider: Any) -> None:
            """See the spans of an SDK provider from now on, until the shutdown; twice is once. Never raises."""

        def watch_global_provider(self) -> None:
            """See the spans of the global provider: an application may set it up in any order. Never raises."""

        def bind(self, exchange: Exchange, span: Any) -> None:
            """Bind the span that the capture made for this call."""

        def answering(self, exchange: Exchange) -> None:
            """Take note that the application answers: the span that is current may be the call's own. Never raises."""

        def governed(self, exchange: Exchange) -> Governed | None:
            """Return what asks the governance rules in steps; None when there are none."""

        def identifying(self, exchange: Exchange) -> Steps:
            """Run IDENTIFY_* before the application is called, in steps."""

        def calling_back(self, exchange: Exchange) -> Steps:
            """Run all callbacks, in steps, before the call has ended."""

        def finishing(self, exchange: Exchange) -> Steps:
            """Do what `finished` does, in steps."""

        def finished(self, exchange: Exchange) -> None:
            """Take a finished Exchange: run the callbacks here and now, and submit it. Never raises, never waits."""

        def finished_late(self, exchange: Exchange) -> None:
            """Take an Exchange that a finalizer finished: lock-free; callbacks run on our own thread. Never raises."""

        def superseded(self, exchange: Exchange) -> None:
            """Forget an Exchange whose call another one delivers. Never raises."""

        def force_flush(self, timeout_s: float) -> bool:
            """Deliver every call that has finished, within the time."""


class Exchange:
    """One request and its response, as seen by a capture.

    Args:
        pipeline: Whose capture this is.
        direction: `Incoming` for calls to this service, `Outgoing` for its own calls.
        method: HTTP method.

    Attributes that a capture fills (everything else belongs to the pipeline):
        url: Full URL.
        request_headers, response_headers: List of (name, value), repetitions kept.
        peer_address: Address of the connection's other end (`REMOTE_ADDR`).
        request_body, response_body: Captured bodies; None when nothing is to be captured.
        status: Status that was sent or received; None while there is none.
        error: Exception that ended it; kept as type and place only, see `finish`.
        callback_arguments: What the users' callbacks take, for example `(app, environ)`; dropped at the finish.
        identify_arguments: What `IDENTIFY_*` take where that is more.
        notes: JSON-able facts for `metadata.moesif_otel`.
    """

    __slots__ = (
        "__weakref__",
        "_finish_token",
        "_submit_token",
        "blocked_by",
        "callback_arguments",
        "callbacks_done",
        "closing",
        "company_id",
        "direction",
        "ended_ns",
        "error_type",
        "generation",
        "governed",
        "has_remote_parent",
        "identified",
        "identify_arguments",
        "inner_server_span",
        "metadata",
        "method",
        "notes",
        "outcome",
        "outer",
        "parent_span_id",
        "peer_address",
        "pipeline",
        "provisional",
        "request_body",
        "request_headers",
        "response_body",
        "response_headers",
        "same_request",
        "session_token",
        "skipped",
        "span",
        "span_ended",
        "span_id",
        "started_ns",
        "status",
        "trace_id",
        "transaction_id",
        "url",
        "user_id",
    )

    def __init__(self, pipeline: CapturePipeline, direction: Direction, method: str) -> None:
        self.pipeline = pipeline
        self.generation = pipeline.generation
        self.direction: Direction = direction
        self.method = method
        self.outer = current_exchange.get()
        self.started_ns = time.time_ns()
        self.ended_ns: int | None = None
        self.outcome: Outcome | None = None
        self.error_type: str | None = None
        self.status: int | None = None
        self.peer_address: str | None = None
        self.request_body: CapturedBody | None = None
        self.response_body: CapturedBody | None = None
        self.url = ""
        self.request_headers: Headers = []
        self.response_headers: Headers = []
        self.callback_arguments: tuple[Any, ...] = ()
        self.identify_arguments: tuple[Any, ...] = ()
        self.notes: dict[str, Any] = {}
        # What is left to do for a call that a finalizer ended (its span, for one); run on our own thread.
        self.closing: Callable[[], None] | None = None
        # The span side. `span` is the live span until it ends, then the ReadableSpan that `on_end` was given.
        self.span: Span | ReadableSpan | None = None
        self.span_ended = False
        self.trace_id = 0
        self.span_id = 0
        self.parent_span_id: int | None = None
        self.has_remote_parent = False
        self.inner_server_span = False  # an instrumentor inside made a span of its own for this very request
        # A capture that knows only the server or the framework opened it; a middleware in the code takes over.
        self.provisional = False
        self.governed = False  # the governance rules have been asked
        # Whether `outer` is of this very request too, seen for another pipeline.
        self.same_request = False
        self.transaction_id: str | None = None  # the event's, where it had to be fixed early: a response header told it
        # What callbacks and `identify` said.
        self.skipped: bool | None = None  # None: SKIP has not been asked
        self.identified = False
        self.callbacks_done = False
        self.user_id: Any = None
        self.company_id: Any = None
        self.session_token: Any = None
        self.metadata: Any = None
        self.blocked_by: str | None = None
        # Deleting an attribute that is there succeeds once, atomically: who did it finishes the call, or submits it.
        self._finish_token = self._submit_token = None

    def note_identity(self, field: str, value: Any, source: str) -> None:
        """Note who makes the call; with `DEBUG` the event says who said so, as `metadata.moesif_otel.identity`."""
        setattr(self, field, value)
        if value is not None and self.pipeline.settings.debug:
            self.notes.setdefault("identity", {})[field] = source

    def note_session_key(self, key: str, source: str) -> None:
        """Note a session's or caller's key as the session token.

        Whoever has the key can act as the caller, so it is hashed: calls with one key still have the same token.
        """
        if self.pipeline.settings.auto_hide_sensitive:
            key = hashlib.sha256(key.encode()).hexdigest()[:32]
        self.note_identity("session_token", key, source)

    def capture_request_body(self) -> CapturedBody:
        """Begin to capture the request body."""
        body = self.request_body = CapturedBody(self.pipeline.settings.request_max_body_size, self.pipeline.budget)
        return body

    def capture_response_body(self) -> CapturedBody:
        """Begin to capture the response body."""
        body = self.response_body = CapturedBody(self.pipeline.settings.response_max_body_size, self.pipeline.budget)
        return body

    @property
    def is_open(self) -> bool:
        """Tell whether it has not been finished."""
        return hasattr(self, "_finish_token")

    def finish(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """End the Exchange; the first call counts, later ones do nothing. Never raises.

        Args:
            outcome: How it ended.
            error: The exception that ended it, if one did; only its type's name is kept.
        """
        if self.close(outcome, error):
            self.pipeline.finished(self)

    def finish_from_finalizer(self, outcome: Outcome = Outcome.DROPPED, error: BaseException | None = None) -> None:
        """End the Exchange from `__del__` or a weakref callback: lock-free; callbacks run later on our own thread."""
        if self.close(outcome, error):
            self.pipeline.finished_late(self)

    def close(self, outcome: Outcome, error: BaseException | None = None) -> bool:
        """End the record, apart from handing it over; True for the first call, whose caller has that to do."""
        try:
            del self._finish_token
        except AttributeError:
            return False
        self.ended_ns = time.time_ns()
        self.outcome = outcome
        if error is not None:
            self.error_type = type(error).__qualname__
        return True

    def take_submission(self) -> bool:
        """Tell whether the caller is the one who submits this call: True once."""
        try:
            del self._submit_token
        except AttributeError:
            return False
        return True

    def release(self) -> None:
        """Drop the framework's objects; after the callbacks nothing of a request may be kept alive by us."""
        self.callback_arguments = ()
        self.identify_arguments = ()
        self.outer = None

    def fix_ids(self) -> None:
        """Fix trace and span id unless they are fixed.

        The trace is the enclosing call's, else that of the span around it, else `traceparent`'s, else a new one.
        """
        if self.span_id:
            return
        outer = self.outer
        if outer is not None and not self.trace_id:
            outer.fix_ids()
            self.trace_id, self.parent_span_id = outer.trace_id, outer.span_id
        if not self.trace_id and self.has_remote_parent:
            self._take_remote_parent()
        if not self.trace_id:
            both = random_id(24)
            self.trace_id, self.span_id = both >> 64, both & _SPAN_ID_BITS
        if not (self.trace_id and self.span_id):  # a traceparent's trace, or one in 2^64 draws
            self.trace_id, self.span_id = self.trace_id or random_id(16), random_id(8)

    def _take_remote_parent(self) -> None:
        for name, value in self.request_headers:
            if name.lower() == "traceparent":
                found = _TRACEPARENT.match(value.strip())
                if found is not None:
                    self.trace_id, self.parent_span_id = int(found[1], 16), int(found[2], 16)
                return

    def supersede(self) -> None:
        """Make room for another Exchange of the same call: this one ends here and is never delivered."""
        if self.close(Outcome.UNFINISHED):
            self.pipeline.superseded(self)

    @property
    def kept_bytes(self) -> int:
        """Captured bytes of both bodies."""
        request, response = self.request_body, self.response_body
        return (0 if request is None else request.kept_bytes) + (0 if response is None else response.kept_bytes)

    def leave_bodies_out(self, reason: LeftOut) -> None:
        """Release the captured bytes and note the reason for the event; the sizes of the bodies stay known."""
        for body in (self.request_body, self.response_body):
            if body is not None and body.kept_bytes:
                self.pipeline.budget.release(body.discard())
                body.left_out = reason

    def discard(self) -> None:
        """Release the captured bytes; the Exchange will not be delivered."""
        self.release()
        request, response = self.request_body, self.response_body
        freed_bytes = (0 if request is None else request.discard()) + (0 if response is None else response.discard())
        if freed_bytes:
            self.pipeline.budget.release(freed_bytes)
        self.request_body = self.response_body = None


def chain(innermost: Exchange | None) -> Sequence[Exchange]:
    """Return an Exchange and the ones around it, innermost first."""
    found: list[Exchange] = []
    while innermost is not None:
        found.append(innermost)
        innermost = innermost.outer
    return found


def is_over(exchange: Exchange) -> bool:
    """Tell whether a call in an environ or scope was another try, by a middleware that calls the application again."""
    return not exchange.is_open and exchange not in chain(current_exchange.get())


def takes_over(present: Sequence[Exchange], pipeline: CapturePipeline, *, provisional: bool) -> bool:
    """Tell whether a call is for a pipeline to capture, although its environ or scope has met captures before."""
    for exchange in present:
        if exchange.pipeline.settings.pipeline_key != pipeline.settings.pipeline_key or is_over(exchange):
            continue
        if not exchange.provisional or provisional:
            return False
        exchange.supersede()
    return True


def identify(
    *,
    user_id: str | None = None,
    company_id: str | None = None,
    session_token: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Say who makes the call that is being served; for use inside a request.

    What is given here wins over the `IDENTIFY_*` and `GET_*` callbacks; metadata is merged key by key. A later call
    overrides an earlier one. Outside a request it does nothing.

    Args:
        user_id: Your id of the user.
        company_id: Your id of the company.
        session_token: Session or API token, if Moesif should see it.
        metadata: JSON-able values for the event's metadata.

    Thread-safe for the thread or task that serves the request (PEP 567 context; `asyncio.to_thread` carries it,
    `run_in_executor` does not). Never raises.
    """
    for exchange in _being_served():
        given = ("user_id", user_id), ("company_id", company_id), ("session_token", session_token)
        for field, said in given:
            if said is not None:
                exchange.note_identity(field, said, "identify()")
        exchange.pipeline.guard.run("metadata of identify()", _add_metadata, exchange, metadata)


def _add_metadata(exchange: Exchange, metadata: Mapping[str, Any] | None) -> None:
    if metadata:
        exchange.metadata = {**(exchange.metadata or {}), **snapshot(metadata)}


def _being_served() -> Iterator[Exchange]:
    """Go over the innermost call and the others of the very same request; calls around a sub-request are not meant."""
    exchange = current_exchange.get()
    while exchange is not None:
        yield exchange
        if exchange.direction == "Incoming" and not exchange.same_request:
            return
        exchange = exchange.outer


_MOST_LEVELS: Final = 100


def snapshot(value: Any) -> Any:
    """Copy the dicts and lists of a value: what the application does to its own ones later is not of this call.

    Each is copied once, wherever it occurs: one that contains itself twice would double the work with each level.
    """
    return _copy(value, {}, 0)


def _copy(value: Any, copies: dict[int, tuple[Any, Any]], level: int) -> Any:
    if level >= _MOST_LEVELS or not isinstance(value, (Mapping, list, tuple)):
        return value
    known = copies.get(id(value))
    if known is not None:
        return known[1]
    copy: Any = {} if isinstance(value, Mapping) else []
    copies[id(value)] = value, copy  # with the original: as long as that lives, its id is its own
    if isinstance(value, Mapping):
        copy.update((key, _copy(one, copies, level + 1)) for key, one in value.items())
    else:
        copy.extend(_copy(one, copies, level + 1) for one in value)
    return copy


_random: list[tuple[int, random.Random]] = []


def random_id(size_bytes: int) -> int:
    """Return a random, non-zero id (W3C Trace Context forbids zero); every process has a source of its own."""
    # Asking the system each time would be two calls that release the interpreter lock in each request.
    pid = os.getpid()
    if not _random or _random[0][0] != pid:
        # Not from bytes: their hash Python 3.13 would import now, which a fork could leave half done.
        seed = int.from_bytes(os.urandom(32), "big")
        _random[:] = [(pid, random.Random(seed))]  # noqa: S311 - ids, no secrets
    return _random[0][1].getrandbits(size_bytes * 8) or 1
