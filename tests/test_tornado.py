"""The Tornado middleware, end to end: a client, a Tornado server, and a Moesif of our own."""

from __future__ import annotations

import asyncio
import functools
import gzip
import json
import logging
import socket
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import requests
from opentelemetry.instrumentation.tornado import TornadoInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, TraceIdRatioBased
from tornado import httpclient, web
from tornado.simple_httpclient import SimpleAsyncHTTPClient

from moesif_otel._capture.exchange import identify
from moesif_otel.errors import MoesifConfigError
from moesif_otel.sandbox.server import Sandbox
from moesif_otel.tornado import MoesifMiddleware, tornado_access_log
from tests.capture.tornado.serving import eventually, get, run, serving, talk


@pytest.fixture
def sandbox():
    """Give a Moesif of our own."""
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def middleware(sandbox):
    """Give a maker of middlewares that deliver to the sandbox and are ended with the test."""
    made = []

    def make(options: dict[str, Any] | None = None, tracer_provider: Any = None, **keywords: Any) -> MoesifMiddleware:
        settings = {
            "APPLICATION_ID": "tornado",
            "BASE_URI": sandbox.url,
            "EVENT_BATCH_TIMEOUT": 0.05,
            **(options or {}),
        }
        made.append(MoesifMiddleware(settings, tracer_provider, **keywords))
        return made[-1]

    yield make
    for one in made:
        one.shutdown()


class Hello(web.RequestHandler):
    def get(self) -> None:
        self.write({"msg": "Hello, world"})

    def post(self) -> None:
        self.set_status(201)
        self.write({"got": json.loads(self.request.body)})


def serve(application: web.Application, *requests: bytes) -> list[bytes]:
    """Serve the application to a client that sends the requests."""

    async def talking() -> list[bytes]:
        async with serving(application) as port:
            return [await talk(port, request) for request in requests]

    return run(talking())


def test_the_documented_use_records_a_call_with_all_callbacks(sandbox, middleware):
    """The example of moesiftornado's documentation, with our import: every callback takes the handler."""

    def mask_event(event_model: Any) -> Any:
        if "password" in event_model.request.body:
            event_model.request.body["password"] = None
        return event_model

    made = middleware(
        {
            "IDENTIFY_USER": lambda handler: "user of " + handler.request.path,
            "IDENTIFY_COMPANY": lambda handler: "my_company_id",
            "GET_SESSION_TOKEN": lambda handler: "XXXXXXXXXXXXXX",
            "SKIP": lambda handler: "health/probe" in handler.request.full_url(),
            "MASK_EVENT_MODEL": mask_event,
            "GET_METADATA": lambda handler: {"datacenter": "westus", "handler": type(handler).__name__},
        }
    )
    application = web.Application([("/", Hello), ("/health/probe", Hello)], log_function=made.log_event)
    body = b'{"name": "tea", "password": "secret"}'
    serve(application, get("/?a=1"), get("/health/probe"), get("/", method="POST", body=body))
    assert made.force_flush()
    first, second = sorted(sandbox.wait_for_events(2), key=lambda event: event["request"]["verb"])
    assert first["request"]["uri"] == "http://api.example.com:8080/?a=1"
    assert first["response"]["body"] == {"msg": "Hello, world"}
    assert first["request"]["time"] <= first["response"]["time"]
    assert (first["user_id"], first["company_id"]) == ("user of /", "my_company_id")
    assert first["session_token"] == "XXXXXXXXXXXXXX"
    assert first["metadata"]["handler"] == "Hello"
    assert second["request"]["body"] == {"name": "tea", "password": None}
    assert (second["response"]["status"], second["direction"]) == (201, "Incoming")
    assert made.stats()["accepted"] == made.stats()["delivered"] == 2


def test_batch_size_is_what_moesiftornado_documents():
    """25 by default, and the user's own if given."""
    made = [MoesifMiddleware({"APPLICATION_ID": "x"}), MoesifMiddleware({"APPLICATION_ID": "x", "BATCH_SIZE": 3})]
    assert [one.settings.batch_size for one in made] == [25, 3]
    for one in made:
        one.shutdown()


