"""The transport, against a real socket: what is on the wire, and what is not."""

from __future__ import annotations

import gzip
import json
import logging
import os
import time
import zlib

import pytest
import requests
from moesifapi.configuration import Configuration
from moesifapi.controllers.base_controller import BaseController

from moesif_otel._delivery import client
from moesif_otel._delivery.client import MoesifTransport, gzipped
from moesif_otel._delivery.outcome import BatchOutcome
from tests.delivery.delivery_kit import APPLICATION_ID, payload, settings
from tests.faults.fault_server import (
    CERTIFICATE,
    Close,
    Drip,
    FaultServer,
    Garbage,
    HalfBody,
    HalfStatusLine,
    Hang,
    Reset,
    Status,
)


@pytest.fixture
def server():
    with FaultServer() as running:
        yield running


@pytest.fixture
def transport(server):
    made = MoesifTransport(settings(base_uri=server.url))
    yield made
    made.close()


def test_a_batch_on_the_wire(server, transport) -> None:
    """One POST to /v1/events/batch: gzip JSON array in order, application id, our name; nothing of this machine."""
    answer = transport.send([payload(1), payload(2)], 5)
    assert (answer.outcome, answer.status) == (BatchOutcome.DELIVERED, 201)
    (request,) = server.requests
    assert (request.method, request.path) == ("POST", "/v1/events/batch")
    assert request.body == b"[" + payload(1) + b"," + payload(2) + b"]"
    assert request.headers["x-moesif-application-id"] == APPLICATION_ID
    assert request.headers["user-agent"].startswith("moesif-otel/")
    assert request.headers["content-type"] == "application/json; charset=utf-8"
    assert request.headers["content-encoding"] == "gzip"
    assert "authorization" not in request.headers
    assert "cookie" not in request.headers


@pytest.mark.parametrize("prefix", ["/prefix", "/prefix/", "/a/b", "/v1/odd"])
def test_base_uri_keeps_its_path(server, prefix) -> None:
    """A proxy under a path is reached under that path."""
    MoesifTransport(settings(base_uri=server.url + prefix)).send([payload(1)], 5)
    assert server.requests[0].path == prefix.rstrip("/") + "/v1/events/batch"


def test_process_wide_configuration_is_neither_obeyed_nor_changed(server, transport, monkeypatch) -> None:
    """What the application sets for its own use of `moesifapi`, an unusable address included, does not reach us."""
    for address in ("http://127.0.0.1:1", "not an address", "http://[", "", None, 5, b"x"):
        monkeypatch.setattr(Configuration, "BASE_URI", address)
        monkeypatch.setattr(Configuration, "application_id", "somebody-else")
        assert transport.send([payload(1)], 5).outcome is BatchOutcome.DELIVERED
        assert Configuration.BASE_URI == address
    assert {r.headers["x-moesif-application-id"] for r in server.requests} == {APPLICATION_ID}
    assert {r.path for r in server.requests} == {"/v1/events/batch"}


@pytest.mark.parametrize("where", ["on_before_request", "on_after_response"])
def test_a_callback_for_all_calls_of_moesifapi_costs_no_event(server, transport, monkeypatch, where) -> None:
    """The application may have set one for the process: what it raises sends a batch neither never nor twice."""

    class Callback:
        def on_before_request(self, request) -> None:
            assert where != "on_before_request"

        def on_after_response(self, context) -> None:
            assert where != "on_after_response"

    monkeypatch.setattr(BaseController, "http_call_back", Callback())
    assert transport.send([payload(1)], 5).outcome is BatchOutcome.DELIVERED
    assert len(server.requests) == 1


def test_connections_are_kept(server, transport) -> None:
    """Ten batches, refusals with bodies among them, need one connection."""
    server.script = [Status(201), Status(400, body=b"x" * 5000), Status(503, body=b"{}"), Status(201, body=b"ok")]
    for _ in range(10):
        transport.send([payload(1)], 5)
    assert server.connections == 1


