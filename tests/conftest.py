"""What all tests share: processes, hypothesis without stop-watches, a look at event loops, calls, and a server to call.

`pytest` alone runs everything, in four processes, since most tests wait for servers and timers; `pytest -n0` or a path
runs in this process.

These machines are noisy, so no example has a deadline and slow drawing is no failure; in CI the examples are the same
in each run, so that a red run tells of the change and not of the dice.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.calls import Calls

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.capture.upstream import Upstream

settings.register_profile(
    "moesif_otel", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("moesif_otel")


_PROCESSES = 4
# Each takes long for its number of tests, so it must not begin last.
_FIRST = (
    "docs/test_first_steps.py",
    "sandbox/test_browser.py",
    "servers/test_wsgi_servers.py",
    "zero_code/",
    "servers/",
    "exits/",
    "faults/",
    "examples/",
    "sandbox/",
)


# A shell starts what runs in its background with SIGINT ignored, and children inherit that: the servers that tests start
# would not hear Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in several processes, each file in one of them."""
    if "PYTEST_XDIST_WORKER" in os.environ or not config.pluginmanager.has_plugin("xdist"):
        return
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.option.numprocesses is None:
        config.option.numprocesses = _PROCESSES
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = item.nodeid.removeprefix("tests/")
        return next((place for place, start in enumerate(_FIRST) if path.startswith(start)), len(_FIRST))

    items.sort(key=place)


class _Loops:
    """Knows every event loop of asyncio that this process has made and that is still in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: weakref.WeakSet[asyncio.BaseEventLoop] = weakref.WeakSet()
        make = asyncio.BaseEventLoop.__init__

        def make_and_note(loop: asyncio.BaseEventLoop) -> None:
            make(loop)
            with self._lock:
                self._made.add(loop)

        asyncio.BaseEventLoop.__init__ = make_and_note

    def left(self) -> list[asyncio.BaseEventLoop]:
        """Return those that neither run nor are closed."""
        with self._lock:
            made = list(self._made)
        # Twisted's reactor, which Daphne's import makes, keeps its own as long as the process lives.
        kept = getattr(sys.modules.get("twisted.internet.reactor"), "_asyncioEventloop", None)
        return [loop for loop in made if not (loop is kept or loop.is_running() or loop.is_closed())]

    def forget(self, loop: asyncio.BaseEventLoop) -> None:
        with self._lock:
            self._made.discard(loop)


_LOOPS = _Loops()
_CLOSING_S = 20  # a server's thread closes its loop a moment after the loop has ended


@pytest.fixture(autouse=True)
def _our_logger() -> Iterator[None]:
    """`DEBUG` makes our lines visible for the whole process: after a test that sets it they are as they were."""
    ours = logging.getLogger("moesif_otel")
    level, handlers = ours.level, tuple(ours.handlers)
    yield
    ours.setLevel(level)
    ours.handlers[:] = handlers


@pytest.fixture(autouse=True)
def _every_loop_is_closed() -> Iterator[None]:
    """Fail the test that leaves an event loop open: it would be a warning in whichever test collects garbage next."""
    yield
    end_s = time.monotonic() + _CLOSING_S
    while (left := _LOOPS.left()) and time.monotonic() < end_s:
        time.sleep(0.01)
    for loop in left:
        _LOOPS.forget(loop)
        loop.close()
    assert not left, "this test leaves an event loop that is not closed"


@pytest.fixture(scope="session")
def calls() -> Calls:
    """Maker of calls; holds nothing between tests."""
    return Calls()


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    """A server that outgoing calls go to."""
    from tests.capture.upstream import Upstream

    with Upstream() as server:
        yield server