async def identify_later(handler: Any) -> str:
    """Stand for a callback that would have to be awaited."""
    return "nobody"


@pytest.mark.parametrize(
    ("options", "keywords", "named"),
    [
        ({}, {}, "APPLICATION_ID"),
        ({"APPLICATION_ID": ""}, {}, "APPLICATION_ID"),
        ({"APPLICATION_ID": "x", "BATCH_SIZE": "many"}, {}, "BATCH_SIZE"),
        ({"APPLICATION_ID": "x", "IDENTIFY_USER": identify_later}, {}, "IDENTIFY_USER"),
        ({"APPLICATION_ID": "x", "SKIP": functools.partial(identify_later)}, {}, "SKIP"),
        ({"APPLICATION_ID": "x"}, {"tracer_provider": object()}, "tracer_provider"),
        ({"APPLICATION_ID": "x"}, {"log_function": "access.log"}, "log_function"),
    ],
)
def test_what_is_wrong_is_said_at_construction(options, keywords, named):
    """A coroutine function as a callback among them: nobody could await it. Tornado is untouched."""
    before = web.RequestHandler._execute
    with pytest.raises(MoesifConfigError, match=f"^{named}: got "):
        MoesifMiddleware(options, **keywords)
    assert web.RequestHandler._execute is before


def test_callbacks_that_raise_cost_only_their_value(sandbox, middleware, caplog):
    """Counted each time, logged once a kind; a callback that gives a coroutine counts as one that raised."""

    def broken(handler: Any) -> str:
        raise ZeroDivisionError

    made = middleware({"IDENTIFY_USER": broken, "IDENTIFY_COMPANY": lambda handler: identify_later(handler)})
    serve(web.Application([("/", Hello)], log_function=made.log_event), get("/"), get("/"))
    assert made.force_flush()
    events = sandbox.wait_for_events(2)
    assert all("user_id" not in event and "company_id" not in event for event in events)
    assert made.stats()["errors"] == {"callback IDENTIFY_USER": 2, "callback IDENTIFY_COMPANY": 2}
    ours = [record for record in caplog.records if record.name.startswith("moesif_otel")]
    assert len(ours) == 2


def access_lines(caplog: Any, log_function: Any, settings: dict[str, Any] | None = None) -> list[str]:
    """Give what an application with this `log_function` writes to Tornado's access log."""
    caplog.clear()
    handlers = [("/", Hello), ("/old", web.RedirectHandler, {"url": "/"})]
    options = {} if log_function is None else {"log_function": log_function}
    with caplog.at_level(logging.INFO, logger="tornado.access"):
        serve(web.Application(handlers, **options), get("/"), get("/none"), get("/old"))
    lines = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "tornado.access"]
    return [(level, message.rpartition(" ")[0]) for level, message in lines]


def test_tornados_access_log_goes_on(caplog, middleware):
    """The same lines and levels as an application without a `log_function`, also after `stop()`."""
    plain = access_lines(caplog, None)
    assert [level for level, _ in plain] == ["INFO", "WARNING", "INFO"]
    made = middleware()
    assert access_lines(caplog, made.log_event) == plain
    made.stop()
    assert access_lines(caplog, made.log_event) == plain


def test_the_access_log_can_be_switched_off_and_replaced(caplog, middleware):
    """None writes none, a function of the user's is called, one around ours is left to log itself."""
    assert access_lines(caplog, middleware(log_function=None).log_event) == []
    handlers: list[web.RequestHandler] = []
    assert access_lines(caplog, middleware(log_function=handlers.append).log_event) == []
    assert [handler.get_status() for handler in handlers] == [200, 404, 301]
    made = middleware()

    def own(handler: web.RequestHandler) -> None:
        made.log_event(handler)

    assert access_lines(caplog, own) == []
    assert len(access_lines(caplog, lambda handler: (own(handler), tornado_access_log(handler)))) == 3


