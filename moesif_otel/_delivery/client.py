"""The Moesif server, through `moesifapi`: the one module of this package that knows that client and its HTTP calls.

Senders, whoever makes profile calls, and the poller of `_remote` share the connections of a pipeline. Nothing is
retried here (senders do that), no body or header is logged, and `moesifapi`'s process-wide `Configuration` is neither
obeyed nor changed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import time
import weakref
import zlib
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit, urlunsplit

from moesifapi.controllers.api_controller import ApiController
from moesifapi.http.http_client import HttpClient
from moesifapi.http.http_response import HttpResponse
from opentelemetry.instrumentation.utils import suppress_instrumentation

from moesif_otel._delivery.connection import Connections
from moesif_otel._delivery.outcome import BatchOutcome, PostAnswer, outcome_of_status, retry_after_seconds
from moesif_otel._delivery.report import describe
from moesif_otel._guard import LATE_IMPORTS, PROCESS_GUARD

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from moesifapi.http.http_request import HttpRequest

    from moesif_otel.settings import Settings

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
# ValueError for an address or a header that is none.
_NO_ANSWER: Final = (OSError, HTTPException, ValueError)


@functools.cache
def _user_agent() -> str:
    with LATE_IMPORTS:  # `version` imports more of itself
        from importlib import metadata

        try:
            return f"moesif-otel/{metadata.version('moesif-otel')}"
        except metadata.PackageNotFoundError:  # run from a source tree
            return "moesif-otel/0"


@functools.cache
def _compressor_module() -> Any:
    # The same format, in half of the time or a quarter; `isal` is a dependency where it has wheels.
    for name in ("isal.isal_zlib", "zlib_ng.zlib_ng"):
        try:
            with LATE_IMPORTS:
                return importlib.import_module(name)
        except ImportError:
            pass
    return zlib


def gzipped(data: bytes) -> bytes:
    """Compress lightly into a gzip container."""
    compressor = _compressor_module().compressobj(_LIGHT, zlib.DEFLATED, _GZIP)
    compressed: bytes = compressor.compress(data) + compressor.flush()
    return compressed


class _Attempt(HttpClient):  # type: ignore[misc]
    """Injected into `ApiController`: makes one attempt within a deadline, and keeps its answer.

    `ApiController` builds address and application id from `moesifapi`'s process-wide `Configuration`, which another
    pipeline, or the application itself, may set to anything: both are written anew.
    """

    def __init__(self, transport: MoesifTransport, timeout_s: float) -> None:
        self._transport = transport
        self._timeout_s = timeout_s
        self.tried = False
        self.answer: PostAnswer | None = None

    def execute_as_string(self, request: HttpRequest) -> HttpResponse:
        """Make the attempt."""
        self.tried = True
        path = request.query_url[request.query_url.rindex("/v1/") :]
        self.answer = self._transport.post(path, request.headers or {}, request.parameters, self._timeout_s)
        return HttpResponse(self.answer.status, {}, b"")


class _Controller(ApiController):  # type: ignore[misc]
    """`moesifapi`'s calls, with ready-made JSON for a body and without its logging of bodies."""

    @classmethod
    def generate_post_payload(cls, body: Sequence[bytes], headers: dict[str, str]) -> tuple[bytes, dict[str, str]]:
        """Join the events of a batch, each of which is JSON already, into one array, and compress it."""
        headers["Content-Encoding"] = "gzip"
        return gzipped(b"[" + b",".join(body) + b"]"), headers

    def validate_response(self, context: Any) -> None:
        """Do nothing: the attempt has the answer. The original logs its headers and body."""


