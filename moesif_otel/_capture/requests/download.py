"""A response body, seen as the caller of `requests` reads it.

Owns: the class that urllib3's response gets while its body is being read, and what ends a body.
Threads: the one that reads; a finalizer when the response is dropped.
Never: reads on its own, keeps a response alive or in a cycle, changes what the caller gets or when, or what becomes
of the connection.

The class is swapped on the object itself, so that `response.raw` stays the caller's very object; when the body has
ended it gets its own class back. `iter_content` and `iter_lines` read decoded bytes, `raw.read()` the wire's: which
it was stands in `CapturedBody.decoded`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, Final

from urllib3.exceptions import HTTPError
from urllib3.response import HTTPResponse

from moesif_otel._capture.exchange import Outcome
from moesif_otel._capture.requests.facts import is_being_finalized, is_urllib3s, nothing_left, pieces_decoded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from moesif_otel._capture.exchange import Exchange

__all__ = ["Download", "Finish", "is_teeable"]

Finish = Callable[[Outcome, "BaseException | None", bool], None]
"""Takes how a body ended, its error, and whether a finalizer calls."""

_KEY: Final = "_moesif_otel_download"
# What ends a body. Others (`RuntimeError` for mixing decoded and wire reads, `ValueError`) leave it readable.
_ENDING_ERRORS: Final = (HTTPError, HTTPException, OSError)


class Download:
    """What is known of one body while it is being read; the only strong reference to it is the raw response's.

    Args:
        exchanges: The Exchanges of the call.
        finish: Called once, with how the body ended, its error, and whether a finalizer calls.
    """

    __slots__ = ("_exchanges", "_finalizers", "_finishes", "_is_decoded", "is_reading", "was_cut")

    def __init__(self, exchanges: Sequence[Exchange], *finishes: Finish) -> None:
        self._exchanges = list(exchanges)
        self._finishes = list(finishes)
        self._finalizers: list[weakref.finalize[Any, Any]] = []
        self._is_decoded: bool | None = None
        self.is_reading = False  # urllib3 closes a response itself before it raises
        self.was_cut = False  # urllib3 closed the connection below a body that had more to give

    def watch(self, raw: Any, dropped: Callable[[], None]) -> None:
        """Swap the class of `raw`; `dropped` is called when garbage collection ends it unseen."""
        joined = raw.__dict__.get(_KEY)
        if joined is None:
            joined = raw.__dict__[_KEY] = self
            raw.__class__ = _TeedResponse
        else:
            # A call that gave back the response of another one (a hook that signs in and sends again, say).
            joined._exchanges += self._exchanges
            joined._finishes += self._finishes
        finalizer = weakref.finalize(raw, dropped)
        finalizer.atexit = False
        joined._finalizers.append(finalizer)

    def passed(self, raw: Any, piece: Any, decode_content: bool | None) -> None:
        """Note one piece that the caller gets. Never raises."""
        try:
            if not piece:
                return
            decoded = pieces_decoded(raw, decode_content)
            if self._is_decoded is None:
                self._is_decoded = decoded
            for exchange in self._exchanges:
                body = exchange.response_body
                if body is None or not exchange.is_open:
                    continue
                if decoded is not self._is_decoded:
                    body.count(len(piece))  # a body read in both ways: the beginning is kept, as it was read
                    body.max_bytes = body.kept_bytes
                else:
                    body.decoded = decoded
                    body.add(piece)
        except Exception as exc:
            self._caught(exc)

    def ended(self, raw: Any, outcome: Outcome, error: BaseException | None = None) -> None:
        """The body is over, one way or another: finish, and give the object its class back. Never raises."""
        finishes, self._finishes = self._finishes, []
        if not finishes:
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
            for finish in finishes:
                finish(outcome, error, finalizing)
        except Exception as exc:
            self._caught(exc)

    def ended_if_nothing_left(self, raw: Any) -> None:
        """End it as complete when the last byte has been given. Never raises."""
        try:
            over = nothing_left(raw)
        except Exception as exc:
            self._caught(exc)
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

    def _caught(self, exc: BaseException) -> None:
        for exchange in self._exchanges[:1]:
            exchange.pipeline.guard.caught("outgoing response body", exc)


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
        except Exception:
            outcome = Outcome.ABORTED
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


def _download_of(raw: Any) -> Download:
    return raw.__dict__.get(_KEY) or _NOBODY


# For a method that was taken off the object (`read = response.raw.read`) and is called after the end.
_NOBODY: Final = Download(())


def is_teeable(raw: Any) -> bool:
    """Whether the body of `raw` can be watched: it is urllib3's own, or watched already."""
    return is_urllib3s(raw) or type(raw) is _TeedResponse
