"""Checks events, profiles and actions for what the Moesif server asks of them, as its API documentation has it.

Pure functions that check decoded JSON and end in `Refusal`. Only documented rules are checked, and nothing is repaired.
"""

from __future__ import annotations

import base64
import binascii
import re
import uuid
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "MAX_BATCH_BYTES",
    "MAX_EVENT_AGE_S",
    "MAX_EVENT_BYTES",
    "PROFILE_KINDS",
    "Refusal",
    "check_action",
    "check_event",
    "check_profile",
    "read_time",
]

# Limits of the API documentation; see "moesif-api" in the project's notes.
MAX_EVENT_BYTES: Final = 1024 * 1024
MAX_BATCH_BYTES: Final = 50 * 1024 * 1024
MAX_EVENT_AGE_S: Final = 30 * 24 * 3600.0

PROFILE_KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    "users": ("user_id",),
    "companies": ("company_id",),
    "subscriptions": ("subscription_id", "company_id", "status"),
}
"""Kind of a profile to the fields it must have; the first one is its id."""

_SUBSCRIPTION_STATUSES: Final = frozenset({"active", "cancelled", "paused", "trialing", "pending", "draft", "future"})
_DIRECTIONS: Final = frozenset({"Incoming", "Outgoing", "Internal"})
_ENCODINGS: Final = frozenset({"json", "base64"})
_TIME: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|[+-]\d\d:?\d\d)?\Z")
_URI: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#\s]+")


