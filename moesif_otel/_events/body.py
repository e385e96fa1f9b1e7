"""A captured body as Moesif takes it: JSON as JSON, everything else as base64.

Owns: `read_body`, and recognising JSON in any charset.
Threads: any; pure functions.
Never: raises for bad data, embeds bytes that are not valid JSON, makes more than the bound.
"""

from __future__ import annotations

import json
from binascii import b2a_base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson

from moesif_otel._capture.body import LeftOut
from moesif_otel._events.codings import decode_content
from moesif_otel._events.media import Format, Media, media_of

if TYPE_CHECKING:
    from moesif_otel._redaction.rules import Rules

__all__ = [
    "KNOWN_CHARSETS",
    "MAX_DECODED_BYTES",
    "NO_BODY",
    "UTF8_CHARSETS",
    "Body",
    "load_json",
    "looks_like_json",
    "read_body",
    "utf8_of",
]

MAX_DECODED_BYTES: Final = 450_000
"""Most bytes that undoing a Content-Encoding may give: the server truncates a body there."""

# 450,000 characters of base64, so that two bodies and the rest stay under the server's 1 MB an event.
_MAX_BASE64_INPUT_BYTES: Final = 337_500

# Whitespace, the zeros of UTF-16 and UTF-32, byte order marks, the record separator of RFC 7464.
_BEFORE_JSON: Final = b" \t\r\n\0\x1e\xef\xbb\xbf\xff\xfe"
_MAYBE_WIDE: Final = frozenset({b"\0", b"\xef", b"\xff", b"\xfe"})
UTF8_CHARSETS: Final = frozenset({None, "", "utf-8", "utf8", "us-ascii", "ascii"})
"""Charset parameters under which text is taken as UTF-8."""

KNOWN_CHARSETS: Final = frozenset(
    {
        *UTF8_CHARSETS,
        *(f"utf-{size}{order}" for size in (16, 32) for order in ("", "le", "be")),
        *(f"iso-8859-{part}" for part in (*range(1, 12), 13, 14, 15, 16)),
        *(f"windows-{page}" for page in range(1250, 1259)),
        *(f"cp{page}" for page in range(1250, 1259)),
        *("utf16", "utf32", "utf-8-sig", "latin-1", "latin1", "iso8859-1", "shift_jis", "shift-jis", "euc-jp"),
        *("iso-2022-jp", "euc-kr", "gb2312", "gbk", "gb18030", "big5", "koi8-r", "koi8-u"),
    }
)
"""Charsets in which ASCII text shows through (between zeros, maybe), so that a name can be seen in the raw bytes.

Not every codec of Python's: some are slow, some are no charsets at all, some hide ASCII (UTF-7, EBCDIC).
"""


@dataclass(frozen=True, slots=True, repr=False)  # no body is ever shown
class Body:
    """A body, ready for an event.

    Attributes:
        value: Parsed JSON, an `orjson.Fragment` of valid JSON, or base64 text; None when there is none.
        transfer_encoding: `json` or `base64`; None when there is no value.
        left_out: Why there is no value although there was a body.
        shortened: Whether the value is only the first part of the body.
    """

    value: Any
    transfer_encoding: str | None
    left_out: str | None
    shortened: bool = False


NO_BODY: Final = Body(None, None, None)


