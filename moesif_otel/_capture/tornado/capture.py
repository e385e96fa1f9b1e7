"""Capture of Tornado: requests of the applications that asked for it, from their first byte to their last.

`RequestHandler._execute` is wrapped because it runs in the handler's own task, before any instrumentor's span starts
there: the Exchange is set in that task's context and needs no reset. `find_handler` is wrapped because it is the one
place that knows under which application another one is mounted, and because it runs before the handler's class is
instrumented. Captures start and stop in any thread; the rest runs on event loops. An application that did not ask is
not captured, and neither a client nor a handler sees a difference.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any, Final

from tornado.web import Application, FallbackHandler, GZipContentEncoding, RequestHandler

from moesif_otel._capture import EXCHANGES_KEY
from moesif_otel._capture.authority import QUERY_SAFE, authority_of, is_authority, percent_encoded
from moesif_otel._capture.exchange import Exchange, Outcome, current_exchange
from moesif_otel._capture.patching import Patch, PatchSet
from moesif_otel._capture.tornado.call import ConnectionCall, HandlerCall, TornadoCall
from moesif_otel._capture.tornado.govern import govern
from moesif_otel._capture.tornado.shape import UnknownShape, check_tornado
from moesif_otel._guard import PROCESS_GUARD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tornado.httputil import HTTPServerRequest
    from tornado.web import OutputTransform

    from moesif_otel._capture.exchange import CapturePipeline

CAPTURE_ATTRIBUTE: Final = "_tornado_capture"
"""Attribute in which the owner of a `log_function` method keeps its capture."""

_CALLS: Final = "_moesif_otel_calls"
_CLAIMS: Final = "_moesif_otel_claims"
_CAPTURES: Final = "_moesif_otel_captures"
_REMEMBERED: Final = "_moesif_otel_remembered"

_NANOSECONDS: Final = 1_000_000_000

# A list, and not a `WeakSet`: each request asks whether there are any.
_everywhere: Final[list[weakref.ref[TornadoCapture]]] = []


class TornadoCapture:
    """Captures the requests of the applications whose `log_function` leads to it.

    Args:
        pipeline: Whose calls they are.
        before_first: Called once, before the first request is routed to a handler (resolves the tracer provider).
        everywhere: Also capture applications that did not ask, but for those that ask another capture which delivers
            to the same place (for `instrument` and the zero-code run).

    Thread-safe.
    """

    def __init__(
        self, pipeline: CapturePipeline, *, before_first: Callable[[], None] | None = None, everywhere: bool = False
    ) -> None:
        self.pipeline = pipeline
        self.active = False
        self._is_everywhere = everywhere
        # Whoever pops it runs it; a lock could be held by a thread that a fork left behind.
        self._before_first = [before_first] if before_first is not None else []

    def start(self) -> None:
        """Begin to capture. On a Tornado that we do not know nothing is captured, and the log says so once."""
        try:
            check_tornado()
            _patches.hold(self)
            if self._is_everywhere:
                _everywhere.append(weakref.ref(self, _everywhere.remove))
            self.active = True
        except Exception as exc:
            self.pipeline.guard.caught("capture of this Tornado version", exc)

    def stop(self) -> None:
        """Capture no new requests; those that run are recorded to their end. The last capture restores Tornado."""
        self.active = False
        _everywhere[:] = [one for one in _everywhere if one() is not self]
        _patches.release(self)

    def ready(self) -> None:
        """Do what is to be done once, before the first request."""
        if self._before_first:
            try:
                before_first = self._before_first.pop()
            except IndexError:
                return
            self.pipeline.guard.run("preparing for the first request", before_first)

    def log_event(self, handler: RequestHandler) -> None:
        """Take the end of a request; what Tornado's `log_function` is for. Never raises.

        A handler without an Exchange belongs to an application that reaches this through a function of its own. It is
        recorded as far as it can still be seen, and its application is captured from the next request on.
        """
        try:
            call = _calls_of(handler.request).get(self)
            if call is not None:
                call.logged()
            elif self.active:
                remembered = handler.application.__dict__.setdefault(_REMEMBERED, [])
                if self not in remembered:
                    remembered.append(self)
                key = self.pipeline.settings.pipeline_key
                if not any(capture.pipeline.settings.pipeline_key == key for capture in _calls_of(handler.request)):
                    self._record_late(handler)
        except Exception as exc:
            self._failed("capture of the end of a Tornado request", exc)

    def is_log_function_of(self, handler: Any) -> bool:
        """Tell whether the handler's application calls us itself, and not some function of the user's that does."""
        try:
            return self in _captures_of_function(handler.application)
        except Exception as exc:
            self.pipeline.guard.caught("capture of the end of a Tornado request", exc)
            return False

    def open(self, handler: RequestHandler) -> TornadoCall | None:
        """Open the record of a request; None where there is one, or where something failed. Never raises."""
        try:
            calls = _calls_of(handler.request)
            present = calls.get(self)
            if present is not None:
                present.serve(handler)
                return None
            call = calls[self] = self._new_call(handler)
            return call
        except Exception as exc:
            self._failed("capture of a Tornado request", exc)
            return None

    def _new_call(self, handler: RequestHandler) -> TornadoCall:
        self.ready()
        exchange = open_exchange(self.pipeline, handler)
        call: TornadoCall
        if isinstance(handler, FallbackHandler):
            call = ConnectionCall(exchange, handler)
        else:
            call = HandlerCall(exchange, handler, awaits_log=self in _captures_of_function(handler.application))
        try:
            call.watch(exchange, handler)
        except BaseException:
            call.end_unseen()
            raise
        current_exchange.set(exchange)
        self.pipeline.opened(exchange)
        return call

    def _record_late(self, handler: RequestHandler) -> None:
        exchange = open_exchange(self.pipeline, handler)
        exchange.notes["capture"] = "response_body_not_seen"
        call = HandlerCall(exchange, handler, awaits_log=True)
        exchange.response_body = None
        call.take_request_body(exchange, handler)
        _calls_of(handler.request)[self] = call
        self.pipeline.opened(exchange)
        call.logged()

    def _failed(self, kind: str, exc: Exception) -> None:
        self.pipeline.guard.caught(kind, exc)
        if isinstance(exc, UnknownShape):
            self.active = False


# What an event needs of a request, copied out of it so that the request itself is not kept.


def open_exchange(pipeline: CapturePipeline, handler: RequestHandler) -> Exchange:
    """Make the Exchange of a request and note what is known before the handler runs."""
    request = handler.request
    exchange = Exchange(pipeline, "Incoming", request.method or "GET")
    if exchange.outer is not None and not exchange.outer.is_open:
        # A context inherited from a request that is over (a server started inside a handler): not around this one.
        exchange.outer = None
    elif exchange.outer is not None:
        exchange.same_request = exchange.outer.callback_arguments[:1] == (handler,)
    # The request began when its headers were read; the handler runs when the body is there.
    exchange.started_ns -= max(0, int(request.request_time() * _NANOSECONDS))
    exchange.url = _full_url(request.protocol, request.host, request.uri)
    # Copied now: `WSGIContainer` takes headers out of the request.
    exchange.request_headers = list(request.headers.get_all())
    exchange.has_remote_parent = bool(request.headers.get_list("Traceparent"))
    exchange.peer_address = _peer_address(request)
    exchange.callback_arguments = exchange.identify_arguments = (handler,)
    return exchange


def _peer_address(request: HTTPServerRequest) -> str | None:
    address: Any = request.remote_ip
    # "0.0.0.0" is Tornado's stand-in for the peer of a Unix socket.
    return address if isinstance(address, str) and address not in {"", "0.0.0.0"} else None  # noqa: S104 - compared


def _full_url(protocol: Any, host: Any, uri: Any) -> str:
    target = str(uri or "")
    if not (target.isascii() and target.isprintable()):
        target = percent_encoded(target, QUERY_SAFE)
    # No request target has a fragment: Tornado routes by all of it.
    target = target.replace("#", "%23")
    if not target.startswith("/"):
        scheme, separator, rest = target.partition("://")
        if separator and scheme.lower() in {"http", "https"} and is_authority(rest.partition("/")[0]):
            return target  # absolute form (RFC 9112, 3.2.2), as a client sends it to a proxy
        target = "/" + target  # "OPTIONS *"
    protocol = protocol or "http"
    return f"{protocol}://{authority_of(protocol, str(host or ''))}{target}"


# Which captures capture what.


def _captures_of_function(application: Application) -> tuple[TornadoCapture, ...]:
    """Return the capture that the application's `log_function` is a method of, or none, as a tuple."""
    function = application.settings.get("log_function")
    known: tuple[Any, tuple[TornadoCapture, ...]] | None = application.__dict__.get(_CAPTURES)
    if known is None or known[0] is not function:
        known = application.__dict__[_CAPTURES] = function, _find_captures(function)
    return known[1]


