"""What is captured of calls made with `requests`."""

from __future__ import annotations

import gc
import gzip
import io
import ssl
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.instrumentation.utils import suppress_http_instrumentation, suppress_instrumentation

from moesif_otel._capture.exchange import Exchange, Outcome, current_exchange
from moesif_otel._capture.outgoing import _is_below, cause_of, sent_url
from moesif_otel._capture.requests.facts import TEXT_ENCODING
from tests.capture.upstream import (
    JSON,
    LINES,
    URLLIB3_1,
    RecordingPipeline,
    Upstream,
    capturing,
    make_certificate,
)

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


def test_a_plain_call(upstream):
    """Method, URL, headers as sent, body, status, headers with repetitions apart, response body, times, callbacks."""
    with capturing() as pipeline:
        response = requests.post(upstream.url + "/json", params={"q": "ä"}, json={"a": 1}, headers={"X-Own": "1"})
    seen = pipeline.only
    assert (seen.direction, seen.method, seen.url) == ("Outgoing", "POST", upstream.url + "/json?q=%C3%A4")
    assert {("X-Own", "1"), ("Content-Type", "application/json"), ("Content-Length", "8")} <= set(seen.request_headers)
    assert seen.request_body.data() == b'{"a": 1}'
    assert (seen.status, seen.response_body.data()) == (200, JSON)
    assert [pair for pair in seen.response_headers if pair[0] == "Set-Cookie"] == [
        ("Set-Cookie", "a=1"),
        ("Set-Cookie", "b=2"),
    ]
    assert seen.outcome is Outcome.COMPLETE
    assert 0 < seen.started_ns <= seen.ended_ns
    assert pipeline.seen_by_callbacks == [(response.request, response)]
    assert (seen.notes, seen.error_type) == ({}, None)


@pytest.mark.parametrize(
    ("body", "captured"),
    [
        ({"data": {"a": "1", "b": "ü"}}, b"a=1&b=%C3%BC"),
        ({"data": "text ü"}, "text ü".encode(TEXT_ENCODING)),
        ({"data": b"bytes"}, b"bytes"),
        ({"data": bytearray(b"array")}, b"array"),
        ({"data": memoryview(b"view")}, b"view"),
        ({"json": [1]}, b"[1]"),
        ({}, b""),
    ],
)
def test_request_bodies_in_memory(upstream, body, captured):
    """Each kind of body that is there as a whole is captured as it is sent."""
    with capturing() as pipeline:
        requests.post(upstream.url + "/echo", **body)
    assert pipeline.only.request_body.data() == captured == upstream.requests[-1]["body"]
    assert pipeline.only.request_body.total_bytes == len(captured)


def test_multipart_form(upstream):
    """A form with a file, which `requests` puts together in memory."""
    with capturing() as pipeline:
        requests.post(upstream.url + "/echo", files={"f": ("n.txt", io.BytesIO(b"content"))}, data={"k": "v"})
    assert b'filename="n.txt"' in pipeline.only.request_body.data()
    assert pipeline.only.request_body.data() == upstream.requests[-1]["body"]


@pytest.mark.parametrize("body", [b"x" * 5_000, "x" * 5_000, "ü" * 5_000, bytearray(b"x" * 5_000)], ids=["bytes", "ascii", "text", "array"])
def test_long_bodies_are_cut_and_their_size_is_true(upstream, body):
    """Only the captured part is kept, of the request and of the response."""
    with capturing(REQUEST_MAX_BODY_SIZE=1_000, RESPONSE_MAX_BODY_SIZE=500) as pipeline:
        requests.post(upstream.url + "/echo", data=body)
    sent = upstream.requests[-1]["body"]
    request, response = pipeline.only.request_body, pipeline.only.response_body
    assert (request.data(), request.total_bytes, request.truncated) == (sent[:1_000], len(sent), True)
    assert (response.data(), response.total_bytes, response.truncated) == (sent[:500], len(sent), True)
    assert pipeline.budget.held_bytes == 1_500


