"""Traffic against a server that fails at random, with forks of fate for every batch; then the books are compared.

    python -m tests.faults.soak [SECONDS] [SEED]

By hand: some minutes. The test beside it runs a few seconds. It ends with a line of counts, and fails when
* the law does not hold, in any of the readings taken on the way,
* an event was acknowledged twice, or acknowledged and not counted as delivered,
* an event is neither acknowledged nor counted as dropped.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time

from tests.delivery.delivery_kit import Rig, assert_law, payload, settings
from tests.faults.fault_server import (
    Close,
    Drip,
    FaultServer,
    Garbage,
    HalfBody,
    HalfStatusLine,
    Hang,
    Reset,
    Status,
)


class Jitter(random.Random):
    """A hundredth of the real back-off, so that a short soak has many of them."""

    def uniform(self, a, b):
        return super().uniform(a, b) / 100


def poison(number: int) -> bool:
    return number % 97 == 13


def huge(number: int) -> bool:
    return number % 211 == 7


def judge_with(dice: random.Random):
    """Make a judge: refuses poison, and what is too large; fails at random; never lies."""
    faults = [
        *[Status(201)] * 40,
        Status(503),
        Status(500),
        Status(429, {"Retry-After": "0"}),
        Reset(),
        Close(),
        HalfStatusLine(),
        HalfBody(201),
        HalfBody(503),
        Garbage(),
        Drip(0.01, code=503),  # cut off after its status line a 201 would be one: the server has said so
        Hang(),
    ]

    def judge(request):
        fault = dice.choice(faults)
        if isinstance(fault, Status) and fault.code == 201:
            if len(request.body) > 30_000:
                return Status(413)
            if any(poison(int(i)) for i in request.ids):
                return Status(422)
        elif isinstance(fault, HalfBody) and fault.code == 201 and (
            len(request.body) > 30_000 or any(poison(int(i)) for i in request.ids)
        ):
            return Status(503)
        return fault

    return judge


def soak(seconds: float, seed: int, *, with_spool: bool) -> str:
    """Run, compare, and give the line of counts."""
    from moesif_otel._delivery.client import MoesifTransport

    dice = random.Random(seed)
    directory = tempfile.mkdtemp() if with_spool else None
    changes = {
        "batch_size": 50,
        "event_batch_timeout": 0.05,
        "export_timeout": 0.3,
        "event_queue_size": 400,
        "event_worker_count": 3,
        "spool_directory": directory,
    }
    offered = 0
    with FaultServer(then=judge_with(dice)) as server:
        made = settings(base_uri=server.url, **changes)
        rig = Rig(MoesifTransport(made), base_uri=server.url, random=Jitter(seed), **changes)
        rig.delivery.ensure_started()
        ends_at = time.monotonic() + seconds
        lock = threading.Lock()

        def traffic() -> None:
            nonlocal offered
            while time.monotonic() < ends_at:
                with lock:
                    number, offered = offered, offered + 1
                size = 40_000 if huge(number) else number % 300
                rig.submit(payload(number, size))
                time.sleep(0.004)

        threads = [threading.Thread(target=traffic) for _ in range(3)]
        for thread in threads:
            thread.start()
        while time.monotonic() < ends_at:
            assert_law(rig.ledger.snapshot())
            if dice.random() < 0.1:
                server.refuse()
                time.sleep(dice.random() * 0.3)
                server.listen()
            if dice.random() < 0.1:
                rig.delivery.force_flush(dice.random() * 0.2)
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        server.then = lambda r: Status(422) if any(poison(int(i)) for i in r.ids) else Status(413) if len(r.body) > 30_000 else Status(201)
        while not rig.delivery.force_flush(30):
            pass
        if with_spool:
            while rig.stats.replayed + rig.stats.dropped.get("spool_full", 0) < rig.stats.spooled:
                time.sleep(0.1)
        rig.delivery.shutdown(5)
        stats = rig.stats
        acknowledged = [int(i) for i in server.acknowledged]
    dropped = {reason: n for reason, n in stats.dropped.items() if reason != "spooled"}
    assert len(acknowledged) == len(set(acknowledged)), "acknowledged twice"
    assert stats.delivered == len(acknowledged), (stats, len(acknowledged))
    assert stats.accepted - stats.replayed == offered
    assert len(acknowledged) + sum(dropped.values()) == offered, (stats, offered)
    assert not any(poison(n) for n in acknowledged)
    assert set(dropped) <= {"rejected", "queue_full"}, dropped
    assert stats.held_bytes == 0
    return f"seed {seed}: offered {offered}, delivered {stats.delivered}, dropped {dropped}, retries {stats.retries}, posts {stats.batches}, spooled {stats.spooled}"


if __name__ == "__main__":
    duration = float(sys.argv[1]) if len(sys.argv) > 1 else 120.0
    first_seed = int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    for spooled in (False, True):
        print(soak(duration / 2, first_seed, with_spool=spooled), flush=True)
