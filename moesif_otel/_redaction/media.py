"""Reads a Content-Type: the body's format, its charset, and whether such content is left out."""

from __future__ import annotations

import re
from enum import Enum
from functools import lru_cache
from typing import Final, NamedTuple


class Format(Enum):
    """The ways in which bodies are read."""

    JSON = "json"
    EVENT_STREAM = "event_stream"
    MULTIPART = "multipart"
    TEXT = "text"  # also markup, code, forms and JSON Lines
    OTHER = "other"


LEFT_OUT_TYPES: Final = (
    *("image/*", "video/*", "audio/*", "font/*", "application/font-*", "application/x-font-*"),
    *("application/vnd.ms-fontobject", "application/pdf", "application/wasm", "application/x-shockwave-flash"),
    *("application/gzip", "application/zip", "application/zstd", "application/vnd.rar", "application/java-archive"),
    *("application/vnd.android.package-archive", "application/vnd.debian.binary-package"),
    *("application/x-debian-package", "application/x-rpm", "application/x-iso9660-image", "application/x-tar"),
    *("application/x-7z-compressed", "application/x-bzip", "application/x-bzip2", "application/x-compressed"),
    *("application/x-gzip", "application/x-rar-compressed", "application/x-xz", "application/x-zip-compressed"),
)
"""Content that is of no use to API analytics: its size and type are sent instead, unless `LOG_BINARY_BODY` is set."""

_LEFT_OUT_EXACT: Final = frozenset(name for name in LEFT_OUT_TYPES if not name.endswith("*"))
_LEFT_OUT_PREFIXES: Final = tuple(name[:-1] for name in LEFT_OUT_TYPES if name.endswith("*"))
# Subtypes whose content is text, under any type; JSON Lines and forms are found out by what is in them.
_TEXT: Final = frozenset(
    {
        *("xml", "xml-dtd", "javascript", "x-javascript", "ecmascript", "yaml", "x-yaml", "toml", "graphql", "sql"),
        *("x-sh", "x-httpd-php", "soap", "sparql-query", "sparql-update", "x-sql", "x-tex", "x-powershell"),
        *("x-ndjson", "ndjson", "jsonl", "x-jsonl", "jsonlines", "x-jsonlines", "json-seq", "geo+json-seq"),
        "x-www-form-urlencoded",
    }
)
_MAX_CHARACTERS: Final = 1_024
# RFC 9110 section 5.6.6: name "=" ( token / quoted-string ).
_PARAMETER: Final = re.compile(r';[ \t]*([A-Za-z0-9*_-]+)[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))')


class Media(NamedTuple):
    """The parts of a Content-Type; None for parameters that are not given."""

    essence: str
    """`type/subtype` in lower case; empty if unknown."""
    format: Format
    charset: str | None
    """In lower case."""
    boundary: str | None


@lru_cache(maxsize=256)  # a service has a handful of content types; multipart boundaries pass through it
def media_of(content_type: str | None) -> Media:
    """Read a Content-Type header's value. Never raises."""
    text = (content_type or "")[:_MAX_CHARACTERS]
    essence = text.partition(";")[0].partition(",")[0].strip().lower()
    charset = boundary = None
    for name, quoted, token in _PARAMETER.findall(text):
        value = re.sub(r"\\(.)", r"\1", quoted) if quoted else token
        if name.lower() == "charset" and charset is None:
            charset = value.strip("'").lower()
        elif name.lower() == "boundary" and boundary is None:
            boundary = value
    return Media(essence, _format(essence), charset, boundary)


def _format(essence: str) -> Format:
    subtype = essence.partition("/")[2]
    if subtype in {"json", "x-json"} or subtype.endswith("+json") or essence in {"application/csp-report", "text/json"}:
        return Format.JSON
    if essence == "text/event-stream":
        return Format.EVENT_STREAM
    if essence.startswith("multipart/"):
        return Format.MULTIPART
    is_text = essence.startswith(("text/", "message/")) or essence.endswith(("+xml", "+yaml")) or subtype in _TEXT
    return Format.TEXT if is_text else Format.OTHER


def is_left_out(media: Media) -> bool:
    """Tell whether such content is left out unless `LOG_BINARY_BODY` is set (`LEFT_OUT_TYPES`)."""
    return media.essence in _LEFT_OUT_EXACT or media.essence.startswith(_LEFT_OUT_PREFIXES)
