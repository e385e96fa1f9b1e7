"""`events.body`: JSON as JSON, everything else as base64."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesif_otel._events.body import Body, read_body

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def read(data: bytes, content_type: str | None = "application/json", **how: Any) -> Body:
    how = {"truncated": False, "parse": False, **how}
    return read_body(data, content_type, how.pop("content_encoding", None), **how)


def sent(body: Body) -> Any:
    """The value as the server parses it."""
    return json.loads(orjson.dumps(body.value))


@given(st.dictionaries(st.text(), JSON_VALUES, max_size=4) | st.lists(JSON_VALUES, max_size=4), st.booleans())
def test_json_arrives_as_the_value_it_is(value: Any, parse: bool) -> None:
    """Embedded as a fragment or parsed for a mask, the server reads the same value."""
    data = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    body = read(data, parse=parse)
    if body.transfer_encoding == "json":
        assert sent(body) == json.loads(json.dumps(value).replace("\\ud8", "\\ud8")) or "\\ud" in json.dumps(value)
    else:
        with pytest.raises(UnicodeDecodeError):
            data.decode()


@pytest.mark.parametrize(
    "charset",
    ["utf-8", "utf-16", "utf-16le", "utf-16be", "utf-32", "utf-8-sig", "iso-8859-1", "windows-1252"],
)
@pytest.mark.parametrize("declared", [True, False])
def test_json_is_read_in_its_charset(charset: str, declared: bool) -> None:
    """Declared or seen from its first bytes; Latin-1 only where it is declared, since nothing else tells it."""
    data = '{"name": "Jörg"}'.encode(charset)
    body = read(data, f"application/json; charset={charset}" if declared else "application/json")
    if declared or charset.startswith("utf"):
        assert sent(body) == {"name": "Jörg"}
    else:
        assert body.transfer_encoding == "base64"


def test_utf8_under_a_wrong_charset_is_still_utf8() -> None:
    """Many servers say ISO-8859-1 and send UTF-8, as RFC 8259 demands."""
    assert sent(read('{"a": "ö"}'.encode(), "application/json; charset=ISO-8859-1")) == {"a": "ö"}


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/octet-stream", "text/html; charset=utf-8"])
def test_objects_and_arrays_are_json_whatever_the_type_says(content_type: str | None) -> None:
    """As in `moesifwsgi`."""
    assert sent(read(b' {"a": 1}', content_type)) == {"a": 1}
    assert sent(read(b"\n[1]", content_type)) == [1]


@pytest.mark.parametrize("text", ["42", '"x"', "true", "null", "1.5"])
def test_scalars(text: str) -> None:
    """A JSON scalar is JSON where the type says so; for a mask, and without such a type, it is base64."""
    assert sent(read(text.encode())) == json.loads(text)
    for body in (read(text.encode(), parse=True), read(text.encode(), "text/plain")):
        assert body.transfer_encoding == "base64"
        assert base64.b64decode(body.value) == text.encode()


@pytest.mark.parametrize(
    ("data", "content_type"),
    [
        (b"<html></html>", "text/html"),
        (b"a=1&b=2", "application/x-www-form-urlencoded"),
        (b"\x00\xff\xfe\x80", "application/octet-stream"),
        (b'{"a": 1', "application/json"),
        (b"{} {}", "application/json"),
        (b'{"a": NaN}', "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"a": "\xff"}', "application/json"),
        (b'{"\\ud800": ' + b"[" * 100_000, "application/json"),
    ],
)
@pytest.mark.parametrize("parse", [True, False])
def test_everything_else_is_base64_of_its_bytes(data: bytes, content_type: str, parse: bool) -> None:
    """No byte is lost, and nothing that is no JSON is embedded as such."""
    body = read(data, content_type, parse=parse)
    assert body.transfer_encoding == "base64"
    assert base64.b64decode(body.value) == data


def test_truncated_json_is_base64() -> None:
    """Valid by chance or not: a part is no value."""
    body = read(b"[1]", truncated=True)
    assert (body.transfer_encoding, body.shortened) == ("base64", True)


def test_lone_surrogates_that_json_dumps_writes_are_json() -> None:
    r"""`json.dumps("\\ud800")` is common; orjson refuses it, we do not."""
    body = read(b'{"a": "\\ud800x\\ud83d\\ude00\\\\ud800", "n": ' + b"9" * 30 + b"}")
    assert body.transfer_encoding == "json"
    assert sent(body) == {"a": "\ufffdx\U0001f600\\ud800", "n": int("9" * 30)}


def test_compressed_json_is_json() -> None:
    """The coding is undone first."""
    assert sent(read(gzip.compress(b'{"a": 1}'), content_encoding="gzip")) == {"a": 1}


def test_a_bomb_gives_its_first_part() -> None:
    """At most the bound is made, and base64 of it stays within the server's limit for a body."""
    body = read(gzip.compress(b" " * 50_000_000), content_encoding="gzip")
    assert body.shortened
    assert len(body.value) <= 450_000


def test_an_undecodable_body_is_sent_as_it_is() -> None:
    """Without rules there is nothing to protect: the bytes on the wire."""
    body = read(b"\x1f\x8bbroken", content_encoding="gzip")
    assert base64.b64decode(body.value) == b"\x1f\x8bbroken"


def test_no_bytes_are_no_body() -> None:
    """An empty body is none."""
    assert read(b"") == Body(None, None, None)


@given(
    st.binary(max_size=200),
    st.sampled_from(
        [None, "application/json", "application/json; charset=utf-16", "text/plain; charset=utf-7", "x;charset=idna"]
    ),
    st.sampled_from([None, "gzip", "br", "zstd", "deflate"]),
    st.booleans(),
    st.booleans(),
)
def test_any_bytes_make_a_body(
    data: bytes, content_type: str | None, coding: str | None, truncated: bool, parse: bool
) -> None:
    """Never an exception, always something that JSON can carry."""
    for prefix in (b"", b"{", b"[", b"\xff\xfe{\0"):
        body = read(prefix + data, content_type, content_encoding=coding, truncated=truncated, parse=parse)
        if body.transfer_encoding == "base64":
            base64.b64decode(body.value, validate=True)