def test_what_a_log_function_raises_passes_as_without_us(caplog, sandbox, middleware):
    """The user's own function is the user's own business; the call is recorded all the same."""

    def broken(handler: web.RequestHandler) -> None:
        raise ZeroDivisionError

    def answers(log_function: Any) -> tuple[bytes, int]:
        caplog.clear()
        (raw,) = serve(web.Application([("/", Hello)], log_function=log_function), get("/"))
        return raw.partition(b"\r\n")[0], len([r for r in caplog.records if r.name.startswith("tornado")])

    made = middleware(log_function=broken)
    assert answers(made.log_event) == answers(broken)
    assert made.force_flush()
    assert len(sandbox.wait_for_events(1)) == 1


def test_log_event_never_fails_on_a_foreign_handler(middleware):
    """A handler of no application of ours, or no handler at all."""
    middleware().log_event(object())


def test_identify_and_streams_and_compression_reach_the_event(sandbox, middleware):
    """What was said inside the handler, all parts of a stream, text in place of gzip."""

    class Stream(web.RequestHandler):
        async def get(self) -> None:
            identify(user_id="said", metadata={"plan": "gold"})
            self.set_header("Content-Type", "application/json")
            self.write('{"a": "' + "x" * 2000)
            await self.flush()
            await asyncio.sleep(0)
            self.write('"}')

    made = middleware({"IDENTIFY_USER": lambda handler: "not asked"})
    application = web.Application([("/", Stream)], log_function=made.log_event, compress_response=True)
    (raw,) = serve(application, get("/", "Accept-Encoding: gzip"))
    assert b"Content-Encoding: gzip" in raw
    made.force_flush()
    (event,) = sandbox.wait_for_events(1)
    assert (event["user_id"], event["metadata"]["plan"]) == ("said", "gold")
    assert event["response"]["body"] == {"a": "x" * 2000}


def test_a_body_compressed_by_the_handler_is_decoded_for_the_event(sandbox, middleware):
    """What the handler compressed itself is decoded on our threads."""

    class ByHand(web.RequestHandler):
        def get(self) -> None:
            self.set_header("Content-Encoding", "gzip")
            self.set_header("Content-Type", "application/json")
            self.write(gzip.compress(b'{"by": "hand"}'))

    made = middleware()
    serve(web.Application([("/", ByHand)], log_function=made.log_event), get("/"))
    made.force_flush()
    (event,) = sandbox.wait_for_events(1)
    assert event["response"]["body"] == {"by": "hand"}


def test_a_server_that_is_absent_or_silent_does_not_hold_the_loop(sandbox, middleware):
    """Requests are answered while no event can be delivered, and construction waits for nobody."""
    absent = MoesifMiddleware({"APPLICATION_ID": "x", "BASE_URI": "http://127.0.0.1:9", "SHUTDOWN_TIMEOUT": 0.1})
    answers = serve(web.Application([("/", Hello)], log_function=absent.log_event), *[get("/")] * 20)
    assert all(b"200 OK" in raw for raw in answers)
    assert absent.stats()["accepted"] == 20
    assert absent.stats()["delivered"] == 0
    absent.shutdown(100)
    stats = absent.stats()
    assert stats["accepted"] == stats["delivered"] + sum(stats["dropped"].values()) + stats["pending"]


def test_two_middlewares_stay_apart(sandbox, middleware):
    """Each application's calls go to its own application id, a third application's to none."""
    a, b = middleware({"APPLICATION_ID": "a"}), middleware({"APPLICATION_ID": "b"})
    serve(web.Application([("/a", Hello)], log_function=a.log_event), get("/a"))
    serve(web.Application([("/b", Hello)], log_function=b.log_event), get("/b"))
    serve(web.Application([("/c", Hello)]), get("/c"))
    assert a.force_flush()
    assert b.force_flush()
    for one in "ab":
        (event,) = sandbox.events(application_id=one)
        assert event["request"]["uri"].endswith(one)


def test_stop_restores_tornado_and_the_application_runs_on(sandbox, middleware):
    """After the last `stop()` every method is what it was before, on a provider of the user's too."""
    methods = [
        (web.RequestHandler, "_execute"),
        (web.RequestHandler, "__init__"),
        (web.Application, "find_handler"),
        (httpclient.AsyncHTTPClient, "fetch"),
    ]
    before = [vars(owner)[name] for owner, name in methods]
    made = middleware(tracer_provider=TracerProvider())
    application = web.Application([("/", Hello)], log_function=made.log_event)
    serve(application, get("/"))
    assert all(vars(owner)[name] is not old for (owner, name), old in zip(methods, before, strict=True))
    made.stop()
    assert [vars(owner)[name] for owner, name in methods] == before
    assert b"200 OK" in serve(application, get("/"))[0]
    made.force_flush()
    assert len(sandbox.wait_for_events(1)) == 1