def test_no_bodies_with_log_body_outgoing_false(upstream):
    """`LOG_BODY_OUTGOING: False`: no body is held, and files and streams are not even looked at."""
    with capturing(LOG_BODY_OUTGOING=False) as pipeline:
        requests.post(upstream.url + "/echo", data=io.BytesIO(b"secret"))
        response = requests.get(upstream.url + "/lines", stream=True)
        assert response.raw.read() == LINES
    assert [(e.request_body, e.response_body) for e in pipeline.exchanges] == [(None, None)] * 2
    assert pipeline.budget.held_bytes == 0


def test_redirects_are_one_call(upstream):
    """One exchange for the final response: its URL and method, the first hop's start, how many redirects there were."""
    with capturing() as pipeline:
        response = requests.post(upstream.url + "/redirect/2?status=303", data=b"sent to the first")
    seen = pipeline.only
    assert (seen.method, seen.url, seen.notes) == ("GET", upstream.url + "/json", {"redirects": 2})
    assert (seen.request_body.data(), seen.request_body.total_bytes) == (b"", 0)
    assert dict(upstream.requests[-1]["headers"]).items() >= dict(seen.request_headers).items()
    assert pipeline.seen_by_callbacks == [(response.request, response)]
    assert pipeline.budget.held_bytes == len(JSON)


def test_a_redirect_that_sends_the_body_again(upstream):
    """307 with a file: the body is recorded once, as the final request sent it."""
    with capturing() as pipeline:
        response = requests.post(upstream.url + "/redirect-echo", data=io.BytesIO(b"twice on the wire"))
    assert response.content == b"twice on the wire"
    assert pipeline.only.request_body.data() == b"twice on the wire"
    assert pipeline.only.request_body.total_bytes == 17
    assert isinstance(response.request.body, io.BytesIO)
    assert isinstance(response.history[0].request.body, io.BytesIO)


def test_redirects_followed_by_hand_are_calls_of_their_own(upstream):
    """`allow_redirects=False`: what the user sends is what is recorded."""
    with capturing() as pipeline, requests.Session() as session:
        first = session.get(upstream.url + "/redirect/1", allow_redirects=False)
        session.send(first.next)
    assert [e.status for e in pipeline.exchanges] == [302, 200]


@pytest.mark.parametrize(
    ("path", "options", "error", "cause"),
    [
        ("http://127.0.0.1:1/", {}, "ConnectionError", "ConnectionRefusedError"),
        ("http://nonexistent.invalid/", {}, "ConnectionError", "gaierror"),
        ("/silent", {"timeout": (30, 0.1)}, "ReadTimeout", "TimeoutError"),
        ("/drop", {}, "ConnectionError", "RemoteDisconnected"),
        ("/redirect/9?status=302", {}, "TooManyRedirects", None),
        ("/redirect/1?to=http://127.0.0.1:1/gone", {}, "ConnectionError", "ConnectionRefusedError"),
        ("/reset", {}, "ChunkedEncodingError", "ConnectionResetError"),
        ("/not-gzip", {}, "ContentDecodingError", "error"),
        ("gopher://x/", {}, "InvalidSchema", None),
        ("/json", {"proxies": {"http": "http://127.0.0.1:1"}}, "ProxyError", "ConnectionRefusedError"),
    ],
)
def test_failed_calls(upstream, path, options, error, cause):
    """Raised to the caller, recorded without a response, with the error's kind and what lay at the bottom."""
    with capturing() as pipeline, requests.Session() as session:
        session.max_redirects = 3
        with pytest.raises(requests.RequestException) as caught:
            session.get(path if ":" in path[:8] else upstream.url + path, **options)
    seen = pipeline.only
    assert type(caught.value).__name__ == error == seen.error_type
    assert (seen.status, seen.response_headers, seen.outcome) == (None, [], Outcome.FAILED)
    if path != "/reset" and not URLLIB3_1:  # reset or closed, as the kernel's timing has it; 1 names its own alone
        assert seen.notes.get("error_cause") == cause
    (request, response), = pipeline.seen_by_callbacks  # fmt: skip
    assert response is None
    assert isinstance(request, requests.PreparedRequest)
    if "gone" in path:
        assert seen.url == "http://127.0.0.1:1/gone"


