"""Capture of `aiohttp`: the caller gets what he gets without us, and the event has what was sent and read."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import inspect
import io

import aiohttp
import pytest
from aiohttp import web
from aiohttp.client_reqrep import ClientRequest
from aiohttp.streams import StreamReader
from opentelemetry.instrumentation.aiohttp_client import AioHttpClientInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from moesif_otel._capture import aiohttp as capture
from moesif_otel._capture.exchange import Exchange, Outcome, current_exchange
from moesif_otel._capture.outgoing import remove_route
from tests.capture.upstream import JSON, LINES, RecordingPipeline, add, capturing, until_asked

PLACES = [(aiohttp.ClientSession, "_request"), (ClientRequest, "send")]
ORIGINALS = [vars(owner)[name] for owner, name in PLACES]

# Sessions and responses are left to the garbage collector here, and Python says so, with us or without.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _clean():
    yield
    if AioHttpClientInstrumentor().is_instrumented_by_opentelemetry:
        AioHttpClientInstrumentor().uninstrument()
    assert [vars(owner)[name] for owner, name in PLACES] == ORIGINALS
    gc.collect()
    assert capture._watches == {}


@contextlib.contextmanager
def watching(*pipelines, **options):
    with capturing(*pipelines, clients=("aiohttp",), **options) as found:
        yield found


def outline(response):
    return (
        response.status,
        response.reason,
        [pair for pair in response.raw_headers if pair[0].lower() != b"date"],
        [(hop.status, hop.url.path) for hop in response.history],
        response.url.path,
        response.method,
        sorted(response.cookies),
        type(response).__name__,
        type(response.content).__name__,
        response.closed,
        response.content.total_bytes,
        response.content.at_eof(),
    )


async def get(session, url):
    async with session.get(url + "/json", params={"a": "1"}) as response:
        return await response.json(), outline(response)


async def connections(session, url):
    found = []
    for path in ("/gzip", "/chunked", "/json", "/empty", "/lines"):
        async with session.get(url + path) as response:
            found.append((await response.read(), outline(response)))
    return found


async def head(session, url):
    async with session.head(url + "/json") as response:
        return await response.read(), outline(response)


async def redirects(session, url):
    async with session.post(url + "/redirect/3", data=b"body") as response:
        return await response.text(), outline(response)


async def redirect_with_a_body(session, url):
    async with session.post(url + "/redirect-echo", data=io.BytesIO(b"from a file")) as response:
        return await response.read(), outline(response)


async def no_redirect(session, url):
    async with session.get(url + "/redirect/1", allow_redirects=False) as response:
        return await response.read(), outline(response)


async def too_many(session, url):
    return await session.get(url + "/redirect/30", max_redirects=3)


async def form(session, url):
    async with session.post(url + "/echo", data={"a": "1", "b": "ü"}) as response:
        return await response.read(), outline(response)


async def json_body(session, url):
    async with session.put(url + "/echo", json={"a": [1, 2]}) as response:
        return await response.json(content_type=None)


async def generator(session, url):
    async def pieces():
        yield b"one"
        await asyncio.sleep(0)
        yield b"two"

    async with session.post(url + "/echo", data=pieces()) as response:
        return await response.read(), outline(response)


async def failing_generator(session, url):
    async def pieces():
        yield b"one"
        raise ZeroDivisionError

    return await session.post(url + "/echo", data=pieces())


async def compressed_upload(session, url):
    async with session.post(url + "/status/200", data=b"x" * 5_000, compress="deflate") as response:
        return await response.read()


async def refused_upload(session, url):
    async with session.post(url + "/refuse-upload", data=b"x" * 10) as response:
        return response.status


async def lines(session, url):
    async with session.get(url + "/chunked") as response:
        return [line async for line in response.content], outline(response)


async def chunks(session, url):
    async with session.get(url + "/gzip-chunked") as response:
        return b"".join([piece async for piece in response.content.iter_chunked(64)]), outline(response)


async def http_chunks(session, url):
    async with session.get(url + "/chunked") as response:
        return b"".join([data async for data, _end in response.content.iter_chunks()]), outline(response)


async def exactly(session, url):
    async with session.get(url + "/lines") as response:
        return await response.content.readexactly(10), await response.content.readuntil(b"5"), await response.content.read()


async def exactly_too_much(session, url):
    async with session.get(url + "/lines") as response:
        return await response.content.readexactly(1_000_000)


async def part(session, url):
    async with session.get(url + "/big/1000000") as response:
        first = await response.content.readexactly(10)
    async with session.get(url + "/json") as again:
        return first, response.closed, await again.json()


async def nothing(session, url):
    async with session.get(url + "/lines"):
        pass
    async with session.get(url + "/json") as again:
        return await again.json()


async def read_after_the_end(session, url):
    async with session.get(url + "/big/1000000") as response:
        pass
    return await response.read()


async def cut(session, url):
    async with session.get(url + "/short") as response:
        return await response.read()


async def reset(session, url):
    async with session.get(url + "/reset") as response:
        return await response.read()


async def not_gzip(session, url):
    async with session.get(url + "/not-gzip") as response:
        return await response.read()


async def dropped(session, url):
    return await session.post(url + "/drop")


async def nobody_there(session, _url):
    return await session.get("http://127.0.0.1:1/", params={"a": "1"})


async def bad_url(session, _url):
    return await session.get("http://[/")


async def bad_scheme(session, _url):
    return await session.get("gopher://example/")


async def wrong_arguments(session, url):
    return await session._request("GET", url, nonsense=True)


async def raised_status(session, url):
    return await session.get(url + "/status/404", raise_for_status=True)


async def timeout(session, url):
    return await session.get(url + "/silent", timeout=aiohttp.ClientTimeout(total=0.5))


async def timeout_of_a_body(session, url):
    async with session.get(url + "/slow", timeout=aiohttp.ClientTimeout(total=1)) as response:
        return await response.read()


async def cancelled(session, url):
    task = asyncio.create_task(session._request("GET", url + "/silent"))
    await until_asked(url)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return task.cancelled()


async def cancelled_while_reading(session, url):
    has_head = asyncio.Event()

    async def read():
        async with session.get(url + "/slow") as response:
            has_head.set()
            await response.read()

    task = asyncio.create_task(read())
    await has_head.wait()
    await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return task.cancelled()


async def many(session, url):
    async def one(number):
        async with session.post(url + "/echo", data=str(number)) as response:
            return await response.text()

    return await asyncio.gather(*(one(number) for number in range(20)))


async def positional(session, url):
    response = await session._request("GET", url + "/json", params=None)
    result = await response.json(), outline(response)
    response.release()
    return result


async def traced(session, url):
    seen = []
    config = aiohttp.TraceConfig()

    async def note(_session, _context, params):
        seen.append(type(params).__name__)

    for signal in ("on_request_start", "on_request_chunk_sent", "on_request_headers_sent", "on_response_chunk_received", "on_request_end"):
        getattr(config, signal).append(note)
    async with aiohttp.ClientSession(trace_configs=[config]) as own:
        async with own.post(url + "/echo", data=b"x") as response:
            await response.read()
        return seen, len(own.trace_configs)


SCENARIOS = [
    get, connections, head, redirects, redirect_with_a_body, no_redirect, too_many, form, json_body, generator,
    failing_generator, compressed_upload, refused_upload, lines, chunks, http_chunks, exactly, exactly_too_much, part, nothing,
    read_after_the_end, cut, reset, not_gzip, dropped, nobody_there, bad_url, bad_scheme, wrong_arguments,
    raised_status, timeout, timeout_of_a_body, cancelled, cancelled_while_reading, many, positional, traced,
]  # fmt: skip


def run(scenario, upstream):
    upstream.requests.clear()

    async def main():
        async with aiohttp.ClientSession() as session:
            try:
                return await scenario(session, upstream.url)
            except Exception as error:
                causes = [type(one) for one in (error.__cause__, error.__context__)]
                return type(error), str(error).replace(upstream.url, ""), causes

    result = asyncio.run(main())
    if scenario is timeout:
        upstream.wait_for_requests()
    sent = [(r["method"], r["path"], r["headers"], r["body"], r["connection"]) for r in upstream.requests]
    # Whether a connection is used again that was released unread is a race between the server and `release()`.
    released = scenario.__name__ in {"redirects", "redirect_with_a_body", "no_redirect", "nothing", "traced", "too_many"}
    order = [None] if released else list(dict.fromkeys(connection for *_, connection in sent))
    sent = [(*rest, None if released else connection) for *rest, connection in sent]
    sent = [(*rest, order.index(connection)) for *rest, connection in sent]
    return result, sorted(sent, key=str) if scenario is many else sent


NO_CALLS = {wrong_arguments}


@pytest.mark.parametrize("instrumented", [None, "before", "after"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_the_caller_gets_the_same(upstream, scenario, instrumented):
    """Bytes, exceptions with their causes, connections and what goes over the wire, with and without OpenTelemetry."""
    if instrumented is None:
        without = run(scenario, upstream)
        with watching() as pipeline:
            with_us = run(scenario, upstream)
    else:
        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))

        def names_of_headers(found):
            result, sent = found
            return result, [(method, path, [name for name, _ in headers], *more) for method, path, headers, *more in sent]

        def spans():
            found = sorted(str((s.name, s.kind, s.parent, s.status.status_code, dict(s.attributes))) for s in exporter.get_finished_spans())
            exporter.clear()
            return found

        AioHttpClientInstrumentor().instrument(tracer_provider=provider)
        without = names_of_headers(run(scenario, upstream)), spans()
        if instrumented == "after":
            AioHttpClientInstrumentor().uninstrument()
        with watching() as pipeline:
            if instrumented == "after":
                AioHttpClientInstrumentor().instrument(tracer_provider=provider)
            with_us = names_of_headers(run(scenario, upstream)), spans()
            AioHttpClientInstrumentor().uninstrument()
    if scenario is many:
        with_us, without = str(with_us), str(without)
        with_us = without if sorted(with_us) == sorted(without) else with_us
    assert with_us == without
    gc.collect()
    pipeline.run_late()
    assert pipeline.exchanges or scenario in NO_CALLS
    assert not [exchange for exchange in pipeline.open if exchange.is_open]


# What is captured.


def call(upstream, path, read=lambda response: response.read(), method="GET", **arguments):
    async def main():
        async with aiohttp.ClientSession() as session, session.request(method, upstream.url + path, **arguments) as response:
            return await read(response)

    return asyncio.run(main())


def test_a_call_is_captured(upstream):
    """Request and response as they went over the wire, the body decoded as the caller got it."""
    with watching() as pipeline:
        call(upstream, "/json?a=1", method="POST", json={"k": 1}, headers={"X-Own": "y"}, params={"b": "2"})
        call(upstream, "/gzip")
    exchange, packed = pipeline.exchanges
    assert (exchange.method, exchange.url, exchange.status) == ("POST", upstream.url + "/json?a=1&b=2", 200)
    assert {("X-Own", "y"), ("Content-Type", "application/json")} <= set(exchange.request_headers)
    assert [value for name, value in exchange.response_headers if name == "Set-Cookie"] == ["a=1", "b=2"]
    assert (exchange.request_body.data(), exchange.response_body.data()) == (b'{"k": 1}', JSON)
    assert (packed.response_body.data(), packed.response_body.decoded) == (LINES, True)
    ((request, response), _) = pipeline.seen_by_callbacks
    assert (request.method, str(request.url)) == ("POST", exchange.url)
    assert (type(response), response.status) == (aiohttp.ClientResponse, 200)


@pytest.mark.parametrize("path", ["/lines", "/gzip", "/chunked", "/gzip-chunked", "/until-close"])
def test_a_body_larger_than_the_readers_buffer(upstream, path):
    """Taking a piece has the connection read on, up to the end of the body: the piece belongs to it all the same."""

    async def read_exactly(response):
        return await response.content.readexactly(1) + await response.read()

    with watching() as pipeline:
        for read in (lambda response: response.read(), read_exactly):
            assert call(upstream, path, read, read_bufsize=64) == LINES
    for exchange in pipeline.exchanges:
        body = exchange.response_body
        assert (exchange.outcome, body.data(), body.total_bytes) == (Outcome.COMPLETE, LINES, len(LINES))


def test_what_is_put_back_into_the_stream_is_no_new_part_of_the_body(upstream):
    """A multipart reader puts back what it has read beyond a boundary, and reads it again."""

    async def read(response):
        for _ in range(3):
            piece = await response.content.read(100)
            response.content.unread_data(piece[40:])
        return await response.read()

    with watching() as pipeline:
        assert call(upstream, "/lines", read) == LINES[120:]
    body = pipeline.only.response_body
    assert (body.data(), body.total_bytes) == (LINES, len(LINES))


@pytest.mark.parametrize("path", ["/silent", "/slow"])
def test_a_task_that_is_destroyed(upstream, path):
    """Its end may come in the midst of anything: it runs no callback there, and leaves the context there alone."""

    async def main():
        async with aiohttp.ClientSession() as session:

            async def use():
                async with session.get(upstream.url + path) as response:
                    has_head.set()
                    await response.read()

            has_head = asyncio.Event()
            context = contextvars.copy_context()
            context.run(current_exchange.set, Exchange(pipeline, "Incoming", "GET"))
            task = context.run(asyncio.create_task, use())
            await (until_asked(upstream.url) if path == "/silent" else has_head.wait())
            await asyncio.sleep(0)
            served = Exchange(pipeline, "Incoming", "POST")
            token = current_exchange.set(served)
            task.get_coro().close()
            assert current_exchange.get() is served
            current_exchange.reset(token)
            assert pipeline.exchanges == pipeline.seen_by_callbacks == []
            assert [(exchange.outcome, exchange.error_type) for exchange in pipeline.late] == [(Outcome.FAILED, "GeneratorExit")]
            with contextlib.suppress(BaseException):
                task.cancel()
                await task

    with watching() as pipeline:
        asyncio.run(main())


def test_redirects_are_inside_of_a_call(upstream):
    """One event, with the last hop's request and response; a body that is sent again is not counted twice."""
    with watching() as pipeline:
        call(upstream, "/redirect/2", method="POST", data=b"body")
        call(upstream, "/redirect-echo", method="POST", data=io.BytesIO(b"again"))
    moved, echoed = pipeline.exchanges
    assert (moved.method, moved.url, moved.notes) == ("GET", upstream.url + "/json", {"redirects": 2})
    assert moved.request_body.data() == b""
    assert (echoed.request_body.data(), echoed.request_body.total_bytes, echoed.response_body.data()) == (b"again", 5, b"again")


