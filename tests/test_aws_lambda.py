"""AWS Lambda: calls, through adapters and without, are delivered when the handler returns, within its time."""

from __future__ import annotations

import asyncio
import base64
import warnings
from typing import TYPE_CHECKING, Any

import flask
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from moesif_otel import identify
from moesif_otel.asgi import MoesifMiddleware as AsgiMiddleware
from moesif_otel.aws_lambda import MoesifLogger, deliver_before_freeze
from moesif_otel.errors import MoesifConfigError
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


@pytest.fixture(autouse=True)
def _lambda_loop() -> Iterator[None]:
    """The event loop that a process on Lambda keeps between its calls; Mangum takes the thread's, and never closes it."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


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


# `MoesifLogger`: handlers that API Gateway, a function URL or a load balancer calls without an adapter.


def rest_event(**values: Any) -> dict[str, Any]:
    """An event of a REST API (payload 1.0)."""
    return {
        "resource": "/items/{id}",
        "path": "/items/ä b",
        "httpMethod": "POST",
        "headers": {"Host": "shop.example", "Content-Type": "application/json", "X-Two": "2"},
        "multiValueHeaders": {"Host": ["shop.example"], "Content-Type": ["application/json"], "X-Two": ["1", "2"]},
        "queryStringParameters": {"q": "a b"},
        "multiValueQueryStringParameters": {"q": ["1&2", "a b"]},
        "requestContext": {
            "resourcePath": "/items/{id}", "stage": "prod", "path": "/prod/items/ä b",
            "identity": {"sourceIp": "10.0.0.9", "cognitoIdentityId": None, "apiKey": None},
        },
        "body": '{"a": 1}',
        "isBase64Encoded": False,
        **values,
    }  # fmt: skip


def balancer_event(**values: Any) -> dict[str, Any]:
    """An event of an ALB's target group with multi-value headers."""
    return {
        "requestContext": {"elb": {"targetGroupArn": "arn:aws:elasticloadbalancing:…"}},
        "httpMethod": "GET",
        "path": "/items/a%20b",
        "multiValueQueryStringParameters": {"q": ["1%262", "a+b"]},
        "multiValueHeaders": {"host": ["shop.example"], "x-forwarded-for": ["10.0.0.9"], "x-forwarded-proto": ["http"]},
        "body": "",
        "isBase64Encoded": False,
        **values,
    }


@pytest.fixture
def logger(sandbox: Sandbox) -> Iterator[Any]:
    """Make a decorator; `shutdown` is at the end."""
    made: list[MoesifLogger] = []

    def make(**options: Any) -> MoesifLogger:
        made.append(MoesifLogger({"APPLICATION_ID": "l", "BASE_URI": sandbox.url, "EVENT_BATCH_TIMEOUT": 3600, **options}))
        return made[-1]

    yield make
    for one in made:
        one.shutdown()
        stats = one.stats()
        assert stats["accepted"] == stats["delivered"] + sum(stats["dropped"].values()) + stats["pending"]


def only(sandbox: Sandbox) -> dict[str, Any]:
    (event,) = sandbox.events()
    return event


RESULT = {"statusCode": 201, "headers": {"Content-Type": "application/json", "X-A": "1"}, "body": '{"b": 2}'}


def test_a_call_of_a_rest_api_is_there_when_the_handler_returns(logger: Any, sandbox: Sandbox) -> None:
    """The handler gets the very event and context, and its result passes as it is."""
    got: list[Any] = []
    result = {**RESULT, "multiValueHeaders": {"Set-Cookie": ["a=1", "b=2"]}}

    @logger()
    def handler(*arguments: Any) -> Any:
        got.append(arguments)
        return result

    given, context = rest_event(), Context()
    context.aws_request_id, context.function_name = "request-1", "shop"  # type: ignore[attr-defined]
    assert handler(given, context) is result
    assert got == [(given, context)]
    assert given == rest_event()
    event = only(sandbox)
    assert event["request"]["uri"] == "https://shop.example/items/%C3%A4%20b?q=1%262&q=a+b"
    assert event["request"]["headers"]["X-Two"] == "1, 2"
    assert event["request"]["ip_address"] == "10.0.0.9"
    assert (event["request"]["verb"], event["request"]["body"]) == ("POST", {"a": 1})
    assert (event["response"]["status"], event["response"]["body"]) == (201, {"b": 2})
    assert event["response"]["headers"]["Set-Cookie"] == "a=1, b=2"
    ours = event["metadata"]["moesif_otel"]
    assert {"route": "/items/{id}", "aws_request_id": "request-1", "function_name": "shop"}.items() <= ours.items()


