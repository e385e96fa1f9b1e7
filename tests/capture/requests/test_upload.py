"""Bodies that are files or iterables: teed as they are sent, untouched for everybody who looks at them."""

from __future__ import annotations

import array
import asyncio
import copy
import ctypes
import io
import pickle
import types

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from requests.adapters import HTTPAdapter
from requests.utils import super_len

from moesif_otel._capture.outgoing import OutgoingCall, Route
from moesif_otel._capture.streams import UploadSink, original_of, stand_in_for
from tests.capture.upstream import URLLIB3_1, RecordingPipeline, Upstream, capturing

# Callers here leave responses to the garbage collector, and Python says so, with us or without.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


class Unseekable:
    """A file that can only be read, and says how long it is, as requests-toolbelt's encoder does."""

    def __init__(self, data):
        self._file, self.len = io.BytesIO(data), len(data)

    def read(self, size=-1):
        return self._file.read(size)


class AgainAndAgain:
    """An iterable that starts anew each time."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def __iter__(self):
        return iter(self.pieces)


def opened(tmp_path, mode="rb", data=b"from a real file, \xc3\xbc"):
    path = tmp_path / "upload"
    path.write_bytes(data)
    return path.open(mode) if "b" in mode else path.open(mode, encoding="utf-8")


BODIES = {
    "bytes file": lambda _: io.BytesIO(b"in memory"),
    "partly read file": lambda _: (f := io.BytesIO(b"skip this"), f.seek(5))[0],
    "real file": opened,
    "read only": lambda _: Unseekable(b"only read"),
    "generator": lambda _: (piece for piece in [b"one", b"two"]),
    "generator of text": lambda _: (piece for piece in ["one", "two"]),
    "iterator": lambda _: iter([b"one", b"two"]),
    "iterable": lambda _: AgainAndAgain(b"one", b"two"),
    "empty file": lambda _: io.BytesIO(b""),
    "empty generator": lambda _: iter(()),
}
if URLLIB3_1:
    del BODIES["generator of text"]


@pytest.mark.parametrize(
    ("name", "path"),
    # `requests` announces a length and sends nothing, for ever, where a file of a length cannot be sent twice.
    [(name, path) for name in BODIES for path in ("/echo", "/redirect-echo") if (name, path) != ("read only", "/redirect-echo")],
)
def test_sent_and_captured(upstream, tmp_path, name, path):
    """What goes over the wire is the same with us, and it is what was captured; the caller's object is back in place."""

    def send():
        upstream.requests.clear()
        body = BODIES[name](tmp_path)
        try:
            response = requests.post(upstream.url + path, data=body)
            request = response.request
            result = response.content
        except requests.exceptions.RequestException as error:  # a generator cannot be sent again for a redirect
            request, result = error.request, type(error)
        except requests.exceptions.UnrewindableBodyError as error:
            request, result = None, type(error)
        if request is not None and request.body is not None:
            assert request.body is body
        if hasattr(body, "close") and not isinstance(body, types.GeneratorType):
            body.close()
        return result, [(r["path"], r["headers"], r["body"]) for r in upstream.requests]

    without = send()
    with capturing() as pipeline:
        with_us = send()
    assert with_us == without
    if isinstance(with_us[0], bytes):
        assert pipeline.only.request_body.data() == with_us[0] == with_us[1][-1][2]
        assert pipeline.only.request_body.total_bytes == len(with_us[0])


@pytest.mark.skipif(URLLIB3_1, reason="http.client encodes text files as latin-1")
@pytest.mark.filterwarnings("ignore::requests.exceptions.FileModeWarning")
def test_a_text_file(upstream, tmp_path):
    """A file opened as text is still seen as one by urllib3, which encodes its pieces."""
    with capturing() as pipeline, opened(tmp_path, "r", b"only ascii") as file:
        assert requests.post(upstream.url + "/echo", data=file).content == b"only ascii"
    with capturing() as text:
        assert requests.post(upstream.url + "/echo", data=io.StringIO("plain")).content == b"plain"
    assert pipeline.only.request_body.data() == b"only ascii"
    assert text.only.request_body.data() == b"plain"


def test_a_large_upload_is_cut(upstream):
    """Only the captured part is kept of an upload; its size is true."""
    with capturing(REQUEST_MAX_BODY_SIZE=100) as pipeline:
        requests.post(upstream.url + "/echo", data=iter([b"x" * 70_000] * 3), stream=True).close()
    body = pipeline.only.request_body
    assert (body.data(), body.total_bytes) == (b"x" * 100, 210_000)
    assert pipeline.budget.held_bytes == 100


