"""Capture of `httpx`: the caller gets what he gets without us, and the event has what went over the wire."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import gc
import gzip
import io
import pickle
import threading
import time
import warnings

import httpx
import pytest
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from moesif_otel._capture.exchange import Exchange, Outcome, current_exchange
from moesif_otel._capture.httpx import PATCHES
from moesif_otel._capture.outgoing import remove_route
from tests.capture.upstream import JSON, LINES, RecordingPipeline, add, capturing, until_asked

PLACES = [(client, name) for client in (httpx.Client, httpx.AsyncClient) for name in ("send", "_send_single_request")]
ORIGINALS = [vars(client)[name] for client, name in PLACES]


@pytest.fixture(autouse=True)
def _clean():
    yield
    if HTTPXClientInstrumentor().is_instrumented_by_opentelemetry:
        HTTPXClientInstrumentor().uninstrument()
    assert [vars(client)[name] for client, name in PLACES] == ORIGINALS


@contextlib.contextmanager
def watching(*pipelines, **options):
    with capturing(*pipelines, clients=("httpx",), **options) as found:
        yield found


def outline(response):
    return (
        response.status_code,
        [pair for pair in response.headers.raw if pair[0].lower() != b"date"],
        [(hop.status_code, str(hop.url.path)) for hop in response.history],
        response.http_version,
        sorted(response.cookies.items()),
        response.is_closed,
        response.is_stream_consumed,
        response.num_bytes_downloaded,
        type(response.request.stream).__name__,
        type(response).__name__,
    )


# What callers do: each with a client of its own, so that the use of connections shows too.


def get(client, url):
    response = client.get(url + "/json")
    return outline(response), response.json(), response.elapsed.total_seconds() > 0


def twice_on_a_connection(client, url):
    return [outline(client.get(url + path)) for path in ("/gzip", "/chunked", "/json")]


def decoded(client, url):
    response = client.get(url + "/gzip-chunked")
    return outline(response), response.content, response.text


def redirects(client, url):
    response = client.post(url + "/redirect/2?status=307", content=b"body", follow_redirects=True)
    return outline(response), response.content


def no_redirect(client, url):
    response = client.get(url + "/redirect/1")
    return outline(response), response.next_request.url.path, response.content


def too_many(client, url):
    return client.get(url + "/redirect/30", follow_redirects=True)


def upload_file(client, url):
    return client.post(url + "/echo", content=io.BytesIO(b"from a file" * 1000)).content


def upload_generator(client, url):
    return outline(client.post(url + "/echo", content=(piece for piece in [b"one", b"two"])))


def upload_generator_to_a_redirect(client, url):
    return client.post(url + "/redirect-echo", content=(p for p in [b"one"]), follow_redirects=True)


def upload_failing(client, url):
    def pieces():
        yield b"one"
        raise ZeroDivisionError

    return client.post(url + "/echo", content=pieces())


def upload_form(client, url):
    response = client.post(url + "/echo", data={"a": "1"}, files={"f": ("n", io.BytesIO(b"x" * 100_000))}, headers={"content-type": "multipart/form-data; boundary=abc"})
    return response.content, outline(response)


def refused_upload(client, url):
    return outline(client.post(url + "/refuse-upload", content=b"x" * 10))


def head(client, url):
    return outline(client.head(url + "/json"))


def empty(client, url):
    return outline(client.get(url + "/empty"))


def dropped(client, url):
    return client.get(url + "/drop")


def cut(client, url):
    return client.get(url + "/short")


def bad_chunk(client, url):
    return client.get(url + "/bad-chunk")


def not_gzip(client, url):
    return client.get(url + "/not-gzip")


def nobody_there(client, _url):
    return client.get("http://127.0.0.1:1/")


def bad_scheme(client, _url):
    return client.get("gopher://example/")


def timeout(client, url):
    return client.get(url + "/silent", timeout=httpx.Timeout(30, read=0.05))


def raised_status(client, url):
    return client.get(url + "/status/500").raise_for_status()


def by_keyword(client, url):
    request = client.build_request("GET", url + "/json")
    return outline(client.send(request=request, stream=False, follow_redirects=True))


def auth_flow(client, url):
    class Again(httpx.Auth):
        requires_response_body = True

        def auth_flow(self, request):
            response = yield request
            request.headers["x-seen"] = str(len(response.content))
            yield request

    return outline(client.get(url + "/json", auth=Again()))


def hooks(client, url):
    seen = []
    client.event_hooks = {"request": [lambda r: seen.append(r.url.path)], "response": [lambda r: seen.append(r.read())]}
    return outline(client.get(url + "/json")), seen


def hook_that_raises(client, url):
    client.event_hooks = {"response": [lambda response: response.raise_for_status()]}
    return client.get(url + "/status/404")


def stream_bytes(client, url):
    with client.stream("GET", url + "/gzip") as response:
        pieces = b"".join(response.iter_bytes(7))
    return pieces, outline(response), outline(client.get(url + "/json"))


def stream_raw(client, url):
    with client.stream("GET", url + "/gzip") as response:
        return b"".join(response.iter_raw()), outline(response)


def stream_lines(client, url):
    with client.stream("GET", url + "/chunked") as response:
        return list(response.iter_lines()), outline(response)


def stream_read(client, url):
    with client.stream("GET", url + "/lines") as response:
        before = outline(response)
        return before, response.read(), outline(response)


def stream_part(client, url):
    with client.stream("GET", url + "/big/1000000") as response:
        first = next(response.iter_bytes(10))
    return first, response.is_closed, outline(client.get(url + "/json"))


def stream_twice(client, url):
    with client.stream("GET", url + "/lines") as response:
        list(response.iter_raw())
        return list(response.iter_raw())


def stream_nothing(client, url):
    with client.stream("GET", url + "/lines") as response:
        pass
    return outline(response), response.read()


def stream_cut(client, url):
    with client.stream("GET", url + "/reset") as response:
        return list(response.iter_bytes())


def pickled(client, url):
    response = pickle.loads(pickle.dumps(client.get(url + "/json")))
    return response.json(), response.status_code


def pickled_stream(client, url):
    with client.stream("GET", url + "/json") as response:
        again = pickle.loads(pickle.dumps(response))
        return again.status_code, again.is_stream_consumed


def async_body_in_a_sync_client(client, url):
    async def pieces():
        yield b"x"

    return client.post(url + "/echo", content=pieces())


SYNC = [
    get, twice_on_a_connection, decoded, redirects, no_redirect, too_many, upload_file, upload_generator,
    upload_generator_to_a_redirect, upload_failing, upload_form, refused_upload, head, empty, dropped, cut, bad_chunk,
    not_gzip, nobody_there, bad_scheme, timeout, raised_status, by_keyword, auth_flow, hooks, hook_that_raises, stream_bytes,
    stream_raw, stream_lines, stream_read, stream_part, stream_twice, stream_nothing, stream_cut, pickled, pickled_stream,
    async_body_in_a_sync_client,
]  # fmt: skip


def result_of(run):
    try:
        return run()
    except Exception as error:
        return type(error), str(error), [type(one) for one in (error.__cause__, error.__context__)]


def run_sync(scenario, upstream):
    upstream.requests.clear()
    with httpx.Client() as client:
        result = result_of(lambda: scenario(client, upstream.url))
    if scenario is timeout:
        upstream.wait_for_requests()
    connections = list(dict.fromkeys(r["connection"] for r in upstream.requests))
    return result, [
        (r["method"], r["path"], r["headers"], r["body"], connections.index(r["connection"])) for r in upstream.requests
    ]


@pytest.mark.parametrize("instrumented", [None, "before", "after"])
@pytest.mark.parametrize("scenario", SYNC, ids=lambda scenario: scenario.__name__)
def test_the_caller_gets_the_same(upstream, scenario, instrumented):
    """Bytes, exceptions with their causes, connections and what goes over the wire, with and without OpenTelemetry."""
    if instrumented is None:
        without = run_sync(scenario, upstream)
        with watching() as pipeline:
            with_us = run_sync(scenario, upstream)
        gc.collect()
    else:
        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))

        def spans():
            found = [(s.name, s.kind, s.parent, s.status.status_code, dict(s.attributes)) for s in exporter.get_finished_spans()]
            exporter.clear()
            return found

        def anonymous(run):
            result, sent = run
            return result, [(method, path, [name for name, _ in headers], *more) for method, path, headers, *more in sent]

        HTTPXClientInstrumentor().instrument(tracer_provider=provider)
        without = anonymous(run_sync(scenario, upstream)), spans()
        if instrumented == "after":
            HTTPXClientInstrumentor().uninstrument()
        with watching() as pipeline:
            if instrumented == "after":
                HTTPXClientInstrumentor().instrument(tracer_provider=provider)
            with_us = anonymous(run_sync(scenario, upstream)), spans()
            HTTPXClientInstrumentor().uninstrument()
    assert with_us == without
    if scenario not in {bad_scheme, async_body_in_a_sync_client}:
        assert pipeline.exchanges


# The same for coroutines.


async def a_get(client, url):
    response = await client.get(url + "/json")
    return outline(response), response.json()


async def a_decoded(client, url):
    response = await client.get(url + "/gzip-chunked")
    return outline(response), response.text


async def a_redirects(client, url):
    response = await client.post(url + "/redirect/2?status=307", content=b"body", follow_redirects=True)
    return outline(response), response.content


async def a_upload_generator(client, url):
    async def pieces():
        yield b"one"
        await asyncio.sleep(0)
        yield b"two"

    return outline(await client.post(url + "/echo", content=pieces()))


async def a_upload_failing(client, url):
    closed = []

    async def pieces():
        try:
            yield b"one"
            raise ZeroDivisionError
        finally:
            closed.append(True)

    with contextlib.suppress(ZeroDivisionError):
        await client.post(url + "/echo", content=pieces())
    return closed


async def a_upload_form(client, url):
    response = await client.post(url + "/echo", files={"f": ("n", io.BytesIO(b"x"))}, headers={"content-type": "multipart/form-data; boundary=abc"})
    return response.content, outline(response)


async def a_stream_lines(client, url):
    async with client.stream("GET", url + "/chunked") as response:
        return [line async for line in response.aiter_lines()], outline(response)


async def a_stream_part(client, url):
    async with client.stream("GET", url + "/big/1000000") as response:
        async for first in response.aiter_bytes(10):
            break
    return first, response.is_closed, outline(await client.get(url + "/json"))


async def a_stream_cut(client, url):
    async with client.stream("GET", url + "/reset") as response:
        return [piece async for piece in response.aiter_bytes()]


async def a_nobody_there(client, _url):
    return await client.get("http://127.0.0.1:1/")


async def a_timeout(client, url):
    return await client.get(url + "/silent", timeout=httpx.Timeout(30, read=0.05))


async def a_cancelled(client, url):
    task = asyncio.create_task(client.get(url + "/silent"))
    await until_asked(url)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return "cancelled", outline(await client.get(url + "/json"))


async def a_cancelled_while_reading(client, url):
    got = []

    async def read():
        async with client.stream("GET", url + "/slow") as response:
            async for piece in response.aiter_bytes():
                got.append(piece)

    task = asyncio.create_task(read())
    while not got:  # noqa: ASYNC110 - what is waited for is a part of what is tried
        await asyncio.sleep(0.01)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return got, outline(await client.get(url + "/json"))


async def a_sync_body_in_an_async_client(client, url):
    return await client.post(url + "/echo", content=iter([b"x"]))


async def a_many_at_once(client, url):
    answers = await asyncio.gather(*(client.get(f"{url}/status/{n}") for n in range(200, 204)))
    return [answer.status_code for answer in answers]


ASYNC = [
    a_get, a_decoded, a_redirects, a_upload_generator, a_upload_failing, a_upload_form, a_stream_lines, a_stream_part,
    a_stream_cut, a_nobody_there, a_timeout, a_cancelled, a_cancelled_while_reading, a_sync_body_in_an_async_client,
    a_many_at_once,
]  # fmt: skip


def run_async(scenario, upstream):
    upstream.requests.clear()

    async def main():
        async with httpx.AsyncClient() as client:
            try:
                return await scenario(client, upstream.url)
            except Exception as error:
                return type(error), str(error), [type(one) for one in (error.__cause__, error.__context__)]

    result = asyncio.run(main())
    if scenario is a_timeout:
        upstream.wait_for_requests()
    return result, sorted((r["method"], r["path"], r["headers"], r["body"]) for r in upstream.requests)


@pytest.mark.parametrize("scenario", ASYNC, ids=lambda scenario: scenario.__name__)
def test_the_caller_of_an_async_client_gets_the_same(upstream, scenario):
    """Also when a task is cancelled in the middle of a call, or of a body."""
    without = run_async(scenario, upstream)
    with watching() as pipeline:
        with_us = run_async(scenario, upstream)
    assert with_us == without
    if scenario is not a_sync_body_in_an_async_client:
        assert pipeline.exchanges


# What is captured.


def test_a_call_is_captured(upstream):
    """Request and response as they went over the wire; the callbacks get httpx's own objects, with the content."""
    with watching() as pipeline:
        response = httpx.post(upstream.url.replace("//", "//user:secret@") + "/json?a=1", json={"k": 1}, headers={"X-Own": "y"})
    exchange = pipeline.only
    assert (exchange.method, exchange.url, exchange.status) == ("POST", upstream.url + "/json?a=1", 200)
    assert ("X-Own", "y") in exchange.request_headers
    assert [value for name, value in exchange.response_headers if name == "Set-Cookie"] == ["a=1", "b=2"]
    assert (exchange.request_body.data(), exchange.response_body.data()) == (b'{"k":1}', JSON)
    ((request, seen),) = pipeline.seen_by_callbacks
    assert (request, seen) == (response.request, response)
    assert exchange.outcome is Outcome.COMPLETE