def test_the_cause_is_never_what_the_caller_was_handling():
    """A call made in an `except` block: the exception handled there is not its cause."""
    try:
        raise KeyError("unrelated")
    except KeyError:
        with pytest.raises(requests.ConnectionError) as caught:
            requests.get("http://127.0.0.1:1/")
    assert cause_of(caught.value) == ("NewConnectionError" if URLLIB3_1 else "ConnectionRefusedError")


def test_tls(tmp_path):
    """An upstream with a certificate of a CA of ours: trusted, and not trusted."""
    ca, both = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    with Upstream(context) as server, capturing() as pipeline:
        assert requests.get(server.url + "/gzip", verify=str(ca)).content == LINES
        with requests.get(server.url + "/chunked", verify=str(ca), stream=True) as response:
            assert b"".join(response.iter_content(100)) == LINES
        with pytest.raises(requests.exceptions.SSLError):
            requests.get(server.url + "/gzip")
    trusted, streamed, refused = pipeline.exchanges
    assert trusted.url.startswith("https://localhost:")
    assert trusted.response_body.data() == streamed.response_body.data() == LINES
    assert (refused.error_type, refused.notes) == ("SSLError", {"error_cause": "SSLCertVerificationError"})


@pytest.mark.parametrize(
    ("path", "read", "decoded"),
    [
        ("/gzip", lambda r: list(r.iter_content(100)), True),
        ("/gzip-chunked", lambda r: list(r.iter_lines()), True),
        ("/gzip", lambda r: r.content, True),
        ("/gzip", lambda r: r.raw.read(), False),
        ("/gzip-chunked", lambda r: r.raw.read(), False),
        ("/gzip", lambda r: r.raw.read(decode_content=True), True),
        ("/gzip-chunked", lambda r: list(r.raw.stream(50)), False),
        ("/lines", lambda r: r.raw.read(), False),
        ("/until-close", lambda r: list(r.iter_content(100)), False),
        ("/unknown-coding", lambda r: r.content, False),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_decoded_or_as_on_the_wire(upstream, path, read, decoded, stream):
    """The captured body says whether its content coding was undone: nobody decodes it twice."""
    with capturing() as pipeline:
        response = requests.get(upstream.url + path, stream=stream)
        read(response)
    body = pipeline.only.response_body
    if stream:
        assert body.decoded is decoded
    data = body.data()
    if not body.decoded and "gzip" in path:
        data = gzip.decompress(data)
    assert data == (b"opaque" if "unknown" in path else LINES)


@pytest.mark.parametrize("path", ["/lines", "/chunked", "/gzip", "/gzip-chunked", "/until-close"])
@pytest.mark.parametrize(
    ("end", "outcome"),
    [("read", Outcome.COMPLETE), ("close", Outcome.ABORTED), ("with", Outcome.ABORTED), ("drop", Outcome.DROPPED)],
)
def test_ends_of_a_stream(upstream, path, end, outcome):
    """The event leaves when the body ends, is closed, or its response is garbage, with what had been read."""
    with capturing() as pipeline:
        response = requests.get(upstream.url + path, stream=True)
        pieces = response.iter_content(50)
        read = next(pieces)
        assert (pipeline.exchanges, pipeline.late) == ([], [])
        if end == "read":
            read += b"".join(pieces)
        elif end == "close":
            response.close()
        elif end == "with":
            with response:
                pass
        del pieces, response
        gc.collect()
        pipeline.run_late()
    seen = pipeline.only
    assert seen.outcome is outcome
    assert seen.response_body.data()[: len(read)] == read[: seen.response_body.kept_bytes]
    assert (seen.status, seen.is_open) == (200, False)


def test_a_body_whose_last_byte_was_read_is_complete_at_once(upstream):
    """No last, empty read is needed: a caller that reads exactly the length need not do more."""
    with capturing() as pipeline:
        response = requests.get(upstream.url + "/lines", stream=True)
        response.raw.read(len(LINES))
        assert pipeline.only.outcome is Outcome.COMPLETE
        response.close()
    assert pipeline.only.response_body.data() == LINES


def test_responses_without_a_body_are_complete_at_the_headers(upstream):
    """HEAD, 204 and an empty body with `stream=True`: there is nothing to wait for."""
    with capturing() as pipeline:
        kept = [
            requests.head(upstream.url + "/lines", stream=True),
            requests.get(upstream.url + "/empty", stream=True),
            requests.get(upstream.url + "/nothing", stream=True),
        ]
        assert [e.outcome for e in pipeline.exchanges] == [Outcome.COMPLETE] * len(kept)


def test_a_body_that_breaks_off(upstream):
    """The status stands, what came is kept, the error is named."""
    with capturing() as pipeline:
        response = requests.get(upstream.url + "/bad-chunk", stream=True)
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            list(response.iter_content(None))
    seen = pipeline.only
    assert (seen.status, seen.outcome, seen.response_body.data()) == (200, Outcome.FAILED, b"first")
    assert seen.error_type in {"InvalidChunkLength", "ProtocolError"}


def test_callbacks_may_make_calls_which_are_not_captured(upstream):
    """A callback that asks an API who the user is does not call itself without end."""
    with capturing() as pipeline:
        pipeline.while_callbacks_run = lambda request, response: requests.get(upstream.url + "/json")
        requests.get(upstream.url + "/lines")
        list(requests.get(upstream.url + "/lines", stream=True).iter_content(100))
        pipeline.while_callbacks_run = lambda request, response: None
        requests.get(upstream.url + "/gzip")
    assert [e.url.rpartition("/")[2] for e in pipeline.exchanges] == ["lines", "lines", "gzip"]


def test_our_own_and_every_exporters_traffic_is_left_alone(upstream):
    """Suppressed instrumentation means an exporter at work; suppressed HTTP instrumentation means a span is there."""
    with capturing(BASE_URI=upstream.url + "/moesif") as pipeline:
        with suppress_instrumentation():
            requests.get(upstream.url + "/json")
        requests.post(upstream.url + "/json", headers={"x-moesif-application-id": "anybody's"})
        with pytest.raises(requests.ConnectionError):  # the upstream has no such page
            requests.post(upstream.url + "/moesif/v1/events")
        assert pipeline.exchanges == []
        with suppress_http_instrumentation():
            requests.get(upstream.url + "/json")
        assert len(pipeline.exchanges) == 1


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://api.moesif.net/v1/events", True),
        ("https://api.moesif.net", True),
        ("https://api.moesif.net?x", True),
        ("HTTPS://API.moesif.net/v1", True),
        ("https://api.moesif.network/v1", False),
        ("https://api.moesif.net.example/v1", False),
        ("https://example/?u=https://api.moesif.net/v1", False),
    ],
)
def test_calls_to_moesif_are_known(url, expected):
    """By address, up to the end of the host: names that only begin the same are other people's."""
    assert _is_below(url, "https://api.moesif.net") is expected


