"""A response body of urllib3, seen as the caller of `requests` or urllib3 reads it.

The class is swapped on the object itself, so that `response.raw` stays the caller's very object; when the body has
ended it gets its own class back. `iter_content` and `iter_lines` read decoded bytes, `raw.read()` the wire's: which
it was stands in `CapturedBody.decoded`. Nothing here reads on its own or keeps a response alive, and what the caller
gets, when, and what becomes of the connection are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, Final

from urllib3.exceptions import HTTPError
from urllib3.response import HTTPResponse

from moesif_otel._capture.body import LeftOut
from moesif_otel._capture.exchange import Outcome
from moesif_otel._capture.requests.facts import (
    bytes_read,
    is_being_finalized,
    is_urllib3s,
    nothing_left,
    pieces_decoded,
)

if TYPE_CHECKING:
    import weakref
    from collections.abc import Iterator

    from moesif_otel._capture.outgoing import OutgoingCall

Finish = Callable[[Outcome, "BaseException | None"], None]
"""Takes how a body ended, and its error."""

_KEY: Final = "_moesif_otel_download"
# What ends a body. Others (`RuntimeError` for mixing decoded and wire reads, `ValueError`) leave it readable.
_ENDING_ERRORS: Final = (HTTPError, HTTPException, OSError)


def watch_download(call: OutgoingCall, raw: Any, finish: Finish) -> bool:
    """Stand beside a body that is still to be read; False where there is none, or where it cannot be watched.

    Args:
        call: The call; it ends as dropped when garbage collection ends the body.
        raw: urllib3's response, or what stands in its place.
        finish: Called once when the body has ended in any other way.
    """
    can_be_seen = is_urllib3s(raw) or type(raw) is _TeedResponse
    seen_bytes = bytes_read(raw) if can_be_seen else 0
    if seen_bytes or not can_be_seen:
        # It is no response of urllib3's, or a hook has read from it: the body, or its beginning, cannot be seen.
        for body in call.response_bodies:
            body.left_out = LeftOut.UNREADABLE
            body.count(seen_bytes)
    if not can_be_seen or nothing_left(raw):
        return False
    # A body may belong to two calls: a hook that signs in and sends again gives back the response of another one.
    download = raw.__dict__.setdefault(_KEY, _NOBODY)
    if download is _NOBODY:
        download = raw.__dict__[_KEY] = _Download()
        raw.__class__ = _TeedResponse
    download.add(call, raw, finish)
    return True


class _Download:
    """The state of one body while it is being read; the only strong reference to it is the raw response's."""

    __slots__ = ("_calls", "_finalizers", "_is_decoded", "is_reading", "was_cut")

    def __init__(self) -> None:
        self._calls: list[tuple[OutgoingCall, Finish]] = []
        self._finalizers: list[weakref.finalize[Any, Any]] = []
        self._is_decoded: bool | None = None
        self.is_reading = False  # urllib3 closes a response itself before it raises
        self.was_cut = False  # urllib3 closed the connection below a body that had more to give

    def add(self, call: OutgoingCall, raw: Any, finish: Finish) -> None:
        """Let a call see the body."""
        self._calls.append((call, finish))
        self._finalizers.append(call.drop_with(raw))

    def passed(self, raw: Any, piece: Any, decode_content: bool | None) -> None:
        """Note one piece that the caller gets. Never raises."""
        try:
            if not piece:
                return
            decoded = pieces_decoded(raw, decode_content)
            if self._is_decoded is None:
                self._is_decoded = decoded
            for body in (body for call, _finish in self._calls for body in call.response_bodies):
                if decoded is not self._is_decoded:
                    body.count(len(piece))  # a body read in both ways: the beginning is kept, as it was read
                    body.max_bytes = body.kept_bytes
                else:
                    body.decoded = decoded
                    body.add(piece)
        except Exception as exc:
            self.caught(exc)

    def ended(self, raw: Any, outcome: Outcome, error: BaseException | None = None) -> None:
        """The body is over, one way or another: finish, and give the object its class back. Never raises."""
        calls, self._calls = self._calls, []
        if not calls:
            return
        try:
            finalizing = is_being_finalized(raw)
            for finalizer in self._finalizers:
                finalizer.detach()
            if not finalizing:
                if type(raw) is _TeedResponse:
                    raw.__class__ = HTTPResponse  # type: ignore[assignment] # for mypy the class is fixed
                raw.__dict__.pop(_KEY, None)
            if outcome is Outcome.COMPLETE and self.was_cut:
                outcome = Outcome.ABORTED
            if finalizing and outcome is Outcome.ABORTED:
                outcome = Outcome.DROPPED
            for call, finish in calls:
                if finalizing:
                    call.dropped(outcome)
                else:
                    finish(outcome, error)
        except Exception as exc:
            calls[0][0].caught("capture of an outgoing response body", exc)

    def ended_if_nothing_left(self, raw: Any) -> None:
        """End it as complete when the last byte has been given. Never raises."""
        try:
            over = nothing_left(raw)
        except Exception as exc:
            self.caught(exc)
            return
        if over:
            self.ended(raw, Outcome.COMPLETE)

    def watched(self, raw: Any, read: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Read; an error that ends the body ends it here too."""
        self.is_reading = True
        try:
            return read(*args, **kwargs)
        except BaseException as exc:
            if isinstance(exc, _ENDING_ERRORS) or not isinstance(exc, Exception):
                self.ended(raw, Outcome.FAILED, exc)
            raise
        finally:
            self.is_reading = False

    def caught(self, exc: BaseException) -> None:
        """Count an error of ours."""
        for call, _finish in self._calls[:1]:
            call.caught("capture of an outgoing response body", exc)


class _TeedResponse(HTTPResponse):
    """urllib3's response with each way to read it watched; `stream` and `readinto` go through these by themselves."""

    def read(self, amt: Any = None, decode_content: Any = None, *args: Any, **kwargs: Any) -> Any:
        piece = _read(self, HTTPResponse.read, amt, decode_content, *args, **kwargs)
        if amt is None:
            _download_of(self).ended(self, Outcome.COMPLETE)
        return piece

    def read_chunked(self, amt: Any = None, decode_content: Any = None) -> Iterator[bytes]:  # type: ignore[override]
        download = _download_of(self)
        pieces = HTTPResponse.read_chunked(self, amt, decode_content)
        download.was_cut = True
        try:
            while (piece := download.watched(self, next, pieces, None)) is not None:
                # Unlike `read`, urllib3 does not fall back to the response's own `decode_content` here.
                download.passed(self, piece, bool(decode_content))
                yield piece
            download.was_cut = False
        finally:
            # At once, as when the caller drops urllib3's own generator: it closes the connection. The call ends with
            # the response: this may be a finalizer, where nobody can tell.
            pieces.close()
        download.ended_if_nothing_left(self)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[bytes]:  # type: ignore[override]
        download = _download_of(self)
        yield from HTTPResponse.stream(self, *args, **kwargs)
        download.ended_if_nothing_left(self)

    def drain_conn(self) -> None:
        download = _download_of(self)
        HTTPResponse.drain_conn(self)
        download.ended(self, Outcome.ABORTED)  # urllib3 read the rest and threw it away

    def close(self) -> None:
        download = _download_of(self)
        # An object in the middle of its own end may lack anything: look before, act after.
        try:
            outcome = Outcome.COMPLETE if nothing_left(self) else Outcome.ABORTED
        except Exception as exc:
            outcome = Outcome.ABORTED
            download.caught(exc)
        try:
            HTTPResponse.close(self)
        finally:
            if not download.is_reading:
                download.ended(self, outcome)


def _read(raw: Any, read: Callable[..., Any], amt: Any, decode_content: Any, *args: Any, **kwargs: Any) -> Any:
    download = _download_of(raw)
    piece = download.watched(raw, read, raw, amt, decode_content, *args, **kwargs)
    download.passed(raw, piece, decode_content)
    # Not when a piece is empty: urllib3 1 gives one where a decoder has taken bytes and has none to give yet.
    download.ended_if_nothing_left(raw)
    return piece


if hasattr(HTTPResponse, "read1"):  # urllib3 2.1 and later

    def _read1(self: Any, amt: Any = None, decode_content: Any = None, *args: Any, **kwargs: Any) -> Any:
        return _read(self, HTTPResponse.read1, amt, decode_content, *args, **kwargs)

    _read1.__name__ = "read1"
    _TeedResponse.read1 = _read1  # type: ignore[method-assign]

# Whoever prints or logs `response.raw` sees what it is.
_TeedResponse.__name__, _TeedResponse.__qualname__ = HTTPResponse.__name__, HTTPResponse.__qualname__
_TeedResponse.__module__ = HTTPResponse.__module__


def _download_of(raw: Any) -> _Download:
    return raw.__dict__.get(_KEY) or _NOBODY


# For a method that was taken off the object (`read = response.raw.read`) and is called after the end.
_NOBODY: Final = _Download()
