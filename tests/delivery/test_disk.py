"""When batches go to disk and when they come back."""

from __future__ import annotations

import json
import threading

import pytest

from moesif_otel._delivery.outcome import BatchOutcome, PostAnswer
from tests.delivery.delivery_kit import FakeClock, MemoryTransport, Rig, no_new_threads, payload, prepare

RETRY = PostAnswer(BatchOutcome.RETRY, 503)
BINDING = "ab" * 16


def transport(*script, then=None):
    return MemoryTransport(list(script), then=then, spool_binding=BINDING)


def numbers(payloads) -> list[int]:
    return sorted(int(json.loads(p)["transaction_id"]) for p in payloads)


def run_replay(rig, turns=100) -> None:
    """Take the turns that sender threads would take, on the fake clock."""
    for _ in range(turns):
        turn = rig.delivery._sender_turn(rig.delivery._state)
        if turn.wait_s is None:
            return
        rig.clock.now_s += turn.wait_s


@pytest.fixture
def spool(tmp_path):
    with no_new_threads():
        yield str(tmp_path / "spool")


def left_by_a_process(spool, events, **changes) -> None:
    rig = Rig(transport(then=RETRY), clock=FakeClock(), spool_directory=spool, **changes)
    for n in events:
        rig.submit(n)
    rig.delivery.shutdown(2)
    assert rig.stats.dropped == {"spooled": len(events)}
    assert rig.stats.spooled == len(events)
    assert rig.stats.lost == 0
    assert rig.stats.held_bytes == 0


def test_next_process_sends_what_the_last_one_could_not(spool) -> None:
    """Events of a process that ended with the server down are delivered by the next, once, and counted as replayed."""
    left_by_a_process(spool, range(25), batch_size=10)
    with Rig(transport(), clock=FakeClock(), spool_directory=spool) as rig:
        run_replay(rig)
        assert numbers(rig.transport.delivered) == list(range(25))
        assert (rig.stats.accepted, rig.stats.delivered, rig.stats.replayed) == (25, 25, 25)
        assert rig.stats.spool_bytes == 0


def test_replay_is_paced(spool) -> None:
    """A few files, then a pause: a server that has just come back is not met by everything at once."""
    left_by_a_process(spool, range(100), batch_size=10)
    with Rig(transport(), clock=FakeClock(), spool_directory=spool) as rig:
        for _ in range(2 * 4):  # read, sent
            assert rig.delivery._sender_turn(rig.delivery._state).wait_s == 0
        assert rig.delivery._sender_turn(rig.delivery._state).wait_s == 1
        assert len(rig.transport.sent) == 4


def test_replay_stops_at_the_first_failure(spool) -> None:
    """One file finds out that the server is down; the files stay, and no count changes."""
    left_by_a_process(spool, range(30), batch_size=10)
    with Rig(transport(then=RETRY), clock=FakeClock(), spool_directory=spool) as rig:
        for _ in range(2):  # read, sent
            assert rig.delivery._sender_turn(rig.delivery._state).wait_s == 0
        assert rig.delivery._sender_turn(rig.delivery._state).wait_s >= 1
        assert len(rig.transport.sent) == 1
        assert (rig.stats.accepted, rig.stats.replayed) == (0, 0)
        rig.transport.then = None
        run_replay(rig)
        assert rig.stats.delivered == 30


def test_suspended_replay_keeps_the_files(spool) -> None:
    """A 401 drops fresh events, but not what is safe on disk."""
    left_by_a_process(spool, range(5))
    with Rig(transport(then=PostAnswer(BatchOutcome.SUSPENDED, 401)), clock=FakeClock(), spool_directory=spool) as rig:
        run_replay(rig, 5)
        assert rig.stats.dropped == {}
        rig.transport.then = None
        rig.clock.now_s += 100
        run_replay(rig)
        assert rig.stats.delivered == 5


def test_fresh_events_go_before_files(spool) -> None:
    """While anything fresh waits, files do."""
    left_by_a_process(spool, [1])
    with Rig(transport(), clock=FakeClock(), spool_directory=spool) as rig:
        rig.submit(2)
        assert rig.delivery.force_flush(30)
        assert numbers(rig.transport.delivered) == [2]
        run_replay(rig)
        assert numbers(rig.transport.delivered) == [1, 2]


