"""What tests of events and redaction build their calls from: real Exchanges, real spans, real settings."""

from __future__ import annotations

from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from moesif_otel._capture.body import ByteBudget, CapturedBody
from moesif_otel._capture.exchange import Exchange, Outcome
from moesif_otel._events.build import builder_for
from moesif_otel._events.spans import call_of_span, weight_of_span
from moesif_otel._guard import Guard
from moesif_otel.settings import Settings


class Calls:
    """Makes settings, finished Exchanges and spans; a pipeline as far as an Exchange needs one."""

    def __init__(self) -> None:
        self.settings = Settings(application_id="app-1")
        self.guard = Guard()
        self.budget = ByteBudget(1 << 30)
        self.generation = 0

    def opened(self, exchange: Exchange) -> None:
        """Nothing to note."""

    def finished(self, exchange: Exchange) -> None:
        """Do nothing."""

    finished_late = finished

    @staticmethod
    def options(**options: Any) -> Settings:
        """Settings from options in upper case, validated as users' are."""
        return Settings.of({"APPLICATION_ID": "app-1", **options})

    def body(self, data: bytes, *, kept: int | None = None) -> CapturedBody:
        """A captured body of which at most `kept` bytes were kept."""
        captured = CapturedBody(len(data) if kept is None else kept, self.budget)
        captured.add(data)
        return captured

    def exchange(
        self,
        *,
        direction: str = "Incoming",
        method: str = "POST",
        url: str = "https://api.example.com/v1/users?page=2",
        request_headers: list[tuple[str, str]] | None = None,
        response_headers: list[tuple[str, str]] | None = None,
        request: bytes | None = None,
        response: bytes | None = None,
        request_kept: int | None = None,
        response_kept: int | None = None,
        outcome: Outcome = Outcome.COMPLETE,
        error: BaseException | None = None,
        status: int | None = 200,
        **facts: Any,
    ) -> Exchange:
        """A finished Exchange."""
        exchange = Exchange(self, direction, method)
        exchange.started_ns = 1_730_263_542_914_999_999
        exchange.url = url
        exchange.request_headers = request_headers if request_headers is not None else [("Host", "api.example.com")]
        exchange.response_headers = response_headers if response_headers is not None else []
        if request is not None:
            exchange.request_body = self.body(request, kept=request_kept)
        if response is not None:
            exchange.response_body = self.body(response, kept=response_kept)
        exchange.status = status
        exchange.trace_id, exchange.span_id = 0xABC, 0xDEF
        for name, value in facts.items():
            setattr(exchange, name, value)
        exchange.finish(outcome, error)
        exchange.ended_ns = facts.get("ended_ns", exchange.started_ns + 25_000_000)
        return exchange

    @staticmethod
    def span(
        attributes: dict[str, Any] | None = None,
        *,
        kind: SpanKind = SpanKind.SERVER,
        name: str = "GET",
        state: dict[str, str] | None = None,
        parent: int | None = None,
        parent_state: dict[str, str] | None = None,
        events: tuple[Any, ...] = (),
        links: tuple[Any, ...] = (),
        status: StatusCode = StatusCode.UNSET,
        start_time: int | None = 1_730_263_542_914_000_000,
        end_time: int | None = 1_730_263_543_000_000_000,
    ) -> ReadableSpan:
        """A span that has ended."""

        def context(span_id: int, state: dict[str, str] | None = state) -> SpanContext:
            return SpanContext(
                0x1234,
                span_id,
                is_remote=False,
                trace_flags=TraceFlags(1),
                trace_state=TraceState(list((state or {}).items())),
            )

        return ReadableSpan(
            name=name,
            context=context(0x77),
            parent=None if parent is None else context(parent, parent_state or state),
            attributes=attributes or {},
            events=events,
            links=links,
            kind=kind,
            status=Status(status),
            start_time=start_time,
            end_time=end_time,
        )


def build_event(call: Any, span: Any, settings: Settings, *, parse_bodies: bool) -> dict[str, Any] | None:
    """Build one event as a sink does: of a call, with the span that decorates it, or of a bare span."""
    weight = 1
    if call is None and span is not None:
        call, weight = call_of_span(span, settings), weight_of_span(span)
    elif span is not None:
        call.span = span
    if call is None:
        return None
    return builder_for(settings).build(call, parse_bodies=parse_bodies, weigh=lambda *_: weight)
