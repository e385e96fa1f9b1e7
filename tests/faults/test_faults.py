"""Delivery against a server that does everything wrong, on real sockets with real threads."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from moesif_otel._delivery.client import MoesifTransport
from tests.delivery.delivery_kit import Rig, payload
from tests.faults.fault_server import (
    Close,
    Drip,
    FaultServer,
    Garbage,
    HalfBody,
    HalfStatusLine,
    Hang,
    Reset,
    Status,
)


def rig_for(server, **changes) -> Rig:
    from tests.delivery.delivery_kit import settings

    changes = {"event_batch_timeout": 0.05, "export_timeout": 0.5, "batch_size": 10, **changes}
    made = settings(base_uri=server.url, **changes)
    return Rig(MoesifTransport(made), base_uri=server.url, random=NoJitter(), **changes)


class NoJitter:
    """Back-off without waiting: the dice fall on their lower end."""

    def uniform(self, low, high):
        return low + 0.02


def ids(numbers) -> list[str]:
    return [f"{n:036d}" for n in numbers]


@pytest.mark.parametrize(
    "faults",
    [
        [Status(503)] * 3,
        [Status(500), Status(502), Status(504), Status(408), Status(425), Status(302)],
        [Status(429, {"Retry-After": "0"}), Status(503, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"})],
        [Reset(), Close(), Reset()],
        [HalfStatusLine(), Garbage()],
        [Hang()],
        [Drip(0.02)],
        [HalfBody(503), HalfBody(201)],
    ],
    ids=["503", "5xx", "retry-after", "reset", "half", "hang", "drip", "half-body"],
)
def test_every_event_arrives_and_is_acknowledged_once(faults) -> None:
    """After any of these faults all events are delivered; none that the server acknowledged is sent again."""
    with FaultServer(*faults) as server, rig_for(server) as rig:
        rig.delivery.ensure_started()
        for n in range(35):
            rig.submit(n)
        assert rig.delivery.force_flush(30)
        assert sorted(server.acknowledged) == ids(range(35))
        assert rig.stats.delivered == 35
        assert rig.stats.retries >= len(faults) - 1


def test_refused_then_up_again() -> None:
    """Nobody listens for a while: the events wait, and go when somebody does."""
    with FaultServer() as server, rig_for(server) as rig:
        server.refuse()
        rig.delivery.ensure_started()
        for n in range(20):
            rig.submit(n)
        assert not rig.delivery.force_flush(0.3)
        assert rig.stats.pending == 20
        server.listen()
        assert rig.delivery.force_flush(30)
        assert sorted(server.acknowledged) == ids(range(20))


def test_413_above_a_size() -> None:
    """A gateway with a small limit: batches are cut until they fit, bodies left out where one event is too large."""
    limit = 1500

    def judge(request):
        return Status(413) if len(request.body) > limit else Status(201)

    with FaultServer(then=judge) as server, rig_for(server, batch_size=50) as rig:
        rig.delivery.ensure_started()
        for n in range(30):
            rig.submit(payload(n, 100 if n % 7 else 3000))
        assert rig.delivery.force_flush(30)
        assert sorted(server.acknowledged) == ids(range(30))
        assert rig.stats.dropped == {}


def test_poison_among_good_events() -> None:
    """One event that the server refuses is dropped, its neighbours arrive."""

    def judge(request):
        return Status(400, body=b"planted-answer") if ids([13])[0] in request.ids else Status(201)

    with FaultServer(then=judge) as server, rig_for(server, batch_size=50) as rig:
        rig.delivery.ensure_started()
        for n in range(30):
            rig.submit(n)
        assert rig.delivery.force_flush(30)
        assert sorted(server.acknowledged) == ids(n for n in range(30) if n != 13)
        assert rig.stats.dropped == {"rejected": 1}


def test_only_one_sender_probes_a_server_that_is_down() -> None:
    """Four senders with full queues: while the server is down there is one POST at a time."""
    running = [0, 0]
    lock = threading.Lock()

    def slow_failure(_):
        with lock:
            running[0] += 1
            running[1] = max(running[1], running[0])
        time.sleep(0.05)
        with lock:
            running[0] -= 1
        return Status(503)

    with FaultServer(Status(503), Status(503), Status(503), Status(503), then=slow_failure) as server:
        with rig_for(server, event_worker_count=4, batch_size=1) as rig:
            rig.delivery.ensure_started()
            rig.submit(0)
            assert server.wait_for_requests(1)
            while not rig.stats.retries:
                time.sleep(0.005)
            for n in range(1, 20):
                rig.submit(n)
            assert server.wait_for_requests(12)
            assert running[1] == 1
            server.then = Status(201)
            assert rig.delivery.force_flush(30)


@pytest.mark.parametrize(
    "then",
    [Hang(), Drip(0.02), Status(503), Status(503, {"Retry-After": "3600"}), Reset(), None],
    ids=["hang", "drip", "503", "retry-after", "reset", "refuse"],
)
def test_deadlines_hold_with_any_server(then, caplog) -> None:
    """Flush returns False in its time, shutdown ends in its time, and every event is accounted for."""
    with FaultServer(then=then) as server:
        rig = rig_for(server, export_timeout=30.0)
        if then is None:
            server.refuse()
        rig.delivery.ensure_started()
        for n in range(50):
            rig.submit(n)
        started = time.monotonic()
        assert not rig.delivery.force_flush(0.3)
        with caplog.at_level(logging.WARNING):
            rig.delivery.shutdown(0.5)
        # Not a measure of speed: a deadline that is not kept here takes 30 s.
        assert time.monotonic() - started < 10
        assert rig.stats.dropped == {"shutdown": 50}
        assert rig.stats.held_bytes == 0
        assert "shutdown 50" in caplog.text
        assert "planted" not in caplog.text


def test_a_dripping_server_does_not_keep_a_sender() -> None:
    """A server that answers a byte now and then holds each POST for EXPORT_TIMEOUT at most."""
    with FaultServer(Drip(0.02), Drip(0.02)) as server, rig_for(server, export_timeout=0.3, event_worker_count=1) as rig:
        rig.delivery.ensure_started()
        rig.submit(1)
        assert rig.delivery.force_flush(30)
        assert rig.stats.retries == 2


def test_memory_is_bounded_with_a_hanging_server() -> None:
    """With nothing going out, what waits is at most EVENT_QUEUE_SIZE, and the rest is counted as `queue_full`."""
    with FaultServer(then=Hang()) as server:
        rig = rig_for(server, event_queue_size=500, export_timeout=30.0, batch_size=100)
        rig.delivery.ensure_started()
        for n in range(5000):
            rig.submit(payload(n, 100))
        assert rig.stats.pending <= 500
        assert rig.stats.dropped["queue_full"] >= 4500
        rig.delivery.shutdown(0.2)
        assert rig.stats.pending == 0


def test_server_that_comes_and_goes_with_a_spool(tmp_path) -> None:
    """A small queue, a server that is away half of the time, a disk: nothing is lost."""
    with FaultServer() as server:
        server.refuse()
        rig = rig_for(server, event_queue_size=40, spool_directory=str(tmp_path))
        rig.delivery.ensure_started()
        with rig:
            for n in range(300):
                while rig.stats.pending >= 40:
                    rig.delivery.wake()
                    time.sleep(0.005)
                assert rig.submit(n)
            server.listen()
            assert rig.delivery.force_flush(30)
            assert server.wait_for_acknowledged(100)
        with rig_for(server, spool_directory=str(tmp_path)) as rig:
            rig.delivery.ensure_started()
            assert server.wait_for_acknowledged(300, timeout=20)
        assert sorted(set(server.acknowledged)) == ids(range(300))