@pytest.mark.parametrize("is_async", [False, True])
def test_callbacks_of_a_call_that_is_no_stream_have_its_content(upstream, is_async):
    """As with `requests`: `response.json()` works, also in the hops of a redirect; nothing is read for them."""
    contents = []
    pipeline = RecordingPipeline()
    pipeline.while_callbacks_run = lambda _request, response: contents.append(response.content)
    with watching(pipeline):
        if is_async:

            async def main():
                async with httpx.AsyncClient(follow_redirects=True) as client:
                    await client.get(upstream.url + "/redirect/1")

            asyncio.run(main())
        else:
            httpx.get(upstream.url + "/redirect/1", follow_redirects=True)
    assert contents == [b"moved", JSON]


def test_callbacks_of_a_stream_cannot_spend_it(upstream):
    """`response.read()` in a callback raises, there; the caller reads on."""
    pipeline = RecordingPipeline()
    pipeline.while_callbacks_run = lambda _request, response: response.read()
    route = add(pipeline, clients=("httpx",))
    try:
        with httpx.stream("GET", upstream.url + "/lines") as response:
            assert b"".join(response.iter_bytes()) == LINES
    finally:
        remove_route(route)
    assert pipeline.guard.counts() == {"callback": 1}


def test_each_request_is_an_event(upstream):
    """Redirects and authentication are requests of their own, as they are spans of their own in OpenTelemetry."""
    with watching() as pipeline:
        httpx.post(upstream.url + "/redirect-echo", content=b"body", follow_redirects=True)
    assert [(e.status, e.request_body.data(), e.response_body.data()) for e in pipeline.exchanges] == [
        (307, b"body", b"moved"),
        (200, b"body", b"body"),
    ]


