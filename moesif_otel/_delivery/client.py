"""The Moesif server, through `moesifapi`: the one module of this package that knows that client.

Owns: `MoesifTransport`: batches of events, profile calls, configuration and rules.
Threads: senders, whoever makes profile calls, the poller of `remote/`; one connection pool serves them all.
Never: retries (the senders do); logs a body or a header; obeys or changes `moesifapi`'s process-wide `Configuration`.
"""

from __future__ import annotations

import hashlib
import importlib
import time
import zlib
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit, urlunsplit

from moesifapi.controllers.api_controller import ApiController
from moesifapi.exceptions.api_exception import APIException
from moesifapi.http.http_client import HttpClient
from moesifapi.http.http_method_enum import HttpMethodEnum
from moesifapi.http.http_request import HttpRequest
from moesifapi.http.http_response import HttpResponse
from opentelemetry.instrumentation.utils import suppress_instrumentation
from requests import RequestException
from urllib3.exceptions import HTTPError

from moesif_otel._delivery.connection import CONNECT_TIMEOUT_S, deadline, new_session
from moesif_otel._delivery.outcome import Answer, Outcome, outcome_of_status, retry_after_seconds
from moesif_otel._delivery.report import describe
from moesif_otel._guard import PROCESS_GUARD

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import requests

    from moesif_otel.settings import Settings

__all__ = ["MoesifTransport", "gzipped"]

_EVENTS_BATCH: Final = "/v1/events/batch"
_JSON: Final = "application/json; charset=utf-8"
_GZIP: Final = 31  # `wbits` of zlib for a gzip container (RFC 1952)
_LIGHT: Final = 1
_LEAST_GZIP_BYTES: Final = 512  # below, the container costs more than it saves
# Answers to events are a few bytes. A little more is read so that the connection can be used again; a body that is
# longer costs the connection instead of our time.
_MAX_ANSWER_BYTES: Final = 64 * 1024
_ANSWER_BODY_S: Final = 1.0
_MAX_CONFIG_BYTES: Final = 16 * 1024 * 1024
# `requests`' and urllib3's exceptions, the system's, and ValueError for an address or a line that is none.
_NO_ANSWER: Final = (RequestException, HTTPError, OSError, ValueError)


def _version() -> str:
    try:
        return metadata.version("moesif-otel")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "0"


def _compressor_module() -> Any:
    try:  # the same format, several times as fast
        return importlib.import_module("zlib_ng.zlib_ng")
    except ImportError:
        return zlib


_USER_AGENT: Final = f"moesif-otel/{_version()}"
_zlib: Final = _compressor_module()


def gzipped(data: bytes) -> bytes:
    """Compress lightly into a gzip container."""
    compressor = _zlib.compressobj(_LIGHT, zlib.DEFLATED, _GZIP)
    compressed: bytes = compressor.compress(data) + compressor.flush()
    return compressed


class _Client:
    """The connections of one pipeline to its own server, with its own application id."""

    def __init__(self, settings: Settings) -> None:
        self._application_id = settings.application_id
        self._base_uri, self._credentials = _without_credentials(settings.base_uri.rstrip("/"))
        # Senders, one for profile calls, one for the poller.
        self._connections = settings.event_worker_count + 2
        self._session: requests.Session | None = None
        self._abandoned: list[requests.Session] = []

    def call(self, request: HttpRequest, timeout_s: float, max_answer_bytes: int) -> HttpResponse:
        """Make one attempt; any status is an answer."""
        wants_body = max_answer_bytes > _MAX_ANSWER_BYTES
        with suppress_instrumentation(), deadline(timeout_s):
            response = self._open_session().request(
                request.http_method,
                self._base_uri + request.query_url[request.query_url.rindex("/v1/") :],
                headers={
                    **(request.headers or {}),
                    "X-Moesif-Application-Id": self._application_id,
                    "User-Agent": _USER_AGENT,
                },
                data=request.parameters,
                timeout=(min(CONNECT_TIMEOUT_S, timeout_s), timeout_s),
                allow_redirects=False,
                stream=True,
            )
            try:
                with deadline(timeout_s if wants_body else _ANSWER_BODY_S):
                    body = response.raw.read(max_answer_bytes + 1, decode_content=wants_body)
            except (HTTPError, OSError):
                if wants_body:
                    raise
                body = b""  # of an answer to events the status says it all
            finally:
                response.close()
        return HttpResponse(response.status_code, response.headers, body)

    def _open_session(self) -> requests.Session:
        session = self._session
        if session is None:
            # Two threads may make one each; the one that is not kept closes with its last answer.
            session = self._session = new_session(self._connections, self._credentials)
        return session

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def after_fork(self) -> None:
        # Not closed: its sockets are the parent's. Not let go of either, since collecting it would close them.
        if self._session is not None:
            self._abandoned.append(self._session)
            self._session = None


def _without_credentials(base_uri: str) -> tuple[str, tuple[str, str] | None]:
    parts = urlsplit(base_uri)
    if parts.username is None:
        return base_uri, None
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return bare, (unquote(parts.username), unquote(parts.password or ""))


class _Attempt(HttpClient):  # type: ignore[misc]
    """What is injected into `ApiController`: one attempt within a deadline, whose answer it keeps.

    `ApiController` builds address and application id from `moesifapi`'s process-wide `Configuration`, which another
    pipeline, or the application itself, may set to anything: `_Client` writes both anew.
    """

    def __init__(self, client: _Client, timeout_s: float, max_answer_bytes: int = _MAX_ANSWER_BYTES) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._max_answer_bytes = max_answer_bytes
        self.tried = False
        self.response: HttpResponse | None = None

    def execute_as_string(self, request: HttpRequest) -> HttpResponse:
        """Make the attempt."""
        self.tried = True
        self.response = self._client.call(request, self._timeout_s, self._max_answer_bytes)
        return self.response


