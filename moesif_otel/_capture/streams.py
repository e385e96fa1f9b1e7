"""A tee for what is read from a file or an iterable: the one who reads gets the same object, and we see what passes.

The stand-in looks like what it stands for to everybody: `len()`, `tell()`, `seek()`, `isinstance`, `with`, copies,
pickles and every attribute are the original's. It never reads ahead or on its own, and copies only what is captured.
"""

from __future__ import annotations

import copy
import io
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from moesif_otel._capture.body import BYTES, LeftOut

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._capture.body import CapturedBody
    from moesif_otel._capture.outgoing import OutgoingCall


class PieceSink:
    """Receives what happens to a stand-in. Nothing here may raise."""

    __slots__ = ()

    def piece(self, piece: Any) -> None:
        """Note one piece that was read."""
        raise NotImplementedError

    def told(self, position: Any) -> None:
        """Note what `tell()` answered."""

    def moved(self, position: Any, whence: Any) -> None:
        """Note a `seek`."""

    def restarted(self) -> None:
        """Note that it is read from its beginning."""


# Special methods are looked up on the class, so a stand-in's class has exactly those of the body's class.
_FORWARDED: Final = ("__len__", "__bool__", "__exit__", "__getitem__", "__contains__", "__fspath__")


class UploadSink(PieceSink):
    """Takes the pieces of a request body, and follows its rewinds.

    Args:
        call: The call; each request body of it is fed while its Exchange is open.
        start: The body's position before the call, where it is known.
        text_encoding: How the client sends text.
    """

    __slots__ = ("_call", "_elsewhere", "_is_rewound", "_passed_bytes", "_start", "_text_encoding")

    def __init__(self, call: OutgoingCall, start: int | None = None, text_encoding: str = "utf-8") -> None:
        self._call = call
        self._start = start
        self._text_encoding = text_encoding
        self._passed_bytes = 0
        self._elsewhere = False
        self._is_rewound = False

    def piece(self, piece: Any) -> None:
        try:
            if self._is_rewound:
                self.restarted()
            if isinstance(piece, str):
                piece = piece.encode(self._text_encoding, "replace")
            if not isinstance(piece, BYTES):
                return
            size = piece.nbytes if isinstance(piece, memoryview) else len(piece)
            self._passed_bytes += size
            for body in self._call.request_bodies:
                if self._elsewhere:
                    _lose(body, size)
                else:
                    body.add(piece)
        except Exception as exc:
            self._call.caught("capture of an outgoing request body", exc)

    def told(self, position: Any) -> None:
        """Note what `tell()` answered: before the first piece, that is where the body begins."""
        if self._start is None and not self._passed_bytes and isinstance(position, int):
            self._start = position

    def moved(self, position: Any, whence: Any) -> None:
        """Note a `seek`."""
        try:
            if whence == io.SEEK_SET and (self._start is None or position == self._start):
                # What was sent counts until it is sent again: digest authentication rewinds, needed or not.
                self._is_rewound, self._passed_bytes, self._elsewhere = True, 0, False
            else:
                # A probe of the length (to the end and back) is the usual case; reading on from there is not.
                self._elsewhere = not (
                    whence == io.SEEK_SET and self._start is not None and position == self._start + self._passed_bytes
                )
        except Exception as exc:
            self._call.caught("capture of an outgoing request body", exc)

    def restarted(self) -> None:
        """Note that the body is sent from its beginning."""
        self._is_rewound, self._passed_bytes, self._elsewhere = False, 0, False
        for body in self._call.request_bodies:
            body.restart()


def _lose(body: CapturedBody, size_bytes: int) -> None:
    # The sender reads from somewhere in the middle: what was kept is no beginning of what is sent.
    total_bytes = body.total_bytes + size_bytes
    body.restart()
    body.total_bytes, body.left_out = total_bytes, LeftOut.UNREADABLE


