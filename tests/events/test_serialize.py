"""`events.serialize`: an event is JSON, whatever it holds."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import json
import uuid
from collections import OrderedDict, UserDict
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moesifapi.models import EventModel, EventRequestModel, EventResponseModel

from moesif_otel._events import serialize as json_of
from moesif_otel._events.model import MoesifEvent, as_dictionary, hide_absent_bodies, show_absent_bodies
from moesif_otel._events.serialize import parsed_json, plain, snapshot, sound_text, without_bodies


def event(**fields: Any) -> MoesifEvent:
    request = {"time": "2024-10-30T04:45:42.914", "uri": "https://x/", "verb": "GET", "headers": {}}
    return MoesifEvent({"request": request, "transaction_id": "t", **fields})


def serialize(model: EventModel) -> bytes:
    """What is sent after a mask has seen an event."""
    return json_of.serialize(as_dictionary(model))


def strict(payload: bytes) -> Any:
    """Parse as the strictest server would: no NaN, no invalid UTF-8, no lone surrogates."""

    def refuse(name: str) -> Any:
        raise AssertionError(name)

    value = json.loads(payload.decode("utf-8"), parse_constant=refuse)
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int


class Rude:
    def __str__(self) -> str:
        raise RuntimeError

    def __repr__(self) -> str:
        raise RuntimeError


class RudeMapping(UserDict):  # type: ignore[type-arg]
    def keys(self) -> Any:
        raise RuntimeError


def cycle() -> Any:
    value: dict[str, Any] = {}
    value["self"] = [value, value]
    return value


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def repeated() -> Any:
    value: Any = ["\ud800"]
    for _ in range(60):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (dt.datetime(2024, 1, 2, 3, 4, 5), "2024-01-02T03:04:05"),
        (dt.date(2024, 1, 2), "2024-01-02"),
        (uuid.UUID(int=1), str(uuid.UUID(int=1))),
        ({1}, [1]),
        (frozenset(), []),
        ((1, 2), [1, 2]),
        (b"abc\xff", "abc\ufffd"),
        (bytearray(b"x"), "x"),
        (memoryview(b"x"), "x"),
        (float("nan"), None),
        (float("inf"), None),
        (2**64, str(2**64)),
        (-(2**63), -(2**63)),
        (decimal.Decimal("1.50"), "1.50"),
        (Colour.RED, "red"),
        (Point(1), {"x": 1}),
        ("\ud800x", "\ufffdx"),
        ("\ud83d\ude00", "😀"),
        (UserDict({"a": 1}), {"a": 1}),
        (OrderedDict(a=1), {"a": 1}),
        ({1: "a", None: "b", (1, 2): "c", "\udc80": "d"}, {"1": "a", "null": "b", "(1, 2)": "c", "\ufffd": "d"}),
        (Rude(), "(Rude)"),
        pytest.param(10**5000, "(int)", id="more digits than Python writes"),
    ],
)
def test_values_that_json_has_no_word_for(value: Any, expected: Any) -> None:
    """Each becomes the nearest thing; alone, beside a value that spoils the fast way, and inside sets and lists."""
    assert strict(serialize(event(metadata={"v": value})))["metadata"]["v"] == expected
    assert strict(serialize(event(metadata={"v": value, "spoils": "\udfff"})))["metadata"]["v"] == expected
    assert strict(serialize(event(metadata={"v": [value]})))["metadata"]["v"] == [expected]


@pytest.mark.parametrize(
    "value", [cycle(), deep(300), deep(5_000), repeated(), RudeMapping({"a": 1}), [cycle()], Rude, len]
)
def test_values_without_end_or_manners(value: Any) -> None:
    """Cycles, depth, values that unfold without end and objects that raise cost the value, never the event."""
    found = strict(serialize(event(metadata={"v": value, "kept": 1, "spoils": "\ud800"})))
    assert found["metadata"]["kept"] == 1
    assert found["request"]["verb"] == "GET"


def test_numbers_that_are_keys_twice_stay_valid() -> None:
    """`1` and `"1"` are one key in JSON."""
    assert serialize(event(metadata={1: "a", "1": "b"})).count(b'"1"') == 1


@pytest.mark.parametrize("metadata", [[1, 2], "text", 5, {1}, Rude()])
def test_metadata_that_is_no_mapping_is_kept_as_a_value(metadata: Any) -> None:
    """Moesif takes an object; the event goes on with what there was."""
    assert set(strict(serialize(event(metadata=metadata)))["metadata"]) == {"value"}


def test_ids_are_text() -> None:
    """Moesif refuses numbers there, and a mask may have put one."""
    found = strict(serialize(event(user_id=5, company_id=uuid.UUID(int=2), session_token=b"tok")))
    assert (found["user_id"], found["company_id"], found["session_token"]) == ("5", str(uuid.UUID(int=2)), "tok")


def test_a_plain_event_model_of_a_mask_is_taken() -> None:
    """A mask may return `moesifapi`'s own class; nothing of it is null on the wire."""
    model = EventModel(request=EventRequestModel(uri="u"), response=EventResponseModel(status=200), transaction_id="t")
    assert strict(serialize(model)) == {"request": {"uri": "u"}, "response": {"status": 200}, "transaction_id": "t"}


def test_fields_that_moesifapi_lacks_are_sent() -> None:
    """trace_id, span, subscription_id, action_name; None is left out."""
    made = event()
    made.trace_id, made.span, made.subscription_id, made.action_name = "a", {"id": "b"}, "s", "act"
    found = strict(serialize(made))
    assert [found[name] for name in ("trace_id", "span", "subscription_id", "action_name")] == [
        "a",
        {"id": "b"},
        "s",
        "act",
    ]
    assert made.to_dictionary()["span"] == {"id": "b"}
    assert b"null" not in serialize(event())