def test_an_upload_that_fails_is_recorded_as_far_as_it_was_read():
    """The generator's own exception reaches the caller and is the call's error."""

    def breaking():
        yield b"first"
        raise LookupError("in the generator")

    with Upstream() as upstream, capturing() as pipeline:
        with pytest.raises(LookupError, match="in the generator"):
            requests.post(upstream.url + "/echo", data=breaking())
    assert pipeline.only.request_body.data() == b"first"
    assert pipeline.only.error_type == "LookupError"


def test_what_an_adapter_sees(upstream):
    """An adapter that looks at the body meets an object that answers as the body does, and changes land on the body."""
    seen = []

    class Looking(HTTPAdapter):
        def send(self, request, **kwargs):
            body = request.body
            seen.append((isinstance(body, io.BytesIO), body == original, hash(body) == hash(original), repr(body) == repr(original)))
            seen.append((super_len(body), body.tell(), body.seekable(), hasattr(body, "fileno"), hasattr(body, "mode")))
            seen.append(dir(body) == dir(original))
            return super().send(request, **kwargs)

    original = io.BytesIO(b"12345")
    with capturing() as pipeline, requests.Session() as session:
        session.mount("http://", Looking())
        response = session.post(upstream.url + "/echo", data=original)
    assert seen == [(True, True, True, True), (5, 0, True, True, False), True]
    assert response.request.body is original
    assert pipeline.only.request_body.data() == b"12345"


def test_a_body_is_not_touched_with_bodies_off(upstream):
    """No stand-in where nothing is to be captured."""
    seen = []

    class Looking(HTTPAdapter):
        def send(self, request, **kwargs):
            seen.append(type(request.body))
            return super().send(request, **kwargs)

    with capturing(LOG_BODY_OUTGOING=False), requests.Session() as session:
        session.mount("http://", Looking())
        session.post(upstream.url + "/echo", data=io.BytesIO(b"x"))
    assert seen == [io.BytesIO]


def sink_for(limit=1_000, start=0):
    call = OutgoingCall([Route(RecordingPipeline(REQUEST_MAX_BODY_SIZE=limit))], "POST", "http://x/")
    return UploadSink(call, start), call.exchanges[0].request_body


@pytest.mark.parametrize("body", [None, 5, object(), types.SimpleNamespace(write=print)])
def test_other_things_get_no_stand_in(body):
    """What is neither a file nor an iterable stays as it is."""
    assert stand_in_for(body, sink_for()[0]) is None
    assert original_of(body) is body


def test_special_methods_are_those_of_the_body():
    """`len`, truth, iteration and `with` exist exactly where the body has them."""
    sink, _ = sink_for()
    generator = stand_in_for((piece for piece in [b"a"]), sink)
    assert iter(generator) is generator
    assert next(generator) == b"a"
    assert isinstance(generator, types.GeneratorType)
    with pytest.raises(TypeError):
        len(generator)
    again = stand_in_for(AgainAndAgain(b"a", b"b"), sink)
    assert (list(again), list(again)) == ([b"a", b"b"], [b"a", b"b"])
    with pytest.raises(TypeError):
        next(again)
    file = stand_in_for(io.BytesIO(b"x\ny"), sink)
    with file as inner:
        assert inner is file
    assert file.closed
    file = stand_in_for(Unseekable(b"abc"), sink)
    file.own = 1
    assert original_of(file).own == 1
    del file.own
    assert not hasattr(file, "own")
    assert not hasattr(file, "seek")


@pytest.mark.parametrize("use", [len, iter, next, lambda body: body + 1, lambda body: str(type(body))])
def test_errors_name_the_class_of_the_body(use):
    """What Python says of a body that cannot do something is what it says without us."""

    def said(body):
        try:
            return use(body)
        except TypeError as exc:
            return str(exc)

    assert said(stand_in_for(Unseekable(b"a"), sink_for()[0])) == said(Unseekable(b"a"))


def test_an_iterable_that_only_may_be_a_file(upstream):
    """A class whose `read` is a property that this object lacks: it is sent by iteration, as without us."""

    class Pieces(AgainAndAgain):
        @property
        def read(self):
            raise AttributeError("read")

    stand_in = stand_in_for(Pieces(b"one", b"two"), sink_for()[0])
    assert not hasattr(stand_in, "read")
    with capturing() as pipeline:
        assert requests.post(upstream.url + "/echo", data=Pieces(b"one", b"two")).content == b"onetwo"
    assert pipeline.only.request_body.data() == b"onetwo"


def test_every_way_to_read_a_file():
    """`read`, `read1`, `readinto`, `readline`, `readlines` and iteration are each seen once."""
    data = b"one\ntwo\nthree\nfour\nfive\nsix"
    sink, body = sink_for()
    file = stand_in_for(io.BytesIO(data), sink)
    buffer = bytearray(4)
    got = file.read(4) + file.read1(4) + buffer[: file.readinto(buffer)] + file.readline()
    got += next(iter(file)) + b"".join(file.readlines())
    assert got == data == body.data()
    assert file.readinto(buffer) == 0
    assert body.total_bytes == len(data)