class _StandIn:
    """Base of all stand-ins; `_stand_in_of` adds the special methods that the body has."""

    __slots__ = ("__weakref__", "_moesif_otel_body", "_moesif_otel_sink")

    def __init__(self, body: Any, sink: PieceSink) -> None:
        object.__setattr__(self, "_moesif_otel_body", body)
        object.__setattr__(self, "_moesif_otel_sink", sink)

    # `isinstance(body, io.TextIOBase)` decides in urllib3 whether pieces are encoded.
    @property  # type: ignore[misc] # read-only, as for any object that answers for another
    def __class__(self) -> Any:
        return self._moesif_otel_body.__class__

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._moesif_otel_body, name)
        watch = _WATCHED.get(name)
        return value if watch is None or not callable(value) else watch(value, self._moesif_otel_sink)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._moesif_otel_body, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._moesif_otel_body, name)

    def __dir__(self) -> Any:
        return dir(self._moesif_otel_body)

    def __repr__(self) -> str:
        return repr(self._moesif_otel_body)

    def __eq__(self, other: object) -> bool:
        return bool(self._moesif_otel_body == original_of(other))

    def __hash__(self) -> int:
        return hash(self._moesif_otel_body)

    # A copy is one of the original, which nobody watches.
    def __copy__(self) -> Any:
        return copy.copy(self._moesif_otel_body)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self._moesif_otel_body, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._moesif_otel_body.__reduce_ex__(protocol)


class Pieces:
    """The iterator of a body that is not an iterator itself, of whichever kind."""

    __slots__ = ("_iterator", "_sink")

    def __init__(self, iterator: Any, sink: PieceSink) -> None:
        self._iterator = iterator
        self._sink = sink

    def __iter__(self) -> Pieces:
        return self

    def __next__(self) -> Any:
        piece = next(self._iterator)
        self._sink.piece(piece)
        return piece

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> Any:
        piece = await self._iterator.__anext__()
        self._sink.piece(piece)
        return piece

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)  # `close` and `aclose` of generators


def _watch_read(read: Callable[..., Any], sink: PieceSink) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        piece = read(*args, **kwargs)
        sink.piece(piece)
        return piece

    return watched


def _watch_readinto(readinto: Callable[..., Any], sink: PieceSink) -> Callable[..., Any]:
    def watched(buffer: Any, *args: Any, **kwargs: Any) -> Any:
        count = readinto(buffer, *args, **kwargs)
        if count:
            sink.piece(_start_of(buffer, count))
        return count

    return watched


def _start_of(buffer: Any, count_bytes: int) -> bytes:
    with memoryview(buffer) as view:
        try:
            with view.cast("B") as flat:
                return bytes(flat[:count_bytes])
        except (TypeError, ValueError):  # an array of ctypes, or one that is not contiguous
            return view.tobytes()[:count_bytes]


def _watch_readlines(readlines: Callable[..., Any], sink: PieceSink) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        lines = readlines(*args, **kwargs)
        for line in lines:
            sink.piece(line)
        return lines

    return watched


def _watch_seek(seek: Callable[..., Any], sink: PieceSink) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = seek(*args, **kwargs)
        position, whence = (*args, None, None)[:2]
        sink.moved(position, kwargs.get("whence", io.SEEK_SET) if whence is None else whence)
        return result

    return watched


def _watch_tell(tell: Callable[..., Any], sink: PieceSink) -> Callable[..., Any]:
    def watched() -> Any:
        position = tell()
        sink.told(position)
        return position

    return watched


_WATCHED: Final[dict[str, Callable[[Callable[..., Any], PieceSink], Callable[..., Any]]]] = {
    "read": _watch_read,
    "read1": _watch_read,
    "readinto": _watch_readinto,
    "readinto1": _watch_readinto,
    "readline": _watch_read,
    "readlines": _watch_readlines,
    "seek": _watch_seek,
    "tell": _watch_tell,
}


