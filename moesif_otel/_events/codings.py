"""Undoing Content-Encoding, with a hard bound on what comes out and linear time whatever comes in."""

from __future__ import annotations

import functools
import importlib.util
import zlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from moesif_otel._guard import LATE_IMPORTS

if TYPE_CHECKING:
    from collections.abc import Callable

_IDENTITY: Final = frozenset({"", "identity", "aws-chunked"})
# RFC 9110 lets a sender apply any number; each one undone is a pass over up to the bound.
_MAX_CODINGS: Final = 4
# Each gzip member costs a decompressor of some 40 KB and a copy of the rest.
_MAX_MEMBERS: Final = 64
_STEP_BYTES: Final = 65_536
_MAGIC: Final = {"gzip": b"\x1f\x8b", "x-gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
_CONTROLS: Final = bytes(code for code in range(32) if code not in b"\t\r\n")
_GZIP_WBITS: Final = 16 + zlib.MAX_WBITS


class Decoded(NamedTuple):
    """The result of `decode_content`.

    Attributes:
        data: The clear bytes; as much as could be read of them.
        whole: Whether all of the body is in `data`.
        clear: Whether every coding was undone; if not, `data` is what was given.
    """

    data: bytes
    whole: bool
    clear: bool

    def __repr__(self) -> str:  # no body is ever shown
        return "<Decoded>"


def decode_content(data: bytes, content_encoding: str | None, *, truncated: bool, max_bytes: int) -> Decoded:
    """Undo the codings of a Content-Encoding header: gzip, deflate (zlib or raw), and where installed br and zstd.

    `truncated`: `data` is only the first part of what was sent. A body that has more than `max_bytes` comes out as its
    first part. Never raises.
    """
    if not content_encoding:
        return Decoded(data, not truncated, clear=True)
    codings = [name for part in content_encoding.lower().split(",") if (name := part.strip()) not in _IDENTITY]
    if len(codings) > _MAX_CODINGS:
        return Decoded(data, not truncated, clear=False)
    out, whole = data, not truncated
    for name in reversed(codings):
        if not _has_mark(out, name) and _is_text(out):
            # Seen before the coding was applied, or after a client undid it, as Tornado's does.
            continue
        undo = _codings().get(_shown_coding(out) or name)
        if undo is None:
            return Decoded(data, not truncated, clear=False)
        try:
            out, ended = undo(out, max_bytes)
        except Exception:
            # Broken from the start, or another coding than the header says.
            return Decoded(data, not truncated, clear=False)
        whole = whole and ended
    return Decoded(out, whole, clear=True)


def _has_mark(data: bytes, coding: str) -> bool:
    magic = _MAGIC.get(coding)
    return magic is not None and data.startswith(magic[: len(data)])


def _shown_coding(data: bytes) -> str | None:
    """Return the coding that the first bytes show, whatever the header says."""
    if data.startswith(b"\x1f\x8b"):
        return "gzip"
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        return "zstd"
    # RFC 1950: 32 KB window at most, deflate, and a check over both bytes.
    is_zlib = len(data) > 1 and data[0] & 0x8F == 0x08 and (data[0] << 8 | data[1]) % 31 == 0
    return "deflate" if is_zlib else None


def _is_text(data: bytes) -> bool:
    if len(data.translate(None, _CONTROLS)) < len(data):
        return False
    try:
        data.decode()
    except UnicodeDecodeError as error:
        # The cut of a truncated body may lie inside a character.
        return error.start >= len(data) - 3
    return True


def _gzip(data: bytes, max_bytes: int) -> tuple[bytes, bool]:
    out: list[bytes] = []
    size = 0
    while True:
        inflate = zlib.decompressobj(_GZIP_WBITS)
        try:
            part = inflate.decompress(data, max_bytes - size + 1)
        except zlib.error:
            if not out:
                # Salvage what a damaged stream gave before the damage.
                return _salvage(data, _GZIP_WBITS, max_bytes)
            return b"".join(out), False
        out.append(part)
        size += len(part)
        if size > max_bytes:
            return b"".join(out)[:max_bytes], False
        if not inflate.eof:
            return b"".join(out), False
        # RFC 1952 section 2.2: further members may follow; zero padding may, too.
        rest = inflate.unused_data.lstrip(b"\0")
        if not rest:
            return b"".join(out), True
        if len(out) > _MAX_MEMBERS or not rest.startswith(b"\x1f\x8b"):
            return b"".join(out), False
        data = rest


def _deflate(data: bytes, max_bytes: int) -> tuple[bytes, bool]:
    # RFC 9110 means zlib by "deflate"; some servers send it raw.
    for wbits in (zlib.MAX_WBITS, -zlib.MAX_WBITS):
        inflate = zlib.decompressobj(wbits)
        try:
            out = inflate.decompress(data, max_bytes + 1)
        except zlib.error:
            continue
        return out[:max_bytes], inflate.eof and len(out) <= max_bytes
    return _salvage(data, zlib.MAX_WBITS, max_bytes)


def _salvage(data: bytes, wbits: int, max_bytes: int) -> tuple[bytes, bool]:
    inflate = zlib.decompressobj(wbits)
    out: list[bytes] = []
    size = 0
    for start in range(0, len(data), 256):
        try:
            part = inflate.decompress(data[start : start + 256], max_bytes - size + 1)
        except zlib.error:
            break
        out.append(part)
        size += len(part)
        if size > max_bytes:
            break
    if not size:
        raise ValueError
    return b"".join(out)[:max_bytes], False


def _brotli(data: bytes, max_bytes: int) -> tuple[bytes, bool]:
    with LATE_IMPORTS:
        import brotli

    inflate = brotli.Decompressor()
    out: list[bytes] = []
    size = 0
    piece = data
    while True:
        part = inflate.process(piece, output_buffer_limit=min(_STEP_BYTES, max_bytes - size + 1))
        piece = b""
        out.append(part)
        size += len(part)
        if size > max_bytes:
            return b"".join(out)[:max_bytes], False
        if inflate.is_finished() or not part:
            return b"".join(out), bool(inflate.is_finished())


def _zstd(data: bytes, max_bytes: int) -> tuple[bytes, bool]:
    with LATE_IMPORTS:
        import zstandard

    # RFC 9659: a window of at most 8 MB on the web; a larger one is refused rather than allocated.
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 23).stream_reader(data, read_across_frames=True)
    out: list[bytes] = []
    size = 0
    while size <= max_bytes:
        try:
            part = reader.read(min(_STEP_BYTES, max_bytes - size + 1))
        except zstandard.ZstdError:
            if not size:
                raise
            return b"".join(out), False
        if not part:
            return b"".join(out), _zstd_ended(zstandard, data, size)
        out.append(part)
        size += len(part)
    return b"".join(out)[:max_bytes], False


def _zstd_ended(zstandard: Any, data: bytes, size: int) -> bool:
    # The reader gives no sign of a frame that was cut; the frame header often tells the size (-1: it does not).
    try:
        declared: int = zstandard.frame_content_size(data)
    except zstandard.ZstdError:
        return False
    return declared < 0 or size >= declared


@functools.cache
def _codings() -> dict[str, Callable[[bytes, int], tuple[bytes, bool]]]:
    found: dict[str, Callable[[bytes, int], tuple[bytes, bool]]] = {
        "gzip": _gzip,
        "x-gzip": _gzip,
        "deflate": _deflate,
    }
    # Imported when the first such body comes: most services have none. The extra `encodings` installs them.
    try:
        with LATE_IMPORTS:
            import brotli

        # brotli before 1.2 has no bound on its output: 20 bytes may become 16 MB, so such a body stays as it is.
        brotli.Decompressor().process(b"", output_buffer_limit=1)
        found["br"] = _brotli
    except (ImportError, AttributeError, TypeError):
        pass
    if importlib.util.find_spec("zstandard") is not None:
        found["zstd"] = _zstd
    return found
