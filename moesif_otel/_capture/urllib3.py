"""Capture of calls made with `urllib3` itself: a layer on `HTTPConnectionPool.urlopen`, one event for each hop.

Off unless it is named: what is built on urllib3 (cloud SDKs, search clients, exporters) comes along. What another
client sends through urllib3 is a part of that client's call, and so are the retries for which `urlopen` calls itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from moesif_otel._capture.exchange import Outcome
from moesif_otel._capture.outgoing import begin_call
from moesif_otel._capture.patching import Patch, PatchSet
from moesif_otel._capture.requests.download import watch_download
from moesif_otel._capture.requests.facts import TEXT_ENCODING, is_decoded, text_of
from moesif_otel._capture.streams import UploadSink, add_plain, is_plain, stand_in_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moesif_otel._capture.exchange import Headers
    from moesif_otel._capture.outgoing import OutgoingCall


class Urllib3Request(NamedTuple):
    """What callbacks get as the request: urllib3 has no object for it."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: Any


class Urllib3Response(NamedTuple):
    """What callbacks get as the response: urllib3's own can be read only once."""

    status: int
    headers: Mapping[str, str]
    data: bytes
    """The content, where urllib3 has read it."""


_PARAMETERS: Final = ("method", "url", "body", "headers")


def _urlopen(urlopen: Any, pool: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `HTTPConnectionPool.urlopen` and capture the call."""
    given = {**kwargs, **dict(zip(_PARAMETERS, args, strict=False))}
    headers = pool.headers if given.get("headers") is None else given["headers"]
    method, url = text_of(given.get("method")), _full_url(pool, given.get("url"))
    call = begin_call("urllib3", method, url, headers, _is_inside)
    if call is None:
        return urlopen(pool, *args, **kwargs)
    request = Urllib3Request(method, call.exchanges[0].url, headers, given.get("body"))
    for exchange in call.exchanges:
        exchange.request_headers = _pairs(headers)
    call.set_arguments(request, None)
    call.enter()
    seen = _seen(call, request.body)
    if seen is not request.body:
        args, kwargs = ((*args[:2], seen, *args[3:]), kwargs) if len(args) > 2 else (args, {**kwargs, "body": seen})
    try:
        response = urlopen(pool, *args, **kwargs)
    except BaseException as exc:
        call.failed(request, exc)
        raise
    _answered(call, request, response)
    return response


PATCHES: Final = PatchSet([Patch("urllib3.connectionpool", "HTTPConnectionPool.urlopen", _urlopen)])


def _is_inside(_call: OutgoingCall) -> bool:
    return True  # of any client: it is being sent, so this is how


def _full_url(pool: Any, url: Any) -> str:
    target = text_of(url)
    if not target.startswith("/"):
        return target  # absolute, as a proxy gets it
    host = f"[{pool.host}]" if ":" in pool.host and not pool.host.startswith("[") else pool.host
    default = {"http": 80, "https": 443}.get(pool.scheme)
    return f"{pool.scheme}://{host}{'' if pool.port in {None, default} else f':{pool.port}'}{target}"


def _pairs(headers: Any) -> Headers:
    pairs = headers.iteritems() if hasattr(headers, "iteritems") else (headers or {}).items()
    return [(text_of(name), text_of(value)) for name, value in pairs]


def _seen(call: OutgoingCall, body: Any) -> Any:
    """Note a body that is there, or return what stands for it while it is sent."""
    try:
        if not is_plain(body):
            sink = UploadSink(call, text_encoding=TEXT_ENCODING)
            return (stand_in_for(body, sink) if call.request_bodies else None) or body
        for captured in call.request_bodies:
            add_plain(captured, body, TEXT_ENCODING)
    except Exception as exc:
        call.caught("outgoing request body", exc)
    return body


def _answered(call: OutgoingCall, request: Urllib3Request, response: Any) -> None:
    """Take the response, whose body may still be to come. Never raises."""
    seen = Urllib3Response(getattr(response, "status", 0), getattr(response, "headers", {}), b"")
    try:
        call.note_response(response.status, _pairs(response.headers))
        call.leave()
        content = getattr(response, "_body", None)
        if isinstance(content, bytes):
            seen = seen._replace(data=content)
            call.take_body(content, decoded=is_decoded(response))
        else:
            call.set_arguments(request, seen)
            if watch_download(call, response, lambda outcome, error: call.finish(request, seen, outcome, error)):
                return
    except Exception as exc:
        call.caught("outgoing response", exc)
        call.leave()
    call.finish(request, seen, Outcome.COMPLETE)