def test_a_long_answer_costs_the_connection_not_our_time(server, transport) -> None:
    """Of an endless body a bounded part is read."""
    server.script = [Status(400, body=b"x" * 3_000_000)]
    assert transport.send([payload(1)], 5).outcome is BatchOutcome.ISOLATE
    assert transport.send([payload(1)], 5).outcome is BatchOutcome.DELIVERED
    assert server.connections == 2


@pytest.mark.parametrize("fault", [Hang, Reset, Close, HalfStatusLine, Garbage, lambda: Drip(0.02)])
def test_no_answer_is_a_retry_after_one_attempt(server, transport, fault) -> None:
    """Whatever goes wrong on the way: one POST, in its time, and the outcome is to try again."""
    server.script = [fault()]
    started = time.monotonic()
    answer = transport.send([payload(1)], 0.5)
    assert (answer.outcome, answer.status) == (BatchOutcome.RETRY, None)
    assert time.monotonic() - started < 5
    assert len(server.requests) == 1
    assert answer.detail
    assert "planted" not in answer.detail


def test_status_counts_though_its_body_breaks_off(server, transport) -> None:
    """201 and half a body: the server has the events; a second POST would be one too many."""
    server.script = [HalfBody(201), HalfBody(503)]
    assert transport.send([payload(1)], 5).outcome is BatchOutcome.DELIVERED
    assert transport.send([payload(1)], 5).outcome is BatchOutcome.RETRY


def test_a_dripping_body_does_not_hold_a_sender(server, transport) -> None:
    """The status has come: a body that never ends is not waited for, whatever EXPORT_TIMEOUT is."""
    server.script = [Drip(0.02, head_at_once=True)]
    started = time.monotonic()
    assert transport.send([payload(1)], 60).outcome is BatchOutcome.DELIVERED
    assert time.monotonic() - started < 20


def test_refused_connection_is_a_retry() -> None:
    """Nobody listens: at once, no print, no hidden second attempt."""
    server = FaultServer()
    server.close()
    answer = MoesifTransport(settings(base_uri=server.url)).send([payload(1)], 5)
    assert answer.outcome is BatchOutcome.RETRY
    assert "ConnectionRefusedError" in answer.detail
    assert "Connection refused" in answer.detail


@pytest.mark.parametrize(("status", "retry_after", "seconds"), [(429, "7", 7.0), (503, "Fri, 31 Dec 1999 23:59:59 GMT", 0.0), (503, "x", None)])
def test_retry_after_is_read(server, transport, status, retry_after, seconds) -> None:
    """The server's wish comes with the answer, in either form."""
    server.script = [Status(status, {"Retry-After": retry_after})]
    answer = transport.send([payload(1)], 5)
    assert (answer.status, answer.retry_after_s) == (status, seconds)


def test_tags_are_told(server) -> None:
    """Configuration and rules tags of an answer go where they are wanted, with any status."""
    told = []
    transport = MoesifTransport(settings(base_uri=server.url), on_tags=lambda *tags: told.append(tags))
    server.script = [Status(201), Status(201, {"X-Moesif-Config-ETag": "c1", "X-Moesif-Rules-Tag": "r1"}), Status(503, {"X-Moesif-Config-ETag": "c2"})]
    for _ in range(3):
        transport.send([payload(1)], 5)
    assert told == [("c1", "r1"), ("c2", None)]


def test_tags_that_nobody_can_take_cost_no_batch(server) -> None:
    """Whoever is told the tags and raises does not make a delivered batch go again."""
    transport = MoesifTransport(settings(base_uri=server.url), on_tags=lambda *_: 1 / 0)
    server.script = [Status(201, {"X-Moesif-Config-ETag": "c1"})]
    assert transport.send([payload(1)], 5).outcome is BatchOutcome.DELIVERED


