"""Spans as they come over OTLP/HTTP, in protobuf or in JSON.

Pure functions. JSON needs no protobuf, which is imported when the first protobuf body comes.

Format: https://opentelemetry.io/docs/specs/otlp/ (JSON: ids in hex, 64-bit numbers as text).
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import orjson

from moesif_otel.sandbox.check import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["JSON_TYPE", "PROTOBUF_TYPE", "Span", "encode_answer", "media_type", "read_spans"]

PROTOBUF_TYPE: Final = "application/x-protobuf"
JSON_TYPE: Final = "application/json"

_KINDS: Final = ("unspecified", "internal", "server", "client", "producer", "consumer")
_STATUSES: Final = ("Unset", "Ok", "Error")


@dataclass(frozen=True, slots=True)
class Span:
    """One span; ids are hexadecimal, times nanoseconds since 1970, bytes in attributes are bytes."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    kind: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Any]
    resource: Mapping[str, Any]
    links: tuple[tuple[str, str], ...]
    status: str


def read_spans(body: bytes, content_type: str | None) -> list[Span]:
    """Read an export request.

    Args:
        body: Decoded of its content encoding.
        content_type: `application/x-protobuf` or `application/json`.

    Raises:
        Refusal: 400 for a body that is not what its type says, 415 for another type, 501 for protobuf where the
            package that reads it is missing.
    """
    if media_type(content_type) == JSON_TYPE:
        return list(_read_all(orjson.loads, _json_spans, body))
    if media_type(content_type) == PROTOBUF_TYPE:
        return list(_read_all(_read_protobuf, _protobuf_spans, body))
    raise Refusal(415, "wrong_type", f"content-type must be {PROTOBUF_TYPE} or {JSON_TYPE}")


def media_type(content_type: str | None) -> str:
    """Return a content type without its parameters."""
    return (content_type or "").partition(";")[0].strip().lower()


def encode_answer(content_type: str | None, rejected: int, message: str) -> bytes:
    """Return the answer's body in the request's format: empty, or a partial success that says what was refused."""
    if media_type(content_type) == JSON_TYPE:
        partial = {"rejectedSpans": str(rejected), "errorMessage": message}
        return orjson.dumps({"partialSuccess": partial} if rejected else {})
    if not rejected:
        return b""
    service = import_module("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    partial_success = service.ExportTracePartialSuccess(rejected_spans=rejected, error_message=message)
    answer: bytes = service.ExportTraceServiceResponse(partial_success=partial_success).SerializeToString()
    return answer


def _read_all(parse: Callable[[bytes], Any], spans: Callable[[Any], Iterator[Span]], body: bytes) -> Iterator[Span]:
    try:
        yield from spans(parse(body))
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise Refusal(400, "bad_otlp", f"the body is no OTLP trace export: {type(error).__name__}") from None


def _read_protobuf(body: bytes) -> Any:
    try:
        decode_error = import_module("google.protobuf.message").DecodeError
        service = import_module("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    except ImportError:
        raise Refusal(
            501,
            "no_protobuf",
            "to read protobuf the sandbox needs: pip install opentelemetry-proto (OTLP in JSON needs nothing)",
        ) from None
    try:
        return service.ExportTraceServiceRequest.FromString(body)
    except decode_error:
        raise Refusal(400, "bad_otlp", "the body is no OTLP trace export in protobuf") from None


def _protobuf_spans(request: Any) -> Iterator[Span]:
    for group in request.resource_spans:
        resource = {pair.key: _protobuf_value(pair.value) for pair in group.resource.attributes}
        for scope in group.scope_spans:
            for span in scope.spans:
                yield Span(
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex() or None,
                    name=span.name,
                    kind=_named(_KINDS, span.kind),
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    attributes={pair.key: _protobuf_value(pair.value) for pair in span.attributes},
                    resource=resource,
                    links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
                    status=_named(_STATUSES, span.status.code),
                )


def _protobuf_value(value: Any) -> Any:
    field = value.WhichOneof("value")
    if field is None:
        return None
    found = getattr(value, field)
    if field == "array_value":
        return [_protobuf_value(item) for item in found.values]
    if field == "kvlist_value":
        return {pair.key: _protobuf_value(pair.value) for pair in found.values}
    return found


def _json_spans(request: Any) -> Iterator[Span]:
    for group in request.get("resourceSpans") or ():
        resource = _json_attributes((group.get("resource") or {}).get("attributes"))
        for scope in group.get("scopeSpans") or ():
            for span in scope.get("spans") or ():
                yield Span(
                    trace_id=_hex_id(span.get("traceId")),
                    span_id=_hex_id(span.get("spanId")),
                    parent_id=_hex_id(span.get("parentSpanId")) or None,
                    name=str(span.get("name") or ""),
                    kind=_named(_KINDS, span.get("kind")),
                    start_ns=int(span.get("startTimeUnixNano") or 0),
                    end_ns=int(span.get("endTimeUnixNano") or 0),
                    attributes=_json_attributes(span.get("attributes")),
                    resource=resource,
                    links=tuple(
                        (_hex_id(link.get("traceId")), _hex_id(link.get("spanId"))) for link in span.get("links") or ()
                    ),
                    status=_named(_STATUSES, (span.get("status") or {}).get("code")),
                )


def _json_attributes(pairs: Any) -> dict[str, Any]:
    return {str(pair["key"]): _json_value(pair.get("value")) for pair in pairs or ()}


def _json_value(value: Any) -> Any:
    for field, found in (value or {}).items():
        if field == "intValue":
            return int(found)
        if field == "bytesValue":
            try:
                return base64.b64decode(found, validate=True)
            except binascii.Error:
                raise ValueError from None
        if field == "arrayValue":
            return [_json_value(item) for item in found.get("values") or ()]
        if field == "kvlistValue":
            return _json_attributes(found.get("values"))
        return found
    return None


def _hex_id(text: Any) -> str:
    if text is None:
        return ""
    bytes.fromhex(text)  # raises ValueError for anything else
    return str(text).lower()


def _named(names: tuple[str, ...], number: Any) -> str:
    """Return an enumeration's name; JSON may carry `SPAN_KIND_SERVER` instead of the number."""
    if isinstance(number, str) and not number.isdigit():
        last = number.rpartition("_")[2].lower()
        return next((name for name in names if name.lower() == last), names[0])
    place = int(number or 0)
    return names[place] if 0 <= place < len(names) else names[0]
