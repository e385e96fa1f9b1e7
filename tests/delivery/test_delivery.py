"""Delivery as its users see it: real threads, a transport in memory."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
import weakref

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moesif_otel._delivery.clock import Clock
from moesif_otel._delivery.outcome import BatchOutcome, PostAnswer
from moesif_otel._delivery.queue import Prepared
from moesif_otel._delivery.stats import DropReason
from tests.delivery.delivery_kit import FakeClock, MemoryTransport, Rig, assert_law, no_new_threads, payload


def ours() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("moesif-otel")}


def until_it_is_gone(reference: weakref.ref[object], threads_before: set[threading.Thread]) -> None:
    """Wait, for some seconds at most, until nothing holds it and its threads have ended."""
    for _ in range(200):
        gc.collect()
        if reference() is None and ours() <= threads_before:
            break
        time.sleep(0.05)


class Gate(MemoryTransport):
    """Holds every send until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = threading.Event()
        self.entered = threading.Semaphore(0)

    def send(self, payloads, timeout_s):
        self.entered.release()
        if not self.opened.wait(min(timeout_s, 20)):
            return PostAnswer(BatchOutcome.RETRY, detail="hung")
        return super().send(payloads, timeout_s)


def test_threads_start_lazily_and_end_at_shutdown() -> None:
    """No thread before it is needed, then intake, poller and EVENT_WORKER_COUNT senders, none after the shutdown."""
    before = ours()
    rig = Rig(MemoryTransport(), event_worker_count=3, poll=lambda: 3600.0)
    assert ours() <= before
    for _ in range(3):
        rig.delivery.ensure_started()
    assert len(ours() - before) == 5
    rig.delivery.shutdown(5)
    assert {thread.name for thread in ours() - before} <= {"moesif-otel-config"}
    for _ in range(3000):  # a shutdown does not wait for the poller, which may be in a request
        if ours() <= before:
            break
        time.sleep(0.01)
    assert ours() <= before
    assert rig.transport.closed == 1


def test_events_are_delivered_without_any_flush() -> None:
    """An event waits for its batch no longer than EVENT_BATCH_TIMEOUT; nobody needs to flush."""
    done = threading.Event()
    transport = MemoryTransport(then=lambda _: done.set() or PostAnswer(BatchOutcome.DELIVERED, 201))
    with Rig(transport, event_batch_timeout=0.05) as rig:
        rig.delivery.ensure_started()
        rig.submit(1)
        assert done.wait(30)


def test_full_batch_does_not_wait() -> None:
    """A batch that is full goes at once, whatever EVENT_BATCH_TIMEOUT says."""
    done = threading.Event()
    transport = MemoryTransport(then=lambda _: done.set() or PostAnswer(BatchOutcome.DELIVERED, 201))
    with Rig(transport, event_batch_timeout=3600.0, batch_size=3) as rig:
        rig.delivery.ensure_started()
        for n in range(3):
            rig.submit(n)
        assert done.wait(30)
        assert [len(b) for b in transport.sent] == [3]


def test_every_reason_of_prepare_is_counted() -> None:
    """What `prepare` says, and what it raises, becomes a drop with its reason; the bytes are given back."""
    with Rig(MemoryTransport()) as rig:
        rig.delivery.ensure_started()
        for item in (1, DropReason.MASK_FAILED, DropReason.SAMPLED_OUT, ValueError("secret"), 2):
            rig.submit(item, held_bytes=1000)
        assert rig.delivery.force_flush(30)
        assert rig.stats.delivered == 2
        assert rig.stats.dropped == {"mask_failed": 1, "sampled_out": 1, "not_convertible": 1}
        assert rig.stats.errors["preparing an event"] == 1
        assert rig.stats.held_bytes == 0


def test_prepare_that_gives_nonsense_is_a_drop() -> None:
    """A `prepare` that returns something else loses the item, counted, and nothing more."""
    with Rig(MemoryTransport(), prepare=lambda _: None) as rig:
        rig.submit(1)
        assert rig.delivery.force_flush(30)
        assert rig.stats.dropped == {"not_convertible": 1}


