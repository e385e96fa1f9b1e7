"""A property of the Tornado capture: whatever a handler does, client and logs are the same with and without us."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import io
import logging
import zlib
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tornado import web

from moesif_otel._capture.exchange import Outcome
from tests.capture.tornado.serving import Seen, capturing, get, run, serving, talk, without_dates

STEPS = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 3_000)),
    st.tuples(st.just("flush"), st.booleans()),
    st.tuples(st.just("status"), st.sampled_from([200, 201, 204, 304, 404, 503])),
    st.tuples(st.just("header"), st.sampled_from(["text/plain", "application/json", "image/png"])),
    st.tuples(st.just("length"), st.integers(0, 3_000)),
    st.tuples(st.just("cookie"), st.sampled_from("ab")),
    st.tuples(st.just("sleep"), st.none()),
    st.tuples(st.just("clear"), st.none()),
    st.tuples(st.just("redirect"), st.none()),
    st.tuples(st.just("finish"), st.integers(0, 2_000)),
    st.tuples(st.just("send_error"), st.sampled_from([400, 500])),
    st.tuples(st.just("raise"), st.sampled_from([ValueError, web.HTTPError, web.Finish, asyncio.CancelledError])),
)


class Scripted(web.RequestHandler):
    """Does what a list of steps says."""

    def initialize(self, prepare: list[Any], method: list[Any]) -> None:
        self.steps = {"prepare": prepare, "method": method}

    async def prepare(self) -> None:
        await self.follow("prepare")

    async def get(self) -> None:
        await self.follow("method")

    head = post = get

    async def follow(self, which: str) -> None:
        for name, value in self.steps[which]:
            if name == "write":
                self.write(b"x" * value)
            elif name == "flush":
                flushed = self.flush()
                if value:
                    await flushed
            elif name == "status":
                self.set_status(value)
            elif name == "header":
                self.set_header("Content-Type", value)
            elif name == "length":
                self.set_header("Content-Length", str(value))
            elif name == "cookie":
                self.set_cookie(value, "1")
            elif name == "sleep":
                await asyncio.sleep(0)
            elif name == "clear":
                self.clear()
            elif name == "redirect":
                self.redirect("/elsewhere")
            elif name == "finish":
                self.finish(b"y" * value)
            elif name == "send_error":
                self.send_error(value)
            elif name == "raise":
                raise value()


class Lines(logging.Handler):
    """Keeps what Tornado logs, without times and addresses of objects."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[0] if record.exc_info else None
        self.lines.append((record.name, str(record.msg), error))


def story(
    log_function: Any, prepare: list[Any], method: list[Any], request: bytes, give_up_s: float
) -> tuple[bytes, Any] | None:
    """Serve one request to a handler that follows the steps; give the bytes and Tornado's log, None for no end."""
    lines = Lines()
    logger = logging.getLogger("tornado")
    logger.addHandler(lines)
    handlers = [("/", Scripted, {"prepare": prepare, "method": method})]

    async def serve() -> bytes:
        app = web.Application(handlers, log_function=log_function, compress_response=True)
        async with serving(app) as port:
            return await talk(port, request, give_up_s=give_up_s)

    try:
        return without_dates(run(serve())), lines.lines
    except asyncio.TimeoutError:
        return None
    finally:
        logger.removeHandler(lines)


def same(seen: Seen, raw: bytes, method: str) -> None:
    """Check that the event says what the client got."""

    class Socket:
        def makefile(self, *_: Any) -> io.BytesIO:
            return io.BytesIO(raw)

    answer = http.client.HTTPResponse(Socket(), method=method)
    answer.begin()
    assert seen.status == answer.status
    try:
        body = answer.read()
        if answer.headers["Content-Encoding"] == "gzip" and body:
            body = gzip.decompress(body)
    except (http.client.IncompleteRead, EOFError, zlib.error):
        return  # cut off by the server: the handler broke its own promise of a length
    assert seen.response_body == body
    sent = [(name, value) for name, value in answer.getheaders() if name != "Date"]
    assert sorted(sent) == sorted((name, value) for name, value in seen.response_headers if name != "Date")


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    prepare=st.lists(STEPS, max_size=2),
    method=st.lists(STEPS, max_size=6),
    verb=st.sampled_from(["GET", "HEAD", "POST"]),
    accept=st.sampled_from(["gzip", "identity"]),
)
def test_a_handler_that_does_anything_is_served_the_same_and_recorded_once(prepare, method, verb, accept):
    """Bytes, order of headers and Tornado's own log; one event, which says what the client got."""
    request = get("/", f"Accept-Encoding: {accept}", method=verb)
    plain = story(lambda handler: None, prepare, method, request, 0.5)
    assume(plain is not None)  # some scripts make Tornado forget its client
    with capturing(RESPONSE_MAX_BODY_SIZE=400_000) as capture:
        captured = story(capture.log_event, prepare, method, request, 8)
        assert captured == plain
        (seen,) = capture.pipeline.seen
        assert capture.pipeline.guard.counts() == {}
        assert capture.pipeline.budget.held_bytes == 0
    if captured[0] and seen.outcome is not Outcome.ABORTED:
        same(seen, captured[0], verb)
