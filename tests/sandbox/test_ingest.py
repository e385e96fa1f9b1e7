"""Decoding of request bodies, and what becomes of a database that fails."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesif_otel.sandbox.check import Refusal
from moesif_otel.sandbox.ingest import Call, Ingest, decode_body
from moesif_otel.sandbox.store import Store
from moesif_otel.sandbox.wire import Wire
from tests.sandbox.events import make_event, refusal_of


@given(st.lists(st.binary(max_size=5_000), max_size=4))
def test_gzip_of_any_members_is_decoded(parts):
    """A gzip body of one or more members decodes to what was packed."""
    packed = b"".join(map(gzip.compress, parts))
    assert decode_body(packed, "gzip") == b"".join(parts)
    assert decode_body(packed, " GZIP ") == b"".join(parts)
    assert decode_body(packed, None) == packed


@given(st.binary(min_size=1, max_size=3_000), st.data())
def test_cut_or_changed_gzip_is_refused_or_decoded(data, drawn):
    """Whatever is sent as gzip is decoded or refused; a cut stream is always refused."""
    packed = gzip.compress(data)
    cut = drawn.draw(st.integers(1, len(packed) - 1))
    with pytest.raises(Refusal) as refused:
        decode_body(packed[:cut], "gzip")
    assert refused.value.status == 400
    place = drawn.draw(st.integers(0, len(packed) - 1))
    changed = packed[:place] + bytes([packed[place] ^ 0x55]) + packed[place + 1 :]
    refusal = refusal_of(decode_body, changed, "gzip", limit_bytes=10_000)
    assert refusal is None or refusal.status in {400, 413}


@pytest.mark.parametrize("size", [999, 1_000, 1_001, 5_000_000])
def test_the_limit_holds_to_the_byte(size):
    """A body of the limit is taken, one of a byte more is refused, packed or not."""
    data = bytes(size)
    for body, encoding in ((data, None), (gzip.compress(data), "gzip")):
        if size <= 1_000:
            assert decode_body(body, encoding, limit_bytes=1_000) == data
        else:
            with pytest.raises(Refusal) as refused:
                decode_body(body, encoding, limit_bytes=1_000)
            assert refused.value.status == 413


def test_a_database_that_fails_is_answered_503(tmp_path):
    """An event that could not be stored is not acknowledged: the client should try again."""
    wire, store = Wire(10), Store(str(tmp_path / "calls.sqlite"))
    ingest = Ingest(store, wire)
    call = Call("POST", "/v1/events", {"x-moesif-application-id": "a"}, json.dumps(make_event()).encode())
    assert ingest.handle(call).status == 201
    store.close()
    answer = ingest.handle(call)
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "not_stored")
    assert wire.stats()["received"] == 1


def test_protobuf_without_its_package_is_explained(monkeypatch):
    """Where protobuf is not installed the answer says what to install."""
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.proto.collector.trace.v1.trace_service_pb2", None)
    headers = {"x-moesif-application-id": "a", "content-type": "application/x-protobuf"}
    store = Store()
    answer = Ingest(store, Wire(10)).handle(Call("POST", "/v1/traces", headers, b""))
    store.close()
    assert answer.status == 501
    assert "pip install opentelemetry-proto" in json.loads(answer.body)["error"]["message"]
