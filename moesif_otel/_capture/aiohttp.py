"""Capture of calls made with `aiohttp`: a layer on `ClientSession._request`, one event a call, redirects inside.

The request's body is seen as it is written, by a trace of ours on the one request; the response's as the caller takes
it from the stream, whose class is swapped on the object while it is being read. The reader has no room for anything of
ours, so what is known of it stands in a table by its id, until the body ends or the response is dropped.
"""

from __future__ import annotations

import asyncio
import weakref
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import aiohttp
from aiohttp.streams import EmptyStreamReader, StreamReader
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from moesif_otel._capture.body import BYTES, LeftOut
from moesif_otel._capture.exchange import Outcome
from moesif_otel._capture.outgoing import OutgoingCall, begin_call, call_being_sent
from moesif_otel._capture.patching import Patch, PatchSet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moesif_otel._capture.outgoing import Route

_SWITCHING_PROTOCOLS: Final = 101
_DECODED: Final = frozenset({"gzip", "deflate", "br", "zstd"})  # the codings that aiohttp undoes


async def _request(request: Any, session: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `ClientSession._request` and capture the call."""
    method = args[0] if args else kwargs.get("method")
    target = args[1] if len(args) > 1 else kwargs.get("str_or_url")
    headers = kwargs.get("headers")
    call = begin_call(_AiohttpCall, str(method).upper(), str(target), headers, session, target, kwargs)
    if call is None:
        return await request(session, *args, **kwargs)
    with call:
        response = await request(session, *args, **kwargs)
    return call.answered(response)


async def _send(send: Any, request: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `ClientRequest.send`, and see its body as it is written."""
    call = call_being_sent(_AiohttpCall)
    if call is not None:
        try:
            call.last_sent = request
            for body in call.request_bodies:
                body.restart()
            traces = request._traces
            # A middleware may send one request twice.
            if call.request_bodies and request.body and not (traces and type(traces[-1]) is _UploadTrace):
                request._traces = [*request._traces, _UploadTrace(call)]
        except Exception as exc:
            call.caught("capture of an outgoing request body", exc)
    return await send(request, *args, **kwargs)


PATCHES: Final = PatchSet(
    [
        Patch("aiohttp.client", "ClientSession._request", _request),
        Patch("aiohttp.client_reqrep", "ClientRequest.send", _send),
    ]
)


class _UploadTrace:
    """Stands among the traces of one request, as `aiohttp.tracing.Trace` does; only the body's pieces are noted."""

    __slots__ = ("_call",)

    def __init__(self, call: OutgoingCall) -> None:
        self._call = call

    async def send_request_chunk_sent(self, _method: str, _url: URL, chunk: Any) -> None:
        """Note a piece, before it is compressed."""
        try:
            if isinstance(chunk, BYTES):
                for body in self._call.request_bodies:
                    body.decoded = True
                    body.add(chunk)
        except Exception as exc:
            self._call.caught("capture of an outgoing request body", exc)

    async def send_request_headers(self, *_: Any) -> None:
        """Do nothing."""

    async def send_response_chunk_received(self, *_: Any) -> None:
        """Do nothing: the stream has been seen."""


class _AiohttpCall(OutgoingCall):
    """A `ClientSession._request`."""

    __slots__ = ("_decompresses", "last_sent")

    client = "aiohttp"

    @staticmethod
    def is_part_of(call: OutgoingCall, *identity: Any) -> bool:
        """Tell whether it comes from a second layer of ours."""
        return isinstance(call, _AiohttpCall) and all(
            one is other for one, other in zip(call.identity[:2], identity[:2], strict=True)
        )

    def __init__(self, routes: Sequence[Route], method: str, url: str) -> None:
        super().__init__(routes, method, url)
        self._decompresses = False
        self.last_sent: Any = None
        """The last `ClientRequest`: redirects and retries make more of them."""

    def _note_failure(self, error: BaseException) -> None:
        self._note_request()
        if isinstance(error, aiohttp.ClientResponseError) and error.status:  # `raise_for_status`
            self.note_response(error.status, [(str(name), str(value)) for name, value in (error.headers or {}).items()])

    def _note_answer(self, response: Any) -> None:
        self._note_request()
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in response.raw_headers]
        self.note_response(response.status, headers, len(response.history))

    def _note_request(self) -> None:
        """Note the last request that went out."""
        session, target, arguments = self.identity
        decompresses = arguments.get("auto_decompress")
        self._decompresses = bool(session.auto_decompress if decompresses is None else decompresses)
        last, self.last_sent = self.last_sent, None  # nothing may lead to the response
        if last is not None:
            self.note_request(last.method, str(last.url), [(str(n), str(v)) for n, v in last.headers.items()])
            self.request = last.request_info
            return
        # None did: the URL was wrong, or nobody was there.
        try:
            url = session._build_url(target)
            if arguments.get("params"):
                url = url.update_query(arguments["params"])
        except (TypeError, ValueError):  # it is no URL, which is why the call failed
            url = URL()
        headers: CIMultiDict[str] = CIMultiDict(session.headers)
        headers.update(arguments.get("headers") or {})
        method = self.exchanges[0].method
        self.note_request(method, str(url or target), [(str(name), str(value)) for name, value in headers.items()])
        self.request = aiohttp.RequestInfo(url, method, CIMultiDictProxy(headers), url)

    def _awaits_body(self, response: Any) -> bool:
        if response.status == _SWITCHING_PROTOCOLS:
            self.finish(self.request, response, Outcome.UPGRADED)
            return True
        content = response.content
        if type(content) is not StreamReader:
            if type(content) is not EmptyStreamReader:
                for body in self.response_bodies:
                    body.left_out = LeftOut.UNREADABLE
            return False
        if content.at_eof():
            return False
        coding = response.headers.get("Content-Encoding", "").lower()
        for body in self.response_bodies:
            body.decoded = self._decompresses and coding in _DECODED
        _watches[id(content)] = _ReaderWatch(self, response)
        content.__class__ = _TeedReader
        return True


