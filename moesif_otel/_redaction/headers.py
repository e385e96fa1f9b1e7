"""Hides secrets in headers: credentials, cookies, and URLs in any header.

A header's name stays; that it was there is no secret. The caller runs one quick scan over all values, with what else it
has to scan, and says whether any of them needs a closer look.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from moesif_otel._redaction.budget import MAX_HEADER_BYTES, OverBudget
from moesif_otel._redaction.names import COOKIE_HEADERS, CREDENTIAL_SCHEMES, HIDDEN, Verdict
from moesif_otel._redaction.urls import redact_encoded

if TYPE_CHECKING:
    from moesif_otel._capture.exchange import Headers
    from moesif_otel._redaction.budget import Inspection

# Two Set-Cookie headers that somebody joined with a comma; the comma of a date is followed by no name.
_JOINED: Final = re.compile(r",(?=\s{0,8}[^;,=\s]{1,256}=)")
_COOKIE_NODES: Final = 8  # browsers keep some hundred cookies of a site; thousands are an attack


def bounded_headers(headers: Headers) -> Headers:
    """Return `headers`, or those of them that fit into `MAX_HEADER_BYTES`: the rest is not inspected and not sent.

    Raises:
        TypeError, ValueError: Not all of them are pairs of texts.
    """
    if len("".join([name + value for name, value in headers])) <= MAX_HEADER_BYTES:
        return headers
    kept, left = [], MAX_HEADER_BYTES
    for pair in headers:
        size = len(pair[0]) + len(pair[1])
        # One that is too long does not take those behind it away.
        if size <= left:
            kept.append(pair)
            left -= size
    return kept


def redact_header(look: Inspection, name: str, value: str, *, concerned: bool) -> str:
    """Return the value of a header, by its lower-case name, with everything hidden.

    The value is within the bounds of `bounded_headers`; `concerned` says that a quick scan of all values has found
    something. All headers of one side share an inspection.
    """
    verdict = look.rules.header_verdict(name)
    if verdict is Verdict.REMOVE or not value:
        return ""
    if verdict is Verdict.HIDE:
        return _credentials(value) if name in look.rules.credential_headers else HIDDEN
    try:
        if name in COOKIE_HEADERS:
            look.spend(len(value))
            return ";".join([_cookies(look, part, concerned=concerned) for part in value.strip().split(";")])
        if concerned and ("=" in value or ":" in value or "%" in value):
            return look.inspect(value)
    except OverBudget:
        return HIDDEN
    return value


def _credentials(value: str) -> str:
    scheme, space, _ = value.strip().partition(" ")
    return f"{scheme} {HIDDEN}" if space and scheme.lower() in CREDENTIAL_SCHEMES else HIDDEN


def _cookies(look: Inspection, part: str, *, concerned: bool) -> str:
    """Return the text between two semicolons, hidden: a cookie or attribute, or two cookies joined by a comma."""
    out: list[str] = []
    for piece in _JOINED.split(part) if "," in part else (part,):
        look.spend(0, _COOKIE_NODES)
        name, equals, value = piece.partition("=")
        verdict = look.rules.cookie_verdict(name.strip().strip('"'))
        if verdict is Verdict.REMOVE or verdict is Verdict.HIDE:
            # What follows a comma may be the rest of this value: hide that too.
            out.append(f"{name}{equals}{HIDDEN if verdict is Verdict.HIDE and value else ''}")
            break
        if not concerned:
            out.append(piece)
        elif equals:
            out.append(f"{name}={redact_encoded(look, value)}")
        else:
            out.append(redact_encoded(look, name))
    return ",".join(out)
