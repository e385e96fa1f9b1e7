"""Handles a request that reached Moesif's own paths: checks it, stores it, answers.

Runs on the server's worker threads; all state is in `Store` and `Wire`. A batch is never stored in part: one item that
is refused refuses its batch (the real server does not say what it does there; this is the harder case for a client).
"""

from __future__ import annotations

import sqlite3
import time
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import orjson

from moesif_otel.sandbox.check import (
    MAX_BATCH_BYTES,
    MAX_EVENT_BYTES,
    PROFILE_KINDS,
    Refusal,
    check_action,
    check_event,
    check_profile,
)
from moesif_otel.sandbox.documents import DOCUMENTS, put_document
from moesif_otel.sandbox.jsontext import read_json, write_json
from moesif_otel.sandbox.otlp import encode_answer, media_type, read_spans
from moesif_otel.sandbox.spans import event_of_span

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from moesif_otel.sandbox.store import Document, Store
    from moesif_otel.sandbox.wire import Wire

__all__ = ["Answer", "Call", "Ingest", "decode_body"]

_DECODE_STEP_BYTES: Final = 1024 * 1024
_MAX_APPLICATION_ID_CHARACTERS: Final = 2_000
_FIRST_READ_BYTES: Final = 512
_MAX_READ_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Call:
    """One request to Moesif's own paths; header names are in lower case, the body is decoded."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer that is sent back."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    items: int | None = None
    error: Mapping[str, Any] | None = None

    @classmethod
    def of_json(cls, status: int, value: Any, headers: Mapping[str, str] | None = None) -> Answer:
        """Make an answer with a JSON body."""
        return cls(status, orjson.dumps(value), headers or {})

    @classmethod
    def of_refusal(cls, refusal: Refusal, headers: Mapping[str, str] | None = None) -> Answer:
        """Make the answer to something that is refused."""
        body = refusal.as_json()
        return cls(refusal.status, orjson.dumps(body), headers or {}, error=body["error"])


def decode_body(body: bytes, content_encoding: str | None, *, limit_bytes: int = MAX_BATCH_BYTES) -> bytes:
    """Decode a request body.

    Args:
        body: As it was sent.
        content_encoding: The header's value; gzip or none.
        limit_bytes: Most bytes to decode to; a small body can hold a very large one.

    Raises:
        Refusal: 413 over the limit, 415 for another encoding, 400 for a body that is no whole gzip stream.
    """
    encoding = (content_encoding or "identity").strip().lower()
    if len(body) > limit_bytes:
        raise _too_large(limit_bytes)
    if encoding == "identity":
        return body
    if encoding not in {"gzip", "x-gzip"}:
        raise Refusal(415, "wrong_encoding", f"content-encoding must be gzip or none, got {encoding[:40]!r}")
    parts: list[bytes] = []
    room, place = limit_bytes, 0
    # A gzip body may consist of several members, one after the other (RFC 1952).
    while place < len(body):
        place, room = _decode_member(body, place, room, parts, limit_bytes)
    return b"".join(parts)


def _decode_member(body: bytes, place: int, room: int, parts: list[bytes], limit_bytes: int) -> tuple[int, int]:
    """Decode the member that starts at `place`; return where the next one starts and the room that is left.

    The body is given to zlib in pieces, small ones first: it copies what it did not need, for each member.
    """
    decoder = zlib.decompressobj(wbits=31)
    piece_bytes = _FIRST_READ_BYTES
    piece = b""
    while not decoder.eof:
        if not piece:
            piece = body[place : place + piece_bytes]
            place += len(piece)
            piece_bytes = min(piece_bytes * 2, _MAX_READ_BYTES)
            if not piece:
                raise Refusal(400, "bad_gzip", "the gzip data of the body ends early")
        try:
            part = decoder.decompress(piece, min(_DECODE_STEP_BYTES, room + 1))
        except zlib.error:
            raise Refusal(400, "bad_gzip", "the body is not the gzip data that its header says") from None
        room -= len(part)
        if room < 0:
            raise _too_large(limit_bytes)
        parts.append(part)
        piece = decoder.unconsumed_tail
    return place - len(decoder.unused_data), room


def _too_large(limit_bytes: int) -> Refusal:
    return Refusal(413, "too_large", f"a body must have at most {limit_bytes} bytes, sent and decoded")


class Ingest:
    """Moesif's API over a store.

    Args:
        store: Where accepted things go.
        wire: Where they are counted.
        application_ids: The ids to take; empty takes any.
        max_event_age_s: Events older than this are refused; None takes any age.
    """

    def __init__(
        self, store: Store, wire: Wire, *, application_ids: Collection[str] = (), max_event_age_s: float | None = None
    ) -> None:
        self._store = store
        self._wire = wire
        self._application_ids = frozenset(application_ids)
        self._max_event_age_s = max_event_age_s

    def handle(self, call: Call) -> Answer:
        """Answer a call; refusals become answers too."""
        try:
            return self._route(call)
        except Refusal as refusal:
            self._wire.count("rejected")
            return Answer.of_refusal(refusal)
        except sqlite3.Error as error:  # a full disk, a file that another sandbox holds: worth another try
            return Answer.of_refusal(Refusal(503, "not_stored", f"the database failed: {error}"))

    def _route(self, call: Call) -> Answer:
        if call.path == "/health/probe":
            return Answer.of_json(200, {"status": True})
        words = call.path.strip("/").split("/")[1:]
        if len(words) == 1 and words[0] in DOCUMENTS:
            return self._document(call, words[0])
        if len(words) not in {1, 2} or words[1:] not in ([], ["batch"]):
            raise Refusal(404, "not_found", f"no such path: {call.path[:200]}")
        name, batch = words[0], len(words) == 2
        if name not in {"events", "actions", "traces", *PROFILE_KINDS} or (name == "traces" and batch):
            raise Refusal(404, "not_found", f"no such path: {call.path[:200]}")
        if call.method != "POST":
            raise Refusal(405, "wrong_method", f"{call.path} takes POST, got {call.method}")
        application_id = self._application_id(call)
        if name == "traces":
            return self._traces(call, application_id)
        items = _read_items(call.body, batch)
        if name == "events":
            return self._events(application_id, items, batch)
        return self._profiles(application_id, name, items, batch)

    def _application_id(self, call: Call) -> str:
        found = call.headers.get("x-moesif-application-id", "").strip()
        if not found:
            raise Refusal(401, "no_application_id", "the header X-Moesif-Application-Id is missing")
        if len(found) > _MAX_APPLICATION_ID_CHARACTERS:
            raise Refusal(401, "wrong_application_id", "the application id is too long")
        if self._application_ids and found not in self._application_ids:
            raise Refusal(401, "wrong_application_id", "this sandbox was started for other application ids")
        return found

    def _events(self, application_id: str, items: list[Any], batch: bool) -> Answer:
        now_s = time.time()
        rows: list[tuple[dict[str, Any], bytes]] = []
        for place, event in enumerate(items):
            index = place if batch else None
            check_event(event, now_s=now_s, index=index, max_age_s=self._max_event_age_s)
            rows.append((event, _written(event, index)))
        self._take(application_id, rows, "events")
        return Answer(201, headers=self._tags(application_id), items=len(rows))

    def _take(self, application_id: str, rows: list[tuple[dict[str, Any], bytes]], source: str) -> None:
        stored = self._store.add_events(application_id, rows, source)
        self._wire.count("batches")
        self._wire.count("received", len(rows))
        self._wire.count("duplicates", len(rows) - stored)

    def _traces(self, call: Call, application_id: str) -> Answer:
        """Take OTLP. A span that makes no good event is refused alone, as OTLP's partial success has it."""
        content_type = call.headers.get("content-type")
        now_s = time.time()
        rows: list[tuple[dict[str, Any], bytes]] = []
        refusals: list[Refusal] = []
        for span in read_spans(call.body, content_type):
            try:
                event = event_of_span(span, application_id)
                if event is None:
                    continue
                check_event(event, now_s=now_s, max_age_s=self._max_event_age_s)
                rows.append((event, _written(event, None)))
            except Refusal as refusal:
                refusals.append(refusal)
        self._take(application_id, rows, "otlp")
        body = encode_answer(content_type, len(refusals), str(refusals[0]) if refusals else "")
        error = {**refusals[0].as_json()["error"], "rejected_spans": len(refusals)} if refusals else None
        return Answer(200, body, {"Content-Type": media_type(content_type)}, items=len(rows), error=error)

    def _profiles(self, application_id: str, name: str, items: list[Any], batch: bool) -> Answer:
        indices: list[int | None] = list(range(len(items))) if batch else [None]
        for index, item in zip(indices, items, strict=True):
            _written(item, index)
        if name == "actions":
            for index, item in zip(indices, items, strict=True):
                check_action(item, index=index)
            self._store.add_actions(application_id, items)
        else:
            keys = [check_profile(name, item, index=index) for index, item in zip(indices, items, strict=True)]
            self._store.merge_profiles(application_id, name, list(zip(keys, items, strict=True)))
        self._wire.count("profiles", len(items))
        return Answer(201, items=len(items))

    def _document(self, call: Call, name: str) -> Answer:
        if call.method == "PUT":
            return self._put_document(call, name)
        if call.method != "GET":
            raise Refusal(405, "wrong_method", f"{call.path} takes GET or PUT, got {call.method}")
        document = self._read_document(self._application_id(call), name)
        headers = {DOCUMENTS[name].tag_header: document.tag, "ETag": f'"{document.tag}"'}
        known = {tag.strip().removeprefix("W/").strip('"') for tag in call.headers.get("if-none-match", "").split(",")}
        if known & {document.tag, "*"}:
            return Answer(304, headers=headers)
        return Answer(200, document.body, headers)

    def _put_document(self, call: Call, name: str) -> Answer:
        """Edit live. Without an application id it is for every application that has none of its own."""
        application_id = self._application_id(call) if "x-moesif-application-id" in call.headers else ""
        put_document(self._store, application_id, name, call.body)
        document = self._read_document(application_id, name)
        return Answer(200, document.body, {DOCUMENTS[name].tag_header: document.tag, "ETag": f'"{document.tag}"'})

    def _read_document(self, application_id: str, name: str) -> Document:
        return self._store.document(application_id, name, DOCUMENTS[name].default)

    def _tags(self, application_id: str) -> dict[str, str]:
        return {row.tag_header: self._read_document(application_id, name).tag for name, row in DOCUMENTS.items()}


def _written(item: Any, index: int | None) -> bytes:
    """Return an item as JSON; raises `Refusal` where it is too deep or too large."""
    place = "" if index is None else f"item {index}: "
    try:
        text = write_json(item)
    except Refusal as refusal:
        raise Refusal(refusal.status, refusal.code, f"{place}{refusal}", index=index) from None
    if len(text) > MAX_EVENT_BYTES:
        message = f"{place}an event must have at most {MAX_EVENT_BYTES} bytes, got {len(text)}"
        raise Refusal(413, "event_too_large", message, index=index)
    return text


def _read_items(body: bytes, batch: bool) -> list[Any]:
    value = read_json(body)
    if not batch:
        return [value]
    if not isinstance(value, list):
        raise Refusal(400, "wrong_type", "a batch must be an array")
    if not value:
        raise Refusal(400, "empty_batch", "a batch must have at least one item")
    return value
