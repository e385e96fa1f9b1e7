"""Time and waiting, as a value that can be replaced, and the one signal that a finalizer may give."""

from __future__ import annotations

import contextlib
import threading
import time


class Clock:
    """The clock by which delivery reads the time and waits; in tests its time passes by the waits."""

    def monotonic(self) -> float:
        """Return seconds that never go back."""
        return time.monotonic()

    def time(self) -> float:
        """Return seconds since the epoch."""
        return time.time()

    def sleep(self, duration_s: float) -> None:
        """Let other threads run."""
        time.sleep(duration_s)

    def wait(self, signal: WakeEvent | threading.Condition, timeout_s: float | None) -> bool:
        """Wait for a signal (a condition's lock is held), at most `timeout_s` seconds; whether it came."""
        # `Lock.acquire` refuses more than `TIMEOUT_MAX`.
        return signal.wait(None if timeout_s is None else min(max(0.0, timeout_s), threading.TIMEOUT_MAX))


class WakeEvent:
    """A signal with memory of one call.

    A lock used as a binary semaphore: releasing it is one atomic step that takes nothing, so that a finalizer may set
    it also while its own thread is inside `set` or `wait`. `threading.Event.set` takes a lock and would deadlock there.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Wake the waiter, now or at its next wait. Never blocks, never raises."""
        with contextlib.suppress(RuntimeError):  # set already
            self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, at most `timeout` seconds; whether it was."""
        return self._lock.acquire(timeout=-1 if timeout is None else timeout)
