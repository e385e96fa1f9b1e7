"""The one guard between our errors and the application.

Owns: counting and logging of what goes wrong while we run inside somebody else's call.
Threads: any, and finalizers too; it takes no lock that could be held when a finalizer runs.
Never: raises, logs an exception's message, a body, a header, an identity or the application id (messages quote data).
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections import deque
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Guard", "place_of"]

_T = TypeVar("_T")
_logger: Final = logging.getLogger(__name__)

# Kinds are a closed vocabulary of ours, but a kind may carry an exception's type name: cap what a hostile
# application could make us remember.
_MAX_KINDS: Final = 1_000


def place_of(exc: BaseException) -> str:
    """Say where an exception was raised as `file.py:line in function`, without any of its data."""
    frames = traceback.extract_tb(exc.__traceback__)
    if not frames:
        return "unknown place"
    last = frames[-1]
    return f"{last.filename.replace(chr(92), '/').rsplit('/', 1)[-1]}:{last.lineno} in {last.name}"


class Guard:
    """Counts errors by kind and logs the first of each kind.

    One guard belongs to one pipeline; `PROCESS_GUARD` serves code that runs before a pipeline exists.
    """

    __slots__ = ("_counts", "_deferred", "_folding", "_logged")

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        # `dict[k] += 1` is not atomic, an append is: counts are folded by whoever reads them.
        self._deferred: deque[str] = deque()
        self._folding = threading.Lock()
        self._logged: set[tuple[str, type[BaseException]]] = set()

    def caught(self, kind: str, exc: BaseException) -> None:
        """Count one error of `kind`; log type and place at the first of this kind and exception type."""
        self.count(kind)
        key = (kind, type(exc))
        if key in self._logged or len(self._logged) > _MAX_KINDS:
            return
        self._logged.add(key)
        _logger.warning(
            "moesif_otel: %s failed with %s at %s; the application is not affected, further ones are counted only",
            kind,
            type(exc).__qualname__,
            place_of(exc),
        )

    def count(self, kind: str) -> None:
        """Count an error that has been told elsewhere, or is told by its number alone."""
        self._deferred.append(kind)
        if len(self._deferred) > _MAX_KINDS:
            self._fold()

    def run(self, kind: str, function: Callable[..., _T], *args: object) -> _T | None:
        """Call `function(*args)`; give its result, or None when it raised an `Exception`."""
        try:
            return function(*args)
        except Exception as exc:
            self.caught(kind, exc)
            return None

    def counts(self) -> dict[str, int]:
        """Give a copy of the number of errors by kind."""
        self._fold()
        return dict(self._counts)

    def _fold(self) -> None:
        # Never blocks: a finalizer that reports an error may interrupt a fold of its own thread.
        if not self._folding.acquire(blocking=False):
            return
        try:
            while self._deferred:
                kind = self._deferred.popleft()
                self._counts[kind] = self._counts.get(kind, 0) + 1
        finally:
            self._folding.release()

    def after_fork(self) -> None:
        """Forget, in a forked child, what the parent counted; a lock held at the fork is replaced."""
        self._folding = threading.Lock()
        self._deferred = deque()
        self._counts = {}


PROCESS_GUARD: Final = Guard()
