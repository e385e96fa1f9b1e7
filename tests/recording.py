"""A pipeline that keeps finished Exchanges instead of delivering them: for tests of captures."""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Any

from moesif_otel._capture.body import ByteBudget
from moesif_otel._guard import Guard
from moesif_otel.settings import Settings

if TYPE_CHECKING:
    from moesif_otel._capture.exchange import Exchange


class Asked:
    """Asks a function `(exchange, read_ahead) -> Decision | None` in the steps of governance rules."""

    needs_identity = False
    needs_body = True

    def __init__(self, decide: Any, exchange: Exchange) -> None:
        self._decide = decide
        self._exchange = exchange
        self._body: bytes | None = None

    def give_body(self, data: bytes | None, *, whole: bool = True) -> None:
        self._body = data

    def verdict(self) -> Any:
        return self._decide(self._exchange, lambda: self._body)


class RecordingPipeline:
    """Fulfils `capture.exchange.Pipeline`; `calls` holds what was finished, in order."""

    def __init__(self, **options: object) -> None:
        self.settings = Settings.of({"APPLICATION_ID": "recording", **options})
        self.guard = Guard()
        self.budget = ByteBudget(self.settings.event_queue_bytes)
        self.generation = 0
        self.calls: list[Exchange] = []
        self.open: list[Exchange] = []
        self.superseded_calls: list[Exchange] = []
        self.late: queue.SimpleQueue[Exchange] = queue.SimpleQueue()
        self.callbacks_wanted = False
        self.decision: Any = None  # a function (exchange, read_ahead) -> Decision, or none
        self.sees_spans = False

    def opened(self, exchange: Exchange) -> None:
        self.open.append(exchange)

    def has_callbacks(self, exchange: Exchange) -> bool:
        return self.callbacks_wanted

    @property
    def has_rules(self) -> bool:
        return self.decision is not None

    def watch(self, provider: object) -> None:
        pass

    def watch_global_provider(self) -> None:
        pass

    def bind(self, exchange: Exchange, span: object) -> None:
        exchange.span = span  # type: ignore[assignment]

    def answering(self, exchange: Exchange) -> None:
        pass

    def governed(self, exchange: Exchange) -> Asked | None:
        return Asked(self.decision, exchange) if self.decision is not None else None

    def finishing(self, exchange: Exchange) -> Any:
        self.calls.append(exchange)
        yield from ()

    def finished(self, exchange: Exchange) -> None:
        self.calls.append(exchange)

    def finished_late(self, exchange: Exchange) -> None:
        self.late.put(exchange)

    def superseded(self, exchange: Exchange) -> None:
        self.superseded_calls.append(exchange)

    def late_calls(self) -> list[Exchange]:
        """What finalizers finished since the last look."""
        found = []
        while not self.late.empty():
            found.append(self.late.get())
        return found
