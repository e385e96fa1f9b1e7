"""Sums that any thread, any finalizer and any signal handler may add to.

`self.n += 1` is not atomic, and a lock is no way out: garbage collection or a signal may run code of ours inside a
thread that holds it. An append to a deque is atomic. So additions are appended, and added up by whoever finds the
lock free.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Final

_FOLD_AT: Final = 64  # entries that may wait; a reader folds them in any case
_READ_WAIT_S: Final = 1.0
_LOOK_AGAIN_S: Final = 0.000_5


class Counters:
    """Sums by name. `add` never waits and never raises; what was added before a `read` is in it."""

    __slots__ = ("_deferred", "_lock", "_sums")

    def __init__(self) -> None:
        self.after_fork()

    def after_fork(self) -> None:
        """Start from nothing, with a lock that nobody holds: in a forked child the parent's sums are the parent's."""
        self._lock = threading.Lock()
        self._deferred: deque[tuple[str, int]] = deque()
        self._sums: dict[str, int] = {}

    def add(self, name: str, n: int = 1) -> None:
        """Add `n`, which may be negative, to the sum of that name."""
        deferred = self._deferred
        deferred.append((name, n))
        if len(deferred) > _FOLD_AT:
            self._fold_if_free()

    def get(self, name: str) -> int:
        """Return one sum; right to what other threads add at this moment."""
        if self._deferred:
            self._fold_if_free()
        return self._sums.get(name, 0)

    def read(self) -> dict[str, int]:
        """Return all sums at one moment."""
        # A signal handler may have interrupted a fold of this very thread: never wait for ever.
        until_s = time.monotonic() + _READ_WAIT_S
        while not self._fold_if_free() and time.monotonic() < until_s:
            time.sleep(_LOOK_AGAIN_S)
        return self._sums.copy()

    def _fold_if_free(self) -> bool:
        # Not by `acquire()`: a signal handler that raises right after it would leave it held for ever.
        if self._lock.locked():
            return False
        with self._lock:
            deferred, sums = self._deferred, self._sums
            while deferred:
                # Taken off last, in the one step after the sum: where a signal handler raises, nothing is lost or
                # counted twice.
                name, n = deferred[0]
                sums[name] = sums.get(name, 0) + n
                deferred.popleft()
        return True
