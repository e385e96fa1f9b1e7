"""Capture of Django's calls: at the wire for the bytes, in the middleware for what Django knows of them.

The wire is where Django's WSGI and ASGI handlers are called: outer middlewares' 304s and compression, streams and
cookies are seen there as the client sees them, and `request.body` is never touched. The middleware finds the call's
Exchange in the request. Test clients have no such handler: their calls are read off request and response.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from types import CellType
from typing import TYPE_CHECKING, Any, Final

from django.core.exceptions import RequestDataTooBig
from django.core.signals import got_request_exception
from django.http import HttpResponse, RawPostDataException
from django.utils.functional import LazyObject

from moesif_otel._capture import EXCHANGES_KEY
from moesif_otel._capture.asgi import scope as asgi_scope
from moesif_otel._capture.asgi.callback_objects import CallbackObjects
from moesif_otel._capture.asgi.capture import AsgiCapture
from moesif_otel._capture.exchange import Exchange, Outcome, current_exchange
from moesif_otel._capture.patching import Patch, PatchSet
from moesif_otel._capture.wsgi import environ
from moesif_otel._capture.wsgi.capture import WsgiCapture
from moesif_otel._guard import PROCESS_GUARD

if TYPE_CHECKING:
    from contextvars import Token

    from moesif_otel._capture.exchange import CapturePipeline, Decision, Governed, Headers

_HANDLER_ATTRIBUTE: Final = "_moesif_otel_capture"
_UNKNOWN: Final[Any] = object()
_LINKS: Final = ("__wrapped__", "get_response", "func", "awaitable")  # what a middleware or adapter calls
_MAX_LINKS: Final = 1_000
_EMPTY_CELL: Final = CellType()


class DjangoCapture:
    """Captures the calls of the handlers whose MIDDLEWARE has a `MoesifMiddleware` of one pipeline."""

    def __init__(self, pipeline: CapturePipeline) -> None:
        self.pipeline = pipeline
        self.wsgi = WsgiCapture(pipeline, governs=False, offer_to_callbacks=_offer_unreached)
        self.asgi = AsgiCapture(pipeline, objects=_UnreachedObjects())

    def meet_handlers(self) -> None:
        """Stand around Django's handlers from now on; each finds out by itself whether its middlewares have ours."""
        PROCESS_GUARD.run("patching Django's request handlers", _handlers.hold, self)
        got_request_exception.connect(_note_exception, dispatch_uid=_note_exception)


def _capture_of(handler: Any) -> DjangoCapture | None:
    """Return what captures a handler's calls; found once, kept on the handler."""
    found: DjangoCapture | None = vars(handler).get(_HANDLER_ATTRIBUTE, _UNKNOWN)
    if found is _UNKNOWN:
        # A handler without middlewares of its own serves static files for `runserver`.
        chain = getattr(handler, "_middleware_chain", None)
        found = PROCESS_GUARD.run("finding MoesifMiddleware in a Django handler", _capture_in, chain)
        vars(handler)[_HANDLER_ATTRIBUTE] = found
    return found


def _capture_in(chain: Any) -> DjangoCapture | None:
    """Find our middleware in a chain of middlewares: objects, closures, asgiref's adapters between sync and async."""
    seen: set[int] = set()
    waiting = [chain]
    while waiting and len(seen) < _MAX_LINKS:
        one = waiting.pop()
        if id(one) in seen or not callable(one) or isinstance(one, type):
            continue
        seen.add(id(one))
        attributes = getattr(one, "__dict__", {})
        if isinstance(attributes.get("capture"), DjangoCapture):
            found: DjangoCapture = attributes["capture"]
            return found
        # The last is looked at first: what Django calls these links, before what a middleware may call its own.
        waiting += attributes.values()
        waiting += [cell.cell_contents for cell in getattr(one, "__closure__", None) or () if cell != _EMPTY_CELL]
        waiting += [attributes[name] for name in _LINKS if name in attributes]
    return None


def _serve_wsgi(call: Any, handler: Any, /, *args: Any, **kwargs: Any) -> Any:
    capture = _capture_of(handler) if len(args) == 2 and not kwargs else None
    if capture is None or not capture.pipeline.is_live:
        return call(handler, *args, **kwargs)
    return capture.wsgi.call(functools.partial(call, handler), *args, callback_app=handler)