def test_poison_in_a_file_is_isolated(spool) -> None:
    """A file with a refused and an oversized event: those are dropped for their reasons, the rest is delivered."""
    left_by_a_process(spool, [0, 1, 2, payload(3, 5000), payload(4, 10)])

    def judge(payloads):
        if sum(map(len, payloads)) > 3000:
            return PostAnswer(BatchOutcome.SPLIT, 413)
        return PostAnswer(BatchOutcome.ISOLATE, 422) if 1 in numbers(payloads) else None

    with Rig(transport(then=judge), clock=FakeClock(), spool_directory=spool) as rig:
        run_replay(rig)
        assert numbers(rig.transport.delivered) == [0, 2, 3, 4]
        assert rig.stats.dropped == {"rejected": 1}
        assert (rig.stats.accepted, rig.stats.replayed) == (5, 5)


def test_half_replayed_file_keeps_its_rest(spool) -> None:
    """The server goes away in the middle of a file that had to be cut: what was taken is not sent again."""
    left_by_a_process(spool, range(8))
    script = [PostAnswer(BatchOutcome.SPLIT, 413), None, RETRY]
    with Rig(transport(*script), clock=FakeClock(), spool_directory=spool) as rig:
        run_replay(rig)
        assert numbers(rig.transport.delivered) == list(range(8))
        assert rig.stats.delivered == 8


def test_full_memory_goes_to_disk_and_comes_back(spool) -> None:
    """With the server down, a queue that is nearly full is eased onto disk: nothing is dropped as `queue_full`."""
    with Rig(
        transport(then=RETRY), clock=FakeClock(), spool_directory=spool, event_queue_size=100, batch_size=10
    ) as rig:
        for n in range(1000):
            assert rig.submit(n)
            if n % 10 == 0:
                rig.delivery._intake_turn(rig.delivery._state)
        assert "queue_full" not in rig.stats.dropped
        assert rig.stats.pending <= 100
        assert rig.stats.spooled >= 900
        rig.transport.then = None
        assert rig.delivery.force_flush(30)
        run_replay(rig, 2000)
        assert numbers(rig.transport.delivered) == list(range(1000))
        assert rig.stats.delivered == 1000
        assert rig.stats.lost == 0


def test_full_bytes_go_to_disk_too(spool) -> None:
    """Large events ease EVENT_QUEUE_BYTES in the same way."""
    with Rig(transport(then=RETRY), clock=FakeClock(), spool_directory=spool, event_queue_bytes=1 << 20) as rig:
        for n in range(40):
            rig.submit(payload(n, 50_000))
            rig.delivery._intake_turn(rig.delivery._state)
        assert rig.stats.held_bytes < 1 << 20
        rig.transport.then = None
        rig.delivery.force_flush(5)
        run_replay(rig)
        assert rig.stats.delivered == 40


def test_disk_that_refuses_costs_nothing_but_room(spool) -> None:
    """When nothing can be written the events stay in memory; over the bound they are dropped as `queue_full`."""
    with open(spool, "w") as file:
        file.write("not a folder")
    with Rig(
        transport(then=RETRY), clock=FakeClock(), spool_directory=spool, event_queue_size=20, batch_size=5
    ) as rig:
        for n in range(30):
            rig.submit(n)
            rig.delivery._intake_turn(rig.delivery._state)
        assert rig.stats.dropped == {"queue_full": 10}
        assert rig.stats.spool_errors == 1
        rig.transport.then = None
        assert rig.delivery.force_flush(30)
        assert rig.stats.delivered == 20


def test_a_batch_that_cannot_be_written_for_want_of_memory_stays_in_memory(spool, monkeypatch) -> None:
    """Nothing that fails on the way to the disk keeps a batch from being sent once the server is back."""
    monkeypatch.setattr("moesif_otel._delivery.spool._encode", lambda *_: (_ for _ in ()).throw(MemoryError))
    with Rig(transport(then=RETRY), clock=FakeClock(), spool_directory=spool, event_queue_size=10, batch_size=2) as rig:
        for n in range(9):
            rig.submit(n)
        assert not rig.delivery.force_flush(3)
        assert (rig.stats.pending, rig.stats.spool_errors) == (9, 1)
        rig.transport.then = None
        assert rig.delivery.force_flush(300)
        assert numbers(rig.transport.delivered) == list(range(9))


