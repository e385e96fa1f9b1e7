"""The ASGI middleware with a real pipeline: frameworks, callbacks, governance, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import sys
import time
from typing import TYPE_CHECKING, Any

import flask
import pytest
import trio
import trio.lowlevel
from a2wsgi import WSGIMiddleware
from fastapi import BackgroundTasks, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.routing import Mount, Route

from moesif_otel import identify
from moesif_otel._capture.asgi import span
from moesif_otel._capture.asgi.callback_objects import CallbackObjects
from moesif_otel.asgi import MoesifMiddleware
from moesif_otel.errors import MoesifConfigError
from moesif_otel.sandbox import Sandbox
from moesif_otel.wsgi import MoesifMiddleware as WsgiMiddleware
from tests.capture.asgi.driver import DISCONNECT, Connection, http_scope, request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="module")
def moesif() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(moesif: Sandbox) -> Sandbox:
    moesif.clear()
    moesif.put_rules([])
    return moesif


@pytest.fixture(autouse=True)
def ended(moesif: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shut every middleware down that a test or a framework has made; its counters add up."""
    made: list[MoesifMiddleware] = []
    initialise = MoesifMiddleware.__init__

    def noted(self: MoesifMiddleware, *arguments: Any, **keywords: Any) -> None:
        initialise(self, *arguments, **keywords)
        made.append(self)

    monkeypatch.setattr(MoesifMiddleware, "__init__", noted)
    yield
    for one in made:
        one.shutdown()
        stats = one.stats()
        assert stats["accepted"] == stats["delivered"] + sum(stats["dropped"].values()) + stats["pending"]


@pytest.fixture
def wrap(sandbox: Sandbox) -> Callable[..., MoesifMiddleware]:
    """Put a middleware around an application."""

    def make(app: Any, **options: Any) -> MoesifMiddleware:
        return MoesifMiddleware(app, {"APPLICATION_ID": "asgi", "BASE_URI": sandbox.url, **options})

    return make


