"""Asking the governance rules about one request, in steps, so that an asynchronous capture can await in between.

`_capture.callbacks.decide` is these steps for captures that need not await. Everything runs in the thread or task of
the request; nobody looks at a body or an identity that no rule asks for.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import orjson

from moesif_otel._events.caller import client_address, user_from_headers
from moesif_otel._events.codings import decode_content
from moesif_otel._redaction.charsets import utf8_of
from moesif_otel._redaction.media import media_of
from moesif_otel._remote.facts import BodyNeededError, RequestFacts

if TYPE_CHECKING:
    from moesif_otel._capture.exchange import Decision, Exchange
    from moesif_otel._remote.config import RemoteConfig
    from moesif_otel._remote.governance import RuleSet

TOO_LARGE: Final = "too_large"
"""`request.body.$unreadable` of a body over `REQUEST_MAX_BODY_SIZE`, or one whose end cannot be known beforehand."""
ENCODED: Final = "encoded"
"""`request.body.$unreadable` of a body whose Content-Encoding cannot be undone, or has more than that in it."""
NOT_JSON: Final = "not_json"
"""`request.body.$unreadable` of a body that no JSON parser takes: a form, an upload, damaged JSON."""

_MAX_INT_DIGITS: Final = 4_000  # Python's own conversion is quadratic, and refuses more than 4,300


class GovernedRequest:
    """The decision of the rules about one request, as far as it is known.

    Attributes:
        needs_identity: Whether IDENTIFY_USER and IDENTIFY_COMPANY must have run before anything else is asked here.
    """

    __slots__ = ("_config", "_exchange", "_facts", "_headers", "_rules", "_user_id", "_verdict", "needs_identity")

    def __init__(self, rules: RuleSet, config: RemoteConfig, exchange: Exchange) -> None:
        self._rules = rules
        self._config = config
        self._exchange = exchange
        self._headers = headers = _by_lower_name(exchange)
        self._verdict: tuple[Decision | None] | None = None
        self._user_id: Any = None
        self._facts = RequestFacts(
            verb=exchange.method,
            uri=exchange.url,
            headers=headers,
            ip_address=client_address(headers, exchange.peer_address),
        )
        self.needs_identity = rules.needs_identity
        if self.needs_identity and not exchange.identify_arguments:
            exchange.identify_arguments = (*exchange.callback_arguments, {})

    @property
    def needs_body(self) -> bool:
        """Tell whether a rule for this caller, whose other conditions hold so far, depends on the body."""
        try:
            self._evaluate()
        except BodyNeededError:
            return True
        return False

    def give_body(self, data: bytes | None, *, whole: bool = True) -> None:
        """Take the request body as it came.

        A body that cannot be read as JSON is counted, and holds for conditions on `request.body.$unreadable` alone.

        Args:
            data: The raw body; None when there is none, or it was not read because it is too long or has no known end
                (which of the two the request's headers tell).
            whole: Whether `data` is all of it.
        """
        if data is None:
            value, unreadable = None, TOO_LARGE if self._announces_body() or not whole else None
        elif not whole:
            value, unreadable = None, TOO_LARGE
        else:
            value, unreadable = _parsed(data, self._headers, self._exchange.pipeline.settings.request_max_body_size)
        if unreadable:
            self._exchange.pipeline.guard.note(
                "request body unreadable to governance",
                f"a request body could not be read for governance ({unreadable}): conditions on request.body.<key> do "
                "not hold for it, those on request.body.$unreadable do",
            )
        self._facts.give_body(value, unreadable)

    def verdict(self) -> Decision | None:
        """Return the verdict, None when no rule has anything to say; the Exchange notes by which rule it is blocked."""
        try:
            verdict = self._evaluate()
        except BodyNeededError:
            self.give_body(None)
            verdict = self._evaluate()
        if verdict is not None:
            self._exchange.blocked_by = verdict.blocked_by
        return verdict

    def _evaluate(self) -> Decision | None:
        if self._verdict is None:
            exchange = self._exchange
            if self.needs_identity and self._user_id is None:
                settings = exchange.pipeline.settings
                self._user_id = exchange.user_id or user_from_headers(
                    self._headers, settings.authorization_header_name, settings.authorization_user_id_field
                )
            self._verdict = (self._rules.evaluate(self._facts, self._user_id, exchange.company_id, self._config),)
        return self._verdict[0]

    def _announces_body(self) -> bool:
        length = self._headers.get("content-length", "").strip()
        return (bool(length) and length.strip("0") != "") or "transfer-encoding" in self._headers


def _by_lower_name(exchange: Exchange) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in exchange.request_headers:
        key = name.lower()
        found[key] = f"{found[key]}, {value}" if key in found else value
    return found


def _parsed(data: bytes, headers: dict[str, str], max_bytes: int) -> tuple[Any, str | None]:
    """Return a body's JSON value, and why there is none. It reads whatever Python's own `json` reads."""
    if not data.strip():
        return None, None
    decoded = decode_content(data, headers.get("content-encoding"), truncated=False, max_bytes=max_bytes)
    if not decoded.clear or not decoded.whole:
        return None, ENCODED
    text = utf8_of(decoded.data, media_of(headers.get("content-type")).charset)
    try:
        return orjson.loads(text), None
    except ValueError:
        pass
    try:
        # What applications' parsers take and orjson does not: NaN, numbers without end, lone surrogates.
        return json.loads(text, parse_int=_integer), None
    except (ValueError, RecursionError):
        return None, NOT_JSON


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_INT_DIGITS else float(digits)
