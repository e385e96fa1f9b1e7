"""Capture of the calls that a process makes with `requests`, `httpx`, `aiohttp` and, where it is named, `urllib3`.

Starting a capture starts no thread and imports no client; nothing waits for the network but `stop`, `force_flush` and
`shutdown`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesif_otel._capture.callbacks import check_signatures
from moesif_otel._capture.outgoing import CLIENTS, DEFAULT_CLIENTS, Route, add_route, remove_route
from moesif_otel._pipeline.middleware import PipelineHandle, check_tracer_provider
from moesif_otel._pipeline.pipeline import pipeline_for
from moesif_otel.errors import MoesifConfigError
from moesif_otel.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from opentelemetry.trace import TracerProvider
    from typing_extensions import Self

    from moesif_otel._pipeline.pipeline import Pipeline

__all__ = ["OutgoingCapture", "StartCapture", "start_capture_outgoing"]


def start_capture_outgoing(
    settings: Mapping[str, Any] | Settings | None = None,
    *,
    clients: Iterable[str] = DEFAULT_CLIENTS,
    tracer_provider: TracerProvider | None = None,
) -> OutgoingCapture:
    """Capture the calls that this process makes with HTTP clients, from the next one on.

    A client may be imported before or after, and instrumented by OpenTelemetry before, after or not at all. Starting
    twice for one application is harmless: a call is recorded once.

    Args:
        settings: The dict of options that Moesif users know, or a `Settings`; None reads the environment.
            `SKIP_OUTGOING`, `IDENTIFY_*_OUTGOING`, `GET_*_OUTGOING` take `(request, response)`, the client's own
            objects; `response` is None when the call failed.
        clients: Whose calls: any of "requests", "httpx", "aiohttp", and "urllib3", which many SDKs are built on. One
            that is not installed is no error.
        tracer_provider: Names a provider of yours for CLIENT spans of the calls, where no instrumentor makes them. By
            default no spans are made: events carry ids of their own, or those of the spans that others make.

    Returns:
        What stops it, flushes it and tells its counters; keep it or not, capture goes on until `stop`.

    Raises:
        MoesifConfigError: An option is wrong; nothing has been changed or started.

    Thread-safe; may be called before a fork.
    """
    settings = Settings.of(settings)
    clients = _checked(clients)
    check_signatures(settings, ("request", "response"), suffix="_OUTGOING")
    check_tracer_provider(tracer_provider)
    pipeline = pipeline_for(settings, of_processor=True)
    return OutgoingCapture(pipeline, Route(pipeline, clients=clients, tracer_provider=tracer_provider))


def _checked(clients: Iterable[str]) -> tuple[str, ...]:
    known = ", ".join(CLIENTS)
    if isinstance(clients, str):
        raise MoesifConfigError(f"clients: got the string {clients!r}, takes a list of names: {known}")
    try:
        names = tuple(dict.fromkeys(clients))
    except TypeError:
        raise MoesifConfigError(f"clients: got {type(clients).__name__}, takes a list of names: {known}") from None
    for name in names:
        if name not in CLIENTS:
            raise MoesifConfigError(f"clients: got {name!r}, takes a list of names: {known}")
    return names


class OutgoingCapture(PipelineHandle):
    """A running capture of outgoing calls; made by `start_capture_outgoing`. Thread-safe.

    As a context manager it stops at the end of the block.
    """

    def __init__(self, pipeline: Pipeline, route: Route) -> None:
        self._pipeline = pipeline
        pipeline.join(self)
        self._route: Route | None = route
        add_route(route)

    def stop(self, timeout_millis: int | None = None) -> None:
        """Restore the clients, then deliver what is pending. Idempotent.

        Where another library has patched a client after us, its patch is left alone and our layer below it passes
        everything through. Streams that are still being read are recorded as far as they came.

        Args:
            timeout_millis: Return after this time at the latest; `SHUTDOWN_TIMEOUT` by default.
        """
        route, self._route = self._route, None
        if route is not None:
            remove_route(route)
            super().shutdown(timeout_millis)

    def shutdown(self, timeout_millis: int | None = None) -> None:
        """Do what `stop` does, under the name that OpenTelemetry's users expect.

        Args:
            timeout_millis: Return after this time at the latest.
        """
        self.stop(timeout_millis)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class StartCapture:
    """The class of `moesifpythonrequest`: `StartCapture().start_capture_outgoing(options)`."""

    def start_capture_outgoing(self, options: Mapping[str, Any] | Settings) -> OutgoingCapture:
        """Do what the function `start_capture_outgoing` does, with the dict of options."""
        return start_capture_outgoing(options)
