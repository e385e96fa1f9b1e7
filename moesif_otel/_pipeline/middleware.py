"""The bases of public classes that use a pipeline.

`PipelineHandle` has flush, shutdown and counters; `Middleware`, of which every `MoesifMiddleware` is one, also has
profile calls, the choice of a tracer provider and the capture of outgoing calls.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, TypeVar

from opentelemetry import trace
from opentelemetry.trace import TracerProvider

from moesif_otel._capture.callbacks import check_signatures
from moesif_otel._events.build import transaction_id_for
from moesif_otel._guard import LATE_IMPORTS
from moesif_otel._pipeline.pipeline import pipeline_for
from moesif_otel.client import ProfileCalls
from moesif_otel.errors import MoesifConfigError, install_command

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._capture.exchange import Exchange
    from moesif_otel._capture.outgoing import Route
    from moesif_otel._delivery.stats import Stats
    from moesif_otel._pipeline.pipeline import Pipeline
    from moesif_otel.settings import Settings

_Spans = TypeVar("_Spans")


def check_tracer_provider(given: Any) -> None:
    """Refuse what a user gave as a tracer provider and is none."""
    if given is not None and not isinstance(given, TracerProvider):
        raise MoesifConfigError(f"tracer_provider: got {type(given).__name__}, takes an OpenTelemetry TracerProvider")


class PipelineHandle:
    """Uses a pipeline, which it has joined; the last handle that is shut down ends it.

    Subclasses set `_pipeline`.
    """

    _pipeline: Pipeline

    def force_flush(self, timeout_millis: int = 5_000) -> bool:
        """Deliver every call that has finished. It waits: on an event loop use `asyncio.to_thread`.

        Calls still running (a stream, say) are not waited for; they are delivered after they end.

        Args:
            timeout_millis: Return after this time at the latest.

        Returns:
            True if everything that had finished was delivered or is counted as dropped.
        """
        return self._pipeline.force_flush(timeout_millis / 1_000)

    def shutdown(self, timeout_millis: int | None = None) -> None:
        """Deliver everything; running calls are sent as far as they came (`unfinished`).

        It waits, as `force_flush` does. While others of the same settings use the pipeline, that goes on until the last
        of them is shut down.

        Args:
            timeout_millis: Return after this time at the latest; `SHUTDOWN_TIMEOUT` by default. What could not be
                delivered goes to the spool if there is one, and is counted otherwise.
        """
        self._pipeline.leave(self, None if timeout_millis is None else timeout_millis / 1_000)

    def stats(self) -> Stats:
        """Return the counters: `accepted == delivered + sum(dropped.values()) + pending` at any time."""
        return self._pipeline.stats()


class Middleware(PipelineHandle, ProfileCalls):
    """The base of the middlewares of all frameworks; it knows none of them.

    On a running event loop the profile calls never wait: what they send is queued, as with `wait=False`.

    Args:
        settings: Validated.
        tracer_provider: The user's, or None.

    Raises:
        MoesifConfigError: `tracer_provider` is none.

    Thread-safe. Construction starts nothing.
    """

    settings: Settings
    app: Any = None

    def __init__(self, settings: Settings, tracer_provider: TracerProvider | None) -> None:
        check_tracer_provider(tracer_provider)
        if settings.capture_outgoing_requests:
            check_signatures(settings, ("request", "response"), suffix="_OUTGOING")
        self.settings = settings
        self._explicit_provider = tracer_provider
        self._pipeline = self._find_pipeline()
        self._pipeline.join(self)
        self._is_shut_down = False
        self._spans: dict[str, Any] = {}
        self._profiles, self._profile_guard = self._pipeline.sink.profiles, self._pipeline.sink.guard
        self._route: Route | None = None
        if settings.capture_outgoing_requests:
            from moesif_otel._capture.outgoing import Route, add_route

            self._route = Route(self._pipeline, everywhere=False, tracer_provider=tracer_provider)
            add_route(self._route)

    def _find_pipeline(self) -> Pipeline:
        return pipeline_for(self.settings, of_processor=True)

    def _provider_to_watch(self) -> Any:
        """Choose the tracer provider, and let the pipeline see its spans; None where nobody could see a span.

        The user's, else the global one if it is an SDK provider. To be called at the first request, not at
        construction: applications set their provider up in any order.
        """
        for provider in (self._explicit_provider, trace.get_tracer_provider()):
            if callable(getattr(provider, "add_span_processor", None)):
                self._pipeline.watch(provider)
                return provider
        self._pipeline.awaits_global_provider = True
        return None

    def _resolve_spans(self, load: Callable[[], Callable[..., _Spans]]) -> _Spans | None:
        """Make what makes SERVER spans, at the first call; None where none are to be made. Never raises.

        Args:
            load: Imports the class; called where there is a provider.
        """
        spans: _Spans | None = None
        try:
            provider = self._provider_to_watch()
            if provider is not None:
                with LATE_IMPORTS:  # OpenTelemetry takes locks of its own in making it
                    spans = load()(provider, app=self.app, given=self._explicit_provider is not None)
        except ImportError as exc:  # what WSGI needs is always installed
            self._pipeline.guard.caught(f"SERVER spans ({install_command('asgi')} brings what is missing)", exc)
        except Exception as exc:
            self._pipeline.guard.caught("choosing a tracer provider", exc)
        # No lock (a forked child could inherit it held): of first calls at the same time one wins, atomically.
        return self._spans.setdefault("made", spans)

    def _transaction_id_of(self, exchange: Exchange, incoming: str | None) -> str:
        """Fix the event's id, so that a response header can tell it.

        Args:
            exchange: The call.
            incoming: What the request says that the id should be; counts with `ACCEPT_TRANSACTION_ID` only.
        """
        found = _uuid_text(incoming) if self.settings.accept_transaction_id else None
        if found is None:
            exchange.fix_ids()
            found = transaction_id_for(exchange.trace_id, exchange.span_id, self.settings.application_id)
        exchange.transaction_id = found
        return found

    def shutdown(self, timeout_millis: int | None = None) -> None:
        """Stop capturing and deliver what is pending; the application is served on. It waits, as `force_flush` does.

        Args:
            timeout_millis: Return after this time at the latest; `SHUTDOWN_TIMEOUT` by default.
        """
        self._is_shut_down = True
        self._stop_outgoing()
        super().shutdown(timeout_millis)

    def _stop_outgoing(self) -> None:
        if self._route is not None:
            from moesif_otel._capture.outgoing import remove_route

            remove_route(self._route)


def _uuid_text(text: str | None) -> str | None:
    if not text:
        return None
    text = text.strip()
    try:
        found = str(uuid.UUID(text))
    except ValueError:
        return None
    return text if text.lower() == found else found
