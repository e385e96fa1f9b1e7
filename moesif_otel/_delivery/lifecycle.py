"""Forks and the end of the process, for every delivery that is alive.

Owns: one `atexit` entry and one at-fork hook for the whole process.
Threads: the main thread at exit; the only thread of a forked child.
Never: keeps a delivery alive; lets one delivery's end take another's time.
"""

from __future__ import annotations

import atexit
import os
import time
import weakref
from typing import Final, Protocol

from moesif_otel._guard import PROCESS_GUARD

__all__ = ["Ending", "watch"]


class Ending(Protocol):
    """What is told of forks and exits."""

    @property
    def exit_timeout_s(self) -> float:
        """Most seconds that its shutdown may take at exit."""
        ...

    def announce_shutdown(self, timeout_s: float) -> None:
        """Begin to end without waiting."""
        ...

    def shutdown(self, timeout_s: float) -> None:
        """End."""
        ...

    def after_fork(self) -> None:
        """Begin anew in a forked child."""
        ...


_alive: Final[weakref.WeakSet[Ending]] = weakref.WeakSet()


def watch(ending: Ending) -> None:
    """Tell `ending` of forks and of the exit of the process for as long as it lives, without keeping it alive."""
    _alive.add(ending)


def _at_exit() -> None:
    # All begin at once and end side by side: ten pipelines take as long as the slowest one.
    started_s = time.monotonic()
    endings = list(_alive)
    for ending in endings:
        PROCESS_GUARD.run("exit.announce", ending.announce_shutdown, ending.exit_timeout_s)
    for ending in endings:
        left_s = max(0.0, ending.exit_timeout_s - (time.monotonic() - started_s))
        PROCESS_GUARD.run("exit.shutdown", ending.shutdown, left_s)


def _in_child() -> None:
    for ending in list(_alive):
        PROCESS_GUARD.run("fork.child", ending.after_fork)


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_in_child)
