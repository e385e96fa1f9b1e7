"""Decodes bytes in the charset that a Content-Type names or the bytes show, and tells what is no text at all."""

from __future__ import annotations

import codecs
import re
from json import detect_encoding
from typing import Final, NamedTuple

from moesif_otel._guard import LATE_IMPORTS

_UTF8: Final = frozenset({None, "", "utf-8", "utf8", "us-ascii", "ascii", "utf-8-sig"})
_WIDE: Final = frozenset(
    f"utf{dash}{size}{order}" for dash in ("-", "") for size in (16, 32) for order in ("", "le", "be", "-le", "-be")
)
# Not every codec of Python's: some are slow, some are no charsets at all, some hide ASCII (UTF-7, EBCDIC).
_KNOWN: Final = frozenset(
    {
        *_WIDE,
        *(f"iso-8859-{part}" for part in (*range(1, 12), 13, 14, 15, 16)),
        *(f"windows-{page}" for page in range(1250, 1259)),
        *(f"cp{page}" for page in range(1250, 1259)),
        *("latin-1", "latin1", "iso8859-1", "shift_jis", "shift-jis", "euc-jp"),
        *("iso-2022-jp", "euc-kr", "gb2312", "gbk", "gb18030", "big5", "koi8-r", "koi8-u"),
    }
)
# What no text has: control characters but for tab, line ends, form feed, escape (colours), record separator (RFC 7464).
_BINARY: Final = re.compile("[\\x00-\\x08\\x0e-\\x1a\\x1c\\x1d\\x1f\\x7f-\\x9f\\ufffe\\uffff]")
_CONTROLS: Final = bytes({*range(0x20), 0x7F} - set(b"\t\n\v\f\r\x1b\x1e"))
_BOMS: Final = (
    *((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)
_MAYBE_WIDE: Final = frozenset({b"\0", b"\xef", b"\xff", b"\xfe"})


class DecodedText(NamedTuple):
    """Text, and the codec by which it can be made bytes again."""

    text: str
    codec: str


def decode_text(data: bytes, charset: str | None, *, cut: bool) -> DecodedText | None:
    """Return bytes as text, or None if they are none in any charset that they may have.

    `charset` is the Content-Type's, in lower case; UTF-8 is tried before it, since many headers are wrong. `cut`: the
    last character may not be all there.
    """
    for codec in _candidates(data, charset):
        try:
            with LATE_IMPORTS:  # Python imports a codec when it is first asked for
                decoder = codecs.getincrementaldecoder(codec)()
            text = decoder.decode(data, not cut)
        except (UnicodeError, LookupError):
            continue
        if codec == "utf-8":
            # Binary data are hardly ever UTF-8 without one of ASCII's control characters.
            is_text = len(data.translate(None, _CONTROLS)) == len(data)
        else:
            is_text = _BINARY.search(text) is None
        return DecodedText(text, codec) if is_text else None
    return None


def _candidates(data: bytes, charset: str | None) -> list[str]:
    if charset not in _UTF8 and charset not in _KNOWN:
        return []
    for bom, codec in _BOMS:
        if data.startswith(bom):
            return [codec]
    if b"\0" in data[:4]:
        return [charset if charset in _WIDE and charset[-2:] in {"le", "be"} else detect_encoding(data)]
    return ["utf-8"] if charset in _UTF8 or charset is None else ["utf-8", charset]


def utf8_of(data: bytes, charset: str | None) -> bytes:
    """Return JSON text in UTF-8; `data` itself where it is that already, or nothing better can be made of it."""
    if charset in _UTF8 and data[:1] not in _MAYBE_WIDE and b"\0" not in data[1:2]:
        return data
    for codec in _candidates(data, charset):
        try:
            with LATE_IMPORTS:  # as above
                decode = codecs.lookup(codec).decode
            return decode(data)[0].removeprefix("\ufeff").encode()
        except (UnicodeError, LookupError):
            continue
    return data
