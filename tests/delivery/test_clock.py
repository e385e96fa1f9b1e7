"""The clock and the wake event."""

from __future__ import annotations

import threading

from moesif_otel._delivery.clock import Clock, WakeEvent


def test_a_set_is_remembered_once() -> None:
    """However often it was set before a wait, it wakes it once."""
    event = WakeEvent()
    assert not event.wait(0)
    event.set()
    event.set()
    assert event.wait(0)
    assert not event.wait(0)


def test_a_set_wakes_a_waiter() -> None:
    """A waiter without a time limit wakes when somebody sets it."""
    event, woken = WakeEvent(), threading.Event()
    thread = threading.Thread(target=lambda: Clock().wait(event, None) and woken.set())
    thread.start()
    event.set()
    thread.join(30)
    assert woken.is_set()


def test_system_clock_takes_any_number_of_seconds() -> None:
    """Waits shorter than nothing, and longer than a lock can wait, are no error."""
    event = WakeEvent()
    assert not Clock().wait(event, -5)
    event.set()
    assert Clock().wait(event, 1e12)
