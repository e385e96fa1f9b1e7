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

from moesif_otel._capture.body import BYTES, NO_BODY_STATUSES
from moesif_otel._capture.exchange import Outcome
from moesif_otel._capture.outgoing import OutgoingCall, begin_call, restore
from moesif_otel._capture.patching import Patch, PatchSet
from moesif_otel._capture.streams import Pieces, PieceSink, UploadSink, original_of, stand_in_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from moesif_otel._capture.exchange import Headers

_SWITCHING_PROTOCOLS: Final = 101


class _Reading:
    """A `send` that reads the response: the callbacks of calls whose body comes inside of it wait for the content."""

    __slots__ = ("_calls", "_is_open", "_token")

    def __enter__(self) -> None:
        self._calls: list[tuple[OutgoingCall, tuple[Any, ...]]] = []
        self._is_open = True
        self._token = _reading.set(self)

    def add(self, call: OutgoingCall, *end: Any) -> bool:
        """Keep the end of a call; False after the `send` (a task that it started lives on)."""
        if self._is_open:
            self._calls.append((call, end))
        return self._is_open

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        restore(_reading, self._token, self, None)
        self._is_open = False
        for call, end in self._calls:
            if isinstance(error, GeneratorExit):  # perhaps by garbage collection, in the midst of anything else
                call.dropped(*end[2:])
            else:
                call.finish(*end)


_reading: ContextVar[_Reading | None] = ContextVar("moesif_otel_httpx_reading", default=None)


