"""The tap on `requests`: one layer on `Session.send` that serves every pipeline which captures outgoing calls.

Owns: putting the layer on and taking it off, the list of pipelines, which of them get a call.
Threads: any; pipelines come and go under a lock, a call reads a tuple.
Never: adds a header, makes `requests` send or read anything, activates or deactivates an instrumentor, captures
what is sent while OpenTelemetry's instrumentation is suppressed (every exporter's traffic, and ours).
"""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from requests import PreparedRequest
from requests.sessions import Session

from moesif_otel._capture.exchange import chain, current_exchange
from moesif_otel._capture.requests.call import OutgoingCall, is_part_of_a_call
from moesif_otel._capture.requests.facts import to_moesif

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from moesif_otel._capture.exchange import Exchange, Pipeline
    from moesif_otel._capture.requests.span import ClientSpans

__all__ = ["RequestsTap", "Route", "is_instrumented", "requests_tap"]

# Set by `RequestsInstrumentor` on its patch; `uninstrument()` puts `__wrapped__` back wherever it finds the flag.
_INSTRUMENTOR_FLAG: Final = "opentelemetry_instrumentation_requests_applied"


@dataclass(frozen=True, eq=False)
class Route:
    """One registration of a pipeline.

    Args:
        pipeline: Where the calls go.
        everywhere: False for a middleware's pipeline: it does not get calls that were made while an application
            of another pipeline was being served.
        before: Called before each call is captured (looks for the tracer provider).
        spans: Makes spans of the calls, where nobody else does; None makes none.
    """

    pipeline: Pipeline
    everywhere: bool = True
    before: Callable[[], None] | None = None
    spans: ClientSpans | None = None


class RequestsTap:
    """Puts one layer on `Session.send` while at least one pipeline wants calls.

    There is one of these in a process, `requests_tap`. Thread-safe.
    """

    __slots__ = ("_layers", "_lock", "routes")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layers: list[tuple[Any, Any]] = []  # our function, and what it calls
        self.routes: tuple[Route, ...] = ()

    def add(
        self,
        pipeline: Pipeline,
        *,
        everywhere: bool = True,
        before: Callable[[], None] | None = None,
        spans: ClientSpans | None = None,
    ) -> Route:
        """Capture calls for a pipeline, from the next call on; the same pipeline twice counts once.

        Args:
            pipeline: Where the calls go.
            everywhere: See `Route`.
            before: See `Route`.
            spans: See `Route`.

        Returns:
            What `remove` takes.
        """
        with self._lock:
            route = Route(pipeline, everywhere, before, spans)
            self.routes = (*self.routes, route)
            self._put_on()
            return route

    def remove(self, route: Route) -> None:
        """Stop capturing for one registration; with the last one `requests` is as it was. Idempotent."""
        with self._lock:
            self.routes = tuple(r for r in self.routes if r is not route)
            if not self.routes:
                self._take_off()

    def after_fork(self) -> None:
        """Replace, in a forked child, a lock that another thread may have held."""
        self._lock = threading.Lock()

    def _put_on(self) -> None:
        current = _patched()
        if not any(self._is_ours(layer) for layer in _unwrapped(current)):
            Session.send = self._layer(current)  # type: ignore[method-assign]

    def _take_off(self) -> None:
        # Where somebody has patched after us, our layer stays below theirs and passes everything through.
        while self._is_ours(current := _patched()):
            inner = next(inner for layer, inner in self._layers if layer is current)
            self._layers = [one for one in self._layers if one[0] is not current]
            Session.send = inner  # type: ignore[method-assign]

    def _is_ours(self, function: Any) -> bool:
        # By identity: a wrapper of another library (wrapt's) may be equal to what it wraps.
        return any(layer is function for layer, _inner in self._layers)

    def _layer(self, inner: Any) -> Callable[..., Any]:
        @functools.wraps(inner)
        def send(session: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            # Bound as the attribute of a class would be: a patch need not be a plain function.
            proceed = inner.__get__(session, type(session)) if hasattr(inner, "__get__") else inner
            call = self._call_for(session, request, kwargs)
            if call is None:
                return proceed(request, *args, **kwargs)
            try:
                call.enter()
                response = proceed(request, *args, **kwargs)
            except BaseException as exc:
                call.failed(exc)
                raise
            call.answered(response)
            return response

        self._layers.append((send, inner))
        if is_instrumented(inner):
            # `functools.wraps` carried the flag over, so `uninstrument()` will put our `__wrapped__` back: let
            # that be this tap around what was there before the instrumentor.
            send.__wrapped__ = self._layer(inner.__wrapped__)
        return send

    def _call_for(self, session: Any, request: Any, kwargs: dict[str, Any]) -> OutgoingCall | None:
        """Give the call to capture, or None to let it pass. Never raises."""
        routes = self.routes
        if not routes or not isinstance(request, PreparedRequest):
            return None
        try:
            if not is_instrumentation_enabled():
                return None
            if is_part_of_a_call(session, request, kwargs.get("allow_redirects")):
                return None
            chosen = [
                route
                for route in _chosen(routes, current_exchange.get())
                if not to_moesif(request, route.pipeline.settings.base_uri)
            ]
            if not chosen:
                return None
            for route in chosen:
                if route.before is not None:
                    route.pipeline.guard.run("looking for a tracer provider", route.before)
            spans = () if is_instrumented() else [route.spans for route in chosen if route.spans is not None]
            return OutgoingCall([route.pipeline for route in chosen], session, request, spans)
        except Exception as exc:
            routes[0].pipeline.guard.caught("outgoing call", exc)
            return None


def is_instrumented(send: Any = None) -> bool:
    """Whether `RequestsInstrumentor` is active on `Session.send`."""
    patch = _patched() if send is None else send
    return getattr(patch, _INSTRUMENTOR_FLAG, False) is True and hasattr(patch, "__wrapped__")


def _patched() -> Any:
    """Give what stands on the class, unbound by any descriptor."""
    return Session.__dict__["send"]


def _unwrapped(function: Any) -> Iterator[Any]:
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        yield function
        function = getattr(function, "__wrapped__", None)


def _chosen(routes: Sequence[Route], around: Exchange | None) -> list[Route]:
    """Choose one route for each destination: two that deliver to the same application would count a call twice."""
    serving = [exchange.pipeline for exchange in chain(around) if exchange.direction == "Incoming"]
    chosen: dict[tuple[str, str], Route] = {}
    for route in routes:
        is_serving = any(route.pipeline is one for one in serving)
        if serving and not is_serving and not route.everywhere:
            continue
        if is_serving or route.pipeline.settings.pipeline_key not in chosen:
            chosen[route.pipeline.settings.pipeline_key] = route
    return list(chosen.values())


requests_tap: Final = RequestsTap()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=requests_tap.after_fork)
