"""One Moesif event from one finished call: which field comes from where, with everything hidden that must be.

An event is a plain dict of the JSON that Moesif takes; `model.MoesifEvent` exists for masks only. Nothing here does
I/O or reads a clock. Any thread may build: an Exchange is finished, and nobody changes it any more.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from moesif_otel._capture.body import LeftOut
from moesif_otel._capture.exchange import Outcome
from moesif_otel._events.body import is_plain_json, read_body
from moesif_otel._events.caller import ADDRESS_HEADERS, client_address, user_from_headers
from moesif_otel._events.serialize import OUR_KEY, as_mapping, plain, text_of
from moesif_otel._events.spans import SpanFacts, facts_of_span
from moesif_otel._guard import LATE_IMPORTS
from moesif_otel._redaction.budget import MAX_HEADER_BYTES, Inspection
from moesif_otel._redaction.headers import bounded_headers, redact_header
from moesif_otel._redaction.media import is_left_out, media_of
from moesif_otel._redaction.names import Verdict
from moesif_otel._redaction.rules import redaction_for
from moesif_otel._redaction.text import inspect_text, redact_text, redact_url, redact_value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from moesif_otel._capture.body import CapturedBody
    from moesif_otel._capture.exchange import Exchange, Headers
    from moesif_otel._redaction.rules import Rules
    from moesif_otel.settings import Settings

_TRACE_ID: Final = (1 << 128) - 1
_SPAN_ID: Final = (1 << 64) - 1
_LAST_SECOND: Final = 253_402_300_799  # 9999-12-31T23:59:59, the last that `datetime` knows
# RFC 9562: the two highest bits of this digit are the variant.
_VARIANT: Final = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}

_MOST_PLANS: Final = 256
_MAX_NAMES_CHARACTERS: Final = 2_048  # of all headers of a message
_ONE_SCAN_BYTES: Final = 16_384
"""Headers and bodies of a call up to this are scanned in one go: beyond it the copy costs more than it saves."""
_ReadHeaders = tuple[dict[str, str], dict[str, str], str]
_MASKS: Final = ("request_body_masks", "response_body_masks", "request_header_masks", "response_header_masks")
_BODY_HEADERS: Final = ("content-type", "content-encoding", "content-length", "transfer-encoding")


@lru_cache(maxsize=64)  # one a pipeline
def _id_state(application_id: str) -> Any:
    return hashlib.sha256(application_id.encode("utf-8", "surrogatepass"))


def transaction_id_for(trace_id: int, span_id: int, application_id: str) -> str:
    """Return the id by which Moesif recognises a second delivery of the same call.

    The same span gives the same id in every process, and another one for another application id. A UUID by its form
    (RFC 9562, version 8: of our own making).
    """
    state = _id_state(application_id).copy()
    state.update(((trace_id & _TRACE_ID) << 64 | (span_id & _SPAN_ID)).to_bytes(24, "big"))
    digits: str = state.hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-8{digits[13:16]}-{_VARIANT[digits[16]]}{digits[17:20]}-{digits[20:32]}"


@lru_cache(maxsize=8)  # events come in the order of time, more or less
def _second_text(second: int) -> str:
    moment = datetime.fromtimestamp(min(max(second, 0), _LAST_SECOND), timezone.utc)
    return moment.isoformat()[:19]


def moesif_time(time_ns: int | None) -> str:
    """Return nanoseconds since the epoch as `2024-10-30T04:45:42.914`, UTC, cut to milliseconds."""
    millis = time_ns // 1_000_000 if time_ns is not None and time_ns > 0 else 0
    return f"{_second_text(millis // 1_000)}.{millis % 1_000:03d}"


class _Event(dict[str, Any]):
    """The JSON object of one event; crash reporters that show local variables see nothing of it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<event>"


