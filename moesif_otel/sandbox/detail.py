"""One call, whole: both messages, what was hidden, who it was, the command that repeats it, and its trace."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from datetime import datetime, timezone
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from moesif_otel._redaction.names import fold
from moesif_otel.sandbox.bodies import BodyView, TreeNode, body_of, raw_body, tree_of
from moesif_otel.sandbox.jsontext import read_json, write_json
from moesif_otel.sandbox.query import Filters
from moesif_otel.sandbox.rows import HIDDEN_MARK, OUR_KEY, Row, our_facts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moesif_otel.sandbox.store import Store, StoredEvent, StoredRow

__all__ = ["Detail", "Fact", "Hidden", "Message", "Waterfall", "curl_of", "detail_of", "hidden_in"]

_MAX_TRACE_ROWS: Final = 100
_MAX_HIDDEN: Final = 50
_MAX_CURL_BODY_BYTES: Final = 50_000
_TOKEN: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
# What curl sets itself, or what belongs to one connection.
_NOT_REPEATED: Final = frozenset({"host", "content-length", "connection", "transfer-encoding", "accept-encoding"})
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_OUTCOMES: Final = {
    "client_aborted": "the client left before the end",
    "error": "the application raised",
    "not_read": "nobody read the response to its end",
    "upgraded": "the connection was upgraded",
    "detached": "the handler took the connection over",
    "unfinished": "the process or the capture ended first",
}


@dataclass(frozen=True, slots=True)
class Message:
    """The request or the response, for the page."""

    name: str
    headers: list[tuple[str, str, bool]]
    body: BodyView


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of a list: its name, its value, the filter that it can be, and where it came from."""

    name: str
    value: str
    filter: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Hidden:
    """A place where something was hidden, and by which option."""

    place: str
    rule: str


@dataclass(frozen=True, slots=True)
class WaterfallBar:
    """One call of a trace; `x` and `width` are of 1000."""

    sequence: int
    row: Row
    depth: int
    x: float
    width: float


@dataclass(frozen=True, slots=True)
class Waterfall:
    """A call and those it caused."""

    spans: list[WaterfallBar]
    total_ms: float


@dataclass(frozen=True, slots=True)
class Detail:
    """Everything the page shows of one call."""

    sequence: int
    row: Row
    uri: str
    began: str
    phrase: str
    marks: list[tuple[str, str]]
    identity: list[Fact]
    ids: list[Fact]
    capture: list[Fact]
    hidden: list[Hidden]
    request: Message
    response: Message
    metadata: list[TreeNode]
    trace: Waterfall | None
    curl: str
    newer: int | None
    older: int | None


def detail_of(store: Store, stored: StoredEvent, filters: Filters) -> Detail:
    """Read one stored event for the page."""
    event = read_json(stored.event)
    row = Row.of_event(event, text=stored.event)
    ours = our_facts(event)
    newer, older = store.neighbours(filters, stored.sequence)
    metadata = {name: value for name, value in (event.get("metadata") or {}).items() if name != OUR_KEY}
    return Detail(
        sequence=stored.sequence,
        row=row,
        uri=event["request"]["uri"],
        began=datetime.fromtimestamp(row.time_ms / 1000, timezone.utc).isoformat(timespec="milliseconds"),
        phrase=_phrase(row.status),
        marks=list(_marks(event, row, ours)),
        identity=list(_identity(event, ours)),
        ids=list(_ids(event, stored)),
        capture=list(_capture(ours)),
        hidden=hidden_in(event),
        request=_message("request", event, row, ours),
        response=_message("response", event, row, ours),
        metadata=list(tree_of(metadata)) if metadata else [],
        trace=_waterfall(store, row),
        curl=curl_of(event),
        newer=newer,
        older=older,
    )


