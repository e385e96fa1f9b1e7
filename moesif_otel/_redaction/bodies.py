"""Hides secrets in bodies: finds out which form a body has, and leaves out what has none that can be inspected."""

from __future__ import annotations

import base64
import binascii
import quopri
import re
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from moesif_otel._capture.body import LeftOut
from moesif_otel._redaction.budget import Inspection, OverBudget
from moesif_otel._redaction.cards import has_card_number
from moesif_otel._redaction.charsets import decode_text
from moesif_otel._redaction.headers import redact_header
from moesif_otel._redaction.json_text import is_clean_json, is_json_text, redact_json
from moesif_otel._redaction.media import Format, media_of
from moesif_otel._redaction.names import HIDDEN, Verdict
from moesif_otel._redaction.text import inspect_prose, inspect_text
from moesif_otel._redaction.urls import inspect_form, without_cut_user_info

if TYPE_CHECKING:
    from moesif_otel._redaction.media import Media
    from moesif_otel._redaction.rules import Rules

_LEFT_OUT: Final = b"(left out)"
_MAX_PARTS: Final = 1_000
_MAX_MULTIPART_NESTING: Final = 4
_WORD: Final = re.compile(r"[\w.\-]+")
_LINE_ENDS: Final = re.compile(r"(\r\n|\r|\n)")
# What a form and an event stream are made of, whatever the type says; anything else is inspected as a text.
_FORM: Final = re.compile(r"[^\s\"'<>{}()\\]*\Z")
# A line end is read in one way only: with two, each line would double the time that a text takes that is no stream.
_STREAM: Final = re.compile(r"\ufeff?(?:(?:(?:data|event|id|retry)?:[^\r\n]*|data)?(?:\r\n|\r(?!\n)|\n|\Z)){1,10000}\Z")
_PARAMETER: Final = re.compile(r';\s*([A-Za-z0-9*_-]+)[ \t]*=[ \t]*("(?:[^"\\]|\\.)*"|[^\s;]*)')
_EXTENDED: Final = re.compile(r"[\w\-]{0,64}'[\w\-]{0,64}'")
_MAX_ENCODED_NAME: Final = 256
_PART_HEADER: Final = re.compile(
    r"^[ \t]*(content-[a-z-]+)[ \t]*:[ \t]*([^\r\n]*(?:\r?\n[ \t][^\r\n]*)*)", re.IGNORECASE | re.MULTILINE
)
_CUT_TAG: Final = re.compile(r"<[A-Za-z][\w.\-:]*\s+[\w.\-:]+\s*=")
_HEAD_END: Final = re.compile(rb"\r?\n\r?\n")
_OTHER_HEADER: Final = re.compile(
    r"^(?![ \t]|content-(?:disposition|type|transfer-encoding)[ \t]*:)([^:\r\n]+)(:[ \t]*)"
    r"([^\r\n]*(?:\r?\n[ \t][^\r\n]*)*)",
    re.IGNORECASE | re.MULTILINE,
)


def redact_json_body(rules: Rules, text: bytes) -> bytes | LeftOut:
    """Return one valid JSON text with everything hidden, all else byte for byte."""
    decoded = text.decode()
    if is_clean_json(rules, decoded):
        return text
    try:
        return redact_json(Inspection(rules, inspect_text), decoded).encode()
    except OverBudget:
        return LeftOut.TOO_COMPLEX


def redact_body(rules: Rules, data: bytes, media: Media, *, whole: bool) -> bytes | LeftOut:
    """Return the clear bytes of a body that is no single JSON text with everything hidden, or why it is left out."""
    try:
        return _redacted(Inspection(rules, inspect_text), data, media, whole=whole, nesting=0)
    except OverBudget:
        return LeftOut.TOO_COMPLEX


def names_in(rules: Rules, text: str) -> bool:
    """Tell whether a text that quotes data freely has a name that counts as one of its words, or a URL's password."""
    if not rules.active or not rules.may_concern_text(text):
        return False
    try:
        return _has_name(Inspection(rules, inspect_text), text)
    except OverBudget:
        return True