def _find_captures(function: Any) -> tuple[TornadoCapture, ...]:
    while isinstance(function, functools.partial):
        function = function.func
    try:
        # The instance's own attributes only: no property or `__getattr__` of the application's runs.
        owner = function.__self__
        capture = owner if isinstance(owner, TornadoCapture) else vars(owner).get(CAPTURE_ATTRIBUTE)
    except (AttributeError, TypeError):
        return ()
    return (capture,) if isinstance(capture, TornadoCapture) else ()


def _captures_of(application: Application) -> tuple[TornadoCapture, ...]:
    captures = _captures_of_function(application)
    remembered = application.__dict__.get(_REMEMBERED)
    return captures if remembered is None else tuple(dict.fromkeys((*captures, *remembered)))


def _with_everywhere(captures: tuple[TornadoCapture, ...]) -> tuple[TornadoCapture, ...]:
    """Add the captures that capture every application, where none of `captures` delivers to the same place."""
    for reference in tuple(_everywhere):
        capture = reference()
        if capture is not None:
            key = capture.pipeline.settings.pipeline_key
            if not any(one.pipeline.settings.pipeline_key == key for one in captures):
                captures = (*captures, capture)
    return captures


def _calls_of(request: HTTPServerRequest) -> dict[TornadoCapture, TornadoCall]:
    calls: dict[TornadoCapture, TornadoCall] = request.__dict__.setdefault(_CALLS, {})
    return calls


