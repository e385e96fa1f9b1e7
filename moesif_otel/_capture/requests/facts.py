"""Reads facts from a `PreparedRequest`, a `Response` and urllib3's response, without side effects.

Every look at a member of `requests` or `urllib3` that is not documented is one function here, so that a new release
which changes one is seen by one test (`tests/capture/requests/test_canary.py`). Nothing reads a body.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import urllib3
from requests import PreparedRequest, Response
from requests.structures import CaseInsensitiveDict
from urllib3.response import HTTPResponse
from urllib3.util.response import is_fp_closed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moesif_otel._capture.exchange import Headers

TEXT_ENCODING: Final = "latin-1" if getattr(urllib3, "__version__", "").startswith("1.") else "utf-8"
"""The charset in which urllib3 sends text: version 1 leaves it to `http.client`."""


def text_of(value: Any) -> str:
    """Return a method, header name or header value as text; `requests` takes bytes for them too (RFC 9110: latin-1)."""
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def texts_of(pairs: Iterable[tuple[Any, Any]]) -> Headers:
    """Return headers as pairs of text."""
    return [
        (name if type(name) is str else text_of(name), value if type(value) is str else text_of(value))
        for name, value in pairs
    ]


def _kept(headers: Any) -> dict[str, tuple[Any, Any]] | None:
    """Return the pairs of a mapping of `requests` by lower-case name; its own look-ups take several calls each."""
    return headers._store if type(headers) is CaseInsensitiveDict else None  # type: ignore[attr-defined] # untold


def request_headers(request: Any) -> Headers:
    """Return a request's headers as they stand now."""
    kept = _kept(request.headers)
    return texts_of((request.headers or {}).items() if kept is None else kept.values())


def has_header(headers: Any, name: str) -> bool:
    """Tell whether a request has this header."""
    kept = _kept(headers)
    return (bool(headers) and name in headers) if kept is None else name.lower() in kept


def response_headers(response: Any) -> Headers:
    """Return a response's headers, repeated ones apart where urllib3 still knows them apart."""
    apart = getattr(getattr(response.raw, "headers", None), "iteritems", None)
    return texts_of(apart() if apart is not None else (response.headers or {}).items())


def body_position(request: Any) -> int | None:
    """Return the position of a file body before it is sent, which `requests` notes in order to rewind it."""
    position = getattr(request, "_body_position", None)
    return position if isinstance(position, int) else None


def content_of(response: Any) -> bytes | None:
    """Return the body if `requests` has it in memory; None while it is still to be read, or was streamed away."""
    content = response._content if response._content_consumed else None
    if response._content_consumed and content is None:
        return b""  # no raw response to read, or status 0
    return content if isinstance(content, bytes) else None


def is_urllib3s(raw: Any) -> bool:
    """Tell whether it is urllib3's own response, whose methods are known; a subclass may differ in any of them."""
    return type(raw) is HTTPResponse


def is_decoded(raw: Any) -> bool:
    """Tell whether what `requests` read from `raw` had its content coding undone."""
    return getattr(raw, "_decoder", None) is not None


def pieces_decoded(raw: Any, decode_content: bool | None) -> bool:
    """Tell whether a piece that `raw` gave for this argument had its content coding undone."""
    return bool(raw.decode_content if decode_content is None else decode_content) and is_decoded(raw)


def nothing_left(raw: Any) -> bool:
    """Tell whether `raw` has given, or never had, all of its body."""
    if len(getattr(raw, "_decoded_buffer", ())):
        return False
    if getattr(getattr(raw, "_decoder", None), "has_unconsumed_tail", False):
        return False
    return raw._fp is None or is_fp_closed(raw._fp) or raw.length_remaining == 0


def is_being_finalized(raw: Any) -> bool:
    """Tell whether garbage collection is closing `raw`: CPython's `io` marks the object before it calls `close()`."""
    return "_finalizing" in raw.__dict__


def request_without_objects(method: str, url: str, headers: Headers) -> PreparedRequest:
    """Make the request that callbacks get when nothing is left of the real one: no body, no hooks."""
    request = PreparedRequest()
    request.method, request.url, request.headers = method, url, CaseInsensitiveDict(headers)
    return request


def response_without_body(request: PreparedRequest, response: Response) -> Response:
    """Make the response that callbacks get when nobody holds the real one any more."""
    made = Response()
    made.status_code, made.url, made.request, made.reason = response.status_code, response.url, request, response.reason
    made.headers, made.encoding, made.elapsed = response.headers, response.encoding, response.elapsed
    made.__dict__.update(_content=b"", _content_consumed=True)
    return made


def response_with_content(response: Response, content: bytes) -> Response:
    """Make a response with everything of this one but its stream, which nobody can spend by looking at the copy."""
    made: Response = type(response).__new__(type(response))
    made.__dict__.update(response.__dict__)
    made.__dict__.update(raw=None, _content=content, _content_consumed=True)
    return made


def bytes_read(raw: Any) -> int:
    """Return the bytes that were read from urllib3's response off the wire."""
    return int(raw.tell())
