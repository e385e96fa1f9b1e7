"""Who made a request, as far as its credentials tell.

Owns: reading a user id from Bearer, Basic and custom authorization headers.
Threads: any; pure functions.
Never: checks a signature (the application did), raises, keeps or logs a credential.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import TYPE_CHECKING, Any, Final

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["user_from_headers"]

# Servers refuse headers of 8 to 64 KB; a longer one is no token.
_MAX_CHARACTERS: Final = 65_536
# A user id longer than this is no id.
_MAX_ID_CHARACTERS: Final = 1_024
_BASE64: Final = re.compile(r"[A-Za-z0-9+/_-]*\Z")
_URL_SAFE: Final = str.maketrans("-_", "+/")


def user_from_headers(headers: Mapping[str, str], header_names: Sequence[str], user_id_field: str) -> str | None:
    """Give the user id that a request's credentials carry.

    The first of `header_names` that is present decides, and of several credentials in it the first. `Bearer` with a
    JWT gives the claim `user_id_field` (in any case), `Basic` the user name; any other header may be a bare JWT or
    base64 JSON.

    Args:
        headers: Request headers, lower-case names.
        header_names: Headers to look at, in order, in any case.
        user_id_field: The claim that names the user.

    Returns:
        The user id as text, or None: no header, malformed, or no such claim. Never raises. Thread-safe.
    """
    for name in header_names:
        value = headers.get(name.lower())
        if value is not None:
            try:
                return _user(value[:_MAX_CHARACTERS].partition(",")[0].strip(), user_id_field.lower())
            except (ValueError, TypeError, RecursionError, LookupError):
                return None
    return None


def _user(credentials: str, field: str) -> str | None:
    words = credentials.split(None, 1)
    token = words[-1] if words else ""
    match words[0].lower() if len(words) > 1 else "":
        case "bearer":
            return _claim(token, field) if "." in token else None
        case "basic":
            return _id(_utf8_or_latin1(_decode(token)).partition(":")[0].strip())
        case _:
            return _claim(token, field)


def _claim(token: str, field: str) -> str | None:
    parts = token.split(".", 2)
    payload = _decode(parts[1] if len(parts) > 1 else parts[0])
    claims: Any = orjson.loads(payload)
    if not isinstance(claims, dict):
        return None
    found = claims.get(field)
    if found is None:
        found = next((value for name, value in claims.items() if value is not None and name.lower() == field), None)
    if isinstance(found, float):
        # orjson reads integers beyond 64 bits as floats; an id must keep its digits.
        exact = {name.lower(): value for name, value in json.loads(payload, parse_float=str).items()}
        found = exact.get(field)
    return _id(found)


def _decode(text: str) -> bytes:
    """Decode base64 of either alphabet, padded or not; raises `ValueError`."""
    text = text.rstrip("=")
    if not _BASE64.match(text):
        raise ValueError
    try:
        return base64.b64decode(text.translate(_URL_SAFE) + "=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        raise ValueError from None


def _utf8_or_latin1(data: bytes) -> str:
    # RFC 7617 names UTF-8 or nothing; Latin-1 takes what is left.
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _id(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return text if 0 < len(text) <= _MAX_ID_CHARACTERS else None