class EventBuilder:
    """Builds the events of the calls of one settings value.

    Thread-safe: it keeps nothing of a call but a bounded memory of header names.
    """

    __slots__ = ("_application_id", "_incoming", "_masks", "_outgoing", "_response", "_rules", "_scans", "_settings")

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._application_id = settings.application_id
        self._rules = redaction_for(settings)
        masks = {name.upper(): getattr(settings, name) for name in _MASKS}
        self._masks = {name: names for name, names in masks.items() if names}
        user_headers = {name.lower() for name in settings.authorization_header_name}
        request, response = self._rules
        self._incoming = _HeaderReader("request", request, {*_BODY_HEADERS, *ADDRESS_HEADERS, *user_headers})
        self._outgoing = _HeaderReader("request", request, set(_BODY_HEADERS), titled=True)
        self._response = _HeaderReader("response", response, set(_BODY_HEADERS))
        # Names that count on one side only make a second scan of the same bytes.
        same = set(settings.request_body_masks) == set(settings.response_body_masks)
        self._scans = tuple(rules.may_concern for rules in ((request,) if same else self._rules) if rules.active)

    def build(
        self,
        call: Exchange,
        *,
        parse_bodies: bool = False,
        weigh: Callable[[Exchange, str | None, Any], int] | None = None,
    ) -> dict[str, Any] | None:
        """Build the event of a finished call.

        Args:
            call: The Exchange; `call.span` decorates it (links, name, the application's attributes).
            parse_bodies: Give JSON bodies as Python values, for a mask that will look at them.
            weigh: Asked with the call, the client's address and the user's id before any body is looked at: how many
                calls the event stands for, 0 to leave it out. By default 1.

        Returns:
            The event, or None when `weigh` left it out. An incoming call whose application raised before it sent a
            status has status 500; a call that ended before any status has no response.
        """
        incoming = call.direction == "Incoming"
        ours: dict[str, Any] = {}
        names = self._incoming if incoming else self._outgoing
        shown, headers, values = names.read(call.request_headers, ours)
        response_shown, response_headers, response_values = self._response.read(call.response_headers, ours)
        headers_concern, bodies_concern = self._scan(call, f"{values}\n{response_values}")
        if headers_concern:
            shown, _, _ = names.read(call.request_headers, ours, concerned=True)
            response_shown, _, _ = self._response.read(call.response_headers, ours, concerned=True)
        facts = facts_of_span(call)
        address, user_id = self._caller(call, headers, facts)
        weight = 1 if weigh is None else weigh(call, address, user_id)
        if weight <= 0:
            return None
        request: dict[str, Any] = {
            "time": moesif_time(call.started_ns),
            "uri": redact_url(self._rules.request, call.url),
            "verb": call.method,
            "headers": shown,
        }
        event = _Event(request=request, direction=call.direction, weight=weight)
        if incoming and address:
            request["ip_address"] = address
        if self._settings.api_version is not None:
            request["api_version"] = self._settings.api_version
        if call.request_body is not None:
            self._add_body(request, ours, call.request_body, headers, concerned=bodies_concern, parse=parse_bodies)
        response = self._response_of(call, response_shown)
        if response is not None:
            event["response"] = response
            body = call.response_body
            if body is not None:
                self._add_body(response, ours, body, response_headers, concerned=bodies_concern, parse=parse_bodies)
            if not incoming and address:
                response["ip_address"] = address
        self._add_identity(event, call, user_id, facts)
        if self._settings.debug:
            _note_sources(event, call, facts)
            if self._masks:
                ours["masks"] = dict(self._masks)  # what they remove leaves no trace
        self._add_trace(event, call, facts)
        self._add_remarks(ours, call, facts)
        if ours or call.metadata is not None:
            event["metadata"] = _metadata(call.metadata, ours)
        return event

    def _scan(self, call: Exchange, values: str) -> tuple[bool, bool]:
        """Return whether headers, and whether bodies, need a closer look; where they are short, in one go."""
        text = values.encode("utf-8", "surrogatepass")
        together = text
        bodies = False
        for body in (call.request_body, call.response_body):
            if body is not None and body.kept_bytes:
                bodies = True
                if len(together) + body.kept_bytes > _ONE_SCAN_BYTES:
                    return self._may_concern(text), True
                together = b"%b\n%b" % (together, body.data())
        if not self._may_concern(together):
            return False, False
        return not bodies or self._may_concern(text), bodies

    def _may_concern(self, data: bytes) -> bool:
        for may_concern in self._scans:  # noqa: SIM110 - one as a rule: a generator would cost as much as the scan
            if may_concern(data):
                return True
        return False

    def _caller(self, call: Exchange, headers: dict[str, str], facts: SpanFacts) -> tuple[str | None, Any]:
        """Return the address of the call's other end, and who makes it, before credentials are hidden."""
        user_id = call.user_id or facts.user_id
        if call.direction != "Incoming":
            return call.peer_address, user_id
        if not user_id:
            settings = self._settings
            user_id = user_from_headers(
                headers, settings.authorization_header_name, settings.authorization_user_id_field
            )
        return client_address(headers, call.peer_address), user_id

    def _response_of(self, call: Exchange, shown: dict[str, str]) -> dict[str, Any] | None:
        status = call.status
        if status is None:
            if call.outcome is not Outcome.FAILED or call.direction != "Incoming":
                return None
            status = 500  # the server is about to send it
        time_ns = max(call.ended_ns or 0, call.started_ns)
        return {"time": moesif_time(time_ns), "status": status, "headers": shown}

    def _add_identity(self, event: dict[str, Any], call: Exchange, user_id: Any, facts: SpanFacts) -> None:
        company_id, session_token = call.company_id or facts.company_id, call.session_token or facts.session_token
        if user_id:
            event["user_id"] = text_of(user_id)
        if company_id:
            event["company_id"] = text_of(company_id)
        if session_token:
            event["session_token"] = text_of(session_token)
        if call.blocked_by is not None:
            event["blocked_by"] = call.blocked_by

    def _add_trace(self, event: dict[str, Any], call: Exchange, facts: SpanFacts) -> None:
        trace_id, span_id, parent_span_id = call.trace_id, call.span_id, call.parent_span_id
        if facts.trace_id:
            trace_id, span_id, parent_span_id = facts.trace_id, facts.span_id, facts.parent_span_id
        event["transaction_id"] = call.transaction_id or transaction_id_for(trace_id, span_id, self._application_id)
        if trace_id:
            event["trace_id"] = f"{trace_id:032x}"
            event["span"] = span = {"id": f"{span_id:016x}"}
            if parent_span_id:
                span["parent_id"] = f"{parent_span_id:016x}"
            span.update(facts.of_span)

    def _add_remarks(self, ours: dict[str, Any], call: Exchange, facts: SpanFacts) -> None:
        """Add what `metadata.moesif_otel` says besides bodies."""
        if call.span is not None:
            self._add_span(ours, facts)
        if call.notes:
            ours.update(call.notes)
        if call.outcome is not Outcome.COMPLETE and call.outcome is not None:
            ours["outcome"] = call.outcome.value
        if call.error_type is not None:
            ours["error_type"] = call.error_type

    def _add_span(self, ours: dict[str, Any], facts: SpanFacts) -> None:
        """Add what the span brought of the application's own, inspected like a body of either side."""
        rules = self._rules
        for name, text in facts.texts.items():
            ours[name] = redact_text(rules.response, redact_url(rules.request, text))
        if facts.attributes:
            attributes = plain(facts.attributes)
            for side in rules:
                attributes = redact_value(side, attributes)
            ours["attributes"] = attributes
        if facts.exceptions:
            ours["exceptions"] = [self._exception(found) for found in facts.exceptions]

    def _exception(self, found: dict[str, str]) -> dict[str, str]:
        """Return an exception without its message where that has a name that counts: messages quote data freely."""
        with LATE_IMPORTS:  # few calls have an exception
            from moesif_otel._redaction.bodies import names_in

        message = found.get("message", "")
        if any(names_in(side, message) for side in self._rules):
            return {name: text for name, text in found.items() if name != "message"}
        return found

    def _add_body(
        self,
        part: dict[str, Any],
        ours: dict[str, Any],
        captured: CapturedBody,
        headers: dict[str, str],
        *,
        concerned: bool,
        parse: bool,
    ) -> None:
        """Add a body as Moesif takes it, and to `ours` its true size and why it is not all there, if it is not."""
        is_request = "status" not in part
        total_bytes = captured.total_bytes
        if not total_bytes:
            if is_request:
                _note_unread(ours, headers)
            return
        content_type = headers.get("content-type")
        media = media_of(content_type)
        content_encoding = None if captured.decoded else headers.get("content-encoding")
        left_out = captured.left_out
        data = captured.data()
        truncated = len(data) < total_bytes
        # Most bodies are this: whole JSON without a secret. The rest says the same of them, at three times the cost.
        if not (concerned or parse or truncated or content_encoding or left_out) and is_plain_json(data, media):
            part["body"], part["transfer_encoding"] = orjson.Fragment(data), "json"
            return
        if left_out is None and not self._settings.log_binary_body and is_left_out(media):
            left_out = LeftOut.CONTENT
        facts: dict[str, Any] = {}
        if left_out is None:
            body = read_body(
                data,
                content_type,
                content_encoding,
                truncated=truncated,
                concerned=concerned,
                unread=not captured.decoded and _announced_bytes(headers) > total_bytes,
                parse=parse,
                rules=self._rules.request if is_request else self._rules.response,
            )
            left_out = body.left_out
            if body.value is not None:
                part["body"], part["transfer_encoding"] = body.value, body.transfer_encoding
            if truncated:
                facts["kept_bytes"] = len(data)
            if truncated or body.shortened:
                facts["truncated"] = True
        if left_out is not None:
            facts["left_out"] = left_out.value
            if media.essence:
                facts["content_type"] = media.essence
        if facts:
            facts["size_bytes"] = total_bytes
            ours["request_body" if is_request else "response_body"] = facts


