"""The ledgers of this process as OpenTelemetry metrics, through the meter provider in use.

The metric reader's thread reads the sums over all pipelines; senders record durations. A pipeline that is gone is not
kept alive (its ledger is, until the next read), and its counts stay in the sums, so that no counter decreases.

Instruments: `moesif.events.accepted`, `.delivered`, `.dropped` (attribute `reason`), `.pending`, `moesif.held_bytes`,
`moesif.export.duration`, `moesif.export.retries`, `moesif.spool.size`. Created once, on the global meter provider: with
the proxy that the API gives before a provider is set, they begin to count where the application sets one later.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from moesif_otel._guard import LATE_IMPORTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.metrics import Meter, MeterProvider

    from moesif_otel._delivery.stats import Ledger

_SCOPE: Final = "moesif_otel"
_COUNTS: Final = ("accepted", "delivered", "retries")
_LEVELS: Final = ("pending", "held_bytes", "spool_bytes")
_DROPPED: Final = "dropped "  # the reason follows


class Instruments:
    """The instruments on one meter provider, and the sum of all ledgers; of a pipeline that is gone, the counts remain.

    Args:
        meter_provider: Where they are made; the global one by default.
    """

    def __init__(self, meter_provider: MeterProvider | None = None) -> None:
        self._lock = threading.Lock()
        self._sources: list[tuple[weakref.ref[Any], Ledger]] = []
        self._gone: Counter[str] = Counter()
        self._pid = os.getpid()
        meter: Meter = metrics.get_meter(_SCOPE, meter_provider=meter_provider)
        counter, level = meter.create_observable_counter, meter.create_observable_up_down_counter
        counter("moesif.events.accepted", [self._of("accepted")], "{event}", "Events taken for delivery")
        counter("moesif.events.delivered", [self._of("delivered")], "{event}", "Events that Moesif took")
        counter("moesif.events.dropped", [self._dropped], "{event}", "Events given up, by reason")
        counter("moesif.export.retries", [self._of("retries")], "{attempt}", "POSTs that have to be repeated")
        level("moesif.events.pending", [self._of("pending")], "{event}", "Events accepted and not settled yet")
        level("moesif.held_bytes", [self._of("held_bytes")], "By", "Captured and prepared bytes in memory")
        level("moesif.spool.size", [self._of("spool_bytes")], "By", "Bytes in the spool directory, when last looked at")
        self._duration = meter.create_histogram("moesif.export.duration", "s", "Duration of one POST")

    def add(self, owner: object, ledger: Ledger) -> Callable[[float], None]:
        """Include a pipeline for as long as `owner` lives; return where to put the seconds of each POST."""
        with self._here():
            self._sources.append((weakref.ref(owner), ledger))
        self._read()  # releases ledgers whose owner is gone, even if no metric reader is configured
        return self._record

    def _record(self, duration_s: float) -> None:
        with LATE_IMPORTS:  # the SDK takes locks in it, which a child that is forked meanwhile would inherit held
            self._duration.record(duration_s)

    def _read(self) -> Counter[str]:
        with self._here():
            total = Counter(self._gone)
            alive = []
            for source in self._sources:
                stats = source[1].snapshot()
                counts = {key: stats[key] for key in _COUNTS}
                counts.update({_DROPPED + reason: n for reason, n in stats["dropped"].items()})
                total.update({**counts, **{key: stats[key] for key in _LEVELS}})
                if source[0]() is None:
                    self._gone.update(counts)
                else:
                    alive.append(source)
            self._sources = alive
            return total

    def _here(self) -> threading.Lock:
        if self._pid != os.getpid():
            # A forked child: its ledgers begin at nothing, and the lock may have been held at the fork.
            self._pid, self._lock, self._gone = os.getpid(), threading.Lock(), Counter()
        return self._lock

    def _of(self, key: str) -> Callable[[CallbackOptions], list[Observation]]:
        return lambda _: [Observation(self._read()[key])]

    def _dropped(self, _: CallbackOptions) -> list[Observation]:
        counts = sorted(self._read().items())
        return [
            Observation(n, {"reason": name.removeprefix(_DROPPED)}) for name, n in counts if name.startswith(_DROPPED)
        ]


_instruments: list[Instruments] = []


def export_metrics(owner: object, ledger: Ledger) -> Callable[[float], None]:
    """Include a pipeline in the metrics of this process, as `Instruments.add` does."""
    with LATE_IMPORTS:  # as above
        if not _instruments:
            _instruments.append(Instruments())
    return _instruments[0].add(owner, ledger)
