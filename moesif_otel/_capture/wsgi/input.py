"""A tee on `wsgi.input`: the application reads, the first part of what it reads is kept.

Owns: `InputTee`.
Threads: the one that serves the request.
Never: reads ahead of the application, reads after it, changes what a read returns or raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moesif_otel._capture.body import CapturedBody
    from moesif_otel._guard import Guard

__all__ = ["InputTee"]

_FILLS_A_BUFFER: Final = frozenset({"readinto", "readinto1"})


class InputTee:
    """Stands for a `wsgi.input` and notes what passes; everything but reading goes straight to the original.

    Args:
        stream: The server's `wsgi.input`.
        body: Where the read bytes are kept.
        guard: Takes errors of ours.
    """

    __slots__ = ("_body", "_end", "_guard", "_position", "_stream")

    def __init__(self, stream: Any, body: CapturedBody, guard: Guard) -> None:
        self._stream = stream
        self._body = body
        self._guard = guard
        # An application that seeks back reads bytes twice; only those beyond the furthest point are new.
        self._position = 0
        self._end = 0

    def read(self, *size: Any) -> Any:
        """Read as the original does."""
        data = self._stream.read(*size)
        self._note(data)
        return data

    def readline(self, *size: Any) -> Any:
        """Read a line as the original does."""
        data = self._stream.readline(*size)
        self._note(data)
        return data

    def readlines(self, *hint: Any) -> Any:
        """Read lines as the original does."""
        lines = self._stream.readlines(*hint)
        for line in lines:
            self._note(line)
        return lines

    def __iter__(self) -> Iterator[Any]:
        for line in self._stream:
            self._note(line)
            yield line

    def __next__(self) -> Any:
        line = next(self._stream)
        self._note(line)
        return line

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stream, name)
        if name == "seek":
            return self._seeking(found)
        if name == "read1":
            return self._reading(found)
        if name in _FILLS_A_BUFFER:
            return self._filling(found)
        return found

    def _seeking(self, seek: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            position = seek(*arguments)
            # Streams of old return None from seek; the place is then unknown and nothing more is noted.
            self._position = position if isinstance(position, int) else -1
            return position

        return run

    def _reading(self, read: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            data = read(*arguments)
            self._note(data)
            return data

        return run

    def _filling(self, fill: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(buffer: Any) -> Any:
            count = fill(buffer)
            if count:
                self._note(bytes(memoryview(buffer)[:count]))
            return count

        return run

    def _note(self, data: Any) -> None:
        try:
            if not data or self._position < 0:
                return
            start, self._position = self._position, self._position + len(data)
            if self._position <= self._end:
                return
            self._body.add(data if start == self._end else data[self._end - start :])
            self._end = self._position
        except Exception as exc:
            self._guard.caught("capture of a request body", exc)
