"""Batches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moesif_otel._delivery.queue import MAX_BATCH_BYTES, BatchQueue, Prepared


def event(n, size=10):
    return Prepared(n, size)


def drain(queue):
    found = []
    while queue.next:
        batch = queue.take()
        found.append(batch)
        assert queue.settle(batch)
    return found


@given(st.lists(st.integers(1, MAX_BATCH_BYTES * 2), max_size=60), st.integers(1, 20))
def test_batches_keep_order_count_and_bytes(sizes, most) -> None:
    """Whatever the sizes: every event is in one batch, in order; none has too many, and none but a single is too large."""
    queue = BatchQueue(most, 2.0)
    for n, size in enumerate(sizes):
        queue.add(event(n, size), 0.0, 0.0)
    queue.close()
    batches = drain(queue)
    assert [e.payload for b in batches for e in b.events] == list(range(len(sizes)))
    for batch in batches:
        assert 1 <= len(batch) <= most
        assert len(batch) == 1 or batch.size_bytes + len(batch) <= MAX_BATCH_BYTES
    assert queue.is_empty
    assert queue.is_settled(queue.last_sequence)


@given(st.integers(2, 200), st.lists(st.integers(0, 1000)))
def test_halving_loses_nothing_and_keeps_the_family(n, choices) -> None:
    """A batch that is cut again and again still has each event once, in order, and its family knows how many are left."""
    queue = BatchQueue(n, 2.0)
    for i in range(n):
        queue.add(event(i), 0.0, 0.0)
    family = queue.next.family
    seen, choices = [], iter(choices)
    while queue.next:
        batch = queue.take()
        if len(batch) > 1 and next(choices, 0) % 2:
            assert queue.put_back(batch, *batch.halves())
        else:
            assert queue.settle(batch)
            seen += batch.payloads
        assert family.unsettled == n - len(seen)
    assert seen == list(range(n))
    assert queue.is_settled(queue.last_sequence)


def test_open_batch_is_due_by_its_first_event() -> None:
    """A batch gathers from its first event on, not from its last."""
    queue = BatchQueue(10, 2.0)
    assert queue.due_at() is None
    queue.add(event(1), 100.0, 0.0)
    queue.add(event(2), 101.5, 0.0)
    assert queue.due_at() == 102.0
