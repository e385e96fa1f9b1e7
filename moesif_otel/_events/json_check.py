"""Checks that bytes are JSON which other JSON can embed, without building the value: the largest cost of an event."""

from __future__ import annotations

import re
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import orjson

from moesif_otel._guard import LATE_IMPORTS
from moesif_otel._redaction.budget import MAX_DEPTH
from moesif_otel._redaction.text import is_json

if TYPE_CHECKING:
    from collections.abc import Callable

_validators: Final[list[Callable[[bytes], object]]] = []

# What is left of a text for the checks that msgspec leaves to us: every digit is `0`, every opening bracket `[`.
_SHAPE: Final = bytes(
    ord("0") if code in b"0123456789" else ord("e") if code in b"eE" else ord("[") if code in b"[{" else ord(" ")
    for code in range(256)
)
# Numbers beyond the range of a float are JSON by the grammar, and refused by orjson and by many servers. They have an
# exponent of three digits, or some three hundred digits in a row.
_VAST_EXPONENT: Final = b"0e000"
_VAST_DIGITS: Final = b"0" * 200

_NOT_STRUCTURE: Final = bytes(set(range(256)) - set(b'"[]{}'))
_ESCAPES: Final = re.compile(rb"\\.", re.DOTALL)
_STRINGS: Final = re.compile(rb'"[^"]*"')
_ROUNDS: Final = 8
_STEPS: Final = tuple(1 if code in b"[{" else -1 for code in range(256))


def is_embeddable(data: bytes) -> bool:
    """Tell whether `data` is one JSON text in UTF-8 that orjson and other parsers take, also inside of other JSON.

    At most `MAX_DEPTH` levels deep, then. Never raises.
    """
    if not _validators:
        return is_json(data) and not is_too_deep(data)
    if not data.isascii():
        # msgspec does not look at the encoding inside of strings.
        try:
            data.decode()
        except UnicodeDecodeError:
            return False
    try:
        _validators[0](data)
    except (ValueError, RecursionError):
        return False
    shape = data.translate(_SHAPE, b"+")
    # `find`, since `in` tries its argument as a number first, and raises within.
    if (shape.find(_VAST_EXPONENT) >= 0 or shape.find(_VAST_DIGITS) >= 0) and not is_json(data):
        return False
    return shape.count(b"[") <= MAX_DEPTH or not is_too_deep(data)


def is_too_deep(data: bytes) -> bool:
    """Tell whether valid JSON is nested deeper than `MAX_DEPTH`."""
    if len(data) <= MAX_DEPTH or data.count(b"{") + data.count(b"[") <= MAX_DEPTH:
        return False
    if b"\\" in data:
        data = _ESCAPES.sub(b"", data)
    # Taking out two quotes that have come to stand together changes nothing for what stands outside of strings.
    brackets = data.translate(None, _NOT_STRUCTURE).replace(b'""', b"")
    if b'"' in brackets:
        brackets = _STRINGS.sub(b"", brackets)
    left = brackets
    for _ in range(_ROUNDS):
        # Each round takes the innermost level or two away: most bodies are flat, and need no closer look.
        left = left.replace(b"{}", b"").replace(b"[]", b"")
        if len(left) <= 2 * (MAX_DEPTH - 2 * _ROUNDS):
            return False
    return max(accumulate(map(_STEPS.__getitem__, brackets))) > MAX_DEPTH


def load_validator() -> None:
    """Import what is faster with large bodies, for a thread that nobody waits for: it takes some 20 ms, once."""
    if not _validators:
        try:
            with LATE_IMPORTS:
                import msgspec
        except ImportError:  # where it has no wheels
            _validators.append(orjson.loads)
        else:
            _validators.append(msgspec.json.Decoder(msgspec.Raw).decode)
