"""The CLIENT span of an outgoing call, on a provider that a user named for it.

It is made when the client has its response, or has failed, with the times of the call: by then it is known whether an
instrumentor has made one. It is never current, so what the application starts meanwhile has the parents it had without
us, and nothing is put into the request.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.instrumentation.utils import is_http_instrumentation_enabled
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.util import http as otel_http

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from moesif_otel._capture.exchange import Exchange

# https://opentelemetry.io/docs/specs/semconv/http/http-spans/: the variable chooses between old and stable names.
_OPT_IN: Final = "OTEL_SEMCONV_STABILITY_OPT_IN"
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"})

_URLLIB3: Final = ("opentelemetry.instrumentation.urllib3", "URLLib3Instrumentor")
_INSTRUMENTORS: Final = {
    "requests": (("opentelemetry.instrumentation.requests", "RequestsInstrumentor"), _URLLIB3),
    "httpx": (("opentelemetry.instrumentation.httpx", "HTTPXClientInstrumentor"),),
    "aiohttp": (("opentelemetry.instrumentation.aiohttp_client", "AioHttpClientInstrumentor"),),
    "urllib3": (_URLLIB3,),
}


class ClientSpans:
    """Makes CLIENT spans on one provider, as an instrumentor would, where none is active. Thread-safe."""

    __slots__ = ("_old", "_stable", "_tracer", "provider")

    def __init__(self, provider: trace.TracerProvider) -> None:
        self.provider = provider
        self._tracer = trace.get_tracer("moesif_otel", tracer_provider=provider)
        words = {word.strip() for word in os.environ.get(_OPT_IN, "").split(",")}
        self._stable = bool(words & {"http", "http/dup"})
        self._old = not self._stable or "http/dup" in words

    def make(self, client: str, exchange: Exchange, context: Context, error: BaseException | None) -> None:
        """Make the span of a call whose headers have come, or that failed; none where an instrumentor is active.

        Args:
            client: The client library.
            exchange: The call, with its status if there is one.
            context: The context in which the call was made: its span is the parent.
            error: The call's exception.
        """
        if not is_http_instrumentation_enabled() or _is_instrumented(client):
            return
        method = exchange.method.upper() if exchange.method.upper() in _METHODS else "_OTHER"
        url = _redacted(exchange.url)
        attributes: dict[str, Any] = {}
        if self._old:
            attributes |= {"http.method": method, "http.url": url}
        if self._stable:
            attributes |= {"http.request.method": method, "url.full": url, **_server(url)}
        span = self._tracer.start_span(
            "HTTP" if method == "_OTHER" else method,
            context=context,
            kind=SpanKind.CLIENT,
            attributes=attributes,
            start_time=exchange.started_ns,
        )
        self._note_end(span, exchange.status, error)
        span.end()

    def _note_end(self, span: trace.Span, status: int | None, error: BaseException | None) -> None:
        if status is not None:
            if self._old:
                span.set_attribute("http.status_code", status)
            if self._stable:
                span.set_attribute("http.response.status_code", status)
            if status >= 400:
                span.set_status(Status(StatusCode.ERROR))
                if self._stable:
                    span.set_attribute("error.type", str(status))
        if error is not None:
            span.record_exception(error)
            span.set_status(Status(StatusCode.ERROR, type(error).__qualname__))
            if self._stable:
                span.set_attribute("error.type", type(error).__qualname__)


def _is_instrumented(client: str) -> bool:
    for module_name, class_name in _INSTRUMENTORS[client]:
        module = sys.modules.get(module_name)
        if module is not None and getattr(module, class_name)().is_instrumented_by_opentelemetry:
            return True
    return False


def _redacted(url: str) -> str:
    # Signatures in queries; contrib before 0.58 took only user names and passwords out, which are not in our URLs.
    redact = getattr(otel_http, "redact_url", None)
    return str(redact(url)) if redact is not None else url


def _server(url: str) -> dict[str, Any]:
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return {}
    found = {"server.address": parts.hostname, "server.port": port}
    return {name: value for name, value in found.items() if value is not None}
