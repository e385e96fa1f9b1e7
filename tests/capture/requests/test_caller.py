"""What the caller of `requests` gets: the same with us as without us, down to the connections that are used."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import shutil
import weakref

import pytest
import requests
import urllib3
from requests.adapters import HTTPAdapter

from moesif_otel._capture.exchange import Exchange, Outcome, current_exchange
from moesif_otel._capture.outgoing import remove_route
from moesif_otel._capture.requests import download, facts
from tests.capture.upstream import JSON, LINES, URLLIB3_1, RecordingPipeline, add, capturing

# Some callers here leave responses and sessions to the garbage collector, and Python says so, with us or without.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


def outline(response):
    """What can be said of a response without its body."""
    raw_headers = response.raw.headers.items() if response.raw is not None else None
    return {
        "type": type(response).__name__,
        "status": response.status_code,
        "reason": response.reason,
        "headers": [(k, v) for k, v in response.headers.items() if k != "Date"],
        "raw": repr(type(response.raw)),
        "raw_headers": [(k, v) for k, v in raw_headers if k != "Date"] if raw_headers else None,
        "history": [(r.status_code, r.url.partition("/")[2].partition(":")[2][5:]) for r in response.history],
        "cookies": response.cookies.get_dict(),
        "encoding": response.encoding,
        "request_body": type(response.request.body).__name__,
    }


def everything(response):
    return {**outline(response), "content": response.content, "text": response.text}


def again(session, url):
    """One more call on the same session, to see whether its connection is used again."""
    return session.get(url + "/json").status_code


def read_raw(session, url, *amounts, path="/lines"):
    response = session.get(url + path, stream=True)
    return [response.raw.read(amount) for amount in amounts], response.raw.closed, response.raw.tell()


def read_into(session, url):
    response = session.get(url + "/gzip", stream=True)
    buffer = bytearray(200)
    counts = []
    while count := response.raw.readinto(buffer):
        counts.append((count, bytes(buffer[:count])))
    return counts


def partly(session, url, path="/chunked", end="close"):
    response = session.get(url + path, stream=True)
    pieces = response.iter_content(700)
    first = next(pieces)
    if end == "close":
        response.close()
        return first, response.raw.closed
    if end == "with":
        with response:
            pass
        return first, response.raw.closed
    if end == "iterator":
        del pieces
        gc.collect()
        return first, response.raw.closed, response.raw.read()
    del pieces, response
    gc.collect()
    return first


def mixed(session, url):
    response = session.get(url + "/gzip", stream=True)
    first = response.raw.read(10, decode_content=True)
    with pytest.raises(RuntimeError) as caught:
        response.raw.read(10, decode_content=False)
    return first, str(caught.value), response.content


def raising(exceptions, call):
    with pytest.raises(exceptions) as caught:
        call()
    error = caught.value
    return type(error), [type(argument) for argument in error.args], type(error.__cause__), type(error.__context__)


def broken(session, url, path, **options):
    def call():
        response = session.get(url + path, timeout=5, **options)
        for _ in response.iter_content(50):
            pass

    return raising(requests.RequestException, call)


def hooked(session, url):
    seen = []

    def hook(response, **_):
        seen.append(response.content if len(seen) % 2 == 0 else response.status_code)

    response = session.get(url + "/redirect/2", hooks={"response": hook})
    return seen, everything(response)


def replaced_by_hook(session, url, *, stream=False):
    def hook(response, **_):
        if response.status_code == 401:
            response.request.hooks = {}
            response.request.url = url + "/lines"
            return session.send(response.request, stream=stream)
        return None

    response = session.get(url + "/status/401", hooks={"response": hook}, stream=stream)
    return outline(response), response.content


def pickled(session, url):
    response = pickle.loads(pickle.dumps(session.get(url + "/json", stream=True)))
    return response.content, response.raw


def line_by_line(session, url):
    response = session.get(url + "/lines", stream=True)
    return list(response.raw)


def wrapped_in_text(session, url):
    response = session.get(url + "/lines", stream=True)
    response.raw.auto_close = False
    return io.TextIOWrapper(response.raw).read()


def copied(session, url, path="/lines"):
    response, target = session.get(url + path, stream=True), io.BytesIO()
    shutil.copyfileobj(response.raw, target)
    return target.getvalue(), outline(response)


def followed_by_hand(session, url):
    first = session.get(url + "/redirect/2", allow_redirects=False)
    second = session.send(first.next, allow_redirects=False)
    third = session.send(second.next, allow_redirects=False)
    return [outline(r) for r in (first, second, third)], third.content


SCENARIOS = {
    "json": lambda s, u: everything(s.get(u + "/json")),
    "get of the module": lambda s, u: everything(requests.get(u + "/json")),
    "redirects": lambda s, u: everything(s.get(u + "/redirect/3")),
    "redirects by hand": followed_by_hand,
    "see other after a post": lambda s, u: everything(s.post(u + "/redirect/1?status=303", data=b"x")),
    "temporary redirect of bytes": lambda s, u: everything(s.post(u + "/redirect-echo", data=b"xyz")),
    "temporary redirect of a file": lambda s, u: everything(s.post(u + "/redirect-echo", data=io.BytesIO(b"xyz"))),
    "head": lambda s, u: everything(s.head(u + "/lines")),
    "head streamed": lambda s, u: (outline(r := s.head(u + "/lines", stream=True)), r.content),
    "204": lambda s, u: everything(s.get(u + "/empty")),
    "204 streamed": lambda s, u: (outline(r := s.get(u + "/empty", stream=True)), r.content, r.raw.read()),
    "nothing streamed": lambda s, u: (outline(r := s.get(u + "/nothing", stream=True)), r.content, r.raw.read()),
    "404": lambda s, u: everything(s.get(u + "/status/404")),
    "chunked": lambda s, u: everything(s.get(u + "/chunked")),
    "gzip": lambda s, u: everything(s.get(u + "/gzip")),
    "gzip chunked": lambda s, u: everything(s.get(u + "/gzip-chunked")),
    "unknown coding": lambda s, u: everything(s.get(u + "/unknown-coding")),
    "until close": lambda s, u: everything(s.get(u + "/until-close")),
    "iter_content": lambda s, u: [list(s.get(u + p, stream=True).iter_content(n)) for n in (1_000, None) for p in ("/lines", "/chunked", "/gzip", "/gzip-chunked", "/until-close")],
    "iter_lines": lambda s, u: [list(s.get(u + p, stream=True).iter_lines()) for p in ("/lines", "/chunked", "/gzip")],
    "iter_content as text": lambda s, u: list(s.get(u + "/gzip", stream=True).iter_content(99, decode_unicode=True)),
    "iteration": lambda s, u: list(s.get(u + "/chunked", stream=True)),
    "content of a stream": lambda s, u: (everything(r := s.get(u + "/gzip", stream=True)), r.content, r.raw.read()),
    "raw.read": lambda s, u: read_raw(s, u, None, None),
    "raw.read of pieces": lambda s, u: read_raw(s, u, 100, 0, 1_000, -1, 5),
    "raw.read of coded pieces": lambda s, u: read_raw(s, u, 100, 5_000, 10, path="/gzip"),
    "raw.read of chunks": lambda s, u: read_raw(s, u, 100, 5_000, 10, path="/chunked"),
    "raw.read decoded": lambda s, u: [s.get(u + "/gzip", stream=True).raw.read(n, decode_content=True) for n in (None, 50)],
    "raw.read1": lambda s, u: [(r := s.get(u + "/gzip", stream=True)).raw.read1(50), r.raw.read1(50, decode_content=False), r.raw.read1()] if hasattr(urllib3.HTTPResponse, "read1") else None,
    "raw.data": lambda s, u: s.get(u + "/gzip", stream=True).raw.data,
    "raw.readinto": read_into,
    "raw as lines": line_by_line,
    "raw as text": wrapped_in_text,
    "raw.stream": lambda s, u: list(s.get(u + "/gzip-chunked", stream=True).raw.stream(64)),
    "raw.read_chunked": lambda s, u: list(s.get(u + "/chunked", stream=True).raw.read_chunked()),
    "raw.drain_conn": lambda s, u: ((r := s.get(u + "/lines", stream=True)).raw.drain_conn(), r.raw.read()),
    "copyfileobj": copied,
    "copyfileobj of gzip": lambda s, u: copied(s, u, "/gzip"),
    "closed": lambda s, u: partly(s, u),
    "closed, of a length": lambda s, u: partly(s, u, "/lines"),
    "with": lambda s, u: partly(s, u, end="with"),
    "with, of a length": lambda s, u: partly(s, u, "/lines", end="with"),
    "iterator dropped": lambda s, u: partly(s, u, end="iterator"),
    "iterator dropped, of a length": lambda s, u: partly(s, u, "/lines", end="iterator"),
    "dropped": lambda s, u: partly(s, u, end="drop"),
    "dropped, of a length": lambda s, u: partly(s, u, "/lines", end="drop"),
    "decoded and not": mixed,
    "json of a stream": lambda s, u: s.get(u + "/json", stream=True).json(),
    "pickled": pickled,
    "hooks": hooked,
    "replaced by a hook": replaced_by_hook,
    "replaced by a hook, streamed": lambda s, u: replaced_by_hook(s, u, stream=True),
    "reset": lambda s, u: [broken(s, u, "/reset", stream=stream) for stream in (False, True)],
    "short": lambda s, u: [broken(s, u, "/short", stream=stream) for stream in (False, True)],
    "bad chunk": lambda s, u: [broken(s, u, "/bad-chunk", stream=stream) for stream in (False, True)],
    "not gzip": lambda s, u: [broken(s, u, "/not-gzip", stream=stream) for stream in (False, True)],
    "no answer": lambda s, u: broken(s, u, "/drop"),
    "too many redirects": lambda s, u: broken(s, u, "/redirect/40"),
    "bad port": lambda s, u: broken(s, "http://127.0.0.1:1", "/"),
    "no such host": lambda s, u: broken(s, "http://nonexistent.invalid", "/"),
    "no such scheme": lambda s, u: broken(s, "gopher://here", "/"),
    "not prepared": lambda s, u: raising(ValueError, lambda: s.send(requests.Request("GET", u))),
    "wrong arguments": lambda s, u: (raising(TypeError, lambda: s.send()), raising(TypeError, lambda: s.send(requests.Request("GET", u + "/json").prepare(), color="red"))),
    "request as a keyword": lambda s, u: everything(s.send(request=s.prepare_request(requests.Request("GET", u + "/json")))),
}  # fmt: skip

if URLLIB3_1:  # which waits for the other side's end at `read(-1)`, mixes reads and takes short bodies without a word
    for name in ("raw.read of pieces", "decoded and not", "short"):
        del SCENARIOS[name]


def run(scenario, upstream):
    upstream.requests.clear()
    upstream.connections = 0
    with requests.Session() as session:
        result = scenario(session, upstream.url)
        session.max_redirects = 30
        again(session, upstream.url)
    seen = [(r["method"], r["path"], r["headers"], r["body"], r["connection"]) for r in upstream.requests]
    return result, seen


@pytest.mark.parametrize("name", SCENARIOS)
def test_same_for_the_caller_and_on_the_wire(upstream, name):
    """Results, exceptions, what the server is sent, byte for byte, and on which connection: as without us."""
    without = run(SCENARIOS[name], upstream)
    with capturing() as pipeline:
        with_us = run(SCENARIOS[name], upstream)
        gc.collect()
        pipeline.run_late()
    assert with_us == without
    assert all(not exchange.is_open for exchange in pipeline.open)


def test_first_piece_arrives_before_the_rest_exists(upstream):
    """A stream stays a stream: the first event is read while the server still holds the second one back."""
    upstream.may_go_on.clear()
    with capturing() as pipeline:
        response = requests.get(upstream.url + "/slow", stream=True, timeout=5)
        pieces = response.iter_content(None)
        assert next(pieces) == b"data: 1\n\n"
        assert not upstream.may_go_on.is_set()
        assert pipeline.exchanges == []
        upstream.may_go_on.set()
        assert list(pieces) == [b"data: 2\n\n"]
    assert pipeline.only.outcome is Outcome.COMPLETE
    assert pipeline.only.response_body.data() == b"data: 1\n\ndata: 2\n\n"


def test_a_dropped_response_goes_as_early_as_without_us(upstream):
    """No cycle keeps a response alive: the last reference gone, it and its connection are gone."""
    gc.disable()
    try:
        with capturing() as pipeline:
            response = requests.get(upstream.url + "/lines", stream=True)
            raw, whole = weakref.ref(response.raw), weakref.ref(response)
            del response
            assert whole() is None
            assert raw() is None
            assert [exchange.outcome for exchange in pipeline.late] == [Outcome.DROPPED]
    finally:
        gc.enable()


def test_a_dropped_response_is_collected_when_the_callers_objects_form_a_cycle(upstream):
    """A client object that its own hook hangs the response on, as many do: garbage collection still ends it."""

    class Client:
        def __init__(self):
            self.session = requests.Session()
            self.session.hooks["response"].append(self.remember)

        def remember(self, response, **_):
            self.last = response

    with capturing() as pipeline:
        client = Client()
        client.session.get(upstream.url + "/lines", stream=True)
        raw = weakref.ref(client.last.raw)
        del client
        gc.collect()
        assert raw() is None
        assert [exchange.outcome for exchange in pipeline.late] == [Outcome.DROPPED]
        pipeline.run_late()
    ((request, response),) = pipeline.seen_by_callbacks
    assert (request.method, response.status_code, response.content) == ("GET", 200, b"")


def test_only_the_raw_response_is_kept(upstream):
    """`requests.get(…).raw` without the response: read on as without us, and recorded when it ends."""
    with capturing() as pipeline:
        raw = requests.get(upstream.url + "/lines", stream=True).raw
        gc.collect()
        assert pipeline.late == []
        assert raw.read() == LINES
    assert pipeline.only.response_body.data() == LINES
    ((request, response),) = pipeline.seen_by_callbacks
    assert (request.url, response.status_code, response.ok) == (upstream.url + "/lines", 200, True)


def test_a_caller_that_reads_in_two_ways(upstream):
    """First the wire's bytes, then decoded ones: the beginning is kept as it was read."""
    with capturing() as pipeline:
        response = requests.get(upstream.url + "/lines", stream=True)
        start = response.raw.read(7)
        assert start + b"".join(response.iter_content(100)) == LINES
        response = requests.get(upstream.url + "/gzip", stream=True)
        response.raw.read(30, decode_content=False)
        with pytest.raises(urllib3.exceptions.DecodeError):
            response.raw.read(10, decode_content=True)
    plain, coded = (exchange.response_body for exchange in pipeline.exchanges)
    assert plain.data() == LINES
    assert (coded.kept_bytes, coded.decoded) == (30, False)


