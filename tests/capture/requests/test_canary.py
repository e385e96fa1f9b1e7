"""Canaries: members of `requests` and urllib3 that are not documented, and that the capture looks at.

When one fails on a new release, `capture/requests_facts.py` or `capture/requests_download.py` wants a look; until
then the capture passes what it does not know, counted, and the application is untouched.
"""

from __future__ import annotations

import gc
import inspect
import io

import pytest
import requests
from opentelemetry.instrumentation.requests import RequestsInstrumentor
from urllib3.response import HTTPResponse

from moesif_otel._capture.requests import facts
from tests.capture.upstream import LINES

# Callers here leave responses to the garbage collector, and Python says so, with us or without.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


def test_response_content_members(upstream):
    """`Response._content` and `_content_consumed` tell whether the body is in memory."""
    response = requests.get(upstream.url + "/lines", stream=True)
    assert facts.content_of(response) is None
    assert response.content == facts.content_of(response) == LINES
    response = requests.get(upstream.url + "/lines", stream=True)
    assert list(response.iter_content(None))
    assert facts.content_of(response) is None


def test_header_members():
    """`CaseInsensitiveDict._store` keeps the pairs as they were given, by lower-case name."""
    request = requests.Request("GET", "http://x/", headers={"X-Name": "one"}).prepare()
    assert facts.request_headers(request) == list(request.headers.items())
    assert facts.has_header(request.headers, "X-NAME")
    assert not facts.has_header(request.headers, "X-Other")
    request.headers = {b"X-Plain": b"two"}
    assert facts.request_headers(request) == [("X-Plain", "two")]


def test_raw_response_members(upstream):
    """`HTTPResponse._fp`, `length_remaining`, `_decoder` and `tell` tell where a body stands."""
    with requests.get(upstream.url + "/gzip", stream=True) as response:
        raw = response.raw
        assert facts.is_urllib3s(raw)
        assert not facts.nothing_left(raw)
        assert facts.bytes_read(raw) == 0
        raw.read(10)
        assert facts.bytes_read(raw) > 0
        assert facts.is_decoded(raw)
        assert not facts.pieces_decoded(raw, None)
        raw.read()
        assert facts.nothing_left(raw)
    assert isinstance(raw.length_remaining, int)
    assert facts.nothing_left(HTTPResponse(b"", preload_content=False))


def test_reading_methods_of_urllib3s_response():
    """Every public way to read is one that the watched class overrides, or goes through one that it does."""
    known = {"read", "read1", "read_chunked", "stream", "close", "drain_conn"} | {"data", "readinto", "json"}
    reading = {name for name in vars(HTTPResponse) if not name.startswith("_") and ("read" in name or name in known)}
    assert reading - {"readable", "supports_chunked_reads"} <= known
    for name, parameters in {"read": ["amt", "decode_content"], "read_chunked": ["amt", "decode_content"]}.items():
        assert list(inspect.signature(getattr(HTTPResponse, name)).parameters)[1:3] == parameters


def test_finalizers_are_announced():
    """CPython's `io` sets `_finalizing` on an object before it calls `close()` from a finalizer."""
    seen = []

    class Noting(HTTPResponse):
        def close(self):
            seen.append(facts.is_being_finalized(self))
            super().close()

    raw = Noting(io.BytesIO(b"x"), preload_content=False)
    raw.close()
    raw = Noting(io.BytesIO(b"x"), preload_content=False)
    del raw
    gc.collect()
    assert seen == [False, True]


def test_body_position():
    """`PreparedRequest._body_position` is where a file is rewound to."""
    file = io.BytesIO(b"12345")
    file.seek(2)
    assert facts.body_position(requests.Request("POST", "http://x/", data=file).prepare()) == 2
    assert facts.body_position(requests.Request("POST", "http://x/", data=b"x").prepare()) is None


def test_the_instrumentors_flag():
    """`RequestsInstrumentor` marks its patch, and puts `__wrapped__` back."""
    original = requests.Session.send
    RequestsInstrumentor().instrument()
    try:
        assert requests.Session.send.opentelemetry_instrumentation_requests_applied is True
        assert requests.Session.send.__wrapped__ is original
    finally:
        RequestsInstrumentor().uninstrument()
    assert requests.Session.send is original


def test_redirects_go_through_send_without_following():
    """`resolve_redirects` sends each hop through the session's `send`, with `allow_redirects=False`."""
    source = inspect.getsource(requests.Session.resolve_redirects)
    assert "self.send(" in source
    assert "allow_redirects=False" in source