def test_bodies_are_the_wires(upstream):
    """Compressed as they came; cut at the limit, with their true size."""
    with watching(RESPONSE_MAX_BODY_SIZE=100, REQUEST_MAX_BODY_SIZE=3) as pipeline:
        httpx.get(upstream.url + "/gzip")
        httpx.post(upstream.url + "/echo", content=iter([b"one", b"two"]))
    packed = gzip.compress(LINES, mtime=0)
    compressed, upload = pipeline.exchanges
    assert (compressed.response_body.data(), compressed.response_body.decoded) == (packed[:100], False)
    assert compressed.response_body.total_bytes == len(packed)
    assert (upload.request_body.data(), upload.request_body.total_bytes) == (b"one", 6)


def test_a_failed_call(upstream):
    """No response for the callbacks; the error's type and its cause."""
    with watching() as pipeline:
        with pytest.raises(httpx.ConnectError):
            httpx.get("http://127.0.0.1:1/x")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(upstream.url + "/short")
    refused, cut_short = pipeline.exchanges
    assert (refused.outcome, refused.error_type, refused.status) == (Outcome.FAILED, "ConnectError", None)
    assert refused.notes["error_cause"] == "ConnectionRefusedError"
    assert pipeline.seen_by_callbacks[0][1] is None
    assert (cut_short.outcome, cut_short.error_type, cut_short.status) == (Outcome.FAILED, "RemoteProtocolError", 200)
    assert cut_short.response_body.data() == b"x" * 100


