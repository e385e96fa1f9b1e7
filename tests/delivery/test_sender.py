"""What becomes of a batch: exact sequences, on a clock that the waits advance, with no threads."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moesif_otel._delivery.outcome import BatchOutcome, PostAnswer
from moesif_otel._delivery.sender import HOPELESS_EVENTS
from tests.delivery.delivery_kit import FakeClock, MemoryTransport, Rig, no_new_threads, payload, without_bodies

RETRY = PostAnswer(BatchOutcome.RETRY, 503)
SPLIT = PostAnswer(BatchOutcome.SPLIT, 413)
ISOLATE = PostAnswer(BatchOutcome.ISOLATE, 400)
DELIVERED = PostAnswer(BatchOutcome.DELIVERED, 201)


@pytest.fixture(autouse=True)
def _no_threads():
    with no_new_threads():
        yield


def rig(transport, **changes) -> Rig:
    return Rig(transport, clock=FakeClock(), **changes)


def numbers(payloads) -> list[int]:
    return [int(json.loads(p)["transaction_id"]) for p in payloads]


def test_backoff_sequence_of_a_server_that_comes_back() -> None:
    """A server that fails eight times is asked after 1, 2, 4, 8, 16, 30, 30, 30 s, and then has the batch once."""
    transport = MemoryTransport([RETRY] * 8)
    with rig(transport) as r:
        for n in range(3):
            r.submit(n)
        assert r.delivery.force_flush(1000)
        assert r.clock.waits == [1, 2, 4, 8, 16, 30, 30, 30]
        assert [numbers(b) for b in transport.sent] == [[0, 1, 2]] * 9
        assert (r.stats.delivered, r.stats.retries) == (3, 8)


def test_retry_after_is_waited_out() -> None:
    """A wish of the server that is longer than the back-off is kept, and a tenth at most is added at random."""
    transport = MemoryTransport([PostAnswer(BatchOutcome.RETRY, 429, retry_after_s=17.0), RETRY])
    with rig(transport) as r:
        r.submit(1)
        assert r.delivery.force_flush(100)
        assert r.clock.waits == [pytest.approx(17 * 1.1), 2]


def test_exceptions_of_a_transport_are_retried_and_counted() -> None:
    """A transport that raises, which none should, costs a retry and is counted as an error."""
    with rig(MemoryTransport([ZeroDivisionError()])) as r:
        r.submit(1)
        assert r.delivery.force_flush(10)
        assert (r.stats.delivered, r.stats.errors["sending a batch"]) == (1, 1)


def test_ctrl_c_in_an_inline_send_leaves_the_batch_waiting() -> None:
    """A `KeyboardInterrupt` passes through, and the batch is sent by the next flush."""
    transport = MemoryTransport([KeyboardInterrupt()])
    with rig(transport) as r:
        r.submit(1)
        with pytest.raises(KeyboardInterrupt):
            r.delivery.force_flush(10)
        assert r.stats.pending == 1
        assert r.delivery.force_flush(10)


def test_flush_tells_the_truth() -> None:
    """A flush of a server that stays down returns False in its time; of one that is up, True."""
    transport = MemoryTransport(then=RETRY)
    with rig(transport) as r:
        r.submit(1)
        started = r.clock.now_s
        assert not r.delivery.force_flush(5)
        assert r.clock.now_s - started <= 5
        transport.then = None
        assert r.delivery.force_flush(5)
        assert r.delivery.force_flush(0)


def test_flush_is_true_for_what_was_dropped() -> None:
    """What is counted as dropped is settled: a flush need not wait for it."""
    with rig(MemoryTransport(then=PostAnswer(BatchOutcome.SUSPENDED, 402))) as r:
        r.submit(1)
        assert r.delivery.force_flush(5)
        assert r.stats.dropped == {"payment_required": 1}


def test_split_halves_down_to_one_then_strips_then_gives_up() -> None:
    """413: halves, then bodies, then `too_large`; the events that fit are delivered."""
    transport = MemoryTransport(then=lambda payloads: SPLIT if sum(map(len, payloads)) > 400 else DELIVERED)
    with rig(transport) as r:
        huge_header = json.dumps({"transaction_id": f"{9:036d}", "headers": "h" * 600}).encode()
        for item in (payload(1), payload(2, 1000), huge_header, payload(4)):
            r.submit(item)
        assert r.delivery.force_flush(100)
        assert r.stats.dropped == {"too_large": 1}
        assert sorted(numbers(transport.delivered)) == [1, 2, 4]
        assert without_bodies(payload(2, 1000)) in transport.delivered


def test_local_cap_splits_without_asking() -> None:
    """An event over 5 MB is never sent whole; without its body it is."""
    transport = MemoryTransport()
    with rig(transport, event_queue_bytes=64 << 20) as r:
        r.submit(payload(1, 6_000_000))
        assert r.delivery.force_flush(100)
        assert transport.sent == [[without_bodies(payload(1))]]


def test_local_cap_gives_up_without_asking() -> None:
    """An event over 5 MB without any body is dropped as too large, and never sent."""
    transport = MemoryTransport()
    with rig(transport, without_bodies=None) as r:
        r.submit(payload(1, 6_000_000))
        assert r.delivery.force_flush(100)
        assert (transport.sent, r.stats.dropped) == ([], {"too_large": 1})


def test_without_bodies_that_raises_drops_the_event_alone() -> None:
    """A fault of ours in stripping is counted and costs the one event."""
    with rig(MemoryTransport(then=SPLIT), without_bodies=lambda _: 1 / 0) as r:
        r.submit(1)
        assert r.delivery.force_flush(100)
        assert r.stats.dropped == {"too_large": 1}
        assert r.stats.errors["leaving out the bodies of an event"] == 1


def test_after_a_413_new_batches_are_smaller() -> None:
    """The size that was refused is not tried with each batch anew."""
    limit = 300_000
    transport = MemoryTransport(then=lambda payloads: SPLIT if sum(map(len, payloads)) > limit else DELIVERED)
    with rig(transport) as r:
        for _ in range(3):
            for n in range(50):
                r.submit(payload(n, 10_000))
            assert r.delivery.force_flush(100)
        refused = [b for b in transport.sent if sum(map(len, b)) > limit]
        assert len(refused) == 1


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 59)), st.integers(1, 60), st.integers(1, 60))
def test_isolation_drops_exactly_the_poison(poison, count, batch_size) -> None:
    """Whatever events the server refuses: those are dropped as rejected, every other one is delivered once."""

    def judge(payloads):
        return ISOLATE if poison & set(numbers(payloads)) else DELIVERED

    transport = MemoryTransport(then=judge)
    with rig(transport, batch_size=batch_size) as r:
        for n in range(count):
            r.submit(n)
        assert r.delivery.force_flush(100)
        bad = poison & set(range(count))
        assert sorted(numbers(transport.delivered)) == sorted(set(range(count)) - bad)
        assert r.stats.dropped.get("rejected", 0) == len(bad)


def test_a_server_that_refuses_everything_is_not_stormed() -> None:
    """A wrong address answers 404 to all: after some hundred events a batch costs a few POSTs, until one is taken."""
    transport = MemoryTransport(then=PostAnswer(BatchOutcome.ISOLATE, 404))
    with rig(transport) as r:
        for n in range(HOPELESS_EVENTS):
            r.submit(n)
        r.delivery.force_flush(100)
        before = len(transport.sent)
        for n in range(500):
            r.submit(n)
        r.delivery.force_flush(100)
        assert len(transport.sent) - before <= 5 * 5
        transport.then = None
        r.submit(1)
        r.delivery.force_flush(100)
        transport.then = lambda payloads: ISOLATE if 3 in numbers(payloads) else DELIVERED
        for n in range(10):
            r.submit(n)
        r.delivery.force_flush(100)
        assert r.stats.delivered == 1 + 9


@pytest.mark.parametrize(("status", "reason"), [(401, "unauthorized"), (402, "payment_required"), (403, "unauthorized")])
def test_suspension_makes_no_storm(status, reason, caplog) -> None:
    """401, 402, 403: one error that says what to do, one POST a minute, all events dropped for the reason meanwhile."""
    transport = MemoryTransport(then=PostAnswer(BatchOutcome.SUSPENDED, status))
    with caplog.at_level(logging.INFO), rig(transport) as r:
        for second in range(181):
            r.submit(second)
            assert r.delivery.force_flush(0.5)
            r.clock.now_s += 1
        assert len(transport.sent) in (3, 4)
        assert r.stats.dropped == {reason: 181}
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == len(transport.sent)
        assert ("check APPLICATION_ID" in errors[0].message) == (status != 402)
        transport.then = None
        r.clock.now_s += 60
        r.submit(1)
        assert r.delivery.force_flush(1)
        assert r.stats.delivered == 1


def test_post_is_given_no_more_time_than_there_is() -> None:
    """A POST made by a flush or a shutdown has the flush's time, not EXPORT_TIMEOUT."""
    transport = MemoryTransport()
    with rig(transport, export_timeout=10.0) as r:
        r.submit(1)
        r.delivery.force_flush(3)
        r.submit(1)
        r.delivery.force_flush(300)
        assert transport.timeouts == [3, 10]


