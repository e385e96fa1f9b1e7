"""Reading ahead for a governance rule: the application then reads the very same bytes, in any way."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesif_otel._capture.wsgi.input import PrefixedInput, read_ahead


class Socket:
    """A stream that cannot be sought, as servers give."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self.read = self._file.read
        self.readline = self._file.readline


READS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, 9)),
        st.tuples(st.just("readline"), st.integers(0, 9)),
        st.just(("readline",)),
    ),
    max_size=20,
)


@given(data=st.text(alphabet="ab\n", max_size=30), split=st.integers(0, 30), reads=READS)
def test_a_prefixed_input_reads_like_the_whole(data: str, split: int, reads: list[Any]) -> None:
    """Whatever was read ahead, each read gives what it would have given."""
    whole = data.encode()
    expected, got = io.BytesIO(whole), PrefixedInput(whole[:split], Socket(whole[split:]))
    for name, *size in [*reads, ("read",)]:
        assert getattr(got, name)(*size) == getattr(expected, name)(*size)
    for method in (list, lambda stream: stream.readlines(), lambda stream: stream.read(-1).splitlines(keepends=True)):
        assert method(PrefixedInput(whole[:split], Socket(whole[split:]))) == whole.splitlines(keepends=True)


@pytest.mark.parametrize("stream", [Socket, io.BytesIO])
def test_the_body_is_read_and_given_back(stream: Any) -> None:
    """Up to its length, never beyond: on a bare socket that would wait for the next request."""
    environ = {"wsgi.input": stream(b"bodynext"), "CONTENT_LENGTH": "4"}
    assert read_ahead(environ, 100) == b"body"
    assert environ["wsgi.input"].read(4) == b"body"
    assert environ["wsgi.input"].read(4) == b"next"


@pytest.mark.parametrize(
    "environ",
    [
        {"CONTENT_LENGTH": "101"},
        {"CONTENT_LENGTH": "0"},
        {"CONTENT_LENGTH": ""},
        {},
        {"HTTP_TRANSFER_ENCODING": "chunked"},
        {"wsgi.input_terminated": True},
    ],
)
def test_what_is_too_long_or_has_no_end_is_not_read(environ: dict[str, Any]) -> None:
    """The rule's condition then does not match, and the application's stream is untouched."""
    stream = environ["wsgi.input"] = Socket(b"x" * 101)
    assert read_ahead(environ, 100) is None
    assert environ["wsgi.input"] is stream
    assert len(stream.read()) == 101


def test_a_chunked_body_is_read_up_to_the_cap() -> None:
    """A terminated stream has an end; one longer than the cap is given back whole without being looked at."""
    environ: dict[str, Any] = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
    environ["wsgi.input"] = Socket(b"y" * 100)
    assert read_ahead(environ, 100) == b"y" * 100
    assert environ["wsgi.input"].read() == b"y" * 100
    environ["wsgi.input"] = Socket(b"z" * 150)
    assert read_ahead(environ, 100) is None
    assert environ["wsgi.input"].read() == b"z" * 150


@pytest.mark.parametrize("rest", [Socket, io.BytesIO])
def test_a_prefixed_input_is_a_file(rest: Any) -> None:
    """Applications wrap the files of wsgiref and Werkzeug, or read them into buffers of their own."""
    assert io.TextIOWrapper(PrefixedInput(b"a\nb", rest(b"c\nd"))).readlines() == ["a\n", "bc\n", "d"]
    buffer = bytearray(4)
    stream = PrefixedInput(b"ab", rest(b"cdef"))
    assert (stream.readinto(buffer), bytes(buffer), stream.read1(1), stream.read1()) == (4, b"abcd", b"e", b"f")
    with PrefixedInput(b"ab", rest(b"")) as stream:
        assert next(stream) == b"ab"
