"""One Moesif event from an Exchange, a span, or both.

Owns: `build_event`, and which field of the event comes from where.
Threads: any; pure functions of an Exchange that is finished and a span that nobody changes any more.
Never: sends what `redact` has not seen, reads a clock, does I/O.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moesifapi.models import EventRequestModel, EventResponseModel

from moesif_otel._capture.body import LeftOut
from moesif_otel._events.body import NO_BODY, Body, read_body
from moesif_otel._events.client_ip import client_address
from moesif_otel._events.exchanges import call_of_exchange
from moesif_otel._events.identity import user_from_headers
from moesif_otel._events.media import is_left_out, media_of
from moesif_otel._events.model import MoesifEvent, hide_absent_bodies, show_absent_bodies
from moesif_otel._events.serialize import OUR_KEY, plain, serialize, text_of, without_bodies
from moesif_otel._events.spans import call_of_span
from moesif_otel._events.times import moesif_time
from moesif_otel._redaction.formats import names_in
from moesif_otel._redaction.headers import redact_headers
from moesif_otel._redaction.rules import redaction_for
from moesif_otel._redaction.text import redact_text, redact_url

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opentelemetry.sdk.trace import ReadableSpan

    from moesif_otel._capture.exchange import Exchange, Headers
    from moesif_otel._events.call import Call, Content
    from moesif_otel._redaction.rules import Redaction, Rules
    from moesif_otel.settings import Settings

__all__ = [
    "MoesifEvent",
    "build_event",
    "event_of",
    "hide_absent_bodies",
    "read_call",
    "serialize",
    "show_absent_bodies",
    "transaction_id_for",
    "without_bodies",
]


def build_event(
    captured: Exchange | None, span: ReadableSpan | None, settings: Settings, *, parse_bodies: bool
) -> MoesifEvent | None:
    """Give the Moesif event of one call, with everything hidden that the settings say.

    Args:
        captured: The finished Exchange; None for a bare span.
        span: The span that decorates the Exchange (its ids, parent, links, name and attributes), or the bare HTTP
            span of any instrumentation that is the only source.
        settings: What to hide, who the user is, what tag the events have.
        parse_bodies: Give JSON bodies as Python values, for a mask that will look at them.

    Returns:
        The event; None for a span that is no HTTP call. An incoming call whose application raised before it sent a
        status has status 500; a call that ended before any status (the client left, no answer came) has no response.
        Thread-safe.
    """
    call = read_call(captured, span, settings)
    return None if call is None else event_of(call, settings, parse_bodies=parse_bodies)


def read_call(captured: Exchange | None, span: ReadableSpan | None, settings: Settings) -> Call | None:
    """Give what `build_event` starts from, without a look at bodies: enough to decide whether a call is sampled.

    Args:
        captured: The finished Exchange; None for a bare span.
        span: As `build_event` takes it.
        settings: Where identities are looked for.

    Returns:
        The call with user and client address found; None for a span that is no HTTP call. Not masked: it must not
        leave the process but through `event_of`.
    """
    if captured is not None:
        call: Call | None = call_of_exchange(captured, span)
    else:
        call = call_of_span(span) if span is not None else None
        if call is not None:
            _limit_bodies(call, settings)
    if call is not None and call.direction == "Incoming":
        names = _by_lower_name(call.request_headers)
        call.client_address = client_address(names, call.peer_address)
        if not call.user_id:
            # Before the credentials are hidden.
            call.user_id = user_from_headers(
                names, settings.authorization_header_name, settings.authorization_user_id_field
            )
    return call


def _limit_bodies(call: Call, settings: Settings) -> None:
    """Hold bodies that somebody else captured to the options that our own taps obey."""
    log_body = settings.log_body if call.direction == "Incoming" else settings.log_body_outgoing
    if not log_body:
        call.request_body = call.response_body = None
        return
    for content, most_bytes in (
        (call.request_body, settings.request_max_body_size),
        (call.response_body, settings.response_max_body_size),
    ):
        if content is not None:
            content.data = content.data[:most_bytes]


def transaction_id_for(trace_id: int, span_id: int, application_id: str) -> str:
    """Give the id by which Moesif recognises a second delivery of the same call.

    The same span gives the same id in every process, and another one for another application id. A UUID by its form
    (RFC 9562, version 8: of our own making).
    """
    text = f"{trace_id:032x}{span_id:016x}{application_id}"
    digits = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-8{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:32]}"


def event_of(call: Call, settings: Settings, *, parse_bodies: bool) -> MoesifEvent:
    """Give the event of a call that `read_call` gave, with everything hidden that the settings say."""
    ours = call.ours
    rules = redaction_for(settings)
    request_names = _by_lower_name(call.request_headers)
    response_names = _by_lower_name(call.response_headers)
    request = EventRequestModel(
        time=moesif_time(call.started_ns),
        uri=redact_url(rules.request, call.url),
        verb=call.method,
        headers=_joined([(name.title(), value) for name, value in redact_headers(rules.request, call.request_headers)]),
        api_version=settings.api_version,
        ip_address=call.client_address,
    )
    body, facts = _read(call.request_body, request_names, rules.request, settings, parse=parse_bodies)
    request.body, request.transfer_encoding = body.value, body.transfer_encoding
    if facts:
        ours["request_body"] = facts
    response = None
    if call.status is not None:
        response = EventResponseModel(
            time=moesif_time(max(call.ended_ns, call.started_ns)),
            status=call.status,
            headers=_joined(redact_headers(rules.response, call.response_headers)),
            ip_address=call.server_address,
        )
        body, facts = _read(call.response_body, response_names, rules.response, settings, parse=parse_bodies)
        response.body, response.transfer_encoding = body.value, body.transfer_encoding
        if facts:
            ours["response_body"] = facts
    event = MoesifEvent(
        request=request,
        response=response,
        user_id=text_of(call.user_id) if call.user_id else None,
        company_id=text_of(call.company_id) if call.company_id else None,
        session_token=text_of(call.session_token) if call.session_token else None,
        direction=call.direction,
        weight=call.weight,
        blocked_by=call.blocked_by,
        transaction_id=call.transaction_id or transaction_id_for(call.trace_id, call.span_id, settings.application_id),
    )
    _link(event, call)
    _add_span_facts(call, rules)
    event.metadata = _metadata(call.metadata, ours)
    return event


def _add_span_facts(call: Call, rules: Redaction) -> None:
    """Add what the span brought of the application's own, looked through like a body of either side."""
    if call.attributes:
        attributes = plain(call.attributes)
        for side in rules:
            if side.active:
                side.redact_value(attributes)
        call.ours["attributes"] = attributes
    if call.exceptions:
        call.ours["exceptions"] = [_exception(found, rules) for found in call.exceptions]
    name = call.ours.get("span_name")
    if name is not None:
        call.ours["span_name"] = redact_text(rules.response, redact_url(rules.request, name))


