"""60,000 requests of 8 KB while the server hangs: `python -m tests.faults.memory` prints by how many MB it has grown."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from moesif_otel._capture.body import CapturedBody
from moesif_otel._delivery.client import MoesifTransport
from moesif_otel._delivery.queue import Prepared
from tests.delivery.delivery_kit import Rig, settings
from tests.faults.fault_server import FaultServer, Hang

REQUESTS = 60_000
OVERHEAD_BYTES = 1_000


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def give_back(body: CapturedBody) -> None:
    body._budget.release(body.discard())


def prepare(body: CapturedBody) -> Prepared:
    data = b'{"transaction_id": "%s", "body": "%s"}' % (os.urandom(18).hex().encode(), body.data())
    give_back(body)
    return Prepared(data, len(data))


def grown_mb() -> float:
    with FaultServer(then=Hang()) as server:
        transport = MoesifTransport(settings(base_uri=server.url))
        rig = Rig(transport, base_uri=server.url, prepare=prepare, on_drop=give_back)
        rig.delivery.ensure_started()
        time.sleep(0.2)
        before = resident_mb()
        most = before
        for n in range(REQUESTS):
            body = CapturedBody(100_000, rig.budget)
            body.add(os.urandom(4096).hex().encode())
            rig.budget.charge(OVERHEAD_BYTES)
            if not rig.delivery.submit(body, OVERHEAD_BYTES):
                give_back(body)
            if n % 50 == 0:
                time.sleep(0.0005)  # the other threads' share
                most = max(most, resident_mb())
        rig.delivery.shutdown(0.2)
        assert rig.stats.held_bytes == 0
        assert rig.stats.pending == 0
    return most - before


if __name__ == "__main__":
    print(f"{grown_mb():.1f}", file=sys.stdout)
