"""Time and waiting, as a value that can be replaced.

Owns: the `Clock` protocol, the system's clock, and `Bell`, the one signal that a finalizer may give.
Threads: any.
Never: sleeps without a way to be woken.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Protocol

__all__ = ["Bell", "Clock", "SystemClock", "Waitable"]


class Waitable(Protocol):
    """A `Bell`, or a `threading.Condition` whose lock is held."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until signalled or for `timeout` seconds; whether it was signalled."""
        ...


class Clock(Protocol):
    """Where delivery reads the time and waits; tests put one in that the waits advance."""

    def monotonic(self) -> float:
        """Give seconds that never go back."""
        ...

    def time(self) -> float:
        """Give seconds since the epoch."""
        ...

    def wait(self, signal: Waitable, timeout_s: float | None) -> bool:
        """Wait for a signal, at most `timeout_s` seconds (None: no limit); whether it came."""
        ...


class SystemClock:
    """The real clock."""

    __slots__ = ()

    def monotonic(self) -> float:
        """Give seconds that never go back."""
        return time.monotonic()

    def time(self) -> float:
        """Give seconds since the epoch."""
        return time.time()

    def wait(self, signal: Waitable, timeout_s: float | None) -> bool:
        """Wait for a signal, at most `timeout_s` seconds."""
        # `Lock.acquire` refuses more than `TIMEOUT_MAX`.
        return signal.wait(None if timeout_s is None else min(max(0.0, timeout_s), threading.TIMEOUT_MAX))


class Bell:
    """A signal with memory of one ring.

    A lock used as a binary semaphore: releasing it is one atomic step that takes nothing, so that a finalizer may ring
    also while its own thread is inside `ring` or `wait`. `threading.Event.set` takes a lock and would deadlock there.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        """Wake the waiter, now or at its next wait. Never blocks, never raises."""
        with contextlib.suppress(RuntimeError):  # rung already
            self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for a ring, at most `timeout` seconds; whether it was rung."""
        return self._lock.acquire(timeout=-1 if timeout is None else timeout)
