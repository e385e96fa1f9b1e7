"""Validates profiles and actions, writes them as JSON, and sends or queues them.

An argument is validated as a whole before anything is sent. Errors name the place (`users[3].metadata.plan`), never the
value. A call that waits makes its POSTs in the caller's thread, once. A call that does not wait is queued, retried and
counted as events are, by a delivery of its own, without the spool: the application can send a profile again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import date, datetime, timezone
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from moesif_otel._capture.body import ByteBudget
from moesif_otel._delivery.delivery import Delivery
from moesif_otel._delivery.outcome import BatchOutcome, PostAnswer
from moesif_otel._delivery.queue import MAX_BATCH_BYTES
from moesif_otel._delivery.stats import DropReason
from moesif_otel.errors import MoesifDeliveryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moesif_otel._delivery.client import MoesifTransport
    from moesif_otel._delivery.stats import Stats
    from moesif_otel._guard import Guard
    from moesif_otel.settings import Settings

_MAX_BATCH_ITEMS: Final = 1_000
_MAX_QUEUED: Final = 100_000
_QUEUE_SHARE: Final = 8  # queued profiles may use this fraction of `EVENT_QUEUE_BYTES`, in addition to the events
_MAX_NAMED: Final = 20
_MAX_DEPTH: Final = 100
_STATUSES: Final = ("active", "cancelled", "paused", "trialing", "pending", "draft", "future")
_JSON_OPTIONS: Final = orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_NON_STR_KEYS

# What to do about an answer, by status.
_ADVICE: Final[Mapping[int | None, str]] = {
    None: "check BASE_URI, and that this machine can reach it (proxy, firewall, DNS)",
    400: "check the values of its fields",
    401: "check APPLICATION_ID",
    402: "the subscription is not active: see the billing page of the Moesif portal",
    403: "check APPLICATION_ID, and any proxy in between",
    404: "check BASE_URI",
    413: "make it smaller",
    429: "try again later",
}
_Check = Callable[[Any, str], Any]


# -- fields


def _text(value: Any, place: str) -> str:
    if not _any_text(value, place).strip():
        raise ValueError(f"{place}: got an empty string, takes a string with something in it")
    return str(value)


def _any_text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: got {_type_name(value)}, takes a string")  # noqa: TRY004 - documented
    return value


def _time(value: Any, place: str) -> Any:
    if isinstance(value, str):
        return _text(value, place)
    if isinstance(value, date):  # a datetime is a date
        return value
    raise ValueError(f"{place}: got {_type_name(value)}, takes a datetime or ISO 8601 text")


def _status(value: Any, place: str) -> str:
    value = value.value if isinstance(value, Enum) else value
    if value not in _STATUSES:
        raise ValueError(f"{place}: takes one of {', '.join(_STATUSES)}")
    return str(value)


def _object(value: Any, place: str) -> dict[str, Any]:
    found = _as_mapping(value)
    if found is None:
        raise ValueError(f"{place}: got {_type_name(value)}, takes an object (a dict)")
    return found


def _campaign(value: Any, place: str) -> dict[str, Any]:
    return {name: _any_text(item, f"{place}.{name}") for name, item in _present(_object(value, place)).items()}


def _objects(value: Any, place: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{place}: got {_type_name(value)}, takes a list of objects")  # noqa: TRY004 - documented
    return [_present(_object(item, f"{place}[{index}]")) for index, item in enumerate(value)]


def _request(value: Any, place: str) -> dict[str, Any]:
    request = _present(_object(value, place))
    request.setdefault("time", datetime.now(timezone.utc))
    return _checked(request, _REQUEST, place)


def _checked(fields: dict[str, Any], checks: Mapping[str, _Check], place: str) -> dict[str, Any]:
    return {name: checks[name](item, f"{place}.{name}") if name in checks else item for name, item in fields.items()}


_REQUEST: Final[dict[str, _Check]] = {
    "time": _time,
    "uri": _text,
    "ip_address": _any_text,
    "user_agent_string": _any_text,
}
_WHO: Final[dict[str, _Check]] = {"company_id": _text, "session_token": _any_text, "metadata": _object}
_PERSON: Final[dict[str, _Check]] = {
    **_WHO,
    "modified_time": _time,
    "ip_address": _any_text,
    "user_agent_string": _any_text,
    "campaign": _campaign,
}


class ProfileKind(NamedTuple):
    """A kind of data that Moesif stores besides events."""

    path: str  # for one; for several, `path + "/batch"`
    singular: str
    plural: str
    required: tuple[str, ...]
    checks: Mapping[str, _Check]  # of the known fields; others are sent as they are


USER: Final = ProfileKind("/v1/users", "user", "users", ("user_id",), {**_PERSON, "user_id": _text})
COMPANY: Final = ProfileKind(
    "/v1/companies", "company", "companies", ("company_id",), {**_PERSON, "company_domain": _any_text}
)
SUBSCRIPTION: Final = ProfileKind(
    "/v1/subscriptions",
    "subscription",
    "subscriptions",
    ("subscription_id", "company_id", "status"),
    {
        **_WHO,
        "subscription_id": _text,
        "status": _status,
        "current_period_start": _time,
        "current_period_end": _time,
        "items": _objects,
    },
)
ACTION: Final = ProfileKind(
    "/v1/actions",
    "action",
    "actions",
    ("action_name", "request"),
    {
        **_WHO,
        "action_name": _text,
        "request": _request,
        "transaction_id": _text,
        "user_id": _text,
        "subscription_id": _text,
    },
)


# -- JSON


def encode(kind: ProfileKind, profile: Any, place: str) -> bytes:
    """Return a profile (a dict, a `moesifapi` model, or JSON text of an object) as JSON, at most `MAX_BATCH_BYTES`.

    Raises:
        ValueError: It is none of these, lacks a field, or has a wrong value; the message says where.
    """
    profile = _parsed(profile, place)
    found = _as_mapping(profile)
    if found is None:
        raise ValueError(f"{place}: got {_type_name(profile)}, takes a dict, a moesifapi model or JSON text")
    fields = _present(found)
    for name in kind.required:
        if name not in fields:
            raise ValueError(f"{place}.{name}: missing, it is required")
    fields = _checked(fields, kind.checks, place)
    try:
        written = orjson.dumps(fields, _default, _JSON_OPTIONS)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(_problem(fields, place, 0) or f"{place}: cannot be sent as JSON") from None
    if b"null" in written and (problem := _problem(fields, place, 0)):  # NaN is written so
        raise ValueError(problem)
    most_bytes = MAX_BATCH_BYTES - len(kind.path) - 2  # its path stands before it in the queue
    if len(written) > most_bytes:
        raise ValueError(f"{place}: {len(written):,} bytes of JSON, takes at most {most_bytes:,}")
    return written


def _parsed(argument: Any, place: str) -> Any:
    if not isinstance(argument, (str, bytes, bytearray)):
        return argument
    try:
        return orjson.loads(argument)
    except orjson.JSONDecodeError:
        raise ValueError(f"{place}: text that is not JSON") from None


def _as_mapping(value: Any) -> dict[Any, Any] | None:
    """Return a mapping, or a model with `to_dictionary` (as moesifapi's), as a dict; None for anything else."""
    try:
        if isinstance(value, Mapping):
            return dict(value)
        to_dictionary = getattr(value, "to_dictionary", None)
        made = to_dictionary() if callable(to_dictionary) and not isinstance(value, type) else None
        return dict(made) if isinstance(made, Mapping) else None
    except Exception:  # what cannot be read is no profile
        return None


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    # A model has every field, most of them None; an upsert must not erase those.
    return {name: value for name, value in fields.items() if value is not None}


def _default(value: Any) -> Any:
    """Return a value that orjson can write, for one that it cannot."""
    if isinstance(value, datetime):
        # As in events: UTC with milliseconds. A datetime without a time zone is taken as UTC.
        if value.tzinfo is not None:
            value = value.astimezone(timezone.utc).replace(tzinfo=None)
        return value.isoformat(timespec="milliseconds")
    if isinstance(value, date):
        return value.isoformat()
    found = _as_mapping(value)
    if found is None:
        raise TypeError
    return found


def _problem(value: Any, place: str, depth: int) -> str | None:
    """Return where a value cannot be written as JSON, and why; None if it can."""
    if depth > _MAX_DEPTH:
        return f"{place:.200}: nested over {_MAX_DEPTH} levels, or in itself"
    found = _as_mapping(value)
    if found is not None:
        for key, item in found.items():
            if not isinstance(key, (str, int, Enum)):
                return f"{place}: a key of type {_type_name(key)} cannot be sent as JSON"
            problem = _problem(key, f"{place}: a key", depth) or _problem(item, f"{place}.{key}", depth + 1)
            if problem:
                return problem
        return None
    if isinstance(value, (list, tuple)):
        problems = (_problem(item, f"{place}[{index}]", depth + 1) for index, item in enumerate(value))
        return next(filter(None, problems), None)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{place}: NaN and infinity cannot be sent as JSON"
    try:
        orjson.dumps(value, _default, _JSON_OPTIONS)
    except (TypeError, ValueError, RecursionError):
        if isinstance(value, str):
            return f"{place}: text with half a surrogate pair cannot be sent as JSON"
        if isinstance(value, int):
            return f"{place}: a whole number over 64 bits cannot be sent as JSON"
        return f"{place}: {_type_name(value)} cannot be sent as JSON"
    return None


def _type_name(value: Any) -> str:
    return "None" if value is None else type(value).__name__


# -- POSTs


class Post(NamedTuple):
    """One POST; `first` is the index of its first profile in the caller's argument."""

    path: str  # if it ends in `/batch`, the body is an array
    profiles: Sequence[bytes]
    first: int = 0

    @property
    def body(self) -> bytes:
        """The JSON to send."""
        return b"[%b]" % b",".join(self.profiles) if self.path.endswith("/batch") else self.profiles[0]

    @property
    def indexes(self) -> range:
        """The indexes of its profiles in the caller's argument."""
        return range(self.first, self.first + len(self.profiles))

    def halves(self) -> tuple[Post, Post]:
        """Return the two halves, for a server that finds it too large."""
        middle = len(self.profiles) // 2
        first, second = self.profiles[:middle], self.profiles[middle:]
        return Post(self.path, first, self.first), Post(self.path, second, self.first + middle)


def posts_of(kind: ProfileKind, argument: Any, *, batch: bool) -> list[Post]:
    """Validate a whole argument and return it as POSTs of at most 1,000 profiles and 5 MB each, in order.

    The argument is a profile as for `encode`; with `batch`, an iterable of them, or JSON text of an array.

    Raises:
        ValueError: It is wrong; the message says where.
    """
    if not batch:
        return [Post(kind.path, [encode(kind, argument, kind.singular)])]
    profiles = _parsed(argument, kind.plural)
    if isinstance(profiles, Mapping) or not hasattr(profiles, "__iter__"):
        raise ValueError(f"{kind.plural}: got {_type_name(profiles)}, takes a list of {kind.plural}")
    posts: list[Post] = []
    some: list[bytes] = []
    size_bytes = 0
    for index, profile in enumerate(profiles):
        written = encode(kind, profile, f"{kind.plural}[{index}]")
        if not posts or len(some) >= _MAX_BATCH_ITEMS or size_bytes + len(written) + 3 > MAX_BATCH_BYTES:
            some, size_bytes = [], 0
            posts.append(Post(kind.path + "/batch", some, index))
        # A copy: each small result of orjson occupies a block of some kilobytes.
        some.append(bytes(memoryview(written)))
        size_bytes += len(written) + 1
    return posts


# -- delivery


class Profiles:
    """Sends or queues the profiles of one pipeline or client, with the limits and timeouts of events.

    Thread-safe and fork-safe. No thread is started until something is queued.
    """

    def __init__(self, settings: Settings, transport: MoesifTransport, guard: Guard) -> None:
        self._settings = settings
        self._transport = transport
        self._queued: Delivery[bytes] = Delivery(
            settings.with_changes(
                batch_size=_MAX_BATCH_ITEMS, event_queue_size=_MAX_QUEUED, event_worker_count=1, spool_directory=None
            ),
            prepare=lambda _: DropReason.NOT_CONVERTIBLE,  # never called: everything is prepared already
            transport=_BatchTransport(transport),
            budget=ByteBudget(settings.event_queue_bytes // _QUEUE_SHARE),
            guard=guard,
            measured=False,
        )

    def send(self, call: str, kind: ProfileKind, posts: Sequence[Post]) -> None:
        """Make all POSTs, once, in order.

        A POST that is too large is halved. If Moesif refuses one, the others are still sent. If Moesif cannot be
        reached, or refuses the application id, the rest is not tried. All but actions are upserts that merge, so
        callers can repeat the whole call. `call` is the method that the user called, for messages.

        Raises:
            MoesifDeliveryError: Some were not accepted; `undelivered` has their indexes.
        """
        self._queued.notice_fork()
        waiting = list(reversed(posts))
        undelivered: list[int] = []
        first: tuple[PostAnswer, str] | None = None
        while waiting:
            post = waiting.pop()
            answer = self._transport.post_json(post.path, post.body, self._settings.export_timeout)
            if answer.outcome is BatchOutcome.DELIVERED:
                continue
            if answer.outcome is BatchOutcome.SPLIT and len(post.profiles) > 1:
                waiting.extend(reversed(post.halves()))
                continue
            first = first or (answer, post.path)
            undelivered.extend(post.indexes)
            if answer.status is None or answer.outcome is BatchOutcome.SUSPENDED:
                undelivered.extend(index for rest in reversed(waiting) for index in rest.indexes)
                break
        if first is not None:
            total = sum(len(post.profiles) for post in posts)
            raise self._failure(f"{call}: {_what(kind, undelivered, total)}", *first, undelivered)

    def _failure(self, what: str, answer: PostAnswer, path: str, undelivered: list[int]) -> MoesifDeliveryError:
        address = self._settings.shown_address.rstrip("/") + path
        if answer.status is not None:
            why = f"Moesif answered {answer.status} at {address}"
        else:
            why = f"no answer came from {address}" + (f" ({answer.detail})" if answer.detail else "")
        advice = _ADVICE.get(answer.status) or {3: _ADVICE[404], 5: _ADVICE[429]}.get((answer.status or 0) // 100)
        text = f"{what}: {why}; {advice}" if advice else f"{what}: {why}"
        return MoesifDeliveryError(text, status=answer.status, undelivered=tuple(sorted(undelivered)))

    def queue(self, kind: ProfileKind, posts: Sequence[Post]) -> bool:
        """Queue all profiles; return False if there was not room for all: the others are counted as dropped."""
        self._queued.ensure_started()
        prefix = kind.path.encode() + b"\n"
        taken = [self._take(prefix + profile) for post in posts for profile in post.profiles]
        return all(taken)

    def _take(self, payload: bytes) -> bool:
        queued = self._queued
        if not queued.accept():
            return False
        if not queued.budget.has_room(len(payload)):
            queued.ledger.drop(DropReason.QUEUE_FULL)
            return False
        queued.submit_accepted(payload)
        return True

    def force_flush(self, timeout_s: float) -> bool:
        """Deliver what is queued, within the time limit."""
        return not self._queued.ledger.pending or self._queued.force_flush(timeout_s)

    def shutdown(self, timeout_s: float) -> None:
        """Deliver what is queued, within the time limit, then end the threads."""
        self._queued.shutdown(timeout_s)

    def stats(self) -> Stats | None:
        """Return the counters of queued profiles; None if none was ever queued."""
        stats = self._queued.ledger.snapshot()
        return stats if stats.accepted else None

    def close(self) -> None:
        """Close idle connections; a later call opens new ones."""
        self._transport.close()


def _what(kind: ProfileKind, undelivered: list[int], total: int) -> str:
    if total == 1:
        return f"the {kind.singular} was not accepted"
    some = ", ".join(map(str, sorted(undelivered)[:_MAX_NAMED]))
    more = ", …" if len(undelivered) > _MAX_NAMED else ""
    return f"{len(undelivered)} of {total} {kind.plural} were not accepted (indexes {some}{more})"


class _BatchTransport:
    """Posts batches of payloads; each payload is the path of its kind, a line break and its JSON."""

    def __init__(self, transport: MoesifTransport) -> None:
        self._transport = transport
        self.address, self.setting = transport.address, transport.setting
        self.spool_binding: str | None = None

    def send(self, payloads: Sequence[bytes], timeout_s: float) -> PostAnswer:
        """Make one POST; a batch of several kinds is halved until each part has one kind."""
        path, _, _ = payloads[0].partition(b"\n")
        prefix = path + b"\n"
        if not all(payload.startswith(prefix) for payload in payloads):
            return PostAnswer(BatchOutcome.SPLIT)
        body = b"[%b]" % b",".join([payload[len(prefix) :] for payload in payloads])
        return self._transport.post_json(f"{path.decode()}/batch", body, timeout_s)

    def close(self) -> None:
        """Do nothing: the connections belong to the transport's owner."""

    def after_fork(self) -> None:
        """Forget the parent's connections; events may do that too."""
        self._transport.after_fork()