def _note_sources(event: dict[str, Any], call: Exchange, facts: SpanFacts) -> None:
    """Note where an identity came from that no code gave to the call: its span, or a credential."""
    for field in ("user_id", "company_id", "session_token"):
        if event.get(field) and not getattr(call, field):
            source = "span attribute" if getattr(facts, field) else "credential in a request header"
            call.notes.setdefault("identity", {})[field] = source


def _note_unread(ours: dict[str, Any], headers: dict[str, str]) -> None:
    """Say of a request body that was announced that the application did not read it."""
    announced_bytes = _announced_bytes(headers)
    if announced_bytes:
        ours["request_body"] = {"left_out": LeftOut.NOT_READ.value, "size_bytes": announced_bytes}
    elif "chunked" in headers.get("transfer-encoding", "").lower():
        ours["request_body"] = {"left_out": LeftOut.NOT_READ.value}


def _announced_bytes(headers: dict[str, str]) -> int:
    length = headers.get("content-length")
    if length is None:
        return 0
    length = length.strip()
    return int(length) if length.isascii() and length.isdecimal() and len(length) < 20 else 0


class _HeaderPlan(NamedTuple):
    """What the names of a message's headers, in their order, say of all messages with such headers.

    Attributes:
        keys: The names in lower case.
        spelled: How each is shown: a repeated one as it was spelled first.
        wanted: Key and place of those whose values the builder needs; of repeated ones the first.
        hidden: Places of those whose values are not shown as they are.
        scanned: Places of the values to be scanned, None for all: not those hidden whole, which look like anything.
    """

    keys: tuple[str, ...]
    spelled: tuple[str, ...]
    wanted: tuple[tuple[str, int], ...]
    hidden: tuple[int, ...]
    scanned: tuple[int, ...] | None