def test_connection_failure_while_sending(upstream):
    """A server that answers before it has taken the upload: the caller gets what it got before."""

    def upload():
        try:
            return requests.post(upstream.url + "/refuse-upload", data=iter([b"x" * 1_000_000] * 20)).status_code
        except requests.ConnectionError as error:
            return type(error)

    without = {upload() for _ in range(5)}
    with capturing() as pipeline:
        with_us = {upload() for _ in range(5)}
    assert with_us & without
    assert len(pipeline.exchanges) == 5


def test_no_thread_and_no_header(upstream):
    """The capture starts nothing and adds nothing: the headers are those of `requests` alone, a caller's own stay."""
    sent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    with capturing():
        requests.get(upstream.url + "/json")
        requests.get(upstream.url + "/json", headers={"traceparent": sent})
    names = {name.lower() for name, _ in upstream.requests[-2]["headers"]}
    assert names == {"host", "user-agent", "accept-encoding", "accept", "connection"}
    assert dict(upstream.requests[-1]["headers"])["traceparent"] == sent


def test_adapters_of_every_kind(upstream):
    """A mounted adapter is called as before; its response is recorded, whatever its `raw` is."""

    class Canned(HTTPAdapter):
        def send(self, request, **kwargs):
            response = requests.Response()
            response.status_code, response.url, response.request = 299, request.url, request
            response.headers["X-Canned"] = "yes"
            response.raw = io.BytesIO(b"from a file")
            return response

    class Odd(HTTPAdapter):
        def send(self, request, **kwargs):
            raise LookupError("an adapter's own")

    with requests.Session() as session, capturing() as pipeline:
        session.mount("canned://", Canned())
        session.mount("odd://", Odd())
        assert session.get("canned://x").content == b"from a file"
        streamed = session.get("canned://x", stream=True)
        assert type(streamed.raw) is io.BytesIO
        assert list(streamed.iter_content(4)) == [b"from", b" a f", b"ile"]
        with pytest.raises(LookupError, match="an adapter's own"):
            session.get("odd://x")
    whole, stream, odd = pipeline.exchanges
    assert (whole.status, whole.response_body.data()) == (299, b"from a file")
    assert ("X-Canned", "yes") in stream.response_headers
    assert (stream.status, stream.response_body.left_out.value) == (299, "unreadable")
    assert (odd.outcome, odd.status, odd.error_type) == (Outcome.FAILED, None, "LookupError")


