"""A small program that hands events to a delivery and ends in some way; run in a subprocess by the tests.

    python -m tests.exits.driver URL WAY [SPOOL_DIRECTORY]

It prints its stats as JSON where the way leaves it time to.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

from moesif_otel._delivery.client import MoesifTransport
from tests.delivery.delivery_kit import Rig, settings

EVENTS = 40


def make(url: str, spool: str | None = None, **changes) -> Rig:
    changes = {"event_batch_timeout": 60.0, "batch_size": 25, "shutdown_timeout": 3.0, "spool_directory": spool, **changes}
    return Rig(MoesifTransport(settings(base_uri=url, **changes)), base_uri=url, **changes)


def submit(rig: Rig, start: int, count: int = EVENTS) -> None:
    for n in range(start, start + count):
        rig.submit(n)


def say(rig: Rig) -> None:
    print(json.dumps(rig.ledger.snapshot()), flush=True)


def by_return(rig) -> None:
    submit(rig, 0)


def by_sys_exit(rig) -> None:
    submit(rig, 0)
    sys.exit(3)


def by_exception(rig) -> None:
    submit(rig, 0)
    raise RuntimeError("unhandled")


def by_ctrl_c(rig) -> None:
    submit(rig, 0)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)


def by_sigterm_handler(rig) -> None:
    """As gunicorn's workers do: a handler that exits."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    submit(rig, 0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)


def by_exit_in_thread(rig) -> None:
    """The main thread ends while another one is still at work: the interpreter waits for it first."""

    def late() -> None:
        time.sleep(0.2)
        submit(rig, 0)

    threading.Thread(target=late).start()


def by_return_without_threads(rig) -> None:
    """Nothing has started our threads when the process ends (Python 3.12 starts none then)."""
    rig.delivery.ensure_started = lambda: None
    submit(rig, 0)
    del rig.delivery.ensure_started


def by_flush_and_os_exit(rig) -> None:
    submit(rig, 0)
    flushed = rig.delivery.force_flush(5)
    say(rig)
    os._exit(0 if flushed else 1)


def by_os_exit(rig) -> None:
    submit(rig, 0)
    os._exit(0)


def fork_then_both(rig) -> None:
    """Events before the fork are the parent's; afterwards each has its own."""
    submit(rig, 0)
    pid = os.fork()
    if pid == 0:
        submit(rig, 100)
        rig.delivery.ensure_started()
        sys.exit(0)
    submit(rig, 200)
    rig.delivery.ensure_started()
    assert os.waitpid(pid, 0)[1] == 0


def fork_after_sending(rig) -> None:
    """The parent has sent, with threads and a connection open; children of children send as well."""
    submit(rig, 0)
    assert rig.delivery.force_flush(30)
    for generation in (1, 2, 3):
        pid = os.fork()
        if pid:
            assert os.waitpid(pid, 0)[1] == 0
            return
        submit(rig, generation * 100)
        assert rig.delivery.force_flush(30)
        stats = rig.ledger.snapshot()  # its own books, not its parent's
        assert (stats.accepted, stats.delivered, stats.errors) == (EVENTS, EVENTS, {})


def fork_while_everything_is_locked(rig) -> None:
    """A fork at the worst moment: a worker holds every lock there is."""
    submit(rig, 0)
    rig.delivery.ensure_started()
    state = rig.delivery._state
    held, go_on = threading.Event(), threading.Event()
    locks = [state.lock, state.starting, rig.ledger._lock, rig.budget._lock, rig.guard._counts._lock, rig.delivery._log._lock]

    def hold() -> None:
        for lock in locks:
            lock.acquire()
        held.set()
        go_on.wait(20)
        for lock in reversed(locks):
            lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    pid = os.fork()
    if pid == 0:
        submit(rig, 100)
        rig.delivery.ensure_started()
        ok = rig.delivery.force_flush(5)
        stats = rig.ledger.snapshot()
        ok = ok and stats.accepted == stats.delivered == EVENTS and stats.held_bytes == 0
        rig.delivery.shutdown(5)
        os._exit(0 if ok else 1)
    status = os.waitpid(pid, 0)[1]
    go_on.set()
    thread.join()
    assert status == 0, status


def multiprocessing_fork(rig) -> None:
    """A `multiprocessing` child that flushes by itself."""
    import multiprocessing

    submit(rig, 0)
    rig.delivery.ensure_started()
    child = multiprocessing.get_context("fork").Process(target=work_in_child, args=(rig,))
    child.start()
    child.join()
    assert child.exitcode == 0


def multiprocessing_without_flush(rig) -> None:
    """Child processes that return, or raise, without a thought for what they have not sent."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=end_in_child, args=(rig, start)) for start in (100, 200)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 3]


def end_in_child(rig, start) -> None:
    submit(rig, start)
    rig.delivery.ensure_started()
    if start == 200:
        sys.exit(3)


def work_in_child(rig) -> None:
    submit(rig, 100)
    rig.delivery.ensure_started()
    assert rig.delivery.force_flush(30)


def spool_writer(rig) -> None:
    """Submits for ever with a small queue, so that batches go to disk, until it is killed."""
    rig.delivery.ensure_started()
    start = int(os.environ["DRIVER_START"])
    print("ready", flush=True)
    n = start
    while True:
        if rig.ledger.pending < 38:
            rig.delivery.submit(n, 0)
            n += 1
        else:
            rig.delivery.wake()
            time.sleep(0.0005)
        if n - start >= 100_000:
            break


WAYS = {name: value for name, value in list(globals().items()) if name.startswith(("by_", "fork_", "multiprocessing_", "spool_"))}

if __name__ == "__main__":
    url, way = sys.argv[1:3]
    directory = sys.argv[3] if len(sys.argv) > 3 else None
    small = {"event_queue_size": 40, "batch_size": 10} if way == "spool_writer" else {}
    made = make(url, directory, **small)
    if way not in ("by_return_without_threads", "fork_then_both"):
        made.delivery.ensure_started()
    WAYS[way](made)
