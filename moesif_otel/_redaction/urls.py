"""Hides secrets in URLs, query strings and forms: user and password before a host, and `name=value` pairs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote_plus

from moesif_otel._redaction.budget import MAX_NESTING
from moesif_otel._redaction.cards import has_card_number
from moesif_otel._redaction.names import HIDDEN, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._redaction.budget import Inspection

# RFC 3986 lets a password have quotes and brackets of the round kind; people write others unescaped, too.
_USER_INFO: Final = re.compile(r"""(?<=//)[^/?#\s"<>\\]*@""")
_ESCAPED_USER_INFO: Final = re.compile(r"""(?<=/\\/)[^/?#\s"<>\\]*@""")
# Where a text was cut, its end may be user and password of a URL: the `@` would have come later.
_CUT_USER_INFO: Final = re.compile(
    r"""(?::|%(?:25){0,4}3a)(?:[\\/]|%(?:25){0,4}(?:2f|5c)){1,16}[^/?#\s"<>\\]*\Z""", re.IGNORECASE
)
_ENDS_OF_USER_INFO: Final = '/?#"<>\\ \t\r\n'
_SLASHES: Final = re.compile(r":[\\/]{1,15}\Z")
# Scheme, host, and the folders of a path: what stands there neither names a value nor is one.
_START: Final = re.compile(r"""\s*(?:[A-Za-z][A-Za-z0-9+.\-]{0,19}:(?=[\\/]))?[\\/]*(?:[^?&;#=%"'{}<>\s]*/)?""")
_PIECES: Final = re.compile(r"([?&;#])")
_FORM_PIECES: Final = re.compile(r"([&;])")
# RFC 6749, OAuth 2.0 Form Post Response Mode, SAML's HTTP POST binding.
_SIGN_IN: Final = re.compile(r"grant_type|id_token|session_state|SAMLResponse")
_VALUED: Final = re.compile(r"[=:%@<]|--")
_NO_NAME: Final = re.compile(r"[\s\"'<{:,=@]")
_URL_SAFE: Final = "/:@,()"
_HEX_ESCAPE: Final = re.compile(r"%[0-9A-Fa-f]{2}")


def hide_user_info(text: str) -> str:
    """Hide user and password of every URL in a text."""
    if "@" not in text:
        return text
    text = _USER_INFO.sub(f"{HIDDEN}@", text)
    return _ESCAPED_USER_INFO.sub(f"{HIDDEN}@", text) if "\\/" in text else text


def inspect_url(look: Inspection, url: str) -> str:
    """Return a URL with user, password, and secrets in path parameters, query and fragment hidden."""
    look.spend(len(url))
    if look.rules.auto and "@" in url:
        url = hide_user_info(url)
    if "=" not in url and "%" not in url:
        # A path alone has no values.
        return url
    # Without its start it is no URL any more: what of it is inspected as a text does not come back here for ever.
    start = _START.match(url)
    at = 0 if start is None else start.end()
    return url[:at] + _pairs(look, url[at:], _PIECES, look.rules.query_verdict)


def inspect_form(look: Inspection, text: str, *, cut: bool) -> str:
    """Return a form's body with everything hidden; of a sign-in (OAuth, SAML) also the names that count in queries."""
    look.spend(len(text))
    verdict_of = look.rules.query_verdict if _SIGN_IN.search(text) is not None else look.rules.verdict
    return _pairs(look, text, _FORM_PIECES, verdict_of, cut=cut)


def _pairs(
    look: Inspection, text: str, pieces_of: re.Pattern[str], verdict_of: Callable[[str], Verdict], *, cut: bool = False
) -> str:
    out: list[str] = []
    at, mark, hidden = 0, "", False
    path = pieces_of is _PIECES
    while at <= len(text):
        look.spend(0)
        end = pieces_of.search(text, at)
        piece = text[at : end.start() if end is not None else len(text)]
        if path and mark == ";" and look.rules.auto and piece.lower().startswith(("jsessionid=", "phpsessid=", "sid=")):
            name, _, value = piece.partition("=")
            _, slash, rest = value.partition("/")
            out += (mark, name, "=", HIDDEN, slash, rest)
        elif not (hidden and mark == ";"):  # to all who split at "&" alone it is the rest of a hidden value
            shown, hidden = _pair(look, piece, verdict_of, cut=cut and end is None)
            out += (mark, shown)
        if end is None:
            break
        if end[0] in "?#":
            path = path and end[0] != "#"
        at, mark = end.end(), end[0]
    return "".join(out)


def _pair(look: Inspection, piece: str, verdict_of: Callable[[str], Verdict], *, cut: bool) -> tuple[str, bool]:
    """Return a pair with its value hidden where that counts, and whether it was."""
    name, equals, value = piece.partition("=")
    if not equals:
        return redact_encoded(look, piece), False
    clear = unquoted(name)
    if clear is not name:
        look.spend(0)
    verdict = verdict_of(clear)
    if verdict is Verdict.REMOVE:
        return f"{name}=", True
    if verdict is Verdict.HIDE:
        return (f"{name}={HIDDEN}" if value else piece), True
    if verdict is Verdict.CARD and has_card_number(unquoted(value), cut=cut):
        return f"{name}={HIDDEN}", False
    if _NO_NAME.search(clear) is not None:
        # Not a name at all: JSON or markup, maybe, that somebody sent as a form.
        shown = redact_encoded(look, piece)
        return shown, shown != piece
    if not value:
        return piece, False
    return f"{name}={redact_encoded(look, value, card=verdict is Verdict.CARD)}", False


def unquoted(name: str) -> str:
    """Decode percent-escapes, and those of percent-escapes: a decoded path may have been quoted again."""
    for _ in range(MAX_NESTING):
        if "%" not in name and "+" not in name:
            break
        clear = unquote_plus(name)
        if clear == name:
            break
        name = clear
    return name


def redact_encoded(look: Inspection, value: str, *, card: bool = False) -> str:
    """Return a value that may be percent-encoded with everything hidden; if it changes, it is encoded again."""
    if not card and _VALUED.search(value) is None:
        # Without one of these marks there is no name with a value in it, only words.
        return value
    clear = value
    if "+" in value or ("%" in value and _HEX_ESCAPE.search(value) is not None):
        look.spend(len(value))
        clear = unquote_plus(value)
    hidden = look.inspect(clear, card=card)
    if hidden == clear:
        return value
    return hidden if clear == value else quote(hidden, safe=_URL_SAFE, errors="replace")


def without_cut_user_info(text: str) -> str:
    """Drop the end of a cut text where it may be user and password of a URL."""
    tail = text[-1_024:]
    found = _CUT_USER_INFO.search(tail)
    if found is not None:
        return text[: len(text) - len(tail) + found.start()]
    # A token in the place of a password may be longer.
    slashes_end = max(map(text.rfind, _ENDS_OF_USER_INFO)) + 1
    found = _SLASHES.search(text, max(slashes_end - 16, 0), slashes_end)
    return text if found is None else text[: found.start()]