@pytest.mark.parametrize("ending", [SystemExit(1), GeneratorExit(), KeyboardInterrupt()])
def test_a_callback_cannot_end_our_threads(ending) -> None:
    """`sys.exit` in a mask, in housekeeping or in a transport: counted, and the threads go on."""

    def end() -> None:
        raise ending

    def prepare_or_end(item):
        from tests.delivery.delivery_kit import prepare

        return prepare(item) if item else end()

    with Rig(MemoryTransport([ending]), prepare=prepare_or_end) as rig:
        rig.delivery.add_housekeeping(end)
        rig.delivery.ensure_started()
        for item in (0, 1, 0, 2):
            rig.submit(item)
        while rig.stats.pending:
            rig.delivery.force_flush(5)
        assert (rig.stats.delivered, rig.stats.dropped) == (2, {"not_convertible": 2})


def test_ctrl_c_in_an_inline_prepare_passes_and_is_counted() -> None:
    """In the application's own thread a `KeyboardInterrupt` passes through; its item is accounted for."""

    def interrupted(_):
        raise KeyboardInterrupt

    with no_new_threads():
        rig = Rig(MemoryTransport(), prepare=interrupted)
        rig.submit(1)
        with pytest.raises(KeyboardInterrupt):
            rig.delivery.force_flush(5)
        assert rig.stats.dropped == {"not_convertible": 1}
        rig.delivery.shutdown(1)


def test_flush_after_shutdown_is_true_when_all_is_settled() -> None:
    """After a shutdown there is nothing left to wait for."""
    rig = Rig(MemoryTransport())
    rig.delivery.ensure_started()
    rig.submit(1)
    rig.delivery.shutdown(5)
    assert rig.delivery.force_flush(30)


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.lists(st.integers(1, 30), max_size=5))
def test_queue_never_holds_more_than_its_bound(size, bursts) -> None:
    """However events come while nothing goes out, at most EVENT_QUEUE_SIZE wait; each further one is dropped, counted."""
    with no_new_threads():
        transport = MemoryTransport(then=PostAnswer(BatchOutcome.RETRY, 503))
        rig = Rig(transport, clock=FakeClock(), event_queue_size=size, batch_size=7)
        offered = 0
        for burst in bursts:
            for n in range(burst):
                taken = rig.submit(n)
                offered += 1
                assert taken == (offered <= size)
                assert rig.stats.pending <= size
            rig.delivery.force_flush(0.1)
        assert rig.stats.accepted == offered
        assert rig.stats.dropped.get("queue_full", 0) == max(0, offered - size)
        rig.delivery.shutdown(0)
        assert rig.stats.pending == 0
        assert rig.stats.held_bytes == 0