def test_a_failed_call(upstream):
    """No response for the callbacks; method, URL, headers and the cause are known all the same."""
    with watching() as pipeline:
        with pytest.raises(aiohttp.ClientConnectorError):
            asyncio.run(failing())
        with pytest.raises(aiohttp.ClientResponseError):
            call(upstream, "/status/418", raise_for_status=True)
    refused, teapot = pipeline.exchanges
    assert (refused.method, refused.url, refused.status) == ("GET", "http://127.0.0.1:1/x?a=1", None)
    assert (refused.error_type, refused.notes["error_cause"]) == ("ClientConnectorError", "ConnectionRefusedError")
    assert ("X-Of-The-Session", "1") in refused.request_headers
    assert (teapot.status, teapot.outcome) == (418, Outcome.FAILED)
    (request, response), _ = pipeline.seen_by_callbacks
    assert (request.method, response) == ("GET", None)


async def failing():
    async with aiohttp.ClientSession(headers={"X-Of-The-Session": "1"}) as session:
        await session.get("http://127.0.0.1:1/x", params={"a": "1"})


@pytest.mark.parametrize(
    ("path", "scenario", "outcome", "error"),
    [
        ("/lines", lines, Outcome.COMPLETE, None),
        ("/big", part, Outcome.ABORTED, None),
        ("/short", cut, Outcome.FAILED, "ClientPayloadError"),
        ("/slow", timeout_of_a_body, Outcome.FAILED, "TimeoutError"),
        ("/slow", cancelled_while_reading, Outcome.FAILED, "CancelledError"),
        ("/silent", cancelled, Outcome.FAILED, "CancelledError"),
    ],
)
def test_how_a_call_ends(upstream, path, scenario, outcome, error):
    """Complete, given up by the caller, or failed: with the error that he saw."""
    with watching() as pipeline:
        run(scenario, upstream)
    exchange = pipeline.exchanges[0]
    assert (exchange.outcome, exchange.error_type) == (outcome, error)


