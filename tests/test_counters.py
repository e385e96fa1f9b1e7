"""The sums that any thread, finalizer and signal handler may add to."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import pytest

from moesif_otel import _counters
from moesif_otel._counters import Counters


class Interrupted(Exception):
    """What a signal handler raises: right after some call into C has done its work."""


class InterruptedQueue(deque[Any]):
    """A queue after whose first `popleft` a signal comes."""

    armed = True

    def popleft(self) -> Any:
        entry = super().popleft()
        if self.armed:
            self.armed = False
            raise Interrupted
        return entry


class InterruptedSums(dict[str, int]):
    """Sums after whose first `get` a signal comes."""

    armed = True

    def get(self, name: str, default: Any = None) -> Any:
        found = super().get(name, default)
        if self.armed:
            self.armed = False
            raise Interrupted
        return found


class InterruptedLock:
    """A lock after whose `acquire` a signal comes; none comes in the middle of a `with`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.locked = self._lock.locked

    def acquire(self, *args: Any, **kwargs: Any) -> bool:
        self._lock.acquire(*args, **kwargs)
        raise Interrupted

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> bool:
        return self._lock.__enter__()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


@pytest.mark.parametrize("place", ["queue", "sums"])
def test_a_signal_that_raises_while_sums_are_added_up_loses_nothing(place: str) -> None:
    """Whatever was added counts once: else an event would be pending, or its bytes held, for ever."""
    counters = Counters()
    if place == "queue":
        counters._deferred = InterruptedQueue()
    else:
        counters._sums = InterruptedSums()
    for n in range(1, 11):
        counters.add("n", n)
    with pytest.raises(Interrupted):
        counters.get("n")
    assert counters.get("n") == counters.read()["n"] == 55


def test_a_signal_that_raises_while_sums_are_read_leaves_no_lock_held() -> None:
    """One that is never released would let nobody add up again."""
    counters = Counters()
    counters._lock = InterruptedLock()  # type: ignore[assignment]
    counters.add("n")
    assert counters.read() == {"n": 1}
    assert not counters._lock.locked()


def test_a_signal_handler_reads_while_its_thread_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for ever for the thread that it has interrupted; what comes later is added up as ever."""
    monkeypatch.setattr(_counters, "_READ_WAIT_S", 0.01)
    counters = Counters()
    counters.add("n")
    with counters._lock:
        assert counters.read() == {}
        counters.add("n")
    assert counters.read() == {"n": 2}
