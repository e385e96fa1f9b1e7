"""The capture of ASGI calls: the server sees what it would see without us, and the Exchange what really passed."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
from typing import Any

import pytest

from moesif_otel import identify
from moesif_otel._capture import EXCHANGES_KEY
from moesif_otel._capture.asgi.capture import AsgiCapture
from moesif_otel._capture.asgi.scope import url_of
from moesif_otel._capture.exchange import Outcome, current_exchange
from tests.capture.asgi.driver import DISCONNECT, Connection, http_scope, request, websocket_scope
from tests.recording import RecordingPipeline

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain"), (b"X-Odd", b"\xff")]}
BODY = {"type": "http.response.body", "body": b"hello"}


async def hello(scope, receive, send):
    await receive()
    await send(dict(START))
    await send(dict(BODY))
    return "the server ignores it"


async def echo(scope, receive, send):
    await send({"type": "http.response.start", "status": 201, "headers": []})
    while True:
        message = await receive()
        await send({"type": "http.response.body", "body": message.get("body", b""), "more_body": message.get("more_body", False)})
        if not message.get("more_body"):
            return


async def fails_at_once(scope, receive, send):
    raise LookupError("secret")


async def fails_midway(scope, receive, send):
    await send(dict(START))
    await send({**BODY, "more_body": True})
    raise LookupError("secret")


async def returns_nothing(scope, receive, send):
    await receive()


async def stops_midway(scope, receive, send):
    await send(dict(START))
    await send({**BODY, "more_body": True})


async def trailers(scope, receive, send):
    await send({**START, "trailers": True})
    await send(dict(BODY))
    await send({"type": "http.response.trailers", "headers": [(b"a", b"1")], "more_trailers": True})
    await send({"type": "http.response.trailers", "headers": [(b"b", b"2")]})


async def every_extension(scope, receive, send):
    await send({"type": "http.response.debug", "info": {"template": "x"}})
    await send({"type": "http.response.early_hint", "links": [b"</a.css>"]})
    await send({"type": "http.response.push", "path": "/a.css", "headers": []})
    await send({"type": "http.response.unheard-of"})
    await send(dict(START))
    await send({"type": "http.response.zerocopysend", "file": 3, "more_body": True})
    await send({"type": "http.response.pathsend", "path": "/etc/hostname"})


async def no_headers(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body"})


async def one_shot_headers(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": iter([(b"a", b"b")])})
    await send(dict(BODY))


async def odd_messages(scope, receive, send):
    for message in ({}, {"type": 5}, {"type": "http.response.start", "status": "x", "headers": 7}, {"type": "http.response.body", "body": 5}):
        with contextlib.suppress(Exception):
            await send(message)


async def cancelled(scope, receive, send):
    await send(dict(START))
    raise asyncio.CancelledError


async def exits(scope, receive, send):
    raise SystemExit(3)


async def disconnects(scope, receive, send):
    await send(dict(START))
    while (await receive())["type"] != "http.disconnect":
        pass
    with contextlib.suppress(OSError):
        await send(dict(BODY))


async def two_responses(scope, receive, send):
    for _ in range(2):
        await send(dict(START))
        await send(dict(BODY))


APPS = {
    app.__name__: app
    for app in (
        hello, echo, fails_at_once, fails_midway, returns_nothing, stops_midway, trailers, every_extension, no_headers,
        one_shot_headers, odd_messages, cancelled, exits, disconnects, two_responses,
    )
}  # fmt: skip


def captured(pipeline: RecordingPipeline, app: Any, **options: Any) -> Any:
    capture = AsgiCapture(pipeline)

    async def serve(scope, receive, send):
        return await capture.serve(app, scope, receive, send, **options)

    return serve


def call(app: Any, *incoming: Any, scope: dict[str, Any] | None = None, **options: Any) -> Connection:
    return asyncio.run(Connection(*incoming, **options).serve(app, http_scope() if scope is None else scope))


@pytest.mark.parametrize("name", APPS)
@pytest.mark.parametrize(
    "incoming",
    [(), (request(b"one", more=True), request(b"two")), (request(b"one", more=True), DISCONNECT), (DISCONNECT,)],
    ids=["no body", "two pieces", "left midway", "left at once"],
)
@pytest.mark.parametrize("fails_at", [None, 0, 1, 2])
def test_a_server_sees_what_it_would_see_without_us(name: str, incoming: Any, fails_at: int | None) -> None:
    """Messages, their order and number, what was received, the result and the exception; one finish for one call."""
    incoming = (*incoming, DISCONNECT)
    options = {} if fails_at is None else {"fails_at": (fails_at, OSError("gone"))}
    pipeline = RecordingPipeline()
    plain = call(APPS[name], *incoming, **options)
    ours = call(captured(pipeline, APPS[name]), *incoming, **options)
    if name == "one_shot_headers":
        for one in (plain, ours):
            one.sent = [{**message, "headers": list(message.get("headers", ()))} for message in one.sent]
    assert ours.seen == plain.seen
    (exchange,) = pipeline.calls
    assert exchange.ended_ns >= exchange.started_ns
    assert pipeline.budget.held_bytes == exchange.kept_bytes


@pytest.mark.parametrize(
    ("name", "incoming", "outcome", "status", "body"),
    [
        ("hello", (), Outcome.COMPLETE, 200, b"hello"),
        ("echo", (request(b"one", more=True), request(b"two")), Outcome.COMPLETE, 201, b"onetwo"),
        ("fails_at_once", (), Outcome.FAILED, None, None),
        ("fails_midway", (), Outcome.FAILED, 200, b"hello"),
        ("returns_nothing", (), Outcome.FAILED, None, None),
        ("stops_midway", (), Outcome.FAILED, 200, b"hello"),
        ("trailers", (), Outcome.COMPLETE, 200, b"hello"),
        ("every_extension", (), Outcome.COMPLETE, 200, None),
        ("no_headers", (), Outcome.COMPLETE, 200, None),
        ("cancelled", (), Outcome.ABORTED, 200, None),
        ("exits", (), Outcome.FAILED, None, None),
        ("disconnects", (request(), DISCONNECT), Outcome.ABORTED, 200, None),
        ("two_responses", (), Outcome.COMPLETE, 200, b"hello"),
    ],
)
def test_a_call_is_recorded_as_it_was(name: str, incoming: Any, outcome: Outcome, status: int | None, body: bytes | None) -> None:
    """Status, body, outcome, and the exception by its type alone."""
    pipeline = RecordingPipeline()
    call(captured(pipeline, APPS[name]), *incoming)
    (exchange,) = pipeline.calls
    assert (exchange.outcome, exchange.status) == (outcome, status)
    assert (exchange.response_body.data() if exchange.response_body else None) == body
    assert exchange.error_type == {"fails_at_once": "LookupError", "fails_midway": "LookupError", "exits": "SystemExit"}.get(name)
    assert pipeline.guard.counts() == {}


def test_headers_are_recorded_as_they_were_sent() -> None:
    """Repeated ones too, and bytes beyond ASCII; names in the server's case."""
    pipeline = RecordingPipeline()
    call(captured(pipeline, hello), scope=http_scope(headers=[(b"Cookie", b"a=1"), (b"cookie", b"b=\xe9")]))
    (exchange,) = pipeline.calls
    assert exchange.request_headers == [("Cookie", "a=1"), ("cookie", "b=é")]
    assert exchange.response_headers == [("content-type", "text/plain"), ("X-Odd", "ÿ")]