def test_what_is_no_response_passes(upstream):
    """An adapter, or somebody's patch, that returns another kind of object: the caller gets it, it is counted."""
    marker = object()
    original = requests.Session.send
    requests.Session.send = lambda *_, **__: marker
    pipeline = RecordingPipeline()
    route = add(pipeline)
    try:
        assert requests.get(upstream.url) is marker
    finally:
        remove_route(route)
        requests.Session.send = original
    assert pipeline.guard.counts() == {"capture of an outgoing response": 1}
    assert (pipeline.only.status, pipeline.only.is_open) == (None, False)


def test_a_call_keeps_the_call_around_it_when_its_body_cannot_be_taken(upstream, monkeypatch):
    """An error of ours after the response has come is counted; the caller reads, and the call stays in its request."""
    pipeline = RecordingPipeline()
    serving = Exchange(pipeline, "Incoming", "GET")
    around = []
    pipeline.while_callbacks_run = lambda *_: around.append(pipeline.open[-1].outer)
    route, token = add(pipeline), current_exchange.set(serving)
    monkeypatch.setattr(facts, "content_of", lambda response: 1 / 0)
    try:
        assert requests.get(upstream.url + "/json").content == JSON
    finally:
        current_exchange.reset(token)
        remove_route(route)
    assert around == [serving]
    assert pipeline.guard.counts() == {"capture of an outgoing response": 1}
    assert (pipeline.only.outcome, pipeline.only.status) == (Outcome.COMPLETE, 200)