class _HeaderReader:
    """Reads headers of one side; what their names say is worked out once for all messages with the same names.

    Args:
        wanted: Lower-case names whose values the builder needs.
        titled: Whether names are shown in title case (`User-Agent`); else as the capture gives them, in the form in
            which masks for its framework index them.
    """

    __slots__ = ("_remembered", "_rules", "_side", "_titled", "_wanted")

    def __init__(self, side: str, rules: Rules, wanted: set[str], *, titled: bool = False) -> None:
        self._side = side
        self._rules = rules
        self._wanted = frozenset(wanted)
        self._titled = titled
        # Clients can invent names without end, so the memory is bounded.
        self._remembered = lru_cache(maxsize=_MOST_PLANS)(self._plan)

    def read(self, headers: Headers, ours: dict[str, Any], *, concerned: bool = False) -> _ReadHeaders:
        """Return headers as a map to be shown, the wanted ones as they came, and what is to be scanned of them.

        Repeated headers are joined with a comma under the name's first spelling; of a wanted one the first counts.
        Those over the bound are left out, and `ours` is told how many; `concerned` says that a scan of their values has
        found something.
        """
        try:
            found = self._read(headers, concerned=concerned)
        except (TypeError, ValueError):
            headers = _text_pairs(headers)
            found = self._read(headers, concerned=concerned)
        if found is None:
            kept = bounded_headers(headers)
            ours[f"{self._side}_headers"] = {"left_out": LeftOut.TOO_LARGE.value, "count": len(headers) - len(kept)}
            found = self._read(kept, concerned=concerned) or ({}, {}, "")
        return found

    def _read(self, headers: Headers, *, concerned: bool) -> _ReadHeaders | None:
        """Read headers; None where they are over the bound. Raises what pairs that are no texts raise."""
        if not headers:
            return {}, {}, ""
        names = tuple([name for name, _ in headers])  # faster than `zip(*headers)`, and than a generator
        values = tuple([value for _, value in headers])
        name_characters = len("".join(names))
        text = "\n".join(values)
        if name_characters + len(text) - len(values) >= MAX_HEADER_BYTES:
            return None
        plan_of = self._remembered if name_characters <= _MAX_NAMES_CHARACTERS else self._plan
        plan = plan_of(names)
        places = range(len(values)) if concerned else plan.hidden
        shown_values = self._hidden(plan, values, places, concerned=concerned) if places else values
        shown = dict(zip(plan.spelled, shown_values, strict=True))
        if len(shown) < len(values):
            shown = _joined(plan, shown_values)
        wanted = {key: values[place] for key, place in plan.wanted}
        return shown, wanted, text if plan.scanned is None else "\n".join([values[at] for at in plan.scanned])

    def _hidden(
        self, plan: _HeaderPlan, values: tuple[str, ...], places: Iterable[int], *, concerned: bool
    ) -> list[str]:
        look = Inspection(self._rules, inspect_text)
        hidden = list(values)
        for place in places:
            hidden[place] = redact_header(look, plan.keys[place], values[place], concerned=concerned)
        return hidden

    def _plan(self, names: tuple[str, ...]) -> _HeaderPlan:
        rules = self._rules
        keys = tuple(name.lower() for name in names)
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        hidden = tuple(place for place, key in enumerate(keys) if not rules.header_stays(key))
        scanned = tuple(place for place, key in enumerate(keys) if rules.header_verdict(key) is Verdict.KEEP)
        return _HeaderPlan(
            keys,
            tuple(names[first[key]].title() if self._titled else names[first[key]] for key in keys),
            tuple((key, place) for key, place in first.items() if key in self._wanted),
            hidden,
            None if len(scanned) == len(keys) else scanned,
        )


