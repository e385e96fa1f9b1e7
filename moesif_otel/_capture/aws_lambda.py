"""Capture of AWS Lambda handlers that API Gateway, a function URL or a load balancer calls.

Such a handler takes an event, a dict that describes a request, and returns what the caller makes an HTTP response of.
The formats are API Gateway's payloads 1.0 (REST APIs) and 2.0 (HTTP APIs, function URLs) and that of an ALB's target
groups. Any other event is no API call, and is passed through. Event and result are read, never changed.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

import orjson

from moesif_otel._capture.asgi.scope import url_of
from moesif_otel._capture.body import NO_BODY_STATUSES
from moesif_otel._capture.exchange import Exchange, Outcome, current_exchange

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._capture.exchange import CapturePipeline, Headers

# What Lambda authorizers get is a request too, but they answer with a policy.
_OF_AUTHORIZERS: Final = ("methodArn", "routeArn")


class LambdaCapture:
    """Captures the calls of handlers."""

    def __init__(self, pipeline: CapturePipeline) -> None:
        self._pipeline = pipeline

    def call(self, handler: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Any:
        """Call the handler with an event and a context; what it returns and raises passes unchanged."""
        guard = self._pipeline.guard
        exchange = guard.run("capture of a Lambda call", self._open, *arguments[:2])
        if exchange is None:
            return handler(*arguments, **keywords)
        event = arguments[0]
        token = current_exchange.set(exchange)
        try:
            self._pipeline.opened(exchange)
            result = handler(*arguments, **keywords)
        except BaseException as exc:
            exchange.status = 500 if _is_of_http_api(event) else 502
            exchange.finish(Outcome.FAILED, exc)
            raise
        finally:
            current_exchange.reset(token)
        guard.run("capture of a Lambda result", self._note_result, exchange, event, result)
        exchange.finish(Outcome.COMPLETE)
        return result

    def _open(self, event: Any = None, context: Any = None) -> Exchange | None:
        if not self._pipeline.is_live or not isinstance(event, Mapping) or any(key in event for key in _OF_AUTHORIZERS):
            return None
        about = event.get("requestContext") or {}
        http = about.get("http") or {}
        method = event.get("httpMethod") or http.get("method")
        if not method:
            return None
        exchange = Exchange(self._pipeline, "Incoming", method)
        headers = _headers(event)
        if event.get("cookies"):
            headers.append(("cookie", "; ".join(event["cookies"])))
        exchange.request_headers = headers
        exchange.has_remote_parent = any(name.lower() == "traceparent" for name, _ in headers)
        exchange.url = _url(event, about, headers)
        identity = about.get("identity") or {}
        exchange.peer_address = http.get("sourceIp") or identity.get("sourceIp")
        exchange.callback_arguments = (event, context)
        self._note_identity(exchange, identity)
        route = about.get("resourcePath") or str(event.get("routeKey") or "").partition(" ")[2]
        facts = {
            "route": route,
            "aws_request_id": getattr(context, "aws_request_id", None),
            "function_name": getattr(context, "function_name", None),
        }
        exchange.notes.update((name, value) for name, value in facts.items() if value)
        if self._pipeline.settings.log_body and event.get("body"):
            exchange.capture_request_body().add(_bytes(event["body"], event))
        return exchange

    def _note_identity(self, exchange: Exchange, identity: Mapping[str, Any]) -> None:
        """Note what API Gateway knows of the caller, where no callback is to say it."""
        settings = self._pipeline.settings
        if settings.identify_user is None:
            exchange.note_identity("user_id", identity.get("cognitoIdentityId") or None, "Cognito identity")
        key = identity.get("apiKey")
        if settings.get_session_token is None and key:
            exchange.note_session_key(key, "API key")

    def _note_result(self, exchange: Exchange, event: Any, result: Any) -> None:
        if isinstance(result, Mapping) and "statusCode" in result:
            exchange.status = 502  # what a client gets for a result that is none
            exchange.status = int(result["statusCode"])
            headers = _headers(result)
            headers += [("Set-Cookie", cookie) for cookie in result.get("cookies") or ()]
            body = result.get("body")
        elif _is_version_2(event):
            # The whole result is the body of a 200 (API Gateway's documentation, "Lambda function response").
            exchange.status, headers, body = 200, [("Content-Type", "application/json")], result
        else:
            exchange.status = 502
            return
        exchange.response_headers = headers
        is_seen = exchange.method != "HEAD" and exchange.status not in NO_BODY_STATUSES
        if self._pipeline.settings.log_body and body and is_seen:
            exchange.capture_response_body().add(_bytes(body, result))


def _is_version_2(event: Mapping[str, Any]) -> bool:
    return "http" in (event.get("requestContext") or {})


def _is_of_http_api(event: Mapping[str, Any]) -> bool:
    """Tell whether an HTTP API is the caller, the one that answers 500 where all others answer 502."""
    return _is_version_2(event) and ".lambda-url." not in str(event["requestContext"].get("domainName"))


def _headers(source: Mapping[str, Any]) -> Headers:
    """Read the headers of an event or a result, in which the ones with several values come first."""
    several, single = source.get("multiValueHeaders") or {}, source.get("headers") or {}
    headers = [(str(name), str(value)) for name, values in several.items() for value in values]
    return headers + [(str(name), str(value)) for name, value in single.items() if name not in several]


def _url(event: Mapping[str, Any], about: Mapping[str, Any], headers: Headers) -> str:
    scheme = next((value for name, value in headers if name.lower() == "x-forwarded-proto"), "")
    path = str(event.get("rawPath") or event.get("path") or "/").replace("?", "%3F")
    query = event.get("rawQueryString")
    if query is None:
        parameters = event.get("multiValueQueryStringParameters") or event.get("queryStringParameters") or {}
        # API Gateway has decoded them, a load balancer has not.
        query = urlencode(parameters, doseq=True, safe="%+" if "elb" in about else "")
    scope = {
        "scheme": scheme if scheme in {"http", "https"} else "https",
        "server": (about.get("domainName"), None),
        "path": path,
        "raw_path": path,
        "query_string": query,
    }
    return url_of(scope, headers)


def _bytes(body: Any, source: Any) -> bytes:
    if isinstance(body, str):
        is_base64 = isinstance(source, Mapping) and source.get("isBase64Encoded") is True
        return base64.b64decode(body) if is_base64 else body.encode("utf-8", "surrogatepass")
    return orjson.dumps(body, default=str)