def test_redirects_are_not_followed(server, transport) -> None:
    """The application id is not carried to wherever a server points."""
    with FaultServer() as elsewhere:
        server.script = [Status(301, {"Location": elsewhere.url}), Status(307, {"Location": elsewhere.url})]
        assert transport.send([payload(1)], 5).status == 301
        assert transport.send([payload(1)], 5).status == 307
        assert elsewhere.requests == []


def test_no_credentials_from_netrc_no_cookies(server, transport, tmp_path, monkeypatch) -> None:
    """`.netrc` is not for us, and what the server wants to have stored is not stored."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login planted password planted\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.script = [Status(201, {"Set-Cookie": "a=b; Path=/"})]
    transport.send([payload(1)], 5)
    transport.send([payload(1)], 5)
    for request in server.requests:
        assert "authorization" not in request.headers
        assert "cookie" not in request.headers


def test_credentials_of_base_uri_are_sent_and_not_told(server) -> None:
    """A proxy that wants a password gets the one in BASE_URI; no description of a failure has it."""
    transport = MoesifTransport(settings(base_uri=server.url.replace("//", "//planted%40user:planted-pw@")))
    transport.send([payload(1)], 5)
    assert server.requests[0].headers["authorization"] == "Basic cGxhbnRlZEB1c2VyOnBsYW50ZWQtcHc="
    server.refuse()
    assert "planted" not in transport.send([payload(1)], 5).detail


def test_proxy_of_the_environment_is_used(server, transport, monkeypatch) -> None:
    """HTTP_PROXY is obeyed as `requests` obeys it, with our deadline."""
    with FaultServer(Status(201), Hang()) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert transport.send([payload(1)], 5).outcome is BatchOutcome.DELIVERED
        assert proxy.requests[0].path == server.url + "/v1/events/batch"
        assert transport.send([payload(1)], 0.3).outcome is BatchOutcome.RETRY
        assert server.requests == []


def test_bad_certificate_is_a_retry_that_says_why() -> None:
    """A server that nobody vouches for gets no events, and the log can say why."""
    with FaultServer(tls=True) as server:
        answer = MoesifTransport(settings(base_uri=server.url)).send([payload(1)], 5)
        assert answer.outcome is BatchOutcome.RETRY
        assert "SSLCertVerificationError" in answer.detail
        assert "self-signed" in answer.detail or "self signed" in answer.detail
        assert server.requests == []


def test_tls_with_a_trusted_certificate(monkeypatch) -> None:
    """The CA bundle of the environment is used; deadlines hold under TLS as well."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(CERTIFICATE))
    with FaultServer(Status(201), Drip(0.02), tls=True) as server:
        transport = MoesifTransport(settings(base_uri=server.url))
        assert transport.send([payload(1)], 5).outcome is BatchOutcome.DELIVERED
        started = time.monotonic()
        assert transport.send([payload(1)], 0.5).outcome is BatchOutcome.RETRY
        assert time.monotonic() - started < 5
        transport.close()


def test_moesifapi_logs_nothing_of_the_answer(server, transport, caplog) -> None:
    """The client that we build on logs headers and bodies of refusals; through us it does not."""
    server.script = [Status(400, {"X-Secret": "planted-header"}, b"planted-body")]
    with caplog.at_level(logging.DEBUG):
        transport.send([payload(1)], 5)
    assert "planted" not in caplog.text


def test_after_fork_a_new_connection_is_made_and_the_old_one_left(server, transport) -> None:
    """A child shares no socket with its parent, and does not close the parent's either."""
    transport.send([payload(1)], 5)
    transport.after_fork()
    transport.send([payload(2)], 5)
    assert [r.connection for r in server.requests] == [1, 2]
    assert len(server._open) == 2


