"""Outgoing calls end to end: from `requests` to a Moesif of our own."""

from __future__ import annotations

import asyncio
import base64
import gc
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from wsgiref.util import setup_testing_defaults

import aiohttp
import httpx
import pytest
import requests
import urllib3
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.requests import RequestsInstrumentor
from opentelemetry.instrumentation.urllib3 import URLLib3Instrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from moesif_otel._capture.body import CapturedBody
from moesif_otel._capture.outgoing import Route, add_route, remove_route
from moesif_otel.errors import MoesifConfigError
from moesif_otel.outgoing import StartCapture, start_capture_outgoing
from moesif_otel.processor import MoesifSpanProcessor
from moesif_otel.sandbox.server import Sandbox
from moesif_otel.settings import Settings
from moesif_otel.wsgi import MoesifMiddleware
from tests.capture.upstream import JSON, LINES

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
ORIGINAL = requests.Session.__dict__["send"]


@pytest.fixture
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture(autouse=True)
def _clean():
    yield
    for instrumentor in (RequestsInstrumentor(), URLLib3Instrumentor()):
        if instrumentor.is_instrumented_by_opentelemetry:
            instrumentor.uninstrument()
    assert requests.Session.__dict__["send"] is ORIGINAL


def options(sandbox, **more):
    return {"APPLICATION_ID": "outgoing", "BASE_URI": sandbox.url, "EVENT_BATCH_TIMEOUT": 0.05, **more}


def our_threads():
    # The sandbox runs in this process too; how many workers it takes is its own affair.
    names = sorted(thread.name for thread in threading.enumerate())
    return [name for name in names if name.startswith("moesif-otel") and "sandbox" not in name]


def test_a_call_becomes_an_event(upstream, sandbox):
    """All that a user looks for in Moesif, with the direction `Outgoing`."""
    with start_capture_outgoing(options(sandbox, API_VERSION="7")) as capture:
        requests.post(upstream.url + "/json?a=1", json={"k": [1, 2]}, headers={"X-Own": "yes"})
        assert capture.force_flush()
        (event,) = sandbox.events()
        assert capture.stats()["delivered"] == 1
    assert event["direction"] == "Outgoing"
    request, response = event["request"], event["response"]
    assert (request["verb"], request["uri"], request["body"]) == ("POST", upstream.url + "/json?a=1", {"k": [1, 2]})
    assert (request["headers"]["X-Own"], request["api_version"]) == ("yes", "7")
    assert (response["status"], response["body"]) == (200, {"name": "Möhre", "list": [1, 2, 3]})
    assert response["headers"]["Set-Cookie"] == "a=1, b=2"
    assert request["time"] <= response["time"]
    assert "metadata" not in event


def call_with(name, url):
    if name == "requests":
        requests.get(url)
    elif name == "httpx":
        httpx.get(url)
    elif name == "urllib3":
        with urllib3.PoolManager() as pool:
            pool.request("GET", url)
    else:

        async def main():
            async with aiohttp.ClientSession() as session, session.get(url) as response:
                await response.read()

        asyncio.run(main())


ALL = ("requests", "httpx", "aiohttp", "urllib3")


@pytest.mark.parametrize("clients", [None, ("httpx",), ["requests", "aiohttp"], ("urllib3",), ALL, ()])
def test_the_clients_that_are_named(upstream, sandbox, clients):
    """By default all but urllib3; after `stop()` each is as it was."""
    named = {} if clients is None else {"clients": clients}
    with start_capture_outgoing(options(sandbox), **named) as capture:
        for name in ALL:
            call_with(name, upstream.url + "/json?" + name)
        assert capture.force_flush()
    for name in ALL:
        call_with(name, upstream.url + "/json?after")
    found = sorted(event["request"]["uri"].partition("?")[2] for event in sandbox.events())
    # `requests` is built on urllib3, which is named alone here.
    expected = {None: ("requests", "httpx", "aiohttp"), ("urllib3",): ("requests", "urllib3")}.get(clients, clients) if not isinstance(clients, list) else clients
    assert found == sorted(expected)


@pytest.mark.parametrize("clients", ["requests", ("httpy",), 5, ("requests", None)])
def test_clients_that_nobody_knows(sandbox, clients):
    """A `MoesifConfigError` that names those that are known; nothing has been changed."""
    with pytest.raises(MoesifConfigError, match="requests, httpx, aiohttp, urllib3"):
        start_capture_outgoing(options(sandbox), clients=clients)


