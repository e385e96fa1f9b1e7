"""Tests of what is copied out of a Tornado request."""

from __future__ import annotations

from urllib.parse import urlsplit

from hypothesis import given
from hypothesis import strategies as st
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine
from tornado.web import Application, RequestHandler

from moesif_otel._capture.tornado.capture import open_exchange
from tests.capture.tornado.serving import recorder

_PIPELINE = recorder()


class Connection:
    """As much of a connection as a request needs."""

    context = None

    def set_close_callback(self, callback: object) -> None:
        """Take it, as Tornado's does."""


def exchange_of(target: str, host: str = "api.example.com"):
    """Open the Exchange of a request for a target, as it stands in the request line."""
    request = HTTPServerRequest(
        connection=Connection(),
        start_line=RequestStartLine("GET", target, "HTTP/1.1"),
        headers=HTTPHeaders({"Host": host, "Traceparent": "00-x"}),
    )
    return open_exchange(_PIPELINE, RequestHandler(Application(), request))


@given(st.text(st.characters(max_codepoint=255), max_size=60))
def test_any_target_makes_a_url_of_printable_ascii(target):
    """Whatever bytes a client sends, the event has a URL that can be parsed, built when asked for, and never an error."""
    exchange = exchange_of("/" + target)
    assert exchange.url.isascii()
    assert exchange.url.isprintable()
    assert exchange.url.startswith("http://api.example.com/")
    assert urlsplit(exchange.url).netloc == "api.example.com"


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60))
def test_a_printable_target_stays_as_the_client_sent_it(target):
    """Nothing is decoded, encoded twice or put in order; a `#`, which begins no fragment there, is encoded."""
    assert exchange_of("/" + target).url == "http://api.example.com/" + target.replace("#", "%23")


def test_the_remote_parent_is_noted():
    """Header names match in any case; the address may be absent."""
    exchange = exchange_of("/")
    assert exchange.has_remote_parent
    assert exchange.peer_address is None or exchange.peer_address
    assert exchange.started_ns > 0