@pytest.mark.parametrize(
    ("given_url", "sent"),
    [
        ("https://user:pw@host:1/p?q#f", "https://host:1/p?q#f"),
        ("https://host/p@q", "https://host/p@q"),
        ("https://user@[::1]:80/p", "https://[::1]:80/p"),
    ],
)
def test_credentials_in_a_url_are_not_part_of_it(given_url, sent):
    """They go over the wire as a header, not in the URL, and so they do here."""
    request = requests.PreparedRequest()
    request.url = given_url
    assert sent_url(request.url) == sent


def test_digest_authentication_is_one_call(upstream):
    """`HTTPDigestAuth` sends again through the adapter, inside the call."""
    with capturing() as pipeline:
        requests.get(upstream.url + "/status/401", auth=requests.auth.HTTPDigestAuth("u", "p"))
    assert pipeline.only.notes == {}


def test_calls_made_inside_a_call(upstream):
    """A hook's own calls are calls; their outer Exchange is the call they are made in; hops are none."""
    outers = []

    def hook(response, **_):
        if response.request.path_url == "/redirect/1":
            with requests.Session() as other:
                other.get(upstream.url + "/lines")
        outers.append(current_exchange.get())

    with capturing() as pipeline, requests.Session() as session:
        session.get(upstream.url + "/redirect/1", hooks={"response": hook})
    inner, outer = pipeline.exchanges
    assert (inner.url, outer.url) == (upstream.url + "/lines", upstream.url + "/json")
    assert set(outers) == {outer}
    assert current_exchange.get() is None


