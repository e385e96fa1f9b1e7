"""The state that one delivery holds in one process, and its notice of forks and of the end of the process.

`ProcessState` is replaced whole in a forked child: parent and child share no queue, lock or thread. The whole process
has one at-fork hook and one exit handler, which call every delivery in `LIVE_DELIVERIES`.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, Protocol, TypeVar

from moesif_otel._delivery.clock import WakeEvent
from moesif_otel._delivery.health import ServerHealth
from moesif_otel._guard import PROCESS_GUARD, LiveSet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moesif_otel._capture.body import ByteBudget
    from moesif_otel._delivery.clock import Clock
    from moesif_otel._delivery.outcome import PostAnswer
    from moesif_otel._delivery.queue import BatchQueue
    from moesif_otel._delivery.report import DeliveryLog
    from moesif_otel._delivery.stats import Ledger
    from moesif_otel._guard import Guard
    from moesif_otel.settings import Settings

T = TypeVar("T")


class Transport(Protocol):
    """The way a batch goes out: to Moesif, or through somebody else's exporter."""

    address: str  # where to, and the setting that says so: for the log
    setting: str
    spool_binding: str | None  # names the destination on disk; None: its payloads are not ours to write

    def send(self, payloads: Sequence[Any], timeout_s: float) -> PostAnswer:
        """Make one attempt that lasts at most `timeout_s` seconds."""
        ...

    def close(self) -> None:
        """Release connections; a later `send` may open new ones."""
        ...

    def after_fork(self) -> None:
        """Forget, in a forked child, every connection of the parent without touching it."""
        ...


class Collaborators(NamedTuple):
    """The collaborators of all parts of one delivery; the same in every process."""

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
    """The result of a sender's turn."""

    wait_s: float | None  # until the next turn makes sense; 0: at once; None: when something has changed
    version: int  # of the state that this was decided on; if it has changed since, do not wait