def _send(send: Any, client: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `Client.send`, then end the calls whose content it has read."""
    if kwargs.get("stream"):
        return send(client, *args, **kwargs)
    with _Reading():
        return send(client, *args, **kwargs)


async def _send_async(send: Any, client: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `AsyncClient.send`, then end the calls whose content it has read."""
    if kwargs.get("stream"):
        return await send(client, *args, **kwargs)
    with _Reading():
        return await send(client, *args, **kwargs)


def _send_one(send: Any, client: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `Client._send_single_request` and capture the call."""
    call = _begin(*args, **kwargs)
    if call is None:
        return send(client, *args, **kwargs)
    with call:
        response = send(client, *args, **kwargs)
    return call.answered(response)


async def _send_one_async(send: Any, client: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `AsyncClient._send_single_request` and capture the call."""
    call = _begin(*args, **kwargs)
    if call is None:
        return await send(client, *args, **kwargs)
    with call:
        response = await send(client, *args, **kwargs)
    return call.answered(response)


PATCHES: Final = PatchSet(
    [
        Patch("httpx", "Client.send", _send),
        Patch("httpx", "AsyncClient.send", _send_async),
        Patch("httpx", "Client._send_single_request", _send_one),
        Patch("httpx", "AsyncClient._send_single_request", _send_one_async),
    ]
)


def _begin(request: Any = None, *_: Any, **_more: Any) -> _HttpxCall | None:
    if not isinstance(request, httpx.Request):
        return None
    call = begin_call(_HttpxCall, request.method, str(request.url), request.headers, request)
    if call is not None:
        call.sends(request, _headers, request)
    return call


class _HttpxCall(OutgoingCall):
    """A request that goes out."""

    __slots__ = ("_stream",)

    client = "httpx"

    @staticmethod
    def is_part_of(call: OutgoingCall, *identity: Any) -> bool:
        """Tell whether a second layer of ours sends the very same request."""
        return isinstance(call, _HttpxCall) and call.identity[0] is identity[0]

    def _see_upload(self) -> None:
        request = self.request
        self._stream = request.stream
        if not self.request_bodies:
            return
        if hasattr(request, "_content"):
            for body in self.request_bodies:
                body.add(request.content)
        else:
            request.stream = stand_in_for(request.stream, UploadSink(self)) or request.stream

    def _note_request(self) -> None:
        """Put the request's own stream back, and note what was sent."""
        request = self.request
        if original_of(request.stream) is self._stream:  # else it was read into memory meanwhile
            request.stream = self._stream
        self.note_request(request.method, str(request.url), _headers(request))

    def _note_failure(self, error: BaseException) -> None:
        del error
        self._note_request()

    def _note_answer(self, response: Any) -> None:
        self._note_request()
        self.note_response(response.status_code, _headers(response))

    def _awaits_body(self, response: Any) -> bool:
        if response.status_code == _SWITCHING_PROTOCOLS:
            self.finish(self.request, response, Outcome.UPGRADED)
            return True
        watch = _StreamWatch(self, response)
        if hasattr(response, "_content"):  # a transport has made it of bytes
            self.take_body(response.content, decoded=True)
            watch.ended(Outcome.COMPLETE)
            return True
        is_async = isinstance(response.stream, httpx.AsyncByteStream)
        is_sync = isinstance(response.stream, httpx.SyncByteStream)
        kind = _AnyStream if is_async and is_sync else _AsyncStream if is_async else _SyncStream
        response.stream = kind(response.stream, watch)
        return True


def _headers(message: httpx.Request | httpx.Response) -> Headers:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message.headers.raw]


class _StreamWatch(PieceSink):
    """The state of a body while it is being read; it belongs to the stream, and does not hold the response.

    A context manager around the reading of one piece, which ends the call with the body, or with what is raised.
    """

    __slots__ = ("_call", "_finalizer", "_length", "_response")

    def __init__(self, call: OutgoingCall, response: httpx.Response) -> None:
        self._call: OutgoingCall | None = call
        self._response = weakref.ref(response)
        self._length = _length_of(response)
        # In any case: extensions of the request may lead to the response.
        call.set_arguments(*(_without_objects(response) if call.has_callbacks else (None, None)))
        self._finalizer = call.drop_with(response)

    def piece(self, piece: Any) -> None:
        if self._call is not None and isinstance(piece, BYTES):
            self._call.take_piece(piece)
            if self._length is not None:
                self._length -= len(piece)

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, (StopIteration, StopAsyncIteration)):
            self.ended(Outcome.COMPLETE)
        elif isinstance(error, GeneratorExit):
            self.destroyed(error)
        elif error is not None:
            self.ended(Outcome.FAILED, error)

    def closed(self) -> None:
        """Note that the stream was closed: with all of the body, or before it came."""
        self.ended(Outcome.ABORTED if self._length is None or self._length > 0 else Outcome.COMPLETE)

    def destroyed(self, error: GeneratorExit) -> None:
        """End the call of a task that was destroyed, perhaps by garbage collection."""
        call, self._call = self._call, None
        if call is not None:
            self._finalizer.detach()
            call.dropped(Outcome.FAILED, error)

    def ended(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """End the call, or note its end where the content is being read; the first end counts. Never raises."""
        call, self._call = self._call, None
        if call is None:
            return
        self._finalizer.detach()
        response = self._response()
        request = response._request if response is not None else None
        reading = _reading.get()
        if reading is None or not reading.add(call, request, response, outcome, error):
            call.finish(request, response, outcome, error)


def _length_of(response: httpx.Response) -> int | None:
    """Return the number of bytes that the body has on the wire, where that is known."""
    if response.status_code in NO_BODY_STATUSES or response.request.method == "HEAD":
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
        except GeneratorExit as exc:
            self._watch.destroyed(exc)
            raise
        finally:
            self._watch.closed()


class _AnyStream(_SyncStream, _AsyncStream):
    """For a transport whose streams are of both kinds."""


class _ResponsePieces(Pieces):
    """The iterator of a response's stream; what ends it ends the call."""

    __slots__ = ()

    _sink: _StreamWatch

    def __next__(self) -> Any:
        with self._sink:
            piece = next(self._iterator)
        self._sink.piece(piece)
        return piece

    async def __anext__(self) -> Any:
        with self._sink:
            piece = await self._iterator.__anext__()
        self._sink.piece(piece)
        return piece


_NOTHING: Final = httpx.ByteStream(b"")