def test_hooks_that_send_again_through_the_same_session(upstream):
    """A token refresh: the refresh and the second try are calls of their own, streamed or not."""
    for stream in (False, True):
        with capturing() as pipeline, requests.Session() as session:

            def refresh(response, *, session=session, stream=stream, **_):
                if response.status_code == 401:
                    session.post(upstream.url + "/json", data=b"token please")
                    again = response.request.copy()
                    again.hooks, again.url = {}, upstream.url + "/lines"
                    return session.send(again, stream=stream)
                return None

            response = session.get(upstream.url + "/status/401", hooks={"response": refresh}, stream=stream)
            assert response.content == LINES
        paths = [e.url.rpartition("/")[2] for e in pipeline.exchanges]
        assert paths == ["json", "lines", "lines"]
        assert [e.response_body.data() for e in pipeline.exchanges[1:]] == [LINES, LINES]


def test_a_hook_that_reads_a_part_of_a_stream(upstream):
    """The beginning passed where it could not be seen: the rest is not passed off as the whole."""

    def peek(response, **_):
        assert response.raw.read(5) == LINES[:5]

    with capturing() as pipeline:
        response = requests.get(upstream.url + "/lines", stream=True, hooks={"response": peek})
        assert response.raw.read() == LINES[5:]
    body = pipeline.only.response_body
    assert (body.data(), body.total_bytes, body.left_out.value) == (b"", len(LINES), "unreadable")


def test_subclasses_and_prepared_requests(upstream):
    """A `Session` subclass with its own `send`, and prepared requests, are captured once."""

    class Own(requests.Session):
        def send(self, request, **kwargs):
            kwargs.setdefault("timeout", 5)
            return super().send(request, **kwargs)

    with capturing() as pipeline, Own() as session:
        session.get(upstream.url + "/redirect/2")
        session.send(session.prepare_request(requests.Request("PUT", upstream.url + "/echo", data="x")))
    assert [(e.method, e.status, e.notes) for e in pipeline.exchanges] == [("GET", 200, {"redirects": 2}), ("PUT", 200, {})]


def test_from_many_threads(upstream):
    """Right bodies with right calls, streamed and not; nothing held afterwards but what was captured."""
    with capturing() as pipeline, requests.Session() as session:

        def call(number):
            sent = f"body {number}".encode()
            response = session.post(upstream.url + f"/echo?{number}", data=iter([sent]), stream=number % 2 == 0)
            return response.content == sent

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(call, range(120)))
    assert len(pipeline.exchanges) == 120
    for exchange in pipeline.exchanges:
        expected = f"body {exchange.url.partition('?')[2]}".encode()
        assert exchange.request_body.data() == exchange.response_body.data() == expected
    assert pipeline.budget.held_bytes == sum(
        e.request_body.kept_bytes + e.response_body.kept_bytes for e in pipeline.exchanges
    )


def test_reading_in_another_thread(upstream):
    """A stream that one thread opens and another reads."""
    with capturing() as pipeline:
        response = requests.get(upstream.url + "/chunked", stream=True)
        thread = threading.Thread(target=lambda: list(response.iter_content(100)))
        thread.start()
        thread.join()
    assert (pipeline.only.outcome, pipeline.only.response_body.data()) == (Outcome.COMPLETE, LINES)


