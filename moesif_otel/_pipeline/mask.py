"""Running MASK_EVENT_MODEL: the last look at an event before it leaves.

Owns: `EventMask`; what a mask may return and what becomes of the event when it fails.
Threads: the mask runs on one thread of its own, waited for by delivery's intake.
Never: lets an event pass whose mask raised, hung or returned something else; logs an event's data.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any, Final

from moesifapi.models import EventModel
from opentelemetry.instrumentation.utils import suppress_instrumentation

from moesif_otel._delivery.stats import DropReason
from moesif_otel._events.build import MoesifEvent, hide_absent_bodies, show_absent_bodies

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._guard import Guard

__all__ = ["MASK_TIMEOUT_S", "EventMask"]

MASK_TIMEOUT_S: Final = 5.0
"""A mask that takes longer has lost its event; masks are plain functions on one event, microseconds as a rule."""

_MAX_HUNG_THREADS: Final = 4


class MaskHungError(Exception):
    """The mask did not return in time."""


class MaskTypeError(TypeError):
    """The mask returned something that is no event."""


class MaskExitedError(Exception):
    """The mask raised what ends a thread or a process, such as `SystemExit`."""


class EventMask:
    """Applies the user's mask to events, one after the other.

    Args:
        mask: The user's function, or None.
        guard: Takes what it raises.
        timeout_s: How long one call may take.

    `apply` is called by one thread at a time.
    """

    def __init__(self, mask: Callable[..., Any] | None, guard: Guard, *, timeout_s: float = MASK_TIMEOUT_S) -> None:
        self._mask = mask
        self._guard = guard
        self._timeout_s = timeout_s
        self._runner: _Runner | None = None
        self._hung: list[_Runner] = []

    @property
    def given(self) -> bool:
        """Whether there is a mask."""
        return self._mask is not None

    def apply(self, event: MoesifEvent) -> Any:
        """Give the masked event (an `EventModel`), or a `DropReason`: why it must not be sent.

        The mask sees parsed bodies and an absent one as an empty dict, which is left out again afterwards. It may
        change the event or return another one; None skips the event.
        """
        if self._mask is None:
            return event
        show_absent_bodies(event)
        try:
            masked = self._run(event)
            if masked is None:
                return DropReason.MASKED_AWAY
            if not isinstance(masked, EventModel):
                raise MaskTypeError  # noqa: TRY301 - one way out for all that a mask can do wrong
        except Exception as exc:
            self._guard.caught("callback MASK_EVENT_MODEL", exc)
            return DropReason.MASK_FAILED
        hide_absent_bodies(masked)
        if not isinstance(masked, MoesifEvent):
            # A model of moesifapi's own: it has drawn a new id and knows nothing of the trace.
            masked.transaction_id, masked.trace_id, masked.span = event.transaction_id, event.trace_id, event.span
        return masked

    def _run(self, event: MoesifEvent) -> Any:
        runner = self._runner
        if runner is None or not runner.is_usable():
            self._hung = [one for one in self._hung if one.is_busy()]
            if len(self._hung) >= _MAX_HUNG_THREADS:
                raise MaskHungError
            try:
                runner = self._runner = _Runner(self._mask)
            except RuntimeError:
                # Python 3.12+ starts no threads at interpreter shutdown: the last events are masked here.
                return self._mask(event) if self._mask is not None else event
        answer = runner.run(event, self._timeout_s)
        if answer is None:
            self._hung.append(runner)
            self._runner = None
            raise MaskHungError
        result, error = answer
        if error is not None:
            raise error
        return result


class _Runner:
    """A daemon thread that calls the mask; abandoned when it hangs, a thread cannot be stopped."""

    def __init__(self, mask: Callable[..., Any] | None) -> None:
        self._mask = mask
        self._work: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self._busy = False
        self._thread = threading.Thread(target=self._loop, name="moesif-otel-mask", daemon=True)
        self._thread.start()

    def is_usable(self) -> bool:
        """Whether the thread lives: after a fork, or when the mask ended it, it does not."""
        return self._thread.is_alive()

    def is_busy(self) -> bool:
        """Whether the mask is still at work."""
        return self._busy and self._thread.is_alive()

    def run(self, event: MoesifEvent, timeout_s: float) -> tuple[Any, Exception | None] | None:
        """Mask one event; None when it took too long."""
        self._busy = True
        self._work.put(event)
        try:
            return self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self._work.put(None)  # should it ever return, the thread ends
            return None

    def _loop(self) -> None:
        with suppress_instrumentation():
            while (event := self._work.get()) is not None:
                try:
                    answer: tuple[Any, Exception | None] = (self._mask(event) if self._mask else event, None)
                except BaseException as exc:
                    # Beyond this thread it would be printed with its message, or end the intake.
                    error = exc if isinstance(exc, Exception) else MaskExitedError().with_traceback(exc.__traceback__)
                    answer = (None, error)
                    del error
                self._busy = False
                self._answers.put(answer)
                del event, answer
