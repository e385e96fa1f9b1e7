"""`_events.json_check`: what is embedded as JSON is JSON to other parsers too, whichever way it is checked."""

from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesif_otel._events import json_check
from moesif_otel._events.json_check import is_embeddable, load_validator

PADDING = b" " * 1_024


def without_msgspec(data: bytes) -> bool:
    """What is said before the faster check is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_check, "_validators", [])
        return is_embeddable(data)


def agrees(data: bytes) -> bool:
    """Whether both ways say what orjson says."""
    load_validator()
    try:
        orjson.loads(data)
    except ValueError:
        expected = False
    else:
        expected = True
    padded = is_embeddable(data + PADDING) is is_embeddable(PADDING + data)
    return padded and is_embeddable(data) is is_embeddable(data + PADDING) is without_msgspec(data) is expected


@pytest.mark.parametrize(
    "data",
    [
        b"1e999", b"-1E+999", b'{"a": [1.5e0400]}', b"9" * 400, b"-" + b"9" * 400 + b".5", b"9" * 300 + b"e20", b"9" * 200 + b"e150",
        b'["the 1 e 999"]', b'["1e999"]', b"[true,123]", b'{"a":1,"e":123}', b'"\xff"', b'{"\xc0\x80":1}', b'"\xed\xa0\x80"',
        '"é"'.encode(), b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\x01"', b"[1,]", b"01", b"1.", b"nul", b"[]x", b"\xef\xbb\xbf[]", b"NaN", b"",
        b"[" * 5_000 + b"]" * 5_000, b"[" * 100_000,
    ],
)  # fmt: skip
def test_both_ways_agree(data: bytes) -> None:
    """Numbers beyond a float's range, odd bytes in strings, broken texts."""
    assert agrees(data)


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)


@given(_values, st.integers(0, 40), st.sampled_from([b"", *(bytes([code]) for code in b'{}[]",:\\e9.-\x00\xff'), b"e999", b"0" * 320]))
def test_both_ways_agree_on_anything(value: object, at: int, inserted: bytes) -> None:
    """Valid texts, and such with something put in anywhere."""
    text = json.dumps(value, ensure_ascii=at % 2 == 0).encode("utf-8", "replace")
    assert agrees(text[:at] + inserted + text[at:])
