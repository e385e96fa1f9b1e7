"""The canary: every undocumented member of Tornado that we use, on a handler that serves a real request."""

from __future__ import annotations

import inspect

import pytest
from tornado import web, wsgi
from tornado.http1connection import HTTP1Connection

from moesif_otel._capture.tornado import shape
from tests.capture.tornado.serving import get, run, serving, talk


def test_every_member_is_there_and_means_what_we_take_it_for():
    """`_finished`, `_auto_finish`, `_headers`, `_close_callback` before and after the end of a response."""
    found = {}

    class Looking(web.RequestHandler):
        def get(self) -> None:
            found["gone"] = shape.client_is_gone(self.request.connection)
            found["close"] = shape.close_callback_of(self.request.connection)
            found["before"] = (shape.is_finished(self), shape.finishes_by_itself(self))
            self.set_header("X-Mine", "1")
            self.finish("x")
            found["after"] = shape.is_finished(self)
            found["headers"] = dict(shape.headers_of(self).get_all())
            found["closed"] = shape.close_callback_of(self.request.connection)
            found["handler"] = self

    async def serve() -> None:
        async with serving(web.Application([("/", Looking)], log_function=lambda handler: None)) as port:
            await talk(port, get("/"))

    run(serve())
    assert found["before"] == (False, True)
    assert found["after"] is True
    assert found["headers"]["X-Mine"] == "1"
    assert found["close"] == found["handler"].on_connection_close
    assert found["closed"] is None
    assert found["gone"] is False
    assert shape.client_is_gone(found["handler"].request.connection)
    assert not shape.client_is_gone(object())


def test_the_stream_decorator_is_recognised():
    """`@stream_request_body` sets what we look for; other classes have nothing of the kind."""

    @web.stream_request_body
    class Streaming(web.RequestHandler):
        pass

    assert shape.streams_request_body(Streaming.__new__(Streaming))
    assert not shape.streams_request_body(web.RequestHandler.__new__(web.RequestHandler))


def test_what_is_wrapped_has_the_form_we_know():
    """`_execute` is a coroutine function of transforms, `find_handler` and `environ` take a request last."""
    shape.check_tornado()
    assert inspect.iscoroutinefunction(web.RequestHandler._execute)
    assert list(inspect.signature(web.Application.find_handler).parameters)[:2] == ["self", "request"]
    assert list(inspect.signature(wsgi.WSGIContainer.environ).parameters)[-1] == "request"
    assert all(hasattr(HTTP1Connection, name) for name in ("write_headers", "write", "finish", "set_close_callback"))
    assert list(inspect.signature(HTTP1Connection.write_headers).parameters) == [
        "self",
        "start_line",
        "headers",
        "chunk",
    ]


def test_a_member_that_is_gone_is_named():
    """The error says what Tornado no longer has."""
    with pytest.raises(shape.UnknownShape, match=r"object\._finished"):
        shape.is_finished(object())
    with pytest.raises(shape.UnknownShape, match=r"HTTP1Connection\._close_callback"):
        shape.close_callback_of(HTTP1Connection.__new__(HTTP1Connection))


def test_a_connection_of_somebody_elses_is_not_looked_into():
    """HTTP/2 add-ons and test doubles bring connections of their own: only the client's leaving goes unnoticed."""
    assert shape.close_callback_of(object()) is None
