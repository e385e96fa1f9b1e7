"""Capture of `urllib3` itself, where it is named; what other clients send through it is theirs."""

from __future__ import annotations

import gc
import inspect
import io
import weakref
from collections import deque

import pytest
import requests
import urllib3
from opentelemetry.instrumentation.urllib3 import URLLib3Instrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from moesif_otel._capture.exchange import Outcome
from tests.capture.upstream import JSON, LINES, capturing

ORIGINAL = vars(urllib3.HTTPConnectionPool)["urlopen"]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def _clean():
    yield
    assert vars(urllib3.HTTPConnectionPool)["urlopen"] is ORIGINAL


def outline(response):
    return response.status, [p for p in response.headers.items() if p[0] != "Date"], type(response).__name__, response.tell()


def whole(response):
    return outline(response), response.data, response.geturl()


SCENARIOS = {
    "get": lambda pool, url: whole(pool.request("GET", url + "/json")),
    "gzip": lambda pool, url: pool.request("GET", url + "/gzip").data,
    "redirects": lambda pool, url: whole(pool.request("POST", url + "/redirect/2", body=b"x")),
    "file": lambda pool, url: pool.request("POST", url + "/echo", body=io.BytesIO(b"from a file")).data,
    "generator": lambda pool, url: pool.request("POST", url + "/echo", body=(piece for piece in [b"one", b"two"])).data,
    "form": lambda pool, url: len(pool.request("POST", url + "/echo", fields={"a": "1"}, multipart_boundary="abc").data) > 20,
    "file again": lambda pool, url: pool.request("POST", url + "/redirect-echo", body=io.BytesIO(b"again")).data,
    "keyword": lambda pool, url: pool.urlopen(method="GET", url=url + "/json").data,
    "stream": lambda pool, url: b"".join(pool.request("GET", url + "/chunked", preload_content=False).stream(100)),
    "raw": lambda pool, url: pool.request("GET", url + "/gzip", preload_content=False).read(decode_content=False),
    "dropped": lambda pool, url: pool.request("GET", url + "/drop", retries=1),
    "refused": lambda pool, url: pool.request("GET", "http://127.0.0.1:1/", retries=False),
    "cut": lambda pool, url: pool.request("GET", url + "/short", retries=False),
}


def run(name, upstream):
    upstream.requests.clear()
    with urllib3.PoolManager() as pool:
        try:
            result = SCENARIOS[name](pool, upstream.url)
        except Exception as error:
            result = type(error), [type(one) for one in (error.__cause__, error.__context__)]
    return result, [(r["method"], r["path"], r["headers"], r["body"]) for r in upstream.requests]


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_caller_gets_the_same(upstream, name):
    """Bytes, exceptions, and what goes over the wire."""
    without = run(name, upstream)
    with capturing(clients=("urllib3",)) as pipeline:
        with_us = run(name, upstream)
    assert with_us == without
    assert pipeline.exchanges


def test_a_call_is_captured(upstream):
    """Request and response; a hop each."""
    with capturing(clients=("urllib3",)) as pipeline, urllib3.PoolManager() as pool:
        pool.request("POST", upstream.url + "/redirect-echo", body=b"body", headers={"X-Own": "y"})
        list(pool.request("GET", upstream.url + "/chunked", preload_content=False).stream(100))
    moved, echoed, stream = pipeline.exchanges
    assert (moved.status, moved.url, moved.request_body.data()) == (307, upstream.url + "/redirect-echo", b"body")
    assert (echoed.method, echoed.response_body.data(), ("X-Own", "y") in echoed.request_headers) == ("POST", b"body", True)
    assert (stream.response_body.data(), stream.outcome) == (LINES, Outcome.COMPLETE)
    request, response = pipeline.seen_by_callbacks[1]
    assert (request.method, request.body, response.status, response.data) == ("POST", b"body", 200, b"body")


def test_a_pool_without_a_host(upstream):
    """Somebody's own pool, to a socket of its own making, may have none: its calls go out as they did."""

    class Pool(urllib3.HTTPConnectionPool):
        host = None

        def __init__(self, url):
            super().__init__("127.0.0.1", int(url.rpartition(":")[2]))
            self.__dict__.pop("host", None)

        def _get_conn(self, timeout=None):
            return urllib3.connection.HTTPConnection("127.0.0.1", self.port)

    with capturing(clients=("urllib3",)) as pipeline, Pool(upstream.url) as pool:
        response = pool.urlopen("GET", "/json", assert_same_host=False)
    assert (response.status, response.data) == (200, JSON)
    assert pipeline.only.status == 200


def test_a_stream_that_is_forgotten(upstream):
    """Garbage collection ends it."""
    with capturing(clients=("urllib3",)) as pipeline, urllib3.PoolManager() as pool:
        response = pool.request("GET", upstream.url + "/big/1000000", preload_content=False)
        response.read(10)
        del response
        gc.collect()
        pipeline.run_late()
    assert pipeline.only.outcome is Outcome.DROPPED


def test_requests_is_recorded_once(upstream):
    """With both clients named, a call of `requests` is one call: its own."""
    with capturing(clients=("requests", "urllib3")) as pipeline:
        requests.get(upstream.url + "/redirect/2")
        list(requests.get(upstream.url + "/chunked", stream=True).iter_content(100))
        urllib3.request("GET", upstream.url + "/json") if hasattr(urllib3, "request") else None
    assert [e.url.rpartition("/")[2] for e in pipeline.exchanges][:2] == ["json", "chunked"]
    assert [e.response_body.data() for e in pipeline.exchanges] == [JSON, LINES, JSON]


@pytest.mark.parametrize("first", ["us", "them"])
def test_with_the_instrumentor_in_any_order(upstream, first):
    """Its spans are what they were, and its `uninstrument` takes its layer away, and not ours."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    if first == "them":
        URLLib3Instrumentor().instrument(tracer_provider=provider)
    with capturing(clients=("urllib3",)) as pipeline, urllib3.PoolManager() as pool:
        if first == "us":
            URLLib3Instrumentor().instrument(tracer_provider=provider)
        pool.request("GET", upstream.url + "/json")
        assert (len(exporter.get_finished_spans()), len(pipeline.exchanges)) == (1, 1)
        URLLib3Instrumentor().uninstrument()
        pool.request("GET", upstream.url + "/json")
        assert (len(exporter.get_finished_spans()), len(pipeline.exchanges)) == (1, 2)


def test_the_place_that_we_stand_at():
    """A release of urllib3 that moves it fails here, by name."""
    assert list(inspect.signature(urllib3.HTTPConnectionPool.urlopen).parameters)[:5] == ["self", "method", "url", "body", "headers"]


@pytest.mark.parametrize("preload", [True, False])
def test_a_body_goes_when_its_caller_drops_it(upstream, preload):
    """At once, and with it the file or the connection that it has open: nothing of ours leads back to it."""

    class File(io.BytesIO):
        pass

    with capturing(clients=("urllib3",)) as pipeline, urllib3.PoolManager() as pool:
        body = File(b"from a file")
        kept = weakref.ref(body)
        pipeline.seen_by_callbacks = deque(maxlen=0)
        gc.disable()
        try:
            response = pool.request("POST", upstream.url + "/echo", body=body, preload_content=preload)
            del body
            assert kept() is None
        finally:
            gc.enable()
        assert response.data == b"from a file"
    assert pipeline.only.request_body.data() == b"from a file"
