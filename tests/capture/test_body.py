"""Captured bodies and the byte budget: never more than the cap or the limit, and every byte given back."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from moesif_otel._capture.body import ByteBudget, CapturedBody, LeftOut

pieces = st.lists(st.binary(max_size=40), max_size=200)


@given(pieces=pieces, max_bytes=st.integers(0, 300))
def test_the_first_part_is_kept_and_all_is_counted(pieces: list[bytes], max_bytes: int) -> None:
    """Whatever the chunking, the kept part is the prefix of the whole, and the budget holds just that."""
    budget = ByteBudget(10_000_000)
    body = CapturedBody(max_bytes, budget)
    for number, piece in enumerate(pieces):
        body.add((piece, bytearray(piece), memoryview(piece))[number % 3])
    whole = b"".join(pieces)
    assert body.data() == whole[:max_bytes]
    assert (body.total_bytes, body.kept_bytes) == (len(whole), len(whole[:max_bytes]))
    assert body.truncated == (len(whole) > max_bytes)
    assert budget.held_bytes == body.kept_bytes
    budget.release(body.discard())
    assert (budget.held_bytes, body.data()) == (0, b"")
    body.add(b"after")
    assert budget.held_bytes == 0


@given(pieces=pieces, limit=st.integers(0, 400))
def test_over_the_limit_a_body_is_left_out_whole(pieces: list[bytes], limit: int) -> None:
    """A body that does not fit is no half body: it goes, with the reason, and its bytes are free for others."""
    budget = ByteBudget(limit)
    body = CapturedBody(10_000, budget)
    for piece in pieces:
        body.add(piece)
    total = sum(map(len, pieces))
    if total > limit:
        assert (body.left_out, body.data(), budget.held_bytes) == (LeftOut.MEMORY, b"", 0)
    else:
        assert (body.left_out, body.data()) == (None, b"".join(pieces))
    assert body.total_bytes == total


def test_a_whole_bytes_piece_is_kept_by_reference() -> None:
    """No copy on the request path."""
    piece = b"x" * 1_000
    body = CapturedBody(1_000, ByteBudget(10_000))
    body.add(piece)
    assert body.data() is piece


def test_charge_and_release_never_block() -> None:
    """A finalizer that interrupts a holder of the lock in its own thread is kept for later, and nothing is lost."""
    budget = ByteBudget(100)
    with budget._lock:
        budget.charge(30)
        budget.release(10)
        assert budget.reserve(10)
        budget.release(10)
    assert budget.held_bytes == 20
    assert not budget.reserve(81)
    assert budget.reserve(80)
    assert budget.held_bytes == 100


def test_threads_agree_on_the_sum() -> None:
    """Every byte taken is given back, however the threads meet."""
    budget = ByteBudget(1_000_000)

    def work() -> None:
        for size in range(2_000):
            if budget.reserve(size):
                budget.release(size)
            budget.charge(3)
            budget.charge(-3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.held_bytes == 0


def test_a_forked_child_starts_from_nothing() -> None:
    """What the parent holds is the parent's, also the lock."""
    budget = ByteBudget(100)
    budget.charge(50)
    budget._lock.acquire()
    budget.after_fork()
    assert budget.held_bytes == 0
    assert budget.reserve(100)