def test_many_threads_stay_near_the_bound() -> None:
    """Sixteen threads that submit at once go over the bound by no more than one each."""
    rig = Rig(Gate(), event_queue_size=100)
    barrier = threading.Barrier(16)

    def run() -> None:
        barrier.wait()
        for n in range(50):
            rig.delivery.submit(n, 0)

    threads = [threading.Thread(target=run) for _ in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert rig.stats.pending <= 116
    assert rig.stats.dropped["queue_full"] >= 800 - 116
    rig.delivery.shutdown(0)


def test_payload_bytes_are_charged_in_place_of_the_item() -> None:
    """While a batch waits the budget holds its payload's size, neither less nor the captured bytes as well."""
    gate = Gate()
    with Rig(gate) as rig:
        rig.delivery.ensure_started()
        rig.submit(payload(1, 500), held_bytes=100_000)
        assert not rig.delivery.force_flush(0.2)
        assert rig.stats.held_bytes == len(payload(1, 500))
        gate.opened.set()
        assert rig.delivery.force_flush(30)


def test_flush_covers_what_came_before_it_not_what_comes_after() -> None:
    """Under endless traffic a flush still comes to an end, and is true."""
    with Rig(MemoryTransport(), batch_size=10) as rig:
        rig.delivery.ensure_started()
        stop = threading.Event()

        def traffic() -> None:
            n = 0
            while not stop.wait(0.0005):
                rig.delivery.submit(n, 0)
                n += 1

        thread = threading.Thread(target=traffic)
        thread.start()
        try:
            for _ in range(5):
                accepted = rig.stats.accepted
                assert rig.delivery.force_flush(30)
                assert rig.stats.delivered >= accepted
        finally:
            stop.set()
            thread.join()


def test_flush_from_our_own_thread_returns_at_once() -> None:
    """A callback that flushes would wait for itself: it gets False, and delivery goes on."""
    answers = []
    rig = None

    def prepare_and_flush(item):
        from tests.delivery.delivery_kit import prepare

        answers.append(rig.delivery.force_flush(60))
        return prepare(item)

    rig = Rig(MemoryTransport(), prepare=prepare_and_flush)
    with rig:
        rig.delivery.ensure_started()
        rig.submit(1)
        assert rig.delivery.force_flush(30)
        assert answers == [False]


def test_shutdown_settles_what_a_hung_server_holds(caplog) -> None:
    """A server that never answers: shutdown ends in its time, what is in flight counts as dropped, and is counted once."""
    gate = Gate()
    rig = Rig(gate)
    rig.delivery.ensure_started()
    for n in range(250):
        rig.submit(n)
    assert gate.entered.acquire(timeout=30)
    with caplog.at_level(logging.INFO):
        rig.delivery.shutdown(0.3)
    stats = rig.stats
    assert (stats.pending, stats.dropped, stats.held_bytes) == (0, {"shutdown": 250}, 0)
    assert "dropped: shutdown 250" in caplog.text
    gate.opened.set()
    time.sleep(0.1)  # the late answers arrive
    assert rig.stats.delivered == 0
    assert_law(rig.stats)


def test_shutdown_with_a_stuck_prepare() -> None:
    """A mask that never returns does not hold a shutdown; its item and those behind it are counted, and released."""
    release, let_go = threading.Event(), []

    def stuck(item):
        release.wait(20)
        return DropReason.MASKED_AWAY

    rig = Rig(MemoryTransport(), prepare=stuck, on_drop=let_go.append)
    rig.delivery.ensure_started()
    for n in range(5):
        rig.submit(n)
    rig.delivery.shutdown(0.3)
    assert rig.stats.dropped == {"shutdown": 5}
    assert rig.stats.held_bytes == 0
    assert len(let_go) == 4
    release.set()
    time.sleep(0.05)
    assert rig.stats.dropped == {"shutdown": 5}


def test_submit_after_shutdown_is_counted() -> None:
    """Who comes too late is told so."""
    rig = Rig(MemoryTransport())
    rig.delivery.shutdown(1)
    assert not rig.submit(1)
    assert rig.stats.dropped == {"shutdown": 1}
    assert rig.stats.held_bytes == 0


def test_shutdown_twice_and_from_two_threads() -> None:
    """A second shutdown does nothing; one beside the first waits for it."""
    gate = Gate()
    rig = Rig(gate)
    rig.delivery.ensure_started()
    rig.submit(1)
    first = threading.Thread(target=rig.delivery.shutdown, args=(5,))
    first.start()
    assert gate.entered.acquire(timeout=30)
    threading.Timer(0.1, gate.opened.set).start()
    rig.delivery.shutdown(5)
    assert rig.stats.delivered == 1
    first.join()
    rig.delivery.shutdown(5)
    assert gate.closed == 1


def test_delivery_without_threads_works_inline() -> None:
    """Where no thread can be started, flush and shutdown do the work in the caller's thread."""
    with no_new_threads():
        rig = Rig(MemoryTransport())
        rig.delivery.ensure_started()
        rig.submit(1)
        assert rig.delivery.force_flush(30)
        rig.submit(2)
        rig.delivery.shutdown(5)
    assert rig.stats.delivered == 2
    assert rig.stats.errors["starting a delivery thread"] >= 1


def test_that_no_thread_starts_while_the_process_ends_is_no_news(monkeypatch, caplog) -> None:
    """Python 3.12 refuses: spans that a provider hands over before our exit handler are delivered without a word."""
    rig = Rig(MemoryTransport())

    def start_thread(*_):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(rig.delivery._state, "start_thread", start_thread)
    rig.delivery.ensure_started()
    rig.submit(1)
    assert rig.delivery.force_flush(30)
    assert rig.stats.delivered == 1
    assert rig.stats.errors["starting a delivery thread"] >= 1
    assert "delivery thread" not in caplog.text
    rig.delivery.shutdown(5)


def test_threads_are_started_later_when_the_system_refused_once() -> None:
    """A process that was short of threads for a moment gets its senders when it has some."""
    clock = FakeClock()
    rig = Rig(MemoryTransport(), clock=clock)
    with no_new_threads():
        rig.delivery.ensure_started()
    rig.delivery.ensure_started()
    assert not rig.delivery._state.threads
    clock.now_s += 1
    before = ours()
    rig.delivery.ensure_started()
    assert len(ours() - before) == 3
    rig.delivery.shutdown(1)


def test_housekeeping_runs_and_its_errors_are_counted() -> None:
    """Housekeeping runs on the intake thread after a wake, then when it asked to; one that raises stops nothing."""
    calls = threading.Semaphore(0)
    names = []

    def keep() -> float:
        names.append(threading.current_thread().name)
        calls.release()
        return 0.01

    with Rig(MemoryTransport()) as rig:
        rig.delivery.add_housekeeping(lambda: 1 / 0)
        rig.delivery.add_housekeeping(keep)
        rig.delivery.ensure_started()
        rig.delivery.wake()
        for _ in range(3):
            assert calls.acquire(timeout=30)
        assert set(names) == {"moesif-otel-intake"}
        assert rig.stats.errors["background work of delivery"] >= 1


def test_wake_makes_a_pass() -> None:
    """A nudge brings housekeeping forward."""
    calls = threading.Semaphore(0)
    with Rig(MemoryTransport()) as rig:
        rig.delivery.add_housekeeping(calls.release)
        rig.delivery.ensure_started()
        assert calls.acquire(timeout=30)
        for _ in range(3):
            rig.delivery.wake()
            assert calls.acquire(timeout=30)


def test_our_threads_are_suppressed() -> None:
    """Whatever runs on our threads, and inline sends too, is invisible to every instrumentation."""
    from opentelemetry.instrumentation.utils import is_http_instrumentation_enabled, is_instrumentation_enabled

    seen = []

    def look(_):
        seen.append((is_instrumentation_enabled(), is_http_instrumentation_enabled()))
        return PostAnswer(BatchOutcome.DELIVERED, 201)

    with Rig(MemoryTransport(then=look)) as rig:
        rig.delivery.ensure_started()
        rig.submit(1)
        rig.delivery.force_flush(5)
    with no_new_threads(), Rig(MemoryTransport(then=look)) as rig:
        rig.submit(1)
        rig.delivery.force_flush(5)
    assert seen == [(False, False)] * 2
    assert is_instrumentation_enabled()


def test_finalizers_may_submit_anywhere() -> None:
    """Objects whose finalizers submit and wake, collected while every thread of ours works, cause no deadlock and no loss."""

    class Call:
        def __init__(self, rig) -> None:
            self.rig = rig
            self.cycle = self

        def __del__(self) -> None:
            self.rig.delivery.submit(7, 0)
            self.rig.delivery.wake()

    def prepare(item):
        from tests.delivery.delivery_kit import prepare as real

        for _ in range(20):
            [Call(rig) for _ in range(1)] if calls.pop() else None
        return real(item)

    class Budgeted(list):
        def pop(self):
            if self:
                return super().pop()
            return 0

    calls = Budgeted([1] * 2000)
    old = gc.get_threshold()
    gc.set_threshold(5)
    rig = Rig(MemoryTransport(), prepare=prepare)
    try:
        rig.delivery.ensure_started()
        for n in range(200):
            rig.delivery.submit(n, 0)
            rig.ledger.snapshot()
        assert rig.delivery.force_flush(30)
    finally:
        gc.set_threshold(*old)
    gc.collect()
    assert rig.delivery.force_flush(30)
    rig.delivery.shutdown(5)
    assert rig.stats.accepted == rig.stats.delivered == 2200


def test_idle_delivery_can_be_collected() -> None:
    """A delivery that nobody has any more, with nothing pending, goes away with its threads, cycles included."""
    before = ours()

    class Exporter:
        def __init__(self) -> None:
            self.rig = Rig(MemoryTransport(), prepare=self.prepare, poll=lambda: 3600.0)

        def prepare(self, item):
            from tests.delivery.delivery_kit import prepare

            return prepare(item)

    exporter = Exporter()
    exporter.rig.delivery.ensure_started()
    exporter.rig.submit(1)
    assert exporter.rig.delivery.force_flush(30)
    reference = weakref.ref(exporter.rig.delivery)
    del exporter
    until_it_is_gone(reference, before)
    assert reference() is None
    assert ours() <= before


def test_delivery_with_events_outlives_its_user() -> None:
    """With events pending it stays until they are delivered, though nobody holds it."""
    done = threading.Event()
    transport = MemoryTransport(then=lambda _: done.set() or PostAnswer(BatchOutcome.DELIVERED, 201))
    rig = Rig(transport, event_batch_timeout=0.3)
    rig.delivery.ensure_started()
    rig.submit(1)
    time.sleep(0.15)  # the intake has it, and waits for the batch
    del rig
    gc.collect()
    assert done.wait(30)


@pytest.mark.parametrize("prepared", [False, True])
def test_an_event_is_delivered_though_its_delivery_is_forgotten_at_once(prepared: bool) -> None:
    """Whoever submits to an idle delivery and lets go of it in the same moment loses nothing."""
    before = ours()
    idle, done = threading.Event(), threading.Event()

    class IdleClock(Clock):
        def wait(self, signal, timeout_s):
            if threading.current_thread().name == "moesif-otel-intake" and timeout_s is None:
                idle.set()
            return super().wait(signal, timeout_s)

    transport = MemoryTransport(then=lambda _: done.set() or PostAnswer(BatchOutcome.DELIVERED, 201))
    rig = Rig(transport, event_batch_timeout=0.01, clock=IdleClock())
    rig.delivery.ensure_started()
    assert idle.wait(30)
    reference = weakref.ref(rig.delivery)
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1)  # the intake does not run before we have let go
    try:
        if prepared:
            rig.submit_json(payload(1))
        else:
            rig.submit(1)
        del rig
    finally:
        sys.setswitchinterval(switch_s)
    assert done.wait(30)
    until_it_is_gone(reference, before)
    assert reference() is None
    assert ours() <= before


