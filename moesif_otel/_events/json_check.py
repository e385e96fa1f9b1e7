"""Checks that bytes are valid JSON without building the value, which would be the largest cost of an event."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import orjson

from moesif_otel._guard import LATE_IMPORTS

if TYPE_CHECKING:
    from collections.abc import Callable

# Numbers beyond the range of a float are JSON by the grammar, and refused by orjson and by many servers. They have an
# exponent of three digits, or some two hundred digits in a row.
_SMALL_E: Final = bytes.maketrans(b"E", b"e")
_NOT_OF_NUMBERS: Final = bytes(set(range(256)) - set(b'eE0123456789"'))
_EXPONENT: Final = re.compile(rb"e(?<=[0-9]e)[0-9]{3}")  # begins with a letter, which `re` looks for first
_validators: Final[list[Callable[[bytes], object]]] = []
_SHORT_BYTES: Final = 2_048  # below, building the values costs no more than the checks that msgspec leaves to us
_SAMPLE_BYTES: Final = 64
_DIGITS: Final = re.compile(rb"[0-9](?=[0-9])")


def is_json(data: bytes) -> bool:
    """Tell whether `data` is one JSON text in UTF-8 that orjson and other parsers take. Never raises."""
    if len(data) < _SHORT_BYTES or not _validators:
        return _builds(data)
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
    return not _may_hold_vast_number(data) or _builds(data)


def _builds(data: bytes) -> bool:
    try:
        orjson.loads(data)
    except ValueError:
        return False
    return True


def _may_hold_vast_number(data: bytes) -> bool:
    if _EXPONENT.search(data.translate(_SMALL_E, _NOT_OF_NUMBERS)) is not None:
        return True
    if len(data) <= 2 * _SAMPLE_BYTES:
        return False
    sample = data[::_SAMPLE_BYTES]
    for match in _DIGITS.finditer(sample):
        at = match.start() * _SAMPLE_BYTES
        if data[at : at + _SAMPLE_BYTES].isdigit():
            return True
    return False


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