def test_what_cannot_be_seen_at_a_close_is_counted(upstream, monkeypatch):
    """A look at a response that fails while it is closed: it is closed, the call ends, the error is counted."""
    pipeline = RecordingPipeline()
    route = add(pipeline)
    try:
        response = requests.get(upstream.url + "/lines", stream=True)
        monkeypatch.setattr(download, "nothing_left", lambda raw: 1 / 0)
        response.close()
    finally:
        remove_route(route)
    assert response.raw.closed
    assert pipeline.guard.counts() == {"capture of an outgoing response body": 1}
    assert pipeline.only.outcome is Outcome.ABORTED


def test_json_still_is_json(upstream):
    """The very bytes the server sent, for a plain call."""
    with capturing():
        assert requests.get(upstream.url + "/json").content == JSON


class AnyKeyword(requests.adapters.BaseAdapter):
    """An adapter of the user's own, whose bodies are no responses of urllib3's."""

    def __init__(self):
        super().__init__()
        self.keywords = None

    def send(self, request, **keywords):
        self.keywords = keywords
        response = requests.Response()
        response.status_code, response.url, response.request = 200, request.url, request
        response.raw = io.BytesIO(b'{"a": 1}')
        return response

    def close(self):
        pass


def test_any_keyword_reaches_the_adapter():
    """`send` takes any keyword, whatever the parameters of our layer are called, and `self` and `request` by name."""
    adapter = AnyKeyword()
    with requests.Session() as session, capturing() as pipeline:
        session.mount("own://", adapter)
        request = session.prepare_request(requests.Request("GET", "own://x"))
        session.send(request, session=1, inner=2, call=3, send=4)
        assert {name: adapter.keywords[name] for name in ("session", "inner", "call", "send")} == {"session": 1, "inner": 2, "call": 3, "send": 4}
        requests.Session.send(self=session, request=request)
        with pytest.raises(TypeError, match=r"Session.send\(\) missing 1 required positional argument: 'request'"):
            session.send()
    assert len(pipeline.exchanges) == 2