def test_an_event_is_delivered_though_its_delivery_is_forgotten_while_something_else_is_due() -> None:
    """Also while the intake sleeps until housekeeping is due: it is woken by no single event then."""
    before = ours()
    asleep, done = threading.Event(), threading.Event()
    wishes = [0.5]

    class WatchedClock(Clock):
        def wait(self, signal, timeout_s):
            if threading.current_thread().name == "moesif-otel-intake" and timeout_s == 0.5:
                asleep.set()
            return super().wait(signal, timeout_s)

    transport = MemoryTransport(then=lambda _: done.set() or PostAnswer(BatchOutcome.DELIVERED, 201))
    rig = Rig(transport, event_batch_timeout=0.01, clock=WatchedClock())
    rig.delivery.add_housekeeping(lambda: wishes.pop() if wishes else None)
    rig.delivery.ensure_started()
    assert asleep.wait(30)
    reference = weakref.ref(rig.delivery)
    rig.submit_json(payload(1))
    del rig
    gc.collect()
    assert done.wait(30)
    until_it_is_gone(reference, before)
    assert reference() is None


def test_a_flush_is_not_kept_waiting_by_a_call_of_the_same_moment() -> None:
    """The intake gathers when an item wakes it, not when a flush does, in whichever order the two come."""
    waits: list[float | None] = []

    class Racing(Clock):
        def wait(self, signal, timeout_s):
            if signal is not rig.delivery._state.wake_intake:
                return super().wait(signal, timeout_s)
            waits.append(timeout_s)
            if len(waits) == 1:  # idle: a flush wakes it, and an item that had seen it idle sets its flags afterwards
                rig.delivery.wake()
                rig.submit(1)
            return super().wait(signal, timeout_s)

    prepared_after: list[int] = []

    def prepare(item):
        prepared_after.append(len(waits))
        return DropReason.SAMPLED_OUT

    rig = Rig(MemoryTransport(), prepare=prepare, clock=Racing())
    rig.delivery.ensure_started()
    assert rig.delivery.force_flush(30)
    rig.delivery.shutdown(5)
    assert prepared_after == [1]