def _redacted(look: Inspection, data: bytes, media: Media, *, whole: bool, nesting: int) -> bytes | LeftOut:
    rules = look.rules
    if media.format is Format.MULTIPART and media.boundary:
        return _multipart(look, data, media.boundary, whole=whole, nesting=nesting)
    decoded = decode_text(data, media.charset, cut=not whole)
    if decoded is None:
        return data if rules.opaque_allowed else LeftOut.BINARY
    text, codec = decoded
    if not rules.active:
        return data
    if not whole:
        text = _without_cut_tag(without_cut_user_info(text) if rules.auto else text)
    shown: str | None = text
    if rules.may_concern_text(text):
        shown = _by_format(look, text, media, whole=whole)
    if shown is None:
        return LeftOut.NOT_MASKABLE
    return data if shown == decoded.text else shown.encode(codec, "replace")


def _without_cut_tag(text: str) -> str:
    """Drop the end of a cut text where it is a tag with attributes: that which names the others may have come later."""
    start = text.rfind("<")
    return text[:start] if start >= 0 and ">" not in text[start:] and _CUT_TAG.match(text, start) else text


def _by_format(look: Inspection, text: str, media: Media, *, whole: bool) -> str | None:
    """Return a text with everything hidden, or None if its form is unknown and a name that counts is in it."""
    json_like = text.lstrip(" \t\r\n\x1e\ufeff")[:1] in {"{", "["}
    if (json_like or media.format is Format.JSON) and is_json_text(text):
        # Whatever its type says. A cut text, or one that is broken somewhere: its last string may be half of one.
        return redact_json(look, text, cut=True)
    if media.format is Format.EVENT_STREAM or text.startswith(("data:", "event:", "id:", "retry:", ":")):
        if _STREAM.match(text) is not None:
            return _event_stream(look, text, whole=whole)
        return inspect_prose(look, text, cut=not whole)
    if "=" in text and _FORM.match(text) is not None:
        return inspect_form(look, text, cut=not whole)
    if media.format in {Format.OTHER, Format.MULTIPART} and not json_like:
        return None if _has_name(look, text) else text
    return inspect_prose(look, text, cut=not whole)


def _has_name(look: Inspection, text: str) -> bool:
    """Tell whether a text of no known form has a name that counts as one of its words, or a URL with a password."""
    if inspect_prose(look, text) != text:
        return True
    for word in _WORD.findall(unquote(text)):
        look.spend(0)
        if look.rules.verdict(word) in {Verdict.HIDE, Verdict.REMOVE}:
            return True
    return False


def _event_stream(look: Inspection, text: str, *, whole: bool) -> str:
    """Hide in server-sent events (WHATWG HTML, 9.2): the data lines of one event are one text, JSON or not."""
    pieces = _LINE_ENDS.split(text)
    out: list[str] = []
    held: list[tuple[int, str]] = []

    def flush(*, cut: bool) -> None:
        if not held:
            return
        joined = "\n".join(value for _, value in held)
        shown = _event_data(look, joined, cut=cut)
        if shown != joined:
            lines = shown.split("\n")
            for number, (place, _) in enumerate(held):
                out[place] = f"data: {lines[number]}" if number < len(lines) else "data:"
            if len(lines) > len(held):
                out[held[-1][0]] += "".join(f"\ndata: {line}" for line in lines[len(held) :])
        held.clear()

    for place in range(0, len(pieces), 2):
        look.spend(0)
        line = pieces[place]
        name, colon, value = line.partition(":")
        if name == "data" and colon:
            held.append((len(out), value.removeprefix(" ")))
            out.append(line)
        else:
            if not line:
                flush(cut=False)
            # Other fields may stand between data lines; a comment's text is a text.
            out.append(_event_data(look, line, cut=False) if line else line)
        if place + 1 < len(pieces):
            out.append(pieces[place + 1])
    flush(cut=not whole)
    return "".join(out)


def _event_data(look: Inspection, text: str, *, cut: bool) -> str:
    if not look.rules.may_concern_text(text):
        return text
    if text.lstrip()[:1] in {"{", "["} and is_json_text(text):
        return redact_json(look, text, cut=True)
    return inspect_prose(look, text, cut=cut)


def _multipart(look: Inspection, data: bytes, boundary: str, *, whole: bool, nesting: int) -> bytes | LeftOut:
    """Hide in each part of a multipart body (RFC 2046, RFC 7578), by its name and in its content."""
    delimiter = b"--" + boundary.encode("utf-8", "replace")
    parts = data.count(delimiter)
    if nesting >= _MAX_MULTIPART_NESTING or parts > _MAX_PARTS:
        raise OverBudget
    if not parts:
        return data if look.rules.opaque_allowed or not look.rules.active else LeftOut.NOT_MASKABLE
    pieces = data.split(delimiter)
    concerned = look.rules.may_concern
    out = [pieces[0] if not pieces[0].strip() else b"\r\n"]
    for place, piece in enumerate(pieces[1:], 1):
        last = place == len(pieces) - 1
        if last and piece.startswith(b"--"):
            out.append(piece if not piece[2:].strip() or not concerned(piece) else b"--\r\n")
        else:
            out.append(_part(look, piece, cut=last and not whole, nesting=nesting))
    return delimiter.join(out)