def test_payloads_of_any_kind_are_sent_as_they_are() -> None:
    """Another exporter's objects go through: batches, retries and halves, without bytes of any kind."""
    from moesif_otel._delivery.queue import Prepared

    class Thing:
        pass

    things = [Thing() for _ in range(4)]
    transport = MemoryTransport([RETRY, ISOLATE])
    with rig(transport, prepare=lambda thing: Prepared(thing, 100), without_bodies=None) as r:
        for thing in things:
            r.submit(thing)
        assert r.delivery.force_flush(10)
        assert transport.delivered == things


def test_logs_say_it_once_a_minute_and_never_the_secret(caplog) -> None:
    """Of a server that is down for an hour there is one line a minute at most, without the application id."""
    transport = MemoryTransport(then=RETRY)
    with caplog.at_level(logging.INFO), rig(transport) as r:
        r.submit(payload(1, 20))
        r.delivery.force_flush(3600)
        lines = [record.message for record in caplog.records if record.name.startswith("moesif_otel._delivery")]
        assert 40 <= len(lines) <= 62
        assert "status 503" in lines[0]
        assert "more since the last line" in lines[5]
        assert "planted" not in caplog.text
        assert "xxxxx" not in caplog.text
        transport.then = None
        r.delivery.force_flush(100)
        assert "accepts events again" in caplog.records[-1].message


