"""Reading every byte that left, whatever it is wrapped in."""

from __future__ import annotations

import base64
import binascii
import gzip
import json
import re
import zlib
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

import brotli
import zstandard

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_BASE64_RUN = re.compile(rb"[A-Za-z0-9+/_-]{12,}")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_UNICODE_ESCAPE = re.compile(rb"\\u([0-9a-fA-F]{4})")
_GROUPED_DIGITS = re.compile(rb"(?<=[0-9]{4})[ -](?=[0-9]{4})")
_MAX_DEPTH = 5
_MAX_FORM_BYTES = 4_000_000


def forms_of(data: bytes, depth: int = 0, seen: set[bytes] | None = None) -> Iterator[bytes]:
    """Give `data` and everything that can be made of it by undoing codings, escapes and encodings, in any order."""
    seen = set() if seen is None else seen
    if data in seen or not data:
        return
    seen.add(data)
    yield data
    if depth < _MAX_DEPTH:
        for more in _undone(data):
            if more != data:
                yield from forms_of(more[:_MAX_FORM_BYTES], depth + 1, seen)


def _undone(data: bytes) -> Iterator[bytes]:
    yield from _decompressed(data)
    if b"%" in data:
        yield unquote_to_bytes(data)
    if b"\\u" in data:
        yield _UNICODE_ESCAPE.sub(lambda match: chr(int(match[1], 16)).encode("utf-8", "surrogatepass"), data)
    if b"\0" in data:
        yield data.replace(b"\0", b"")
    if _GROUPED_DIGITS.search(data):
        yield _GROUPED_DIGITS.sub(b"", data)
    if data[:1] in b"{[":
        try:
            parsed = json.loads(data)
        except ValueError:
            pass
        else:
            yield from _texts(parsed)
    for match in _BASE64_RUN.finditer(data):
        # In all alignments: whoever cuts a text of base64 anywhere sees what a decoder of the rest would see.
        run = match[0].translate(_URL_SAFE)
        for start in range(4):
            piece = run[start : start + (len(run) - start) // 4 * 4]
            try:
                yield base64.b64decode(piece)
            except binascii.Error:
                continue


def _decompressed(data: bytes) -> Iterator[bytes]:
    if data[:2] == b"\x1f\x8b":
        yield from _lenient(gzip.decompress, data)
        yield from _lenient(lambda part: zlib.decompressobj(31).decompress(part), data)
    elif data[:1] == b"\x78":
        yield from _lenient(lambda part: zlib.decompressobj().decompress(part), data)
    elif data[:4] == b"\x28\xb5\x2f\xfd":
        yield from _lenient(lambda part: zstandard.ZstdDecompressor().decompressobj().decompress(part), data)
    elif len(data) < 100_000 and data[:1] and not data[:1].isascii():
        yield from _lenient(brotli.decompress, data)


def _lenient(undo: object, data: bytes) -> Iterator[bytes]:
    try:
        yield undo(data)  # type: ignore[operator]
    except (OSError, EOFError, zlib.error, brotli.error, zstandard.ZstdError):
        return


def _texts(value: object) -> Iterator[bytes]:
    if isinstance(value, str):
        yield value.encode("utf-8", "surrogatepass")
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def needles_of(secret: str) -> list[bytes]:
    """What betrays a secret: its first and its last half (a cut one is told too), as text, in hex and in base64."""
    raw = secret.encode()
    half = max(6, len(raw) // 2)
    found: list[bytes] = []
    for part in {raw[:half], raw[-half:]}:
        found += [part.lower(), part.hex().encode()]
        for padding in range(3):
            # The characters that do not depend on what stands before and after.
            code = base64.b64encode(b"\0" * padding + part)
            found.append(code[-(-padding * 8 // 6) : (padding + len(part)) * 8 // 6])
    return found


def found_in(data: bytes | str, secrets: Iterable[str]) -> list[str]:
    """Give those of `secrets` that can be read out of `data`, in whole or by half."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    text = b"\n".join(forms_of(data))
    lower = text.lower()
    return [
        secret
        for secret in secrets
        if any(needle in (lower if needle.islower() or needle.isdigit() else text) for needle in needles_of(secret))
    ]