def test_a_request_body_is_what_the_application_received() -> None:
    """An application that stops reading has not received the rest, and nobody reads it for the application."""
    pipeline = RecordingPipeline()
    connection = call(captured(pipeline, hello), request(b"one", more=True), request(b"two"))
    assert connection.received == 1
    assert pipeline.calls[0].request_body.data() == b"one"


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("status", [204, 304, 200])
def test_a_body_that_no_client_sees_is_not_recorded(method: str, status: int) -> None:
    """HEAD, 204 and 304 have none, whatever the application sends."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send(dict(BODY))

    pipeline = RecordingPipeline()
    call(captured(pipeline, app), scope=http_scope(method))
    assert (pipeline.calls[0].response_body is not None) == (method == "GET" and status == 200)


@pytest.mark.parametrize(("method", "status"), [("PUT", 204), ("PUT", 304), ("HEAD", 200)])
def test_a_request_body_read_after_an_answer_without_a_body_is_recorded(method: str, status: int) -> None:
    """The status says what the response has; an application may begin to answer before it has read everything."""

    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await receive()
        await send({"type": "http.response.body"})

    pipeline = RecordingPipeline()
    call(captured(pipeline, app), request(b"one", more=True), request(b"two"), scope=http_scope(method))
    (exchange,) = pipeline.calls
    assert exchange.request_body.data() == b"onetwo"
    assert exchange.request_body.total_bytes == 6


@pytest.mark.parametrize("piece", ["text", 5, ["a"], {"a": 1}])
def test_a_piece_that_is_no_bytes_is_noted_as_nothing(piece: Any) -> None:
    """Some servers take it (granian takes text); it is no error of ours, and the response is complete."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send({"type": "http.response.body", "body": piece})

    pipeline = RecordingPipeline()
    assert call(captured(pipeline, app)).seen == call(app).seen
    (exchange,) = pipeline.calls
    assert (exchange.response_body, exchange.outcome) == (None, Outcome.COMPLETE)
    assert pipeline.guard.counts() == {}


