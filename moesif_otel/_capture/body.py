"""The captured part of a body, and the memory that all captured bodies may take together.

A `CapturedBody` is what a tee keeps of one body. A `ByteBudget` limits what a pipeline holds, from the first byte
captured until delivery. A body is filled by the thread that serves its request; a budget is shared by all threads.
Nothing here copies more than the captured part or reads a stream. `release` does not block: a finalizer may call it.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from moesif_otel._counters import Counters

BYTES: Final = (bytes, bytearray, memoryview)
NO_BODY_STATUSES: Final = frozenset({204, 304})  # RFC 9110, 6.4.1

# A body that comes in many small pieces is joined now and then: a list entry and an object header a piece would
# otherwise take more memory than the piece itself, uncounted.
_MAX_PARTS: Final = 128


class LeftOut(str, Enum):
    """The reason why a body, or the rest of it, was not kept."""

    MEMORY = "memory_limit"
    CONTENT = "content_type"
    NOT_MASKABLE = "not_maskable"
    UNREADABLE = "unreadable"
    NOT_READ = "not_read"  # announced, and the application did not ask for it
    BINARY = "binary"
    TOO_COMPLEX = "too_complex"
    TOO_LARGE = "too_large"


_HELD: Final = "bytes"
_LARGEST_BYTES: Final = 1 << 20
"""More than any single addition to a budget."""


class ByteBudget(Counters):
    """Counts the bytes that a pipeline holds and refuses bodies beyond the limit.

    Args:
        limit_bytes: Most bytes that bodies may bring the total to. Events themselves are charged without being
            refused (`charge`): over the limit bodies go first, events only by their count.

    Thread-safe; nothing here waits, so that finalizers and signal handlers may use it too.
    """

    __slots__ = ("limit_bytes",)

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self.limit_bytes = limit_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes held now."""
        return self.get(_HELD)

    def reserve(self, count_bytes: int) -> bool:
        """Take `count_bytes` if they fit; False means: do not keep them."""
        # First taken, then looked at: of two threads that would fit one by one both may be refused, never both kept.
        self._deferred.append((_HELD, count_bytes))
        if self.has_room(0):
            return True
        self.release(count_bytes)
        return False

    def has_room(self, count_bytes: int, limit_bytes: int | None = None) -> bool:
        """Tell whether `count_bytes` more would fit."""
        left_bytes = (self.limit_bytes if limit_bytes is None else limit_bytes) - count_bytes
        # Far from the limit, also if all that waits to be added up were of the largest size: nothing is added up.
        if self._sums.get(_HELD, 0) + (len(self._deferred) + 1) * _LARGEST_BYTES < left_bytes:
            return True
        return self.get(_HELD) <= left_bytes

    def charge(self, count_bytes: int) -> None:
        """Count bytes that are held in any case; negative gives them back."""
        self.add(_HELD, count_bytes)

    def release(self, count_bytes: int) -> None:
        """Return bytes to the budget."""
        self.add(_HELD, -count_bytes)


class CapturedBody:
    """The first part of a body, as its pieces pass by, with the true size of the whole.

    Args:
        max_bytes: Most bytes to keep.
        budget: Where kept bytes are reserved.

    Fed by one thread at a time.
    """

    __slots__ = ("_budget", "_parts", "decoded", "kept_bytes", "left_out", "max_bytes", "total_bytes")

    def __init__(self, max_bytes: int, budget: ByteBudget) -> None:
        self._budget = budget
        self._parts: list[bytes] = []
        self.max_bytes = max_bytes
        self.kept_bytes = 0
        self.total_bytes = 0
        self.left_out: LeftOut | None = None
        # Whether `Content-Encoding` was undone before the bytes were seen (`requests` decodes for its callers).
        self.decoded = False

    def add(self, piece: bytes | bytearray | memoryview) -> None:
        """Note one piece; a `bytes` piece that fits is kept by reference, not copied."""
        size_bytes = len(piece) if type(piece) is bytes else memoryview(piece).nbytes
        self.total_bytes += size_bytes
        room_bytes = self.max_bytes - self.kept_bytes
        if room_bytes <= 0 or not size_bytes or self.left_out is not None:
            return
        if size_bytes > room_bytes or type(piece) is not bytes:
            piece = bytes(piece if size_bytes <= room_bytes else memoryview(piece)[:room_bytes])
            size_bytes = len(piece)
        if not self._budget.reserve(size_bytes):
            self.left_out = LeftOut.MEMORY
            self._budget.release(self.kept_bytes)
            self._parts, self.kept_bytes = [], 0
            return
        self._parts.append(piece)
        self.kept_bytes += size_bytes
        if len(self._parts) > _MAX_PARTS:
            self._parts = [b"".join(self._parts)]

    def count(self, size_bytes: int) -> None:
        """Note bytes that passed unseen (a file the server sends itself)."""
        self.total_bytes += size_bytes

    def restart(self) -> None:
        """Begin again: the sender has gone back to the start of the body (a redirect, a retry)."""
        self._budget.release(self.kept_bytes)
        self._parts, self.kept_bytes, self.total_bytes, self.left_out = [], 0, 0, None

    def seal(self) -> None:
        """Keep nothing more; what still passes (an application that reads on after its response) is counted only."""
        self.max_bytes = self.kept_bytes

    def data(self) -> bytes:
        """Return the kept part as one piece."""
        parts = self._parts
        if len(parts) > 1:
            parts = self._parts = [b"".join(parts)]
        return parts[0] if parts else b""

    @property
    def truncated(self) -> bool:
        """Tell whether less was kept than passed."""
        return self.kept_bytes < self.total_bytes

    def discard(self) -> int:
        """Forget the kept part, and keep nothing from now on; return the bytes that are to be given back."""
        self._parts, self.max_bytes = [], 0
        kept_bytes, self.kept_bytes = self.kept_bytes, 0
        return kept_bytes
