"""JSON as the sandbox reads and writes it: whole numbers of any size survive, and depth has a bound.

orjson does the work; it turns whole numbers beyond 64 bits into floats, and writes no more than 254 levels.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

import orjson

from moesif_otel.sandbox.check import Refusal

__all__ = ["MAX_DEPTH", "indented", "read_json", "write_json"]

MAX_DEPTH: Final = 250
"""Levels of nesting that the sandbox takes; what lies deeper is refused with 400, `too_deep`."""

_MANY_DIGITS: Final = re.compile(rb"\d{19}")
_MAX_DIGITS: Final = 4_000  # Python refuses to convert more, and takes long


def read_json(text: bytes) -> Any:
    """Parse JSON.

    Raises:
        Refusal: Status 400, for what is no JSON or nested too deeply.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if "depth" in str(error) or "recursion" in str(error).lower():
            raise _too_deep() from None
        raise Refusal(400, "bad_json", f"the body is not JSON: {error}") from None
    if _MANY_DIGITS.search(text):
        try:
            return json.loads(text, parse_int=_whole_number)
        except RecursionError:
            raise _too_deep() from None
    return value


def write_json(value: Any) -> bytes:
    """Write JSON that `read_json` returned.

    Raises:
        Refusal: Status 400, for what is nested too deeply.
    """
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        if "64-bit" not in str(error):
            raise _too_deep() from None
    if _is_deep(value):
        raise _too_deep()
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def indented(value: Any) -> str:
    """Write JSON that `read_json` returned for a person: with line breaks."""
    try:
        return orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()
    except orjson.JSONEncodeError:
        return json.dumps(value, ensure_ascii=False, indent=2)


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) < _MAX_DIGITS else float(digits)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


def _too_deep() -> Refusal:
    return Refusal(400, "too_deep", f"the JSON is nested more than {MAX_DEPTH} levels deep")
