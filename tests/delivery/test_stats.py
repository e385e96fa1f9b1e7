"""The ledger."""

from __future__ import annotations

import gc
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesif_otel._capture.body import ByteBudget
from moesif_otel._delivery.stats import DropReason, Ledger, Stats
from moesif_otel._guard import Guard
from tests.delivery.delivery_kit import assert_law


def test_reasons_are_snake_case_text() -> None:
    """The values of the reasons are what users read in `stats()` and as a metric attribute: plain words."""
    for reason in DropReason:
        assert reason.value == reason.name.lower()


@given(st.lists(st.tuples(st.sampled_from(["accept", "deliver", "drop", "count"]), st.integers(1, 5), st.sampled_from(list(DropReason)))))
def test_law_holds_after_each_step(steps) -> None:
    """After any history, accepted is delivered plus dropped plus pending."""
    ledger = Ledger()
    for kind, n, reason in steps:
        n = min(n, ledger.pending) if kind in ("deliver", "drop") else n
        if kind == "accept":
            ledger.accept(n)
        elif kind == "count":
            ledger.add("retries", n)
        elif n and kind == "deliver":
            ledger.deliver(n)
        elif n:
            ledger.drop(reason, n)
        assert_law(ledger.snapshot())
        assert ledger.snapshot().pending == ledger.pending


def test_many_threads_lose_no_entry() -> None:
    """Writers on many threads, with a reader beside them, leave exact sums, and no reading breaks the law."""
    ledger = Ledger()
    stop = threading.Event()

    def write() -> None:
        for _ in range(2000):
            ledger.accept()
            ledger.deliver()
            ledger.add("batches")

    def read() -> None:
        while not stop.is_set():
            assert_law(ledger.snapshot())

    writers = [threading.Thread(target=write) for _ in range(4)]
    reader = threading.Thread(target=read)
    for thread in [reader, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    stats = ledger.snapshot()
    assert (stats.accepted, stats.delivered, stats.batches, stats.pending) == (8000, 8000, 8000, 0)


def test_writer_interrupted_by_a_finalizer_that_writes() -> None:
    """An entry made while the lock is held, by the same thread, is neither lost nor a deadlock."""
    ledger = Ledger()
    assert ledger._lock.acquire(blocking=False)
    ledger.accept()
    ledger.drop(DropReason.SHUTDOWN)
    ledger._lock.release()
    stats = ledger.snapshot()
    assert (stats.accepted, stats.dropped) == (1, {"shutdown": 1})


def test_snapshot_does_not_wait_for_ever_for_a_lock(monkeypatch) -> None:
    """A reader that interrupted a writer of its own thread (a signal handler) still gets an answer that keeps the law."""
    monkeypatch.setattr("moesif_otel._counters._READ_WAIT_S", 0.01)
    ledger = Ledger()
    ledger.accept()
    with ledger._lock:
        assert_law(ledger.snapshot())


def test_child_starts_from_nothing() -> None:
    """After a fork the child's ledger is empty, and its lock is free even if it was held."""
    ledger = Ledger()
    ledger.accept(3)
    ledger._lock.acquire()
    ledger.after_fork()
    ledger.accept()
    assert ledger.snapshot().accepted == 1


def test_snapshot_has_all_documented_keys() -> None:
    """A fresh ledger's reading has every documented key, as key and as attribute, with bytes and errors of its owner."""
    budget, guard = ByteBudget(100), Guard()
    budget.charge(7)
    guard.caught("kind", ValueError())
    stats = Ledger(budget=budget, guard=guard).snapshot()
    assert stats.held_bytes == 7
    assert stats.errors == {"kind": 1}
    for key in ("accepted", "delivered", "pending", "retries", "batches", "bytes_sent", "spooled", "replayed", "spool_bytes"):
        assert stats[key] == getattr(stats, key) == 0
    assert stats.dropped == {}
    with pytest.raises(AttributeError):
        _ = stats.nothing
    gc.collect()


def test_spooled_events_are_not_lost() -> None:
    """`lost` leaves out what is on disk."""
    assert Stats(dropped={"spooled": 5, "shutdown": 2}).lost == 2
