"""An event as JSON bytes, whatever it holds.

Owns: `serialize`, `without_bodies`, and what becomes of values that JSON has no word for.
Threads: any; pure functions.
Never: fails, gives invalid JSON, or lets one odd metadata value lose an event.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import orjson

from moesif_otel._events.model import as_dictionary

if TYPE_CHECKING:
    from moesifapi.models import EventModel

__all__ = ["OUR_KEY", "plain", "serialize", "sound_text", "text_of", "without_bodies"]

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


def sound_text(text: str) -> str:
    """Give `text` as valid Unicode: surrogate pairs are joined, lone surrogates become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def serialize(event: EventModel) -> bytes:
    """Give an event as the JSON object that Moesif takes.

    What JSON cannot hold is turned into the nearest thing that it can: dates and UUIDs into text, sets into lists,
    bytes into text, NaN and infinities into null, numbers beyond 64 bits into text, other objects into `str(value)`.

    Args:
        event: A `MoesifEvent`, or any `EventModel` that a mask returned.

    Returns:
        UTF-8 JSON. Never raises. Thread-safe as long as nobody changes the event meanwhile.
    """
    tree = as_dictionary(event)
    _coerce(tree)
    try:
        text = orjson.dumps(tree, default=_default)
    except (TypeError, ValueError, RecursionError):
        # One by one, so that metadata without end leaves the other fields alone.
        text = orjson.dumps({name: plain(value) for name, value in tree.items()})
    # A copy of the right size: orjson cuts its result from a larger block, and the cuttings lie idle between events
    # that wait (4.6 KB of memory for an event of 0.5 KB, measured with 10,000 of them; 1.0 KB so).
    return bytes(memoryview(text))


def _coerce(tree: dict[str, Any]) -> None:
    metadata = tree.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        tree["metadata"] = _as_mapping(metadata)
    for name in ("user_id", "company_id", "session_token", "transaction_id", "trace_id"):
        value = tree.get(name)
        if value is not None and not isinstance(value, str):
            tree[name] = text_of(value)


def _as_mapping(value: Any) -> dict[Any, Any]:
    try:
        return {**value}
    except Exception:
        return {"value": value}


def _default(value: Any) -> Any:
    """Give orjson something it knows for a value that it does not; the result may need `_default` again."""
    if isinstance(value, (set, frozenset)):
        return list(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).decode("utf-8", "replace")
    try:
        if hasattr(value, "keys") and hasattr(value, "__getitem__"):
            return {key: value[key] for key in value.keys()}  # noqa: SIM118 - a mapping by its protocol, not by type
    except Exception:
        return text_of(value)
    return text_of(value)


def text_of(value: Any) -> str:
    """Give any value as text. Never raises."""
    if isinstance(value, str):
        return value
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).decode("utf-8", "replace")
    try:
        return sound_text(str(value))
    except Exception:
        # `str` of a foreign object may do anything; ints of over 4300 digits raise too.
        return f"({type(value).__name__})"


def plain(value: Any) -> Any:
    """Give a copy of `value` made of what orjson is sure to take; cycles, depth and size are bounded.

    Slower than orjson's own way, for what that refused.
    """
    return _Plainer().convert(value, 0)


class _Plainer:
    """One conversion: remembers what it is inside of, and how much it has made."""

    __slots__ = ("_inside", "_left")

    def __init__(self) -> None:
        self._inside: set[int] = set()
        self._left = _MAX_NODES

    def convert(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is str:
            return sound_text(value)
        if value is None or kind is bool or kind is orjson.Fragment:
            return value
        if kind is int:
            return value if -_INT64 <= value < _UINT64 else text_of(value)
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
        if key is None or isinstance(key, (bool, int, float)):
            return orjson.dumps(key).decode() if not isinstance(key, int) or isinstance(key, bool) else text_of(key)
        return text_of(key)


def without_bodies(payload: bytes) -> bytes:
    """Give a serialised event without its bodies, for a server that finds it too large.

    `metadata.moesif_otel` says that they were left out. Never raises for what `serialize` made.
    """
    tree = orjson.loads(payload)
    dropped = False
    for name in ("request", "response"):
        part = tree.get(name)
        if isinstance(part, dict) and part.pop("body", None) is not None:
            part.pop("transfer_encoding", None)
            dropped = True
    if not dropped:
        return payload
    metadata = tree.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    ours = metadata.get(OUR_KEY)
    metadata[OUR_KEY] = {**(ours if isinstance(ours, dict) else {}), "bodies_left_out": "event_too_large"}
    tree["metadata"] = metadata
    return orjson.dumps(plain(tree))
