"""Planting a secret in a call, and looking for it in what leaves."""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import brotli
import orjson
import zstandard
from hypothesis import strategies as st

from moesif_otel._redaction.names import SENSITIVE_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

SECRET = "hUnt3r7Zq9"
MASK = "nickName"
"""A name that only a mask hides."""

CODINGS: dict[str | None, Callable[[bytes], bytes]] = {
    None: lambda data: data,
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.compress,
    "gzip, br": lambda data: brotli.compress(gzip.compress(data)),
}

_LETTERS = st.text("abcdefgxyz ", min_size=1, max_size=6)


@st.composite
def names(draw: st.DrawFn) -> str:
    """A name that counts, in one of its spellings."""
    name = draw(st.sampled_from([*SENSITIVE_NAMES, MASK]))
    name = draw(st.sampled_from([str.upper, str.lower, str.title, str]))(name)
    return name.replace("_", draw(st.sampled_from(["_", "-", "", "_"])))


def _escaped(text: str) -> str:
    """JSON text with its ASCII letters written as escapes."""
    return "".join(f"\\u{ord(char):04x}" if char.isalpha() else char for char in text)


@st.composite
def json_texts(draw: st.DrawFn) -> str:
    """JSON with the secret somewhere under a name that counts."""
    value: Any = draw(st.sampled_from([SECRET, [SECRET], {"x": {"y": SECRET}}, [[{"k": SECRET}]]]))
    name = draw(names())
    if draw(st.booleans()):
        value = {draw(_LETTERS): 1, name: value, draw(_LETTERS) + "0": None}
    else:
        value = {name: value}
    for _ in range(draw(st.integers(0, 4))):
        shape = draw(st.integers(0, 3))
        if shape == 0:
            value = [1, value, "x"]
        elif shape == 1:
            value = {"a": value, "token_count": 5}
        elif shape == 2:
            value = {"text": json.dumps(value)}
        else:
            value = {"max_tokens": [value]}
    text = json.dumps(value, indent=draw(st.sampled_from([None, 2])))
    if draw(st.booleans()):
        text = text.replace(f'"{name}"', f'"{_escaped(name)}"')
    return text


@st.composite
def urls(draw: st.DrawFn) -> str:
    """A URL with the secret in its query, fragment, path parameters or user information."""
    pair = urlencode({draw(names()): SECRET})
    if draw(st.booleans()):
        pair = "".join(f"%{ord(char):02x}" for char in pair.partition("=")[0]) + "=" + SECRET
    shape = draw(st.integers(0, 5))
    if shape == 0:
        return f"https://user:{SECRET}@x.example/a"
    if shape == 1:
        return f"https://x.example/a;{pair}/b?c=d"
    if shape == 2:
        return f"https://x.example/cb#state=1&{pair}"
    if shape == 3:
        inner = f"https://y.example/?{pair}"
        return f"https://x.example/?next={quote(inner, safe='')}"
    if shape == 4:
        return f"/a?b=c&user[{draw(names())}]={SECRET}"
    return f"https://x.example/a?b=c&{pair}&d"


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, str | None]:
    """A body with the secret in it, and its Content-Type."""
    shape = draw(st.integers(0, 11))
    text = draw(json_texts())
    name = draw(names())
    if shape == 0:
        charset = draw(st.sampled_from(["utf-8", "utf-16", "utf-16le", "utf-32", "latin-1"]))
        return text.encode(charset), draw(
            st.sampled_from([None, "application/json", f"application/json; charset={charset}"])
        )
    if shape == 1:
        line = orjson.dumps(json.loads(text))
        return b"\n".join([b'{"a":1}', line, b"", b"[2]"]), "application/x-ndjson"
    if shape == 2:
        data = "\n".join(f"data: {part}" for part in text.split("\n"))
        return f": hello\nevent: x\n{data}\n\ndata: [DONE]\n\n".encode(), "text/event-stream"
    if shape == 3:
        return urlencode({"a": "b", name: SECRET, "c": ""}).encode(), "application/x-www-form-urlencoded"
    if shape == 4:
        return urlencode({"payload": text, "u": draw(urls())}).encode(), "application/x-www-form-urlencoded"
    if shape == 5:
        return _multipart({"a": b"x", name: SECRET.encode(), "doc": text.encode()}), "multipart/form-data; boundary=bnd"
    if shape == 6:
        head = b"Content-Transfer-Encoding: base64\r\n"
        return _multipart({"doc": base64.b64encode(text.encode())}, head), 'multipart/mixed; boundary="bnd"'
    if shape == 7:
        tag = name.replace(" ", "_")
        return f"<?xml version='1.0'?><a><{tag}>{SECRET}</{tag}></a>".encode(), "application/xml"
    if shape == 8:
        return f"login failed, {name}: {SECRET}".encode(), draw(st.sampled_from(["text/plain", None, "text/html"]))
    if shape == 9:
        return f"{text}\n{{broken".encode(), "application/json"
    if shape == 10:
        return json.dumps({"link": draw(urls()), "note": f"{name}={SECRET}"}).encode(), "application/json"
    return text.encode(), draw(
        st.sampled_from(["application/x-www-form-urlencoded", "text/plain; charset=utf-7", "multipart/mixed"])
    )


def _multipart(fields: dict[str, bytes], head: bytes = b"") -> bytes:
    parts = [
        b'--bnd\r\nContent-Disposition: form-data; name="%s"\r\n%s\r\n%s\r\n' % (name.encode(), head, content)
        for name, content in fields.items()
    ]
    return b"".join(parts) + b"--bnd--\r\n"


def holds(payload: bytes, secret: str = SECRET) -> bool:
    """Whether the secret, or its first half, can be read out of what left, in any encoding."""
    needle = secret[: len(secret) // 2].encode()
    found = [payload]
    try:
        event = json.loads(payload)
    except ValueError:
        event = {}
    found += [text.encode("utf-8", "replace") for text in _texts(event)]
    for part in ("request", "response"):
        body = event.get(part, {}) if isinstance(event, dict) else {}
        if body.get("transfer_encoding") == "base64":
            found.append(base64.b64decode(body["body"]))
    return any(needle in form for data in found for form in _forms(data))


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for inner in pair for text in _texts(inner)]
    return [text for inner in value for text in _texts(inner)] if isinstance(value, list) else []


def _forms(data: bytes) -> list[bytes]:
    """The bytes, and what they are once a coding, a charset or an escape is undone."""
    from urllib.parse import unquote_to_bytes

    forms = [data, data.replace(b"\0", b""), unquote_to_bytes(data), unquote_to_bytes(unquote_to_bytes(data))]
    for undo in (gzip.decompress, zlib.decompress, brotli.decompress, base64.b64decode):
        try:
            forms.append(undo(data))
        except Exception:
            continue
    for line in data.split():
        try:
            forms.append(base64.b64decode(line + b"=="))
        except Exception:
            continue
    try:
        forms.append(zstandard.ZstdDecompressor().decompressobj().decompress(data))
    except zstandard.ZstdError:
        pass
    try:
        forms.append(gzip.decompress(brotli.decompress(data)))
    except Exception:
        pass
    forms.append(
        data.decode("latin-1").encode("latin-1").decode("unicode_escape", "replace").encode("utf-8", "replace")
        if b"\\u" in data
        else data
    )
    return forms