@pytest.mark.parametrize("failure", [PostAnswer(BatchOutcome.RETRY, 500), PostAnswer(BatchOutcome.RETRY, 503), PostAnswer(BatchOutcome.RETRY)], ids=["500", "503", "no answer"])
def test_a_batch_that_the_server_fails_on_does_not_hold_up_the_rest(failure) -> None:
    """One event that is answered with a 5xx for ever is given up as rejected; all others, its own batch's too, arrive."""
    transport = MemoryTransport(then=lambda payloads: failure if 7 in numbers(payloads) else DELIVERED)
    with rig(transport, batch_size=20) as r:
        for n in range(400):
            r.submit(n)
        r.delivery.force_flush(3600)
        assert len(transport.delivered) == 399  # also with nothing else to send: its halves are sent one after the other
        for n in range(400, 420):
            r.submit(n)
            r.delivery.force_flush(60)
        assert sorted(numbers(transport.delivered)) == [n for n in range(420) if n != 7]
        assert r.stats.dropped == {"rejected": 1}


def test_one_batch_alone_with_a_poisoned_event_comes_through() -> None:
    """With nothing else to send, a batch that is answered 500 is cut until its good events are delivered."""
    transport = MemoryTransport(then=lambda payloads: PostAnswer(BatchOutcome.RETRY, 500) if 7 in numbers(payloads) else DELIVERED)
    with rig(transport) as r:
        for n in range(50):
            r.submit(n)
        assert r.delivery.force_flush(7200)
        assert sorted(numbers(transport.delivered)) == [n for n in range(50) if n != 7]
        assert r.stats.dropped == {"rejected": 1}


