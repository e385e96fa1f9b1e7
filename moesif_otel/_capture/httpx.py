"""Capture of calls made with `httpx`: one event for each request that goes out, redirects and auth flows included.

`_send_single_request` is where every request of a client passes, whatever its transport; `send` is wrapped only so that
callbacks of a call that is no stream run when its content is there. The streams of request and response are seen as
the bytes of the wire pass. A response is in a cycle with its stream, so it goes by garbage collection: nothing of ours
may lead to it.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import httpx

from moesif_otel._capture.exchange import Outcome
from moesif_otel._capture.outgoing import begin_call
from moesif_otel._capture.patching import Patch, PatchSet
from moesif_otel._capture.streams import UploadSink, original_of, stand_in_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from moesif_otel._capture.exchange import Headers
    from moesif_otel._capture.outgoing import OutgoingCall

_SWITCHING_PROTOCOLS: Final = 101
_STATUSES_WITHOUT_BODY: Final = frozenset({204, 304})  # RFC 9110, 6.4.1


class _Ended:
    """The calls whose body came inside of a `send` that reads the response: their callbacks wait for its content."""

    __slots__ = ("_calls", "_is_open", "_token")

    def __init__(self) -> None:
        self._calls: list[tuple[Any, ...]] = []
        self._is_open = True
        self._token = _ended.set(self)

    def add(self, call: OutgoingCall, *end: Any) -> bool:
        """Keep the end of a call; False after the `send` (a task that it started lives on)."""
        if self._is_open:
            self._calls.append((call, *end))
        return self._is_open

    def finish(self) -> None:
        """End the calls: their content is there."""
        try:
            _ended.reset(self._token)
        except ValueError:  # the call came back in another context than it went out from
            _ended.set(None)
        self._is_open = False
        for call, *end in self._calls:
            call.finish(*end)


_ended: ContextVar[_Ended | None] = ContextVar("moesif_otel_httpx_ended", default=None)


def _send(send: Any, client: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `Client.send`, then end the calls whose content it has read."""
    if kwargs.get("stream"):
        return send(client, *args, **kwargs)
    ended = _Ended()
    try:
        return send(client, *args, **kwargs)
    finally:
        ended.finish()


