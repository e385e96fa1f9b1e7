"""The one guard between our errors and the application.

Owns: counting and logging of what goes wrong while we run inside somebody else's call.
Threads: any, and finalizers too; it takes no lock that could be held when a finalizer runs.
Never: raises, logs an exception's message, a body, a header, an identity or the application id (messages quote data).
"""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING, Final, TypeVar

from moesif_otel._counters import Counters

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ContainedLogger", "Guard", "get_logger", "place_of"]

_T = TypeVar("_T")


class ContainedLogger:
    """A logger of ours whose calls never raise.

    Filters and handlers are the application's: one that reads Flask's `g` or a `ContextVar` raises on our threads, and
    at exit. `logging` contains what `Handler.emit` raises, but nothing else.
    """

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def log(self, level: int, message: str, *args: object, stacklevel: int = 1) -> None:
        """Log, or count in `PROCESS_GUARD` that it could not be logged."""
        try:
            self._logger.log(level, message, *args, stacklevel=stacklevel + 1)
        except Exception:
            PROCESS_GUARD.count("logging")

    def debug(self, message: str, *args: object) -> None:
        """Log at DEBUG."""
        if self._logger.isEnabledFor(logging.DEBUG):
            self.log(logging.DEBUG, message, *args, stacklevel=2)

    def info(self, message: str, *args: object) -> None:
        """Log at INFO."""
        self.log(logging.INFO, message, *args, stacklevel=2)

    def warning(self, message: str, *args: object) -> None:
        """Log at WARNING."""
        self.log(logging.WARNING, message, *args, stacklevel=2)

    def error(self, message: str, *args: object) -> None:
        """Log at ERROR."""
        self.log(logging.ERROR, message, *args, stacklevel=2)


def get_logger(name: str) -> ContainedLogger:
    """Return the logger of a module of ours: `logging.getLogger` whose calls never raise."""
    return ContainedLogger(name)


_logger: Final = get_logger(__name__)

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

    __slots__ = ("_counts", "_logged")

    def __init__(self) -> None:
        self._counts = Counters()
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
        self._counts.add(kind)

    def run(self, kind: str, function: Callable[..., _T], *args: object) -> _T | None:
        """Call `function(*args)`; give its result, or None when it raised an `Exception`."""
        try:
            return function(*args)
        except Exception as exc:
            self.caught(kind, exc)
            return None

    def counts(self) -> dict[str, int]:
        """Return a copy of the number of errors by kind."""
        return self._counts.read()

    def after_fork(self) -> None:
        """Forget, in a forked child, what the parent counted; a lock held at the fork is replaced."""
        self._counts.reset()


PROCESS_GUARD: Final = Guard()