def read_body(
    data: bytes,
    content_type: str | None,
    content_encoding: str | None,
    *,
    truncated: bool,
    parse: bool,
    unread: bool = False,
    max_decoded_bytes: int = MAX_DECODED_BYTES,
    rules: Rules | None = None,
) -> Body:
    """Give captured bytes as Moesif takes a body.

    Valid JSON objects and arrays are JSON whatever the Content-Type says, as in `moesifwsgi`; JSON scalars are where
    it says JSON and no mask will look (`'password' in 5` is an error). What is no JSON, or only the first part of it,
    is base64 of the bytes with their Content-Encoding undone where that is possible.

    Args:
        data: The captured bytes.
        content_type: Content-Type header.
        content_encoding: Content-Encoding header.
        truncated: Whether `data` is only the first part of the body.
        unread: Whether more was announced than was seen: JSON that is complete is taken, anything else is a first part.
        parse: Give JSON as Python values (a mask will look at it) rather than as a fragment of text.
        max_decoded_bytes: Most bytes that undoing the Content-Encoding may give.
        rules: What to hide; None hides nothing.

    Returns:
        The body. Never raises; time linear in the bytes given and made. Thread-safe.
    """
    if not data:
        return NO_BODY
    media = media_of(content_type)
    decoded = decode_content(data, content_encoding, truncated=truncated, max_bytes=max_decoded_bytes)
    if decoded.clear and decoded.whole:
        found = _as_json(decoded.data, media, parse=parse, rules=rules)
        if found is not None:
            return found
    clear = decoded.data
    if rules is not None:
        hidden = rules.redact_bytes(clear, media, whole=decoded.whole and not unread, readable=decoded.clear)
        if hidden is None or (clear and not hidden):
            reason = LeftOut.NOT_MASKABLE if decoded.clear else LeftOut.UNREADABLE
            return Body(None, None, reason.value)
        clear = hidden
    if not clear:
        return NO_BODY
    shortened = unread or not decoded.whole or len(clear) > _MAX_BASE64_INPUT_BYTES
    text = b2a_base64(clear[:_MAX_BASE64_INPUT_BYTES], newline=False).decode("ascii")
    return Body(text, "base64", None, shortened)


def _as_json(data: bytes, media: Media, *, parse: bool, rules: Rules | None) -> Body | None:
    if media.format is not Format.JSON and not looks_like_json(data):
        return None
    text = utf8_of(data, media.charset)
    try:
        value, exact = load_json(text)
    except ValueError:
        return None
    if not isinstance(value, (dict, list)) and (parse or media.format is not Format.JSON):
        return None
    if rules is not None and rules.may_concern(text):
        # From here on never the raw text, even if nothing is found: it may hold a key twice, and a parser keeps one.
        return Body(rules.redact_value(value), "json", None)
    return Body(orjson.Fragment(text) if exact and not parse else value, "json", None)


def looks_like_json(data: bytes) -> bool:
    """Whether `data` begins as a JSON object or array does, in any of JSON's charsets."""
    return data.lstrip(_BEFORE_JSON)[:1] in {b"{", b"["}


def utf8_of(data: bytes, charset: str | None) -> bytes:
    """Give JSON text in UTF-8; `data` itself where it is that already, or nothing better can be made of it."""
    if charset in UTF8_CHARSETS and data[:1] not in _MAYBE_WIDE and b"\0" not in data[1:2]:
        return data
    encoding: str = json.detect_encoding(data)
    if encoding == "utf-8":
        # Many a server says another charset and sends UTF-8, which RFC 8259 demands; text in another charset is
        # hardly ever valid UTF-8 by chance.
        if _is_utf8(data) or charset not in KNOWN_CHARSETS:
            return data
        encoding = charset or encoding
    try:
        return data.decode(encoding).lstrip("\ufeff").encode()
    except (UnicodeError, LookupError):
        return data


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def load_json(text: bytes) -> tuple[Any, bool]:
    """Parse JSON.

    Returns:
        The value, and whether `text` can be embedded in other JSON as it is.

    Raises:
        ValueError: It is no JSON, or nested too deeply.
    """
    try:
        return orjson.loads(text), True
    except ValueError:
        # Lone surrogates, which the standard library's `json.dumps` writes, are what orjson refuses and others take.
        if b"\\ud" not in text and b"\\uD" not in text:
            raise
    try:
        return json.loads(text, parse_constant=_no_constant, parse_int=_integer), False
    except RecursionError:
        raise ValueError from None


def _no_constant(_name: str) -> Any:
    raise ValueError


def _integer(digits: str) -> int | float:
    # Python's own conversion is quadratic, or refuses, for thousands of digits; orjson gives a float from 20 on.
    return int(digits) if len(digits) < 20 else float(digits)
