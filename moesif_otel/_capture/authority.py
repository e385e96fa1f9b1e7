"""The host of a request's URL, and the encoding of what may not stand in one.

Clients write anything into a `Host` header, and servers into their own name: `Host: x?` would turn `/admin` into the
query of `http://x?/admin`, which no rule on `^/admin` matches.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv6Address
from typing import Any, Final
from urllib.parse import quote

_MOST_REMEMBERED_CHARACTERS: Final = 255
_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}

# RFC 3986: pchar and "/" stay as they are in a path; what else may stand in a query; "%" of what came raw is kept.
PATH_SAFE: Final = "/:@!$&'()*+,;=~"
QUERY_SAFE: Final = PATH_SAFE + "?%[]"

# RFC 3986, section 3.2.2: a registered name or an IPv4 address, or an IPv6 address in brackets, then a port. Letters
# beyond ASCII are none of these, but some clients send them.
_AUTHORITY: Final = re.compile(
    r"""
    (?: (?: [A-Za-z0-9._~!$&'()*+,;=-] | [^\x00-\x7f] | %[0-9A-Fa-f]{2} ){1,255}
      | \[ (?P<v6> [0-9A-Fa-f:.]{2,45} ) \]
    ) (?: : [0-9]{0,5} )?
    """,
    re.VERBOSE,
)


def is_authority(text: str) -> bool:
    """Return whether `text` is a host with an optional port (RFC 3986, without user information)."""
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        return False
    if match["v6"] is None:
        return True
    try:
        IPv6Address(match["v6"])
    except ValueError:
        return False
    return True


def authority_of(scheme: str, host: str, server_name: Any = None, server_port: Any = None) -> str:
    """Return what stands for the host in a request's URL.

    Args:
        scheme: Of the URL.
        host: The `Host` header; anything.
        server_name, server_port: What the server calls itself (cheroot says `Cheroot/11.1`, a Unix socket its path).

    Returns:
        The host with its port, or what the server calls itself where the header names no host, or `localhost`.
    """
    names = scheme, host, str(server_name or ""), str(server_port or "")
    return _remembered(*names) if len(host) <= _MOST_REMEMBERED_CHARACTERS else _found(*names)


def _found(scheme: str, host: str, name: str, port: str) -> str:
    found = host.strip()
    if not is_authority(found):
        if ":" in name and not name.startswith("["):
            name = f"[{name}]"
        end = "" if not port or port == _DEFAULT_PORTS.get(scheme) else f":{port}"
        found = next((own for own in (name + end, f"localhost{end}") if is_authority(own)), "localhost")
    return found if found.isascii() else percent_encoded(found, QUERY_SAFE)


# A service has few names; what else clients write is bounded by its length and its number.
_remembered: Final = lru_cache(maxsize=128)(_found)


def percent_encoded(text: str, safe: str) -> str:
    """Return a part of a URL, whose bytes servers decode as latin-1, with everything but `safe` encoded."""
    try:
        raw = text.encode("latin-1")
    except UnicodeEncodeError:
        raw = text.encode("utf-8", "surrogatepass")
    return quote(raw, safe=safe)
