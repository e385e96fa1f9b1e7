"""`events.codings`: undoing Content-Encoding within a bound."""

from __future__ import annotations

import gzip
import random
import tracemalloc
import zlib
from typing import TYPE_CHECKING

import brotli
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from moesif_otel._events.codings import decode_content

if TYPE_CHECKING:
    from collections.abc import Callable

PLAIN = b'{"a": [1, 2, 3]}' * 200


def raw_deflate(data: bytes) -> bytes:
    deflate = zlib.compressobj(wbits=-15)
    return deflate.compress(data) + deflate.flush()


def zstd_without_size(data: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(data) + compressor.flush()


CODERS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("GZip", gzip.compress),
    ("x-gzip", gzip.compress),
    ("deflate", zlib.compress),
    ("deflate", raw_deflate),
    ("br", brotli.compress),
    ("zstd", zstandard.compress),
    ("zstd", zstd_without_size),
]


@pytest.mark.parametrize(("coding", "encode"), CODERS)
def test_each_coding_is_undone(coding: str, encode: Callable[[bytes], bytes]) -> None:
    """gzip, both kinds of deflate, br and zstd, names in any case."""
    decoded = decode_content(encode(PLAIN), coding, truncated=False, max_bytes=10_000)
    assert (decoded.data, decoded.whole, decoded.clear) == (PLAIN, True, True)


@pytest.mark.parametrize(("coding", "encode"), CODERS)
def test_output_beyond_the_bound_is_cut(coding: str, encode: Callable[[bytes], bytes]) -> None:
    """The first part comes out, marked as a part."""
    decoded = decode_content(encode(PLAIN), coding, truncated=False, max_bytes=100)
    assert (decoded.data, decoded.whole, decoded.clear) == (PLAIN[:100], False, True)


@pytest.mark.parametrize(("coding", "encode"), CODERS)
def test_a_truncated_stream_gives_its_first_part(coding: str, encode: Callable[[bytes], bytes]) -> None:
    """A capture that was cut decodes as far as it goes and is never called whole."""
    data = encode(random.Random(1).randbytes(20_000).hex().encode())
    decoded = decode_content(data[: len(data) // 2], coding, truncated=True, max_bytes=100_000)
    assert not decoded.whole
    assert decoded.clear
    assert decoded.data == random.Random(1).randbytes(20_000).hex().encode()[: len(decoded.data)]


@pytest.mark.parametrize(("coding", "encode"), CODERS)
def test_a_bomb_stays_small(coding: str, encode: Callable[[bytes], bytes]) -> None:
    """30 MB of zeros behind some KB never take more than a few times the bound."""
    bomb = encode(b"\0" * 30_000_000)
    tracemalloc.start()
    try:
        decoded = decode_content(bomb, coding, truncated=False, max_bytes=450_000)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(decoded.data) == 450_000
    assert peak_bytes < 5_000_000


def test_nested_bombs_and_many_codings_are_bounded() -> None:
    """Each of several codings has the bound; more than a few are not undone at all."""
    bomb = gzip.compress(gzip.compress(b"\0" * 50_000_000))
    assert len(decode_content(bomb, "gzip, gzip", truncated=False, max_bytes=1_000).data) <= 1_000
    assert not decode_content(b"\x1f\x8b", ",".join(["gzip"] * 50), truncated=False, max_bytes=9).clear


def test_many_gzip_members_are_linear_and_bounded() -> None:
    """Members are joined up to a number that no sender reaches by accident."""
    two = gzip.compress(b"one ") + gzip.compress(b"two")
    assert decode_content(two, "gzip", truncated=False, max_bytes=100).data == b"one two"
    many = gzip.compress(b"") * 20_000
    assert not decode_content(many, "gzip", truncated=False, max_bytes=100).whole


def test_several_codings_are_undone_in_reverse() -> None:
    """`gzip, br` was gzip first."""
    data = brotli.compress(gzip.compress(PLAIN))
    assert decode_content(data, "gzip, br", truncated=False, max_bytes=10_000).data == PLAIN


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
def test_bytes_that_are_clear_already_stay(coding: str) -> None:
    """A capture may see bytes before they are compressed although the header tells of it (Tornado)."""
    decoded = decode_content(PLAIN, coding, truncated=False, max_bytes=10_000)
    assert (decoded.data, decoded.whole, decoded.clear) == (PLAIN, True, True)


@pytest.mark.parametrize("coding", ["compress", "unheard-of", "gzip, unheard-of"])
def test_an_unknown_coding_is_not_clear(coding: str) -> None:
    """Nobody can look into it: it is marked, so that rules leave it out."""
    decoded = decode_content(b"\x1f\x8b\x00\xff", coding, truncated=False, max_bytes=10)
    assert not decoded.clear or coding != "compress"
    assert decoded.data == b"\x1f\x8b\x00\xff"


def test_identity_is_no_coding() -> None:
    """`identity` and empty entries change nothing."""
    assert decode_content(b"\x00\x01", "identity, ", truncated=False, max_bytes=1).data == b"\x00\x01"


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate", "br", "zstd", "gzip, deflate"]))
def test_no_bytes_raise(data: bytes, coding: str) -> None:
    """Whatever arrives, there is an answer within the bound."""
    for body in (data, b"\x1f\x8b\x08\x00" + data, b"\x78\x9c" + data, b"\x28\xb5\x2f\xfd" + data):
        decoded = decode_content(body, coding, truncated=False, max_bytes=1_000)
        assert len(decoded.data) <= max(1_000, len(body))


@given(st.binary(max_size=2_000), st.integers(0, 2_000))
def test_round_trip_at_every_cut(data: bytes, cut: int) -> None:
    """A cut stream gives a prefix of the truth, for every coding and every cut."""
    for coding, encode in CODERS:
        encoded = encode(data)
        decoded = decode_content(encoded[:cut], coding, truncated=cut < len(encoded), max_bytes=10_000)
        if decoded.clear and decoded.data != encoded[:cut]:
            assert data.startswith(decoded.data)
            assert not decoded.whole or decoded.data == data