@pytest.mark.parametrize(
    ("path", "read", "outcome"),
    [
        ("/lines", 0, Outcome.ABORTED),
        ("/lines", 1, Outcome.COMPLETE),
        ("/big/1000000", 1, Outcome.ABORTED),
        ("/empty", 0, Outcome.COMPLETE),
    ],
)
def test_how_a_stream_ends(upstream, path, read, outcome):
    """Complete with the last byte that was announced; aborted where the caller wanted no more."""
    with watching() as pipeline, httpx.stream("GET", upstream.url + path) as response:
        iterator = response.iter_raw()
        for _ in range(read):
            next(iterator)
    assert pipeline.only.outcome is outcome


@pytest.mark.parametrize("callbacks", [True, False])
def test_a_response_that_is_forgotten(upstream, callbacks):
    """Garbage collection ends the call; nothing of ours keeps the response, with callbacks or without."""
    with watching() as pipeline, httpx.Client() as client:
        pipeline.has_callbacks = lambda exchange: callbacks
        response = client.send(client.build_request("GET", upstream.url + "/lines"), stream=True)
        request = response.request
        request.extensions["cycle"] = response  # what a hook's closure may do
        next(response.iter_raw(10))
        del response, request
        gc.collect()
        assert len(pipeline.late) == 1
        pipeline.run_late()
    assert (pipeline.only.outcome, pipeline.only.response_body.data()) == (Outcome.DROPPED, LINES)
    ((request, response),) = pipeline.seen_by_callbacks
    if callbacks:
        assert (request.method, response.status_code) == ("GET", 200)


