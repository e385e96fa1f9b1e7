"""Capture of calls made with `urllib3` itself: a layer on `HTTPConnectionPool.urlopen`, one event for each hop.

Off unless it is named: what is built on urllib3 (cloud SDKs, search clients, exporters) comes along. What another
client sends through urllib3 is a part of that client's call, and so are the retries for which `urlopen` calls itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from moesif_otel._capture.outgoing import OutgoingCall, begin_call
from moesif_otel._capture.patching import Patch, PatchSet
from moesif_otel._capture.requests.download import watch_download
from moesif_otel._capture.requests.facts import TEXT_ENCODING, is_decoded, text_of, texts_of
from moesif_otel._capture.streams import UploadSink, add_plain, is_plain, stand_in_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moesif_otel._capture.exchange import Headers


class Urllib3Request(NamedTuple):
    """The request as callbacks get it: urllib3 has no object for it."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: Any
    """None for a file or an iterable where the response's body is still to come."""


class Urllib3Response(NamedTuple):
    """The response as callbacks get it: urllib3's own can be read only once."""

    status: int
    headers: Mapping[str, str]
    data: bytes
    """The content, where urllib3 has read it."""


_PARAMETERS: Final = ("method", "url", "body", "headers")
_BODY_AT: Final = 2


def _urlopen(urlopen: Any, pool: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do `HTTPConnectionPool.urlopen` and capture the call."""
    given = {**kwargs, **dict(zip(_PARAMETERS, args, strict=False))}
    headers = pool.headers if given.get("headers") is None else given["headers"]
    method, url = text_of(given.get("method")), _full_url(pool, given.get("url"))
    call = begin_call(_Urllib3Call, method, url, headers)
    if call is None:
        return urlopen(pool, *args, **kwargs)
    call.sends(Urllib3Request(method, call.exchanges[0].url, headers, given.get("body")), _pairs, headers)
    with call:
        stand_in, call.stand_in = call.stand_in, None  # it leads to the call
        if stand_in is not None:
            if len(args) > _BODY_AT:
                args = (*args[:_BODY_AT], stand_in, *args[_BODY_AT + 1 :])
            else:
                kwargs = {**kwargs, "body": stand_in}
        response = urlopen(pool, *args, **kwargs)
    return call.answered(response)


PATCHES: Final = PatchSet([Patch("urllib3.connectionpool", "HTTPConnectionPool.urlopen", _urlopen)])


def _full_url(pool: Any, url: Any) -> str:
    target = text_of(url)
    if not target.startswith("/"):
        return target  # absolute, as a proxy gets it
    host = str(pool.host)  # a pool of somebody's own may have none
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    default = {"http": 80, "https": 443}.get(pool.scheme)
    return f"{pool.scheme}://{host}{'' if pool.port in {None, default} else f':{pool.port}'}{target}"


def _pairs(headers: Any) -> Headers:
    return texts_of(headers.iteritems() if hasattr(headers, "iteritems") else (headers or {}).items())


class _Urllib3Call(OutgoingCall):
    """A hop that `urlopen` makes."""

    __slots__ = ("stand_in",)

    client = "urllib3"

    @staticmethod
    def is_part_of(call: OutgoingCall, *identity: Any) -> bool:
        """Tell that it is: a call of any client that is being sent is sent like this."""
        del call, identity
        return True

    def _see_upload(self) -> None:
        body = self.request.body
        self.stand_in: Any = None
        """The object to be sent in the place of the body."""
        if is_plain(body):
            for captured in self.request_bodies:
                add_plain(captured, body, TEXT_ENCODING)
        elif self.request_bodies:
            self.stand_in = stand_in_for(body, UploadSink(self, text_encoding=TEXT_ENCODING))

    def _note_answer(self, response: Any) -> None:
        self.note_response(response.status, _pairs(response.headers))

    def _awaits_body(self, response: Any) -> bool:
        if isinstance(getattr(response, "_body", None), bytes):
            self.take_body(response._body, decoded=is_decoded(response))
            return False
        request, seen = self.request, self._shown(response)
        if not is_plain(request.body):
            request = request._replace(body=None)  # sent: it is its caller's to keep
        self.set_arguments(request, seen)
        return watch_download(self, response, lambda outcome, error: self.finish(request, seen, outcome, error))

    def _shown(self, response: Any) -> Urllib3Response:
        content = getattr(response, "_body", None)
        content = content if isinstance(content, bytes) else b""
        return Urllib3Response(getattr(response, "status", 0), getattr(response, "headers", {}), content)