def test_no_client_is_imported_for_a_capture(sandbox):
    """It is met when the application imports it, or never."""
    code = f"""
        import sys
        from moesif_otel.outgoing import start_capture_outgoing
        capture = start_capture_outgoing({options(sandbox)!r})
        assert not {{"httpx", "aiohttp"}} & set(sys.modules), sys.modules.keys()
        import httpx
        assert hasattr(httpx.Client.send, "__wrapped__")
        capture.stop()
        assert not hasattr(httpx.Client.send, "__wrapped__")
        import aiohttp
        assert not hasattr(aiohttp.ClientSession._request, "__wrapped__")
    """
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=root, env={"PYTHONPATH": str(root)}, check=True, timeout=200)


@pytest.mark.parametrize("name", ["requests", "httpx", "aiohttp"])
def test_a_call_belongs_to_the_request_that_caused_it(upstream, sandbox, name):
    """A middleware with `CAPTURE_OUTGOING_REQUESTS` covers every client; the calls are in the request's trace."""

    def app(environ, start_response):
        call_with(name, upstream.url + "/json")
        start_response("200 OK", [])
        return [b"done"]

    middleware = MoesifMiddleware(app, options(sandbox, CAPTURE_OUTGOING_REQUESTS=True))
    environ = {}
    setup_testing_defaults(environ)
    assert list(middleware(environ, lambda *_: None)) == [b"done"]
    middleware.shutdown()
    outgoing, incoming = sorted(sandbox.events(), key=lambda event: event["direction"], reverse=True)
    assert (outgoing["direction"], incoming["direction"]) == ("Outgoing", "Incoming")
    assert outgoing["trace_id"] == incoming["trace_id"]


@pytest.mark.parametrize("name", ALL)
def test_bytes_are_given_back(upstream, sandbox, name):
    """What is kept of bodies is kept no longer than until it is delivered, whatever connection lives on."""

    def kept():
        gc.collect()
        return [one for one in gc.get_objects() if type(one) is CapturedBody and one.kept_bytes]

    before = kept()  # of tests that failed: their tracebacks hold them
    with start_capture_outgoing(options(sandbox), clients=ALL) as capture:
        call_with(name, upstream.url + "/lines")
        assert capture.force_flush()
        assert capture.stats()["held_bytes"] == 0
        assert [one for one in kept() if not any(one is other for other in before)] == []


@pytest.mark.parametrize("error", [asyncio.CancelledError, type("Timeout", (BaseException,), {})])
def test_no_exception_of_a_callback_reaches_the_caller(upstream, sandbox, error):
    """Not even one that is no `Exception`, as gevent's `Timeout`."""

    def fail(request, response):
        raise error

    with start_capture_outgoing(options(sandbox, IDENTIFY_USER_OUTGOING=fail, SKIP_OUTGOING=fail)) as capture:
        for name in ("requests", "httpx", "aiohttp"):
            call_with(name, upstream.url + "/json")
        assert capture.stats()["errors"]


def test_callbacks_and_mask(upstream, sandbox):
    """All `*_OUTGOING` options take request and response; the mask sees the event."""

    def mask(event):
        event.request.body["secret"] = "masked"
        return event

    callbacks = {
        "SKIP_OUTGOING": lambda request, response: request.path_url == "/nothing",
        "IDENTIFY_USER_OUTGOING": lambda request, response: f"{request.method} {response.status_code}",
        "IDENTIFY_COMPANY_OUTGOING": lambda request, response: response.json()["name"],
        "GET_METADATA_OUTGOING": lambda request, response: {"elapsed": response.elapsed.total_seconds() > 0},
        "GET_SESSION_TOKEN_OUTGOING": lambda request, response: request.headers["X-Session"],
        "MASK_EVENT_MODEL": mask,
    }
    with start_capture_outgoing(options(sandbox, **callbacks)) as capture:
        requests.get(upstream.url + "/nothing")
        requests.post(upstream.url + "/json", json={"secret": "s"}, headers={"X-Session": "token"})
    (event,) = sandbox.events()
    assert (event["user_id"], event["company_id"], event["session_token"]) == ("POST 200", "Möhre", "token")
    assert event["metadata"]["elapsed"] is True
    assert event["request"]["body"] == {"secret": "masked"}
    assert capture.stats()["skipped"] == 1


