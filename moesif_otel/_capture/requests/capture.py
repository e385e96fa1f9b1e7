"""Capture of calls made with `requests`: a layer on `Session.send`, one event a call, redirects inside.

What is sent stands fast when `send` returns; a body that is streamed ends the call when it has been read, closed or
dropped. Nothing here makes `requests` send or read anything, and no response is kept alive.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from requests import PreparedRequest, Response

from moesif_otel._capture.exchange import Outcome
from moesif_otel._capture.outgoing import begin_call
from moesif_otel._capture.patching import Patch, PatchSet
from moesif_otel._capture.requests import facts
from moesif_otel._capture.requests.download import watch_download
from moesif_otel._capture.streams import UploadSink, add_plain, is_plain, original_of, stand_in_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moesif_otel._capture.outgoing import OutgoingCall


def _send(send: Any, session: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `Session.send` and capture the call."""
    call, request = None, args[0] if args else kwargs.get("request")
    if isinstance(request, PreparedRequest):
        call = begin_call(
            "requests",
            facts.text_of(request.method),
            facts.text_of(request.url or ""),
            request.headers,
            partial(_is_part, session, request, kwargs.get("allow_redirects")),
        )
    if call is None:
        return send(session, *args, **kwargs)
    _enter(call, session, request)
    try:
        response = send(session, *args, **kwargs)
    except BaseException as exc:
        _failed(call, request, exc)
        raise
    _answered(call, request, response)
    return response


PATCHES: Final = PatchSet([Patch("requests.sessions", "Session.send", _send)])


def _is_part(session: Any, request: Any, allow_redirects: Any, call: OutgoingCall) -> bool:
    """Whether a `send` is a redirect's hop of `call`, or comes from a second layer of ours.

    A hook or an adapter may make calls of its own meanwhile: those are calls like any other.
    """
    if call.client != "requests" or call.identity is None:
        return False
    sending_session, sent = call.identity
    # `Session.resolve_redirects` sends each hop through the same session, as a new request, and follows itself.
    return request is sent or (session is sending_session and allow_redirects is False)


def _enter(call: OutgoingCall, session: Any, request: Any) -> None:
    call.identity = session, request
    for exchange in call.exchanges:
        # Until `send` returns only a capture that stops midway looks.
        exchange.request_headers = partial(facts.request_headers, request)
    call.set_arguments(request, None)
    call.enter()
    try:
        if call.request_bodies and not is_plain(request.body):
            sink = UploadSink(call, facts.body_position(request), facts.TEXT_ENCODING)
            stand_in = stand_in_for(request.body, sink)
            if stand_in is not None:
                request.body = stand_in
                call.has_stand_in = True
    except Exception as exc:
        call.caught("outgoing request body", exc)


def _failed(call: OutgoingCall, request: Any, error: BaseException) -> None:
    """End a call that raised: no response. Never raises."""
    try:
        if call.has_stand_in:
            _put_bodies_back(request, error, getattr(error, "response", None))  # the latter of too many redirects
        last = getattr(error, "request", None)
        request = last if isinstance(last, PreparedRequest) else request
        _note_request(call, request)
    except Exception as exc:
        call.caught("outgoing call that failed", exc)
    call.failed(request, error)


def _answered(call: OutgoingCall, request: Any, response: Any) -> None:
    """Take the response, whose body may still be to come. Never raises."""
    try:
        if call.has_stand_in:
            _put_bodies_back(request, response)
        if not isinstance(response, Response):
            raise TypeError  # noqa: TRY301 - counted below: an adapter or a patch of its own making
        if isinstance(response.request, PreparedRequest):
            request = response.request
        _note_request(call, request)
        call.note_response(
            response.status_code,
            facts.response_headers(response),
            sum(1 for earlier in response.history if earlier.is_redirect) if response.history else 0,
        )
        call.leave()
        if _is_streaming(call, response):
            return
    except Exception as exc:
        call.caught("outgoing response", exc)
        call.leave()
    call.finish(request, response, Outcome.COMPLETE)


def _put_bodies_back(request: Any, *ends: Any) -> None:
    """Put the bodies back for which stand-ins were sent; `ends` are what may lead to requests that carry one."""
    for one in (request, *(found for end in ends for found in _requests_of(end))):
        original = original_of(one.body)
        if original is not one.body:
            one.body = original


def _requests_of(end: Any) -> Iterator[Any]:
    """Find the requests that a response or an exception leads to: a redirect copies the body from one to the next."""
    for one in (end, *(end.history if isinstance(end, Response) else ())):
        request = getattr(one, "request", None)
        if isinstance(request, PreparedRequest):
            yield request


def _note_request(call: OutgoingCall, request: Any) -> None:
    call.note_request(facts.text_of(request.method), facts.text_of(request.url or ""), facts.request_headers(request))
    body = request.body
    if body is None or is_plain(body):
        for captured in call.request_bodies:
            if captured.total_bytes:
                captured.restart()  # what a file gave on an earlier hop is not this request's body
            add_plain(captured, body, facts.TEXT_ENCODING)


def _is_streaming(call: OutgoingCall, response: Response) -> bool:
    """Take the body if it is there, else stand beside it; says whether it is still to come."""
    content = facts.content_of(response)
    if content is not None:
        call.take_body(content, decoded=facts.is_decoded(response.raw))
        return False
    view = _View(call, response)
    if watch_download(call, response.raw, view.finish):
        call.set_arguments(*view.arguments)
        return True
    call.finish(*view.seen(), Outcome.COMPLETE)
    return True


class _View:
    """What callbacks get of a response that its caller reads by himself: all but the body that he has not read.

    Holds neither the response nor what may lead to it (hooks, a body), or it would never be garbage.
    """

    __slots__ = ("_call", "_response", "arguments")

    def __init__(self, call: OutgoingCall, response: Response) -> None:
        self._call = call
        self._response = weakref.ref(response)
        self.arguments: tuple[Any, Any] = (None, None)
        if call.has_callbacks:
            exchange = call.exchanges[0]
            request = facts.request_without_objects(exchange.method, exchange.url, exchange.request_headers)
            self.arguments = (request, facts.response_without_body(request, response))

    def finish(self, outcome: Outcome, error: BaseException | None) -> None:
        """End the call when the body has."""
        self._call.finish(*self.seen(), outcome, error)

    def seen(self) -> tuple[Any, Any]:
        """Return request and response for callbacks; the content is what the caller has read, as far as it is kept."""
        response = self._response()
        if response is None or not self._call.has_callbacks:
            return self.arguments
        bodies = self._call.response_bodies
        content = bodies[0].data() if bodies and bodies[0].left_out is None else b""
        return response.request, facts.response_with_content(response, content)