def test_a_forgotten_delivery_goes_away_once_its_last_batch_is_delivered() -> None:
    """Forgotten while its last batch is on its way, it ends with its threads when that is settled, unasked."""
    before = set(threading.enumerate())
    gate = Gate()
    rig = Rig(gate, event_batch_timeout=0.02)
    rig.delivery.ensure_started()
    rig.submit(1)
    assert gate.entered.acquire(timeout=30)
    reference = weakref.ref(rig.delivery)
    time.sleep(0.3)  # the intake has nothing more to do, and sleeps
    del rig
    gate.opened.set()
    for _ in range(200):
        gc.collect()
        if reference() is None and set(threading.enumerate()) <= before:
            break
        time.sleep(0.05)
    assert reference() is None
    assert set(threading.enumerate()) <= before
    assert len(gate.delivered) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_pid_check_alone_makes_a_child_start_anew(monkeypatch) -> None:
    """Where no at-fork hook runs (uWSGI), the first call in the child finds out by the process id."""
    monkeypatch.setattr("moesif_otel._delivery.delivery.FORKS_RUN_HOOKS", False)
    with Rig(MemoryTransport(then=PostAnswer(BatchOutcome.RETRY, 503))) as rig:
        rig.delivery.ensure_started()
        rig.submit(1)
        told = []
        rig.delivery.add_after_fork(lambda: told.append("begun anew"))
        parent_state = rig.delivery._state
        with monkeypatch.context() as child:
            child.setattr(os, "getpid", lambda: 999_999_999)
            assert rig.stats.accepted == 1
            rig.delivery.ensure_started()
            assert told == ["begun anew"]
            assert rig.transport.forks == 1
            assert rig.stats.accepted == 0
            rig.transport.then = None
            rig.submit(2)
            assert rig.delivery.force_flush(30)
            rig.delivery.shutdown(5)
        parent_state.stopped = True
        parent_state.wake_intake.set()
        with parent_state.lock:
            parent_state.note_change()
        rig.transport.then = None