def test_without_log_body_no_body_is_kept() -> None:
    """LOG_BODY false: neither side's."""
    pipeline = RecordingPipeline(LOG_BODY=False)
    call(captured(pipeline, echo), request(b"one"))
    assert pipeline.calls[0].request_body is pipeline.calls[0].response_body is None


def test_a_stream_holds_no_more_than_its_limit() -> None:
    """A long upload and a long download: the true sizes are known, the rest is gone."""

    async def app(scope, receive, send):
        while (await receive())["more_body"]:
            pass
        await send(dict(START))
        for number in range(100):
            await send({**BODY, "body": bytes(10_000), "more_body": number < 99})

    pipeline = RecordingPipeline(REQUEST_MAX_BODY_SIZE=1000, RESPONSE_MAX_BODY_SIZE=2000)
    pieces = [request(bytes(10_000), more=number < 99) for number in range(100)]
    call(captured(pipeline, app), *pieces)
    exchange = pipeline.calls[0]
    assert (exchange.request_body.kept_bytes, exchange.request_body.total_bytes) == (1000, 1_000_000)
    assert (exchange.response_body.kept_bytes, exchange.response_body.total_bytes) == (2000, 1_000_000)


def test_background_work_is_not_waited_for() -> None:
    """The call is over with its last message; what comes after keeps only an empty shell of it."""
    pipeline = RecordingPipeline()
    finished: list[int] = []

    async def app(scope, receive, send):
        await hello(scope, receive, send)
        finished.append(len(pipeline.calls))
        identify(user_id="too late")
        raise LookupError

    connection = call(captured(pipeline, app))
    assert finished == [1]
    assert connection.ended[0] == "raised"
    assert pipeline.calls[0].outcome is Outcome.COMPLETE


def test_the_application_runs_in_the_servers_task_and_context() -> None:
    """Variables that it sets are the server's afterwards; ours is gone."""
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    tasks: list[Any] = []

    async def app(scope, receive, send):
        tasks.append(asyncio.current_task())
        variable.set(1)
        await hello(scope, receive, send)

    async def serve() -> None:
        tasks.append(asyncio.current_task())
        await Connection().serve(captured(RecordingPipeline(), app), http_scope())
        assert variable.get() == 1
        assert current_exchange.get() is None

    asyncio.run(serve())
    assert tasks[0] is tasks[1]


