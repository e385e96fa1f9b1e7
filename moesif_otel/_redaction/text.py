"""Secrets in texts: URLs, query strings, forms, and `name: value` in prose.

Owns: `redact_text`, `redact_url`, `redact_pairs`.
Threads: any; pure functions of a `Rules`.
Never: takes more than linear time, whatever the text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote_plus

import orjson

from moesif_otel._events.body import load_json
from moesif_otel._events.serialize import plain
from moesif_otel._redaction.names import HIDDEN, Verdict, has_card_number

if TYPE_CHECKING:
    from moesif_otel._redaction.rules import Rules

__all__ = ["MAX_NESTING", "has_user_info", "redact_encoded", "redact_pairs", "redact_text", "redact_url", "unescaped"]

MAX_NESTING: Final = 6
"""A JSON text inside a URL inside a JSON text …; what lies deeper is hidden as a whole."""

# `password=`, `"password": `, and the same behind escaped quotes. One start a run of name characters, so the search is
# linear.
_KEY: Final = re.compile(r"""(?<![A-Za-z0-9_.\-])([A-Za-z0-9_.\-]+)(?:\\{0,31}["'])?[\]\s]{0,4}[:=]\s{0,4}""")
# A quoted value ends at the first quote like its first that no further backslash precedes; what begins as JSON may end
# anywhere, so the rest of the text goes with it; another value ends with its line or, after `=`, with its parameter.
_QUOTED_OR_JSON: Final = r"""(\\{0,31}["'])(?:.*?(?<!\\)\1|.*)|[\[{<].*|"""
_VALUE_AFTER_COLON: Final = re.compile(_QUOTED_OR_JSON + r"[^\r\n]*", re.DOTALL)
_VALUE_AFTER_EQUALS: Final = re.compile(_QUOTED_OR_JSON + r"[^&;\r\n]*", re.DOTALL)
_USER_INFO: Final = re.compile(r"""(?<=://)[^/?#\s"'<>]*@""")
_URL_PIECES: Final = re.compile(r"([?&;#])")
_FORM_PIECES: Final = re.compile(r"([&;])")
_VALUED: Final = re.compile(r"[=:%@]")
_ESCAPE: Final = re.compile(r"(?<!\\)\\{1,32}u00([2-7][0-9A-Fa-f])")
_CARD_CHARACTERS: Final = 64
_URL_SAFE: Final = "/:@,()"


def redact_text(rules: Rules, text: str, *, card: bool = False, nesting: int = 0) -> str:
    """Hide in a text that is a field's value: JSON, a URL, or `name=value` and `name: value` in prose."""
    if not rules.may_concern_text(text):
        return text
    if nesting >= MAX_NESTING:
        return HIDDEN
    if text.lstrip()[:1] in {"{", "["}:
        try:
            value, _ = load_json(text.encode("utf-8", "replace"))
        except ValueError:
            pass
        else:
            hidden = rules.redact_value(value, card=card, nesting=nesting + 1)
            return orjson.dumps(plain(hidden)).decode()
    if "%" in text or "?" in text or "@" in text:
        text = redact_url(rules, text, nesting=nesting + 1)
    return _redact_keyed(rules, text)


def unescaped(text: str) -> str:
    """Undo JSON's escapes of what names are written with, however deep that JSON lies in other JSON."""
    for _ in range(MAX_NESTING):
        if "\\u00" not in text:
            break
        clear = _ESCAPE.sub(_escaped_character, text)
        if clear == text:
            break
        text = clear
    return text


def _escaped_character(match: re.Match[str]) -> str:
    found = chr(int(match[1], 16))
    # Never a quote: it would end the value that it stands in.
    return found if found.isalnum() or found in "_-. \\" else match[0]


def _redact_keyed(rules: Rules, text: str) -> str:
    clear = unescaped(text)
    if clear is not text:
        # JSON that was cut, or broken, in which escapes may spell a name.
        hidden = _redact_named(rules, clear)
        if hidden != clear:
            return hidden
    return _redact_named(rules, text)


def _redact_named(rules: Rules, text: str) -> str:
    out: list[str] = []
    done = at = 0
    while (match := _KEY.search(text, at)) is not None:
        at = match.end()
        verdict = rules.verdict(match[1])
        if verdict is Verdict.KEEP:
            continue
        # Only so far, or a thousand such names would each look through the rest of the text.
        if verdict is Verdict.CARD and not has_card_number(text[at : at + _CARD_CHARACTERS]):
            continue
        if text.startswith(HIDDEN, at):
            continue
        after_colon = ":" in match[0]
        value = (_VALUE_AFTER_COLON if after_colon else _VALUE_AFTER_EQUALS).match(text, at)
        if value is None or not value[0]:
            continue
        quoted = value[1] or ""
        out += (text[done:at], quoted, "" if verdict is Verdict.REMOVE else HIDDEN, quoted)
        done = at = value.end()
    return "".join((*out, text[done:])) if out else text


def has_user_info(text: str) -> bool:
    """Whether a URL with user information stands in `text`."""
    return "@" in text and _USER_INFO.search(text) is not None


def redact_url(rules: Rules, url: str, *, nesting: int = 0) -> str:
    """Hide in a URL: user and password before the host, query, fragment and path parameters."""
    if rules.auto and "@" in url:
        url = _USER_INFO.sub(f"{HIDDEN}@", url)
    if not ("=" in url or "%" in url or ":" in url[8:]) or not rules.may_concern_text(url):
        # A path alone has no values.
        return url
    return redact_pairs(rules, url, form=False, nesting=nesting)


def redact_pairs(rules: Rules, text: str, *, form: bool, nesting: int = 0) -> str:
    """Hide in `name=value&…`: a form's body, or a URL with its query and fragment."""
    pieces = (_FORM_PIECES if form else _URL_PIECES).split(text)
    out: list[str] = []
    before, hidden = "", False
    for place, piece in enumerate(pieces):
        if place % 2:
            before = piece
        elif not (hidden and before == ";"):  # to all who split at "&" alone it is the rest of a hidden value
            out += (before, _redact_pair(rules, piece, nesting))
            name, equals, _ = piece.partition("=")
            hidden = bool(equals) and rules.verdict(_unquoted(name)) in {Verdict.REMOVE, Verdict.HIDE}
    return "".join(out)


def _redact_pair(rules: Rules, piece: str, nesting: int) -> str:
    name, equals, value = piece.partition("=")
    if not equals:
        return redact_encoded(rules, piece, nesting)
    verdict = rules.verdict(_unquoted(name))
    if verdict is Verdict.REMOVE:
        return f"{name}="
    if verdict is Verdict.HIDE or (verdict is Verdict.CARD and has_card_number(unquote_plus(value))):
        return f"{name}={HIDDEN}" if value else piece
    if redact_encoded(rules, name, nesting) != name:
        # Not a name at all: JSON, maybe, that somebody sent as a form.
        return HIDDEN
    return f"{name}={redact_encoded(rules, value, nesting)}"


def _unquoted(name: str) -> str:
    """Undo percent-escapes, and those of percent-escapes: a decoded path may have been quoted again."""
    for _ in range(MAX_NESTING):
        clear = unquote_plus(name)
        if clear == name:
            break
        name = clear
    return name


def redact_encoded(rules: Rules, value: str, nesting: int = 0) -> str:
    """Hide in a value that may be percent-encoded; what changes is encoded again."""
    if not _VALUED.search(value) or not rules.may_concern_text(value):
        # Without one of these marks there is no name with a value in it, only words.
        return value
    clear = unquote_plus(value) if "%" in value or "+" in value else value
    if clear == value:
        return _redact_keyed(rules, value)
    hidden = redact_text(rules, clear, nesting=nesting + 1)
    return value if hidden == clear else quote(hidden, safe=_URL_SAFE, errors="replace")
