"""What the delivery tests are built from: items, a clock that the waits advance, a transport in memory, the law."""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import dataclass, field
from random import Random
from unittest.mock import patch

from moesif_otel._capture.body import ByteBudget
from moesif_otel._delivery.delivery import Delivery
from moesif_otel._delivery.health import ServerHealth
from moesif_otel._delivery.outcome import BatchOutcome, PostAnswer
from moesif_otel._delivery.queue import Prepared
from moesif_otel._delivery.stats import DropReason, Stats
from moesif_otel._guard import Guard
from moesif_otel.settings import Settings

APPLICATION_ID = "planted-application-id-eyJhbGciOiJIUzI1NiJ9.c2VjcmV0"


class FakeClock:
    """Time passes only by waiting; the waits are kept."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.waits: list[float | None] = []
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return 1_800_000_000.0 + self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s

    def wait(self, signal, timeout_s):
        came = signal.wait(0)
        if not came and timeout_s:
            with self._lock:
                self.waits.append(timeout_s)
                self.now_s += timeout_s
        return came


class Longest(Random):
    """Jitter at its upper end."""

    def uniform(self, a, b):
        return b


@dataclass
class MemoryTransport:
    """Takes batches by a rule: a list of answers, then a function of the payloads."""

    script: list = field(default_factory=list)
    then: object = None
    sent: list = field(default_factory=list)
    timeouts: list = field(default_factory=list)
    delivered: list = field(default_factory=list)
    address: str = "Moesif"
    setting: str = "BASE_URI"
    spool_binding: str | None = None
    forks: int = 0
    closed: int = 0

    def send(self, payloads, timeout_s):
        self.sent.append(list(payloads))
        self.timeouts.append(timeout_s)
        answer = self.script.pop(0) if self.script else self.then
        if callable(answer):
            answer = answer(payloads)
        if isinstance(answer, BaseException):
            raise answer
        answer = answer or PostAnswer(BatchOutcome.DELIVERED, 201)
        if answer.outcome is BatchOutcome.DELIVERED:
            self.delivered += payloads
        return answer

    def close(self):
        self.closed += 1

    def after_fork(self):
        self.forks += 1


@contextlib.contextmanager
def no_new_threads():
    """As while a Python 3.12 process ends: flush and shutdown do the work in the caller's thread."""
    with patch.object(threading.Thread, "start", side_effect=RuntimeError("can't create new thread at interpreter shutdown")):
        yield


def settings(**changes) -> Settings:
    return Settings(application_id=APPLICATION_ID, **changes)


def payload(number: int, size_bytes: int = 0) -> bytes:
    event = {"transaction_id": f"{number:036d}", "body": "x" * size_bytes}
    return json.dumps(event).encode()


def without_bodies(data: bytes) -> bytes:
    event = json.loads(data)
    event.pop("body", None)
    return json.dumps(event).encode()


def prepare(item) -> Prepared | DropReason:
    """Numbers become events, drop reasons are themselves, exceptions are raised."""
    if isinstance(item, BaseException):
        raise item
    if isinstance(item, DropReason):
        return item
    data = item if isinstance(item, bytes) else payload(item)
    return Prepared(data, len(data))


class Rig:
    """A delivery with everything it needs, and the law at its end."""

    def __init__(self, transport, *, clock=None, prepare=prepare, without_bodies=without_bodies, random=None, on_drop=None, poll=None, **changes) -> None:
        self.settings = settings(**changes)
        self.guard = Guard()
        self.budget = ByteBudget(self.settings.event_queue_bytes)
        self.transport = transport
        self.clock = clock
        self.delivery = Delivery(
            self.settings,
            prepare=prepare,
            transport=transport,
            without_bodies=without_bodies,
            budget=self.budget,
            guard=self.guard,
            on_drop=on_drop,
            poll=poll,
            clock=clock,
        )
        self.delivery._state.health = ServerHealth((random or Longest()).uniform)
        self.ledger = self.delivery.ledger

    def submit(self, item, held_bytes: int = 10) -> bool:
        self.budget.charge(held_bytes)
        taken = self.delivery.submit(item, held_bytes)
        assert_law(self.ledger.snapshot())
        return taken

    def submit_json(self, payload: bytes) -> bool:
        taken = self.delivery.accept()
        if taken:
            self.delivery.submit_accepted(payload)
        return taken

    @property
    def stats(self) -> Stats:
        stats = self.ledger.snapshot()
        assert_law(stats)
        return stats

    def __enter__(self):
        return self

    def __exit__(self, *exc_info) -> None:
        self.delivery.shutdown(5)
        if exc_info[0] is not None:
            return
        stats = self.stats
        assert stats.pending == 0
        assert stats.held_bytes == 0


def assert_law(stats: Stats) -> None:
    """Accepted is delivered, dropped for a reason, or pending."""
    assert stats["accepted"] == stats["delivered"] + sum(stats["dropped"].values()) + stats["pending"]
    assert stats["pending"] >= 0
    assert all(n > 0 for n in stats["dropped"].values())
    assert set(stats["dropped"]) <= {reason.value for reason in DropReason}
