"""Exit and fork, for all deliveries at once."""

from __future__ import annotations

import pytest

from moesif_otel._delivery import process
from moesif_otel._guard import LiveSet


class Watched:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told = []

    def begin_exit(self) -> None:
        self.told.append("begin")
        raise ValueError("one that fails must not stop the others")

    def finish_exit(self) -> None:
        self.told.append("finish")

    def after_fork(self) -> None:
        self.told.append("fork")


@pytest.fixture(autouse=True)
def _alone(monkeypatch) -> None:
    monkeypatch.setattr(process, "LIVE_DELIVERIES", LiveSet())


def test_all_begin_to_end_before_one_is_waited_for() -> None:
    """At exit every delivery is told to begin, then each is waited for; one that raises does not stop the others."""
    watched = [Watched(), Watched()]
    for one in watched:
        process.LIVE_DELIVERIES.add(one)
    process._at_exit()
    process._in_child()
    assert [one.told for one in watched] == [["begin", "finish", "fork"]] * 2