class _AtFirstUse(Generic[T]):
    """A signal of a process state that is made when it is first asked for, not with the state.

    gunicorn's gevent worker patches `threading` after the fork in which a state is made, and a lock of before that,
    waited for in a greenlet, would stop the whole worker.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, state: Any, owner: type) -> T:
        made: T = state.signals.setdefault(self._name, self._make(state))  # of several threads one wins
        setattr(state, self._name, made)  # found there from now on; `state.__dict__` would make every attribute slower
        return made


class ProcessState(Generic[T]):
    """Queues, server health, threads and their locks, of one delivery in one process.

    Submitters and finalizers touch `submitted`, the wake events and the flags only, which need no lock. Everything else
    is read and changed under `lock`. A `closed` one is shut down from the beginning: a forked child of such a pipeline
    delivers nothing.
    """

    wake_intake = _AtFirstUse(lambda _: WakeEvent())
    wake_poller = _AtFirstUse(lambda _: WakeEvent())
    lock = _AtFirstUse(lambda _: threading.RLock())  # guards queue, health and flags
    work = _AtFirstUse(lambda state: threading.Condition(state.lock))  # what senders wait for
    progress = _AtFirstUse(lambda state: threading.Condition(state.lock))  # what flushes and shutdowns wait for

    def __init__(self, queue: BatchQueue, *, closed: bool = False) -> None:
        self.signals: dict[str, Any] = {}
        # Unprepared items with the bytes charged for them, prepared payloads, and marks of flushes.
        self.submitted: deque[tuple[T, int] | bytes | FlushMark] = deque()
        self.submitted_bytes = 0  # since the intake was last woken for them; roughly, threads add without a lock
        # Grows with every change that a waiting sender may want to know of.
        self.version = 0
        self.queue = queue
        self.health = ServerHealth()
        self.refused_in_a_row = 0
        self.replaying = False
        # Whoever has popped the token prepares items: the intake thread, or a flush where there is no such thread.
        self.intake_token = [True]
        # The item that is being prepared. `list.pop` is atomic: whoever gets it settles it.
        self.in_hand: list[tuple[T, int]] = []
        self.intake_idle = False  # sleeps until it is woken
        self.intake_gathers = False  # is awake, or will be in a moment
        self.hurried = False  # was woken by what must not wait for others
        # The delivery, from an item that wakes the intake until the pass that takes it: its last user may go meanwhile.
        self.keeper: object = None
        self.starting = threading.Lock()
        self.start_again_at_s = 0.0
        self.started = closed
        self.threads: list[threading.Thread] = []
        self.running = 0  # threads that did start: the intake is the first, then come the senders
        self.shutdown_turn = [] if closed else [True]
        self.limit_at_s: float | None = None  # no POST lasts beyond this
        self.exit_left_s: float | None = None  # once the process ends: what remains of SHUTDOWN_TIMEOUT
        self.closing = closed  # nothing new is taken
        self.stopped = closed  # threads end
        self.ended = closed  # everything is settled

    def start_thread(self, name: str, run: Callable[..., None], *args: object) -> None:
        """Start a daemon thread; raise what `Thread.start` raises."""
        thread = threading.Thread(target=run, args=args, name=name, daemon=True)
        self.threads.append(thread)
        try:
            thread.start()
        except BaseException:
            self.threads.remove(thread)
            raise
        self.running += 1

    def abandon(self) -> None:
        """Leave everything to the parent, in a forked child: there, copies of our threads go on if gevent made them."""
        self.stopped = self.ended = True
        self.submitted.clear()
        self.in_hand.clear()
        self.queue.settle_all()

    def wake(self) -> None:
        """Have the intake make a pass at once; never blocks, so that finalizers may call it."""
        self.hurried = True
        self.wake_intake.set()

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

    def is_hopeless(self, mark: FlushMark, deadline_s: float) -> bool:
        """True if the server asked for more time than there is, and nothing is on its way: waiting changes nothing."""
        is_open = self.health.suspended_for is not None or self.health.opens_at() < deadline_s
        return mark.sequence is not None and not self.queue.has_out and not is_open

    @property
    def has_work(self) -> bool:
        """Tell whether something waits that only our threads will bring to an end."""
        return bool(self.submitted or not self.queue.is_empty)


FORKS_RUN_HOOKS: Final = hasattr(os, "register_at_fork") and "uwsgi" not in (*sys.builtin_module_names, *sys.modules)
"""True if every fork runs Python's at-fork hooks. uWSGI forks without them: there the process id must be compared."""

LIVE_DELIVERIES: Final[LiveSet[Any]] = LiveSet()


_exit_handlers: Final[list[Callable[[], None]]] = []
_AFTER_ALL_OTHERS: Final = -100


def at_exit(run: Callable[[], None]) -> None:
    """Have `run` called when the process ends, before what was registered earlier."""
    atexit.register(run)
    _exit_handlers.insert(0, run)


def watch_child_exit() -> None:
    """Have the exit handlers run in a child that `multiprocessing` has forked: there, `atexit` runs none."""
    util: Any = sys.modules.get("multiprocessing.util")
    if util is not None and sys.modules["multiprocessing.process"].parent_process() is not None:
        util.Finalize(None, _at_child_exit, exitpriority=_AFTER_ALL_OTHERS)


def _at_child_exit() -> None:
    for run in _exit_handlers:
        PROCESS_GUARD.run("exit handlers", run)


def _at_exit() -> None:
    # All begin at once and end side by side: ten pipelines take as long as the slowest one.
    deliveries = list(LIVE_DELIVERIES)
    for delivery in deliveries:
        PROCESS_GUARD.run("delivery at exit", delivery.begin_exit)
    for delivery in deliveries:
        PROCESS_GUARD.run("delivery at exit", delivery.finish_exit)


def _in_child() -> None:
    for delivery in LIVE_DELIVERIES:
        PROCESS_GUARD.run("starting again after a fork", delivery.after_fork)


at_exit(_at_exit)
if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_in_child)