def test_a_rewind_after_the_sending_does_not_take_the_body_away(upstream):
    """Digest authentication rewinds a file at any answer from 400 to 499, and sends it again after a 401 only."""
    with capturing() as pipeline:
        auth = requests.auth.HTTPDigestAuth("user", "password")
        answer = requests.post(upstream.url + "/status/413", data=io.BytesIO(b"body"), auth=auth)
    assert answer.status_code == 413
    assert pipeline.only.request_body.data() == b"body"


def test_reading_from_the_middle_is_not_taken_for_the_beginning():
    """A sender that jumps ahead: the size counts on, the bytes are left out."""
    sink, body = sink_for()
    file = stand_in_for(io.BytesIO(b"0123456789"), sink)
    file.read(2)
    file.seek(6)
    file.read()
    assert (body.data(), body.total_bytes, body.left_out.value) == (b"", 6, "unreadable")
    file.seek(0)
    file.read()
    assert (body.data(), body.left_out) == (b"0123456789", None)


def test_a_broken_capture_does_not_reach_the_sender():
    """An error of ours while a piece passes is counted; the piece goes on."""
    sink, _ = sink_for()
    exchange = sink._call.exchanges[0]
    exchange.request_body = object()
    file = stand_in_for(io.BytesIO(b"abc"), sink)
    assert file.read() == b"abc"
    file.seek(0)
    assert file.read() == b"abc"
    assert exchange.pipeline.guard.counts() == {"capture of an outgoing request body": 2}


@given(
    data=st.binary(max_size=400),
    start=st.integers(0, 50),
    limit=st.integers(0, 300),
    steps=st.lists(st.one_of(st.integers(0, 120), st.just("rewind"), st.just("probe"))),
)
def test_any_sequence_of_reads_and_rewinds(data, start, limit, steps):
    """After any reads, rewinds and probes of the length, the capture is what was last sent from the beginning."""
    plain, file = io.BytesIO(data), io.BytesIO(data)
    plain.seek(start)
    file.seek(start)
    sink, body = sink_for(limit, start)
    watched = stand_in_for(file, sink)
    sent, rewound = b"", False
    for step in steps:
        if step == "rewind":
            assert watched.seek(start) == plain.seek(start)
            rewound = True
        elif step == "probe":
            here = watched.tell()
            assert watched.seek(0, io.SEEK_END) == len(data)
            watched.seek(here)
        else:
            piece = watched.read(step)
            assert piece == plain.read(step)
            sent, rewound = piece if rewound else sent + piece, False
    assert body.data() == sent[:limit]
    assert body.total_bytes == len(sent)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_stand_in_can_be_copied(copied):
    """A copy is one of the body, which nobody watches: adapters that retry or record keep one."""
    file = io.BytesIO(b"body")
    file.read(1)
    sink, body = sink_for()
    again = copied(stand_in_for(file, sink))
    assert type(again) is io.BytesIO
    assert (again.tell(), again.read(), body.total_bytes) == (1, b"ody", 0)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_what_cannot_be_copied_says_so_as_without_us(copied, tmp_path):
    """The same error for a file, or for a generator, as for the thing itself."""

    def error_of(one):
        with pytest.raises(TypeError) as error:
            copied(one)
        return str(error.value)

    with opened(tmp_path) as file:
        for body in (file, (piece for piece in ())):
            assert error_of(stand_in_for(body, sink_for()[0])) == error_of(body)


def test_buffers_of_any_kind_are_filled():
    """`readinto` takes arrays of ctypes and of numbers too."""
    for buffer in (bytearray(6), memoryview(bytearray(6)), (ctypes.c_char * 6)(), (ctypes.c_int16 * 3)(), array.array("h", [0, 0, 0])):
        sink, body = sink_for()
        assert stand_in_for(io.BytesIO(b"0123456789"), sink).readinto(buffer) == 6
        assert (bytes(buffer), body.data()) == (b"012345", b"012345")


def test_with_stays_with_the_stand_in():
    """What is read from `with body as file` is seen as well."""
    sink, body = sink_for()
    with stand_in_for(io.BytesIO(b"inside"), sink) as file:
        assert file.read() == b"inside"
    assert body.data() == b"inside"


async def pieces_of_a_task():
    yield b"one"
    yield b"two"


def test_asynchronous_bodies_are_seen_too():
    """Each iteration is one sending."""
    sink, body = sink_for()
    stand_in = stand_in_for(pieces_of_a_task(), sink)

    async def read():
        return [piece async for piece in stand_in]

    assert asyncio.run(read()) == [b"one", b"two"]
    assert body.data() == b"onetwo"