async def echo(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    await send({"type": "http.response.start", "status": 201, "headers": [(b"content-type", b"application/json"), (b"x-api", b"1")]})
    await send({"type": "http.response.body", "body": message["body"] or b"{}"})


def call(app: Any, *incoming: Any, fails_at: Any = None, **scope: Any) -> Connection:
    return asyncio.run(Connection(*incoming, DISCONNECT, fails_at=fails_at).serve(app, http_scope(**scope)))


def post(app: Any, body: bytes = b'{"a": 1}', **scope: Any) -> Connection:
    headers = [(b"host", b"shop.example"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return call(app, request(body), method="POST", headers=[*headers, *scope.pop("headers", ())], **scope)


def answer(connection: Connection) -> tuple[int, dict[bytes, bytes], bytes]:
    start, *rest = connection.sent
    return start["status"], dict(start["headers"]), b"".join(message.get("body", b"") for message in rest)


def event_of(middleware: MoesifMiddleware, sandbox: Sandbox) -> dict[str, Any]:
    assert middleware.force_flush(30_000)
    (event,) = sandbox.events()
    return event


# What callbacks are given, and when.


async def slow(value: Any) -> Any:
    await asyncio.sleep(0.01)
    return value


@pytest.mark.parametrize("kind", ["plain", "async", "mixed"])
def test_callbacks_take_request_and_response(wrap: Any, sandbox: Sandbox, kind: str) -> None:
    """Starlette's objects; plain functions and coroutine functions."""
    is_async = iter([kind == "async", kind != "plain", kind == "async", kind != "plain"])

    def callback(function: Callable[[Any, Any], Any]) -> Any:
        if not next(is_async):
            return function

        async def asynchronous(request: Any, response: Any) -> Any:
            return await slow(function(request, response))

        return asynchronous

    middleware = wrap(
        echo,
        SKIP=callback(lambda request, response: request.url.path == "/health"),
        IDENTIFY_USER=callback(lambda request, response: request.headers["x-user"]),
        IDENTIFY_COMPANY=callback(lambda request, response: f"{response.status_code} {response.headers['x-api']} {response.body.decode()}"),
        GET_METADATA=callback(lambda request, response: {"q": request.query_params["q"], "client": request.client.host}),
    )
    post(middleware, query_string=b"q=1", headers=[(b"x-user", b"mary")])
    post(middleware, path="/health")
    event = event_of(middleware, sandbox)
    assert event["user_id"] == "mary"
    assert event["company_id"] == '201 1 {"a": 1}'
    assert event["metadata"] == {"q": "1", "client": "10.0.0.9"}


def test_a_callback_reads_the_captured_body(wrap: Any, sandbox: Sandbox) -> None:
    """`await request.json()` works once more, at no cost to the application."""

    async def identify_user(request: Any, response: Any) -> Any:
        return (await request.json())["a"]

    middleware = wrap(echo, IDENTIFY_USER=identify_user)
    post(middleware)
    assert event_of(middleware, sandbox)["user_id"] == "1"


def test_no_answer_waits_for_an_async_callback(wrap: Any, sandbox: Sandbox) -> None:
    """The last message has left when the callback begins to wait; its answer is in the event all the same."""
    order: list[str] = []

    async def identify_user(request: Any, response: Any) -> str:
        order.append("asked")
        await asyncio.sleep(0.05)
        order.append("answered")
        return "mary"

    class Watched(Connection):
        async def send(self, message: dict[str, Any]) -> None:
            await super().send(message)
            order.append(message["type"])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await echo(scope, receive, send)
        order.append("sent")

    middleware = wrap(app, IDENTIFY_USER=identify_user)
    asyncio.run(Watched(request(), DISCONNECT).serve(middleware, http_scope()))
    assert order == ["http.response.start", "http.response.body", "sent", "asked", "answered"]
    assert event_of(middleware, sandbox)["user_id"] == "mary"


def test_a_failing_or_hanging_callback_loses_nothing(wrap: Any, sandbox: Sandbox) -> None:
    """What it would have said is missing; the rest is there, and it is counted."""

    async def fails(request: Any, response: Any) -> str:
        raise LookupError

    async def hangs(request: Any, response: Any) -> str:
        asked.set()
        await asyncio.sleep(3600)
        return "never"

    middleware = wrap(echo, IDENTIFY_USER=fails, IDENTIFY_COMPANY=hangs)

    async def serve() -> None:
        task = asyncio.create_task(Connection(request(), DISCONNECT).serve(middleware, http_scope()))
        await asked.wait()
        task.cancel()

    asked = asyncio.Event()
    asyncio.run(serve())
    event = event_of(middleware, sandbox)
    assert "user_id" not in event
    assert "company_id" not in event
    assert middleware.stats()["errors"] == {"callback IDENTIFY_USER": 1}


def test_trio_awaits_callbacks_too(wrap: Any, sandbox: Sandbox) -> None:
    """Plain ones and asynchronous ones, and the lifespan's delivery."""

    async def identify_user(request: Any, response: Any) -> str:
        await trio.sleep(0.01)
        return "mary"

    middleware = wrap(echo, IDENTIFY_USER=identify_user, IDENTIFY_COMPANY=lambda request, response: "acme")

    async def lifespan(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    async def serve() -> None:
        await Connection(request(), DISCONNECT).serve(middleware, http_scope())
        middleware.app = lifespan
        await Connection().serve(middleware, {"type": "lifespan"})

    trio.run(serve)
    (event,) = sandbox.events()  # nobody has flushed
    assert (event["user_id"], event["company_id"]) == ("mary", "acme")


class _NoException(BaseException):
    pass


@pytest.mark.parametrize("error", [_NoException, asyncio.CancelledError, SystemExit, LookupError])
def test_what_a_callback_raises_under_trio_does_not_end_the_run(
    wrap: Any, sandbox: Sandbox, error: type[BaseException]
) -> None:
    """The task that awaits it is one of trio's system tasks, whose errors end everything."""

    async def user(request: Any, response: Any) -> str:
        await trio.lowlevel.checkpoint()
        raise error("secret")

    middleware = wrap(echo, IDENTIFY_USER=user, IDENTIFY_COMPANY=lambda request, response: "acme")
    connection = Connection(request(), DISCONNECT)

    async def serve() -> None:
        await connection.serve(middleware, http_scope())
        await trio.lowlevel.checkpoint()

    trio.run(serve)
    assert answer(connection)[0] == 201
    assert "user_id" not in event_of(middleware, sandbox)


def test_what_a_callback_raises_is_not_told_by_asyncio(wrap: Any, sandbox: Sandbox) -> None:
    """It is counted; an application's handler of forgotten exceptions hears nothing of it."""
    told: list[Any] = []

    async def user(request: Any, response: Any) -> str:
        await asyncio.sleep(0)
        raise _NoException("secret")

    middleware = wrap(echo, IDENTIFY_USER=user)

    async def serve() -> Connection:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
        connection = await Connection(request(), DISCONNECT).serve(middleware, http_scope())
        await asyncio.sleep(0)
        gc.collect()
        return connection

    assert answer(asyncio.run(serve()))[0] == 201
    assert told == []
    event_of(middleware, sandbox)
    assert middleware.stats()["errors"] == {"callback IDENTIFY_USER": 1}


def test_plain_objects_where_starlette_is_not_installed(wrap: Any, sandbox: Sandbox) -> None:
    """The same names for what nearly every callback looks at."""

    async def company(request: Any, response: Any) -> str:
        return (await request.body()).decode()

    middleware = wrap(
        echo,
        IDENTIFY_USER=lambda request, response: f"{request.method} {request.url} {request.headers['X-User']} {request.client[0]}",
        IDENTIFY_COMPANY=company,
        GET_METADATA=lambda request, response: {"s": response.status_code, "h": response.headers["X-API"], "b": response.body.decode()},
    )
    objects = middleware._capture.callback_objects()
    objects._request_class = objects._response_class = None
    post(middleware, headers=[(b"x-user", b"mary")])
    event = event_of(middleware, sandbox)
    assert event["user_id"] == "POST http://shop.example/items mary 10.0.0.9"
    assert event["company_id"] == '{"a": 1}'
    assert event["metadata"] == {"s": 201, "h": "1", "b": '{"a": 1}'}
    assert isinstance(objects, CallbackObjects)


def test_an_async_mask_is_awaited(wrap: Any, sandbox: Sandbox) -> None:
    """Moesifasgi takes a plain or an async MASK_EVENT_MODEL."""

    async def mask(event: Any) -> Any:
        await asyncio.sleep(0)
        event.request.headers["user-agent"] = "masked"
        return event

    middleware = wrap(echo, MASK_EVENT_MODEL=mask)
    call(middleware, request())
    assert event_of(middleware, sandbox)["request"]["headers"]["user-agent"] == "masked"


# FastAPI and Starlette.


def fastapi_app(settings: dict[str, Any]) -> FastAPI:
    app = FastAPI()
    app.add_middleware(MoesifMiddleware, settings=settings)

    async def who(request: Request) -> None:
        identify(user_id=request.headers.get("x-user"))

    def thread_pool(request: Request) -> None:
        identify(company_id=request.headers.get("x-user"))

    @app.post("/items/{number}", dependencies=[Depends(who), Depends(thread_pool)])
    def items(number: int, item: dict[str, Any], background: BackgroundTasks) -> dict[str, Any]:
        background.add_task(time.sleep, 0)
        return {"number": number, **item}

    @app.get("/fail")
    async def fail() -> None:
        raise LookupError("secret")

    @app.get("/teapot")
    async def teapot() -> None:
        raise ZeroDivisionError

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse((piece for piece in (b"one ", b"two")), media_type="text/plain")

    @app.exception_handler(ZeroDivisionError)
    async def handle(request: Request, exc: Exception) -> JSONResponse:
        return JSONResponse({"error": "handled"}, 418)

    sub = FastAPI()

    @sub.get("/deep")
    async def deep() -> dict[str, str]:
        return {"deep": "yes"}

    app.mount("/sub", sub)
    return app


@pytest.fixture
def api(sandbox: Sandbox) -> Iterator[Any]:
    """A FastAPI application; its first call has been made, so that our layer stands outside."""
    app = fastapi_app({"APPLICATION_ID": "fastapi", "BASE_URI": sandbox.url, "EVENT_BATCH_TIMEOUT": 0.02})
    call(app, request(), path="/sub/deep")
    sandbox.wait_for_events(1)
    sandbox.clear()
    return app


def test_add_middleware_captures_what_the_client_gets(api: Any, sandbox: Sandbox) -> None:
    """Bodies, identity from a dependency and from one in the thread pool, the error pages around us, mounts."""
    assert answer(post(api, path="/items/7", headers=[(b"x-user", b"mary")]))[::2] == (200, b'{"number":7,"a":1}')
    connection = call(api, request(), path="/fail")
    assert repr(connection.ended[1]) == "LookupError('secret')"
    assert answer(connection)[::2] == (500, b"Internal Server Error")
    assert answer(call(api, request(), path="/teapot"))[0] == 418
    streamed = asyncio.run(Connection(request()).serve(api, http_scope(path="/stream")))
    assert answer(streamed)[2] == b"one two"
    assert answer(call(api, request(), path="/sub/deep", root_path="/proxied"))[0] in {200, 404}
    events = {event["request"]["uri"].partition("shop.example")[2]: event for event in sandbox.wait_for_events(5)}
    item = events["/items/7"]
    assert (item["user_id"], item["company_id"]) == ("mary", "mary")
    assert (item["request"]["body"], item["response"]["body"]) == ({"a": 1}, {"number": 7, "a": 1})
    failed = events["/fail"]
    assert failed["response"]["status"] == 500
    assert failed["metadata"]["moesif_otel"]["error_type"] == "LookupError"
    assert events["/teapot"]["response"] | {"time": ""} == events["/teapot"]["response"] | {"time": "", "status": 418, "body": {"error": "handled"}}
    assert events["/stream"]["response"]["status"] == 200
    assert "/proxied/sub/deep" in events


def test_a_first_call_without_lifespan_is_captured_as_well(sandbox: Sandbox) -> None:
    """Then our layer is still inside of the error handling; the answer is the client's all the same."""
    app = fastapi_app({"APPLICATION_ID": "fastapi", "BASE_URI": sandbox.url, "EVENT_BATCH_TIMEOUT": 0.02})
    assert answer(post(app, path="/items/7"))[0] == 200
    assert answer(call(app, request(), path="/fail"))[0] == 500
    assert sorted(event["response"]["status"] for event in sandbox.wait_for_events(2)) == [200, 500]


def test_a_mounted_application_of_ours_does_not_capture_its_parent(wrap: Any, sandbox: Sandbox) -> None:
    """Only what was given to the middleware is captured; the URL is the one that the client asked for."""

    async def home(request: Any) -> PlainTextResponse:
        return PlainTextResponse("home")

    inner = wrap(Starlette(routes=[Route("/deep", home)]))
    app = Starlette(routes=[Route("/", home), Mount("/sub", inner)])
    assert answer(call(app, request(), path="/"))[2] == answer(call(app, request(), path="/sub/deep"))[2] == b"home"
    assert event_of(inner, sandbox)["request"]["uri"] == "http://shop.example/sub/deep"


def test_other_middlewares_around_and_inside(sandbox: Sandbox) -> None:
    """BaseHTTPMiddleware runs the application in another task; `identify` works there, and each call is one event."""

    class Outer(BaseHTTPMiddleware):
        async def dispatch(self, request: Any, call_next: Any) -> Any:
            response = await call_next(request)
            response.headers["x-outer"] = "1"
            return response

    async def home(request: Any) -> PlainTextResponse:
        identify(user_id="mary")
        return PlainTextResponse("home")

    settings = {"APPLICATION_ID": "starlette", "BASE_URI": sandbox.url, "EVENT_BATCH_TIMEOUT": 0.02}
    app = Starlette(
        routes=[Route("/", home)],
        middleware=[Middleware(Outer), Middleware(MoesifMiddleware, settings=settings), Middleware(Outer)],
    )
    for _ in range(2):
        connection = asyncio.run(Connection(request()).serve(app, http_scope(path="/")))
        assert answer(connection)[1][b"x-outer"] == b"1"
    events = sandbox.wait_for_events(2)
    assert [event["user_id"] for event in events] == ["mary", "mary"]
    assert any(event["response"]["headers"].get("x-outer") == "1" for event in events)  # from the second call on we stand outside of it


def test_identify_tells_every_application_id(sandbox: Sandbox) -> None:
    """Two middlewares see the same request: who makes it is the same for both."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        identify(user_id="mary")
        await echo(scope, receive, send)

    inner = MoesifMiddleware(app, {"APPLICATION_ID": "first", "BASE_URI": sandbox.url})
    outer = MoesifMiddleware(inner, {"APPLICATION_ID": "second", "BASE_URI": sandbox.url})
    asyncio.run(Connection(request()).serve(outer, http_scope()))
    for middleware in (inner, outer):
        assert middleware.force_flush(30_000)
    assert [event["user_id"] for event in sandbox.wait_for_events(2)] == ["mary", "mary"]


def test_two_middlewares_of_different_ids_both_see_what_the_client_gets(sandbox: Sandbox) -> None:
    """Also the answer of the error handling around all middlewares."""

    async def fail(request: Any) -> PlainTextResponse:
        raise LookupError

    async def unavailable(request: Any, exc: Exception) -> PlainTextResponse:
        return PlainTextResponse("sorry", 503)

    options = {"BASE_URI": sandbox.url, "EVENT_BATCH_TIMEOUT": 0.02}
    app = Starlette(
        routes=[Route("/", fail)],
        middleware=[Middleware(MoesifMiddleware, settings={"APPLICATION_ID": one, **options}) for one in ("first", "second")],
        exception_handlers={Exception: unavailable},
    )
    for expected in (None, (503, 503, 503, 503)):  # at the first call they are still inside of it
        statuses = [answer(asyncio.run(Connection(request()).serve(app, http_scope(path="/"))))[0] for _ in range(2 if expected else 1)]
        assert set(statuses) == {503}
        events = sandbox.wait_for_events(2 * len(statuses))
        assert expected is None or tuple(event["response"]["status"] for event in events) == expected
        sandbox.clear()


def test_each_try_of_an_outer_retrying_middleware_is_a_call(wrap: Any, sandbox: Sandbox) -> None:
    """The scope carries the mark of the first try."""
    tries: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tries.append(scope)
        if len(tries) == 1:
            raise LookupError
        await echo(scope, receive, send)

    middleware = wrap(app)

    async def retry(scope: Any, receive: Any, send: Any) -> None:
        with contextlib.suppress(LookupError):
            await middleware(scope, receive, send)
        await middleware(scope, receive, send)

    assert answer(call(retry, request(b"{}")))[0] == 201
    assert middleware.force_flush(30_000)
    assert sorted(event["response"]["status"] for event in sandbox.events()) == [201, 500]


def test_a_wsgi_application_in_an_asgi_one_is_captured_once(sandbox: Sandbox) -> None:
    """Adapters pass no mark on: the call is known by its method and URL."""
    flask_app = flask.Flask("mounted")
    flask_app.get("/hi")(lambda: "hello")
    options = {"APPLICATION_ID": "asgi", "BASE_URI": sandbox.url, "EVENT_BATCH_TIMEOUT": 0.02}
    inner = WsgiMiddleware(flask_app, options)
    app = MoesifMiddleware(Starlette(routes=[Mount("/sub", WSGIMiddleware(inner))]), options)
    connection = asyncio.run(Connection(request()).serve(app, http_scope(path="/sub/hi")))
    assert answer(connection)[2] == b"hello"
    assert inner.force_flush()
    assert event_of(app, sandbox)["response"]["status"] == 200
    inner.shutdown()


def test_after_shutdown_the_application_is_served_on(wrap: Any) -> None:
    """Calls after `shutdown` pass straight through: the application gets the server's own `receive` and `send`."""
    seen: list[tuple[Any, Any]] = []
    asked: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((receive, send))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"served"})

    middleware = wrap(app, IDENTIFY_USER=lambda *_: asked.append(1))
    middleware.shutdown()

    async def receive() -> Any:
        return request()

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(middleware(http_scope(path="/"), receive, send))
    assert seen == [(receive, send)]
    assert sent[1]["body"] == b"served"
    assert (asked, middleware.stats()["accepted"]) == ([], 0)


def test_a_call_that_a_shutdown_has_ended_keeps_nothing(wrap: Any) -> None:
    """What its application sends after that is the client's alone; the bytes are not held for an event that has left."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.to_thread(middleware.shutdown)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"served"})

    middleware = wrap(app)
    connection = asyncio.run(Connection(request()).serve(middleware, http_scope(path="/")))
    assert answer(connection)[2] == b"served"
    stats = middleware.stats()
    assert (stats["delivered"], stats["held_bytes"], stats["errors"]) == (1, 0, {})


# Governance.


def blocking(*conditions: dict[str, str], **rule: Any) -> dict[str, Any]:
    return {
        "_id": "rule-1", "type": "regex", "state": 2, "name": "r", "block": True,
        "regex_config": [{"conditions": list(conditions)}],
        "response": {"status": 429, "headers": {"X-Quota": "none"}, "body": {"error": "quota"}},
        **rule,
    }  # fmt: skip


@pytest.fixture
def governed(sandbox: Sandbox, wrap: Any) -> Callable[..., MoesifMiddleware]:
    """A middleware whose rules have arrived."""

    def make(app: Any, *rules: dict[str, Any], config: dict[str, Any] | None = None, **options: Any) -> MoesifMiddleware:
        sandbox.put_rules(rules)
        sandbox.put_config(config or {})
        middleware = wrap(app, **options)
        call(middleware, request(), path="/first")
        deadline = time.monotonic() + 30
        while not middleware._pipeline.has_rules:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        middleware.force_flush()
        sandbox.clear()
        return middleware

    return make


async def never(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] != "/first":
        raise AssertionError("the application was called")
    await echo(scope, receive, send)


def test_a_blocked_call_does_not_reach_the_application(governed: Any, sandbox: Sandbox) -> None:
    """The answer is the rule's; the event says which one."""
    middleware = governed(never, blocking({"path": "request.route", "value": "/quota"}))
    status, headers, body = answer(call(middleware, request(), path="/quota"))
    assert (status, body, headers[b"x-quota"], headers[b"content-type"]) == (429, b'{"error":"quota"}', b"none", b"application/json")
    event = event_of(middleware, sandbox)
    assert (event["blocked_by"], event["response"]["status"], event["response"]["body"]) == ("rule-1", 429, {"error": "quota"})
    assert answer(call(middleware, request(), path="/quota", method="HEAD"))[2] == b""


def test_a_rule_that_blocks_nothing_adds_its_headers(governed: Any) -> None:
    """Behind the application's own; nothing else of the messages changes."""
    rule = blocking({"path": "request.route", "value": "/quota"}, block=False, response={"headers": {"X-Quota": "5"}})
    middleware = governed(echo, rule)
    plain, ours = call(echo, request(), path="/quota"), call(middleware, request(), path="/quota")
    plain.sent[0]["headers"].append((b"x-quota", b"5"))
    assert ours.seen == plain.seen


@pytest.mark.parametrize("is_async", [False, True])
def test_an_identity_rule_asks_the_callbacks_before_the_application(governed: Any, sandbox: Sandbox, is_async: bool) -> None:
    """With no response yet; a callback that knew nothing is asked again at the end."""
    seen: list[Any] = []

    def who(request: Any, response: Any) -> str | None:
        seen.append(response)
        return request.headers.get("x-user") or (response and "late")

    async def who_async(request: Any, response: Any) -> str | None:
        return await slow(who(request, response))

    rule = blocking(type="user", regex_config=[], applied_to="matching", applied_to_unidentified=False)
    config = {"user_rules": {"mary": [{"rules": "rule-1"}]}}
    middleware = governed(echo, rule, config=config, IDENTIFY_USER=who_async if is_async else who)
    seen.clear()
    assert answer(call(middleware, request(), headers=[(b"x-user", b"mary")]))[0] == 429
    assert seen == [None]
    assert answer(call(middleware, request(), headers=[]))[0] == 201
    assert [one and one.status_code for one in seen] == [None, None, 201]
    assert middleware.force_flush()
    assert {event["user_id"] for event in sandbox.events()} == {"mary", "late"}
    assert len(sandbox.events()) == 2


@pytest.mark.skipif(sys.version_info < (3, 11), reason="nobody can tell it from a cancellation of the call's task")
def test_a_cancelled_task_of_an_identity_callback_cancels_no_call(governed: Any, sandbox: Sandbox) -> None:
    """It is an error of the callback's."""

    async def cancelled(request: Any, response: Any) -> Any:
        task = asyncio.ensure_future(asyncio.sleep(3600))
        asyncio.get_running_loop().call_soon(task.cancel)
        await task

    rule = blocking(type="user", regex_config=[], applied_to="matching", applied_to_unidentified=False)
    middleware = governed(echo, rule, config={"user_rules": {"mary": [{"rules": "rule-1"}]}}, IDENTIFY_USER=cancelled)
    assert answer(call(middleware, request()))[0] == 201
    assert middleware.stats()["errors"]["callback IDENTIFY_USER"] > 0


def test_an_identity_callback_that_raises_no_exception_fails_no_call(governed: Any) -> None:
    """What it raises is its own affair, as where it is a plain function."""

    async def user(request: Any, response: Any) -> str:
        await asyncio.sleep(0)
        raise _NoException("secret")

    rule = blocking(type="user", regex_config=[], applied_to="matching", applied_to_unidentified=False)
    middleware = governed(echo, rule, config={"user_rules": {"mary": [{"rules": "rule-1"}]}}, IDENTIFY_USER=user)
    assert answer(call(middleware, request()))[0] == 201
    assert middleware.stats()["errors"]["callback IDENTIFY_USER"] > 0


def test_a_body_rule_reads_ahead_and_gives_everything_back(governed: Any, sandbox: Sandbox) -> None:
    """The application receives the same messages; a body over the limit is received no further."""
    received: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while True:
            received.append(await receive())
            if not received[-1].get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    middleware = governed(app, blocking({"path": "request.body.plan", "value": "free"}), REQUEST_MAX_BODY_SIZE=100)
    headers = [(b"content-type", b"application/json")]
    pieces = (request(b'{"plan": ', more=True), request(b'"free"}'))
    received.clear()
    assert answer(call(middleware, *pieces, method="POST", headers=headers))[0] == 429
    assert received == []
    pieces = (request(b'{"plan": ', more=True), request(b'"paid"}'))
    assert answer(call(middleware, *pieces, method="POST", headers=headers))[0] == 200
    assert received == list(pieces)
    received.clear()
    long = (request(bytes(80), more=True), request(bytes(80), more=True), request(bytes(80)))
    assert answer(call(middleware, *long, method="POST", headers=headers))[0] in {200, 429}
    assert received in ([], list(long))


@pytest.mark.parametrize("message", [None, 5, {}, {"type": ["unhashable"]}])
def test_a_message_that_is_none_reaches_the_server(governed: Any, message: Any) -> None:
    """Where a rule adds headers, and in a lifespan: what is wrong with it is said by the server alone."""
    told = LookupError("what the server says")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/first":
            await echo(scope, receive, send)
        else:
            await send(message)

    rule = blocking({"path": "request.verb", "value": "GET"}, block=False, response={"headers": {"X-Quota": "5"}})
    middleware = governed(app, rule)
    assert call(middleware, request(), fails_at=(0, told)).ended == ("raised", told)
    assert call(middleware, request(), fails_at=(0, told), type="lifespan").ended == ("raised", told)


def test_an_error_of_receive_reaches_the_application_and_skips_no_rule(governed: Any) -> None:
    """A middleware around us that limits bodies raises from `receive`: the application gets that where it would have."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        received = []
        try:
            while True:
                received.append((await receive())["body"])
        except LookupError as exc:
            received.append(exc)
        await send({"type": "http.response.start", "status": 413, "headers": [], "received": received})
        await send({"type": "http.response.body"})

    too_long = LookupError("too long")
    about_bodies = blocking({"path": "request.body.plan", "value": "free"})
    adds = blocking({"path": "request.verb", "value": "PUT"}, _id="rule-2", block=False, response={"headers": {"X-Quota": "5"}})
    middleware = governed(app, about_bodies, adds)
    ours = call(middleware, request(b"one", more=True), too_long, method="PUT")
    bare = call(app, request(b"one", more=True), too_long, method="PUT")
    assert bare.sent[0]["received"] == [b"one", too_long]
    bare.sent[0]["headers"].append((b"x-quota", b"5"))
    assert ours.seen == bare.seen
    assert call(middleware, too_long, method="GET").sent[0]["received"] == [too_long]
    refuses = governed(never, blocking({"path": "request.body.$unreadable", "value": "too_large"}))
    assert answer(call(refuses, request(b"one", more=True), too_long, method="PUT"))[0] == 429


def test_governance_inside_a_framework_gets_the_outer_middlewares_headers(sandbox: Sandbox, governed: Any) -> None:
    """A block passes through what the application has put around us, CORS for one."""
    from starlette.middleware.cors import CORSMiddleware

    async def home(request: Any) -> PlainTextResponse:
        return PlainTextResponse("home")

    governed(echo, blocking({"path": "request.route", "value": "/quota"}))
    settings = {"APPLICATION_ID": "asgi", "BASE_URI": sandbox.url, "EVENT_BATCH_TIMEOUT": 0.02}
    app = Starlette(
        routes=[Route("/", home)],
        middleware=[Middleware(CORSMiddleware, allow_origins=["*"]), Middleware(MoesifMiddleware, settings=settings)],
    )
    deadline = time.monotonic() + 30
    while True:
        status, headers, _ = answer(call(app, request(), path="/quota", headers=[(b"origin", b"http://a")]))
        if status == 429:
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert headers[b"access-control-allow-origin"] == b"*"
    assert headers[b"x-quota"] == b"none"
    sandbox.wait_for_events(1)


# Spans.


def provider_with_memory() -> tuple[TracerProvider, InMemorySpanExporter]:
    provider, memory = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    return provider, memory


async def works(scope: Any, receive: Any, send: Any) -> None:
    with trace.get_tracer("app").start_as_current_span("work"):
        await echo(scope, receive, send)


async def fails(scope: Any, receive: Any, send: Any) -> None:
    raise LookupError("secret")


@pytest.mark.parametrize(("app", "status"), [(works, StatusCode.UNSET), (fails, StatusCode.ERROR)])
def test_a_provider_that_was_given_gets_a_server_span(sandbox: Sandbox, monkeypatch: Any, app: Any, status: Any) -> None:
    """Made by OpenTelemetry's middleware beside the call; it decorates the event, and is the application's parent."""
    monkeypatch.setattr(span.AsgiServerSpans, "instrumentations", ())  # other tests have imported them
    provider, memory = provider_with_memory()
    middleware = MoesifMiddleware(app, {"APPLICATION_ID": "asgi", "BASE_URI": sandbox.url}, provider)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    remote = (b"traceparent", b"00-11111111111111111111111111111111-2222222222222222-01")
    connection = call(middleware, request(), headers=[(b"host", b"shop.example"), remote])
    (server,) = [one for one in memory.get_finished_spans() if one.kind is SpanKind.SERVER]
    assert f"{server.context.trace_id:032x}" == "1" * 32
    assert (server.status.status_code, len(server.events)) == (status, int(app is fails))
    if app is works:
        (work,) = [one for one in memory.get_finished_spans() if one.name == "work"]
        assert work.parent.span_id == server.context.span_id
    else:
        assert repr(connection.ended[1]) == "LookupError('secret')"
    event = event_of(middleware, sandbox)
    assert (event["trace_id"], event["span"]["id"]) == ("1" * 32, f"{server.context.span_id:016x}")


def test_the_span_of_a_destroyed_task_leaves_other_contexts_alone(sandbox: Sandbox, monkeypatch: Any, caplog: Any) -> None:
    """Garbage collection ends it anywhere; OpenTelemetry would log that its context cannot be detached there."""
    monkeypatch.setattr(span.AsgiServerSpans, "instrumentations", ())
    provider, memory = provider_with_memory()

    class Forever:
        def __await__(self) -> Any:
            yield

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Forever()

    middleware = MoesifMiddleware(app, {"APPLICATION_ID": "asgi", "BASE_URI": sandbox.url}, provider)
    coroutine = middleware(http_scope(), Connection().receive, Connection().send)
    contextvars.copy_context().run(coroutine.send, None)
    coroutine.close()
    assert middleware.force_flush(30_000)
    assert [record.name for record in caplog.records if record.name.startswith("opentelemetry")] == []
    assert [one.kind for one in memory.get_finished_spans()] == [SpanKind.SERVER]


def test_spans_of_calls_at_once_do_not_mix(sandbox: Sandbox, monkeypatch: Any) -> None:
    """Each call's span is its own, whatever runs between its messages."""
    monkeypatch.setattr(span.AsgiServerSpans, "instrumentations", ())
    provider, memory = provider_with_memory()
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)
        with trace.get_tracer("app").start_as_current_span(scope["path"]):
            await asyncio.sleep(0)
            await echo(scope, receive, send)

    middleware = MoesifMiddleware(app, {"APPLICATION_ID": "asgi", "BASE_URI": sandbox.url}, provider)

    async def serve() -> None:
        await asyncio.gather(*(Connection(request()).serve(middleware, http_scope(path=f"/{n}")) for n in range(50)))

    asyncio.run(serve())
    spans = memory.get_finished_spans()
    servers = {one.context.span_id: one for one in spans if one.kind is SpanKind.SERVER}
    assert len(servers) == 50
    for one in spans:
        if one.kind is SpanKind.INTERNAL:
            assert servers[one.parent.span_id].attributes["http.target"] == one.name


# What it refuses.


def wsgi_app(environ: Any, start_response: Any) -> list[bytes]:
    return []


def asgi_2(scope: Any) -> Any:
    return echo


class Wsgi:
    def __call__(self, environ: Any, start_response: Any) -> list[bytes]:
        return []


@pytest.mark.parametrize(
    ("app", "says"),
    [
        (wsgi_app, r"wsgi_app takes two arguments.*moesif_otel\.wsgi\.MoesifMiddleware"),
        (Wsgi(), r"Wsgi takes two arguments.*moesif_otel\.wsgi"),
        (asgi_2, r"moesif_otel\.django\.MoesifMiddleware.*guarantee_single_callable"),
        (None, "got NoneType, takes an ASGI application"),
    ],
)
def test_what_is_no_asgi_application_is_told_what_to_use(app: Any, says: str) -> None:
    """At construction, in one line."""
    with pytest.raises(MoesifConfigError, match=says):
        MoesifMiddleware(app, {"APPLICATION_ID": "a"})


@pytest.mark.parametrize("app", [echo, functools.partial(echo), Starlette(), lambda *arguments: None, FastAPI()], ids=range(5))
def test_what_may_be_one_is_taken(app: Any) -> None:
    """Functions, partials, frameworks, and callables that do not say."""
    MoesifMiddleware(app, {"APPLICATION_ID": "a"})


def test_wrong_options_are_named() -> None:
    """As everywhere."""
    with pytest.raises(MoesifConfigError, match="LOG_BODY"):
        MoesifMiddleware(echo, {"APPLICATION_ID": "a", "LOG_BODY": "maybe"})
    with pytest.raises(MoesifConfigError, match=r"IDENTIFY_USER.*request, response"):
        MoesifMiddleware(echo, {"APPLICATION_ID": "a", "IDENTIFY_USER": lambda only: None})


def test_profile_calls_on_an_event_loop_do_not_wait(wrap: Any, sandbox: Sandbox) -> None:
    """What they send is queued."""
    middleware = wrap(echo)

    async def tell() -> None:
        middleware.update_user({"user_id": "mary"})

    asyncio.run(tell())
    assert middleware.force_flush()
    assert [user["user_id"] for user in sandbox.profiles()] == ["mary"]