def test_a_response_that_is_forgotten(upstream):
    """Garbage collection ends the call; nothing of ours keeps the response."""
    with watching() as pipeline:

        async def main():
            async with aiohttp.ClientSession() as session:
                response = await session.get(upstream.url + "/slow")
                await response.content.readany()
                del response  # which aiohttp itself keeps, as long as its connection lives

        asyncio.run(main())
        gc.collect()
        pipeline.run_late()
    assert pipeline.only.response_body.data() == b"data: 1\n\n"
    assert pipeline.only.outcome in {Outcome.DROPPED, Outcome.FAILED}


def test_a_websocket_is_one_call():
    """It ends at the 101; messages pass untouched."""

    async def main():
        async def echo(request):
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            async for message in socket:
                await socket.send_str(message.data + "!")
            return socket

        app = web.Application()
        app.router.add_get("/", echo)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        try:
            async with aiohttp.ClientSession() as session, session.ws_connect(f"http://127.0.0.1:{port}/") as socket:
                await socket.send_str("hello")
                return (await socket.receive()).data
        finally:
            await runner.cleanup()

    with watching() as pipeline:
        assert asyncio.run(main()) == "hello!"
    assert (pipeline.only.status, pipeline.only.outcome) == (101, Outcome.UPGRADED)


def test_a_middleware_that_calls_meanwhile(upstream):
    """The token that it fetches is a call of its own; a request that it sends twice is one call, with one body."""
    if not hasattr(aiohttp, "ClientMiddlewareType"):
        pytest.skip("before aiohttp 3.12")

    async def main():
        async with aiohttp.ClientSession() as other:

            async def sign_in(request, handler):
                async with other.get(upstream.url + "/json") as token:
                    await token.read()
                first = await handler(request)
                first.release()
                return await handler(request)

            async with aiohttp.ClientSession(middlewares=(sign_in,)) as session, session.post(upstream.url + "/echo", data=b"body") as response:
                return await response.read()

    with watching() as pipeline:
        assert asyncio.run(main()) == b"body"
    assert [(e.method, e.request_body.data(), e.response_body.data()) for e in pipeline.exchanges] == [
        ("GET", b"", JSON),
        ("POST", b"body", b"body"),
    ]