def test_identify_works_in_dependencies_threads_and_tasks() -> None:
    """Two hundred calls at once; each knows its own user."""
    pipeline = RecordingPipeline()

    async def app(scope, receive, send):
        user = scope["path"][1:]
        await asyncio.sleep(0)
        await asyncio.create_task(say(user))
        await asyncio.to_thread(identify, company_id=user)
        await hello(scope, receive, send)

    async def say(user: str) -> None:
        await asyncio.sleep(0.001)
        identify(user_id=user)

    async def serve() -> None:
        ours = captured(pipeline, app)
        await asyncio.gather(*(Connection().serve(ours, http_scope(path=f"/{number}")) for number in range(200)))

    asyncio.run(serve())
    assert sorted(int(one.user_id) for one in pipeline.calls) == list(range(200))
    assert all(one.user_id == one.company_id == one.url.rpartition("/")[2] for one in pipeline.calls)


@pytest.mark.parametrize("steps", range(6))
def test_cancelled_wherever_it_waits(steps: int) -> None:
    """Cancelled at each await: the cancellation passes, and the call is recorded once."""
    pipeline = RecordingPipeline()

    async def app(scope, receive, send):
        for _ in range(2):
            await asyncio.sleep(0)
        await send(dict(START))
        for _ in range(2):
            await asyncio.sleep(0)
            await send({**BODY, "more_body": True})
        await asyncio.sleep(0)
        await send(dict(BODY))
        await asyncio.sleep(0)

    async def serve() -> bool:
        connection = Connection()
        task = asyncio.create_task(connection.serve(captured(pipeline, app), http_scope()))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return connection.ended is not None

    if asyncio.run(serve()):
        (exchange,) = pipeline.calls
        assert exchange.outcome is Outcome.ABORTED
    else:
        assert pipeline.calls == []  # cancelled before it began


def test_a_task_that_is_destroyed_finishes_as_from_a_finalizer() -> None:
    """Garbage collection of the coroutine: no callback, no lock there."""
    pipeline = RecordingPipeline()

    async def app(scope, receive, send):
        await send(dict(START))
        await Forever()

    coroutine = captured(pipeline, app)(http_scope(), Connection().receive, Connection().send)
    coroutine.send(None)
    del coroutine
    gc.collect()
    assert pipeline.calls == []
    (exchange,) = pipeline.late_calls()
    assert (exchange.outcome, exchange.status) == (Outcome.ABORTED, 200)


class Forever:
    def __await__(self) -> Any:
        yield


def test_a_call_is_captured_once_however_many_layers_there_are() -> None:
    """Of one application id the outermost; a provisional one makes room for a middleware in the code."""
    outer, inner = RecordingPipeline(), RecordingPipeline()
    call(captured(outer, captured(inner, hello)))
    assert (len(outer.calls), len(inner.calls)) == (1, 0)

    provisional = AsgiCapture(outer, provisional=True)

    async def serve(scope, receive, send):
        return await provisional.serve(captured(inner, hello), scope, receive, send)

    call(serve)
    assert (len(outer.calls), len(inner.calls), len(outer.superseded_calls)) == (1, 1, 1)

    other = RecordingPipeline()
    other.settings = other.settings.with_changes(application_id="other")
    call(captured(other, captured(inner, hello)))
    assert (len(other.calls), len(inner.calls)) == (1, 2)


def test_nothing_of_a_call_is_kept_by_what_outlives_it() -> None:
    """A task that was started in a call keeps its Exchange, not the call's scope or messages."""
    pipeline = RecordingPipeline()
    kept: list[Any] = []

    async def app(scope, receive, send):
        kept.append(send)
        await hello(scope, receive, send)

    call(captured(pipeline, app))
    (keeper,) = [one for one in gc.get_referents(kept[0]) if hasattr(one, "_exchange")]
    assert keeper._exchange is keeper._offer is None