def test_a_prepared_payload_is_delivered_as_it_is():
    """`submit_accepted` takes JSON bytes past preparation, counts them, and gives their bytes back when they are settled."""
    transport = MemoryTransport()
    with Rig(transport) as rig:
        assert rig.submit_json(payload(1))
        rig.submit(2)
        rig.delivery.ensure_started()
        assert rig.delivery.force_flush(30)
        assert transport.delivered == [payload(1), payload(2)]
    assert not rig.submit_json(payload(3))
    assert rig.stats.dropped == {"shutdown": 1}


def test_a_log_filter_that_raises_ends_no_thread() -> None:
    """A filter of the application that fails outside a request costs a line, not a sender."""

    class Broken(logging.Filter):
        def filter(self, record):
            raise RuntimeError("working outside of application context")

    logger, broken = logging.getLogger("moesif_otel._delivery.report"), Broken()
    guards = logging.getLogger("moesif_otel._guard")
    logger.addFilter(broken)
    guards.addFilter(broken)
    try:
        transport = MemoryTransport([PostAnswer(BatchOutcome.RETRY, 503), PostAnswer(BatchOutcome.RETRY, 503)])
        with Rig(transport, prepare=lambda item: 1 / item and Prepared(payload(item), 10)) as rig:
            rig.delivery.ensure_started()
            for n in (1, 0, 2):
                rig.submit(n)
            while rig.stats.pending:
                rig.delivery.force_flush(5)
            assert (rig.stats.delivered, rig.stats.dropped) == (2, {"not_convertible": 1})
    finally:
        logger.removeFilter(broken)
        guards.removeFilter(broken)


