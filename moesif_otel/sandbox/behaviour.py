"""Faults that the sandbox was told to make: to fail, to be slow, to hang, to drop connections.

Holds the list of behaviours, and which request gets which; `front.py` carries them out. Thread-safe.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from moesif_otel.sandbox.check import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Behaviour", "Behaviours"]


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """One thing to do wrong.

    Attributes:
        status: Answer this HTTP status instead of the real one.
        headers: Headers of that answer, or added to the real one.
        body: Text of that answer; a JSON error by default.
        delay_s: Wait this long before doing anything.
        hang: Do not answer until the behaviours change, the client leaves or the sandbox stops.
        disconnect: Close the connection without an answer.
        process_first: Take the request in as usual, and only then hang, disconnect or answer `status`: the
            client cannot know that its events arrived.
        times: How many requests get it; None is all.
        paths: Exact paths that get it, such as `/v1/events/batch`; empty is every path of Moesif's.
        max_bytes: Only requests with a decoded body over this get it; with no other fault it means status 413.
    """

    status: int | None = None
    headers: Mapping[str, str] | None = None
    body: str | None = None
    delay_s: float = 0.0
    hang: bool = False
    disconnect: bool = False
    process_first: bool = False
    times: int | None = None
    paths: tuple[str, ...] = ()
    max_bytes: int | None = None

    @classmethod
    def from_json(cls, value: Any) -> Behaviour:
        """Read a behaviour from JSON.

        Raises:
            Refusal: Status 400; names the field and what it takes.
        """
        if not isinstance(value, dict):
            raise Refusal(400, "wrong_type", "a behaviour must be an object")
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        for name, given in value.items():
            if name not in known:
                raise Refusal(
                    400, "unknown_field", f"unknown field {name!r}; known: {', '.join(sorted(known))}", field=name
                )
            if given is None:
                continue
            takes = _fault(name, given)
            if takes:
                raise Refusal(400, "wrong_value", f"{name} must be {takes}", field=name)
            values[name] = tuple(given) if name == "paths" else given
        found = cls(**values)
        if found.max_bytes is not None and not (found.status or found.delay_s or found.hang or found.disconnect):
            return cls(**{**values, "status": 413})
        return found

    def as_json(self) -> dict[str, Any]:
        """Return what was set."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


def _fault(name: str, given: Any) -> str | None:
    number = isinstance(given, (int, float)) and not isinstance(given, bool)
    whole = isinstance(given, int) and not isinstance(given, bool)
    rows: dict[str, tuple[bool, str]] = {
        "status": (whole and 200 <= given <= 599, "a status from 200 to 599"),
        "headers": (
            isinstance(given, dict) and all(isinstance(text, str) for text in given.values()),
            "a map of strings",
        ),
        "body": (isinstance(given, str), "a string"),
        "delay_s": (number and 0 <= given <= 3600, "seconds from 0 to 3600"),
        "times": (whole and given >= 1, "a whole number of at least 1"),
        "paths": (
            isinstance(given, (list, tuple)) and all(isinstance(path, str) for path in given),
            "a list of paths",
        ),
        "max_bytes": (whole and given >= 0, "a whole number of at least 0"),
    }
    fits, takes = rows.get(name, (isinstance(given, bool), "true or false"))
    return None if fits else takes


class Behaviours:
    """The behaviours in force, in order; the first one that fits a request is used. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: list[tuple[Behaviour, int | None]] = []
        self._generation = 0

    @property
    def generation(self) -> int:
        """Grows at each change: a request that hangs is answered then."""
        return self._generation

    def replace(self, behaviours: Iterable[Behaviour]) -> None:
        """Put these in force instead of all others; none means behave well."""
        with self._lock:
            self._left = [(behaviour, behaviour.times) for behaviour in behaviours]
            self._generation += 1

    def take(self, path: str, decoded_bytes: int) -> Behaviour | None:
        """Return the behaviour for a request, counting it off."""
        with self._lock:
            for place, (behaviour, left) in enumerate(self._left):
                if behaviour.paths and path not in behaviour.paths:
                    continue
                if behaviour.max_bytes is not None and decoded_bytes <= behaviour.max_bytes:
                    continue
                if left is not None:
                    self._left[place : place + 1] = [(behaviour, left - 1)] if left > 1 else []
                return behaviour
        return None

    def as_json(self) -> list[dict[str, Any]]:
        """Return what is in force; `times` is how often it still will be."""
        with self._lock:
            return [{**b.as_json(), **({} if left is None else {"times": left})} for b, left in self._left]
