"""A request body that is a file or an iterable, seen as it is sent.

Owns: the stand-in that takes the body's place in a `PreparedRequest` for the time of one call.
Threads: the one that sends.
Never: reads ahead, reads on its own, copies what is not captured, changes what the body looks like to
`requests`, `urllib3` or an adapter: `len()`, `tell()`, `seek()`, `isinstance` and every attribute are the body's.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from moesif_otel._capture.body import LeftOut
from moesif_otel._capture.requests.facts import TEXT_ENCODING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from moesif_otel._capture.body import CapturedBody
    from moesif_otel._capture.exchange import Exchange

__all__ = ["UploadSink", "original_of", "stand_in_for"]

# Special methods are looked up on the class, so a stand-in's class has exactly those of the body's class.
_FORWARDED: Final = ("__len__", "__bool__", "__enter__", "__exit__", "__getitem__", "__contains__", "__fspath__")
_TEED: Final = ("__iter__", "__next__")


class UploadSink:
    """Takes the pieces that were read from a body, and follows its rewinds.

    Args:
        exchanges: The Exchanges of the call; each one's `request_body` is fed while it is open.
        start: The body's position before the call, where it is known.
    """

    __slots__ = ("_elsewhere", "_exchanges", "_passed_bytes", "_start")

    def __init__(self, exchanges: Sequence[Exchange], start: int | None) -> None:
        self._exchanges = exchanges
        self._start = start
        self._passed_bytes = 0
        self._elsewhere = False

    def piece(self, piece: Any) -> None:
        """Note one piece that was read. Never raises."""
        try:
            if isinstance(piece, str):
                piece = piece.encode(TEXT_ENCODING, "replace")
            if not isinstance(piece, (bytes, bytearray, memoryview)):
                return
            size = piece.nbytes if isinstance(piece, memoryview) else len(piece)
            self._passed_bytes += size
            for body in self._bodies():
                if self._elsewhere:
                    _lose(body, size)
                else:
                    body.add(piece)
        except Exception as exc:
            self._caught(exc)

    def told(self, position: Any) -> None:
        """Note what `tell()` answered: before the first piece, that is where the body begins."""
        if self._start is None and not self._passed_bytes and isinstance(position, int):
            self._start = position

    def moved(self, position: Any, whence: Any) -> None:
        """Note a `seek`. Never raises."""
        try:
            if whence == io.SEEK_SET and (self._start is None or position == self._start):
                self.restarted()
            else:
                # A probe of the length (to the end and back) is the usual case; reading on from there is not.
                self._elsewhere = not (
                    whence == io.SEEK_SET and self._start is not None and position == self._start + self._passed_bytes
                )
        except Exception as exc:
            self._caught(exc)

    def restarted(self) -> None:
        """Note that the body is sent from its beginning."""
        self._passed_bytes, self._elsewhere = 0, False
        for body in self._bodies():
            body.restart()

    def _bodies(self) -> list[CapturedBody]:
        return [e.request_body for e in self._exchanges if e.request_body is not None and e.is_open]

    def _caught(self, exc: BaseException) -> None:
        for exchange in self._exchanges[:1]:
            exchange.pipeline.guard.caught("outgoing request body", exc)


def _lose(body: CapturedBody, size_bytes: int) -> None:
    # The sender reads from somewhere in the middle: what was kept is no beginning of what is sent.
    total_bytes = body.total_bytes + size_bytes
    body.restart()
    body.total_bytes, body.left_out = total_bytes, LeftOut.UNREADABLE


class _StandIn:
    """Base of all stand-ins; `_stand_in_class` adds the special methods that the body has."""

    __slots__ = ("__weakref__", "_moesif_otel_body", "_moesif_otel_sink")

    def __init__(self, body: Any, sink: UploadSink) -> None:
        object.__setattr__(self, "_moesif_otel_body", body)
        object.__setattr__(self, "_moesif_otel_sink", sink)

    # `isinstance(body, io.TextIOBase)` decides in urllib3 whether pieces are encoded.
    @property  # type: ignore[misc] # read-only, as for any object that answers for another
    def __class__(self) -> Any:
        return type(self._moesif_otel_body)

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


class _Pieces:
    """An iterator of a body that is iterable again and again."""

    __slots__ = ("_iterator", "_sink")

    def __init__(self, iterator: Iterator[Any], sink: UploadSink) -> None:
        self._iterator = iterator
        self._sink = sink

    def __iter__(self) -> _Pieces:
        return self

    def __next__(self) -> Any:
        piece = next(self._iterator)
        self._sink.piece(piece)
        return piece


def _watch_read(read: Callable[..., Any], sink: UploadSink) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        piece = read(*args, **kwargs)
        sink.piece(piece)
        return piece

    return watched


def _watch_readinto(readinto: Callable[..., Any], sink: UploadSink) -> Callable[..., Any]:
    def watched(buffer: Any, *args: Any, **kwargs: Any) -> Any:
        count = readinto(buffer, *args, **kwargs)
        if count:
            sink.piece(bytes(memoryview(buffer)[:count]))
        return count

    return watched


def _watch_readlines(readlines: Callable[..., Any], sink: UploadSink) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        lines = readlines(*args, **kwargs)
        for line in lines:
            sink.piece(line)
        return lines

    return watched


def _watch_seek(seek: Callable[..., Any], sink: UploadSink) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = seek(*args, **kwargs)
        position, whence = (*args, None, None)[:2]
        sink.moved(position, kwargs.get("whence", io.SEEK_SET) if whence is None else whence)
        return result

    return watched


def _watch_tell(tell: Callable[..., Any], sink: UploadSink) -> Callable[..., Any]:
    def watched() -> Any:
        position = tell()
        sink.told(position)
        return position

    return watched


_WATCHED: Final[dict[str, Callable[[Callable[..., Any], UploadSink], Callable[..., Any]]]] = {
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
    return self if iterator is self._moesif_otel_body else _Pieces(iterator, self._moesif_otel_sink)


def _advance(self: _StandIn) -> Any:
    piece = next(self._moesif_otel_body)
    self._moesif_otel_sink.piece(piece)
    return piece


def _forward(name: str) -> Callable[..., Any]:
    def forwarded(self: _StandIn, *args: Any) -> Any:
        return getattr(self._moesif_otel_body, name)(*args)

    return forwarded


@lru_cache(maxsize=64)
def _stand_in_class(special_methods: tuple[str, ...]) -> type[_StandIn]:
    members: dict[str, Any] = {"__slots__": ()}
    for name in special_methods:
        members[name] = {"__iter__": _iterate, "__next__": _advance}.get(name) or _forward(name)
    return type("_StandIn", (_StandIn,), members)


def stand_in_for(body: Any, sink: UploadSink) -> Any | None:
    """Give an object that looks and behaves as `body` and tells `sink` what is read from it.

    Args:
        body: The body of a `PreparedRequest`.
        sink: Where the pieces go.

    Returns:
        The stand-in; None when the body is no file and no iterable (text and bytes can be looked at as they are).
    """
    special = tuple(name for name in (*_TEED, *_FORWARDED) if hasattr(type(body), name))
    if not hasattr(body, "read") and "__iter__" not in special:
        return None
    return _stand_in_class(special)(body, sink)


def original_of(body: Any) -> Any:
    """Give the body that a stand-in stands for; anything else is given back as it is."""
    while issubclass(type(body), _StandIn):
        body = body._moesif_otel_body
    return body