def test_odd_bytes_in_urls_and_headers_stay_valid_text() -> None:
    """WSGI's Latin-1 texts and surrogates of undecodable bytes."""
    made = event()
    made.request.uri = "https://x/\xff\udcff"
    made.request.headers = {"X-Odd": "\x80\udc80\x00"}
    found = strict(serialize(made))
    assert found["request"]["uri"] == "https://x/\xff\ufffd"
    assert found["request"]["headers"]["X-Odd"] == "\x80\ufffd\x00"


def test_fragments_survive_the_slow_way() -> None:
    """An embedded body is not touched by odd metadata."""
    made = event(metadata={"x": "\ud800"})
    made.request.body = orjson.Fragment(b'{"big": 123456789012345678901234567890}')
    assert b"123456789012345678901234567890" in serialize(made)


def test_numbers_beyond_64_bits_stay_numbers_in_bodies() -> None:
    """A body that a mask has seen keeps its digits, also when the larger body beside it is left out."""
    big = b"123456789012345678901234567890"
    made = event()
    made.request.body = parsed_json(b'{"big":%s,"more":[-%s]}' % (big, big))
    made.response = EventResponseModel(time="2024-10-30T04:45:42.914", status=200, headers={}, body={"long": "x" * 500})
    payload = serialize(made)
    assert b'{"big":%s,"more":[-%s]}' % (big, big) in payload
    assert b'{"big":%s,"more":[-%s]}' % (big, big) in without_bodies(payload)


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary()
    | st.dates()
    | st.uuids(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.integers() | st.none() | st.binary(), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=15,
)


@given(ODD, ODD)
def test_anything_serialises(metadata: Any, body: Any) -> None:
    """Whatever a callback or a mask leaves behind, the event is valid JSON with its required fields."""
    made = event(metadata=metadata)
    made.request.body = body
    assert strict(serialize(made))["request"]["uri"] == "https://x/"


@given(ODD)
def test_plain_is_stable(value: Any) -> None:
    """What is plain stays as it is."""
    once = plain(value)
    assert orjson.dumps(plain(once)) == orjson.dumps(once)


@given(st.text(st.characters()))
def test_sound_text_changes_only_what_is_unsound(text: str) -> None:
    """Valid text stays the same object."""
    sound = sound_text(text)
    sound.encode()
    try:
        text.encode()
        assert sound is text
    except UnicodeEncodeError:
        assert len(sound) <= len(text)


def test_without_bodies_leaves_the_larger_one_out_first() -> None:
    """For a server that finds an event too large: the call, the smaller body, and why the other is missing."""
    made = event(metadata={"k": 1, "moesif_otel": {"outcome": "error"}})
    made.request.body, made.request.transfer_encoding = "QQ==", "base64"
    made.response = EventResponseModel(time="t", status=200, body=orjson.Fragment(b"[1,2,3,4]"), transfer_encoding="json")
    once = without_bodies(serialize(made))
    found = strict(once)
    assert found["request"]["body"] == "QQ=="
    assert not {"body", "transfer_encoding"} & set(found["response"])
    left_out = {"size_bytes": 9, "left_out": "event_too_large"}
    assert found["metadata"] == {"k": 1, "moesif_otel": {"outcome": "error", "response_body": left_out}}
    twice = without_bodies(once)
    assert "body" not in strict(twice)["request"]
    assert set(strict(twice)["metadata"]["moesif_otel"]) == {"outcome", "request_body", "response_body"}
    assert without_bodies(twice) == twice
    assert without_bodies(serialize(event())) == serialize(event())


@given(ODD)
def test_a_snapshot_shares_nothing(value: Any) -> None:
    """It is plain JSON, and what becomes of the original does not reach it."""
    taken = snapshot([value])
    orjson.dumps(taken)
    if isinstance(value, dict):
        value.clear()
    assert orjson.dumps(taken) == orjson.dumps(snapshot(taken))


def test_a_snapshot_is_never_deeper_than_a_server_takes() -> None:
    """The sandbox, and many a server, refuse an event for its depth."""

    def depth(value: Any) -> int:
        return 1 + depth(value[0]) if isinstance(value, list) and value else 1

    for levels in (10, 199, 230, 300, 5_000):
        assert depth(snapshot(deep(levels))) <= 202


def documented_mask(made: MoesifEvent) -> MoesifEvent:
    """The example of Moesif's documentation."""
    if "password" in made.response.body:
        made.response.body["password"] = None
    if "password" in made.request.body:
        made.request.body["password"] = None
    return made


def test_the_documented_mask_works_on_every_call() -> None:
    """With bodies, without, and without any response; what was absent is absent again."""
    made = event()
    show_absent_bodies(made)
    documented_mask(made)
    hide_absent_bodies(made)
    assert made.response is None
    assert made.request.body is None
    made.response = EventResponseModel(
        time="t", status=200, headers={}, body={"password": "x", "a": 1}, transfer_encoding="json"
    )
    show_absent_bodies(made)
    documented_mask(made)
    hide_absent_bodies(made)
    assert made.response.body == {"password": None, "a": 1}


def test_an_empty_object_from_the_wire_is_sent() -> None:
    """Only what stands for nothing is left out; a mask's own body is sent."""
    made = event()
    made.request.body, made.request.transfer_encoding = {}, "json"
    made.response = EventResponseModel(status=204, headers={})
    show_absent_bodies(made)
    made.response.body["added"] = True
    hide_absent_bodies(made)
    assert made.request.body == {}
    assert made.response.body == {"added": True}
