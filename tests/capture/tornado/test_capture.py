"""Tests of the Tornado capture: what the client sees is what it saw without us, and what passed is recorded."""

from __future__ import annotations

import asyncio
import functools
import gc
import gzip
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tornado import iostream, web, websocket, wsgi
from tornado.simple_httpclient import SimpleAsyncHTTPClient

from moesif_otel._capture.exchange import Exchange, Outcome, current_exchange, identify
from moesif_otel._capture.tornado.capture import TornadoCapture
from moesif_otel._capture.wsgi.capture import WsgiCapture
from moesif_otel.settings import Settings
from tests.capture.tornado.serving import (
    Recorder,
    Seen,
    capturing,
    eventually,
    get,
    recorder,
    run,
    serving,
    talk,
    without_dates,
)


def compare(
    handlers: list[Any], *requests: bytes, pipeline: Recorder | None = None, **settings: Any
) -> tuple[Recorder, list[bytes]]:
    """Serve the requests without and with us, assert the same bytes, and give what was recorded and answered."""
    pipeline = pipeline or recorder()

    async def serve(log_function: Any) -> list[bytes]:
        made = settings.pop("application", None)
        app = made(log_function) if made else web.Application(handlers, log_function=log_function, **settings)
        if made:
            settings["application"] = made
        async with serving(app) as port:
            return [await talk(port, request) for request in requests]

    plain = run(serve(lambda handler: None))
    with capturing(pipeline) as capture:
        captured = run(serve(capture.log_event))
    assert [without_dates(raw) for raw in captured] == [without_dates(raw) for raw in plain]
    assert pipeline.guard.counts() == {}
    assert pipeline.budget.held_bytes == 0
    return pipeline, captured


def one(pipeline: Recorder) -> Seen:
    """Give the only call that was recorded."""
    assert len(pipeline.seen) == 1
    return pipeline.seen[0]


# Handlers.


class Orders(web.RequestHandler):
    def get(self) -> None:
        self.set_cookie("first", "1")
        self.set_cookie("second", "2")
        self.add_header("X-Twice", "a")
        self.add_header("X-Twice", "b")
        self.write({"orders": [1, 2, 3]})

    async def post(self) -> None:
        await asyncio.sleep(0)
        self.set_status(201)
        self.write({"got": json.loads(self.request.body)})


class Parts(web.RequestHandler):
    async def get(self) -> None:
        self.set_cookie("seen", "yes")
        for n in range(3):
            self.write(f"part {n};")
            await self.flush()


class Broken(web.RequestHandler):
    def get(self) -> None:
        raise ZeroDivisionError("a detail that must not be recorded")


class BrokenMidway(web.RequestHandler):
    async def get(self) -> None:
        self.write("begun")
        await self.flush()
        raise ZeroDivisionError


class Refusing(web.RequestHandler):
    def get(self) -> None:
        raise web.HTTPError(418, reason="Teapot")


class Finishing(web.RequestHandler):
    def get(self) -> None:
        self.set_status(402)
        raise web.Finish("pay first")


class EarlyPrepare(web.RequestHandler):
    def prepare(self) -> None:
        self.set_status(401)
        self.finish("who are you?")

    def get(self) -> None:
        raise AssertionError


class Handled(web.RequestHandler):
    def get(self) -> None:
        try:
            raise KeyError("of the handler's own")
        except KeyError:
            self.set_status(404)
            self.finish({"error": "no such thing"})


class Nothing(web.RequestHandler):
    def get(self) -> None:
        self.set_status(204)


class Item(web.RequestHandler):
    def get(self, name: str) -> None:
        self.write(name)


class Headed(web.RequestHandler):
    def head(self) -> None:
        self.write("a body that HEAD does not send")


class Big(web.RequestHandler):
    def get(self) -> None:
        self.set_header("Content-Type", "text/plain")
        self.write("x" * 5000)


def test_a_call_is_recorded_with_everything_the_wire_had():
    """Method, full URL, headers with repetitions, JSON bodies, status, address and times in order."""
    pipeline, answers = compare(
        [("/orders", Orders)],
        get("/orders?page=2&q=%20", "X-Mine: a", "X-Mine: b"),
        get("/orders", "Content-Type: application/json", method="POST", body=b'{"item": "tea"}'),
    )
    first, second = pipeline.seen
    assert (first.method, first.url, first.status) == ("GET", "http://api.example.com:8080/orders?page=2&q=%20", 200)
    assert [v for k, v in first.request_headers if k == "X-Mine"] == ["a", "b"]
    assert json.loads(first.response_body) == {"orders": [1, 2, 3]}
    assert first.header("X-Twice") == ["a", "b"]
    assert len(first.header("Set-Cookie")) == 2
    assert first.request_body is None
    assert first.peer_address == "127.0.0.1"
    assert first.started_ns <= first.ended_ns <= second.started_ns <= second.ended_ns
    assert (second.method, second.status, second.request_body) == ("POST", 201, b'{"item": "tea"}')
    assert json.loads(second.response_body) == {"got": {"item": "tea"}}
    assert {seen.outcome for seen in pipeline.seen} == {Outcome.COMPLETE}
    assert b'{"orders": [1, 2, 3]}' in answers[0]