def _phrase(status: int | None) -> str:
    if status is None:
        return "no answer"
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _marks(event: Mapping[str, Any], row: Row, ours: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if row.blocked:
        yield "blocked", f"blocked by rule {event['blocked_by']}"[:200]
    if row.outcome:
        error = ours.get("error_type")
        words = _OUTCOMES.get(row.outcome, row.outcome.replace("_", " "))
        yield "error", f"{words}: {error}"[:200] if isinstance(error, str) else words
    if row.weight != 1:
        yield "weight", f"stands for {row.weight} calls"
    if row.truncated:
        yield "cut", "a body was cut or left out"
    if row.hidden:
        yield "hidden", "values were hidden"


def _identity(event: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[Fact]:
    sources = ours.get("identity")  # told with DEBUG
    sources = sources if isinstance(sources, dict) else {}
    for label, field, name in (
        ("User", "user_id", "user"),
        ("Company", "company_id", "company"),
        ("Session", "session_token", ""),
        ("Subscription", "subscription_id", ""),
    ):
        value = event.get(field)
        if isinstance(value, str) and value:
            source = sources.get(field)
            yield Fact(label, value, name, f"from {source}" if isinstance(source, str) else "")
    address = (event.get("request") or {}).get("ip_address")
    if isinstance(address, str):
        yield Fact("Address", address)


def _ids(event: Mapping[str, Any], stored: StoredEvent) -> Iterator[Fact]:
    span = event.get("span") or {}
    for label, value, name in (
        ("Transaction", event.get("transaction_id"), ""),
        ("Trace", event.get("trace_id"), "trace"),
        ("Span", span.get("id"), ""),
        ("Parent span", span.get("parent_id"), ""),
        ("Application id", stored.application_id, "application_id"),
        ("API version", (event.get("request") or {}).get("api_version"), ""),
        ("Tags", event.get("tags"), ""),
        ("Action", event.get("action_name"), ""),
    ):
        if isinstance(value, str) and value:
            yield Fact(label, value, name)
    yield Fact("Arrived by", "OTLP" if stored.source == "otlp" else "Moesif's events API")


def _capture(ours: Mapping[str, Any]) -> Iterator[Fact]:
    """Return what moesif_otel adds that has no place of its own on the page."""
    for name, value in ours.items():
        if name in {"request_body", "response_body", "identity", "masks", "outcome"}:
            continue
        text = value if isinstance(value, str) else write_json(value).decode()
        yield Fact(name.replace("_", " "), text[:2_000])


def _message(side: str, event: Mapping[str, Any], row: Row, ours: Mapping[str, Any]) -> Message:
    message: Mapping[str, Any] = event.get(side) or {}
    facts = ours.get(f"{side}_body")
    facts = facts if isinstance(facts, dict) else {}
    size_bytes = row.request_bytes if side == "request" else row.response_bytes
    headers = [(name, value, HIDDEN_MARK in value) for name, value in (message.get("headers") or {}).items()]
    return Message(side, headers, body_of(message, facts, size_bytes, known=row.sizes_known))


def hidden_in(event: Mapping[str, Any]) -> list[Hidden]:
    """Find what AUTO_HIDE_SENSITIVE hid (it writes `(hidden)`), and what masks emptied, where the event names them."""
    found: list[Hidden] = []
    rule = "AUTO_HIDE_SENSITIVE"
    for side in ("request", "response"):
        message = event.get(side) or {}
        body_rule, header_rule = f"{side.upper()}_BODY_MASKS", f"{side.upper()}_HEADER_MASKS"
        masked, masked_headers = _masks_in(event, body_rule), _masks_in(event, header_rule)
        if HIDDEN_MARK in str(message.get("uri") or ""):
            found.append(Hidden("address", rule))
        found += [
            Hidden(f"{side} header {name}", rule)
            for name, value in (message.get("headers") or {}).items()
            if HIDDEN_MARK in value
        ]
        found += [
            Hidden(f"{side} header {name}", header_rule)
            for name, value in (message.get("headers") or {}).items()
            if not value and fold(name) in masked_headers
        ]
        data = raw_body(message)
        if data is not None:
            times = data.count(HIDDEN_MARK.encode())
            if times:
                found.append(Hidden(f"{side} body, {times} {'place' if times == 1 else 'places'}", rule))
        else:
            found += [
                Hidden(f"{side} body {path}", body_rule if is_masked else rule)
                for path, is_masked in _hidden_paths(message.get("body"), masked)
            ]
    return found[:_MAX_HIDDEN]


def _masks_in(event: Mapping[str, Any], rule: str) -> frozenset[str]:
    """Return the names of a mask that the event tells of (with DEBUG)."""
    masks = our_facts(event).get("masks")
    names = masks.get(rule) if isinstance(masks, dict) else None
    return frozenset(fold(name) for name in names if isinstance(name, str)) if isinstance(names, list) else frozenset()


def _hidden_paths(body: Any, masked: frozenset[str]) -> Iterator[tuple[str, bool]]:
    """Go over the places of a body in which something was hidden, and tell of each whether a mask did it."""
    waiting: list[tuple[str, Any, bool]] = [("", body, False)]
    number = 0
    while waiting and number < _MAX_HIDDEN:
        path, value, is_named = waiting.pop()
        if isinstance(value, dict):
            waiting += [
                (f"{path}.{name}" if path else name, inner, fold(name) in masked)
                for name, inner in reversed(value.items())
            ]
        elif isinstance(value, list):
            waiting += [(f"{path}[{place}]", inner, False) for place, inner in reversed(list(enumerate(value)))]
        elif (isinstance(value, str) and HIDDEN_MARK in value) or (value is None and is_named):
            number += 1
            yield path[:200] or "(whole)", value is None


def _waterfall(store: Store, row: Row) -> Waterfall | None:
    if not row.trace_id:
        return None
    found = store.rows(Filters(trace=row.trace_id), limit=_MAX_TRACE_ROWS)
    if len(found) < 2:
        return None
    found.sort(key=lambda each: (each.row.time_ms, each.row.direction == "Outgoing", each.sequence))
    began_ms = found[0].row.time_ms
    total_ms = max(each.row.time_ms + (each.row.took_ms or 0) for each in found) - began_ms or 1.0
    spans = [
        WaterfallBar(
            sequence=each.sequence,
            row=each.row,
            depth=depth,
            x=round((each.row.time_ms - began_ms) / total_ms * 1000, 1),
            width=round(max((each.row.took_ms or 0) / total_ms * 1000, 4), 1),
        )
        for each, depth in _in_order(found)
    ]
    return Waterfall(spans, total_ms)


def _in_order(found: list[StoredRow]) -> Iterator[tuple[StoredRow, int]]:
    """Return calls with those they caused below them, and how deep each lies.

    Spans between two calls are not known here: an outgoing call without a known parent belongs to the incoming one
    that was under way when it began.
    """
    by_span = {each.row.span_id: each for each in found if each.row.span_id}
    incoming = [each for each in found if each.row.direction != "Outgoing"]
    children: dict[int, list[StoredRow]] = {}
    roots: list[StoredRow] = []
    for each in found:
        parent = by_span.get(each.row.parent_id)
        if parent is None and each.row.direction == "Outgoing":
            parent = next((one for one in reversed(incoming) if _is_within(each.row, one.row)), None)
        if parent is None or parent is each:
            roots.append(each)
        else:
            children.setdefault(parent.sequence, []).append(each)
    seen: set[int] = set()
    waiting = [(each, 0) for each in reversed(roots)]
    while waiting:
        each, depth = waiting.pop()
        if each.sequence not in seen:  # ids that lie may point in a circle
            seen.add(each.sequence)
            yield each, min(depth, 8)
            waiting += [(child, depth + 1) for child in reversed(children.get(each.sequence, []))]
    yield from ((each, 0) for each in found if each.sequence not in seen)


def _is_within(inner: Row, outer: Row) -> bool:
    return outer.time_ms <= inner.time_ms <= outer.time_ms + (outer.took_ms or 0)


def curl_of(event: Mapping[str, Any]) -> str:
    """Return a shell command that makes the call again, as far as the event tells it.

    Everything is quoted: whatever the event holds, the command is one call of curl.
    """
    request = event["request"]
    verb, uri = request["verb"], request["uri"]
    parts = ["curl", "--globoff"]
    data = raw_body(request)
    body = request.get("body")
    text = None
    if data is not None:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = None
    elif body is not None:
        text = body if isinstance(body, str) else write_json(body).decode()
    if verb == "HEAD":
        parts.append("--head")
    elif verb != ("POST" if body is not None else "GET"):
        parts += ["--request", _quoted(verb)]
    parts.append(_quoted(uri))
    lines = [" ".join(parts)]
    for name, value in (request.get("headers") or {}).items():
        if _TOKEN.fullmatch(name) and name.lower() not in _NOT_REPEATED:
            lines.append(f"--header {_quoted(f'{name}: {value}')}")
    if body is not None:
        if text is None or "\0" in text or len(text) > _MAX_CURL_BODY_BYTES:
            lines.append("--data-binary @body.bin")
        else:
            lines.append(f"--data-raw {_quoted(text)}")
    return " \\\n  ".join(lines)


def _quoted(text: str) -> str:
    """Quote for a POSIX shell; control characters by their codes, so that a terminal never gets one pasted."""
    if not _CONTROL.search(text):
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    codes = _CONTROL.sub(lambda found: "".join(f"\\x{byte:02x}" for byte in found.group().encode()), escaped)
    return f"$'{codes}'"
