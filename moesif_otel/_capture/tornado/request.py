"""What an event needs of a Tornado request, copied out of it so that the request itself is not kept."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from moesif_otel._capture.authority import authority_of, is_authority
from moesif_otel._capture.exchange import Exchange

if TYPE_CHECKING:
    from tornado.httputil import HTTPServerRequest
    from tornado.web import RequestHandler

    from moesif_otel._capture.exchange import CapturePipeline

__all__ = ["open_exchange"]

# RFC 3986: everything printable stays as the client sent it, "%" included; only what no URL may hold is encoded.
_URL_SAFE: Final = "/:@!$&'()*+,;=~?#%[]"
_NANOSECONDS: Final = 1_000_000_000


def open_exchange(pipeline: CapturePipeline, handler: RequestHandler) -> Exchange:
    """Make the Exchange of a request and note what is known before the handler runs."""
    request = handler.request
    exchange = Exchange(pipeline, "Incoming", request.method or "GET")
    if exchange.outer is not None and not exchange.outer.is_open:
        # A context inherited from a request that is over (a server started inside a handler): not around this one.
        exchange.outer = None
    elif exchange.outer is not None:
        exchange.same_request = exchange.outer.callback_arguments[:1] == (handler,)
    # The request began when its headers were read; the handler runs when the body is there.
    exchange.started_ns -= max(0, int(request.request_time() * _NANOSECONDS))
    exchange.url = partial(_full_url, request.protocol, request.host, request.uri)
    # Copied now: `WSGIContainer` takes headers out of the request.
    headers = exchange.request_headers = list(request.headers.get_all())
    exchange.has_remote_parent = any(name == "Traceparent" for name, _ in headers)  # Tornado writes all names so
    exchange.peer_address = _peer_address(request)
    exchange.callback_arguments = exchange.identify_arguments = (handler,)
    return exchange


def _peer_address(request: HTTPServerRequest) -> str | None:
    address: Any = request.remote_ip
    # "0.0.0.0" is Tornado's stand-in for the peer of a Unix socket.
    return address if isinstance(address, str) and address not in {"", "0.0.0.0"} else None  # noqa: S104 - compared


def _full_url(protocol: Any, host: Any, uri: Any) -> str:
    # No request target has a fragment: Tornado routes by all of it.
    target = _quoted(uri).replace("#", "%23")
    scheme, separator, rest = target.partition("://")
    if separator and scheme.lower() in {"http", "https"} and is_authority(rest.partition("/")[0]):
        return target  # absolute form (RFC 9112, 3.2.2), as a client sends it to a proxy
    if not target.startswith("/"):
        target = "/" + target  # "OPTIONS *"
    protocol = protocol or "http"
    return f"{protocol}://{_quoted(authority_of(protocol, str(host or '')))}{target}"


def _quoted(text: Any) -> str:
    string = str(text or "")
    if string.isascii() and string.isprintable():
        return string
    try:
        # Tornado decodes the request line as latin-1.
        raw = string.encode("latin-1")
    except UnicodeEncodeError:
        raw = string.encode("utf-8", "surrogatepass")
    return quote(raw, safe=_URL_SAFE)