def test_a_call_begins_with_its_headers_and_not_with_the_end_of_its_body():
    """A slow upload is part of the call's time, although Tornado calls the handler only when it is there."""

    async def serve(capture: TornadoCapture) -> int:
        async with serving(web.Application([("/orders", Orders)], log_function=capture.log_event)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            request = get("/orders", "Expect: 100-continue", method="POST", body=b'{"slow": 1}')
            writer.write(request[:-11])
            await reader.readuntil(b"100 (Continue)\r\n\r\n")
            headers_were_read_ns = time.time_ns()
            writer.write(request[-11:])
            await reader.read()
            writer.close()
            return headers_were_read_ns

    with capturing() as capture:
        headers_were_read_ns = run(serve(capture))
    assert one(capture.pipeline).started_ns <= headers_were_read_ns
    assert one(capture.pipeline).request_body == b'{"slow": 1}'


def test_the_callbacks_get_the_handler_and_nothing_keeps_it():
    """`callback_arguments` is `(handler,)`, and the handler has no attribute of ours after the call."""
    pipeline, _ = compare([("/orders", Orders)], get("/orders"))
    (handler,) = one(pipeline).arguments
    assert isinstance(handler, Orders)
    assert not {"detach", "data_received"} & set(vars(handler))
    assert "write_headers" not in vars(handler.request.connection)
    assert all(call.handler is None and call.exchange is None for call in handler.request._moesif_otel_calls.values())


def test_flushed_parts_are_recorded_in_order_and_cookies_too():
    """A response in several flushes is one event with all of them, and with the headers as sent."""
    pipeline, _ = compare([("/", Parts)], get("/"))
    seen = one(pipeline)
    assert seen.response_body == b"part 0;part 1;part 2;"
    assert len(seen.header("Set-Cookie")) == 1
    assert seen.header("Transfer-Encoding") == ["chunked"]


def test_the_first_byte_leaves_before_the_handler_goes_on():
    """The client reads the first part while the handler still waits for the client to have read it."""

    async def exchange(log_function: Any) -> bytes:
        read_by_client = asyncio.Event()

        class Stream(web.RequestHandler):
            async def get(self) -> None:
                self.write("first;")
                await self.flush()
                await read_by_client.wait()
                self.write("last")

        async with serving(web.Application([("/", Stream)], log_function=log_function)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(get("/"))
            head = await reader.readuntil(b"first;")
            read_by_client.set()
            rest = await reader.read()
            writer.close()
            return head + rest

    with capturing() as capture:
        assert without_dates(run(exchange(capture.log_event))) == without_dates(run(exchange(lambda handler: None)))
        assert one(capture.pipeline).response_body == b"first;last"


@pytest.mark.parametrize(
    ("handler", "status", "outcome", "error_type", "body"),
    [
        (Broken, 500, Outcome.FAILED, "ZeroDivisionError", b"500: Internal Server Error"),
        (Refusing, 418, Outcome.COMPLETE, None, b"418: Teapot"),
        (Finishing, 402, Outcome.COMPLETE, None, b"pay first"),
        (EarlyPrepare, 401, Outcome.COMPLETE, None, b"who are you?"),
        (Handled, 404, Outcome.COMPLETE, None, b"no such thing"),
        (Nothing, 204, Outcome.COMPLETE, None, b""),
    ],
)
def test_every_way_to_answer_is_recorded(handler, status, outcome, error_type, body):
    """Error pages with their 500, `HTTPError`, `Finish`, an early `prepare`, 204: status, page and outcome."""
    pipeline, _ = compare([("/", handler)], get("/"))
    seen = one(pipeline)
    assert (seen.status, seen.outcome, seen.error_type) == (status, outcome, error_type)
    assert body in seen.response_body


def test_a_handler_that_raises_midway_is_recorded_as_its_client_saw_it():
    """After the first flush the status is what was sent, and the event says that the application failed."""
    pipeline, _ = compare([("/", BrokenMidway)], get("/"))
    seen = one(pipeline)
    assert (seen.status, seen.response_body, seen.outcome) == (200, b"begun", Outcome.FAILED)
    assert seen.error_type == "ZeroDivisionError"


def test_an_unknown_route_a_redirect_and_a_wrong_method_are_recorded():
    """404 of no handler, 301 and 405 are calls like others."""
    pipeline, _ = compare(
        [("/old", web.RedirectHandler, {"url": "/new"}), ("/one", Nothing)],
        get("/nowhere"),
        get("/old"),
        get("/one", method="BREW"),
    )
    assert [seen.status for seen in pipeline.seen] == [404, 301, 405]
    assert b"404: Not Found" in pipeline.seen[0].response_body
    assert pipeline.seen[1].header("Location") == ["/new"]


def test_a_default_handler_class_is_captured():
    """`Application(default_handler_class=…)` answers for unknown routes."""
    pipeline, _ = compare([], get("/anything"), default_handler_class=Refusing)
    assert one(pipeline).status == 418


def test_head_and_not_modified_have_no_body():
    """What a handler wrote and the client never got is not recorded."""
    pipeline, answers = compare([("/h", Headed), ("/orders", Orders)], get("/h", method="HEAD"), get("/orders"))
    assert (pipeline.seen[0].status, pipeline.seen[0].response_body) == (200, b"")
    etag = re.search(rb"Etag: ([^\r]+)", answers[1])[1].decode()
    pipeline, _ = compare([("/orders", Orders)], get("/orders", f"If-None-Match: {etag}"))
    assert (one(pipeline).status, one(pipeline).response_body) == (304, b"")


def test_compressed_responses_are_recorded_decoded():
    """With `compress_response` the client gets gzip and the event the text."""
    pipeline, answers = compare([("/", Big)], get("/", "Accept-Encoding: gzip"), get("/"), compress_response=True)
    assert gzip.decompress(answers[0].partition(b"\r\n\r\n")[2]) == b"x" * 5000
    first, second = pipeline.seen
    assert (first.response_body, first.decoded, first.header("Content-Encoding")) == (b"x" * 5000, True, ["gzip"])
    assert (second.response_body, second.decoded) == (b"x" * 5000, False)


def test_a_body_that_the_handler_compressed_itself_is_marked_as_such():
    """Bytes that were encoded when we saw them are not called decoded."""
    encoded = gzip.compress(b"by hand", mtime=0)

    class ByHand(web.RequestHandler):
        def get(self) -> None:
            self.set_header("Content-Encoding", "gzip")
            self.write(encoded)

    pipeline, _ = compare([("/", ByHand)], get("/", "Accept-Encoding: gzip"), compress_response=True)
    assert (one(pipeline).response_body, one(pipeline).decoded) == (encoded, False)


def test_calls_that_never_reach_the_handler_are_recorded():
    """A malformed body, a path argument that is no UTF-8 and a missing XSRF token: 400, 400 and 403."""

    class Form(web.RequestHandler):
        def post(self) -> None:
            self.write("taken")

    multipart = get("/form", "Content-Type: multipart/form-data; boundary=x", method="POST", body=b"no parts at all")
    bad_json_free = get("/items/%ff")
    pipeline, answers = compare([("/form", Form), ("/items/(.*)", Item)], multipart, bad_json_free)
    assert [seen.status for seen in pipeline.seen] == [int(raw.split()[1]) for raw in answers]
    assert pipeline.seen[1].status == 400
    pipeline, _ = compare([("/form", Form)], get("/form", method="POST", body=b"a=1"), xsrf_cookies=True)
    assert (one(pipeline).status, one(pipeline).request_body) == (403, b"a=1")


def test_static_files_are_recorded_as_the_server_reads_them(tmp_path):
    """The first part up to the cap, the true size, no read of our own."""
    (tmp_path / "page.txt").write_bytes(b"s" * 300_000)
    pipeline, answers = compare(
        [("/static/(.*)", web.StaticFileHandler, {"path": str(tmp_path)})],
        get("/static/page.txt"),
        get("/static/page.txt", "Range: bytes=5-9"),
        get("/static/none.txt"),
    )
    whole, part, missing = pipeline.seen
    assert (whole.status, len(whole.response_body), whole.response_total_bytes) == (200, 100_000, 300_000)
    assert (part.status, part.response_body) == (206, b"sssss")
    assert missing.status == 404
    assert len(answers[0]) > 300_000


def test_one_connection_can_carry_many_calls():
    """Keep-alive and pipelining: each request is an event of its own."""
    keep = get("/orders").replace(b"Connection: close\r\n", b"")
    pipeline, _ = compare([("/orders", Orders)], keep + keep + get("/orders?last"))
    assert [seen.url.rpartition("/")[2] for seen in pipeline.seen] == ["orders", "orders", "orders?last"]


@pytest.mark.parametrize(
    ("request_line", "url"),
    [
        (b"GET http://other.example/a?b HTTP/1.1", "http://other.example/a?b"),
        (b"OPTIONS * HTTP/1.1", "http://api.example.com:8080/*"),
        (b"GET /caf\xc3\xa9?x=\xff HTTP/1.1", "http://api.example.com:8080/caf%C3%A9?x=%FF"),
        (b"GET /a%2Fb%zz HTTP/1.1", "http://api.example.com:8080/a%2Fb%zz"),
    ],
)
def test_odd_request_targets_make_a_full_url(request_line, url):
    """Absolute form, asterisk form and bytes that no URL may hold."""
    raw = request_line + b"\r\nHost: api.example.com:8080\r\nConnection: close\r\n\r\n"
    pipeline, answers = compare([("/orders", Orders)], raw)
    if answers[0].startswith(b"HTTP/1.1 404") or pipeline.seen:
        assert one(pipeline).url == url


def test_the_address_behind_a_proxy_is_the_one_tornado_was_told_to_believe():
    """With `xheaders` Tornado takes `X-Real-Ip`; we take what Tornado has."""

    async def serve(capture: TornadoCapture) -> None:
        app = web.Application([("/orders", Orders)], log_function=capture.log_event)
        async with serving(app, xheaders=True) as port:
            await talk(port, get("/orders", "X-Real-Ip: 203.0.113.9", "X-Scheme: https"))

    with capturing() as capture:
        run(serve(capture))
    assert (one(capture.pipeline).peer_address, one(capture.pipeline).url[:8]) == ("203.0.113.9", "https://")


def test_without_log_body_nothing_of_a_body_is_kept():
    """LOG_BODY false: neither request nor response bodies, whole or streamed."""

    @web.stream_request_body
    class Upload(web.RequestHandler):
        def data_received(self, chunk: bytes) -> None:
            pass

        def post(self) -> None:
            assert "data_received" not in vars(self)
            self.write("thanks")

    pipeline, _ = compare(
        [("/orders", Orders), ("/up", Upload)],
        get("/orders", method="POST", body=b"{}"),
        get("/up", method="POST", body=b"abc"),
        pipeline=recorder(LOG_BODY=False),
    )
    assert [(seen.request_body, seen.response_body, seen.status) for seen in pipeline.seen] == [
        (None, None, 201),
        (None, None, 200),
    ]


def test_streamed_uploads_are_seen_as_the_handler_gets_them():
    """`data_received` gets every chunk, awaits as it did, and the first part up to the cap is recorded."""
    received: list[bytes] = []

    @web.stream_request_body
    class Upload(web.RequestHandler):
        async def data_received(self, chunk: bytes) -> None:
            received.append(chunk)
            await asyncio.sleep(0)

        def post(self) -> None:
            self.write(str(sum(map(len, received))))
            received.clear()

    body = bytes(range(256)) * 1000
    chunked = (
        b"POST /up HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
    )
    pipeline, answers = compare(
        [("/up", Upload)],
        get("/up", method="POST", body=body),
        chunked,
        pipeline=recorder(REQUEST_MAX_BODY_SIZE=1000),
    )
    first, second = pipeline.seen
    assert answers[0].endswith(b"256000")
    assert (first.request_body, first.request_total_bytes) == (body[:1000], 256_000)
    assert second.request_body == b"hello world"


def test_a_client_that_leaves_a_stream_ends_the_call_and_the_handler_sees_what_it_saw():
    """`on_connection_close` runs once, the next flush raises in the handler, the event is there at once."""
    notes: dict[str, list[str]] = {}

    async def serve(log_function: Any, key: str, pipeline: Recorder | None) -> None:
        story = notes.setdefault(key, [])
        gone = asyncio.Event()

        class Events(web.RequestHandler):
            async def get(self) -> None:
                self.set_header("Content-Type", "text/event-stream")
                self.write("data: 1\n\n")
                await self.flush()
                await gone.wait()
                try:
                    self.write("data: 2\n\n")
                    await self.flush()
                except iostream.StreamClosedError:
                    story.append("flush raised")
                    raise

            def on_connection_close(self) -> None:
                story.append("closed")
                gone.set()

            def on_finish(self) -> None:
                story.append("finished")

        async with serving(web.Application([("/", Events)], log_function=log_function)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(get("/"))
            await reader.readuntil(b"data: 1\n\n")
            writer.close()
            await eventually(lambda: "finished" in story)
            if pipeline is not None:
                assert (one(pipeline).outcome, one(pipeline).status) == (Outcome.ABORTED, 200)

    run(serve(lambda handler: None, "without", None))
    with capturing() as capture:
        run(serve(capture.log_event, "with", capture.pipeline))
        assert one(capture.pipeline).response_body == b"data: 1\n\n"
        assert one(capture.pipeline).header("Content-Type") == ["text/event-stream"]
    assert notes["with"] == notes["without"] == ["closed", "flush raised", "finished"]


class Endless(web.RequestHandler):
    """Writes until nobody listens; learns it from the write and not from `on_connection_close`."""

    catches = False

    def on_connection_close(self) -> None:
        """Do nothing."""

    async def get(self) -> None:
        try:
            while True:
                self.write(b"more;" * 10_000)
                await self.flush()
        except iostream.StreamClosedError:
            if not self.catches:
                raise


class Catching(Endless):
    """Returns when nobody listens any more."""

    catches = True


@pytest.mark.parametrize("handler", [Endless, Catching])
def test_a_client_that_leaves_is_no_error_of_the_application(handler):
    """Whether the handler lets the failed write pass or catches it, and whoever hears of it first."""

    async def serve(capture: TornadoCapture) -> None:
        async with serving(web.Application([("/", handler)], log_function=capture.log_event)) as port:
            for _ in range(5):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(get("/"))
                await reader.readuntil(b"more;")
                writer.transport.abort()
            await eventually(lambda: len(capture.pipeline.seen) == 5)

    with capturing() as capture:
        run(serve(capture))
    assert {(seen.outcome, seen.status, seen.error_type) for seen in capture.pipeline.seen} == {
        (Outcome.ABORTED, 200, None)
    }
    assert all(seen.response_body.startswith(b"more;") for seen in capture.pipeline.seen)


@pytest.mark.parametrize("begun", [False, True])
def test_a_closed_stream_is_noticed_before_its_callback_runs(begun):
    """A failed write closes the stream; a handler that finishes in the same turn of the loop did not answer anybody."""

    class Unaware(web.RequestHandler):
        def get(self) -> None:
            if begun:
                self.write("begun")
                self.flush()
            self.request.connection.stream.close()
            self.write("to nobody")

    async def serve(capture: TornadoCapture) -> None:
        async with serving(web.Application([("/", Unaware)], log_function=capture.log_event)) as port:
            await talk(port, get("/"))
            await eventually(lambda: capture.pipeline.seen)

    with capturing() as capture:
        run(serve(capture))
    seen = one(capture.pipeline)
    told = (200, b"begun") if begun else (None, b"")
    assert (seen.outcome, (seen.status, seen.response_body)) == (Outcome.ABORTED, told)


def test_a_client_that_leaves_before_any_answer_is_recorded_without_one():
    """No status is made up for an answer that was never sent."""

    class Waiting(web.RequestHandler):
        async def get(self) -> None:
            started.set()
            await asyncio.Event().wait()

    async def serve(capture: TornadoCapture) -> None:
        async with serving(web.Application([("/", Waiting)], log_function=capture.log_event)) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(get("/"))
            await started.wait()
            writer.close()
            await eventually(lambda: capture.pipeline.seen)

    started = asyncio.Event()
    with capturing() as capture:
        run(serve(capture))
    seen = one(capture.pipeline)
    assert (seen.status, seen.response_headers, seen.outcome) == (None, [], Outcome.ABORTED)


def test_a_client_that_leaves_during_an_upload_is_recorded():
    """The part that came is kept; the handler's method is not called."""

    @web.stream_request_body
    class Upload(web.RequestHandler):
        def data_received(self, chunk: bytes) -> None:
            got.set()

        def post(self) -> None:
            raise AssertionError

    async def serve(capture: TornadoCapture) -> None:
        async with serving(web.Application([("/", Upload)], log_function=capture.log_event)) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nhalf")
            await got.wait()
            writer.close()
            await eventually(lambda: capture.pipeline.seen)

    got = asyncio.Event()
    with capturing() as capture:
        run(serve(capture))
    seen = one(capture.pipeline)
    assert (seen.outcome, seen.request_body, seen.status) == (Outcome.ABORTED, b"half", None)


def test_an_upload_that_its_handler_refuses_by_raising_is_recorded():
    """Tornado closes the connection and tells the handler alone, whose own `on_connection_close` ends nothing."""

    @web.stream_request_body
    class Upload(web.RequestHandler):
        def prepare(self) -> None:
            begun.set()

        def data_received(self, chunk: bytes) -> None:
            raise LookupError

        def on_connection_close(self) -> None:
            told.append(self)

    async def serve(capture: TornadoCapture) -> None:
        async with serving(web.Application([("/", Upload)], log_function=capture.log_event)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\n")
            await begun.wait()
            writer.write(b"half")
            assert await reader.read() == b""
            writer.close()
            await eventually(lambda: capture.pipeline.seen)

    begun = asyncio.Event()
    told: list[Any] = []
    with capturing() as capture:
        run(serve(capture))
    assert len(told) == 1
    seen = one(capture.pipeline)
    assert (seen.outcome, seen.request_body, seen.status) == (Outcome.ABORTED, b"half", None)


def test_an_answer_that_is_shorter_than_it_says_is_recorded_with_its_status():
    """Tornado sends the headers, then finds that there is less and closes the connection."""

    class Short(web.RequestHandler):
        def get(self) -> None:
            self.set_header("Content-Length", "5")

    pipeline, answers = compare([("/short", Short)], get("/short"))
    assert answers[0].startswith(b"HTTP/1.1 200 OK\r\n")
    seen = one(pipeline)
    assert (seen.outcome, seen.status, seen.header("Content-Length")) == (Outcome.ABORTED, 200, ["5"])


def test_a_websocket_is_recorded_at_its_handshake_and_works_on():
    """The event is there while the connection is open; messages pass as before."""

    class Echo(websocket.WebSocketHandler):
        def on_message(self, message: str) -> None:
            self.write_message("echo " + message)

    async def serve(log_function: Any, pipeline: Recorder | None) -> list[Any]:
        async with serving(web.Application([("/ws", Echo)], log_function=log_function)) as port:
            connection = await websocket.websocket_connect(f"ws://127.0.0.1:{port}/ws")
            if pipeline is not None:
                assert (one(pipeline).status, one(pipeline).outcome) == (101, Outcome.UPGRADED)
            answers = []
            for text in ("a", "b"):
                await connection.write_message(text)
                answers.append(await connection.read_message())
            connection.close()
            answers.append(await connection.read_message())
            return answers

    plain = run(serve(lambda handler: None, None))
    with capturing() as capture:
        assert run(serve(capture.log_event, capture.pipeline)) == plain == ["echo a", "echo b", None]
        assert one(capture.pipeline).header("Upgrade") == ["websocket"]
    pipeline, _ = compare([("/ws", Echo)], get("/ws"))
    assert one(pipeline).status == 400


def test_a_detached_connection_ends_the_call():
    """After `detach()` the handler owns the stream, for as long as it likes; the event does not wait."""

    async def serve(log_function: Any, pipeline: Recorder | None) -> bytes:
        class Taking(web.RequestHandler):
            async def get(self) -> None:
                stream = self.detach()
                await stream.write(b"my own protocol")
                if pipeline is not None:
                    assert one(pipeline).outcome is Outcome.DETACHED
                stream.close()

        async with serving(web.Application([("/", Taking)], log_function=log_function)) as port:
            return await talk(port, get("/"))

    with capturing() as capture:
        assert run(serve(capture.log_event, capture.pipeline)) == run(serve(lambda handler: None, None)) == b"my own protocol"
    assert one(capture.pipeline).status is None


class Later(web.RequestHandler):
    """Answers after its method has returned."""

    def get(self) -> None:
        self._auto_finish = False
        asyncio.get_running_loop().call_later(0.01, self.answer)

    def answer(self) -> None:
        self.finish("later")


def test_a_handler_that_finishes_after_its_method_is_recorded_then():
    """`_auto_finish = False`: the return of the method is not the end."""
    pipeline, _ = compare([("/", Later)], get("/"))
    assert (one(pipeline).response_body, one(pipeline).outcome) == (b"later", Outcome.COMPLETE)


def test_a_handler_that_never_finishes_is_recorded_when_it_is_collected():
    """A forgotten client leaks nothing: garbage collection ends the call, without callbacks there and then."""

    class Forgetting(web.RequestHandler):
        def get(self) -> None:
            self._auto_finish = False
            self.request.connection.set_close_callback(None)

    async def serve(capture: TornadoCapture) -> None:
        async with serving(web.Application([("/", Forgetting)], log_function=capture.log_event)) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(get("/"))
            await eventually(lambda: capture.pipeline.opened_count)
            writer.close()
            await asyncio.sleep(0.05)

    with capturing() as capture:
        run(serve(capture))
        gc.collect()
        assert [exchange.outcome for exchange in capture.pipeline.late] == [Outcome.UNFINISHED]
        assert capture.pipeline.seen == []


def test_a_task_that_is_destroyed_is_not_ended_there():
    """Garbage collection may do it in the midst of anything: no callback runs there. The connection's end ends the call."""
    tasks = []

    class Waiting(web.RequestHandler):
        async def get(self) -> None:
            tasks.append(asyncio.current_task())
            await asyncio.Future()

    async def serve(capture: TornadoCapture) -> None:
        async with serving(web.Application([("/", Waiting)], log_function=capture.log_event)) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(get("/"))
            await eventually(lambda: tasks)
            tasks.pop().get_coro().close()
            assert capture.pipeline.seen == []
            writer.close()
            await eventually(lambda: capture.pipeline.seen)

    with capturing() as capture:
        run(serve(capture))
    assert one(capture.pipeline).outcome is Outcome.ABORTED


# Which applications.


def test_a_mounted_application_belongs_to_the_one_it_is_mounted_in():
    """A sub-application without a `log_function` is captured with its outer one, also when it finishes late."""

    def application(log_function: Any) -> web.Application:
        sub = web.Application([("/sub/orders", Orders), ("/sub/later", Later), ("/sub/ws", Broken)])
        return web.Application([("/sub/.*", sub), ("/orders", Orders)], log_function=log_function)

    pipeline, _ = compare(
        [], get("/sub/orders"), get("/sub/later"), get("/orders"), get("/sub/none"), application=application
    )
    assert [(seen.url.partition("8080")[2], seen.status) for seen in pipeline.seen] == [
        ("/sub/orders", 200),
        ("/sub/later", 200),
        ("/orders", 200),
        ("/sub/none", 404),
    ]


def test_a_mounted_application_with_a_tap_of_its_own_keeps_it():
    """Two application ids: each application's calls reach its own."""
    with capturing() as outer, capturing() as inner:
        sub = web.Application([("/sub", Orders)], log_function=inner.log_event)
        app = web.Application([("/sub", sub), ("/own", Orders)], log_function=outer.log_event)

        async def serve() -> None:
            async with serving(app) as port:
                await talk(port, get("/sub"))
                await talk(port, get("/own"))

        run(serve())
        assert one(inner.pipeline).url.endswith("/sub")
        assert one(outer.pipeline).url.endswith("/own")


def test_other_applications_are_not_captured():
    """An application that did not ask runs the code it ran before."""
    with capturing() as capture:

        async def serve() -> None:
            app = web.Application([("/", Orders)], log_function=lambda handler: None)
            async with serving(app) as port:
                assert b"200 OK" in await talk(port, get("/"))

        run(serve())
        assert (capture.pipeline.opened_count, capture.pipeline.seen) == (0, [])


@pytest.mark.parametrize("how", ["lambda", "partial", "log_request"])
def test_a_log_function_around_ours_is_found(how):
    """The first call of such an application is recorded without its response body, later ones whole."""
    with capturing() as capture:
        if how == "log_request":

            class Own(web.Application):
                def log_request(self, handler: web.RequestHandler) -> None:
                    capture.log_event(handler)

            app = Own([("/", Orders)])
        elif how == "partial":
            app = web.Application([("/", Orders)], log_function=functools.partial(capture.log_event))
        else:
            app = web.Application([("/", Orders)], log_function=lambda handler: capture.log_event(handler))

        async def serve() -> None:
            async with serving(app) as port:
                await talk(port, get("/"))
                await talk(port, get("/"))

        run(serve())
        first, second = capture.pipeline.seen
        assert (first.status, second.status) == (200, 200)
        assert json.loads(second.response_body) == {"orders": [1, 2, 3]}
        if how != "partial":
            assert (first.response_body, first.notes) == (None, {"capture": "response_body_not_seen"})
            assert len(first.header("Set-Cookie")) == 2


class ChangedAfterwards(web.RequestHandler):
    def get(self) -> None:
        self.redirect("/login")
        self.set_status(201)
        self.set_header("Location", "/never/sent")

    def post(self) -> None:
        self.write("begun")
        self.finish()
        self.clear()


@pytest.mark.parametrize("asked", [True, False], ids=["log_function", "everywhere"])
def test_what_a_handler_changes_after_its_answer_is_not_recorded(asked):
    """A redirect without a `return`: the client got the redirect, whatever the handler says next."""
    pipeline = recorder()
    capture = TornadoCapture(pipeline, everywhere=not asked)
    capture.start()
    try:

        async def serve() -> list[bytes]:
            log_function = capture.log_event if asked else lambda handler: None
            async with serving(web.Application([("/", ChangedAfterwards)], log_function=log_function)) as port:
                return [await talk(port, get("/")), await talk(port, get("/", method="POST"))]

        redirected, begun = run(serve())
    finally:
        capture.stop()
    assert redirected.startswith(b"HTTP/1.1 302 ")
    assert b"\r\nLocation: /login\r\n" in redirected
    assert begun.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nContent-Length: 5\r\n" in begun
    first, second = pipeline.seen
    assert (first.status, first.header("Location"), first.outcome) == (302, ["/login"], Outcome.COMPLETE)
    assert (second.status, second.header("Content-Length"), second.response_body) == (200, ["5"], b"begun")
    assert pipeline.guard.counts() == {}


def test_two_taps_can_share_an_application():
    """Two application ids for one application: each has every call, whole from the second on."""
    with capturing() as a, capturing(APPLICATION_ID="another") as b:

        def both(handler: web.RequestHandler) -> None:
            a.log_event(handler)
            b.log_event(handler)

        async def serve() -> None:
            async with serving(web.Application([("/", Orders)], log_function=both)) as port:
                await talk(port, get("/"))
                await talk(port, get("/"))

        run(serve())
        for capture in (a, b):
            assert [seen.status for seen in capture.pipeline.seen] == [200, 200]
            assert capture.pipeline.seen[1].response_body == b'{"orders": [1, 2, 3]}'


def test_a_connection_that_cannot_be_watched_leaves_the_request_as_it_is():
    """An error while the call is opened: counted, our hooks taken away; what its end shows is recorded all the same."""
    before = []

    class Looking(web.RequestHandler):
        def get(self) -> None:
            before.append({"detach", "data_received"} & set(vars(self)))
            self.write("served")

    async def serve(capture: TornadoCapture) -> None:
        async with serving(web.Application([("/", Looking)], log_function=capture.log_event)) as port:
            assert (await talk(port, get("/"))).endswith(b"served")

    pipeline = recorder()
    with capturing(pipeline) as capture, pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesif_otel._capture.tornado.call.close_callback_of", lambda connection: 1 / 0)
        run(serve(capture))
    assert before == [set()]
    assert pipeline.guard.counts() == {"capture of a Tornado request": 1}
    assert len(pipeline.superseded_exchanges) == 1
    assert (one(pipeline).status, one(pipeline).notes) == (200, {"capture": "response_body_not_seen"})
    assert pipeline.budget.held_bytes == 0


def test_log_event_never_fails():
    """Whatever it is given, it raises nothing."""
    with capturing() as capture:
        capture.log_event(object())
        assert sum(capture.pipeline.guard.counts().values()) == 1


def test_stopping_restores_tornado():
    """The last capture takes every wrapper away; a second one in between keeps them."""
    names = ((web.RequestHandler, "_execute"), (web.Application, "find_handler"), (wsgi.WSGIContainer, "environ"))
    before = [vars(owner)[name] for owner, name in names]
    with capturing(), capturing():
        assert all(vars(owner)[name] is not old for (owner, name), old in zip(names, before, strict=True))
    assert [vars(owner)[name] for owner, name in names] == before


def test_a_patch_put_on_after_ours_survives_our_end():
    """Then our layer stays below it and passes everything through, and a new start uses it again."""
    original = web.RequestHandler._execute
    calls = []
    with capturing() as capture:
        ours = web.RequestHandler._execute

        def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(self)
            return ours(self, *args, **kwargs)

        web.RequestHandler._execute = theirs
    try:

        async def serve(log_function: Any) -> None:
            async with serving(web.Application([("/", Orders)], log_function=log_function)) as port:
                assert b"200 OK" in await talk(port, get("/"))

        run(serve(capture.log_event))
        assert (len(calls), capture.pipeline.seen) == (1, [])
        with capturing() as again:
            run(serve(again.log_event))
            assert len(again.pipeline.seen) == 1
        assert web.RequestHandler._execute is theirs
    finally:
        web.RequestHandler._execute = ours
        with capturing():
            pass
    assert web.RequestHandler._execute is original


def test_requests_that_run_when_we_stop_are_recorded_to_their_end():
    """`stop()` in the middle of a response loses nothing of it."""
    with capturing() as capture:

        class Stopping(web.RequestHandler):
            async def get(self) -> None:
                self.write("one")
                await self.flush()
                capture.stop()
                self.write("two")

        async def serve() -> None:
            async with serving(web.Application([("/", Stopping)], log_function=capture.log_event)) as port:
                await talk(port, get("/"))
                await talk(port, get("/"))

        run(serve())
        assert one(capture.pipeline).response_body == b"onetwo"


# Fallbacks.


def wsgi_app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """Answer 202, and note on the way that no ended call is current."""
    start_response("202 Accepted", [("Content-Type", "text/plain"), ("Content-Length", "9")])
    assert current_exchange.get() is None or current_exchange.get().is_open
    return [b"from wsgi"]


def fallback(app: Any, **options: Any) -> list[Any]:
    """Give the handlers of a Tornado application around a WSGI one."""
    return [("/.*", web.FallbackHandler, {"fallback": wsgi.WSGIContainer(app, **options)})]


def test_a_wsgi_container_behind_a_fallback_is_one_event():
    """Status, headers and body are seen on the connection; the connection is clean afterwards."""
    pipeline, _ = compare(fallback(wsgi_app), get("/x", "Content-Type: text/plain", method="POST", body=b"in"))
    seen = one(pipeline)
    assert (seen.status, seen.response_body, seen.request_body) == (202, b"from wsgi", b"in")
    assert seen.header("Content-Type") == ["text/plain"]
    assert ("Content-Type", "text/plain") in seen.request_headers
    connection = seen.arguments[0].request.connection
    assert not {"write_headers", "write", "finish", "set_close_callback"} & set(vars(connection))


@pytest.mark.parametrize("threads", [False, True])
def test_a_wsgi_middleware_of_the_same_application_id_inside_takes_over(threads):
    """One event, not two: the one that sees the application."""
    options: dict[str, Any] = {}
    if threads:
        if not hasattr(wsgi, "dummy_executor"):
            pytest.skip("this Tornado's container has no executor")
        options["executor"] = ThreadPoolExecutor(1)
    outer, inner = recorder(), recorder()
    capture = WsgiCapture(inner)
    pipeline, _ = compare(
        fallback(lambda environ, start_response: capture.call(wsgi_app, environ, start_response), **options),
        get("/x"),
        pipeline=outer,
    )
    # The run without us has no Tornado capture; its WSGI capture records as ever.
    assert [seen.status for seen in inner.seen] == [202, 202]
    assert (pipeline.seen, len(pipeline.superseded_exchanges)) == ([], 1)


def test_a_wsgi_middleware_of_another_application_id_inside_stays_apart():
    """Two application ids: each gets its event."""
    outer, inner = recorder(), recorder(APPLICATION_ID="another")
    capture = WsgiCapture(inner)
    compare(
        fallback(lambda environ, start_response: capture.call(wsgi_app, environ, start_response)),
        get("/x"),
        pipeline=outer,
    )
    assert (one(outer).status, [seen.status for seen in inner.seen]) == (202, [202, 202])


@pytest.mark.parametrize("asks", [False, True])
def test_an_application_behind_a_fallback_is_one_event(asks):
    """Whether it asked itself or not; the callbacks get the handler that answered."""

    def application(log_function: Any) -> web.Application:
        inner = web.Application([("/orders", Orders)], log_function=log_function if asks else lambda handler: None)
        return web.Application([("/.*", web.FallbackHandler, {"fallback": inner})], log_function=log_function)

    pipeline, _ = compare([], get("/orders"), application=application)
    seen = one(pipeline)
    assert json.loads(seen.response_body) == {"orders": [1, 2, 3]}
    assert isinstance(seen.arguments[0], Orders)


def test_a_fallback_that_refuses_first_is_recorded():
    """A subclass of `FallbackHandler` that answers in `prepare` never reaches its fallback."""

    class Guarded(web.FallbackHandler):
        def prepare(self) -> None:
            raise web.HTTPError(403)

    pipeline, _ = compare([("/.*", Guarded, {"fallback": wsgi.WSGIContainer(wsgi_app)})], get("/"))
    assert one(pipeline).status == 403


# Identity and errors.


def test_a_hundred_coroutines_each_have_their_own_identity():
    """`identify` inside interleaved handlers reaches its own call only."""
    pipeline = recorder()

    async def serve(capture: TornadoCapture) -> None:
        everybody = asyncio.Event()
        inside = 0

        class Me(web.RequestHandler):
            async def get(self) -> None:
                nonlocal inside
                inside += 1
                if inside == 100:
                    everybody.set()
                await everybody.wait()
                await self.deeper()

            async def deeper(self) -> None:
                await asyncio.sleep(0)
                await asyncio.to_thread(identify, user_id=self.get_argument("user"))
                self.write("ok")

        async with serving(web.Application([("/", Me)], log_function=capture.log_event)) as port:
            client = SimpleAsyncHTTPClient(max_clients=100, force_instance=True)
            await asyncio.gather(*(client.fetch(f"http://127.0.0.1:{port}/?user={n}") for n in range(100)))
            client.close()

    with capturing(pipeline) as capture:
        run(serve(capture))
    assert sorted(int(seen.user_id) for seen in pipeline.seen) == list(range(100))
    assert all(seen.url.endswith(f"?user={seen.user_id}") for seen in pipeline.seen)


def test_a_pipeline_that_fails_does_not_reach_the_application():
    """An error of ours is counted; the client sees what it saw."""

    class Failing(Recorder):
        def opened(self, exchange: Exchange) -> None:
            raise RuntimeError

    pipeline = Failing(Settings.of({"APPLICATION_ID": "x"}))

    async def serve(capture: TornadoCapture) -> bytes:
        async with serving(web.Application([("/orders", Orders)], log_function=capture.log_event)) as port:
            return await talk(port, get("/orders"))

    with capturing(pipeline) as capture:
        assert b"200 OK" in run(serve(capture))
    assert sum(pipeline.guard.counts().values()) >= 1


def test_an_unknown_tornado_stops_capture_and_nothing_else(monkeypatch, caplog):
    """A private member that is gone: counted and logged once, no capture from then on, the application runs."""
    monkeypatch.setattr(
        "moesif_otel._capture.tornado.shape.getattr", lambda owner, name, *rest: _gone(owner, name, *rest), raising=False
    )

    async def serve(capture: TornadoCapture) -> list[bytes]:
        async with serving(web.Application([("/orders", Orders)], log_function=capture.log_event)) as port:
            return [await talk(port, get("/orders")) for _ in range(3)]

    with capturing() as capture:
        answers = run(serve(capture))
        assert not capture.active
    assert all(b'{"orders": [1, 2, 3]}' in raw for raw in answers)
    assert capture.pipeline.guard.counts() == {"capture of a Tornado request": 1}
    assert len([record for record in caplog.records if record.name.startswith("moesif_otel")]) == 1


def _gone(owner: Any, name: str, *rest: Any) -> Any:
    if name == "_close_callback":
        raise AttributeError(name)
    return getattr(owner, name, *rest)


def test_an_execute_of_another_form_is_left_alone(monkeypatch):
    """A Tornado whose `_execute` takes other arguments is not wrapped at all."""

    async def _execute(self: Any, something_else: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(web.RequestHandler, "_execute", _execute)
    with capturing() as capture:
        assert web.RequestHandler._execute is _execute
        assert not capture.active
    assert capture.pipeline.guard.counts() == {"capture of this Tornado version": 1}