@pytest.mark.parametrize("status", [500, 502, 429, None])
def test_nothing_is_given_up_while_the_server_fails_for_all(status) -> None:
    """A server that is down for hours costs no event, and its batches come back nearly whole."""
    transport = MemoryTransport(then=PostAnswer(BatchOutcome.RETRY, status))
    with rig(transport, batch_size=50) as r:
        for n in range(200):
            r.submit(n)
        assert not r.delivery.force_flush(6 * 3600)
        assert r.stats.dropped == {}
        transport.then, transport.sent = None, []
        assert r.delivery.force_flush(100)
        assert r.stats.delivered == 200
        if status != 500:
            assert len(transport.sent) == 4


def test_refusals_in_a_row_do_not_cost_the_good_events_that_follow() -> None:
    """After 200 refused events one in ten is bad: the 900 good ones are delivered all the same."""
    transport = MemoryTransport(
        then=lambda payloads: ISOLATE if any(n < 200 or n % 10 == 0 for n in numbers(payloads)) else DELIVERED
    )
    with rig(transport) as r:
        for n in range(1200):
            r.submit(n)
        assert r.delivery.force_flush(100)
        good = [n for n in range(200, 1200) if n % 10]
        assert sorted(set(numbers(transport.delivered))) == good
        assert (r.stats.delivered, r.stats.dropped) == (900, {"rejected": 300})


def test_the_smaller_size_after_a_413_is_unlearned() -> None:
    """A proxy that refused large bodies for a while does not make small POSTs for the rest of the process's life."""
    with rig(MemoryTransport()) as r:
        queue = r.delivery._state.queue
        usual = queue.max_bytes
        queue.learn_limit(10)
        assert queue.max_bytes < usual
        for n in range(300):
            r.submit(n)
            r.delivery.force_flush(5)
        assert queue.max_bytes == usual


def test_one_line_for_one_cause(caplog) -> None:
    """An unreachable server is told once, with the address and what to check."""
    transport = MemoryTransport([PostAnswer(BatchOutcome.RETRY, detail="ConnectionRefusedError (Connection refused)")] * 3)
    transport.address = "https://moesif.example/path"
    with caplog.at_level(logging.INFO), rig(transport) as r:
        r.submit(1)
        assert r.delivery.force_flush(100)
    lines = [record.message for record in caplog.records if record.name == "moesif_otel._delivery.report"]
    assert len(lines) == 2
    assert "https://moesif.example/path did not answer (ConnectionRefusedError" in lines[0]
    assert "check BASE_URI" in lines[0]
    assert lines[1].endswith("https://moesif.example/path accepts events again")


@pytest.mark.parametrize("status", [302, 408])
def test_one_event_that_is_always_put_off_does_not_hold_up_the_others(status) -> None:
    """A firewall that redirects what it takes for an attack, or never reads it to its end: all the others arrive."""
    bad = payload(55)
    transport = MemoryTransport(
        then=lambda payloads: PostAnswer(BatchOutcome.RETRY, status) if bad in payloads else DELIVERED
    )
    with rig(transport, batch_size=10) as r:
        for n in range(100):
            r.submit(n)
        assert not r.delivery.force_flush(500)
        assert (r.stats.delivered, r.stats.pending) == (99, 1)
        for n in range(100, 110):  # now that others arrive, it is known to be its fault
            r.submit(n)
            r.delivery.force_flush(100)
        assert (r.stats.delivered, r.stats.dropped) == (109, {"rejected": 1})
    assert sorted(numbers(transport.delivered)) == [n for n in range(110) if n != 55]


@pytest.mark.parametrize("status", [407, 425, 429])
def test_who_is_asked_to_slow_down_gives_nothing_up(status) -> None:
    """Answers that are not about the batch: it stays in front, whole, however often the server takes another one."""
    answers = [DELIVERED, PostAnswer(BatchOutcome.RETRY, status)]
    transport = MemoryTransport(then=lambda payloads: DELIVERED if len(payloads) < 3 else answers[1])
    with rig(transport, batch_size=3) as r:
        for n in range(3):
            r.submit(n)
        for n in range(10, 30):
            r.submit(n)
            r.delivery.force_flush(60)
        assert r.stats.dropped == {}
        transport.then = None
        assert r.delivery.force_flush(100)
        assert r.stats.delivered == 23