def test_a_failed_call(upstream, sandbox):
    """No response, the error's kind in the metadata, `None` for the callbacks' response."""
    seen = []
    said = {"IDENTIFY_USER_OUTGOING": lambda request, response: seen.append(response) or request.url}
    with start_capture_outgoing(options(sandbox, **said)):
        for url in ("http://127.0.0.1:1/x", "http://nonexistent.invalid/"):
            with pytest.raises(requests.ConnectionError):
                requests.get(url)
        with pytest.raises(requests.ReadTimeout):
            requests.get(upstream.url + "/silent", timeout=(30, 0.1))
        with requests.Session() as session:
            session.max_redirects = 2
            with pytest.raises(requests.TooManyRedirects):
                session.get(upstream.url + "/redirect/5")
    events = sandbox.events()
    assert seen == [None] * 4
    assert not any("response" in event for event in events)
    assert sorted(event["metadata"]["moesif_otel"]["error_type"] for event in events) == [
        "ConnectionError",
        "ConnectionError",
        "ReadTimeout",
        "TooManyRedirects",
    ]
    assert "http://127.0.0.1:1/x" in {event["user_id"] for event in events}


def test_bodies_in_every_coding_arrive_readable(upstream, sandbox):
    """Decoded by `requests` or as on the wire: Moesif gets the content, decoded once."""
    with start_capture_outgoing(options(sandbox)):
        requests.get(upstream.url + "/gzip")
        list(requests.get(upstream.url + "/gzip-chunked", stream=True).iter_content(100))
        requests.get(upstream.url + "/gzip", stream=True).raw.read()
    bodies = {event["response"]["body"] for event in sandbox.events()}
    (body,) = bodies
    assert base64.b64decode(body) == LINES


def test_streams(upstream, sandbox):
    """The event leaves when the body ends, is closed or dropped; at `stop`, as far as it came, callbacks included."""
    who = {"IDENTIFY_USER_OUTGOING": lambda request, response: f"{request.path_url} {response.status_code}"}
    with start_capture_outgoing(options(sandbox, **who)) as capture:
        response = requests.get(upstream.url + "/lines", stream=True)
        capture.force_flush()
        assert sandbox.events() == []
        next(response.iter_content(100))
        response.close()
        response = requests.get(upstream.url + "/chunked", stream=True)
        del response
        gc.collect()
        sandbox.wait_for_events(2)
        open_one = requests.get(upstream.url + "/gzip", stream=True)
        open_raw = requests.get(upstream.url + "/gzip?raw", stream=True).raw
    assert len(open_one.content) == len(LINES)
    assert open_raw.read()
    assert capture.stats()["errors"] == {}
    outcomes = {event["user_id"]: event["metadata"]["moesif_otel"]["outcome"] for event in sandbox.events()}
    assert outcomes == {"/lines 200": "client_aborted", "/chunked 200": "not_read", "/gzip 200": "unfinished", "/gzip?raw 200": "unfinished"}
    stats = capture.stats()
    assert (stats["accepted"], stats["delivered"], stats["held_bytes"]) == (4, 4, 0)


def test_200_calls_are_a_handful_of_posts(upstream, sandbox):
    """From eight threads, with no thread of ours a call, and each body with its own call."""
    with start_capture_outgoing(options(sandbox, EVENT_BATCH_TIMEOUT=60.0)) as capture, ThreadPoolExecutor(8) as pool:

        def call(number):
            return requests.post(upstream.url + f"/echo?{number}", json={"n": number}).json()

        list(pool.map(call, range(20)))
        threads = our_threads()
        list(pool.map(call, range(20, 200)))
        assert our_threads() == threads
        assert capture.force_flush()
    events = sandbox.events()
    assert len(events) == 200
    for event in events:
        assert event["request"]["body"] == event["response"]["body"] == {"n": int(event["request"]["uri"].partition("?")[2])}
    assert capture.stats()["batches"] <= 6


