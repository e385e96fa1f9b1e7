"""What one delivery holds in one process, and what tells it of forks and of the end of the process.

`ProcessState` is replaced whole in a forked child: parent and child share no queue, lock or thread. `watch` registers a
delivery, weakly, with the one at-fork hook and the one `atexit` entry that the whole process has.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, Protocol, TypeVar

from moesif_otel._delivery.clock import WakeEvent
from moesif_otel._guard import PROCESS_GUARD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moesif_otel._capture.body import ByteBudget
    from moesif_otel._delivery.clock import Clock
    from moesif_otel._delivery.health import ServerHealth
    from moesif_otel._delivery.outcome import PostAnswer
    from moesif_otel._delivery.queue import BatchQueue
    from moesif_otel._delivery.report import DeliveryLog
    from moesif_otel._delivery.stats import Ledger
    from moesif_otel._guard import Guard
    from moesif_otel.settings import Settings

T = TypeVar("T")


class Transport(Protocol):
    """How a batch goes out: to Moesif, or through somebody else's exporter."""

    def send(self, payloads: Sequence[Any], timeout_s: float) -> PostAnswer:
        """Make one attempt that lasts at most `timeout_s` seconds."""
        ...

    def close(self) -> None:
        """Let go of connections; a later `send` may open new ones."""
        ...

    def after_fork(self) -> None:
        """Forget, in a forked child, every connection of the parent without touching it."""
        ...


@dataclass(frozen=True, slots=True)
class Collaborators:
    """What all parts of one delivery work with; the same in every process.

    Attributes:
        settings: Bounds, sizes and times.
        transport: Where batches go.
        ledger: Where every event is counted.
        budget: Where bytes are held and given back.
        guard: Where errors of ours are counted.
        clock: Time.
        log: The lines for users.
    """

    settings: Settings
    transport: Transport
    ledger: Ledger
    budget: ByteBudget
    guard: Guard
    clock: Clock
    log: DeliveryLog


class FlushMark:
    """Stands among the submitted items for "everything before me"; `sequence` is that of the last batch before it."""

    __slots__ = ("sequence",)

    def __init__(self) -> None:
        self.sequence: int | None = None


class Turn(NamedTuple):
    """What a sender's turn led to.

    Attributes:
        wait_s: Seconds until the next turn makes sense; 0: at once; None: when something has changed.
        version: The state's version that this was decided on; if it has changed since, do not wait.
    """

    wait_s: float | None
    version: int


class ProcessState(Generic[T]):
    """Queues, server health, threads and their locks, of one delivery in one process.

    Submitters and finalizers touch `submitted`, `wake_intake` and the flags only, which need no lock. Everything else
    is read and changed under `lock`.

    Args:
        queue: Batches.
        health: What is known of the server.
        closed: Whether it begins as one that was shut down: a forked child of such a pipeline delivers nothing.
    """

    def __init__(self, queue: BatchQueue, health: ServerHealth, *, closed: bool = False) -> None:
        # Unprepared items with the bytes charged for them, prepared payloads, and marks of flushes.
        self.submitted: deque[tuple[T, int] | bytes | FlushMark] = deque()
        self.submitted_bytes = 0  # since the intake was last woken for them; roughly, threads add without a lock
        self._signals: dict[str, Any] = {}
        # Grows with every change that a waiting sender may want to know of.
        self.version = 0
        self.queue = queue
        self.health = health
        self.refused_in_a_row = 0
        self.replaying = False
        # Whoever has popped the token prepares items: the intake thread, or a flush where there is no such thread.
        self.intake_token = [True]
        # The item that is being prepared. `list.pop` is atomic: whoever gets it settles it.
        self.in_hand: list[tuple[T, int]] = []
        self.intake_idle = False  # sleeps until it is woken
        self.intake_gathers = False  # is awake, or will be in a moment
        self.starting = threading.Lock()
        self.start_again_at_s = 0.0
        self.started = closed
        self.intake_runs = False
        self.sender_count = 0
        self.threads: list[threading.Thread] = []
        self.shutdown_turn = [] if closed else [True]
        self.limit_at_s: float | None = None  # no POST lasts beyond this
        self.exit_left_s: float | None = None  # once the process ends: what remains of SHUTDOWN_TIMEOUT
        self.closing = closed  # nothing new is taken
        self.stopped = closed  # threads end
        self.ended = closed  # everything is settled

    # Made at first use, not with the state: gunicorn's gevent worker patches `threading` after the fork in which a
    # state is made, and a lock of before that, waited for in a greenlet, would stop the whole worker.

    def _signal(self, name: str, make: Any) -> Any:
        return self._signals.get(name) or self._signals.setdefault(name, make())

    @property
    def wake_intake(self) -> WakeEvent:
        """Wakes the intake; finalizer-safe."""
        event: WakeEvent = self._signal("intake", WakeEvent)
        return event

    @property
    def lock(self) -> Any:
        """Guards queue, health and flags."""
        return self._signal("lock", threading.RLock)

    @property
    def work(self) -> threading.Condition:
        """What senders wait for."""
        condition: threading.Condition = self._signal("work", lambda: threading.Condition(self.lock))
        return condition

    @property
    def progress(self) -> threading.Condition:
        """What flushes and shutdowns wait for."""
        condition: threading.Condition = self._signal("progress", lambda: threading.Condition(self.lock))
        return condition

    def note_batch(self) -> None:
        """Wake one sender: a batch is ready. Call with `lock` held."""
        self.version += 1
        self.work.notify()

    def note_change(self) -> None:
        """Wake everybody who waits. Call with `lock` held."""
        self.version += 1
        self.work.notify_all()
        self.progress.notify_all()

    def wait_for_work(self, clock: Clock, turn: Turn) -> None:
        """Wait as a sender's turn has found, unless something has changed since."""
        with self.lock:
            if turn.version == self.version and not self.stopped:
                clock.wait(self.work, turn.wait_s)

    @property
    def has_work(self) -> bool:
        """Whether something waits that only our threads will bring to an end."""
        return bool(self.submitted or not self.queue.is_empty)

    @property
    def runs_by_itself(self) -> bool:
        """Whether threads do the work; else whoever flushes does it."""
        return self.intake_runs and self.sender_count > 0


FORKS_TELL: Final = hasattr(os, "register_at_fork") and "uwsgi" not in (*sys.builtin_module_names, *sys.modules)
"""Whether every fork runs Python's at-fork hooks. uWSGI forks without them: there the process id must be looked at."""


_alive: Final[weakref.WeakSet[Any]] = weakref.WeakSet()


def watch(delivery: Any) -> None:
    """Tell a `Delivery` of forks and of the end of the process for as long as it lives, without keeping it alive."""
    _alive.add(delivery)


def _at_exit() -> None:
    # All begin at once and end side by side: ten pipelines take as long as the slowest one.
    deliveries = list(_alive)
    for delivery in deliveries:
        PROCESS_GUARD.run("delivery at exit", delivery.begin_exit)
    for delivery in deliveries:
        PROCESS_GUARD.run("delivery at exit", delivery.finish_exit)


def _in_child() -> None:
    for delivery in list(_alive):
        PROCESS_GUARD.run("starting again after a fork", delivery.after_fork)


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_in_child)