@pytest.mark.parametrize(
    "scope",
    [
        {"type": "http"},
        http_scope(headers=None),
        http_scope(headers=[(b"a",)]),
        http_scope(headers=[("host", "text")]),
        http_scope(client=None, server=None),
        http_scope(client=("", 0), server=("/run/app.sock", None), headers=[]),
        http_scope(path=5, raw_path=None, query_string=None, root_path=None),
        http_scope(raw_path=b"\xff%zz?x", query_string=b"\xff\x00=%"),
        {"type": "unheard-of"},
        {},
    ],
    ids=range(10),
)
def test_odd_scopes_are_the_applications_affair(scope: dict[str, Any]) -> None:
    """Whatever a server passes reaches the application; what cannot be read is counted, not raised."""
    pipeline = RecordingPipeline()
    seen: list[Any] = []

    async def app(scope, receive, send):
        seen.append({name: value for name, value in scope.items() if name != EXCHANGES_KEY})
        await hello(scope, receive, send)

    given = dict(scope)
    connection = call(captured(pipeline, app), scope=scope)
    assert seen == [given]
    assert connection.sent == [START, BODY]
    for exchange in pipeline.calls:
        assert isinstance(exchange.url, str)


@pytest.mark.parametrize("raw_path", [None, "/\ud800"])
def test_a_path_that_is_no_text_is_captured(raw_path: Any) -> None:
    """JSON may hold half a pair of surrogates, and so does the path that an adapter takes from an event of AWS."""
    pipeline = RecordingPipeline()
    scope = {**http_scope(), "path": "/\ud800", "raw_path": raw_path, "root_path": "/\udfff"}
    call(captured(pipeline, hello), scope=scope)
    assert [exchange.url for exchange in pipeline.calls] == ["http://shop.example/%ED%BF%BF/%ED%A0%80"]


# WebSockets.


async def accepts(scope, receive, send):
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept", "headers": [(b"x", b"y")]})
    await receive()
    await send({"type": "websocket.send", "text": "secret"})


async def accepts_with_odd_headers(scope, receive, send):
    await send({"type": "websocket.accept", "headers": [None]})
    await send({"type": "websocket.close"})


def test_headers_that_cannot_be_read_do_not_hide_that_a_handshake_was_accepted() -> None:
    """Granian and daphne take anything there, and send nothing of it."""
    pipeline = RecordingPipeline()
    call(captured(pipeline, accepts_with_odd_headers), scope=websocket_scope())
    assert [(exchange.status, exchange.outcome) for exchange in pipeline.calls] == [(101, Outcome.UPGRADED)]


async def closes(scope, receive, send):
    await receive()
    await send({"type": "websocket.close", "code": 1008})


async def denies(scope, receive, send):
    await receive()
    await send({"type": "websocket.http.response.start", "status": 429, "headers": [(b"a", b"b")]})
    await send({"type": "websocket.http.response.body", "body": b"no"})


@pytest.mark.parametrize(
    ("app", "status", "outcome", "body"),
    [
        (accepts, 101, Outcome.UPGRADED, None),
        (closes, 403, Outcome.COMPLETE, None),
        (denies, 429, Outcome.COMPLETE, b"no"),
        (fails_at_once, None, Outcome.FAILED, None),
    ],
)
def test_a_handshake_is_one_call(app: Any, status: int | None, outcome: Outcome, body: bytes | None) -> None:
    """Its outcome is recorded; what passes over the socket is not."""
    incoming = ({"type": "websocket.connect"}, {"type": "websocket.receive", "text": "secret"})
    pipeline = RecordingPipeline()
    plain = call(app, *incoming, scope=websocket_scope())
    ours = call(captured(pipeline, app), *incoming, scope=websocket_scope())
    assert ours.seen == plain.seen
    (exchange,) = pipeline.calls
    assert (exchange.status, exchange.outcome, exchange.method) == (status, outcome, "GET")
    assert (exchange.response_body.data() if exchange.response_body else None) == body
    assert exchange.url == "http://shop.example/socket"
    assert exchange.request_body is None


# Lifespan.