def _part(look: Inspection, piece: bytes, *, cut: bool, nesting: int) -> bytes:
    look.spend(len(piece))
    end = _HEAD_END.search(piece)
    if end is None:
        # A head that was cut, or no part at all.
        return piece if not piece.strip() else b"\r\n"
    head, codec = _head_text(piece[: end.start()])
    content = piece[end.end() :]
    tail = b"\r\n" if content.endswith(b"\r\n") else b"\n" if content.endswith(b"\n") else b""
    content = content[: len(content) - len(tail)]
    headers: dict[str, str] = {}
    for name, value in _PART_HEADER.findall(head):
        key = name.lower()
        headers[key] = f"{headers[key]}; {value}" if key in headers else value
    shown = _OTHER_HEADER.sub(lambda found: _header(look, found), head).encode(codec)
    hidden = _part_content(look, content, headers, cut=cut, nesting=nesting)
    return b"".join((shown, piece[end.start() : end.end()], hidden, tail))


def _head_text(head: bytes) -> tuple[str, str]:
    try:
        return head.decode(), "utf-8"
    except UnicodeDecodeError:
        return head.decode("latin-1"), "latin-1"


def _header(look: Inspection, found: re.Match[str]) -> str:
    """Return a header of a part, one of a request in a batch maybe, with everything hidden."""
    look.spend(0)
    name, colon, value = found.groups()
    return f"{name}{colon}{redact_header(look, name.strip().lower(), value, concerned=True)}"


def _part_content(look: Inspection, content: bytes, headers: dict[str, str], *, cut: bool, nesting: int) -> bytes:
    verdicts = {look.rules.verdict(name) for name in _field_names(headers.get("content-disposition", ""))}
    if Verdict.REMOVE in verdicts:
        return b""
    if Verdict.HIDE in verdicts:
        return HIDDEN.encode() if content else content
    if not content:
        return content
    coding = headers.get("content-transfer-encoding", "").strip().lower()
    clear = content if coding in {"", "7bit", "8bit", "binary"} else _transfer_decoded(content, coding)
    if clear is None:
        return _LEFT_OUT
    if Verdict.CARD in verdicts and has_card_number(clear.decode("latin-1"), cut=cut):
        return HIDDEN.encode()
    media = media_of(headers.get("content-type") or "text/plain")
    hidden = _redacted(look, clear, media, whole=not cut, nesting=nesting + 1)
    if hidden == clear:
        return content
    # Under a transfer encoding the masked clear text would be read wrongly.
    return _LEFT_OUT if isinstance(hidden, LeftOut) or clear is not content else hidden


def _field_names(disposition: str) -> set[str]:
    """Return a part's names: `name`, `name*` (RFC 8187) and `name*0` … (RFC 2231)."""
    found: set[str] = set()
    pieces: dict[str, str] = {}
    for name, value in _PARAMETER.findall(disposition):
        base, star, number = name.lower().partition("*")
        if base == "name":
            text = re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value
            language = _EXTENDED.match(text) if star else None
            plain = text if not star else unquote(text if language is None else text[language.end() :])
            found |= {text.strip("'"), unquote(text), plain, _decoded_words(text)}
            pieces[number] = plain
    if len(pieces) > 1:
        found.add("".join(pieces[number] for number in sorted(pieces)))
    return found


def _decoded_words(text: str) -> str:
    """Decode RFC 2047's `=?utf-8?q?password?=`, which mail programs write."""
    if "=?" not in text:
        return text
    if len(text) > _MAX_ENCODED_NAME:
        raise OverBudget  # `decode_header` takes quadratic time
    try:
        return str(make_header(decode_header(text)))
    except (HeaderParseError, LookupError, ValueError):
        return text


def _transfer_decoded(content: bytes, coding: str) -> bytes | None:
    """Decode a part's Content-Transfer-Encoding; None if that is not possible."""
    try:
        if coding == "base64":
            return base64.b64decode(content)
        return quopri.decodestring(content) if coding == "quoted-printable" else None
    except (binascii.Error, ValueError):
        return None
