"""Callbacks that are coroutines, awaited apart from the call that they belong to: no answer waits for them.

They begin in the application's own `send` of the last message, which must not wait for them: frameworks cancel it when
the client disconnects. So they go on in a task of ours. The call's own task waits for that one after the application
has returned, and the answer has long left: event loops of tests and of AWS Lambda go no further than that.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from typing import TYPE_CHECKING, Any, Final

from moesif_otel._capture.callbacks import await_steps
from moesif_otel._guard import PROCESS_GUARD

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from moesif_otel._capture.exchange import Steps

_PATIENCE_S: Final = 5.0  # the pipeline waits no longer either

_tasks: Final[set[asyncio.Task[None]]] = set()
"""Tasks at work: an event loop keeps only weak references."""


def go_on(steps: Steps) -> Callable[[], Awaitable[Any]] | None:
    """Do steps here and now as far as nothing is to be awaited, and the rest in a task of ours.

    Returns:
        What waits for the rest; None when there is none.
    """
    try:
        awaitable = next(steps)
    except StopIteration:
        return None
    rest = await_steps(steps, awaitable)
    try:
        return _in_asyncio(rest) if asyncio._get_running_loop() is not None else _in_trio(rest)
    except BaseException:
        rest.close()
        steps.close()
        if inspect.iscoroutine(awaitable):
            awaitable.close()
        raise


def _in_asyncio(rest: Any) -> Callable[[], Awaitable[Any]]:
    loop = asyncio.get_running_loop()
    task = loop.create_task(rest)
    _tasks.add(task)
    too_late = loop.call_later(_PATIENCE_S, task.cancel)

    def end(task: asyncio.Task[None]) -> None:
        too_late.cancel()
        _tasks.discard(task)

    task.add_done_callback(end)
    # Not the task itself: who is cancelled while it waits must not cancel it.
    return lambda: asyncio.wait({task})


def _in_trio(rest: Any) -> Callable[[], Awaitable[Any]]:
    trio = sys.modules["trio"]
    done = trio.Event()

    async def run() -> None:
        try:
            with trio.move_on_after(_PATIENCE_S):
                await rest
        except trio.Cancelled:
            raise
        except BaseException as exc:  # out of a system task it would end the whole run
            PROCESS_GUARD.caught("a callback that is awaited", exc)
        finally:
            done.set()

    trio.lowlevel.spawn_system_task(run)
    wait: Callable[[], Awaitable[Any]] = done.wait
    return wait