# The application's own telemetry.


class Downstream(web.RequestHandler):
    """Says which trace it was called in."""

    def get(self) -> None:
        self.write(self.request.headers.get("traceparent", "none"))


def caller(tracer: Any) -> type[web.RequestHandler]:
    """Make a handler with a span of its own around a call to another service."""

    class Caller(web.RequestHandler):
        async def get(self) -> None:
            with tracer.start_as_current_span("own work"):
                url = f"http://127.0.0.1:{self.get_argument('port')}/"
                client = SimpleAsyncHTTPClient(force_instance=True)
                answer = await client.fetch(url)
                client.close()
            self.write(answer.body)

    return Caller


def provider_with(sampler: Any = ALWAYS_ON) -> tuple[TracerProvider, InMemorySpanExporter]:
    """Make an application's provider, and see its spans."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=sampler)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider, exporter


async def call_through(application: web.Application, *headers: str) -> bytes:
    """Call an application that calls another one; give what that one said."""
    async with (
        serving(web.Application([("/", Downstream)], log_function=lambda handler: None)) as downstream,
        serving(application) as port,
    ):
        raw = await talk(port, get(f"/?port={downstream}", *headers))
        assert b"200 OK" in raw
        return raw.partition(b"\r\n\r\n")[2]


def test_without_a_provider_outgoing_calls_gain_no_header(sandbox, middleware):
    """No span, no `traceparent` on `AsyncHTTPClient` calls, Tornado's client untouched; the event is there."""
    provider, exporter = provider_with()
    made = middleware()
    fetch = vars(httpclient.AsyncHTTPClient)["fetch"]
    application = web.Application([("/", caller(provider.get_tracer("app")))], log_function=made.log_event)
    assert run(call_through(application)) == b"none"
    assert vars(httpclient.AsyncHTTPClient)["fetch"] is fetch
    assert [span.name for span in exporter.get_finished_spans()] == ["own work"]
    made.force_flush()
    assert len(sandbox.wait_for_events(1)) == 1