def _joined(plan: _HeaderPlan, values: Sequence[str]) -> dict[str, str]:
    """Return headers of which some are repeated: their values in the order in which they came."""
    pieces: dict[str, list[str]] = {}
    for name, value in zip(plan.spelled, values, strict=True):
        pieces.setdefault(name, []).append(value.strip())
    # RFC 9113 section 8.2.3: pieces of one cookie header are joined with a semicolon.
    return {name: ("; " if name.lower() == "cookie" else ", ").join(several) for name, several in pieces.items()}


def _text_pairs(headers: Any) -> Headers:
    found = []
    for pair in headers:
        try:
            name, value = pair
        except (TypeError, ValueError):
            continue
        found.append((text_of(name), text_of(value)))
    return found


def _metadata(given: Any, ours: dict[str, Any]) -> Any:
    """Return the user's metadata with ours under one key; the user's own dict is never changed."""
    metadata = as_mapping(given) if given is not None else {}
    if ours:
        theirs = metadata.get(OUR_KEY)
        metadata[OUR_KEY] = {**theirs, **ours} if isinstance(theirs, dict) else ours
    return metadata


@lru_cache(maxsize=64)
def builder_for(settings: Settings) -> EventBuilder:
    """Return the builder of a settings value; made once for equal ones."""
    return EventBuilder(settings)
