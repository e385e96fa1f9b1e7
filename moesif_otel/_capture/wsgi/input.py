"""The request body on its way to the application: a tee on `wsgi.input`, and reading ahead for governance.

The tee never reads on its own. `read_ahead` is the one place where we read a stream for the application: only when a
rule that has matched so far has a body condition, no further than told, and not a byte is lost.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from moesif_otel._capture.body import BYTES
from moesif_otel._capture.streams import PieceSink, original_of, stand_in_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moesif_otel._capture.body import CapturedBody
    from moesif_otel._guard import Guard


def tee_input(stream: Any, body: CapturedBody, guard: Guard, others: Sequence[CapturedBody | None] = ()) -> Any:
    """Return a stand-in for a `wsgi.input` that notes what is read from it.

    It stands in place of one of an earlier try, and before those that fill `others`: other pipelines read along.
    """
    stream = original_of(stream, lambda sink: getattr(sink, "body", sink) in others) if others else original_of(stream)
    return stand_in_for(stream, _InputSink(body, guard)) or stream


class _InputSink(PieceSink):
    """Keeps what is read for the first time: an application that seeks back reads bytes twice."""

    __slots__ = ("_end", "_guard", "_position", "body")

    def __init__(self, body: CapturedBody, guard: Guard) -> None:
        self.body = body
        self._guard = guard
        self._position = 0
        self._end = 0

    def piece(self, piece: Any) -> None:
        try:
            if not piece or self._position < 0 or not isinstance(piece, BYTES):
                return
            start, self._position = self._position, self._position + len(piece)
            if self._position <= self._end:
                return
            self.body.add(piece if start == self._end else piece[self._end - start :])
            self._end = self._position
        except Exception as exc:
            self._guard.caught("capture of a request body", exc)

    def moved(self, position: Any, whence: Any) -> None:
        """Note a `seek`; after one to a place that is not known nothing more is noted."""
        if not isinstance(position, int):
            self._position = -1
        elif whence == io.SEEK_SET:
            self._position = position
        elif whence == io.SEEK_CUR and self._position >= 0:
            self._position += position
        else:
            self._position = -1


def read_ahead(environ: dict[str, Any], max_bytes: int) -> bytes | None:
    """Read the request body and put it back in front of what is left.

    Args:
        environ: The request's; its `wsgi.input` is replaced unless it can be sought back.
        max_bytes: A longer body is not read.

    Returns:
        The whole body; None when there is none, it is longer, or its end is not known.

    Raises:
        OSError: The client left; the application gets the same error when it reads.
    """
    stream = environ.get("wsgi.input")
    length = environ.get("CONTENT_LENGTH")
    terminated = bool(environ.get("wsgi.input_terminated"))
    if stream is None or not (length or (terminated and environ.get("HTTP_TRANSFER_ENCODING"))):
        return None
    if length:
        wanted_bytes = int(length)
        if not 0 < wanted_bytes <= max_bytes:
            return None
    else:
        wanted_bytes = max_bytes + 1
    data: bytes = stream.read(wanted_bytes)
    if not _seek_back(stream, len(data)):
        environ["wsgi.input"] = PrefixedInput(data, stream)
    return data if len(data) <= max_bytes else None


def _seek_back(stream: Any, size_bytes: int) -> bool:
    try:
        stream.seek(stream.tell() - size_bytes)
    except (AttributeError, OSError, ValueError, TypeError):  # io.UnsupportedOperation is an OSError
        return False
    return True


class PrefixedInput(io.BufferedIOBase):
    """A `wsgi.input` of which the first part has been read: gives that part, then the rest.

    A file like any other (`io.TextIOWrapper` takes it), as those of wsgiref and Werkzeug are.
    """

    def __init__(self, prefix: bytes, rest: Any) -> None:
        self._prefix = io.BytesIO(prefix)
        self._rest = rest

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def read(self, *size: Any) -> bytes:
        """Read as PEP 3333 says; the rest is asked only for what the first part does not give."""
        if not size or size[0] is None or size[0] < 0:
            data: bytes = self._prefix.read() + self._rest.read(*size)
            return data
        part = self._prefix.read(size[0])
        if len(part) < size[0]:
            part += self._rest.read(size[0] - len(part))
        return part

    def read1(self, *size: Any) -> bytes:
        """Read once: from the first part, else from the rest."""
        data: bytes = self._prefix.read(*size) or getattr(self._rest, "read1", self._rest.read)(*size)
        return data

    def readline(self, *size: Any) -> bytes:
        """Read a line, which may begin in the first part and end in the rest."""
        limit = size[0] if size and size[0] is not None and size[0] >= 0 else None
        line: bytes = self._prefix.readline(-1 if limit is None else limit)
        if line.endswith(b"\n") or (limit is not None and len(line) >= limit):
            return line
        rest: bytes = self._rest.readline() if limit is None else self._rest.readline(limit - len(line))
        return line + rest