def test_a_flush_while_the_threads_start_prepares_nothing_twice() -> None:
    """Sixteen threads start the delivery and flush at once, with a mask that takes its time: every event is settled."""
    for _ in range(10):
        with Rig(MemoryTransport(), prepare=lambda item: time.sleep(0.0005) or Prepared(payload(item), 100)) as rig:
            barrier = threading.Barrier(16)

            def run(rig=rig, barrier=barrier) -> None:
                barrier.wait()
                for n in range(3):
                    rig.delivery.submit(n, 0)
                rig.delivery.ensure_started()
                rig.delivery.force_flush(5)

            threads = [threading.Thread(target=run) for _ in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert rig.delivery.force_flush(30)
            assert (rig.stats.pending, rig.stats.delivered) == (0, 48)


def test_a_forked_child_of_a_pipeline_that_was_shut_down_delivers_nothing() -> None:
    """What was ended stays ended, in every child."""
    rig = Rig(MemoryTransport())
    rig.delivery.shutdown(1)
    rig.delivery.after_fork()
    rig.delivery.ensure_started()
    assert not rig.submit(1)
    assert rig.delivery._state.threads == []
    rig.delivery.shutdown(1)


def test_shutdown_takes_shutdown_timeout() -> None:
    """Without a number SHUTDOWN_TIMEOUT is the time that a shutdown has."""
    clock = FakeClock()
    with no_new_threads():
        rig = Rig(MemoryTransport(then=PostAnswer(BatchOutcome.RETRY, 503)), clock=clock, shutdown_timeout=12.0)
        rig.submit(1)
        started = clock.now_s
        rig.delivery.shutdown()
    assert 5 < clock.now_s - started <= 12.5


def test_held_bytes_are_those_of_the_budget() -> None:
    """The counters show the bytes of the budget that the delivery was given."""
    with no_new_threads():
        rig = Rig(MemoryTransport(then=PostAnswer(BatchOutcome.RETRY, 503)))
        delivery = rig.delivery
        rig.submit_json(payload(1))
        assert delivery.ledger.snapshot().held_bytes == delivery.budget.held_bytes == len(payload(1))
        delivery.shutdown(0)
        assert delivery.ledger.snapshot().held_bytes == 0


def test_a_healthy_server_leaves_few_bytes_waiting() -> None:
    """Prepared payloads are sent as their bytes come together, not only when their number or their time is full."""
    with Rig(MemoryTransport(), event_batch_timeout=60.0) as rig:
        rig.delivery.ensure_started()
        for n in range(200):
            rig.submit_json(payload(n, 40_000))
        deadline_s = time.monotonic() + 30
        while rig.stats.held_bytes >= 6_000_000 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert rig.stats.held_bytes < 6_000_000
        assert rig.delivery.force_flush(30)


def test_many_flushers_cost_little() -> None:
    """Twenty flushes at once of thousands of batches look at the oldest batch only."""
    with Rig(MemoryTransport(), batch_size=1, event_queue_size=20_000) as rig:
        for n in range(3000):
            rig.submit_json(payload(n))
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(rig.delivery.force_flush(30))) for _ in range(20)]
        began = time.process_time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [True] * 20
        assert time.process_time() - began < 10


def test_a_call_that_ends_after_our_exit_handler_is_delivered(caplog) -> None:
    """At exit delivery stays open: what other handlers hand over later goes out, within SHUTDOWN_TIMEOUT in all."""
    clock = FakeClock()
    transport = MemoryTransport()
    with no_new_threads():
        rig = Rig(transport, clock=clock, shutdown_timeout=3.0)
        rig.submit(1)
        rig.delivery.settle_at_exit()
        assert transport.delivered == []
        rig.delivery.begin_exit()
        caplog.clear()
        rig.delivery.finish_exit()
        assert caplog.text == ""
        rig.submit(2)
        rig.delivery.settle_at_exit()
        assert transport.delivered == [payload(1), payload(2)]
        transport.then = PostAnswer(BatchOutcome.RETRY, 503)
        started = clock.now_s
        for n in range(5):
            rig.submit(n)
            rig.delivery.settle_at_exit()
        rig.delivery.shutdown()
        assert clock.now_s - started <= 3.5
        assert (rig.stats.pending, rig.stats.dropped) == (0, {"shutdown": 5})
