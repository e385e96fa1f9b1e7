"""The state of the server as all senders together know it: up, down, or refusing us.

Used under the process state's lock; it has none of its own. While the server is down one sender probes it, and none
sends before `Retry-After` is over.
"""

from __future__ import annotations

from random import SystemRandom
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._delivery.stats import DropReason

_FIRST_BACKOFF_S: Final = 1.0
_MAX_BACKOFF_S: Final = 30.0
_SUSPENSION_S: Final = 60.0
# Of a wait that the server asked for, added at random: pipelines that were refused together come back apart.
_SPREAD: Final = 0.1
_LEAST_SPREAD_S: Final = 1.0
_MAX_DOUBLINGS: Final = 16  # beyond the cap in any case; keeps 2**n a small number
_uniform = SystemRandom().uniform  # leaves the application's `random` alone, and is not shared by forked children


class Permit(NamedTuple):
    """Permission for a sender to send now, or to ask again later, or to drop."""

    wait_s: float | None = 0.0  # before it asks again; 0: send now; None: until the one who probes knows more
    drop: DropReason | None = None  # instead of sending, drop for this reason
    epoch: int = 0  # comes back with the result

    @property
    def go(self) -> bool:
        """Tell whether a batch may be sent now."""
        return self.wait_s == 0.0 and self.drop is None


class ServerHealth:
    """The state of one server, as its answers show it.

    Exponential back-off with full jitter: after the n-th failure in a row a wait between 0 and min(30, 2^(n-1)) s.
    """

    def __init__(self, uniform: Callable[[float, float], float] = _uniform) -> None:
        self._uniform = uniform
        self._failures = 0
        self._backoff_until = 0.0
        self._forbidden_until = 0.0  # `Retry-After` and suspensions: nobody may shorten these
        self.suspended_for: DropReason | None = None  # the reason for which events are dropped now, if they are
        self._probing = False
        # Grows with each change of state: answers to POSTs that left before it say nothing new.
        self._epoch = 0

    @property
    def is_up(self) -> bool:
        """Tell whether the last answer was a good one, or there was none yet."""
        return not self._failures and self.suspended_for is None

    def ask(self, now_s: float) -> Permit:
        """Ask to send one batch; when the server is not up, the first who asks after the wait is the one who probes."""
        if self.is_up:
            return Permit(epoch=self._epoch)
        if self._probing:
            return Permit(wait_s=None)
        open_at = max(self._backoff_until, self._forbidden_until)
        if now_s < open_at:
            return Permit(wait_s=open_at - now_s, drop=self.suspended_for)
        self._probing = True
        return Permit(epoch=self._epoch)

    @property
    def may_ask(self) -> bool:
        """Tell whether nobody is finding out at this moment whether the server is there."""
        return not self._probing

    def opens_at(self) -> float:
        """Return the earliest (monotonic) time of the next POST; 0 when one may go, or is on its way, now."""
        return 0.0 if self.is_up or self._probing else max(self._backoff_until, self._forbidden_until)

    def worked(self, epoch: int) -> bool:
        """Note that the server answered as it should; returns whether that is news."""
        news = not self.is_up
        if news and epoch != self._epoch:
            return False
        self._failures, self.suspended_for, self._probing = 0, None, False
        self._epoch += news
        return news

    def failed(self, epoch: int, now_s: float, retry_after_s: float | None) -> None:
        """Note that there was no answer, or one that says later."""
        if retry_after_s is not None:
            self._forbidden_until = max(self._forbidden_until, now_s + self._spread(retry_after_s))
        if epoch != self._epoch:
            return
        self._epoch += 1
        self._probing, self.suspended_for = False, None
        cap_s = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** min(self._failures, _MAX_DOUBLINGS))
        self._failures += 1
        self._backoff_until = now_s + self._uniform(0.0, cap_s)

    def suspended(self, epoch: int, now_s: float, reason: DropReason, retry_after_s: float | None) -> None:
        """Note that the server refuses all events."""
        if epoch != self._epoch:
            return
        self._epoch += 1
        self._probing, self.suspended_for = False, reason
        self._forbidden_until = now_s + self._spread(max(_SUSPENSION_S, retry_after_s or 0.0))

    def hurry(self) -> None:
        """Let the next probe go at once: somebody flushes. What the server asked for is kept."""
        self._backoff_until = 0.0

    def _spread(self, wait_s: float) -> float:
        return wait_s + self._uniform(0.0, max(_LEAST_SPREAD_S, wait_s * _SPREAD)) if wait_s else 0.0
