"""Planted secrets, drawn: whatever the format, coding, chunking and cut, none is in any byte that a middleware sends."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit
from wsgiref.util import setup_testing_defaults

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moesif_otel import MoesifMiddleware
from tests.faults.fault_server import FaultServer
from tests.secrets import CODINGS, MASK, SECRET, bodies, names, urls

from .reading import found_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOME = settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
_SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=6)
_USER_INFO_BODY = (f'{{"link": "https://user:{SECRET}@x.example/a", "note": "PASSWORD={SECRET}"}}'.encode(), "application/json")
_CAPS = (40, 300, 100_000)


def _pieces(data: bytes, sizes: list[int]) -> list[bytes]:
    found, at = [], 0
    while at < len(data):
        size = sizes[len(found) % len(sizes)]
        found.append(data[at : at + size])
        at += size
    return found


class Way:
    """One middleware, and everything that it has sent."""

    def __init__(self, server: FaultServer, **options: Any) -> None:
        self._server = server
        self._answer: Callable[[dict[str, Any], Any], Any] = lambda *_: []
        masks = {f"{side}_{part}_MASKS": [MASK] for side in ("REQUEST", "RESPONSE") for part in ("BODY", "HEADER")}
        self.middleware = MoesifMiddleware(
            lambda environ, start_response: self._answer(environ, start_response),
            {"APPLICATION_ID": "drawn", "BASE_URI": server.url, **masks, **options},
        )

    def call(self, answer: Callable[[dict[str, Any], Any], Any], **environ: Any) -> None:
        """Serve a call as a WSGI server does, and look at every byte that has left since."""
        self._answer = answer
        setup_testing_defaults(environ)
        before = len(self._server.requests)
        result = self.middleware(environ, lambda *_: lambda _data: None)
        for _ in result:
            pass
        if hasattr(result, "close"):
            result.close()
        assert self.middleware.force_flush(30_000)
        sent = [one for one in tuple(self._server.requests)[before:] if one.method == "POST"]
        assert sent, "nothing was sent"
        for request in sent:
            assert found_in(request.body, [SECRET]) == [], request.body
            assert SECRET not in repr(request.headers) + request.path


@pytest.fixture(scope="module")
def ways() -> Iterator[list[Way]]:
    with FaultServer() as server:
        made = [Way(server, REQUEST_MAX_BODY_SIZE=cap, RESPONSE_MAX_BODY_SIZE=cap) for cap in _CAPS]
        made.append(Way(server, MASK_EVENT_MODEL=lambda event: event))
        yield made
        for way in made:
            way.middleware.shutdown()


def _encoded(planted: tuple[bytes, str | None], coding: str | None) -> tuple[bytes, list[tuple[str, str]]]:
    data, content_type = planted
    headers = [("Content-Type", content_type)] if content_type else []
    return CODINGS[coding](data), headers + ([("Content-Encoding", coding)] if coding else [])


@SOME
@given(
    planted=bodies(), coding=st.sampled_from(list(CODINGS)), sizes=_SIZES, shape=st.sampled_from(["list", "stream", "write"]), way=st.integers(0, 3)
)
def test_in_responses(
    ways: list[Way], planted: tuple[bytes, str | None], coding: str | None, sizes: list[int], shape: str, way: int
) -> None:
    """A body of any format, in pieces of any size, in each of the ways that WSGI knows."""
    data, headers = _encoded(planted, coding)
    pieces = _pieces(data, sizes)

    def answer(_environ: dict[str, Any], start_response: Any) -> Any:
        write = start_response("200 OK", headers)
        if shape == "write":
            for piece in pieces[:-1]:
                write(piece)
            return pieces[-1:]
        return pieces if shape == "list" else iter(pieces)

    ways[way].call(answer)


@SOME
@given(planted=bodies(), coding=st.sampled_from(list(CODINGS)), sizes=_SIZES, part=st.floats(0.05, 1), way=st.integers(0, 3))
@example(planted=_USER_INFO_BODY, coding=None, sizes=[1], part=0.375, way=2)  # the application stops inside the password
def test_in_requests(
    ways: list[Way], planted: tuple[bytes, str | None], coding: str | None, sizes: list[int], part: float, way: int
) -> None:
    """A body that the application reads in pieces, maybe not to its end."""
    data, headers = _encoded(planted, coding)
    wanted = max(1, int(len(data) * part))

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        stream, read, turn = environ["wsgi.input"], 0, 0
        while read < wanted:
            piece = stream.read(min(sizes[turn % len(sizes)], wanted - read))
            if not piece:
                break
            read, turn = read + len(piece), turn + 1
        start_response("204 No Content", [])
        return []

    more = {"CONTENT_TYPE" if name == "Content-Type" else "HTTP_CONTENT_ENCODING": value for name, value in headers}
    ways[way].call(answer, REQUEST_METHOD="POST", CONTENT_LENGTH=str(len(data)), **{"wsgi.input": io.BytesIO(data)}, **more)


@SOME
@given(target=urls(), other=urls(), name=names(), quoted=st.booleans())
def test_in_urls_and_headers(ways: list[Way], target: str, other: str, name: str, *, quoted: bool) -> None:
    """In the request's own URL, in `Referer`, `Location`, cookies, credentials and under names of its own."""
    parts = urlsplit(target)
    value = json.dumps({name: SECRET}) if quoted else f"{name}={SECRET}"

    def answer(_environ: dict[str, Any], start_response: Any) -> Any:
        start_response("302 Found", [("Location", other), ("Set-Cookie", f"{name}={SECRET}; Path=/"), ("X-Note", value)])
        return []

    ways[2].call(
        answer,
        PATH_INFO=parts.path,
        QUERY_STRING=parts.query,
        HTTP_REFERER=target,
        HTTP_COOKIE=f"a=b; {name}={SECRET}; sid={SECRET}",
        HTTP_AUTHORIZATION=f"Bearer {SECRET}",
        HTTP_PROXY_AUTHORIZATION=SECRET,
        HTTP_NICKNAME=SECRET,
        HTTP_X_API_KEY=SECRET,
        HTTP_X_NOTE=value,
    )


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "text/event-stream", "application/x-www-form-urlencoded"])
def test_escaped_names_in_cut_json(ways: list[Way], depth: int, content_type: str) -> None:
    """A name spelled in escapes, in JSON inside of JSON, of which only the first part is there."""
    name = "".join(f"\\u{ord(char):04x}" for char in "PASSWORD")
    text = f'{{"{name}": "{SECRET}'
    for _ in range(depth):
        text = json.dumps({"a": text})[:-2]
    for body in (text, f"data: {text}", f"payload={quote(text)}", json.dumps({"note": text})):
        data = body.encode()

        def answer(_environ: dict[str, Any], start_response: Any, data: bytes = data) -> Any:
            start_response("200 OK", [("Content-Type", content_type)])
            return [data]

        ways[2].call(answer)
        ways[3].call(answer)
