"""Decides whether the SERVER span of a call is ours to make, on a provider that the application shares with us.

A SERVER span of ours above that of somebody else's instrumentation would turn that one INTERNAL.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar, Final

from opentelemetry import trace
from opentelemetry.propagate import get_global_textmap

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.trace import TracerProvider

    from moesif_otel._capture.exchange import Exchange

_WRAPPED_APP_ATTRIBUTES: Final = ("wsgi", "app", "application", "wsgi_app", "asgi_app", "__wrapped__")


class ServerSpanChoice:
    """Decides for one application, and learns from its calls.

    None under a valid current span; none where a framework's instrumentation is loaded (that one call brings no span
    may mean an excluded URL); none once a call has brought a SERVER span of its own; and on a provider that nobody gave
    us, none before calls have shown that nobody makes one.

    Args:
        provider: SDK tracer provider.
        app: The application, searched for an OpenTelemetry middleware inside it.
        given: Whether the user named the provider for us, which asks for spans from the first call on.
    """

    __slots__ = ("_app_has_its_own", "_bare_paths", "_certain_sampler", "_make")

    middleware_class: ClassVar[type]
    """OpenTelemetry's middleware of the protocol."""
    instrumentations: ClassVar[tuple[str, ...]]
    """Modules that make the SERVER span of a framework, where they are imported."""

    def __init__(self, provider: TracerProvider, *, app: Any, given: bool) -> None:
        self._certain_sampler = _keeps_every_root(provider)
        self._app_has_its_own = _contains(app, self.middleware_class)
        self._make = given
        self._bare_paths: set[Any] = set()

    def is_ours(self, path: Any) -> bool:
        """Tell whether to start a span for the call that begins.

        Args:
            path: The request's; what is learned from one that brought no span holds for its own path at first.
        """
        return (
            (self._make or path in self._bare_paths)
            and not self._app_has_its_own
            and not trace.get_current_span().get_span_context().is_valid
            and not any(name in sys.modules for name in self.instrumentations)
        )

    def observe(self, exchange: Exchange, path: Any, *, made: bool) -> None:
        """Learn from a finished call whether the application brings a SERVER span of its own.

        One without a span may be a health check that is excluded from tracing, or one that its caller has sampled out:
        only calls that carry no decision of a caller count, and the first ones each for their own path alone.
        """
        if exchange.inner_server_span or (exchange.span is not None and not made):
            self._app_has_its_own = True
        elif not self._make and self._certain_sampler and not made and not _carries_a_trace(exchange):
            self._bare_paths.add(path)
            self._make = len(self._bare_paths) >= _ENOUGH_PATHS


def end_beside_call(error: BaseException | None, step: Callable[..., Any], *arguments: Any) -> None:
    """Take the last step of a middleware that runs beside a call; it may raise the call's own error once more."""
    traceback = None if error is None else error.__traceback__
    try:
        step(*arguments)
    except StopIteration:
        pass
    except BaseException as exc:
        if exc is not error:
            raise
    finally:
        if error is not None:
            # It has gathered frames that the application's log must not show.
            error.__traceback__ = traceback


_ENOUGH_PATHS: Final = 10
_TRACE_HEADERS: Final = frozenset(
    {"traceparent", "b3", "x-b3-sampled", "x-b3-traceid", "uber-trace-id", "x-amzn-trace-id", "x-cloud-trace-context"}
)


def _carries_a_trace(exchange: Exchange) -> bool:
    carriers = _TRACE_HEADERS.union(field.lower() for field in get_global_textmap().fields)
    return any(name.lower() in carriers for name, _value in exchange.request_headers)


def _keeps_every_root(provider: Any) -> bool:
    sampler = getattr(provider, "sampler", None)
    describe = getattr(sampler, "get_description", None)
    text = describe() if callable(describe) else ""
    return str(text).startswith(("AlwaysOnSampler", "ParentBased{root:AlwaysOnSampler"))


def _contains(app: Any, middleware_class: type) -> bool:
    for _ in range(10):
        if isinstance(app, middleware_class):
            return True
        owner = getattr(app, "__self__", app)
        candidates = (_own_attribute(owner, name) for name in _WRAPPED_APP_ATTRIBUTES)
        inner = next((found for found in candidates if callable(found)), None)
        if inner is None:
            return False
        app = inner
    return False


def _own_attribute(owner: Any, name: str) -> Any:
    """Look an attribute up in an object's own `__dict__`: no property or `__getattr__` of the application runs."""
    try:
        return vars(owner).get(name)
    except TypeError:
        return None
