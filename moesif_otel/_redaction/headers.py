"""Secrets in headers: credentials, cookies, and URLs in any header.

Owns: `redact_headers`.
Threads: any; pure functions of a `Rules`.
Never: drops a header's name; that it was there is no secret.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from moesif_otel._redaction.names import CREDENTIAL_SCHEMES, HIDDEN, SENSITIVE_COOKIES, Verdict, fold
from moesif_otel._redaction.text import redact_encoded, redact_text, redact_url

if TYPE_CHECKING:
    from moesif_otel._capture.exchange import Headers
    from moesif_otel._redaction.rules import Rules

__all__ = ["COOKIES", "redact_headers"]

COOKIES: Final = frozenset(fold(name) for name in SENSITIVE_COOKIES)
# Two Set-Cookie headers that somebody joined with a comma; the comma of a date is followed by no name.
_JOINED: Final = re.compile(r",(?=\s*[^;,=\s]+=)")


def redact_headers(rules: Rules, headers: Headers) -> Headers:
    """Give headers with everything hidden; their names, order and number stay.

    Args:
        rules: What to hide.
        headers: (name, value), any spelling.

    Returns:
        A new list, or `headers` itself where nothing of it can concern the rules.
    """
    if not (rules.active or rules.header_masks):
        return headers
    # One look at all values instead of one at each: hardly ever does any of them hold a name that counts.
    values = "\n".join([value for _, value in headers])
    concerned = rules.may_concern_text(values) or ("@" in values and "://" in values)
    return [(name, _redact_header(rules, name.lower(), value, concerned=concerned)) for name, value in headers]


def _redact_header(rules: Rules, name: str, value: str, *, concerned: bool) -> str:
    verdict = rules.header_verdict(name)
    if verdict is Verdict.REMOVE or not value:
        return ""
    if verdict is Verdict.HIDE:
        return _credentials(value) if name in rules.credential_headers else HIDDEN
    if name in {"cookie", "set-cookie"}:
        return ";".join([_cookies(rules, part, concerned=concerned) for part in value.split(";")])
    if concerned and ("=" in value or ":" in value or "%" in value):
        return redact_text(rules, redact_url(rules, value))
    return value


def _credentials(value: str) -> str:
    scheme, space, _ = value.strip().partition(" ")
    return f"{scheme} {HIDDEN}" if space and scheme.lower() in CREDENTIAL_SCHEMES else HIDDEN


def _cookies(rules: Rules, part: str, *, concerned: bool) -> str:
    """Hide in what stands between two semicolons: one cookie or attribute, or two cookies with a comma between."""
    out: list[str] = []
    for piece in _JOINED.split(part) if "," in part else (part,):
        name, equals, value = piece.partition("=")
        verdict = rules.cookie_verdict(name.strip().strip('"'))
        if verdict is Verdict.REMOVE or verdict is Verdict.HIDE:
            # What follows a comma may be the rest of this value: hide that too.
            out.append(f"{name}{equals}{HIDDEN if verdict is Verdict.HIDE and value else ''}")
            break
        if not concerned:
            out.append(piece)
        elif equals:
            out.append(f"{name}={redact_encoded(rules, value)}")
        else:
            out.append(redact_encoded(rules, name))
    return ",".join(out)
