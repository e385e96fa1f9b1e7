"""A streamed response on its way from the application to the server.

Owns: `ResponseStream`, the iterable that the server gets in place of the application's.
Threads: whichever the server iterates in; a finalizer when the server drops the response.
Never: gathers the body, iterates ahead of the server, closes what the server did not close.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["ResponseStream", "SizedResponseStream", "StreamedCall"]


class StreamedCall(Protocol):
    """What the stream tells the call it belongs to."""

    def enter(self) -> Any:
        """Make the call's contexts current; gives what `leave` takes."""
        ...

    def leave(self, token: Any) -> None:
        """Restore the contexts."""
        ...

    def piece(self, chunk: Any) -> None:
        """Take one piece of the body. Never raises."""
        ...

    def exhausted(self) -> None:
        """The body is whole. Never raises."""
        ...

    def closed(self) -> None:
        """The server closed the response. Never raises."""
        ...

    def failed(self, exc: BaseException) -> None:
        """The application raised. Never raises."""
        ...

    def dropped(self) -> None:
        """Garbage collection took the response; called from a finalizer. Never raises."""
        ...


class ResponseStream:
    """Passes the pieces of an application's iterable on, one for one, with the call's contexts around each step.

    Args:
        call: The call it belongs to.
        iterable: What the application returned.
    """

    __slots__ = ("_call", "_iterable", "_iterator")

    def __init__(self, call: StreamedCall, iterable: Iterable[bytes]) -> None:
        self._call = call
        self._iterable = iterable
        self._iterator: Iterator[bytes] | None = None

    def __iter__(self) -> ResponseStream:
        if self._iterator is None:
            token = self._call.enter()
            try:
                self._iterator = iter(self._iterable)
            except BaseException as exc:
                self._call.failed(exc)
                raise
            finally:
                self._call.leave(token)
        return self

    def __next__(self) -> bytes:
        call, iterator = self._call, self._iterator
        if iterator is None:
            iterator = iter(self)._iterator
        token = call.enter()
        try:
            chunk: bytes = next(iterator)  # type: ignore[arg-type] # __iter__ has set it
        except StopIteration:
            call.exhausted()
            raise
        except BaseException as exc:
            call.failed(exc)
            raise
        finally:
            call.leave(token)
        call.piece(chunk)
        return chunk

    def close(self) -> None:
        """Close the application's iterable, if it can be closed, as often as the server does; then end the call."""
        close = getattr(self._iterable, "close", None)
        if close is None:
            self._call.closed()
            return
        token = self._call.enter()
        try:
            close()
        except BaseException as exc:
            self._call.failed(exc)
            raise
        finally:
            self._call.leave(token)
        self._call.closed()

    def __getattr__(self, name: str) -> Any:
        # Attributes that an outer middleware looks for on the application's own object.
        return getattr(self._iterable, name)

    def __del__(self) -> None:
        self._call.dropped()


class SizedResponseStream(ResponseStream):
    """For iterables that have a length: servers take `Content-Length` from a response of one piece (PEP 3333).

    Some find the length in a pass of its own and send in a second one (gevent). The first pass is noted; a later one
    is the application's.
    """

    __slots__ = ()

    def __iter__(self) -> Any:
        return super().__iter__() if self._iterator is None else iter(self._iterable)

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type] # chosen because it has one