def _iterate(self: _StandIn) -> Any:
    iterator = iter(self._moesif_otel_body)
    if not hasattr(self._moesif_otel_body, "read"):
        self._moesif_otel_sink.restarted()  # each sending of an iterable begins so, also a redirect's
    # A file or a generator is its own iterator, and so is its stand-in.
    return self if iterator is self._moesif_otel_body else Pieces(iterator, self._moesif_otel_sink)


def _advance(self: _StandIn) -> Any:
    piece = next(self._moesif_otel_body)
    self._moesif_otel_sink.piece(piece)
    return piece


def _iterate_async(self: _StandIn) -> Any:
    self._moesif_otel_sink.restarted()
    return Pieces(aiter(self._moesif_otel_body), self._moesif_otel_sink)


def _read(self: _StandIn, *args: Any, **kwargs: Any) -> Any:
    piece = self._moesif_otel_body.read(*args, **kwargs)
    self._moesif_otel_sink.piece(piece)
    return piece


def _enter(self: _StandIn) -> Any:
    entered = self._moesif_otel_body.__enter__()
    return self if entered is self._moesif_otel_body else entered


_SPECIAL: Final = {
    "__iter__": _iterate,
    "__next__": _advance,
    "__aiter__": _iterate_async,
    "__enter__": _enter,
}


def _forward(name: str) -> Callable[..., Any]:
    def forwarded(self: _StandIn, *args: Any) -> Any:
        return getattr(self._moesif_otel_body, name)(*args)

    return forwarded


def stand_in_for(body: Any, sink: PieceSink) -> Any | None:
    """Return an object that looks and behaves as `body` and tells `sink` what is read from it.

    Args:
        body: A file, or anything that can be iterated.
        sink: Where the pieces go.

    Returns:
        The stand-in; None when the body is no file and no iterable (text and bytes can be looked at as they are).
    """
    kind: Any = type(body)
    stand_in, is_iterable = _stand_in_of(kind)
    return stand_in(body, sink) if is_iterable or hasattr(body, "read") else None


@lru_cache(maxsize=64)
def _stand_in_of(kind: Any) -> tuple[type[_StandIn], bool]:
    """Return the class of a stand-in that has the special methods of `kind`, and whether that can be iterated."""
    special = {name: _SPECIAL.get(name) or _forward(name) for name in (*_SPECIAL, *_FORWARDED) if hasattr(kind, name)}
    # The one method that nearly everybody calls: `__getattr__` takes three times as long. Not of a property: an object
    # of this class need not have it.
    if callable(getattr(kind, "read", None)):
        special["read"] = _read
    is_iterable = "__iter__" in special or "__aiter__" in special
    # Whoever prints or logs its class sees what it stands for, and so does who reads of it in a TypeError.
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (_StandIn,), {"__slots__": (), **names, **special}), is_iterable


def original_of(body: Any, stays: Callable[[PieceSink], bool] = lambda _: False) -> Any:
    """Return the body that a stand-in stands for, or the first one whose sink stays; anything else as it is."""
    while issubclass(type(body), _StandIn) and not stays(body._moesif_otel_sink):
        body = body._moesif_otel_body
    return body


# Bodies that are all there.

_PLAIN: Final = (bytes, str, bytearray, memoryview)


def is_plain(body: Any) -> bool:
    """Tell whether a body is all there, in memory, as it will be sent (urllib3 looks for `read` before the buffer)."""
    if body is None or isinstance(body, _PLAIN):
        return True
    if hasattr(body, "read"):
        return False
    try:
        memoryview(body).release()
    except TypeError:
        return False
    return True


def add_plain(captured: CapturedBody, body: Any, text_encoding: str) -> None:
    """Note a body that is all there."""
    if body is None:
        return
    if isinstance(body, str):
        # The true size of a long text needs no copy of it while it is ASCII, as forms are.
        head = body if len(body) <= captured.max_bytes or not body.isascii() else body[: captured.max_bytes]
        captured.add(head.encode(text_encoding, "replace"))
        captured.count(len(body) - len(head))
    elif isinstance(body, (bytes, bytearray)):
        captured.add(body)
    else:
        captured.add(memoryview(body).cast("B"))