@pytest.mark.parametrize("instrumented", [False, True])
def test_a_named_provider_gets_one_span(upstream, instrumented):
    """A CLIENT span of ours where nobody makes one; none beside an instrumentor's."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    if instrumented:
        AioHttpClientInstrumentor().instrument(tracer_provider=provider)
    route = add(RecordingPipeline(), clients=("aiohttp",), tracer_provider=provider)
    try:
        call(upstream, "/json")
    finally:
        remove_route(route)
    (span,) = exporter.get_finished_spans()
    assert span.name == "GET"


def test_calls_to_moesif_pass(upstream):
    """Our own traffic is nobody's API call."""
    with watching(BASE_URI=upstream.url + "/json") as pipeline:
        call(upstream, "/json")
        call(upstream, "/lines", headers={"X-Moesif-Application-Id": "id"})
    assert pipeline.exchanges == []


# The canary.


def test_the_places_that_we_stand_at():
    """A release of aiohttp that moves one of them fails here, by name."""
    assert list(inspect.signature(aiohttp.ClientSession._request).parameters)[:3] == ["self", "method", "str_or_url"]
    assert callable(aiohttp.ClientSession._build_url)
    assert list(inspect.signature(ClientRequest.send).parameters) == ["self", "conn"]
    assert "self._traces" in inspect.getsource(ClientRequest.send)
    assert list(inspect.signature(StreamReader._read_nowait_chunk).parameters) == ["self", "n"]
    reading = [name for name in vars(StreamReader) if name.startswith("read")]
    assert sorted(reading) == ["read", "read_nowait", "readany", "readchunk", "readexactly", "readline", "readuntil"]
    for name in ("_read_nowait", "readuntil", "readchunk"):
        assert "_read_nowait_chunk(" in inspect.getsource(getattr(StreamReader, name))
    assert list(inspect.signature(StreamReader._wait).parameters) == ["self", "func_name"]
    assert "set_exception(content" in inspect.getsource(aiohttp.ClientResponse._notify_content)
    assert "Connection closed" in inspect.getsource(inspect.getmodule(aiohttp.ClientResponse))
    assert capture._TeedReader.__slots__ == ()
