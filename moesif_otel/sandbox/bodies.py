"""A captured body as a person reads it: JSON as a tree, forms as tables, text as text, the rest by its type and size.

What is shown came from anywhere: it is cut to sizes that a page can take, nested structures are walked with a bound on
nodes and without recursion, and nothing is decompressed.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import re
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import compat32
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl

import orjson

from moesif_otel.sandbox.check import Refusal
from moesif_otel.sandbox.jsontext import indented, read_json, write_json
from moesif_otel.sandbox.rows import HIDDEN_MARK, size_in_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["BodyView", "TreeNode", "body_of", "raw_body", "tree_of", "why_absent"]

_MAX_NODES: Final = 1_500
_MAX_LEAF_CHARACTERS: Final = 2_000
_MAX_TEXT_CHARACTERS: Final = 200_000
_MAX_TREE_DEPTH: Final = 40
_OPEN_DEPTH: Final = 3
_MANY_CHILDREN: Final = 25  # a list longer than this starts closed below the first level
_MAX_PARTS: Final = 50
_MAX_NESTED_PARTS: Final = 3
_MAX_HEADER_CHARACTERS: Final = 1_000
_HEX_BYTES: Final = 256
_CONTROL: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f]")
# Python has codecs that are no charsets, and some that take very long.
_CHARSETS: Final = re.compile(
    r"utf-?(8|16|32)(-?[lb]e)?|(us-)?ascii|latin-?1|iso-?8859-?\d+|(windows-|cp)\d+|koi8-[ru]|shift.?jis|euc-(jp|kr)|gb\w+|big5"
)
_IMAGES: Final = (
    (b"\x89PNG\r\n\x1a\n", "PNG image"),
    (b"\xff\xd8\xff", "JPEG image"),
    (b"GIF8", "GIF image"),
    (b"RIFF", "WebP image"),
    (b"BM", "BMP image"),
)
_REASONS: Final = {
    "memory_limit": "left out: bodies waiting for delivery had reached EVENT_QUEUE_BYTES",
    "content_type": "left out because of its type; LOG_BINARY_BODY=true sends such bodies",
    "not_maskable": "left out: secrets in it could not be hidden for certain",
    "unreadable": "left out: it could not be read as its headers say",
    "not_read": "not captured: the application did not read it",
    "binary": "left out because it is binary data; LOG_BINARY_BODY=true sends such bodies",
    "too_complex": "left out: looking into it would have cost more than an event may",
    "too_large": "left out: with it the event would have been larger than an event may be",
    "event_too_large": "left out: with it the event would have been larger than Moesif takes",
}


@dataclass(frozen=True, slots=True)
class TreeNode:
    """One step of a tree: a container that opens or closes, or a leaf.

    Attributes:
        step: `open`, `close` or `leaf`.
        key: The member's name or place; None at the root.
        kind: `object`, `array`, `string`, `number`, `word` or `note`.
        text: A leaf's value, or how many members a container has.
        is_open: Whether the container starts open.
        is_hidden: Whether something was hidden in the leaf.
    """

    step: str
    key: str | None = None
    kind: str = ""
    text: str = ""
    is_open: bool = False
    is_hidden: bool = False


@dataclass(frozen=True, slots=True)
class BodyView:
    """A body for the page.

    Attributes:
        kind: `none`, `json`, `form`, `parts`, `text` or `binary`.
        label: Type and size in words.
        note: Why it is not there, or not whole; empty when it is.
        raw: What the copy button gives.
    """

    kind: str
    label: str
    note: str = ""
    tree: list[TreeNode] = field(default_factory=list)
    rows: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""
    raw: str = ""


def body_of(message: Mapping[str, Any], facts: Mapping[str, Any], size_bytes: int | None, *, known: bool) -> BodyView:
    """Return one side's body for the page.

    Args:
        message: The event's request or response.
        facts: What moesif_otel says of the body.
        size_bytes: Its size on the wire.
        known: Whether that size is sure.
    """
    headers = {name.lower(): value for name, value in (message.get("headers") or {}).items()}
    media = headers.get("content-type", "").partition(";")[0].strip().lower()
    size = "" if size_bytes is None else size_in_words(size_bytes, known=known)
    label = " · ".join(part for part in (media, size) if part)
    note = _cut_note(facts)
    body = message.get("body")
    if body is None:
        return BodyView("none", label, note=why_absent(facts, size_bytes))
    data = raw_body(message)
    if data is None:
        if isinstance(body, str) and "json" not in media:
            return _text(body, label, note)
        return BodyView("json", label, note, tree=list(tree_of(body)), raw=indented(body))
    return _of_bytes(data, media, headers.get("content-type", ""), label, note)


def raw_body(message: Mapping[str, Any]) -> bytes | None:
    """Return the bytes of a base64 body; None for any other."""
    body = message.get("body")
    if message.get("transfer_encoding") != "base64" or not isinstance(body, str):
        return None
    try:
        return base64.b64decode(body)
    except (binascii.Error, ValueError):
        return body.encode("utf-8", "replace")


def why_absent(facts: Mapping[str, Any], size_bytes: int | None) -> str:
    """Say why an event has no body."""
    reason = facts.get("left_out")
    if isinstance(reason, str):
        return _REASONS.get(reason, f"left out: {reason.replace('_', ' ')}"[:200])
    if size_bytes:
        return "not captured: LOG_BODY is off, or the application did not read it"
    return "no body"


def _cut_note(facts: Mapping[str, Any]) -> str:
    if facts.get("truncated") is not True:
        return ""
    kept, size = facts.get("kept_bytes"), facts.get("size_bytes")
    if isinstance(kept, int) and isinstance(size, int):
        return f"cut: the first {size_in_words(kept)} of {size_in_words(size)} were captured"
    return "cut: a part of it was captured"


def _of_bytes(data: bytes, media: str, content_type: str, label: str, note: str) -> BodyView:
    if data.lstrip()[:1] in {b"{", b"[", b'"'}:
        try:
            value = read_json(data)
            return BodyView("json", label, note, tree=list(tree_of(value)), raw=indented(value))
        except Refusal:
            pass
    text = _decoded(data, content_type)
    if media == "application/x-www-form-urlencoded" and text is not None:
        rows = parse_qsl(text[:_MAX_TEXT_CHARACTERS], keep_blank_values=True)[:_MAX_NODES]
        if rows:
            return BodyView("form", label, note, rows=[(name, _cut(value)) for name, value in rows], raw=text)
    if media.startswith("multipart/") and (rows := _parts(data, content_type)):
        return BodyView("parts", label, note, rows=rows, raw=text or "")
    if text is not None:
        return _text(text, label, note)
    image = next((name for magic, name in _IMAGES if data.startswith(magic)), None)
    words = f"{image or 'binary data'}, {size_in_words(len(data))}{_dimensions(data)}"
    return BodyView("binary", label, note, rows=[("content", words)], text=_hex_dump(data))


def _text(text: str, label: str, note: str) -> BodyView:
    if len(text) > _MAX_TEXT_CHARACTERS:
        note = note or f"the first {_MAX_TEXT_CHARACTERS} of {len(text)} characters are shown"
    return BodyView("text", label, note, text=text[:_MAX_TEXT_CHARACTERS], raw=text)


def _decoded(data: bytes, content_type: str) -> str | None:
    """Return bytes as text; None for what is none."""
    charset = re.search(r"charset=\"?([\w.-]+)", content_type, re.IGNORECASE)
    named = charset.group(1).lower() if charset else "latin-1" if content_type.startswith("text/") else "utf-8"
    names = ["utf-16"] if data[:2] in {b"\xff\xfe", b"\xfe\xff"} else ["utf-8", named]
    for name in filter(_CHARSETS.fullmatch, names):
        try:
            # Not to its end: a body that was cut may end inside a character.
            text = codecs.getincrementaldecoder(name)().decode(data)
        except (UnicodeError, LookupError):
            continue
        if text and not _CONTROL.search(text):
            return text
    return None


def _parts(data: bytes, content_type: str) -> list[tuple[str, str]]:
    """Return the parts of a multipart body, each as its name and what it is."""
    if len(content_type) > _MAX_HEADER_CHARACTERS or data.lower().count(b"multipart/") > _MAX_NESTED_PARTS:
        return []
    head = b"Content-Type: " + content_type.encode("latin-1", "replace").replace(b"\r", b" ").replace(b"\n", b" ")
    try:
        message = BytesParser(policy=compat32).parsebytes(head + b"\r\n\r\n" + data)
        found = message.get_payload()
        return [_part(part) for part in found[:_MAX_PARTS]] if isinstance(found, list) else []
    except Exception:  # the email package raises what it likes for bodies that are none
        return []


def _part(part: Any) -> tuple[str, str]:
    payload = part.get_payload(decode=True)
    content = payload if isinstance(payload, bytes) else b""
    size = size_in_words(len(content))
    if len(part.get("content-disposition", "")) > _MAX_HEADER_CHARACTERS:
        return "(a very long name)", size
    name = str(part.get_param("name", header="content-disposition") or "(no name)")[:200]
    if filename := part.get_filename():
        return name, _cut(f"file {filename}, {part.get_content_type()}, {size}")
    text = _decoded(content, "")
    return name, size if text is None else _cut(text)


def _dimensions(data: bytes) -> str:
    if data.startswith(b"\x89PNG") and len(data) >= 24:
        return f", {int.from_bytes(data[16:20], 'big')} × {int.from_bytes(data[20:24], 'big')} pixels"
    if data.startswith(b"GIF8") and len(data) >= 10:
        return f", {int.from_bytes(data[6:8], 'little')} × {int.from_bytes(data[8:10], 'little')} pixels"
    return ""


def _hex_dump(data: bytes) -> str:
    lines = []
    for place in range(0, min(len(data), _HEX_BYTES), 16):
        piece = data[place : place + 16]
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in piece)
        lines.append(f"{place:06x}  {piece.hex(' '):<47}  {shown}")
    if len(data) > _HEX_BYTES:
        lines.append(f"… {size_in_words(len(data) - _HEX_BYTES)} more")
    return "\n".join(lines)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_LEAF_CHARACTERS else f"{text[:_MAX_LEAF_CHARACTERS]}… ({len(text)} characters)"


def tree_of(value: Any, *, max_nodes: int = _MAX_NODES) -> Iterator[TreeNode]:
    """Return a JSON value as steps, in order; what is too much of it is said in a note."""
    nodes = 0
    # Each level of the walk: its members still to come, and what to say at its end.
    stack: list[Iterator[tuple[str | None, Any]]] = [iter([(None, value)])]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
            if stack:
                yield TreeNode("close")
            continue
        key, item = entry
        nodes += 1
        if nodes > max_nodes:
            yield TreeNode("leaf", None, "note", "… more than is shown here: see the event as JSON")
            for _ in range(len(stack) - 1):
                yield TreeNode("close")
            return
        depth = len(stack) - 1
        if isinstance(item, (dict, list)) and item and depth < _MAX_TREE_DEPTH:
            yield _opening(key, item, depth)
            members = item.items() if isinstance(item, dict) else enumerate(item)
            stack.append((str(name), inner) for name, inner in members)
        else:
            yield _leaf(key, item)


def _opening(key: str | None, item: dict[str, Any] | list[Any], depth: int) -> TreeNode:
    is_object = isinstance(item, dict)
    noun = ("field" if is_object else "item") + ("" if len(item) == 1 else "s")
    is_open = depth == 0 or (depth < _OPEN_DEPTH and len(item) <= _MANY_CHILDREN)
    return TreeNode("open", key, "object" if is_object else "array", f"{len(item)} {noun}", is_open)


def _leaf(key: str | None, item: Any) -> TreeNode:
    if isinstance(item, str):
        return TreeNode("leaf", key, "string", _cut(item), is_hidden=HIDDEN_MARK in item)
    if isinstance(item, bool) or item is None:
        return TreeNode("leaf", key, "word", {True: "true", False: "false", None: "null"}[item])
    if isinstance(item, (int, float)):
        return TreeNode("leaf", key, "number", _cut(orjson.dumps(item).decode() if abs(item) < 1 << 63 else str(item)))
    return TreeNode("leaf", key, "note", _cut(write_json(item).decode()))