def test_shutdown_with_a_disk_that_refuses_counts_the_loss(spool) -> None:
    """At the end, what neither the server nor the disk takes is dropped as `shutdown`."""
    with open(spool, "w") as file:
        file.write("not a folder")
    rig = Rig(transport(then=RETRY), clock=FakeClock(), spool_directory=spool)
    for n in range(3):
        rig.submit(n)
    rig.delivery.shutdown(1)
    assert rig.stats.dropped == {"shutdown": 3}


def test_only_prepared_payloads_reach_the_disk(spool) -> None:
    """What is written is exactly what `prepare` made, masked: never the captured item."""

    def masked(item):
        return prepare(item.replace(b"secret", b"******"))

    rig = Rig(transport(then=RETRY), clock=FakeClock(), spool_directory=spool, prepare=masked)
    rig.submit(payload(1) + b" secret")
    rig.delivery.shutdown(1)
    from pathlib import Path

    content = b"".join(path.read_bytes() for path in Path(spool).iterdir())
    assert b"******" in content
    assert b"secret" not in content


def test_a_transport_without_a_binding_never_touches_the_folder(spool) -> None:
    """Another exporter's pipeline with the same settings neither writes nor replays Moesif's files."""
    left_by_a_process(spool, [1])
    with Rig(MemoryTransport(), clock=FakeClock(), spool_directory=spool) as rig:
        run_replay(rig)
        assert rig.transport.sent == []


def test_threads_replay_by_themselves(tmp_path) -> None:
    """With real threads and the real clock a new process sends the old one's files without any traffic."""
    with no_new_threads():
        left_by_a_process(str(tmp_path), range(5))
    done = threading.Event()
    with Rig(transport(then=lambda _: done.set()), spool_directory=str(tmp_path)) as rig:
        rig.delivery.ensure_started()
        assert done.wait(30)
    assert rig.stats.delivered == 5


def test_a_file_that_is_refused_whole_costs_few_posts(spool) -> None:
    """2,000 events on disk and an address that answers 404 to all: not one POST for each."""
    left_by_a_process(spool, range(2000), batch_size=100)
    with Rig(transport(then=PostAnswer(BatchOutcome.ISOLATE, 404)), clock=FakeClock(), spool_directory=spool) as rig:
        run_replay(rig, 5000)
        assert rig.stats.dropped == {"rejected": 2000}
        assert len(rig.transport.sent) < 600


def test_a_file_that_the_server_fails_on_does_not_hold_up_the_rest(spool) -> None:
    """Replay knows the same way out for an event that is answered 500 for ever."""
    left_by_a_process(spool, range(100), batch_size=20)

    def judge(payloads):
        return PostAnswer(BatchOutcome.RETRY, 500) if 7 in numbers(payloads) else None

    with Rig(transport(then=judge), clock=FakeClock(), spool_directory=spool) as rig:
        for n in range(100, 200):
            run_replay(rig, 60)
            rig.submit(n)
            rig.delivery.force_flush(5)
        run_replay(rig, 3000)
        assert numbers(rig.transport.delivered) == [n for n in range(200) if n != 7]
        assert rig.stats.dropped == {"rejected": 1}


def test_a_hanging_server_is_no_reason_to_read_files(spool) -> None:
    """While one sender waits for an answer, the other reads no file, again and again."""
    left_by_a_process(spool, range(30), batch_size=10)
    with Rig(transport(then=RETRY), clock=FakeClock(), spool_directory=spool) as rig:
        state = rig.delivery._state
        state.health.failed(0, rig.clock.now_s, None)
        rig.clock.now_s += 60
        assert state.health.ask(rig.clock.now_s).go  # somebody probes
        claims = []
        rig.delivery._disk._spool.claim = lambda: claims.append(1)
        assert rig.delivery._sender_turn(state).wait_s is None
        assert claims == []


def test_a_file_that_is_read_while_a_shutdown_ends_is_left_to_the_next_process(spool) -> None:
    """Read before the shutdown took back what was being replayed, and ready after it: not leased any more, not held."""
    left_by_a_process(spool, range(5))
    rig = Rig(transport(), clock=FakeClock(), spool_directory=spool)
    claim = rig.delivery._disk._spool.claim

    def claim_and_end():
        found = claim()
        rig.delivery.shutdown(1)
        return found

    rig.delivery._disk._spool.claim = claim_and_end
    run_replay(rig)
    assert rig.stats.held_bytes == 0
    with Rig(transport(), clock=FakeClock(), spool_directory=spool) as other:
        run_replay(other)
        assert numbers(other.transport.delivered) == list(range(5))
