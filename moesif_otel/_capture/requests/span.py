"""The CLIENT span of an outgoing call, on a provider that a user named for it.

Owns: when such a span is made, and its attributes.
Threads: the one that calls; a span is started and ended by it.
Never: is current (what the application starts meanwhile has the parents it had without us), puts anything into the
request, stands beside a span that an instrumentor makes of the same call.
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
    from moesif_otel._capture.exchange import Exchange

__all__ = ["ClientSpans"]

# https://opentelemetry.io/docs/specs/semconv/http/http-spans/: the variable chooses between old and stable names.
_OPT_IN: Final = "OTEL_SEMCONV_STABILITY_OPT_IN"
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"})


class ClientSpans:
    """Makes CLIENT spans on one provider, as `RequestsInstrumentor` would, where nobody else does.

    Args:
        provider: The tracer provider.

    Thread-safe.
    """

    __slots__ = ("_old", "_stable", "_tracer", "provider")

    def __init__(self, provider: trace.TracerProvider) -> None:
        self.provider = provider
        self._tracer = trace.get_tracer("moesif_otel", tracer_provider=provider)
        words = {word.strip() for word in os.environ.get(_OPT_IN, "").split(",")}
        self._stable = bool(words & {"http", "http/dup"})
        self._old = not self._stable or "http/dup" in words

    def start(self, exchange: Exchange) -> Any | None:
        """Start the span of a call, or None where an instrumentor of `urllib3` will make one."""
        if not is_http_instrumentation_enabled() or _urllib3_is_instrumented():
            return None
        method = exchange.method.upper() if exchange.method.upper() in _METHODS else "_OTHER"
        url = _redacted(exchange.url)
        attributes: dict[str, Any] = {}
        if self._old:
            attributes |= {"http.method": method, "http.url": url}
        if self._stable:
            attributes |= {"http.request.method": method, "url.full": url, **_server(url)}
        return self._tracer.start_span(
            "HTTP" if method == "_OTHER" else method, kind=SpanKind.CLIENT, attributes=attributes
        )

    def end(self, span: Any, status: int | None, error: BaseException | None) -> None:
        """End it, at the response's headers or with the call's exception."""
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
        span.end()


def _urllib3_is_instrumented() -> bool:
    module = sys.modules.get("opentelemetry.instrumentation.urllib3")
    return module is not None and bool(module.URLLib3Instrumentor().is_instrumented_by_opentelemetry)


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