def _exception(found: dict[str, str], rules: Redaction) -> dict[str, str]:
    """Give an exception without its message where that has a name that counts: messages quote data freely."""
    message = found.get("message", "").encode("utf-8", "replace")
    if any(side.active and side.may_concern_encoded(message) and names_in(side, message) for side in rules):
        return {name: text for name, text in found.items() if name != "message"}
    return found


def _joined(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Give headers as a map; repeated ones are joined with a comma under the name's first spelling."""
    found: dict[str, str] = {}
    spelling: dict[str, str] = {}
    for name, value in headers:
        first = spelling.setdefault(name.lower(), name)
        if first in found:
            # RFC 9113 section 8.2.3: pieces of one cookie header are joined with a semicolon.
            found[first] += f"{'; ' if first == 'Cookie' else ', '}{value}"
        else:
            found[first] = value
    return found


def _read(
    content: Content | None, headers: Mapping[str, str], rules: Rules, settings: Settings, *, parse: bool
) -> tuple[Body, dict[str, Any]]:
    """Give a body as Moesif takes it, and what there is to say of it: true size, and why it is not all there."""
    if content is None:
        return NO_BODY, {}
    content_type = headers.get("content-type")
    media = media_of(content_type)
    facts: dict[str, Any] = {}
    body = NO_BODY
    left_out = content.left_out
    if left_out is None and is_left_out(media) and not settings.log_binary_body:
        left_out = LeftOut.CONTENT.value
    if left_out is None:
        truncated = len(content.data) < content.total_bytes
        body = read_body(
            content.data,
            content_type,
            None if content.decoded else headers.get("content-encoding"),
            truncated=truncated,
            unread=_announced_bytes(headers) > content.total_bytes and not content.decoded,
            parse=parse,
            rules=rules,
        )
        left_out = body.left_out
        if truncated:
            facts["kept_bytes"] = len(content.data)
        if truncated or body.shortened:
            facts["truncated"] = True
    if left_out is not None:
        facts["left_out"] = left_out
        if media.essence:
            facts["content_type"] = media.essence
    if facts:
        facts["size_bytes"] = content.total_bytes
    return body, facts


def _announced_bytes(headers: Mapping[str, str]) -> int:
    length = headers.get("content-length", "").strip()
    return int(length) if length.isascii() and length.isdecimal() and len(length) < 20 else 0


def _by_lower_name(headers: Headers) -> dict[str, str]:
    return {name.lower(): value for name, value in reversed(headers)}


def _link(event: MoesifEvent, call: Call) -> None:
    if not call.trace_id:
        return
    event.trace_id = f"{call.trace_id:032x}"
    span: dict[str, Any] = {"id": f"{call.span_id:016x}"}
    if call.parent_span_id:
        span["parent_id"] = f"{call.parent_span_id:016x}"
    if call.links:
        span["links"] = call.links
    if call.span_status is not None:
        span["status"] = call.span_status
    event.span = span


def _metadata(given: Any, ours: dict[str, Any]) -> Any:
    """Give the user's metadata with ours under one key; the user's own dict is never changed."""
    if not ours:
        return given
    if given is None:
        return {OUR_KEY: ours}
    try:
        metadata = dict(given) if isinstance(given, Mapping) else {"value": given}
    except Exception:
        # A mapping of the user's own making may fail in any way; `serialize` copes with the value itself.
        metadata = {"value": given}
    theirs = metadata.get(OUR_KEY)
    metadata[OUR_KEY] = {**theirs, **ours} if isinstance(theirs, dict) else ours
    return metadata