async def _send_async(send: Any, client: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `AsyncClient.send`, then end the calls whose content it has read."""
    if kwargs.get("stream"):
        return await send(client, *args, **kwargs)
    ended = _Ended()
    try:
        return await send(client, *args, **kwargs)
    finally:
        ended.finish()


def _send_one(send: Any, client: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `Client._send_single_request` and capture the call."""
    request: Any = args[0] if args else kwargs.get("request")
    call = _begin(request)
    if call is None:
        return send(client, *args, **kwargs)
    stream = _enter(call, request)
    try:
        response = send(client, *args, **kwargs)
    except BaseException as exc:
        _failed(call, request, stream, exc)
        raise
    _answered(call, request, stream, response)
    return response


async def _send_one_async(send: Any, client: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `AsyncClient._send_single_request` and capture the call."""
    request: Any = args[0] if args else kwargs.get("request")
    call = _begin(request)
    if call is None:
        return await send(client, *args, **kwargs)
    stream = _enter(call, request)
    try:
        response = await send(client, *args, **kwargs)
    except BaseException as exc:
        _failed(call, request, stream, exc)
        raise
    _answered(call, request, stream, response)
    return response


PATCHES: Final = PatchSet(
    [
        Patch("httpx", "Client.send", _send),
        Patch("httpx", "AsyncClient.send", _send_async),
        Patch("httpx", "Client._send_single_request", _send_one),
        Patch("httpx", "AsyncClient._send_single_request", _send_one_async),
    ]
)


def _begin(request: Any) -> OutgoingCall | None:
    if not isinstance(request, httpx.Request):
        return None
    # A second layer of ours would send the very same request.
    return begin_call(
        "httpx", request.method, str(request.url), request.headers, lambda call: call.identity is request
    )


def _enter(call: OutgoingCall, request: httpx.Request) -> Any:
    """Make the call current and see its upload as it passes; returns the request's own stream."""
    call.identity = request
    for exchange in call.exchanges:
        # Until the response is there only a capture that stops midway looks.
        exchange.request_headers = lambda: _headers(request)
    call.set_arguments(request, None)
    call.enter()
    stream = request.stream
    try:
        if call.request_bodies:
            if hasattr(request, "_content"):
                for body in call.request_bodies:
                    body.add(request.content)
            else:
                request.stream = stand_in_for(stream, UploadSink(call)) or stream
    except Exception as exc:
        call.caught("outgoing request body", exc)
    return stream


def _put_stream_back(request: httpx.Request, stream: Any) -> None:
    if original_of(request.stream) is stream:  # else it was read into memory meanwhile
        request.stream = stream


def _failed(call: OutgoingCall, request: httpx.Request, stream: Any, error: BaseException) -> None:
    try:
        _put_stream_back(request, stream)
        call.note_request(request.method, str(request.url), _headers(request))
    except Exception as exc:
        call.caught("outgoing call that failed", exc)
    call.failed(request, error)


def _answered(call: OutgoingCall, request: httpx.Request, stream: Any, response: Any) -> None:
    """Take the response, whose body is still to come as a rule. Never raises."""
    try:
        _put_stream_back(request, stream)
        call.note_request(request.method, str(request.url), _headers(request))
        call.note_response(response.status_code, _headers(response))
        call.leave()
        if response.status_code == _SWITCHING_PROTOCOLS:
            call.finish(request, response, Outcome.UPGRADED)
            return
        if hasattr(response, "_content"):  # a transport has made it of bytes
            call.take_body(response.content, decoded=True)
            _StreamWatch(call, response).ended(Outcome.COMPLETE)
            return
        watch = _StreamWatch(call, response)
        is_async = isinstance(response.stream, httpx.AsyncByteStream)
        is_sync = isinstance(response.stream, httpx.SyncByteStream)
        kind = _AnyStream if is_async and is_sync else _AsyncStream if is_async else _SyncStream
        response.stream = kind(response.stream, watch)
    except Exception as exc:
        call.caught("outgoing response", exc)
        call.leave()
        call.finish(request, response, Outcome.COMPLETE)


def _headers(message: httpx.Request | httpx.Response) -> Headers:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message.headers.raw]


class _StreamWatch:
    """What is known of a body while it is being read; belongs to the stream, and does not hold the response."""

    __slots__ = ("_call", "_finalizer", "_length", "_response")

    def __init__(self, call: OutgoingCall, response: httpx.Response) -> None:
        self._call: OutgoingCall | None = call
        self._response = weakref.ref(response)
        self._length = _length_of(response)
        if call.has_callbacks:
            call.set_arguments(*_without_objects(response))
        self._finalizer = weakref.finalize(response, call.dropped)
        self._finalizer.atexit = False

    def piece(self, piece: Any) -> None:
        """Note one piece. Never raises."""
        call = self._call
        if call is None or not isinstance(piece, (bytes, bytearray, memoryview)):
            return
        try:
            for body in call.response_bodies:
                body.add(piece)
            if self._length is not None:
                self._length -= len(piece)
        except Exception as exc:
            call.caught("outgoing response body", exc)

    def closed(self) -> None:
        """Note that the stream was closed: with all of the body, or before it came."""
        self.ended(Outcome.ABORTED if self._length is None or self._length > 0 else Outcome.COMPLETE)

    def ended(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """End the call, or note its end where the content is being read; the first end counts. Never raises."""
        call, self._call = self._call, None
        if call is None:
            return
        self._finalizer.detach()
        response = self._response()
        request = response._request if response is not None else None
        ended = _ended.get()
        if ended is None or not ended.add(call, request, response, outcome, error):
            call.finish(request, response, outcome, error)


def _length_of(response: httpx.Response) -> int | None:
    """Return the number of bytes that the body has on the wire, where that is known."""
    if response.status_code in _STATUSES_WITHOUT_BODY or response.request.method == "HEAD":
        return 0
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isascii() and length.isdigit() else None


def _without_objects(response: httpx.Response) -> tuple[httpx.Request, httpx.Response]:
    """Make what callbacks get when garbage collection ends a call: nothing that leads to the real objects."""
    request = httpx.Request(response.request.method, response.request.url, headers=response.request.headers)
    return request, httpx.Response(response.status_code, headers=response.headers.raw, request=request, stream=_NOTHING)


class _Stream:
    """A response's stream, seen as its pieces pass; everything else is the original's."""

    def __init__(self, stream: Any, watch: _StreamWatch) -> None:
        self._stream = stream
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _SyncStream(_Stream, httpx.SyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        return _ResponsePieces(iter(self._stream), self._watch)

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            self._watch.closed()


class _AsyncStream(_Stream, httpx.AsyncByteStream):
    def __aiter__(self) -> AsyncIterator[bytes]:
        return _ResponsePieces(aiter(self._stream), self._watch)

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            self._watch.closed()


class _AnyStream(_SyncStream, _AsyncStream):
    """For a transport whose streams are of both kinds."""


class _ResponsePieces:
    """The iterator of a response's stream, of either kind."""

    __slots__ = ("_iterator", "_watch")

    def __init__(self, iterator: Any, watch: _StreamWatch) -> None:
        self._iterator = iterator
        self._watch = watch

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            piece: bytes = next(self._iterator)
        except StopIteration:
            self._watch.ended(Outcome.COMPLETE)
            raise
        except BaseException as exc:
            self._watch.ended(Outcome.FAILED, exc)
            raise
        self._watch.piece(piece)
        return piece

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            piece: bytes = await self._iterator.__anext__()
        except StopAsyncIteration:
            self._watch.ended(Outcome.COMPLETE)
            raise
        except BaseException as exc:
            self._watch.ended(Outcome.FAILED, exc)
            raise
        self._watch.piece(piece)
        return piece

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)  # `close` and `aclose` of generators


_NOTHING: Final = httpx.ByteStream(b"")