@pytest.mark.parametrize("kind", ["content", "stream", "asgi"])
def test_transports_of_any_kind(kind):
    """Mock transports, applications and transports of the user's are captured as the network is."""

    class Stream(httpx.SyncByteStream):
        def __iter__(self):
            yield b"one"
            yield b"two"

    async def app(scope, receive, send):
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})

    with watching() as pipeline:
        if kind == "asgi":

            async def main():
                async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
                    return await client.post("http://app/x", content=b"one")

            response = asyncio.run(main())
        else:
            answer = {"content": b"onetwo"} if kind == "content" else {"stream": Stream()}
            with httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(201, **answer))) as client:
                response = client.post("http://app/x", content=b"one")
    assert response.content == b"onetwo"
    assert (pipeline.only.status, pipeline.only.response_body.data()) == (201, b"onetwo")
    assert pipeline.only.request_body.data() == b"one"


def test_a_transport_that_reads_the_request(upstream):
    """`request.read()` in a transport puts a stream of its own in place; it stays."""

    def answer(request):
        return httpx.Response(200, content=request.read())

    with watching() as pipeline, httpx.Client(transport=httpx.MockTransport(answer)) as client:
        response = client.post("http://app/x", content=iter([b"one", b"two"]))
    assert response.content == pipeline.only.request_body.data() == b"onetwo"
    assert type(response.request.stream) is httpx.ByteStream


def test_pieces_that_are_no_bytes():
    """A transport of the user's own making may yield anything: his error is his, and there is none of ours."""

    class Odd(httpx.SyncByteStream):
        def __iter__(self):
            yield None

    def run():
        with httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(200, stream=Odd()))) as client:
            with pytest.raises(TypeError) as error:
                client.get("http://app/")
            return str(error.value)

    without = run()
    with watching():
        assert run() == without


def test_a_task_that_outlives_the_call(upstream):
    """What a hook starts ends its own calls, also after the `send` in which it was started."""
    with watching() as pipeline:

        async def main():
            tasks = []

            async def later(client):
                await asyncio.sleep(0.05)
                async with client.stream("GET", upstream.url + "/lines") as response:
                    await response.aread()

            async with httpx.AsyncClient() as client:

                async def hook(response):
                    if not tasks:
                        tasks.append(asyncio.create_task(later(client)))

                client.event_hooks = {"response": [hook]}
                await client.get(upstream.url + "/json")
                await asyncio.gather(*tasks)

        asyncio.run(main())
    assert [e.response_body.data() for e in pipeline.exchanges] == [JSON, LINES]