def test_post_json(server, transport) -> None:
    """Profiles and actions go to their own paths, small ones plain, larger ones compressed; each status has its outcome."""
    server.script = [Status(201), Status(201), Status(400), Close()]
    body = json.dumps({"user_id": "x" * 1000}).encode()
    assert transport.post_json("/v1/users", b'{"user_id":"1"}', 5).outcome is BatchOutcome.DELIVERED
    assert transport.post_json("/v1/users/batch", body, 5).outcome is BatchOutcome.DELIVERED
    assert transport.post_json("/v1/users", b"{}", 5).outcome is BatchOutcome.ISOLATE
    assert transport.post_json("/v1/users", b"{}", 5).outcome is BatchOutcome.RETRY
    assert [r.path for r in server.requests][:2] == ["/v1/users", "/v1/users/batch"]
    assert server.requests[0].raw_body == b'{"user_id":"1"}'
    assert server.requests[1].body == body
    assert server.requests[0].headers["content-type"] == "application/json; charset=utf-8"
    assert server.requests[0].headers["x-moesif-application-id"] == APPLICATION_ID


def test_get_json(server, transport) -> None:
    """Configuration comes with status, body (decoded) and headers; a known version is asked for by its tag."""
    zipped = gzip.compress(b'{"a":1}')
    server.script = [Status(200, {"Content-Encoding": "gzip", "X-Moesif-Config-ETag": "e"}, zipped), Status(304), Status(500, {}, b"no")]
    status, body, headers = transport.get_json("/v1/config", etag=None, timeout_s=5)
    assert (status, body, headers["x-moesif-config-etag"]) == (200, b'{"a":1}', "e")
    assert transport.get_json("/v1/config", etag="e", timeout_s=5)[:2] == (304, b"")
    assert transport.get_json("/v1/rules", etag=None, timeout_s=5)[:2] == (500, b"no")
    assert [r.headers.get("if-none-match") for r in server.requests] == [None, "e", None]
    assert [r.method for r in server.requests] == ["GET"] * 3


@pytest.mark.parametrize("fault", [Hang(), Reset(), Drip(0.02), Drip(0.0), HalfBody(200), Garbage()])
def test_get_json_raises_in_time(server, transport, fault) -> None:
    """A document that does not come whole in its time is an `OSError`, never a part of it."""
    server.script = [fault]
    with pytest.raises(OSError):
        transport.get_json("/v1/config", etag=None, timeout_s=0.5)


@pytest.mark.parametrize("module", [client._compressor_module(), zlib], ids=["here", "zlib"])
def test_gzip_is_gzip(module, monkeypatch) -> None:
    """What we compress is a gzip container whatever library did it."""
    monkeypatch.setattr(client, "_compressor_module", lambda: module)
    assert gzip.decompress(gzipped(b"x" * 100_000)) == b"x" * 100_000


def test_instrumented_requests_see_nothing_of_us(server, transport) -> None:
    """An application that instruments `requests` and `urllib3` has no span of our traffic, and our POST no traceparent."""
    from opentelemetry.instrumentation.requests import RequestsInstrumentor
    from opentelemetry.instrumentation.urllib3 import URLLib3Instrumentor
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    instrumentors = [RequestsInstrumentor(), URLLib3Instrumentor()]
    for instrumentor in instrumentors:
        instrumentor.instrument(tracer_provider=provider)
    try:
        transport.send([payload(1)], 5)
        transport.post_json("/v1/users", b"{}", 5)
        transport.get_json("/v1/config", etag=None, timeout_s=5)
        assert spans.get_finished_spans() == ()
        requests.get(server.url, timeout=5)
        assert spans.get_finished_spans()
    finally:
        for instrumentor in instrumentors:
            instrumentor.uninstrument()
    assert all("traceparent" not in r.headers for r in server.requests[:3])


def test_environment_of_the_process_is_not_kept() -> None:
    """The session holds no open file or socket after `close`."""
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with FaultServer() as server:
        transport = MoesifTransport(settings(base_uri=server.url))
        transport.send([payload(1)], 5)
        transport.close()
        transport.send([payload(1)], 5)
        transport.close()
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