def test_a_call_of_an_http_api(logger: Any, sandbox: Sandbox) -> None:
    """Payload 2.0 has cookies beside the headers, in both directions."""

    @logger()
    def handler(event: Any, context: Any) -> Any:
        return {**RESULT, "cookies": ["a=1", "b=2"]}

    handler({**gateway_event("/items", '{"a": 1}'), "routeKey": "POST /items", "cookies": ["s=1", "t=2"]}, Context())
    event = only(sandbox)
    assert event["request"]["uri"] == "https://shop.example/items?q=1"
    assert event["request"]["ip_address"] == "10.0.0.9"
    assert "t=" in event["request"]["headers"]["cookie"]
    assert event["response"]["headers"]["Set-Cookie"] == "a=1, b=2"
    assert event["metadata"]["moesif_otel"]["route"] == "/items"


@pytest.mark.parametrize(("result", "body"), [("hello", "hello"), ({"b": [2]}, {"b": [2]}), (None, None)])
def test_a_bare_result_is_the_body_of_a_200(logger: Any, sandbox: Sandbox, result: Any, body: Any) -> None:
    """As API Gateway takes it with payload 2.0."""
    assert logger()(lambda event, context: result)(gateway_event("/", ""), Context()) == result
    response = only(sandbox)["response"]
    assert response["status"] == 200
    found = response.get("body")
    assert (base64.b64decode(found).decode() if isinstance(found, str) else found) == body


def test_a_call_of_a_load_balancer(logger: Any, sandbox: Sandbox) -> None:
    """Headers in `multiValueHeaders` only, and a query that nobody has decoded."""
    handler = logger()(lambda event, context: {**RESULT, "statusCode": "201"})
    handler(balancer_event(), Context())
    event = only(sandbox)
    assert event["request"]["uri"] == "http://shop.example/items/a%20b?q=1%262&q=a+b"
    assert event["request"]["ip_address"] == "10.0.0.9"
    assert event["response"]["status"] == 201


def test_bodies_in_base64_are_recorded_as_what_they_are(logger: Any, sandbox: Sandbox) -> None:
    """In both directions."""
    text = base64.b64encode(b'{"a": 1}').decode()
    result = {**RESULT, "body": text, "isBase64Encoded": True}
    logger()(lambda event, context: result)(rest_event(body=text, isBase64Encoded=True), Context())
    event = only(sandbox)
    assert (event["request"]["body"], event["response"]["body"]) == ({"a": 1}, {"a": 1})


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (rest_event(), 502),
        (balancer_event(), 502),
        (gateway_event("/", ""), 500),
        ({**gateway_event("/", ""), "requestContext": {"domainName": "x.lambda-url.eu-west-1.on.aws", "http": {"method": "GET"}}}, 502),
    ],
)
def test_a_handler_that_raises_is_recorded_with_the_status_that_clients_get(logger: Any, sandbox: Sandbox, given: Any, status: int) -> None:
    """The error passes, and the event names its type."""

    @logger()
    def handler(event: Any, context: Any) -> Any:
        raise LookupError("secret")

    with pytest.raises(LookupError, match="secret"):
        handler(given, Context())
    event = only(sandbox)
    assert event["response"]["status"] == status
    assert event["metadata"]["moesif_otel"]["error_type"] == "LookupError"
    assert "secret" not in str(event)


@pytest.mark.parametrize("result", [None, "text", [1], {"body": "x"}, {"statusCode": "many"}, {"statusCode": None}])
def test_a_result_that_is_none_is_a_502(logger: Any, sandbox: Sandbox, result: Any) -> None:
    """What a REST API and a load balancer answer then; the handler's caller gets it all the same."""
    assert logger()(lambda event, context: result)(rest_event(), Context()) == result
    assert only(sandbox)["response"]["status"] == 502


@pytest.mark.parametrize(
    "given",
    [
        {"Records": [{"eventSource": "aws:sqs"}]},
        {"requestContext": {"eventType": "MESSAGE", "connectionId": "c"}, "body": "x"},
        {"source": "aws.events"},
        rest_event(type="REQUEST", methodArn="arn:aws:execute-api:…"),
        {**gateway_event("/", ""), "type": "REQUEST", "routeArn": "arn:aws:execute-api:…"},
        None,
        [1],
        "text",
    ],
)
def test_other_events_pass(logger: Any, sandbox: Sandbox, given: Any) -> None:
    """Queues, WebSocket messages, schedules, authorizers: no API call, no event, no error."""
    ours = logger()
    assert ours(lambda event, context: event)(given, Context()) is given
    assert sandbox.events() == []
    assert ours.stats()["errors"] == {}


ODD: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(rest_event(), ODD)),
    st.sampled_from([rest_event(), gateway_event("/", "{}"), balancer_event()]),
    ODD | st.fixed_dictionaries({}, optional=dict.fromkeys((*RESULT, "multiValueHeaders", "cookies", "isBase64Encoded"), ODD)),
)
def test_odd_events_and_results_pass(handled: Any, changes: Any, base: Any, result: Any) -> None:
    """Whatever stands in them, the handler is called and its result comes back; no more than the call is lost."""
    assert handled({**base, **changes}, result) is result


