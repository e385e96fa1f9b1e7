"""What stays in memory: nothing of a call that SKIP left out, no byte of a body where LOG_BODY is false."""

from __future__ import annotations

import gc
import io
from types import ModuleType
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

import pytest
import requests
import tornado.web

from moesif_otel import MoesifMiddleware
from moesif_otel._capture.body import ByteBudget, CapturedBody
from moesif_otel.outgoing import start_capture_outgoing
from moesif_otel.sandbox import Sandbox
from moesif_otel.tornado import MoesifMiddleware as TornadoMiddleware

from .planting import Case, Message, text_for
from .serving import send, tornado_server, wsgi_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Kept backwards, so that whoever has it the right way round has it from the call.
_BACKWARDS = text_for("a body that nobody may keep")[::-1].encode()


def _body() -> bytes:
    """Make the body anew: nobody but a call holds these bytes."""
    return b'{"note": "' + _BACKWARDS[::-1] * 50 + b'"}'


def _wsgi_app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "application/json")])
    return [_body()]


class _Handler(tornado.web.RequestHandler):
    def post(self) -> None:
        self.set_header("Content-Type", "application/json")
        self.write(_body())


def _call(port: int) -> None:
    case = Case("call", request=Message([("Content-Type", "application/json")], _body()))
    status, answer = send(port, case)
    assert (status, answer) == (200, _body())


def _holders() -> list[str]:
    """Say what holds a copy of the body, in whole or in part."""
    gc.collect()
    wanted = _BACKWARDS[::-1]
    found = []
    for owner in gc.get_objects():
        if isinstance(owner, ModuleType):
            # Their dicts are looked at by themselves. CPython 3.12's `_asyncio` shows the dead objects of its free list
            # as well: to touch one puts it on that list a second time, and the next collection never ends.
            continue
        for held in gc.get_referents(owner):
            kind = type(held)
            if kind in {bytes, bytearray} and wanted in held:
                found.append(f"{type(owner).__module__}.{type(owner).__qualname__}")
            elif kind is str and wanted.decode() in held:
                found.append(f"{type(owner).__module__}.{type(owner).__qualname__}")
    return found


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


def _through_wsgi(options: dict[str, Any]) -> Any:
    middleware = MoesifMiddleware(_wsgi_app, options)
    with wsgi_server(middleware) as port:
        _call(port)
    return middleware


def _through_tornado(options: dict[str, Any]) -> Any:
    middleware = TornadoMiddleware(options)
    application = tornado.web.Application([(r"/.*", _Handler)], log_function=middleware.log_event)
    with tornado_server(application) as port:
        _call(port)
    return middleware


def _through_requests(options: dict[str, Any]) -> Any:
    capture = start_capture_outgoing(options)
    with wsgi_server(_wsgi_app) as port, requests.Session() as session:
        for stream in (False, True):
            answer = session.post(f"http://127.0.0.1:{port}/", data=iter([_body()]), stream=stream)
            assert answer.content == _body()
    return capture


WAYS_IN = pytest.mark.parametrize("way_in", [_through_wsgi, _through_tornado, _through_requests])


def _skip(*_: Any) -> bool:
    return True


@WAYS_IN
def test_a_skipped_call_leaves_nothing(way_in: Callable[[dict[str, Any]], Any], sandbox: Sandbox) -> None:
    """SKIP true: as soon as the call is over no object of the process holds its bodies, and nothing is sent."""
    options = {"APPLICATION_ID": "kept", "BASE_URI": sandbox.url, "SKIP": _skip, "SKIP_OUTGOING": _skip}
    ended = way_in(options)
    # Before any flush: it is the end of the call that lets go.
    assert _holders() == []
    stats = ended.stats()
    assert stats["held_bytes"] == 0
    assert stats["accepted"] == 0
    assert stats["skipped"] >= 1
    assert ended.force_flush(30_000)
    ended.shutdown()
    assert sandbox.events() == []


@WAYS_IN
def test_a_delivered_call_leaves_nothing(way_in: Callable[[dict[str, Any]], Any], sandbox: Sandbox) -> None:
    """The same look finds a body that is kept, and none once the event is delivered."""
    ended = way_in({"APPLICATION_ID": "kept", "BASE_URI": sandbox.url, "EVENT_BATCH_TIMEOUT": 30})
    assert _holders() != []
    assert ended.force_flush(30_000)
    assert ended.stats()["held_bytes"] == 0
    ended.shutdown()
    assert sandbox.events()
    sandbox.clear()
    assert _holders() == []


def test_the_look_sees_what_is_kept() -> None:
    """A control: a captured body is found."""
    kept = CapturedBody(1_000_000, ByteBudget(1 << 30))
    kept.add(_body())
    assert _holders()
    kept.discard()
    assert _holders() == []


@WAYS_IN
def test_no_byte_is_copied(
    way_in: Callable[[dict[str, Any]], Any], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LOG_BODY false: no tee is made, no byte is offered to one, no memory is reserved for one."""
    touched: list[str] = []
    for owner, name in ((CapturedBody, "__init__"), (CapturedBody, "add"), (CapturedBody, "data"), (ByteBudget, "reserve")):
        original = getattr(owner, name)

        def noted(self: Any, *args: Any, _original: Any = original, _name: str = name, **named: Any) -> Any:
            touched.append(_name)
            return _original(self, *args, **named)

        monkeypatch.setattr(owner, name, noted)
    options = {"APPLICATION_ID": "kept", "BASE_URI": sandbox.url, "LOG_BODY": False, "LOG_BODY_OUTGOING": False}
    ended = way_in(options)
    assert touched == []
    assert _holders() == []
    assert ended.force_flush(30_000)
    ended.shutdown()
    events = sandbox.events()
    assert events
    for event in events:
        assert "body" not in event["request"]
        assert "body" not in event["response"]


class _Bytes(bytes):
    """A body that notes whoever copies it."""

    copies: list[str] = []

    def __bytes__(self) -> bytes:
        self.copies.append("bytes()")
        return bytes(memoryview(self))

    def __getitem__(self, key: Any) -> Any:
        self.copies.append("slice")
        return super().__getitem__(key)


@pytest.mark.parametrize("callbacks", [{}, {"IDENTIFY_USER": lambda *_: "ann", "GET_METADATA": lambda *_: {}}])
def test_wsgi_objects_stay_the_servers(callbacks: dict[str, Any], sandbox: Sandbox) -> None:
    """LOG_BODY false: the application reads the server's own stream, and its answer is not looked into."""
    seen: list[Any] = []
    answer = [_Bytes(_body())]

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        seen.append(environ["wsgi.input"])
        start_response("200 OK", [])
        return answer

    stream = io.BytesIO(_body())
    environ: dict[str, Any] = {"REQUEST_METHOD": "POST", "CONTENT_LENGTH": "5", "wsgi.input": stream}
    setup_testing_defaults(environ)
    options = {"APPLICATION_ID": "kept", "BASE_URI": sandbox.url, "LOG_BODY": False, **callbacks}
    middleware = MoesifMiddleware(app, options)
    try:
        assert middleware(environ, lambda *_: None) is answer
        assert seen == [stream]
        assert seen[0] is stream
        assert _Bytes.copies == []
        assert middleware.force_flush(30_000)
    finally:
        middleware.shutdown()
