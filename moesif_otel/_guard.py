"""Keeps our errors away from the application: counts and logs what fails while our code runs inside its calls.

Any thread runs it, and finalizers do too: it takes no lock that could be held when a finalizer runs. It never raises,
and never logs an exception's message, a body, a header, an identity or the application id: messages quote data.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from moesif_otel._counters import Counters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_T = TypeVar("_T")

LATE_IMPORTS: Final = threading.RLock()
"""Held by whoever imports a module late, and by whoever forks.

A child that is forked while another thread imports inherits that module's import lock, held for ever, and would wait
for it at its own first call. It is the same with other libraries' locks that nothing renews in a child.
"""

_writing: Final[dict[int, float]] = {}  # threads inside a log line of ours, and since when
_LONGEST_LINE_S: Final = 1.0


def _wait_for_lines() -> None:
    """Wait, before a fork, for other threads' log lines: a child inherits the lock of the stream, held for ever.

    Not by a lock: a handler is the application's, and may wait for the very thread that forks.
    """
    here = threading.get_ident()
    while any(
        thread != here and time.monotonic() - since_s < _LONGEST_LINE_S for thread, since_s in _writing.copy().items()
    ):
        time.sleep(0.001)


if hasattr(os, "register_at_fork"):
    # What is registered first runs last before a fork.
    os.register_at_fork(before=_wait_for_lines, after_in_child=_writing.clear)
    os.register_at_fork(
        before=LATE_IMPORTS.acquire, after_in_parent=LATE_IMPORTS.release, after_in_child=LATE_IMPORTS.release
    )


class ForkSafeLock:
    """A lock that is free in a forked child, whoever held it in the parent: `with lock.current`.

    Reentrant: a signal handler may run our code inside of what its own thread does here.
    """

    __slots__ = ("__weakref__", "current")

    def __init__(self) -> None:
        self.current = threading.RLock()
        _fork_safe_locks.add(self)


class LiveSet(Generic[_T]):
    """A set that keeps nothing alive, and that one thread may go over while others add to it.

    Going over a `WeakSet` raises `RuntimeError` then (before Python 3.14).
    """

    def __init__(self) -> None:
        self._members: weakref.WeakValueDictionary[int, _T] = weakref.WeakValueDictionary()

    def add(self, member: _T) -> None:
        """Add an object."""
        self._members[id(member)] = member

    def discard(self, member: _T) -> None:
        """Remove an object, if it is there."""
        self._members.pop(id(member), None)

    def __iter__(self) -> Iterator[_T]:
        """Go over the objects that were there at the beginning and are alive."""
        for reference in self._members.valuerefs():  # a list, made in one step
            member = reference()
            if member is not None:
                yield member


_fork_safe_locks: Final[LiveSet[ForkSafeLock]] = LiveSet()


def _renew_locks() -> None:
    for lock in _fork_safe_locks:
        lock.current = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


class ContainedLogger:
    """A logger of ours whose calls never raise.

    Filters and handlers belong to the application. One that reads Flask's `g` or a `ContextVar` raises on our threads,
    and at exit. `logging` itself only handles what `Handler.emit` raises.
    """

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def log(self, level: int, message: str, *args: object, stacklevel: int = 1) -> None:
        """Log a message; if that raises, count it in `PROCESS_GUARD`."""
        thread = threading.get_ident()
        try:
            _writing[thread] = time.monotonic()
            self._logger.log(level, message, *args, stacklevel=stacklevel + 1)
        except Exception:
            PROCESS_GUARD.count("logging")
        finally:
            _writing.pop(thread, None)

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
    """Return a logger like that of `logging.getLogger`, whose calls never raise."""
    return ContainedLogger(name)


def show_debug_log() -> None:
    """Make debug lines visible, when a pipeline with `DEBUG` starts.

    If no handler would show the lines of our own logger, it gets one on stderr. The root logger is never touched.
    """
    ours = logging.getLogger("moesif_otel")
    ours.setLevel(logging.DEBUG)
    if not ours.hasHandlers():
        handler = logging.StreamHandler()
        # Silent as soon as the application has a handler that shows our lines, too: it may configure its logging later.
        handler.addFilter(lambda _record: ours.handlers == [handler] and not logging.getLogger().handlers)
        ours.addHandler(handler)


_logger: Final = get_logger(__name__)

# Kinds are a closed vocabulary of ours, but exception types are not: limit what an application can make us remember.
_MAX_KINDS: Final = 1_000


def place_of(exc: BaseException) -> str:
    """Return where an exception was raised, as `file.py:line in function`, without any of its data."""
    last = exc.__traceback__
    if last is None:
        return "unknown place"
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    return f"{code.co_filename.replace(chr(92), '/').rsplit('/', 1)[-1]}:{last.tb_lineno} in {code.co_name}"


class Guard:
    """Counts errors by kind and logs the first of each kind.

    One guard belongs to one pipeline; `PROCESS_GUARD` serves code that runs before a pipeline exists.
    """

    __slots__ = ("_counts", "_logged")

    def __init__(self) -> None:
        self._counts = Counters()
        self._logged: set[tuple[str, type[BaseException] | None]] = set()

    def caught(self, kind: str, exc: BaseException, *, meaning: str = "your application is not affected") -> None:
        """Count an error, and log the first of each kind and exception type.

        Args:
            kind: What failed, in words that users understand; also the key in `stats()["errors"]`.
            exc: The exception; only its type and place are logged.
            meaning: What it means for the user.
        """
        self.count(kind)
        if self._is_first(kind, type(exc)):
            _logger.warning(
                "moesif_otel: %s failed with %s at %s; %s. Further failures of this kind are only counted, in stats()",
                kind,
                type(exc).__qualname__,
                place_of(exc),
                meaning,
            )

    def note(self, kind: str, sentence: str) -> None:
        """Count a problem that is no exception of ours, and log the first of its kind.

        Args:
            kind: As for `caught`.
            sentence: What it means for the user: fixed text and Moesif's ids of rules, no data of a request.
        """
        self.count(kind)
        if self._is_first(kind, None):
            _logger.warning("moesif_otel: %s. Further ones are only counted, in stats()['errors']", sentence)

    def _is_first(self, kind: str, error: type[BaseException] | None) -> bool:
        key = (kind, error)
        if key in self._logged or len(self._logged) > _MAX_KINDS:
            return False
        self._logged.add(key)
        return True

    def count(self, kind: str) -> None:
        """Count an error that is logged elsewhere, or not at all."""
        self._counts.add(kind)

    def run(self, kind: str, function: Callable[..., _T], *args: object) -> _T | None:
        """Call `function(*args)` and return its result, or None if it raised an `Exception`."""
        try:
            return function(*args)
        except Exception as exc:
            self.caught(kind, exc)
            return None

    def counts(self) -> dict[str, int]:
        """Return a copy of the number of errors by kind."""
        return self._counts.read()

    def after_fork(self) -> None:
        """Start from zero in a forked child; a lock that was held at the fork is replaced."""
        self._counts.after_fork()


PROCESS_GUARD: Final = Guard()