@pytest.fixture
def handled(logger: Any) -> Any:
    capture = logger()._capture

    def handle(event: Any, result: Any) -> Any:
        return capture.call(lambda event, context: result, event, Context())

    return handle


def test_callbacks_take_event_and_context(logger: Any, sandbox: Sandbox) -> None:
    """And say more than what API Gateway knows of the caller."""
    identity = {"cognitoIdentityId": "cognito", "apiKey": "key"}
    given = rest_event(requestContext={"identity": identity})
    ours = logger(
        SKIP=lambda event, context: event["path"] == "/health",
        IDENTIFY_USER=lambda event, context: event["headers"]["X-Two"],
        GET_METADATA=lambda event, context: {"left": context.get_remaining_time_in_millis()},
        GET_SESSION_TOKEN=lambda event, context: "token",
    )
    handler = ours(lambda event, context: identify(company_id="acme") or RESULT)
    handler(given, Context())
    handler(rest_event(path="/health"), Context())
    event = only(sandbox)
    assert (event["user_id"], event["company_id"], event["session_token"]) == ("2", "acme", "token")
    assert event["metadata"]["left"] == 5_000


@pytest.mark.parametrize("hidden", [True, False])
def test_api_gateway_knows_who_calls(logger: Any, sandbox: Sandbox, hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no callback says it: the user of Cognito; the API key is a credential, and not shown."""
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_VERSION", "7")
    given = rest_event(requestContext={"identity": {"cognitoIdentityId": "cognito", "apiKey": "the-key"}})
    logger(AUTO_HIDE_SENSITIVE=hidden)(lambda event, context: RESULT)(given, Context())
    event = only(sandbox)
    assert event["user_id"] == "cognito"
    assert (event["session_token"] == "the-key") is not hidden
    assert event["request"]["api_version"] == "7"


def test_without_log_body_no_body_leaves(logger: Any, sandbox: Sandbox) -> None:
    """Nor one that no client sees."""
    logger(LOG_BODY=False)(lambda event, context: RESULT)(rest_event(), Context())
    logger()(lambda event, context: RESULT)(rest_event(httpMethod="HEAD", body=None), Context())
    assert not any("body" in event[side] for event in sandbox.events() for side in ("request", "response"))


def test_a_handler_around_an_adapter_is_captured_once(logger: Any, sandbox: Sandbox) -> None:
    """No middleware is needed then; after the shutdown it serves on."""
    app = FastAPI()
    app.get("/items")(lambda: {"a": 1})
    ours = logger()
    handler = ours(Mangum(app, lifespan="off"))
    event = gateway_event("/items", "")
    event["requestContext"]["http"]["method"] = "GET"
    assert handler(event, Context())["statusCode"] == 200
    assert only(sandbox)["response"]["body"] == {"a": 1}
    ours.shutdown()
    assert handler(event, Context())["statusCode"] == 200
    assert len(sandbox.events()) == 1


def test_the_span_of_opentelemetrys_lambda_instrumentation_is_bound(logger: Any, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is around the handler and ends after the delivery: the event has its ids, from the first call on."""
    provider = TracerProvider()
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    handler = logger()(lambda event, context: RESULT)
    with trace.get_tracer("aws_lambda").start_as_current_span("handler", kind=trace.SpanKind.SERVER) as span:
        handler(rest_event(), Context())
        event = only(sandbox)
    ids = span.get_span_context()
    assert (event["trace_id"], event["span"]["id"]) == (format(ids.trace_id, "032x"), format(ids.span_id, "016x"))
    provider.shutdown()


def test_wrong_options_are_named() -> None:
    """When the function is loaded; nothing could await a coroutine."""
    with pytest.raises(MoesifConfigError, match="APPLICATION_ID"):
        MoesifLogger({})
    with pytest.raises(MoesifConfigError, match=r"IDENTIFY_USER.*\(event, context\)"):
        MoesifLogger({"APPLICATION_ID": "l", "IDENTIFY_USER": lambda event: "mary"})


def test_a_handler_is_called_as_it_was_called() -> None:
    """In tests of their own handlers people name parameters, and leave out those that have defaults."""
    assert deliver_before_freeze(lambda event: event)("alone") == "alone"
    assert deliver_before_freeze(lambda evt, ctx="default": (evt, ctx))(evt=1) == (1, "default")
    assert deliver_before_freeze(lambda event, context: context)(event=1, context=Context(-5)).remaining_millis == -5


@pytest.mark.parametrize("wrap", [deliver_before_freeze, lambda handler: MoesifLogger({"APPLICATION_ID": "l"})(handler)])
def test_what_is_no_handler_is_refused(wrap: Any) -> None:
    """When the module is loaded, not at the first call; a coroutine's result would come when the capture is over."""

    async def handler(event: Any, context: Any) -> None:
        """Return a response."""

    with pytest.raises(MoesifConfigError, match="the function that Lambda calls"):
        wrap(handler)
    with pytest.raises(MoesifConfigError, match=r"handler: got int, takes a function \(event, context\)"):
        wrap(3)
