"""The bell."""

from __future__ import annotations

import threading

from moesif_otel._delivery.clock import Clock, WakeEvent


def test_a_ring_is_remembered_once() -> None:
    """Rings before a wait wake it once, and however many there were."""
    bell = WakeEvent()
    assert not bell.wait(0)
    bell.set()
    bell.set()
    assert bell.wait(0)
    assert not bell.wait(0)


def test_a_ring_wakes_a_waiter() -> None:
    """A waiter without a time limit wakes when somebody rings."""
    bell, woken = WakeEvent(), threading.Event()
    thread = threading.Thread(target=lambda: Clock().wait(bell, None) and woken.set())
    thread.start()
    bell.set()
    thread.join(5)
    assert woken.is_set()


def test_system_clock_takes_any_number_of_seconds() -> None:
    """Waits shorter than nothing, and longer than a lock can wait, are no error."""
    bell = WakeEvent()
    assert not Clock().wait(bell, -5)
    bell.set()
    assert Clock().wait(bell, 1e12)
