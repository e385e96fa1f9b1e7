"""Exit and fork, for all deliveries at once."""

from __future__ import annotations

import gc

from moesif_otel._delivery import lifecycle


class Ending:
    """Notes what it is told."""

    exit_timeout_s = 5.0

    def __init__(self) -> None:
        self.told = []

    def announce_shutdown(self, timeout_s) -> None:
        self.told.append("announce")
        raise ValueError("one that fails must not stop the others")

    def shutdown(self, timeout_s) -> None:
        self.told.append(("shutdown", timeout_s <= 5))

    def after_fork(self) -> None:
        self.told.append("fork")


def test_all_begin_to_end_before_one_is_waited_for(monkeypatch) -> None:
    """At exit every delivery is told to begin, then each is waited for; one that raises does not stop the others."""
    monkeypatch.setattr(lifecycle, "_alive", type(lifecycle._alive)())
    endings = [Ending(), Ending()]
    for ending in endings:
        lifecycle.watch(ending)
    lifecycle._at_exit()
    lifecycle._in_child()
    assert [e.told for e in endings] == [["announce", ("shutdown", True), "fork"]] * 2


def test_watching_keeps_nobody_alive(monkeypatch) -> None:
    """A delivery that was let go of is not told anything, and not kept."""
    monkeypatch.setattr(lifecycle, "_alive", type(lifecycle._alive)())
    ending = Ending()
    lifecycle.watch(ending)
    del ending
    gc.collect()
    assert not list(lifecycle._alive)