def test_starting_twice_is_harmless(upstream, sandbox):
    """One event a call, whichever stops first, with the function, the class and a middleware's capture side by side."""
    processor = MoesifSpanProcessor(options(sandbox))
    first = start_capture_outgoing(options(sandbox))
    second = StartCapture().start_capture_outgoing(options(sandbox))
    third = Route(processor.pipeline, everywhere=False)
    add_route(third)
    requests.get(upstream.url + "/json?1")
    first.stop()
    first.stop()
    requests.get(upstream.url + "/json?2")
    second.stop()
    requests.get(upstream.url + "/json?3")
    remove_route(third)
    requests.get(upstream.url + "/json?4")
    processor.shutdown()
    assert sorted(event["request"]["uri"][-1] for event in sandbox.events()) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("settings", "provider"),
    [({}, None), ({"APPLICATION_ID": ""}, None), ({"APPLICATION_ID": "x", "BATCH_SIZE": 0}, None), (None, None), ({"APPLICATION_ID": "x"}, "no provider")],
)
def test_wrong_options(settings, provider):
    """A `MoesifConfigError`, and `requests` untouched."""
    with pytest.raises(MoesifConfigError):
        start_capture_outgoing(settings, tracer_provider=provider)
    assert requests.Session.__dict__["send"] is ORIGINAL


def test_starting_starts_no_thread(sandbox):
    """Nothing runs before the first call: it may be started before a fork."""
    before = our_threads()
    with start_capture_outgoing(Settings.of(options(sandbox))):
        assert our_threads() == before


def test_our_own_traffic_is_not_captured(upstream, sandbox):
    """Also with `urllib3` and `requests` instrumented, whose spans go to an exporter that uses `requests` itself."""
    provider, spans = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=upstream.url + "/echo"), schedule_delay_millis=50))
    RequestsInstrumentor().instrument(tracer_provider=provider)
    URLLib3Instrumentor().instrument(tracer_provider=provider)
    with start_capture_outgoing(options(sandbox)) as capture:
        requests.get(upstream.url + "/json")
        capture.force_flush()
        provider.force_flush()
        capture.force_flush()
    provider.shutdown()
    assert [event["request"]["uri"] for event in sandbox.events()] == [upstream.url + "/json"]
    assert len(spans.get_finished_spans()) == 1
    assert any(request["path"] == "/echo" for request in upstream.requests)


@pytest.mark.parametrize("order", ["instrumented first", "instrumented later", "not instrumented"])
def test_spans_of_the_application(upstream, sandbox, order):
    """With a provider of the user's: one CLIENT span a call, whose ids and attributes the event has."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    if order == "instrumented first":
        RequestsInstrumentor().instrument(tracer_provider=provider)
    with start_capture_outgoing(options(sandbox), tracer_provider=provider) as capture:
        if order == "instrumented later":
            RequestsInstrumentor().instrument(tracer_provider=provider)
        with provider.get_tracer("app").start_as_current_span("work") as work:
            requests.get(upstream.url + "/redirect/1")
        capture.force_flush()
        if RequestsInstrumentor().is_instrumented_by_opentelemetry:
            RequestsInstrumentor().uninstrument()
    (event,) = sandbox.events()
    span, _work = exporter.get_finished_spans()
    assert event["trace_id"] == f"{span.context.trace_id:032x}" == f"{work.context.trace_id:032x}"
    assert event["span"]["id"] == f"{span.context.span_id:016x}"
    assert event["span"]["parent_id"] == f"{work.context.span_id:016x}"
    assert event["request"]["uri"].endswith("/json")
    assert not any("body" in name or "content" in name for name in span.attributes)
    sent = {name.lower() for name, _ in upstream.requests[-1]["headers"]}
    assert ("traceparent" in sent) is (order != "not instrumented")


def test_sampled_out(upstream, sandbox):
    """A provider that keeps no span: the event is there all the same."""
    with start_capture_outgoing(options(sandbox), tracer_provider=TracerProvider(sampler=ALWAYS_OFF)):
        requests.get(upstream.url + "/json")
    assert [event["response"]["status"] for event in sandbox.events()] == [200]


def test_a_provider_set_later_is_found(upstream, sandbox, monkeypatch):
    """The global provider may be set after the first call; spans on it are bound from then on, and none is made."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with start_capture_outgoing(options(sandbox)) as capture:
        requests.get(upstream.url + "/json?1")
        monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
        requests.get(upstream.url + "/json?2")
        assert exporter.get_finished_spans() == ()
        RequestsInstrumentor().instrument(tracer_provider=provider)
        requests.get(upstream.url + "/json?3")
        capture.force_flush()
        RequestsInstrumentor().uninstrument()
    (span,) = exporter.get_finished_spans()
    assert sandbox.events()[-1]["span"]["id"] == f"{span.context.span_id:016x}"