@pytest.mark.parametrize("path", ["/json", "own"])
def test_a_callback_cannot_spend_a_stream(upstream, path):
    """`response.json()` in a callback works with what has passed; the caller's stream is his."""
    looked = []

    def look(_request, response):
        looked.append(response.content)
        response.json()

    pipeline = RecordingPipeline()
    pipeline.while_callbacks_run = look
    route = add(pipeline)
    try:
        with requests.Session() as session:
            session.mount("own://", AnyKeyword())
            url = "own://x" if path == "own" else upstream.url + path
            response = session.get(url, stream=True)
            assert b"".join(response.iter_content(3)) == (b'{"a": 1}' if path == "own" else JSON)
    finally:
        remove_route(route)
    # Of a body that is none of urllib3's nothing is seen, so `json()` finds nothing, and says so to our guard.
    assert looked == [b"" if path == "own" else JSON]
    assert pipeline.guard.counts() == ({"callback": 1} if path == "own" else {})
    with pytest.raises(RuntimeError, match="already consumed"):
        response.content


def test_sessions_and_responses_are_pickled(upstream):
    """As without us, with a capture on."""
    with capturing(), requests.Session() as session:
        response = session.get(upstream.url + "/json")
        assert pickle.loads(pickle.dumps(response)).json() == response.json()
        again = pickle.loads(pickle.dumps(session))
        assert copy.copy(again).get(upstream.url + "/json").status_code == 200
        stream = session.get(upstream.url + "/lines", stream=True)
        assert pickle.loads(pickle.dumps(stream)).content == LINES == stream.content
