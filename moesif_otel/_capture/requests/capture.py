"""Capture of calls made with `requests`: a layer on `Session.send`, one event a call, redirects inside.

What is sent stands fast when `send` returns; a body that is streamed ends the call when it has been read, closed or
dropped. Nothing here makes `requests` send or read anything, and no response is kept alive.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final

from requests import PreparedRequest, Response

from moesif_otel._capture.exchange import Outcome
from moesif_otel._capture.outgoing import OutgoingCall, begin_call
from moesif_otel._capture.patching import Patch, PatchSet
from moesif_otel._capture.requests import facts
from moesif_otel._capture.requests.download import watch_download
from moesif_otel._capture.streams import UploadSink, add_plain, is_plain, original_of, stand_in_for

if TYPE_CHECKING:
    from collections.abc import Iterator


def _send(send: Any, session: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `Session.send` and capture the call."""
    call: _RequestsCall | None = None
    request: Any = args[0] if args else kwargs.get("request")
    if isinstance(request, PreparedRequest):
        call = begin_call(
            _RequestsCall,
            facts.text_of(request.method),
            facts.text_of(request.url or ""),
            request.headers,
            session,
            request,
            kwargs.get("allow_redirects"),
        )
    if call is None:
        return send(session, *args, **kwargs)
    call.sends(request, facts.request_headers, request)
    with call:
        response = send(session, *args, **kwargs)
    return call.answered(response)


PATCHES: Final = PatchSet([Patch("requests.sessions", "Session.send", _send)])


class _RequestsCall(OutgoingCall):
    """A `Session.send`."""

    __slots__ = ("_has_stand_in",)

    client = "requests"
    has_header = staticmethod(facts.has_header)

    @staticmethod
    def is_part_of(call: OutgoingCall, *identity: Any) -> bool:
        """Tell whether a `send` is a redirect's hop of the call, or comes from a second layer of ours.

        A hook or an adapter may make calls of its own meanwhile: those are calls like any other.
        """
        if not isinstance(call, _RequestsCall):
            return False
        session, request, allow_redirects = identity
        sending_session, sent, _ = call.identity
        # `Session.resolve_redirects` sends each hop through the same session, as a new request, and follows itself.
        return request is sent or (session is sending_session and allow_redirects is False)

    def _see_upload(self) -> None:
        self._has_stand_in = False
        request = self.request
        if is_plain(request.body) or not self.request_bodies:
            return
        sink = UploadSink(self, facts.body_position(request), facts.TEXT_ENCODING)
        stand_in = stand_in_for(request.body, sink)
        if stand_in is not None:
            request.body = stand_in
            self._has_stand_in = True

    def _note_failure(self, error: BaseException) -> None:
        if self._has_stand_in:
            self._put_bodies_back(error, getattr(error, "response", None))  # the latter of too many redirects
        self._note_request(error)

    def _note_answer(self, response: Any) -> None:
        if self._has_stand_in:
            self._put_bodies_back(response)
        if not isinstance(response, Response):
            raise TypeError  # counted: an adapter or a patch of its own making
        self._note_request(response)
        self.note_response(
            response.status_code,
            facts.response_headers(response),
            sum(1 for earlier in response.history if earlier.is_redirect) if response.history else 0,
        )

    def _put_bodies_back(self, *ends: Any) -> None:
        """Put the bodies back for which stand-ins were sent; `ends` are what may lead to requests that carry one."""
        for one in (self.request, *(found for end in ends for found in _requests_of(end))):
            original = original_of(one.body)
            if original is not one.body:
                one.body = original

    def _note_request(self, end: Any) -> None:
        """Note the last request that went out, which a response or an exception leads to."""
        last = getattr(end, "request", None)
        if isinstance(last, PreparedRequest):
            self.request = last
        request = self.request
        self.note_request(
            facts.text_of(request.method), facts.text_of(request.url or ""), facts.request_headers(request)
        )
        body = request.body
        if is_plain(body):
            for captured in self.request_bodies:
                if captured.total_bytes:
                    captured.restart()  # what a file gave on an earlier hop is not this request's body
                add_plain(captured, body, facts.TEXT_ENCODING)

    def _awaits_body(self, response: Response) -> bool:
        content = facts.content_of(response)
        if content is not None:
            self.take_body(content, decoded=facts.is_decoded(response.raw))
            return False
        view = _View(self, response)
        if watch_download(self, response.raw, view.finish):
            self.set_arguments(*view.arguments)
        else:
            self.finish(*view.seen(), Outcome.COMPLETE)
        return True


def _requests_of(end: Any) -> Iterator[Any]:
    """Find the requests that a response or an exception leads to: a redirect copies the body from one to the next."""
    for one in (end, *(end.history if isinstance(end, Response) else ())):
        request = getattr(one, "request", None)
        if isinstance(request, PreparedRequest):
            yield request


class _View:
    """A response that its caller reads, as callbacks get it: without the body that has not been read yet.

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