async def _serve_asgi(call: Any, handler: Any, /, *args: Any, **kwargs: Any) -> Any:
    capture = _capture_of(handler) if len(args) == 3 and not kwargs else None
    if capture is None or not capture.pipeline.is_live or args[0].get("type") != "http":
        return await call(handler, *args, **kwargs)
    return await capture.asgi.serve(functools.partial(call, handler), *args, governs=False)


_handlers: Final = PatchSet(
    [
        Patch("django.core.handlers.wsgi", "WSGIHandler.__call__", _serve_wsgi),
        Patch("django.core.handlers.asgi", "ASGIHandler.__call__", _serve_asgi),
    ]
)


def _note_exception(**_facts: Any) -> None:
    """Note an exception that Django answers with a 500 (its signal `got_request_exception`)."""
    exchange, kind = current_exchange.get(), sys.exc_info()[0]
    if exchange is not None and exchange.direction == "Incoming" and exchange.is_open and kind is not None:
        exchange.error_type = kind.__qualname__


def _offer_unreached(exchange: Exchange) -> None:
    """Set a request and a bare response for the callbacks, if an outer middleware answered before ours was reached."""
    handler, variables = exchange.callback_arguments
    request = handler.request_class(variables)
    exchange.callback_arguments = exchange.identify_arguments = (request, _bare_response(exchange))


class _UnreachedObjects(CallbackObjects):
    """The same under ASGI."""

    __slots__ = ()

    def request(self, scope: Any, came: dict[str, Any], exchange: Exchange) -> Any:
        """Return Django's request of a scope."""
        from django.core.handlers.asgi import ASGIRequest

        data = exchange.request_body.data() if exchange.request_body is not None else b""
        return ASGIRequest({**scope, **came}, io.BytesIO(data))

    def response(self, headers: Any, exchange: Exchange) -> Any:
        """Return a response without its body."""
        del headers
        return _bare_response(exchange)


def _bare_response(exchange: Exchange) -> HttpResponse:
    return HttpResponse(status=exchange.status or 500, headers=dict(exchange.response_headers))


class DjangoCall:
    """One request as the middleware sees it: a context manager around its answering."""

    __slots__ = ("_is_test_clients", "_pipeline", "_token", "decision", "exchange", "refusal", "request")

    def __init__(self, request: Any, pipeline: CapturePipeline) -> None:
        self.request = request
        self._pipeline = pipeline
        self.decision: Decision | None = None  # whose headers are to be added
        self.refusal: HttpResponse | None = None  # the response where a rule blocks the call
        self._token: Token[Exchange | None] | None = None
        found = _exchange_of(request, pipeline)
        self._is_test_clients = found is None
        self.exchange = _exchange_of_test_client(request, pipeline) if found is None else found
        if not self._is_test_clients:
            # As moesifdjango names them, and as masks index them.
            self.exchange.request_headers = _upper_case(self.exchange.request_headers)

    def __enter__(self) -> None:
        if self._is_test_clients:
            self._token = current_exchange.set(self.exchange)
            self._pipeline.opened(self.exchange)

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if self._token is not None:
            current_exchange.reset(self._token)
            self.exchange.finish(Outcome.COMPLETE if error is None else Outcome.FAILED, error)

    def governed(self) -> Governed | None:
        """Return what is to be asked of the governance rules, or None where there is nothing to ask."""
        exchange = self.exchange
        if exchange.governed:
            return None
        exchange.governed = True
        exchange.callback_arguments = exchange.identify_arguments = (self.request, None)
        return self._pipeline.governed(exchange)

    def body(self) -> tuple[bytes | None, bool]:
        """Read the request body for a rule that looks into it, and say whether it is whole; the view reads it again."""
        length_bytes = _body_length_bytes(self.request)
        if not length_bytes:
            return None, True
        if length_bytes > self._pipeline.settings.request_max_body_size:
            return None, False
        try:
            data: bytes = self.request.body
        except (RawPostDataException, RequestDataTooBig):
            return None, False  # an outer middleware has read it, or Django refuses to
        return data, True

    def answered(self, response: Any) -> None:
        """Note what Django knows once the view has answered; the callbacks come next."""
        exchange = self.exchange
        match = getattr(self.request, "resolver_match", None)
        if match is not None and match.route:
            exchange.notes["route"] = match.route
        if self._is_test_clients:
            _note_test_response(exchange, self.request, response)
        # What the callbacks did not know before the view they are asked again, with the response.
        exchange.identified = False
        exchange.callback_arguments = exchange.identify_arguments = (self.request, response)

    def called_back(self) -> None:
        """Take the identity that Django knows where no callback and no `identify` gave one."""
        exchange = self.exchange
        if not exchange.user_id:
            exchange.note_identity("user_id", _name_of_cached_user(self.request), "request.user")
        # To ask for a session's key neither loads nor marks the session.
        key = getattr(vars(self.request).get("session"), "session_key", None)
        if exchange.session_token is None and isinstance(key, str):
            exchange.note_session_key(key, "Django's session")


