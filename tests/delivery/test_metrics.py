"""The ledgers as OpenTelemetry metrics."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from moesif_otel._capture.body import ByteBudget
from moesif_otel._delivery.metrics import Instruments
from moesif_otel._delivery.stats import DropReason, Ledger
from moesif_otel._guard import LATE_IMPORTS


class Owner:
    pass


@pytest.fixture
def reader():
    made = InMemoryMetricReader()
    provider = MeterProvider([made])
    yield made, Instruments(provider)
    provider.shutdown()


def read(reader) -> dict:
    data = reader.get_metrics_data()
    found = {}
    for resource in data.resource_metrics if data else []:
        for scope in resource.scope_metrics:
            assert scope.scope.name == "moesif_otel"
            for metric in scope.metrics:
                points = metric.data.data_points
                if metric.name == "moesif.events.dropped":
                    found[metric.name] = {p.attributes["reason"]: p.value for p in points}
                elif metric.name == "moesif.export.duration":
                    found[metric.name] = [p.count for p in points]
                else:
                    (found[metric.name],) = [p.value for p in points]
    return found


def test_a_fork_waits_for_a_measurement(reader, monkeypatch) -> None:
    """The SDK takes locks in it that no forked child renews: there, the next one would be waited for without end."""
    _, instruments = reader
    held = []
    monkeypatch.setattr(instruments._duration, "record", lambda _: held.append(LATE_IMPORTS._is_owned()))
    instruments.add(Owner(), Ledger(budget=ByteBudget(1000)))(0.1)
    assert held == [True]
    assert not LATE_IMPORTS._is_owned()


def test_all_instruments(reader) -> None:
    """Every documented instrument, with its value, in the documented names."""
    metrics, instruments = reader
    budget = ByteBudget(1000)
    ledger, owner = Ledger(budget=budget), Owner()
    record = instruments.add(owner, ledger)
    ledger.accept(10)
    ledger.deliver(4)
    ledger.drop(DropReason.REJECTED, 2)
    ledger.drop(DropReason.SPOOLED, 1)
    ledger.add("retries", 3)
    ledger.add("spool_bytes", 77)
    budget.charge(55)
    record(0.25)
    assert read(metrics) == {
        "moesif.events.accepted": 10,
        "moesif.events.delivered": 4,
        "moesif.events.dropped": {"rejected": 2, "spooled": 1},
        "moesif.events.pending": 3,
        "moesif.held_bytes": 55,
        "moesif.export.retries": 3,
        "moesif.export.duration": [1],
        "moesif.spool.size": 77,
    }


def test_pipelines_are_summed_and_counters_never_go_back(reader) -> None:
    """Two pipelines are one sum; when one is gone its counts stay and its levels go, and it is not kept alive."""
    metrics, instruments = reader
    owners = [Owner(), Owner()]
    for owner in owners:
        ledger = Ledger()
        instruments.add(owner, ledger)
        ledger.accept(5)
        ledger.deliver(3)
        ledger.drop(DropReason.SHUTDOWN)
    assert read(metrics)["moesif.events.accepted"] == 10
    del owners, owner
    gc.collect()
    for _ in range(3):
        found = read(metrics)
        assert found["moesif.events.accepted"] == 10
        assert found["moesif.events.delivered"] == 6
        assert found["moesif.events.dropped"] == {"shutdown": 2}
        assert found["moesif.events.pending"] == 0
    assert instruments._sources == []


def test_no_readers_no_leak() -> None:
    """Where nobody reads metrics, a thousand short-lived pipelines leave nothing behind."""
    instruments = Instruments()
    for _ in range(50):
        instruments.add(Owner(), Ledger())
    gc.collect()
    instruments.add(Owner(), Ledger())
    assert len(instruments._sources) <= 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 on fork and threads
def test_a_child_begins_at_nothing(reader) -> None:
    """A child does not report what pipelines of its parent counted, and no lock of the parent stops it."""
    _, instruments = reader
    ledger = Ledger()
    instruments.add(Owner(), ledger)
    ledger.accept(5)
    ledger.deliver(5)
    instruments._read()
    instruments._lock.acquire()
    pid = os.fork()
    if pid == 0:
        os._exit(instruments._read()["accepted"])
    instruments._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert instruments._read()["accepted"] == 5


def test_provider_that_is_set_later_gets_them() -> None:
    """A delivery that starts before the application sets its meter provider appears in that provider's metrics."""
    code = """
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from tests.delivery.delivery_kit import Rig, MemoryTransport
from tests.delivery.test_metrics import read
rig = Rig(MemoryTransport())
rig.delivery.ensure_started()
reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
for n in range(7):
    rig.submit(n)
assert rig.delivery.force_flush(30)
found = read(reader)
assert found["moesif.events.delivered"] == 7, found
assert found["moesif.export.duration"] == [1], found
rig.delivery.shutdown(5)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