@pytest.mark.parametrize("provider", [None, TracerProvider()], ids=["private", "given"])
def test_inside_a_request(upstream, sandbox, provider):
    """The event of a call made inside a request is a child of the request's event; outside it is a root."""

    def app(environ, start_response):
        requests.get(upstream.url + "/json", params={"from": environ["PATH_INFO"]})
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"done"]

    middleware = MoesifMiddleware(app, options(sandbox), tracer_provider=provider)
    with start_capture_outgoing(options(sandbox, APPLICATION_ID="calls"), tracer_provider=provider):
        for path in ("/a", "/b"):
            environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "SERVER_NAME": "h", "SERVER_PORT": "80", "wsgi.url_scheme": "http"}
            assert list(middleware(environ, lambda *_: None)) == [b"done"]
        requests.get(upstream.url + "/json?outside")
    middleware.shutdown()
    served = {event["request"]["uri"][-1]: event for event in sandbox.events(application_id="outgoing")}
    made = {event["request"]["uri"][-1]: event for event in sandbox.events(application_id="calls")}
    for name in ("a", "b"):
        assert made[name]["trace_id"] == served[name]["trace_id"]
        assert made[name]["span"]["parent_id"] == served[name]["span"]["id"]
        assert made[name]["span"]["id"] != served[name]["span"]["id"]
    assert made["e"]["trace_id"] not in {event["trace_id"] for event in served.values()}
    assert made["e"]["span"].get("parent_id") is None
    assert "traceparent" not in {name.lower() for r in upstream.requests[-3:] for name, _ in r["headers"]}


def test_as_a_middleware_captures(upstream, sandbox):
    """`CAPTURE_OUTGOING_REQUESTS`: request and call are events of one pipeline, and of no other application's."""

    def app(environ, start_response):
        requests.get(upstream.url + "/json?inside")
        start_response("204 No Content", [])
        return []

    middleware = MoesifMiddleware(app, options(sandbox))
    other = MoesifSpanProcessor(options(sandbox, APPLICATION_ID="another application"))
    routes = [Route(pipeline, everywhere=False) for pipeline in (middleware._pipeline, other.pipeline)]
    for route in routes:
        add_route(route)
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "SERVER_NAME": "h", "SERVER_PORT": "80", "wsgi.url_scheme": "http"}
    list(middleware(environ, lambda *_: None))
    for route in routes:
        remove_route(route)
    middleware.shutdown()
    other.shutdown()
    made, served = sorted(sandbox.events(), key=lambda event: event["direction"], reverse=True)
    assert [made["direction"], served["direction"]] == ["Outgoing", "Incoming"]
    assert made["trace_id"] == served["trace_id"]
    assert made["span"]["parent_id"] == served["span"]["id"]


def test_nothing_is_delivered_to_a_dead_moesif_and_no_caller_waits(upstream):
    """Moesif out of reach: calls go as before, and what was lost is counted."""
    capture = start_capture_outgoing({"APPLICATION_ID": "x", "BASE_URI": "http://127.0.0.1:1", "SHUTDOWN_TIMEOUT": 0.2})
    assert requests.get(upstream.url + "/json").content == JSON
    capture.stop()
    stats = capture.stats()
    assert stats["accepted"] == sum(stats["dropped"].values()) == 1


def test_delivered_at_exit(upstream, sandbox):
    """A script that makes a call and ends, without `stop`: the event is there, also of a stream left open."""
    code = f"""
        from moesif_otel.outgoing import start_capture_outgoing
        import requests
        start_capture_outgoing({options(sandbox)!r})
        requests.get({upstream.url + "/json"!r})
        stream = requests.get({upstream.url + "/lines"!r}, stream=True)
        next(stream.iter_content(100))
    """
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=root, env={"PYTHONPATH": str(root)}, check=True, timeout=200,
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("", "")
    assert {event["request"]["uri"].rpartition("/")[2] for event in sandbox.wait_for_events(2)} == {"json", "lines"}