def test_each_pipeline_gets_a_call_once(upstream):
    """Two applications both get it; two pipelines of one application do not count it twice, also after one stops."""
    one, other = RecordingPipeline(APPLICATION_ID="one"), RecordingPipeline(APPLICATION_ID="other", LOG_BODY_OUTGOING=False)
    twin = RecordingPipeline(APPLICATION_ID="one")
    with capturing(twin), capturing(one, one, other, twin):
        requests.get(upstream.url + "/redirect/1")
        list(requests.get(upstream.url + "/chunked", stream=True).iter_content(100))
    assert [len(p.exchanges) for p in (one, other, twin)] == [0, 2, 2]
    assert other.exchanges[0].response_body is None
    assert twin.exchanges[1].response_body.data() == LINES


def test_a_middlewares_pipeline_gets_its_own_applications_calls(upstream):
    """Calls made while another application's request is served go to that application, and to those that want all."""
    shop, blog, everything = (RecordingPipeline(APPLICATION_ID=name) for name in ("shop", "blog", "everything"))
    with capturing(shop, blog, everywhere=False), capturing(everything):
        requests.get(upstream.url + "/json?outside")
        serving = Exchange(blog, "Incoming", "GET")
        serving.trace_id, serving.span_id = 7, 8
        token = current_exchange.set(serving)
        requests.get(upstream.url + "/json?inside")
        current_exchange.reset(token)
    assert [len(p.exchanges) for p in (shop, blog, everything)] == [1, 2, 2]
    assert (blog.exchanges[1].trace_id, blog.exchanges[1].parent_span_id) == (7, 8)
    assert (everything.exchanges[1].trace_id, everything.exchanges[1].parent_span_id) == (7, 8)
    assert blog.exchanges[0].trace_id == 0


def test_a_child_of_fork_can_capture(upstream):
    """The capture's lock is fresh in a child, whatever the parent was doing."""
    code = """
        import os, requests
        from moesif_otel._capture import outgoing, patching
        from tests.capture.upstream import RecordingPipeline, add
        with outgoing._lock.current, patching._lock.current:
            child = os.fork()
            if child == 0:
                pipeline = RecordingPipeline()
                add(pipeline)
                requests.get({url!r})
                os._exit(len(pipeline.exchanges))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    """
    run_python(code.format(url=upstream.url + "/json"))


def test_a_download_of_256_mb_takes_no_memory(upstream):
    """Peak memory grows by less than 32 MB, read through `iter_content` and through `raw`."""
    code = """
        import resource, requests, shutil
        from tests.capture.upstream import capturing
        class Nowhere:
            def write(self, data): pass
        with capturing() as pipeline:
            requests.get({url!r} + "1000", stream=True).content
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for piece in requests.get({url!r} + str(128 << 20), stream=True).iter_content(65536): pass
            shutil.copyfileobj(requests.get({url!r} + str(128 << 20), stream=True).raw, Nowhere())
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 32 * 1024, grown
        assert [e.response_body.total_bytes for e in pipeline.exchanges] == [1000, 128 << 20, 128 << 20]
        assert pipeline.exchanges[-1].response_body.kept_bytes == 100_000
    """
    run_python(code.format(url=upstream.url + "/big/"))


def run_python(code):
    root = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True,
        text=True, timeout=200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(amounts=st.lists(st.integers(0 if URLLIB3_1 else -1, 900), max_size=6), limit=st.integers(0, 3_000), path=st.sampled_from(["/lines", "/chunked", "/gzip"]))
def test_any_way_to_read(upstream, amounts, limit, path):
    """Whatever amounts a caller reads in, the capture is the beginning of what it got, and the sizes add up."""
    with capturing(RESPONSE_MAX_BODY_SIZE=limit) as pipeline:
        response = requests.get(upstream.url + path, stream=True)
        got = b"".join(response.raw.read(amount, decode_content=True) for amount in amounts)
        response.close()
    body = pipeline.only.response_body
    assert body.data() == got[:limit]
    assert body.total_bytes == len(got)
