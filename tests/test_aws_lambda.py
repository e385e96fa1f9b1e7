"""AWS Lambda: calls through Mangum and serverless-wsgi are delivered when the handler returns, within its time."""

from __future__ import annotations

import asyncio
import warnings
from typing import TYPE_CHECKING, Any

import flask
import pytest
from fastapi import FastAPI

from moesif_otel.asgi import MoesifMiddleware as AsgiMiddleware
from moesif_otel.aws_lambda import deliver_before_freeze
from moesif_otel.sandbox import Sandbox
from moesif_otel.wsgi import MoesifMiddleware as WsgiMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import serverless_wsgi
    from mangum import Mangum


class Context:
    """As much of Lambda's context as is looked at."""

    def __init__(self, remaining_millis: int = 5_000) -> None:
        self.remaining_millis = remaining_millis

    def get_remaining_time_in_millis(self) -> int:
        return self.remaining_millis


def gateway_event(path: str, body: str) -> dict[str, Any]:
    """An event of API Gateway, payload version 2.0."""
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": path,
        "rawQueryString": "q=1",
        "headers": {"host": "shop.example", "content-type": "application/json", "x-forwarded-proto": "https", "x-forwarded-port": "443"},
        "requestContext": {"http": {"method": "POST", "path": path, "sourceIp": "10.0.0.9", "protocol": "HTTP/1.1"}, "stage": "$default"},
        "body": body,
        "isBase64Encoded": False,
    }  # fmt: skip


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


def test_a_call_through_mangum_is_there_when_the_handler_returns(sandbox: Sandbox) -> None:
    """Also what an asynchronous callback says: no event loop runs between two calls."""

    async def identify_user(request: Any, response: Any) -> str:
        await asyncio.sleep(0.01)
        return "mary"

    app = FastAPI()

    @app.post("/items")
    async def items(item: dict[str, Any]) -> dict[str, Any]:
        return item

    middleware = AsgiMiddleware(app, {"APPLICATION_ID": "l", "BASE_URI": sandbox.url, "EVENT_BATCH_TIMEOUT": 3600, "IDENTIFY_USER": identify_user})
    handler = deliver_before_freeze(Mangum(middleware, lifespan="off"))
    answer = handler(gateway_event("/items", '{"a": 1}'), Context())
    assert (answer["statusCode"], answer["body"]) == (200, '{"a":1}')
    (event,) = sandbox.events()
    assert event["request"]["uri"].endswith("shop.example/items?q=1")
    assert (event["request"]["body"], event["response"]["body"], event["user_id"]) == ({"a": 1}, {"a": 1}, "mary")
    middleware.shutdown()


def test_a_call_through_serverless_wsgi_is_there_when_the_handler_returns(sandbox: Sandbox) -> None:
    """As a decorator."""
    app = flask.Flask(__name__)
    app.post("/items")(lambda: flask.request.get_json())
    app.wsgi_app = middleware = WsgiMiddleware(app.wsgi_app, {"APPLICATION_ID": "l", "BASE_URI": sandbox.url, "EVENT_BATCH_TIMEOUT": 3600})  # type: ignore[method-assign]

    @deliver_before_freeze
    def handler(event: Any, context: Any) -> Any:
        return serverless_wsgi.handle_request(app, event, context)

    answer = handler(gateway_event("/items", '{"a": 1}'), Context())
    assert answer["statusCode"] == 200
    (event,) = sandbox.events()
    assert event["request"]["body"] == {"a": 1}
    assert handler.__name__ == "handler"
    middleware.shutdown()


def test_a_handler_that_raises_raises(sandbox: Sandbox) -> None:
    """And a handler without time left does not wait; neither does one whose context is none of Lambda's."""

    @deliver_before_freeze
    def handler(event: Any, context: Any) -> Any:
        raise LookupError(event)

    for context in (Context(0), Context(-5), None, object()):
        with pytest.raises(LookupError, match="event"):
            handler("event", context)


def test_the_wait_ends_before_the_calls_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than a second, never what Lambda would kill it for."""
    from moesif_otel import aws_lambda

    waited: list[float] = []

    class Pipeline:
        @staticmethod
        def force_flush(timeout_s: float) -> None:
            waited.append(timeout_s)

    monkeypatch.setattr(aws_lambda, "live_pipelines", lambda: (Pipeline,))
    handler = deliver_before_freeze(lambda event, context: event)
    for remaining_millis in (60_000, 700, 100):
        handler("event", Context(remaining_millis))
    assert [round(one, 1) for one in waited] == [1.0, 0.5]
