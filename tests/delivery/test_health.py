"""What senders share about the server."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from moesif_otel._delivery.health import ServerHealth


def longest(_, high):
    return high


@given(st.integers(0, 60), st.floats(0, 1))
def test_jitter_is_full_and_capped(failures, share) -> None:
    """Each wait lies between nothing and the cap of its turn, wherever the dice fall."""
    health, now = ServerHealth(lambda low, high: low + (high - low) * share), 0.0
    for n in range(failures):
        permit = health.ask(now)
        health.failed(permit.epoch, now, None)
        assert 0 <= health.opens_at() - now <= min(30, 2**n)
        now = health.opens_at()


def test_retry_after_is_never_undercut() -> None:
    """Neither the dice nor a flush make a POST go before the server wants it."""
    health = ServerHealth(lambda *_: 0.0)
    health.failed(health.ask(0.0).epoch, 0.0, 25.0)
    health.hurry()
    assert health.ask(24.9).wait_s > 0
    assert health.ask(25.0).go


def test_flush_cuts_the_backoff() -> None:
    """A flush lets the next probe go at once."""
    health = ServerHealth(longest)
    health.failed(health.ask(0.0).epoch, 0.0, None)
    assert not health.ask(0.5).go
    health.hurry()
    assert health.ask(0.5).go


def test_one_probes_the_others_wait() -> None:
    """While the server is down one sender asks it, and the others wait until that one knows."""
    health = ServerHealth(longest)
    health.failed(health.ask(0.0).epoch, 0.0, None)
    probe = health.ask(1.0)
    assert probe.go
    assert health.ask(1.0).wait_s is None
    assert health.ask(100.0).wait_s is None
    assert health.worked(probe.epoch)
    assert health.ask(1.0).go
    assert health.ask(1.0).go


def test_two_in_flight_count_as_one_failure() -> None:
    """Two POSTs that were under way when the server went down double the wait once."""
    health = ServerHealth(longest)
    first, second = health.ask(0.0), health.ask(0.0)
    health.failed(first.epoch, 0.0, None)
    health.failed(second.epoch, 0.1, None)
    assert health.ask(0.1).wait_s == 0.9


def test_late_retry_after_still_counts() -> None:
    """Of two answers the later one may say how long to stay away."""
    health = ServerHealth(longest)
    first, second = health.ask(0.0), health.ask(0.0)
    health.failed(first.epoch, 0.0, None)
    health.failed(second.epoch, 0.0, 10.0)
    assert health.ask(1.0).wait_s == 10.0


def test_late_success_is_no_news() -> None:
    """An answer to a POST that left before the failure does not say that the server is up."""
    health = ServerHealth(longest)
    first, second = health.ask(0.0), health.ask(0.0)
    health.failed(first.epoch, 0.0, None)
    assert not health.worked(second.epoch)
    assert not health.is_up


def test_pipelines_that_were_refused_together_come_back_apart() -> None:
    """Of what the server asks to wait a tenth at most is added at random, a second at least to draw from."""
    dice = Random(1)
    opening = []
    for _ in range(20):
        health = ServerHealth(dice.uniform)
        health.failed(health.ask(0.0).epoch, 0.0, 30.0)
        opening.append(health.opens_at())
    assert 30 <= min(opening) < max(opening) <= 33
    assert len({round(at, 1) for at in opening}) > 10