def _present_calls(request: HTTPServerRequest) -> Iterable[TornadoCall]:
    calls: dict[TornadoCapture, TornadoCall] = request.__dict__.get(_CALLS, {})
    return calls.values()


def _opened_calls(handler: RequestHandler) -> list[TornadoCall]:
    """Open the record of a request in each capture that wants it and has none."""
    try:
        captures: tuple[TornadoCapture, ...] | None = handler.request.__dict__.get(_CLAIMS)
        if captures is None:
            captures = _with_everywhere(_captures_of(handler.application))
        return [call for one in captures if one.active and (call := one.open(handler)) is not None]
    except Exception as exc:
        PROCESS_GUARD.caught("capture of a Tornado request", exc)
        return []


# The layers.


def _find_handler(find: Any, application: Application, request: HTTPServerRequest, /, *args: Any, **kwargs: Any) -> Any:
    """Do `Application.find_handler`, and note which captures a request belongs to."""
    try:
        # The innermost application that asked has the say; one that did not is its outer one's.
        captures = _captures_of(application) or request.__dict__.get(_CLAIMS, ())
        if _everywhere:
            captures = _with_everywhere(captures)
        if captures:
            request.__dict__[_CLAIMS] = captures
            for capture in captures:
                if capture.active:
                    capture.ready()
    except Exception as exc:
        PROCESS_GUARD.caught("routing of a Tornado request", exc)
    return find(application, request, *args, **kwargs)


async def _execute(
    execute: Any, handler: RequestHandler, transforms: list[OutputTransform], /, *args: Any, **kwargs: Any
) -> Any:
    """Do `RequestHandler._execute`, in the handler's own task, captured where somebody wants it."""
    calls = _opened_calls(handler)
    for call in calls:
        if call.exchange is not None and call.exchange.pipeline.has_rules:
            govern(call)
        if isinstance(call, HandlerCall):
            transforms = _with_tee(transforms, call)
    try:
        result = await execute(handler, transforms, *args, **kwargs)
    except GeneratorExit:
        raise  # the task was destroyed, perhaps by garbage collection: the call's own finalizer ends it
    except BaseException as exc:
        for call in calls:
            _executed(call, exc)
        raise
    for call in calls:
        if call.handler is not None:
            _executed(call, None)
    return result


def _detach(detach: Any, handler: RequestHandler, /) -> Any:
    """Do `RequestHandler.detach`: the call is over, the connection is not."""
    stream = detach(handler)
    for call in tuple(_present_calls(handler.request)):
        if call.handler is handler:
            call.end(Outcome.DETACHED)
    return stream


def _environ(environ_of: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `WSGIContainer.environ` (static before Tornado 6.3); that of a captured request carries its Exchanges."""
    environ = environ_of(*args, **kwargs)
    try:
        exchanges = tuple(call.exchange for call in _present_calls(args[-1]) if call.exchange is not None)
        if exchanges:
            environ[EXCHANGES_KEY] = (*environ.get(EXCHANGES_KEY, ()), *exchanges)
    except Exception as exc:
        PROCESS_GUARD.caught("capture of a WSGI application in Tornado", exc)
    return environ


def _with_tee(transforms: list[OutputTransform], tee: HandlerCall) -> list[OutputTransform]:
    """Put the tee before compression: what is recorded is what the handler wrote."""
    if not transforms:
        return [tee]
    at = next((i for i, one in enumerate(transforms) if isinstance(one, GZipContentEncoding)), len(transforms))
    return [*transforms[:at], tee, *transforms[at:]]


def _executed(call: TornadoCall, error: BaseException | None) -> None:
    try:
        call.executed(error)
    except Exception as exc:
        call.guard.caught("capture of the end of a Tornado request", exc)
        call.end(Outcome.UNFINISHED)


_patches: Final = PatchSet(
    (
        Patch("tornado.web", "RequestHandler._execute", _execute),
        Patch("tornado.web", "RequestHandler.detach", _detach),
        Patch("tornado.web", "Application.find_handler", _find_handler),
        Patch("tornado.wsgi", "WSGIContainer.environ", _environ),
    )
)