class Refusal(Exception):  # noqa: N818 - the answer of a server, not a fault of ours
    """The server's answer to something that it does not take.

    Attributes:
        status: HTTP status of the answer.
        code: The reason in one word, for programs.
        index: Place in the batch, counted from 0; None for a single object.
        field: Dotted path of the field in question; None where it is none.
    """

    def __init__(
        self, status: int, code: str, message: str, *, index: int | None = None, field: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.index = index
        self.field = field

    def as_json(self) -> dict[str, Any]:
        """Return the body of the answer."""
        error = {"code": self.code, "message": str(self), "index": self.index, "field": self.field}
        return {"error": {name: value for name, value in error.items() if value is not None}}


class _Reader:
    """Reads fields of one object and refuses with their full path; None counts as absent, as for the server."""

    def __init__(self, value: Any, path: str, index: int | None) -> None:
        self._path = path
        self._index = index
        if not isinstance(value, dict):
            raise Refusal(400, "wrong_type", self._sentence("", value, "an object"), index=index, field=path or None)
        self._value = value

    def _name(self, field: str) -> str:
        return f"{self._path}.{field}" if self._path and field else self._path or field

    def _sentence(self, field: str, value: Any, takes: str) -> str:
        place = "" if self._index is None else f"item {self._index}: "
        subject = self._name(field) or "the item"
        return f"{place}{subject} must be {takes}, got {_in_words(value)}"

    def refuse(self, code: str, field: str, value: Any, takes: str) -> Refusal:
        return Refusal(400, code, self._sentence(field, value, takes), index=self._index, field=self._name(field))

    def get(self, field: str, takes: str, fits: Callable[[Any], bool], *, required: bool = False) -> Any:
        value = self._value.get(field)
        if value is None:
            if required:
                raise self.refuse("missing_field", field, value, takes)
            return None
        if not fits(value):
            raise self.refuse("wrong_value", field, value, takes)
        return value

    def text(self, field: str, *, required: bool = False) -> str | None:
        takes = "a string that is not empty" if required else "a string"
        found: str | None = self.get(
            field, takes, lambda v: isinstance(v, str) and (bool(v) or not required), required=required
        )
        return found

    def object(self, field: str, *, required: bool = False) -> _Reader | None:
        value = self.get(field, "an object", lambda v: isinstance(v, dict), required=required)
        return None if value is None else _Reader(value, self._name(field), self._index)

    def required_object(self, field: str) -> _Reader:
        found = self.object(field, required=True)
        assert found is not None  # noqa: S101 - `required` raised otherwise
        return found

    def has(self, field: str) -> bool:
        return self._value.get(field) is not None

    def time(self, field: str) -> datetime:
        takes = "a time in ISO 8601, UTC, such as 2024-10-30T04:45:42.914"
        text: str = self.get(field, takes, lambda v: isinstance(v, str), required=True)
        try:
            return read_time(text)
        except ValueError:
            raise self.refuse("wrong_value", field, text, takes) from None


def check_event(event: Any, *, now_s: float, index: int | None = None, max_age_s: float | None = None) -> None:
    """Check one event as `POST /v1/events` documents it.

    Args:
        event: The decoded JSON.
        now_s: The time now, Unix seconds.
        index: The event's place in its batch, for the message.
        max_age_s: Refuse events older than this; None takes any age.

    Raises:
        Refusal: Status 400; names index and field.
    """
    reader = _Reader(event, "", index)
    request = reader.required_object("request")
    time = request.time("time")
    if max_age_s is not None and now_s - time.timestamp() > max_age_s:
        takes = f"at most {max_age_s / 86_400:g} days old"
        raise Refusal(
            400,
            "too_old",
            f"{'' if index is None else f'item {index}: '}request.time must be {takes}",
            index=index,
            field="request.time",
        )
    request.get(
        "uri", "an address with scheme and host", lambda v: isinstance(v, str) and bool(_URI.match(v)), required=True
    )
    request.text("verb", required=True)
    _check_message(request)
    request.text("api_version")
    response = reader.object("response")
    if response is not None:
        response.time("time")
        response.get("status", "a whole number", _is_whole_number, required=True)
        _check_message(response)
    _check_event_fields(reader)


def _check_message(message: _Reader) -> None:
    message.get("headers", "a map of strings", _is_map_of_strings, required=True)
    message.text("ip_address")
    encoding = message.get("transfer_encoding", "json or base64", lambda v: isinstance(v, str) and v in _ENCODINGS)
    if encoding == "base64" and message.has("body"):
        message.get("body", "base64 text, as transfer_encoding says", _is_base64)


def _check_event_fields(reader: _Reader) -> None:
    for field in ("user_id", "company_id", "session_token", "subscription_id", "blocked_by", "tags", "action_name"):
        reader.text(field)
    reader.object("metadata")
    reader.object("span")
    reader.text("trace_id")
    reader.get("direction", "Incoming, Outgoing or Internal", lambda v: isinstance(v, str) and v in _DIRECTIONS)
    reader.get("weight", "a whole number of at least 0", lambda v: _is_whole_number(v) and v >= 0)
    reader.get("transaction_id", "a UUID of 36 characters", _is_uuid)


def check_profile(kind: str, profile: Any, *, index: int | None = None) -> str:
    """Check a user, company or subscription and return its id.

    Args:
        kind: A key of `PROFILE_KINDS`.
        profile: The decoded JSON.
        index: Its place in the batch, for the message.

    Raises:
        Refusal: Status 400; names index and field.
    """
    reader = _Reader(profile, "", index)
    required = PROFILE_KINDS[kind]
    ids = [reader.text(field, required=True) for field in required]
    if kind == "subscriptions":
        takes = "one of " + ", ".join(sorted(_SUBSCRIPTION_STATUSES))
        reader.get("status", takes, lambda v: v in _SUBSCRIPTION_STATUSES, required=True)
    for field in ("session_token", "ip_address", "user_agent_string", "company_domain"):
        reader.text(field)
    reader.object("metadata")
    reader.object("campaign")
    found = ids[0]
    assert found is not None  # noqa: S101 - `required` raised otherwise
    return found


def check_action(action: Any, *, index: int | None = None) -> None:
    """Check one action: its name and, in `request`, time and address are required.

    Raises:
        Refusal: Status 400; names index and field.
    """
    reader = _Reader(action, "", index)
    reader.text("action_name", required=True)
    request = reader.required_object("request")
    request.time("time")
    request.text("uri", required=True)
    for field in ("ip_address", "user_agent_string"):
        request.text(field)
    for field in ("user_id", "company_id", "subscription_id", "session_token"):
        reader.text(field)
    reader.get("transaction_id", "a UUID of 36 characters", _is_uuid)
    reader.object("metadata")


def read_time(text: str) -> datetime:
    """Read a time as the API takes it; without a zone it is UTC. Raises `ValueError`."""
    match = _TIME.match(text)
    if match is None:
        raise ValueError
    time, fraction, zone = match.groups()
    # Python 3.10 reads neither Z nor fractions of other lengths than 3 and 6.
    fraction = (fraction or ".0")[:7].ljust(7, "0")
    zone = "+00:00" if zone in {None, "Z"} else f"{zone[:3]}:{zone[-2:]}"
    try:
        return datetime.fromisoformat(time + fraction + zone).astimezone(timezone.utc)
    except OverflowError:  # a zone that leads out of the years 1 to 9999
        raise ValueError from None


def _is_whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_map_of_strings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_base64(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return False
    return True


def _is_uuid(value: Any) -> bool:
    if not isinstance(value, str) or len(value) != 36:
        return False
    try:
        uuid.UUID(value)
    except ValueError:
        return False
    return True


def _in_words(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:60]!r}…"
    if isinstance(value, (bool, int, float)):
        return repr(value)[:60]
    return "an object" if isinstance(value, dict) else "an array"