def test_a_lifespan_passes_and_ends_with_a_delivery() -> None:
    """What is pending is delivered, in a thread, before the server is told that the shutdown is complete."""
    pipeline = RecordingPipeline()
    flushed: list[int] = []
    connection = Connection({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
    pipeline.force_flush = lambda timeout_s: flushed.append(len(connection.sent))  # type: ignore[attr-defined]

    async def app(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    asyncio.run(connection.serve(captured(pipeline, app), {"type": "lifespan", "state": {}}))
    assert [message["type"] for message in connection.sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert flushed == [1]
    assert pipeline.calls == []


def test_the_refusal_of_a_lifespan_passes() -> None:
    """Servers go on without one then."""
    connection = call(captured(RecordingPipeline(), fails_at_once), scope={"type": "lifespan"})
    assert connection.ended[0] == "raised"


def test_a_scope_with_parts_missing_costs_what_is_missing() -> None:
    """A test client's scope of hardly anything is a call all the same; headers that can be read once are the application's."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(list(scope.get("headers", "none")))
        await hello(scope, receive, send)

    once = {"headers": iter([(b"a", b"b")]), "client": iter(["10.0.0.9", 1]), "server": iter(["shop.example", 80])}
    for scope in ({"type": "http"}, {"type": "http", "method": "PUT", **once}):
        pipeline = RecordingPipeline()
        asyncio.run(Connection().serve(captured(pipeline, app), scope))
        assert [call.method for call in pipeline.calls] == [scope.get("method", "GET")]
        assert [call.url for call in pipeline.calls] == ["http://localhost/"]
        assert pipeline.guard.counts() == {}
    assert seen == [list("none"), [(b"a", b"b")]]
    assert [next(once["client"]), next(once["server"])] == ["10.0.0.9", "shop.example"]


def test_each_try_of_a_retrying_middleware_is_a_call() -> None:
    """A scope that has been used before is captured again once the first try is over."""
    pipeline, tries = RecordingPipeline(), []

    async def app(scope, receive, send):
        tries.append(await receive())
        if len(tries) == 1:
            raise LookupError
        await send(dict(START))
        await send(dict(BODY))

    async def retry(scope, receive, send):
        with contextlib.suppress(LookupError):
            await captured(pipeline, app)(scope, receive, send)
        await captured(pipeline, app)(scope, receive, send)

    call(retry, request(b"a"), request(b"b"))
    assert [(one.outcome, one.status) for one in pipeline.calls] == [(Outcome.FAILED, None), (Outcome.COMPLETE, 200)]
    assert [one.request_body.data() for one in pipeline.calls] == [b"a", b"b"]


def test_a_call_that_is_over_is_no_other_try_further_inside() -> None:
    """The client has left while an outer middleware read; what is called then is still the same call."""
    pipeline = RecordingPipeline()

    async def reads_first(scope, receive, send):
        await receive()
        await captured(pipeline, hello)(scope, receive, send)

    call(captured(pipeline, reads_first), DISCONNECT, DISCONNECT)
    assert [one.outcome for one in pipeline.calls] == [Outcome.ABORTED]


def test_a_context_inherited_from_a_call_that_is_over_is_not_around_this_one() -> None:
    """What follows a large upload on its connection is served by uvicorn in the upload's context."""
    pipeline = RecordingPipeline()

    async def app(scope, receive, send):
        opened.append(current_exchange.get())
        contexts.append(contextvars.copy_context())
        await hello(scope, receive, send)

    opened: list[Any] = []
    contexts: list[Any] = []
    call(captured(pipeline, app))
    contexts[0].run(call, captured(pipeline, app))
    assert pipeline.calls == opened
    assert [one.outer for one in opened] == [None, None]


@pytest.mark.parametrize(
    ("headers", "server", "host"),
    [
        ([(b"host", b"h\xf6st")], None, "h%F6st"),
        ([(b"host", b"")], ("h\u4e2dst", 80), "h%E4%B8%ADst"),
        ([("host", "h\u4e2dst")], None, "h%E4%B8%ADst"),
    ],
)
def test_a_host_beyond_latin_1_stays_a_host(headers: list[Any], server: Any, host: str) -> None:
    """A `?` in its place would make a query of the path, which no rule on the path matches."""
    scope = {"scheme": "http", "path": "/admin", "headers": headers, "server": server}
    assert url_of(scope, headers) == f"http://{host}/admin"