class _ReaderWatch:
    """The state of a body while it is being read; it holds neither the response nor anything that refers to it."""

    __slots__ = ("_call", "_finalizer", "_info", "_position_bytes", "_response", "end", "error", "is_reading")

    def __init__(self, call: OutgoingCall, response: Any) -> None:
        self._call = call
        self._position_bytes: int = response.content._cursor
        self.error: BaseException | None = None  # what ended the reading, before the response is closed for it
        self.is_reading = False  # a piece is on its way out of the reader
        self.end: tuple[Outcome, BaseException | None] | None = None  # how the body has ended meanwhile
        self._info: aiohttp.RequestInfo = call.request
        self._response = weakref.ref(response)
        if call.has_callbacks:
            call.set_arguments(call.request, _without_stream(call.request, response))
        self._finalizer = call.drop_with(response, partial(_dropped, id(response.content), call))

    def piece(self, piece: bytes, position_bytes: int) -> None:
        """Note a piece that leaves the reader up to a position. Never raises.

        What has left it before is not new: a multipart reader puts back what it has read beyond a boundary.
        """
        new_bytes = position_bytes - self._position_bytes
        if new_bytes > 0:
            self._position_bytes = position_bytes
            self._call.take_piece(piece if new_bytes >= len(piece) else piece[-new_bytes:])

    def ended(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """End the call. Never raises."""
        self._finalizer.detach()
        self._call.finish(self._info, self._response(), outcome, error)

    def destroyed(self, error: GeneratorExit) -> None:
        """End the call of a task that was destroyed, perhaps by garbage collection."""
        self._finalizer.detach()
        self._call.dropped(Outcome.FAILED, error)


def _without_stream(info: aiohttp.RequestInfo, response: Any) -> SimpleNamespace:
    """Make what callbacks get of a response that garbage collection has taken."""
    return SimpleNamespace(
        status=response.status,
        reason=response.reason,
        headers=response.headers,
        method=response.method,
        url=response.url,
        request_info=info,
    )


_watches: Final[dict[int, _ReaderWatch]] = {}


def _dropped(content_id: int, call: OutgoingCall) -> None:
    # Before the reader itself goes, and its id to another: the response holds it.
    _watches.pop(content_id, None)
    call.dropped()


class _TeedReader(StreamReader):
    """aiohttp's reader with each piece that leaves it watched, and its end."""

    __slots__ = ()

    def _read_nowait_chunk(self, n: int) -> bytes:
        watch = _watches.get(id(self))
        if watch is None:
            return StreamReader._read_nowait_chunk(self, n)
        watch.is_reading = True  # taking a piece may have the connection read on within this call, up to the end
        try:
            piece = StreamReader._read_nowait_chunk(self, n)
        finally:
            watch.is_reading = False
        watch.piece(piece, self._cursor)
        if watch.end is not None:
            _end(self, *watch.end)
        elif self._eof and not self._buffer:
            _end(self, Outcome.COMPLETE)
        return piece

    def feed_eof(self) -> None:
        StreamReader.feed_eof(self)
        if not self._buffer:
            _end(self, Outcome.COMPLETE)

    async def _wait(self, func_name: str) -> None:
        try:
            await StreamReader._wait(self, func_name)
        except (asyncio.CancelledError, asyncio.TimeoutError) as exc:
            watch = _watches.get(id(self))
            if watch is not None:
                watch.error = exc
            raise
        except GeneratorExit as exc:
            watch = _taken_off(self)
            if watch is not None:
                watch.destroyed(exc)
            raise

    def set_exception(self, exc: BaseException, *cause: Any) -> None:
        StreamReader.set_exception(self, exc, *cause)
        watch = _watches.get(id(self))
        error = watch.error if watch is not None else None
        if error is None and not _is_of_close(exc):
            error = exc
        _end(self, Outcome.ABORTED if error is None else Outcome.FAILED, error)


# Whoever prints or logs it sees what it is.
_TeedReader.__name__, _TeedReader.__qualname__ = StreamReader.__name__, StreamReader.__qualname__
_TeedReader.__module__ = StreamReader.__module__


def _is_of_close(error: BaseException) -> bool:
    """Tell whether it is what `close` and `release` set on a stream whose end has not come."""
    return type(error) is aiohttp.ClientConnectionError and error.args == ("Connection closed",)


def _end(content: Any, outcome: Outcome, error: BaseException | None = None) -> None:
    watch = _watches.get(id(content))
    if watch is not None and watch.is_reading:
        watch.end = watch.end or (outcome, error)
    elif watch is not None:
        _taken_off(content)
        watch.ended(outcome, error)


def _taken_off(content: Any) -> _ReaderWatch | None:
    """Give a reader its own class back, and return what has watched it."""
    watch = _watches.pop(id(content), None)
    if watch is not None:
        content.__class__ = StreamReader
    return watch
