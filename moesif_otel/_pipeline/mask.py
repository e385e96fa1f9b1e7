"""MASK_EVENT_MODEL: the last look at an event before it leaves.

The mask is the users' code and may take for ever, so it runs on a thread of its own within a time limit: our other
threads cannot be spared. An event whose mask raised, hung or returned something else is never sent, and nothing of its
data is logged.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import queue
import threading
from typing import TYPE_CHECKING, Any, Final

from moesifapi.models import EventModel
from opentelemetry.instrumentation.utils import suppress_instrumentation

from moesif_otel._delivery.process import at_exit
from moesif_otel._delivery.stats import DropReason
from moesif_otel._events.model import MoesifEvent, as_dictionary, hide_absent_bodies, show_absent_bodies
from moesif_otel._guard import PROCESS_GUARD, LiveSet, get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from moesif_otel._guard import Guard

_logger: Final = get_logger(__name__)

MASK_TIMEOUT_S: Final = 5.0
"""A mask that takes longer has lost its event; masks are plain functions on one event, microseconds as a rule."""

_IDLE_S: Final = 1.0
"""A thread without work ends after this time: a pipeline that is shut down or forgotten leaves none behind."""

_MAX_HUNG_THREADS: Final = 4
_KIND: Final = "callback MASK_EVENT_MODEL"


class MaskHungError(Exception):
    """The mask did not return in time, or too many calls of it before still do not."""


class MaskExitedError(Exception):
    """The mask raised what ends a thread or a process, such as `SystemExit`."""


class EventMask:
    """Applies the user's mask to events, one after the other.

    Fork-safe; for one thread at a time.
    """

    def __init__(self, mask: Callable[..., Any], guard: Guard, *, timeout_s: float = MASK_TIMEOUT_S) -> None:
        self._mask = mask
        self._guard = guard
        self._timeout_s = timeout_s
        self._thread: _MaskThread | None = None
        self._hung: list[_MaskThread] = []
        self._returned_events = False
        self._returned_none = 0
        _masks.add(self)

    @property
    def is_own_thread(self) -> bool:
        """Tell whether the caller is the mask itself."""
        current = threading.current_thread()
        return any(one is not None and one.thread is current for one in (self._thread, *self._hung))

    def apply(self, event: dict[str, Any]) -> dict[str, Any] | DropReason:
        """Return the masked event, or why it must not be sent.

        The mask sees parsed bodies and an absent one as an empty dict, which is left out again afterwards. It may
        change the event or return another one; None skips the event.
        """
        model = MoesifEvent(event)
        show_absent_bodies(model)
        try:
            masked = self._call(model)
            if masked is None:
                self._note_none()
                return DropReason.MASKED_AWAY
            if not isinstance(masked, EventModel):
                self._guard.note(
                    _KIND,
                    f"MASK_EVENT_MODEL returned {type(masked).__name__} instead of the event, so this event is not "
                    f"sent (counted as {DropReason.MASK_FAILED.value}); check that it returns the event",
                )
                return DropReason.MASK_FAILED
            self._returned_events = True
            hide_absent_bodies(masked)
            if not isinstance(masked, MoesifEvent):
                # A model of moesifapi's own: it has drawn a new id and knows nothing of the trace.
                masked.transaction_id, masked.trace_id, masked.span = model.transaction_id, model.trace_id, model.span
            return as_dictionary(masked)
        except Exception as exc:
            self._guard.caught(
                _KIND, exc, meaning=f"this event is not sent (counted as {DropReason.MASK_FAILED.value})"
            )
            return DropReason.MASK_FAILED

    def _call(self, model: MoesifEvent) -> Any:
        thread = self._thread
        if thread is None or not thread.claim():
            self._hung = [one for one in self._hung if one.is_busy]
            if len(self._hung) >= _MAX_HUNG_THREADS:
                raise MaskHungError
            try:
                thread = self._thread = _MaskThread(self._mask, self._timeout_s)
            except RuntimeError:
                # Python 3.12 and later start no threads while the process ends: the last events are masked here.
                masked = self._mask(model)
                return asyncio.run(_awaited(masked, self._timeout_s)) if inspect.isawaitable(masked) else masked
        answer = thread.run(model)
        if answer is None:
            self._thread = None  # not used again: its late answer would be taken for that to the next event
            self._hung.append(thread)
            raise MaskHungError
        masked, error = answer
        if error is None:
            return masked
        try:
            raise error
        finally:
            del answer, error  # its traceback has this frame: the event would live until the garbage collector comes

    def _note_none(self) -> None:
        self._returned_none += 1
        if self._returned_none == 1:
            _logger.warning(
                "moesif_otel: MASK_EVENT_MODEL returned None, so this event is not sent (counted as %s); if you did "
                "not intend that, return the event. Further ones are only counted, in stats()",
                DropReason.MASKED_AWAY.value,
            )

    def tell_end(self) -> None:
        """Say, when the pipeline or the process ends, that the mask has let no event pass."""
        if self._returned_none and not self._returned_events:
            _logger.warning(
                "moesif_otel: MASK_EVENT_MODEL returned None for every event (%d), so none was sent; check that it "
                "ends with `return event`",
                self._returned_none,
            )
        _masks.discard(self)


_masks: Final[LiveSet[EventMask]] = LiveSet()


def _tell_at_exit() -> None:
    for mask in _masks:
        PROCESS_GUARD.run("logging at exit", mask.tell_end)


at_exit(_tell_at_exit)


class _MaskThread:
    """A thread that calls the mask while there is work; made claimed, abandoned when the mask hangs."""

    def __init__(self, mask: Callable[..., Any], timeout_s: float) -> None:
        self._mask = mask
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        # Holds its one entry while the thread is free. `list.pop` is atomic: a caller who gets the entry has the
        # thread to himself, and when the thread itself gets it, it ends.
        self._free: list[bool] = []
        self._events: queue.SimpleQueue[MoesifEvent] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self._run, name="moesif-otel-mask", daemon=True)
        self.thread.start()

    def claim(self) -> bool:
        """Take the thread for one event; False when it is busy, has ended, or is another process's."""
        if self._pid != os.getpid():
            return False
        try:
            return self._free.pop()
        except IndexError:
            return False

    @property
    def is_busy(self) -> bool:
        """Tell whether the mask hangs."""
        return not self._free and self._pid == os.getpid() and self.thread.is_alive()

    def run(self, event: MoesifEvent) -> tuple[Any, Exception | None] | None:
        """Mask one event on the claimed thread; None when it took too long."""
        self._events.put(event)
        try:
            return self._answers.get(timeout=self._timeout_s)
        except queue.Empty:
            return None

    def _run(self) -> None:
        with suppress_instrumentation():
            while True:
                try:
                    event = self._events.get(timeout=_IDLE_S)
                except queue.Empty:
                    if self.claim():
                        break
                    continue
                answer: tuple[Any, Exception | None]
                try:
                    answer = (self._masked(event), None)
                except BaseException as exc:
                    # Past this point it would end the thread, and be printed with its message.
                    error = exc if isinstance(exc, Exception) else MaskExitedError().with_traceback(exc.__traceback__)
                    answer = (None, error)
                    del error
                self._free.append(True)  # before the answer, or its caller finds the thread busy with his next event
                self._answers.put(answer)
                del event, answer
        if self._loop is not None:
            self._loop.close()

    def _masked(self, event: MoesifEvent) -> Any:
        masked = self._mask(event)
        if not inspect.isawaitable(masked):
            return masked
        self._loop = self._loop or asyncio.new_event_loop()
        return self._loop.run_until_complete(_awaited(masked, self._timeout_s))


async def _awaited(masked: Awaitable[Any], timeout_s: float) -> Any:
    return await asyncio.wait_for(masked, timeout_s)
