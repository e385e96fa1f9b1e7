"""Whether a `Host` header names a host: clients write anything there, and a URL must not be made of it.

`Host: x?` would turn `/admin` into the query of `http://x?/admin`, which no rule on `^/admin` matches.
"""

from __future__ import annotations

import re
from ipaddress import IPv6Address
from typing import Final

__all__ = ["is_authority"]

# RFC 3986, section 3.2.2: a registered name or an IPv4 address, or an IPv6 address in brackets, then a port. Letters
# beyond ASCII, which some clients send, are encoded by whoever builds the URL.
_AUTHORITY: Final = re.compile(
    r"""
    (?: (?: [A-Za-z0-9._~!$&'()*+,;=\x80-\U0010ffff-] | %[0-9A-Fa-f]{2} ){1,255}
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