class MoesifTransport:
    """Sends to one Moesif server under one application id.

    `on_tags` is told `X-Moesif-Config-ETag` and `X-Moesif-Rules-Tag` of each answer to events that carries one.

    Thread-safe. Every call is suppressed for instrumentations, lasts at most its timeout as a whole, and raises for
    nothing that the network or the server does, but for `get_json`. Connecting takes at most 3 s for each address of
    the host. Paths begin with `/v1/`.
    """

    def __init__(self, settings: Settings, *, on_tags: Callable[[str | None, str | None], None] | None = None) -> None:
        # Senders, one for profile calls, one for the poller.
        self._connections = Connections(settings.base_uri, settings.event_worker_count + 2)
        # Of a pipeline that is forgotten; sockets that garbage collection ends warn that nobody closed them.
        weakref.finalize(self, self._connections.close).atexit = False
        self._application_id = settings.application_id
        self._on_tags = on_tags
        self.address = settings.shown_address
        self.setting = "BASE_URI"
        # Names this destination on disk without giving the application id away (it is long and random).
        destination = f"moesif-otel spool\0{settings.application_id}\0{_without_credentials(settings.base_uri)}"
        self.spool_binding: str | None = hashlib.sha256(destination.encode()).hexdigest()[:32]

    def send(self, payloads: Sequence[bytes], timeout_s: float) -> PostAnswer:
        """Make one attempt to deliver a batch of events, each as JSON."""
        attempt = _Attempt(self, timeout_s)
        try:
            _Controller(attempt).create_events_batch(payloads)
        except Exception:
            if attempt.tried and attempt.answer is None:
                raise  # a defect of ours; sent once more, the batch could arrive twice
        answer = attempt.answer
        if answer is None:
            # `Configuration.BASE_URI` is no address: the application's affair, not ours.
            return self.post_json(_EVENTS_BATCH, b"[" + b",".join(payloads) + b"]", timeout_s)
        if self._on_tags is not None and (answer.config_etag or answer.rules_tag):
            # Not the caller's affair: the batch has been answered, whatever becomes of the tags.
            PROCESS_GUARD.run("reading configuration tags", self._on_tags, answer.config_etag, answer.rules_tag)
        return answer

    def post_json(self, path: str, body: bytes, timeout_s: float) -> PostAnswer:
        """Make one attempt to POST JSON to another path (`/v1/users`, `/v1/actions/batch`, …)."""
        headers = {"Content-Type": _JSON}
        if len(body) >= _LEAST_GZIP_BYTES:
            body = gzipped(body)
            headers["Content-Encoding"] = "gzip"
        return self.post(path, headers, body, timeout_s)

    def post(self, path: str, headers: Mapping[str, str], body: bytes, timeout_s: float) -> PostAnswer:
        """Make one attempt to POST."""
        try:
            with suppress_instrumentation():
                answer = self._connections.request(
                    "POST",
                    path,
                    {**headers, **self._own_headers()},
                    body,
                    timeout_s=timeout_s,
                    max_body_bytes=_MAX_ANSWER_BYTES,
                    body_timeout_s=_ANSWER_BODY_S,
                )
        except _NO_ANSWER as exc:
            return PostAnswer(BatchOutcome.RETRY, detail=describe(exc))
        found = answer.headers
        return PostAnswer(
            outcome_of_status(answer.status),
            status=answer.status,
            retry_after_s=retry_after_seconds(found.get("Retry-After"), time.time()),
            config_etag=found.get("X-Moesif-Config-ETag"),
            rules_tag=found.get("X-Moesif-Rules-Tag"),
        )

    def get_json(self, path: str, *, etag: str | None, timeout_s: float) -> tuple[int, bytes, Mapping[str, str]]:
        """Make one attempt to GET a document (`/v1/config`, `/v1/rules`), unless it has the ETag that is known already.

        Return status, body and headers.

        Raises:
            OSError: No answer, or not a whole one, came in time.
        """
        headers = {"Accept": "application/json", **self._own_headers()}
        if etag:
            headers["If-None-Match"] = etag
        try:
            with suppress_instrumentation():
                answer = self._connections.request(
                    "GET", path, headers, b"", timeout_s=timeout_s, max_body_bytes=_MAX_CONFIG_BYTES
                )
        except (HTTPException, ValueError) as exc:
            raise ConnectionError(describe(exc)) from exc
        if len(answer.body) > _MAX_CONFIG_BYTES:
            raise ConnectionError(f"more than {_MAX_CONFIG_BYTES} bytes of configuration")
        return answer.status, answer.body, answer.headers

    def _own_headers(self) -> dict[str, str]:
        return {"X-Moesif-Application-Id": self._application_id, "User-Agent": _user_agent()}

    def close(self) -> None:
        """Close idle connections; a later call opens new ones."""
        self._connections.close()

    def after_fork(self) -> None:
        """Leave the parent's connections alone in a forked child."""
        self._connections.after_fork()


def _without_credentials(base_uri: str) -> str:
    parts = urlsplit(base_uri.rstrip("/"))
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
