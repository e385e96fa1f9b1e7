"""MASK_EVENT_MODEL: the last look at an event before it leaves.

An event whose mask raised, hung or returned something else is never sent, and nothing of its data is logged.
"""

from __future__ import annotations

import atexit
import logging
import weakref
from typing import TYPE_CHECKING, Any, Final

from moesifapi.models import EventModel

from moesif_otel._delivery.stats import DropReason
from moesif_otel._events.model import MoesifEvent, as_dictionary, hide_absent_bodies, show_absent_bodies
from moesif_otel._guard import PROCESS_GUARD
from moesif_otel._pipeline.bounded import BoundedCalls

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._guard import Guard

__all__ = ["MASK_TIMEOUT_S", "EventMask"]

_logger: Final = logging.getLogger(__name__)

MASK_TIMEOUT_S: Final = 5.0
"""A mask that takes longer has lost its event; masks are plain functions on one event, microseconds as a rule."""


class MaskTypeError(TypeError):
    """The mask returned something that is no event."""


class EventMask:
    """Applies the user's mask to events, one after the other.

    Args:
        mask: The user's function, or a coroutine function.
        guard: Takes what it raises.
        timeout_s: How long one call may take.
    """

    def __init__(self, mask: Callable[..., Any], guard: Guard, *, timeout_s: float = MASK_TIMEOUT_S) -> None:
        self._mask = mask
        self._guard = guard
        # On a thread of its own, or a mask that hangs would stop all delivery: our other threads cannot be spared.
        self._calls = BoundedCalls("moesif-otel-mask", timeout_s)
        self._returned_events = False
        self._returned_none = 0
        _masks.add(self)

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is the mask itself."""
        return self._calls.is_own_thread

    def apply(self, event: dict[str, Any]) -> dict[str, Any] | DropReason:
        """Return the masked event, or why it must not be sent.

        The mask sees parsed bodies and an absent one as an empty dict, which is left out again afterwards. It may
        change the event or return another one; None skips the event.
        """
        model = MoesifEvent(event)
        show_absent_bodies(model)
        try:
            masked = self._calls.run(self._mask, model)
            if masked is None:
                self._note_none()
                return DropReason.MASKED_AWAY
            if not isinstance(masked, EventModel):
                raise MaskTypeError  # noqa: TRY301 - one way out for all that a mask can do wrong
            self._returned_events = True
            hide_absent_bodies(masked)
            if not isinstance(masked, MoesifEvent):
                # A model of moesifapi's own: it has drawn a new id and knows nothing of the trace.
                masked.transaction_id, masked.trace_id, masked.span = model.transaction_id, model.trace_id, model.span
            return as_dictionary(masked)
        except Exception as exc:
            self._guard.caught("callback MASK_EVENT_MODEL", exc)
            return DropReason.MASK_FAILED

    def _note_none(self) -> None:
        self._returned_none += 1
        if self._returned_none == 1:
            _logger.warning(
                "moesif_otel: MASK_EVENT_MODEL returned None, so this event is not sent (counted as %s), nor are "
                "others for which it does; if that is not meant, let the mask return the event",
                DropReason.MASKED_AWAY.value,
            )

    def tell_end(self) -> None:
        """Say, when the pipeline or the process ends, that the mask has let no event pass."""
        if self._returned_none and not self._returned_events:
            _logger.warning(
                "moesif_otel: MASK_EVENT_MODEL returned None for every event (%d), so none was sent; does it lack a "
                "`return event`?",
                self._returned_none,
            )
        _masks.discard(self)


_masks: Final[weakref.WeakSet[EventMask]] = weakref.WeakSet()


def _tell_at_exit() -> None:
    for mask in tuple(_masks):
        PROCESS_GUARD.run("a log line at exit", mask.tell_end)


atexit.register(_tell_at_exit)
