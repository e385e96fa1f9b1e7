"""Finds out who made a call, and from where: from the callbacks, or else from the request's headers.

A signature is not checked (the application did that), and a credential is never taken for an identity, kept or logged.
"""

from __future__ import annotations

import binascii
import ipaddress
import json
import re
from functools import lru_cache
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Final

import orjson

from moesif_otel._events.serialize import snapshot, text_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from moesif_otel._capture.exchange import Exchange

# Servers refuse headers of 8 to 64 KB; a longer one is no token.
_MAX_CREDENTIALS_CHARACTERS: Final = 65_536
# A user id longer than this is no id.
_MAX_ID_CHARACTERS: Final = 1_024
_BASE64: Final = re.compile(r"[A-Za-z0-9+/_-]*\Z")

# A name that a person or a service has is short, or an address; an API key in its place is long and random.
_KEY_CHARACTERS: Final = 16
_SURELY_KEY_CHARACTERS: Final = 40
_KEY_SWITCHES: Final = 4  # of the kind of character (a-z, A-Z, 0-9): at least one in so many places
_KIND: Final = {
    **dict.fromkeys(map(ord, "abcdefghijklmnopqrstuvwxyz"), "a"),
    **dict.fromkeys(map(ord, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"), "A"),
    **dict.fromkeys(map(ord, "0123456789"), "0"),
}
_KEY_PREFIX: Final = re.compile(
    r"(?:sk|pk|rk|key|api|pat|token|secret|gh[opsu]|glpat|xox[abprs]|whsec)[_-]", re.IGNORECASE
)

# In the order of the packages that we replace; X-Forwarded-For is leftmost-first, as proxies append on the right.
_ADDRESS_NAMES: Final = (
    "x-client-ip",
    "x-forwarded-for",
    "cf-connecting-ip",
    "true-client-ip",
    "x-real-ip",
    "x-cluster-client-ip",
    "x-forwarded",
    "forwarded-for",
    "forwarded",
)
ADDRESS_HEADERS: Final = frozenset(_ADDRESS_NAMES)
"""Lower-case names of the headers that `client_address` looks at."""

# Longest text looked at; proxies write tens of characters, an attacker may write 64 KB.
_MAX_ADDRESSES_CHARACTERS: Final = 4_096
_MAX_ADDRESSES: Final = 64
# RFC 7239 section 4: `for=` with a token or a quoted string.
_FORWARDED_FOR: Final = re.compile(r'(?:^|[;,])[ \t]*for[ \t]*=[ \t]*(?:"([^"\\]*)"|([^\s;,"]+))', re.IGNORECASE)


def settle(exchange: Exchange) -> None:
    """Make what callbacks and `identify` said of a call independent of the application's objects.

    To be called in the thread that serves the call, when the callbacks have run: identities become text there (an
    object of the application's may ask its database for it), and metadata is taken as it is at that moment.
    Never raises.
    """
    if exchange.user_id is not None:
        exchange.user_id = _said(exchange.user_id)
    if exchange.company_id is not None:
        exchange.company_id = _said(exchange.company_id)
    if exchange.session_token is not None:
        exchange.session_token = _said(exchange.session_token)
    if exchange.metadata is not None:
        exchange.metadata = snapshot(exchange.metadata)


def _said(value: Any) -> str | None:
    try:
        return text_of(value) if value else None
    except Exception:
        return None  # its `__bool__` raises: it names nobody


def user_from_headers(headers: Mapping[str, str], header_names: Sequence[str], user_id_field: str) -> str | None:
    """Return the user id that a request's credentials carry.

    The first of `header_names` that is present decides, and of several credentials in it the first. `Bearer` with a
    JWT gives the claim `user_id_field` (in any case), `Basic` the user name where there is a password beside it and the
    name is no key itself (`sk_live_…:`); any other header may be a bare JWT or base64 JSON. None: no header, malformed,
    or no such claim. The names of `headers` are in lower case. Never raises.
    """
    for name in header_names:
        value = headers.get(name.lower())
        if value is not None:
            try:
                return _user(value[:_MAX_CREDENTIALS_CHARACTERS].partition(",")[0].strip(), user_id_field.lower())
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
            name, _, password = _utf8_or_latin1(_decode(token)).partition(":")
            name = name.strip()
            return _id(name) if password and not _looks_like_key(name) else None
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
        return binascii.a2b_base64(text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4))
    except binascii.Error:
        raise ValueError from None


def _utf8_or_latin1(data: bytes) -> str:
    # RFC 7617 names UTF-8 or nothing; Latin-1 takes what is left.
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _id(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return text if 0 < len(text) <= _MAX_ID_CHARACTERS else None


def _looks_like_key(name: str) -> bool:
    """Tell whether a user name may be a credential itself, as in `curl -u sk_live_…:`."""
    if "@" in name:
        return False
    if len(name) >= _SURELY_KEY_CHARACTERS or (_KEY_PREFIX.match(name) and len(name) >= _KEY_CHARACTERS):
        return True
    kinds = [kind for character in name if (kind := _KIND.get(ord(character)))]
    if len(kinds) < _KEY_CHARACTERS:
        return False
    # A capital before a small letter begins a word.
    switches = sum(before != after and before + after != "Aa" for before, after in pairwise(kinds))
    return switches * _KEY_SWITCHES >= len(kinds) and "0" in kinds


def client_address(headers: Mapping[str, str], peer_address: str | None) -> str | None:
    """Return the address of the client that made a request.

    It is the first valid one of X-Client-IP, X-Forwarded-For (leftmost valid one), CF-Connecting-IP, True-Client-IP,
    X-Real-IP, X-Cluster-Client-IP, X-Forwarded, Forwarded-For and Forwarded (RFC 7239), else the address of the
    connection's other end. Ports, brackets and IPv6 zones are taken off. The names of `headers` are in lower case.
    Never raises.
    """
    if not ADDRESS_HEADERS.isdisjoint(headers):
        for name in _ADDRESS_NAMES:
            value = headers.get(name)
            if value:
                for address in _addresses(value[:_MAX_ADDRESSES_CHARACTERS]):
                    if address is not None:
                        return address
    return peer_address or None


def _addresses(value: str) -> Iterator[str | None]:
    # `X-Forwarded` carries either form, and some proxies write a bare list of addresses into `Forwarded`.
    if "=" in value:
        for match in islice(_FORWARDED_FOR.finditer(value), _MAX_ADDRESSES):
            yield _address(match[1] if match[1] is not None else match[2])
    else:
        for part in value.split(",", _MAX_ADDRESSES)[:_MAX_ADDRESSES]:
            yield _address(part)


def _address(text: str) -> str | None:
    """Return the address in `text`, which may carry brackets, quotes, a port or a zone; None when there is none."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    text = text.partition("%")[0]
    # 45: the longest address, an IPv6 one with an embedded IPv4 one.
    return sound_address(text) if text and len(text) <= 45 else None


@lru_cache(maxsize=1_024)  # clients come again; those who invent addresses push out others
def sound_address(text: str) -> str | None:
    """Return the text if it is an IP address, in its usual form."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None
