"""Events as JSON, whatever they hold: one odd value of metadata never loses an event, or makes invalid JSON."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from typing import Any, Final

import orjson

OUR_KEY: Final = "moesif_otel"
"""The one key under which everything that we add to an event's metadata lies."""

# orjson gives up at 254 levels (its README, "serialize"); what lies deeper than this is replaced by a remark.
_MAX_DEPTH: Final = 200
# A value that holds the same list many times over can unfold without end; this is far above any event of 1 MB.
_MAX_NODES: Final = 200_000
_TOO_DEEP: Final = "(nested too deeply)"
_TOO_MANY: Final = "(too many values)"
_CYCLE: Final = "(refers to itself)"
_INT64: Final = 1 << 63
_UINT64: Final = 1 << 64
_LONG_INTEGER: Final = re.compile(rb"[0-9]{19}")
_WITH_BODIES: Final = frozenset({"request", "response"})


def sound_text(text: str) -> str:
    """Return `text` as valid Unicode: surrogate pairs are joined, lone surrogates become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        # Not UTF-16-LE, whose codec Python would import now: a fork could leave it half imported.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def serialize(event: dict[str, Any]) -> bytes:
    """Return an event as the JSON object that Moesif takes.

    What JSON cannot hold is turned into the nearest thing that it can: dates and UUIDs into text, sets into lists,
    bytes into text, NaN and infinities into null, metadata's numbers beyond 64 bits into text (a body's stay numbers),
    other objects into `str(value)`. Never raises.
    """
    try:
        text = orjson.dumps(event, default=_default)
    except (TypeError, ValueError, RecursionError):
        # One by one, so that metadata without end leaves the other fields alone.
        text = orjson.dumps({name: plain(value, digits=name in _WITH_BODIES) for name, value in event.items()})
    # A copy of the right size: orjson cuts its result from a larger block, and the cuttings lie idle between events
    # that wait (4.6 KB of memory for an event of 0.5 KB, measured with 10,000 of them; 1.0 KB so).
    return bytes(memoryview(text))


def parsed_json(text: bytes) -> Any:
    """Parse valid JSON; whole numbers keep their digits, which orjson makes floats beyond 64 bits."""
    if _LONG_INTEGER.search(text) is None:
        return orjson.loads(text)
    return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int | float:
    # Python's own conversion is quadratic, and refuses thousands of digits.
    return int(digits) if len(digits) <= 1_000 else float(digits)


def snapshot(value: Any) -> Any:
    """Return a JSON value as it is now, sharing nothing with `value`, at most 200 levels deep. Never raises."""
    try:
        text = orjson.dumps(value, default=_default)
    except (TypeError, ValueError, RecursionError):
        return plain(value)
    if text.count(b"[") + text.count(b"{") > _MAX_DEPTH:
        return plain(value)  # it may be deeper than that
    return orjson.loads(text)


def json_bytes(value: Any) -> int:
    """Return how many bytes a value takes as JSON; 0 where it cannot be said."""
    try:
        return len(orjson.dumps(value, default=_default))
    except (TypeError, ValueError, RecursionError):
        return 0


def as_mapping(value: Any) -> dict[Any, Any]:
    """Return a new dict with the items of a mapping of any kind; `{"value": value}` for anything else."""
    try:
        return {**value}
    except Exception:
        return {"value": value}


def _default(value: Any) -> Any:
    """Return something that orjson knows for a value that it does not; the result may need `_default` again."""
    if isinstance(value, (set, frozenset)):
        return list(value)
    if isinstance(value, memoryview):
        return text_of(bytes(value))
    with suppress(Exception):
        if hasattr(value, "keys") and hasattr(value, "__getitem__"):
            return {key: value[key] for key in value.keys()}  # noqa: SIM118 - a mapping by its protocol, not by type
    return text_of(value)


def text_of(value: Any) -> str:
    """Return any value as text. Never raises."""
    if isinstance(value, str):
        return value
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).decode("utf-8", "replace")
    try:
        return sound_text(str(value))
    except Exception:
        # `str` of a foreign object may do anything; ints of over 4300 digits raise too.
        return f"({type(value).__name__})"


def plain(value: Any, *, digits: bool = False) -> Any:
    """Return a copy of `value` made of what orjson is sure to take; cycles, depth and size are bounded.

    Slower than orjson's own way, for what that refused. With `digits`, whole numbers beyond 64 bits stay numbers, as
    JSON that orjson only embeds; otherwise they become text.
    """
    return _Plainer(digits=digits).convert(value, 0)


class _Plainer:
    """One conversion: remembers what it is inside of, and how much it has made."""

    __slots__ = ("_digits", "_inside", "_left")

    def __init__(self, *, digits: bool) -> None:
        self._digits = digits
        self._inside: set[int] = set()
        self._left = _MAX_NODES

    def convert(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is str:
            return sound_text(value)
        if value is None or kind is bool or kind is orjson.Fragment:
            return value
        if kind is int:
            if -_INT64 <= value < _UINT64:
                return value
            text = text_of(value)
            return orjson.Fragment(text) if self._digits and text[-1].isdigit() else text
        if kind is float:
            return value if math.isfinite(value) else None
        if depth >= _MAX_DEPTH:
            return _TOO_DEEP
        if id(value) in self._inside:
            return _CYCLE
        self._inside.add(id(value))
        try:
            return self._container(value, depth + 1)
        except Exception:
            return text_of(value)
        finally:
            self._inside.discard(id(value))

    def _container(self, value: Any, depth: int) -> Any:
        if isinstance(value, (dict, list, tuple, set, frozenset)):
            self._left -= 1 + len(value)
            if self._left < 0:
                return _TOO_MANY
        if isinstance(value, dict):
            return {self._key(key): self.convert(inner, depth) for key, inner in list(value.items())}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.convert(inner, depth) for inner in list(value)]
        try:
            # Dates, UUIDs, enums, dataclasses: orjson's own reading of them where it has one.
            return orjson.loads(orjson.dumps(value))
        except (TypeError, ValueError, RecursionError):
            changed = _default(value)
            return self.convert(changed, depth) if not isinstance(changed, str) else sound_text(changed)

    @staticmethod
    def _key(key: Any) -> str:
        if isinstance(key, str):
            return sound_text(str(key))
        return orjson.dumps(key).decode() if key is None or isinstance(key, (bool, float)) else text_of(key)


def without_bodies(payload: bytes) -> bytes:
    """Return a serialised event without its larger body, for a server that finds it too large.

    Called again with what it returned it leaves out the other body, too; with no body left it returns its argument.
    `metadata.moesif_otel` says what was left out. Never raises for what `serialize` made.
    """
    event = parsed_json(payload)
    parts = [event[name] for name in ("request", "response") if isinstance(event.get(name), dict)]
    parts = [part for part in parts if part.get("body") is not None]
    if not parts:
        return payload
    largest = max(parts, key=_body_bytes)
    side = "response_body" if largest is event.get("response") else "request_body"
    size_bytes = _body_bytes(largest)
    largest.pop("body")
    largest.pop("transfer_encoding", None)
    metadata = event.get("metadata")
    event["metadata"] = metadata = metadata if isinstance(metadata, dict) else {}
    ours = metadata.get(OUR_KEY)
    metadata[OUR_KEY] = ours = ours if isinstance(ours, dict) else {}
    said = ours.get(side)
    ours[side] = {"size_bytes": size_bytes, **(said if isinstance(said, dict) else {}), "left_out": "event_too_large"}
    return serialize(event)


def _body_bytes(part: dict[str, Any]) -> int:
    body = part["body"]
    return len(body) if isinstance(body, str) else len(orjson.dumps(plain(body)))