def _body_length_bytes(request: Any) -> int:
    """Return the size of the body that the view can read; under WSGI that is what the request announces."""
    if getattr(request, "scope", None) is not None:
        # Received as a whole before; HTTP/2 need not announce its size.
        with contextlib.suppress(OSError):  # a test client's
            stream = request._stream
            position = stream.tell()
            stream.seek(0, io.SEEK_END)
            length_bytes: int = stream.tell()
            stream.seek(position)
            return length_bytes
    length = str(request.META.get("CONTENT_LENGTH") or "")
    return int(length) if length.isdecimal() and length.isascii() else 0


def _exchange_of(request: Any, pipeline: CapturePipeline) -> Exchange | None:
    """Return the Exchange that a capture at the wire opened: ours, or that of a middleware around the application.

    It may be over: the thread of a synchronous middleware goes on when the client has left.
    """
    carrier = getattr(request, "scope", None) or request.META
    present: tuple[Exchange, ...] = carrier.get(EXCHANGES_KEY, ())
    key = pipeline.settings.pipeline_key
    found = [one for one in reversed(present) if one.pipeline.settings.pipeline_key == key]
    return next((one for one in found if one.is_open), found[0] if found else None)


def _exchange_of_test_client(request: Any, pipeline: CapturePipeline) -> Exchange:
    exchange = Exchange(pipeline, "Incoming", request.method or "GET")
    scope = getattr(request, "scope", None)
    if scope is None:
        exchange.url = environ.url_of(request.META)
        headers = environ.headers_of(request.META)
        exchange.peer_address = request.META.get("REMOTE_ADDR") or None
    else:
        pairs = asgi_scope.repeatable(scope.get("headers"))
        exchange.url = asgi_scope.url_of(scope, pairs)
        headers = asgi_scope.text_headers(pairs)
        exchange.peer_address = asgi_scope.peer_address(scope)
    exchange.request_headers = _upper_case(headers)
    exchange.has_remote_parent = "HTTP_TRACEPARENT" in request.META
    return exchange


def _note_test_response(exchange: Exchange, request: Any, response: Any) -> None:
    """Read a test client's call off its request and response; nothing is read that has not been."""
    exchange.status = response.status_code
    headers = [(str(name), str(value)) for name, value in response.items()]
    headers += [("Set-Cookie", morsel.OutputString()) for morsel in response.cookies.values()]
    exchange.response_headers = headers
    if not exchange.pipeline.settings.log_body:
        return
    if isinstance(getattr(request, "_body", None), bytes):
        exchange.capture_request_body().add(request._body)
    if not response.streaming:
        exchange.capture_response_body().add(response.content)


def _upper_case(headers: Headers) -> Headers:
    return [(name.upper(), value) for name, value in headers]


def _name_of_cached_user(request: Any) -> str | None:
    """Return the user's name if the application has looked the user up: to look one up sets `Vary: Cookie`."""
    user = vars(request).get("user")
    if isinstance(user, LazyObject):
        user = vars(request).get("_cached_user") or vars(request).get("_acached_user")
    elif user is None:
        user = vars(request).get("_acached_user")
    if user is None or not user.is_authenticated:
        return None
    return user.get_username() or None