class _Controller(ApiController):  # type: ignore[misc]
    """`moesifapi`'s calls, with ready-made JSON for a body and without its logging of bodies."""

    @classmethod
    def generate_post_payload(cls, body: Sequence[bytes], headers: dict[str, str]) -> tuple[bytes, dict[str, str]]:
        """Join the events of a batch, each of which is JSON already, into one array, and compress it."""
        headers["Content-Encoding"] = "gzip"
        return gzipped(b"[" + b",".join(body) + b"]"), headers

    def validate_response(self, context: Any) -> None:
        """Raise `APIException` unless the status is a success; the original logs headers and body of the answer."""
        if not 200 <= context.response.status_code < 300:
            raise APIException("Moesif did not take it", context)


class MoesifTransport:
    """Sends to one Moesif server under one application id.

    Args:
        settings: `APPLICATION_ID`, `BASE_URI` and `EVENT_WORKER_COUNT` are used.
        on_tags: Told `X-Moesif-Config-ETag` and `X-Moesif-Rules-Tag` of each answer to events that carries one.

    Thread-safe. Every call is suppressed for instrumentations and lasts at most its timeout as a whole; connecting,
    at most 3 s for each address of the host.
    """

    def __init__(self, settings: Settings, *, on_tags: Callable[[str | None, str | None], None] | None = None) -> None:
        self._client = _Client(settings)
        self._on_tags = on_tags
        # Names this destination on disk without giving the application id away (it is long and random).
        destination = f"moesif-otel spool\0{settings.application_id}\0{settings.base_uri}"
        self.spool_binding: Final = hashlib.sha256(destination.encode()).hexdigest()[:32]

    def send(self, payloads: Sequence[bytes], timeout_s: float) -> Answer:
        """Make one attempt to deliver a batch of events.

        Args:
            payloads: The events, each as JSON.
            timeout_s: Most seconds it takes.

        Returns:
            What came of it; never raises for anything the network or the server does.
        """
        attempt = _Attempt(self._client, timeout_s)
        try:
            _Controller(attempt).create_events_batch(payloads)
        except APIException:
            pass  # the answer is kept
        except _NO_ANSWER as exc:
            if attempt.tried:
                return Answer(Outcome.RETRY, detail=describe(exc))
            # `Configuration.BASE_URI` is no address: the application's affair, not ours.
            return self.post_json(_EVENTS_BATCH, b"[" + b",".join(payloads) + b"]", timeout_s)
        answer = _answer_of(attempt.response)
        if self._on_tags is not None and (answer.config_etag or answer.rules_tag):
            # Not the caller's affair: the batch has been answered, whatever becomes of the tags.
            PROCESS_GUARD.run("transport.on_tags", self._on_tags, answer.config_etag, answer.rules_tag)
        return answer

    def post_json(self, path: str, body: bytes, timeout_s: float) -> Answer:
        """Make one attempt to POST JSON to another path (`/v1/users`, `/v1/actions/batch`, …).

        Args:
            path: Beginning with `/v1/`.
            body: The JSON.
            timeout_s: Most seconds it takes.

        Returns:
            What came of it; never raises for anything the network or the server does.
        """
        headers = {"Content-Type": _JSON}
        if len(body) >= _LEAST_GZIP_BYTES:
            body = gzipped(body)
            headers["Content-Encoding"] = "gzip"
        request = HttpRequest(HttpMethodEnum.POST, path, headers=headers, parameters=body)

        attempt = _Attempt(self._client, timeout_s)
        try:
            attempt.execute_as_string(request)
        except _NO_ANSWER as exc:
            return Answer(Outcome.RETRY, detail=describe(exc))
        return _answer_of(attempt.response)

    def get_json(self, path: str, *, etag: str | None, timeout_s: float) -> tuple[int, bytes, Mapping[str, str]]:
        """Make one attempt to GET a document (`/v1/config`, `/v1/rules`).

        Args:
            path: Beginning with `/v1/`.
            etag: The version that is known already, for a 304; None without.
            timeout_s: Most seconds it takes.

        Returns:
            Status, body and headers.

        Raises:
            OSError: No answer, or not a whole one, came in time (`requests`' exceptions are among these).
        """
        headers = {"Accept": "application/json"}
        if etag:
            headers["If-None-Match"] = etag
        request = HttpRequest(HttpMethodEnum.GET, path, headers=headers)
        try:
            response = self._client.call(request, timeout_s, _MAX_CONFIG_BYTES)
        except HTTPError as exc:  # urllib3's own, from reading the body
            raise ConnectionError(describe(exc)) from exc
        if len(response.raw_body) > _MAX_CONFIG_BYTES:
            raise ConnectionError(f"more than {_MAX_CONFIG_BYTES} bytes of configuration")
        return response.status_code, response.raw_body, response.headers

    def close(self) -> None:
        """Close idle connections; a later call opens new ones."""
        self._client.close()

    def after_fork(self) -> None:
        """Leave the parent's connections alone in a forked child."""
        self._client.after_fork()


def _answer_of(response: HttpResponse) -> Answer:
    headers = response.headers
    return Answer(
        outcome_of_status(response.status_code),
        status=response.status_code,
        retry_after_s=retry_after_seconds(headers.get("Retry-After"), time.time()),
        config_etag=headers.get("X-Moesif-Config-ETag"),
        rules_tag=headers.get("X-Moesif-Rules-Tag"),
    )
