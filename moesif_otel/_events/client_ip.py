"""Whose address a request came from, as far as its headers tell.

Owns: reading the headers by which proxies pass a client's address on.
Threads: any; a pure function.
Never: gives anything but a valid IP address (or the peer's address as it is), raises.
"""

from __future__ import annotations

import ipaddress
import re
from itertools import islice
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["ADDRESS_HEADERS", "client_address"]

# In the order of the packages that we replace; X-Forwarded-For is leftmost-first, as proxies append on the right.
_NAMES: Final = (
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
ADDRESS_HEADERS: Final = frozenset(_NAMES)
"""Lower-case names of the headers that `client_address` looks at."""

# Longest text looked at; proxies write tens of characters, an attacker may write 64 KB.
_MAX_CHARACTERS: Final = 4_096
_MAX_ADDRESSES: Final = 64
# RFC 7239 section 4: `for=` with a token or a quoted string.
_FORWARDED_FOR: Final = re.compile(r'(?:^|[;,])[ \t]*for[ \t]*=[ \t]*(?:"([^"\\]*)"|([^\s;,"]+))', re.IGNORECASE)


def client_address(headers: Mapping[str, str], peer_address: str | None) -> str | None:
    """Give the address of the client that made a request.

    Args:
        headers: Request headers, lower-case names.
        peer_address: Address of the connection's other end, given when no header tells a valid one.

    Returns:
        The first valid address of X-Client-IP, X-Forwarded-For (leftmost valid one), CF-Connecting-IP, True-Client-IP,
        X-Real-IP, X-Cluster-Client-IP, X-Forwarded, Forwarded-For and Forwarded (RFC 7239), else `peer_address`, or
        None. Ports, brackets and IPv6 zones are taken off. Never raises. Thread-safe.
    """
    if not ADDRESS_HEADERS.isdisjoint(headers):
        for name in _NAMES:
            value = headers.get(name)
            if value:
                for address in _addresses(value[:_MAX_CHARACTERS]):
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
    """Give the address in `text`, which may carry brackets, quotes, a port or a zone; None when there is none."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    text = text.partition("%")[0]
    # 45: the longest address, an IPv6 one with an embedded IPv4 one.
    if not text or len(text) > 45:
        return None
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None
