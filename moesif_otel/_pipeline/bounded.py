"""Running users' functions on threads of ours within a time limit, so that one that hangs stops nothing else."""

from __future__ import annotations

import asyncio
import inspect
import os
import queue
import threading
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.instrumentation.utils import suppress_instrumentation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["BoundedCalls", "CallHungError", "CallQuitError"]

_IDLE_S: Final = 1.0
"""A thread without work ends after this time: a pipeline that is shut down or forgotten leaves none behind."""

_MAX_HUNG_THREADS: Final = 4


class CallHungError(Exception):
    """The function did not return in time."""


class CallQuitError(Exception):
    """The function raised what ends a thread or a process, such as `SystemExit`."""


class BoundedCalls:
    """Calls functions, each within a time limit, on a thread that exists while there is work.

    What a function returns is awaited if it can be, on an event loop of that thread. A thread whose function hangs is
    abandoned, since it cannot be stopped; while four hang, further calls fail at once.

    Args:
        name: Name of the threads.
        timeout_s: How long one call may take.

    Thread-safe and fork-safe.
    """

    def __init__(self, name: str, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._name = name
        self._worker: _Worker | None = None
        self._hung: list[_Worker] = []

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return what `function(*args)` returns.

        Raises:
            CallHungError: It took too long, or too many calls before it still do.
            CallQuitError: It raised `SystemExit` or the like.
            Exception: What it raised.
        """
        worker = self._worker
        if worker is None or not worker.claim():
            self._hung = [one for one in self._hung if one.is_busy]
            if len(self._hung) >= _MAX_HUNG_THREADS:
                raise CallHungError
            try:
                worker = self._worker = _Worker(self._name, self.timeout_s)
            except RuntimeError:
                # Python 3.12 and later start no threads while the process ends: the last calls are made here.
                return _result_of(function, args, None)
        answer = worker.run(function, args)
        if answer is None:
            self._hung.append(worker)
            raise CallHungError
        result, error = answer
        if error is not None:
            raise error
        return result

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is a function that is being run."""
        current = threading.current_thread()
        return any(worker is not None and worker.thread is current for worker in (self._worker, *self._hung))


class _Worker:
    """One thread and the call that it makes; made claimed."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        # Holds its one entry while the thread is free. `list.pop` is atomic: a caller who gets the entry has the
        # thread to himself, and when the thread itself gets it, it ends.
        self._free: list[bool] = []
        self._calls: queue.SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self.thread.start()

    def claim(self) -> bool:
        """Take the thread for one call; False when it is busy, has ended, or is another process's."""
        if self._pid != os.getpid():
            return False
        try:
            return self._free.pop()
        except IndexError:
            return False

    @property
    def is_busy(self) -> bool:
        """Whether a call hangs."""
        return not self._free and self._pid == os.getpid() and self.thread.is_alive()

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Exception | None] | None:
        """Make one call on the claimed thread; None when it took too long."""
        self._calls.put((function, args))
        try:
            return self._answers.get(timeout=self._timeout_s)
        except queue.Empty:
            return None

    def _loop(self) -> None:
        loop: asyncio.AbstractEventLoop | None = None

        def wait_for(awaitable: Awaitable[Any]) -> Any:
            nonlocal loop
            loop = loop or asyncio.new_event_loop()
            return loop.run_until_complete(asyncio.wait_for(awaitable, self._timeout_s))

        with suppress_instrumentation():
            while True:
                try:
                    function, args = self._calls.get(timeout=_IDLE_S)
                except queue.Empty:
                    if self.claim():
                        break
                    continue
                answer: tuple[Any, Exception | None]
                try:
                    answer = (_result_of(function, args, wait_for), None)
                except BaseException as exc:
                    # Past this point it would end the thread, and be printed with its message.
                    error = exc if isinstance(exc, Exception) else CallQuitError().with_traceback(exc.__traceback__)
                    answer = (None, error)
                    del error
                self._answers.put(answer)
                del function, args, answer
                self._free.append(True)
        if loop is not None:
            loop.close()


def _result_of(
    function: Callable[..., Any], args: tuple[Any, ...], wait_for: Callable[[Awaitable[Any]], Any] | None
) -> Any:
    result = function(*args)
    if not inspect.isawaitable(result):
        return result
    return wait_for(result) if wait_for is not None else asyncio.run(_awaited(result))


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