def test_calls_of_callbacks_and_of_other_threads(upstream):
    """A callback's own calls are not captured; those of other threads are, each in its own call."""
    pipeline = RecordingPipeline()
    pipeline.while_callbacks_run = lambda *_: httpx.get(upstream.url + "/json")
    with watching(pipeline):
        threads = [threading.Thread(target=httpx.get, args=(upstream.url + "/lines",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [e.response_body.data() for e in pipeline.exchanges] == [LINES] * 8


def test_other_contexts(upstream):
    """A call that is made in a context of its own leaves nothing in another's."""
    with watching() as pipeline:
        context = contextvars.copy_context()
        context.run(httpx.get, upstream.url + "/json")
        assert not [var for var in context if var.name.startswith("moesif") and context[var] is not None]
    assert pipeline.only.status == 200


def test_uploads_can_be_copied(upstream):
    """A transport may copy what it is given."""
    copies = []

    class Copying(httpx.BaseTransport):
        def handle_request(self, request):
            copies.append(copy.copy(request.stream))
            return httpx.Response(200)

    with watching(), httpx.Client(transport=Copying()) as client:
        client.post("http://app/", content=[b"one"])
    assert type(copies[0]).__name__ == "IteratorByteStream"


def test_bodies_that_are_not_wanted(upstream):
    """`LOG_BODY_OUTGOING` false: neither body."""
    with watching(LOG_BODY_OUTGOING=False) as pipeline:
        httpx.post(upstream.url + "/echo", content=b"x")
    assert (pipeline.only.request_body, pipeline.only.response_body) == (None, None)


def test_calls_to_moesif_pass(upstream):
    """Our own traffic, by address or header, is nobody's API call."""
    with watching(BASE_URI=upstream.url + "/json") as pipeline:
        httpx.get(upstream.url + "/json/v1/events")
        httpx.get(upstream.url + "/lines", headers={"x-moesif-application-id": "id"})
    assert pipeline.exchanges == []


@pytest.mark.parametrize("hidden", [False, True])
def test_a_named_provider_gets_one_span(upstream, hidden):
    """A CLIENT span of ours where nobody makes one; none beside an instrumentor's, also where that stands elsewhere."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    if hidden:
        HTTPXClientInstrumentor().instrument(tracer_provider=provider)
    route = add(RecordingPipeline(), clients=("httpx",), tracer_provider=provider)
    try:
        httpx.get(upstream.url + "/json")
    finally:
        remove_route(route)
    (span,) = exporter.get_finished_spans()
    assert span.name == "GET"


def test_http_2(tmp_path_factory):
    """The same over HTTP/2, sync and async, many calls on one connection."""
    pytest.importorskip("h2")
    pytest.importorskip("hypercorn")
    with http2_server(tmp_path_factory.mktemp("tls")) as (url, authority):

        async def main():
            async with httpx.AsyncClient(http2=True, verify=authority) as client:
                answers = await asyncio.gather(*(client.post(url, content=b"x" * n) for n in range(5)))
                async with client.stream("POST", url, content=b"stream") as response:
                    await response.aread()
                return [(answer.http_version, answer.content) for answer in (*answers, response)]

        def sync():
            with httpx.Client(http2=True, verify=authority) as client:
                answer = client.post(url, content=iter([b"one", b"two"]))
                return answer.http_version, answer.content

        without = asyncio.run(main()), sync()
        with watching() as pipeline:
            assert (asyncio.run(main()), sync()) == without
    assert without[1] == ("HTTP/2", b"onetwo")
    assert sorted(e.response_body.data() for e in pipeline.exchanges) == sorted([b"x" * n for n in range(5)] + [b"stream", b"onetwo"])
    assert all(e.request_body.data() == e.response_body.data() for e in pipeline.exchanges)


@contextlib.contextmanager
def http2_server(directory):
    """Serve an echo by hypercorn, with TLS, in a thread."""
    import ssl

    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    from tests.capture.upstream import make_certificate

    authority, both = make_certificate(directory)

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    config = Config()
    config.bind, config.certfile, config.keyfile, config.loglevel = ["127.0.0.1:0"], str(both), str(both), "CRITICAL"
    sockets = config.create_sockets()
    port = sockets.secure_sockets[0].getsockname()[1]
    config.create_sockets = lambda: sockets
    ready, stop = threading.Event(), None

    def run():
        nonlocal stop

        async def main():
            nonlocal stop
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()
            server = asyncio.create_task(serve(app, config, shutdown_trigger=stop.wait))
            loop.call_soon(ready.set)
            holder.append(loop)
            await server

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            asyncio.run(main())

    holder = []
    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    context = ssl.create_default_context(cafile=str(authority))
    while True:  # until it listens
        try:
            httpx.get(f"https://127.0.0.1:{port}/", verify=context)
            break
        except httpx.ConnectError:
            time.sleep(0.02)
    try:
        yield f"https://127.0.0.1:{port}/", context
    finally:
        holder[0].call_soon_threadsafe(stop.set)
        thread.join()


# The canary.


def test_the_places_that_we_stand_at():
    """A release of httpx that moves one of them fails here, by name."""
    import inspect

    for client in (httpx.Client, httpx.AsyncClient):
        assert list(inspect.signature(client._send_single_request).parameters) == ["self", "request"]
        assert "stream" in inspect.signature(client.send).parameters
        assert "_send_single_request(request)" in inspect.getsource(client._send_handling_redirects)
    assert hasattr(httpx.Response(200, content=b"x"), "_content")
    assert not hasattr(httpx.Response(200, stream=httpx.ByteStream(b"x")), "_content")
    assert hasattr(httpx.Request("POST", "http://x/", content=b"x"), "_content")
    assert not hasattr(httpx.Request("POST", "http://x/", content=iter([])), "_content")


def test_layers_go_with_the_last_route():
    """`stop()` restores the very functions."""
    first, second = (add(RecordingPipeline(), clients=("httpx",)) for _ in range(2))
    remove_route(first)
    assert [vars(client)[name] for client, name in PLACES] != ORIGINALS
    remove_route(second)
    assert [vars(client)[name] for client, name in PLACES] == ORIGINALS
    assert len(PATCHES._patches) == 4


class _Forever:
    def __await__(self):
        yield


class _Hanging(httpx.AsyncBaseTransport, httpx.AsyncByteStream):
    """A transport whose answer, or whose body, never comes."""

    def __init__(self, where):
        self.where = where

    async def handle_async_request(self, request):
        if self.where == "answer":
            await _Forever()
        return httpx.Response(200, stream=self)

    async def __aiter__(self):
        if self.where == "body":
            await _Forever()
        yield b"one"

    async def aclose(self):
        if self.where == "close":
            await _Forever()


@pytest.mark.parametrize("is_copy", [False, True])
def test_a_call_that_comes_back_in_another_context(is_copy):
    """It takes away what it has put there, and nothing else."""
    with watching() as pipeline:
        around, served = Exchange(pipeline, "Incoming", "GET"), Exchange(pipeline, "Incoming", "POST")
        context, other = contextvars.Context(), contextvars.Context()
        context.run(current_exchange.set, around)
        other.run(current_exchange.set, served)
        coroutine = httpx.AsyncClient(transport=_Hanging("answer")).get("http://shop.example/")
        context.run(coroutine.send, None)
        other = context.copy() if is_copy else other
        with pytest.raises(StopIteration):
            other.run(coroutine.send, None)
        assert other[current_exchange] is (around if is_copy else served)
    assert pipeline.only.status == 200


@pytest.mark.parametrize("where", ["answer", "body", "close"])
def test_a_task_that_is_destroyed(where):
    """Its end may come in the midst of anything: it runs no callback there, and leaves the context there alone."""
    responses = []

    async def use(client):
        responses.append(await client.send(client.build_request("GET", "http://shop.example/"), stream=True))
        if where == "body":
            await responses[0].aread()
        await responses[0].aclose()

    with watching() as pipeline:
        client = httpx.AsyncClient(transport=_Hanging(where))
        context = contextvars.copy_context()
        context.run(current_exchange.set, Exchange(pipeline, "Incoming", "GET"))
        coroutine = use(client)
        context.run(coroutine.send, None)

        served = Exchange(pipeline, "Incoming", "POST")
        token = current_exchange.set(served)
        coroutine.close()
        assert current_exchange.get() is served
        current_exchange.reset(token)
        assert pipeline.exchanges == pipeline.seen_by_callbacks == []
        assert [exchange.outcome for exchange in pipeline.late] == [Outcome.FAILED]
        assert {exchange.error_type for exchange in pipeline.late} == {"GeneratorExit"}
