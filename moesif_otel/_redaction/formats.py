"""Secrets in bodies that are no single JSON text: lines of JSON, event streams, forms, multipart, anything else.

Owns: `redact_body_bytes`, and one function a format.
Threads: any; pure functions of a `Rules`.
Never: passes on a part that the rules may concern and that it could not read.
"""

from __future__ import annotations

import base64
import binascii
import quopri
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_plus, unquote_to_bytes

import orjson

from moesif_otel._events.body import KNOWN_CHARSETS, load_json, looks_like_json, utf8_of
from moesif_otel._events.media import Format, media_of
from moesif_otel._events.serialize import plain
from moesif_otel._redaction.names import HIDDEN, Verdict, has_card_number
from moesif_otel._redaction.text import has_user_info, redact_pairs, redact_text, unescaped

if TYPE_CHECKING:
    from moesif_otel._events.media import Media
    from moesif_otel._redaction.rules import Rules

__all__ = ["names_in", "redact_body_bytes"]

_LEFT_OUT: Final = b"(left out)"
# gzip, zip, zstd, bzip2, xz, 7z, rar: what they hold cannot be seen.
_ARCHIVES: Final = (b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")
_WORD: Final = re.compile(r"[a-z0-9_.\-]+")
_LINE_ENDS: Final = re.compile(r"\r\n|\r|\n")
_CUT_AUTHORITY: Final = re.compile(rb':\\*/\\*(?:/[^/?#\s"\\<>]*)?\Z')
_TAIL_BYTES: Final = 1_024
_MAX_NESTING: Final = 4

_PART_NAME: Final = re.compile(r';\s*name\*?\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;]*))', re.IGNORECASE)
_PART_HEADER: Final = re.compile(
    r"^[ \t]*(content-[a-z-]+)[ \t]*:[ \t]*([^\r\n]*(?:\r?\n[ \t][^\r\n]*)*)", re.IGNORECASE | re.MULTILINE
)
_HEAD_END: Final = re.compile(rb"\r?\n\r?\n")


def redact_body_bytes(rules: Rules, data: bytes, media: Media, *, whole: bool, nesting: int = 0) -> bytes | None:
    """Give a body with everything hidden, or None when it must be left out.

    Args:
        rules: What to hide; active.
        data: The clear bytes.
        media: Content-Type.
        whole: Whether it is all of the body.
        nesting: How many multipart bodies it lies in.
    """
    if nesting > _MAX_NESTING or media.charset not in KNOWN_CHARSETS:
        return None
    if not rules.opaque_allowed and data.startswith(_ARCHIVES):
        return None
    if rules.auto and (not whole or looks_like_json(data)):  # what is no JSON after all was cut somewhere, or is broken
        data = _without_cut_user_info(data)
    if media.format is Format.MULTIPART:
        # Always taken apart: a part may have an encoding of its own, which the scan does not see through.
        return _multipart(rules, data, media, whole=whole, nesting=nesting)
    if not rules.may_concern_encoded(data):
        return data
    if media.format is Format.EVENT_STREAM:
        return _event_stream(rules, data)
    if media.format is Format.FORM and not looks_like_json(data):
        return redact_pairs(rules, data.decode("latin-1"), form=True).encode("latin-1", "replace")
    if media.format in {Format.JSON, Format.JSON_LINES} or looks_like_json(data):
        lines = _json_lines(rules, utf8_of(data, media.charset), whole=whole)
        if lines is not None:
            return lines
    return None if names_in(rules, data, media.charset) else data


def _without_cut_user_info(data: bytes) -> bytes:
    """Drop the end of a cut text where it may be user and password of a URL: their `@` would have come later."""
    clear = unquote_to_bytes(unquote_to_bytes(data[-_TAIL_BYTES:])).replace(b"\0", b"")
    return data if _CUT_AUTHORITY.search(clear) is None else data[:-_TAIL_BYTES]


def names_in(rules: Rules, data: bytes, charset: str | None = None) -> bool:
    """Whether a text of no known form has a name that counts as one of its words, or a URL with a password."""
    text = utf8_of(data, charset).decode("utf-8", "replace").replace("\0", "")
    for _ in range(_MAX_NESTING):
        if _words_count(rules, unescaped(text).lower()):
            return True
        clear = unquote_plus(text) if "%" in text else text
        if clear == text:
            return False
        text = clear
    return True


def _words_count(rules: Rules, text: str) -> bool:
    if any(not _WORD.fullmatch(mask) and mask in text for mask in rules.body_masks):
        return True
    if rules.auto and has_user_info(text):
        return True
    card = False
    for match in _WORD.finditer(text):
        verdict = rules.verdict(match[0])
        if verdict is Verdict.CARD:
            card = True
        elif verdict is not Verdict.KEEP:
            return True
    return card and has_card_number(text)


def _redact_part(rules: Rules, data: bytes, media: Media, *, whole: bool, nesting: int) -> bytes | None:
    """Hide in a text that may be one JSON value, or anything else."""
    if whole and looks_like_json(data):
        try:
            value, _ = load_json(utf8_of(data, media.charset))
        except ValueError:
            pass
        else:
            return orjson.dumps(plain(rules.redact_value(value)))
    return redact_body_bytes(rules, data, media, whole=whole, nesting=nesting + 1)


def _json_lines(rules: Rules, data: bytes, *, whole: bool) -> bytes | None:
    """NDJSON, JSON Lines, RFC 7464; None when a line is no JSON. A cut last line is dropped."""
    out: list[bytes] = []
    lines = data.split(b"\n")
    for place, line in enumerate(lines):
        text = line.strip(b"\x1e \t\r")
        if not text:
            out.append(line)
            continue
        try:
            value, _ = load_json(text)
        except ValueError:
            if not whole and place == len(lines) - 1 and place:
                break
            return None
        mark = b"\x1e" if line.startswith(b"\x1e") else b""
        out.append(mark + orjson.dumps(plain(rules.redact_value(value))) + (b"\r" if line.endswith(b"\r") else b""))
    return b"\n".join(out)


def _event_stream(rules: Rules, data: bytes) -> bytes:
    """Server-sent events (WHATWG HTML, 9.2): the data lines of one event are one text, JSON or not."""
    text = data.decode("utf-8", "surrogateescape")
    out: list[str] = []
    held: list[str] = []
    for line in _LINE_ENDS.split(text):
        name, colon, value = line.partition(":")
        if name == "data" and colon:
            held.append(value.removeprefix(" "))
            continue
        if held and not line:
            out += _event_data(rules, held)
            held = []
        # Other fields may stand between data lines; their order to each other does not count.
        out.append(redact_text(rules, line))
    out += _event_data(rules, held)
    return "\n".join(out).encode("utf-8", "surrogateescape")


def _event_data(rules: Rules, held: list[str]) -> list[str]:
    if not held:
        return []
    raw = "\n".join(held).encode("utf-8", "surrogateescape")
    if rules.may_concern_encoded(raw):
        hidden = _redact_part(rules, raw, media_of("application/json"), whole=True, nesting=0)
        held = (_LEFT_OUT if hidden is None else hidden).decode("utf-8", "surrogateescape").split("\n")
    return [f"data: {line}" for line in held]


def _multipart(rules: Rules, data: bytes, media: Media, *, whole: bool, nesting: int) -> bytes | None:
    """RFC 2046, RFC 7578: each part's name and content."""
    delimiter = b"--" + (media.boundary or "").encode("utf-8", "replace")
    pieces = data.split(delimiter) if media.boundary else []
    if len(pieces) < 2:
        return None if rules.may_concern_encoded(data) and names_in(rules, data, media.charset) else data
    out = [pieces[0] if not rules.may_concern_encoded(pieces[0]) else b"\r\n"]
    for place, piece in enumerate(pieces[1:], 1):
        last = place == len(pieces) - 1
        if last and piece.startswith(b"--"):
            out.append(piece if not rules.may_concern_encoded(piece) else b"--\r\n")
        else:
            out.append(_part(rules, piece, cut=last and not whole, nesting=nesting))
    return delimiter.join(out)


def _part(rules: Rules, piece: bytes, *, cut: bool, nesting: int) -> bytes:
    end = _HEAD_END.search(piece)
    if end is None:
        # A head that was cut, or no part at all.
        return piece if not rules.may_concern_encoded(piece) else b"\r\n"
    head = piece[: end.start()].decode("utf-8", "replace")
    content = piece[end.end() :]
    tail = b"\r\n" if content.endswith(b"\r\n") else b"\n" if content.endswith(b"\n") else b""
    content = content[: len(content) - len(tail)]
    headers = {name.lower(): value for name, value in _PART_HEADER.findall(head)}
    hidden = _part_content(rules, content, headers, cut=cut, nesting=nesting)
    return piece[: end.end()] + hidden + tail


def _part_content(rules: Rules, content: bytes, headers: dict[str, str], *, cut: bool, nesting: int) -> bytes:
    found = _PART_NAME.search(headers.get("content-disposition", ""))
    verdict = rules.verdict(found[1] or found[2]) if found is not None else Verdict.KEEP
    if verdict is Verdict.REMOVE:
        return b""
    if verdict is Verdict.HIDE:
        return HIDDEN.encode() if content else content
    coding = headers.get("content-transfer-encoding", "").strip().lower()
    clear = content if coding in {"", "7bit", "8bit", "binary"} else _transfer_decoded(content, coding)
    if clear is None:
        return _LEFT_OUT
    if verdict is Verdict.CARD and has_card_number(clear.decode("latin-1")):
        return HIDDEN.encode()
    if not _concerns(rules, clear, headers.get("content-type")):
        return content
    hidden = _redact_part(rules, clear, media_of(headers.get("content-type")), whole=not cut, nesting=nesting)
    if hidden == clear:
        return content
    # Under a transfer encoding the masked clear text would be read wrongly.
    return _LEFT_OUT if hidden is None or clear is not content else hidden


def _concerns(rules: Rules, data: bytes, content_type: str | None) -> bool:
    media = media_of(content_type)
    return (
        media.format is Format.MULTIPART
        or media.charset not in KNOWN_CHARSETS
        or data.startswith(_ARCHIVES)
        or rules.may_concern_encoded(data)
    )


def _transfer_decoded(content: bytes, coding: str) -> bytes | None:
    """Undo a part's Content-Transfer-Encoding; None when that is not possible."""
    try:
        if coding == "base64":
            return base64.b64decode(content)
        return quopri.decodestring(content) if coding == "quoted-printable" else None
    except (binascii.Error, ValueError):
        return None
