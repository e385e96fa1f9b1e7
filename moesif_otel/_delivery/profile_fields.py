"""What a profile or an action may hold, and how it is written as JSON.

Owns: the table of kinds with their fields, reading a profile from a dict, a `moesifapi` model or JSON text, and its
JSON; each error names the place (`users[3].metadata.plan`) and what is wrong there.
Threads: any; pure but for the time that an action without one is given.
Never: quotes a value in an error; sends anything; changes what it was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timezone
from enum import Enum
from typing import Any, Final
from uuid import UUID

import orjson

__all__ = ["ACTION", "COMPANY", "SUBSCRIPTION", "USER", "ProfileKind", "encode_batch", "encode_one", "pieces"]

_MAX_DEPTH: Final = 100
_STATUSES: Final = ("active", "cancelled", "paused", "trialing", "pending", "draft", "future")
_Check = Callable[[Any, str], Any]


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: got {_type_name(value)}, takes a string")  # noqa: TRY004 - documented
    if not value.strip():
        raise ValueError(f"{place}: got an empty string, takes a string with something in it")
    return value


def _any_text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: got {_type_name(value)}, takes a string")  # noqa: TRY004 - documented
    return value


def _time(value: Any, place: str) -> Any:
    if isinstance(value, (str, date)):  # a datetime is a date
        return _text(value, place) if isinstance(value, str) else value
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
    checks: dict[str, _Check] = {"time": _time, "uri": _text, "ip_address": _any_text, "user_agent_string": _any_text}
    return {name: checks[name](item, f"{place}.{name}") if name in checks else item for name, item in request.items()}


@dataclass(frozen=True, slots=True)
class ProfileKind:
    """One kind of thing that Moesif keeps beside events.

    Attributes:
        path: Where one is posted; several go to `path + "/batch"`.
        singular, plural: For messages.
        required: Fields without which nothing is sent.
        checks: What a known field takes; other fields are passed on as they are.
    """

    path: str
    singular: str
    plural: str
    required: tuple[str, ...]
    checks: Mapping[str, _Check]


_WHO: Final[dict[str, _Check]] = {
    "company_id": _text,
    "session_token": _any_text,
    "metadata": _object,
}
_PERSON: Final[dict[str, _Check]] = {
    **_WHO,
    "modified_time": _time,
    "ip_address": _any_text,
    "user_agent_string": _any_text,
    "campaign": _campaign,
}
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


def encode_one(kind: ProfileKind, profile: Any) -> bytes:
    """Write one profile as JSON.

    Args:
        kind: What it is.
        profile: A dict, a `moesifapi` model, or JSON text of an object.

    Raises:
        ValueError: It is none of these, lacks a field, or has a wrong or unserialisable value; the message says where.
    """
    return _encode(kind, profile, kind.singular)


def encode_batch(kind: ProfileKind, profiles: Any) -> list[bytes]:
    """Write several profiles as JSON, one each.

    Args:
        kind: What they are.
        profiles: A list (or another iterable) of what `encode_one` takes, or JSON text of an array.

    Raises:
        ValueError: As `encode_one`; the message has the index, `users[3]`.
    """
    if isinstance(profiles, (str, bytes, bytearray)):
        profiles = _parsed(profiles, kind.plural)
    if isinstance(profiles, Mapping) or not hasattr(profiles, "__iter__"):
        raise ValueError(f"{kind.plural}: got {_type_name(profiles)}, takes a list of {kind.plural}")
    return [_encode(kind, profile, f"{kind.plural}[{index}]") for index, profile in enumerate(profiles)]


def _encode(kind: ProfileKind, profile: Any, place: str) -> bytes:
    if isinstance(profile, (str, bytes, bytearray)):
        profile = _parsed(profile, place)
    found = _as_mapping(profile)
    if found is None:
        raise ValueError(f"{place}: got {_type_name(profile)}, takes a dict, a moesifapi model or JSON text")
    fields = _present(found)
    for name in kind.required:
        if name not in fields:
            raise ValueError(f"{place}.{name}: missing, it is required")
    checked = {
        name: kind.checks[name](value, f"{place}.{name}") if name in kind.checks else value
        for name, value in fields.items()
    }
    return orjson.dumps(_plain(checked, place, 0))


def _parsed(text: str | bytes | bytearray, place: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise ValueError(f"{place}: text that is not JSON") from None


def _as_mapping(value: Any) -> dict[str, Any] | None:
    """Give a dict of a mapping or of a model (`to_dictionary`, as moesifapi's have); None for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    to_dictionary = getattr(value, "to_dictionary", None)
    if callable(to_dictionary) and not isinstance(value, type):
        try:
            made = to_dictionary()
        except Exception:  # a model that holds what it cannot write is no profile
            return None
        return dict(made) if isinstance(made, Mapping) else None
    return None


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    # A model has every field, most of them None; an upsert that merges must not be told to erase those.
    return {name: value for name, value in fields.items() if value is not None}


def _plain(value: Any, place: str, depth: int) -> Any:
    """Give a value as JSON has it, or say where it cannot be."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return _plain(value.value, place, depth)
    if isinstance(value, str):
        return _sound_text(str(value), place)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"{place}: a whole number over 64 bits cannot be sent as JSON")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{place}: NaN and infinity cannot be sent as JSON")
        return float(value)
    if isinstance(value, datetime):
        return _iso_time(value)
    if isinstance(value, (date, UUID)):
        return str(value)
    if depth >= _MAX_DEPTH:
        raise ValueError(f"{place:.200}: nested over {_MAX_DEPTH} levels, or in itself")
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{place}[{index}]", depth + 1) for index, item in enumerate(value)]
    found = _as_mapping(value)
    if found is not None:
        return {_key(name, place): _plain(item, f"{place}.{name}", depth + 1) for name, item in found.items()}
    raise ValueError(f"{place}: {_type_name(value)} cannot be sent as JSON")


def _key(name: Any, place: str) -> str:
    if isinstance(name, Enum):
        name = name.value
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    if not isinstance(name, str):
        raise ValueError(f"{place}: a key of type {_type_name(name)} cannot be sent as JSON")  # noqa: TRY004 - documented
    return _sound_text(name, f"{place}: a key")


def _sound_text(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place}: text with half a surrogate pair cannot be sent as JSON") from None
    return text


def _iso_time(moment: datetime) -> str:
    """Write a time as events have it, in UTC with milliseconds; one without a zone is taken as UTC."""
    if moment.tzinfo is not None:
        moment = moment.astimezone(timezone.utc).replace(tzinfo=None)
    return moment.isoformat(timespec="milliseconds")


def _type_name(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def pieces(payloads: Sequence[bytes], most_items: int, most_bytes: int) -> list[range]:
    """Split a batch by count and size: ranges of indexes, in order, each at least one payload long.

    Args:
        payloads: JSON of each item.
        most_items: Items in a piece at most.
        most_bytes: Bytes of a piece's JSON array at most; an item that is larger stands alone.
    """
    found: list[range] = []
    start, size_bytes = 0, 2
    for index, payload in enumerate(payloads):
        more = len(payload) + 1
        if index > start and (index - start >= most_items or size_bytes + more > most_bytes):
            found.append(range(start, index))
            start, size_bytes = index, 2
        size_bytes += more
    if payloads:
        found.append(range(start, len(payloads)))
    return found