def test_with_a_provider_spans_are_the_instrumentors_and_the_event_is_the_servers(sandbox, middleware):
    """SERVER span, the handler's own below it, CLIENT below that and downstream; the event carries the first's ids."""
    provider, exporter = provider_with()
    made = middleware(tracer_provider=provider)
    application = web.Application([("/", caller(provider.get_tracer("app")))], log_function=made.log_event)
    remote = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    said = run(call_through(application, f"traceparent: {remote}")).decode()
    made.stop()
    spans = {span.name: span for span in exporter.get_finished_spans() if span.name != "GET /" or span.parent}
    server = next(
        s
        for s in exporter.get_finished_spans()
        if s.kind.name == "SERVER" and "own work" not in s.name and f"{s.parent.span_id:016x}" == "b7ad6b7169203331"
    )
    own, client = spans["own work"], spans["GET"]
    assert own.parent.span_id == server.context.span_id
    assert client.parent.span_id == own.context.span_id
    assert said == f"00-0af7651916cd43dd8448eb211c80319c-{client.context.span_id:016x}-01"
    made.force_flush()
    (event,) = sandbox.wait_for_events(1)
    assert event["span"]["id"] == f"{server.context.span_id:016x}"
    assert event["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert all("moesif" not in str(span.attributes).lower() for span in exporter.get_finished_spans())


@pytest.mark.parametrize("given", [False, True], ids=["no provider given", "the app's provider given"])
@pytest.mark.parametrize("ratio", [1.0, 0.0])
@pytest.mark.parametrize("order", ["instrumented before", "after construction", "after the first request"])
def test_an_application_with_its_own_instrumentation_is_the_same_with_and_without_us(
    sandbox, middleware, order, ratio, given
):
    """Names, kinds, parents, sampling and outgoing headers, in whatever order it is all set up."""

    def story(with_us: bool) -> tuple[Any, ...]:
        provider, exporter = provider_with(ParentBased(TraceIdRatioBased(ratio)))
        instrumentor = TornadoInstrumentor()
        if order == "instrumented before":
            instrumentor.instrument(tracer_provider=provider)
        made = middleware(tracer_provider=provider if given else None) if with_us else None
        if order == "after construction":
            instrumentor.instrument(tracer_provider=provider)
        log_function = made.log_event if made else lambda handler: None
        application = web.Application([("/", caller(provider.get_tracer("app")))], log_function=log_function)
        if order == "after the first request":
            run(call_through(application))
            exporter.clear()
            instrumentor.instrument(tracer_provider=provider)
        try:
            said = [run(call_through(application)) for _ in range(2)]
        finally:
            instrumentor.uninstrument()
            if made:
                made.force_flush()
                made.stop()
        finished = exporter.get_finished_spans()
        by_id = {span.context.span_id: span for span in finished}
        told = [
            (
                span.name,
                span.kind,
                by_id[span.parent.span_id].name if span.parent else None,
                span.attributes.get("http.status_code"),
            )
            for span in finished
        ]
        return sorted(map(str, told)), [raw.rpartition(b"-")[2] for raw in said]

    assert story(with_us=True) == story(with_us=False)
    # The event does not depend on sampling.
    assert len(sandbox.wait_for_events(2)) >= 2


def test_the_global_provider_is_used_if_it_is_one_of_the_sdk(sandbox):
    """Set up in any order before the first request; request metrics stay the application's own business."""
    program = """
        import asyncio, json, sys
        from opentelemetry import metrics, trace
        from opentelemetry.instrumentation.tornado import TornadoInstrumentor
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        from tornado import web
        from moesif_otel.tornado import MoesifMiddleware
        from tests.capture.tornado.serving import get, run, serving, talk

        class Hello(web.RequestHandler):
            def get(self):
                self.write("hello")

        middleware = MoesifMiddleware({"APPLICATION_ID": "global", "BASE_URI": sys.argv[1]})
        application = web.Application([("/", Hello)], log_function=middleware.log_event)
        exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
        metrics.set_meter_provider(MeterProvider([reader]))

        async def serve():
            async with serving(application) as port:
                await talk(port, get("/"))
        run(serve())
        def http_metrics():
            data = reader.get_metrics_data()
            scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics] if data else []
            return [metric.name for scope in scopes for metric in scope.metrics if metric.name.startswith("http.")]
        recorded = http_metrics()
        server = [s.kind.name for s in exporter.get_finished_spans()]
        TornadoInstrumentor().instrument()
        run(serve())
        print(json.dumps([server, recorded, len(exporter.get_finished_spans()), middleware.force_flush(),
                          "http.server.duration" in http_metrics()]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), sandbox.url],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [["SERVER"], [], 2, True, True]
    assert len(sandbox.wait_for_events(2)) == 2


def test_a_client_that_leaves_and_a_websocket_are_delivered_at_once(sandbox, middleware):
    """Their spans end late or never; the events do not wait for them."""
    from tornado import websocket

    class Waiting(web.RequestHandler):
        async def get(self) -> None:
            self.write("begun")
            await self.flush()
            await asyncio.Event().wait()

    class Socket(websocket.WebSocketHandler):
        pass

    provider, _ = provider_with()
    made = middleware(tracer_provider=provider)

    async def serve() -> None:
        application = web.Application([("/", Waiting), ("/ws", Socket)], log_function=made.log_event)
        async with serving(application) as port:
            socket = await websocket.websocket_connect(f"ws://127.0.0.1:{port}/ws")
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(get("/"))
            await reader.readuntil(b"begun")
            writer.close()
            await eventually(lambda: made.stats()["accepted"] == 2)
            socket.close()

    run(serve())
    made.force_flush()
    events = {event["response"]["status"]: event for event in sandbox.wait_for_events(2)}
    assert set(events) == {101, 200}
    assert "client_aborted" in json.dumps(events[200]["metadata"])


def test_a_rule_of_moesif_blocks_a_call(sandbox, middleware):
    """Rules arrive within a poll of the first event; the blocked call is answered by the rule, logged and recorded."""
    sandbox.put_rules(
        [
            {
                "_id": "rule-of-tornado",
                "type": "regex",
                "block": True,
                "regex_config": [{"conditions": [{"path": "request.route", "value": ".*/secret.*"}]}],
                "response": {"status": 451, "headers": {"X-Why": "law"}, "body": {"error": "not here"}},
            }
        ]
    )
    logged: list[int] = []
    made = middleware(log_function=lambda handler: logged.append(handler.get_status()))

    async def until_blocked() -> bytes:
        application = web.Application([("/.*", Hello)], log_function=made.log_event)
        async with serving(application) as port:
            while True:
                assert b"200 OK" in await talk(port, get("/open"))
                raw = await talk(port, get("/secret"))
                if raw.startswith(b"HTTP/1.1 451"):
                    return raw
                await asyncio.sleep(0.01)

    raw = run(until_blocked())
    assert b"\r\nX-Why: law\r\n" in raw
    assert json.loads(raw.partition(b"\r\n\r\n")[2]) == {"error": "not here"}
    assert logged[-1] == 451
    made.force_flush()
    blocked = [event for event in sandbox.events() if event["response"]["status"] == 451]
    assert [event["blocked_by"] for event in blocked] == ["rule-of-tornado"]
    assert blocked[0]["response"]["body"] == {"error": "not here"}


USER = {"user_id": "12345", "company_id": "67890", "campaign": {"utm_source": "google"}, "metadata": {"plan": "gold"}}


def test_profile_calls_work_outside_and_inside_the_event_loop(sandbox, middleware):
    """The documented calls; inside a handler nothing waits for the network, and the profile is delivered all the same."""
    made = middleware()
    assert made.update_user(USER)
    assert made.update_company({"company_id": "67890", "company_domain": "acmeinc.com"})

    class SigningUp(web.RequestHandler):
        def get(self) -> None:
            self.write({"taken": made.update_users_batch([{"user_id": "a"}, {"user_id": "b"}])})

    (raw,) = serve(web.Application([("/", SigningUp)], log_function=made.log_event), get("/"))
    assert raw.endswith(b'{"taken": true}')
    assert made.force_flush()
    assert {user["user_id"] for user in sandbox.profiles("users")} == {"12345", "a", "b"}
    with pytest.raises(ValueError, match="user_id"):
        made.update_user({"company_id": "67890"})


def test_profile_calls_on_the_loop_do_not_wait_for_a_silent_server(middleware):
    """A server that takes the connection and never answers: the loop turns on."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        made = MoesifMiddleware(
            {"APPLICATION_ID": "x", "BASE_URI": f"http://127.0.0.1:{silent.getsockname()[1]}", "SHUTDOWN_TIMEOUT": 0.1}
        )

        async def tell() -> bool:
            return made.update_user(USER)

        assert run(tell())
        made.shutdown(100)


def test_outgoing_requests_are_captured_where_asked_for(sandbox, middleware):
    """CAPTURE_OUTGOING_REQUESTS: calls made with `requests` inside a handler are events of their own; `stop` ends it."""
    send = requests.Session.send
    made = middleware({"CAPTURE_OUTGOING_REQUESTS": True})

    async def call() -> None:
        async with serving(web.Application([("/", Downstream)], log_function=lambda handler: None)) as downstream:
            url = f"http://127.0.0.1:{downstream}/"

            class Calling(web.RequestHandler):
                async def get(self) -> None:
                    answer = await asyncio.to_thread(requests.get, url, timeout=5)
                    self.write(answer.text)

            async with serving(web.Application([("/", Calling)], log_function=made.log_event)) as port:
                assert (await talk(port, get("/"))).endswith(b"none")

    run(call())
    assert made.force_flush()
    events = {event["direction"]: event for event in sandbox.wait_for_events(2)}
    assert events["Outgoing"]["trace_id"] == events["Incoming"]["trace_id"]
    assert events["Outgoing"]["response"]["status"] == 200
    made.stop()
    assert requests.Session.send is send
