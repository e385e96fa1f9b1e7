"""How many calls one span stands for, as its sampler noted it.

Owns: reading the `ot` entry of a W3C trace state.
Threads: any; a pure function.
Never: raises for a malformed entry.
"""

from __future__ import annotations

from typing import Final

__all__ = ["weight_of"]

# OpenTelemetry specification, "TraceState: probability sampling": a rejection threshold of 56 bits, in up to 14
# hexadecimal digits whose trailing zeros are left out. Probability is 1 - threshold / 2**56.
_DIGITS: Final = 14
_HEXADECIMAL: Final = frozenset("0123456789abcdefABCDEF")
_FULL: Final = 1 << 56
# Its predecessor: `p:n`, probability 2**-n; 63 stands for zero.
_MAX_EXPONENT: Final = 62
_MAX_WEIGHT: Final = (1 << 31) - 1


def weight_of(entry: str | None) -> int:
    """Give one over the sampling probability of a trace state's `ot` entry, rounded; 1 where it does not tell."""
    for member in (entry or "").split(";"):
        name, _, value = member.partition(":")
        if name == "th" and 0 < len(value) <= _DIGITS and _HEXADECIMAL.issuperset(value):
            threshold = int(value, 16) << 4 * (_DIGITS - len(value))
            return min(max(round(_FULL / (_FULL - threshold)), 1), _MAX_WEIGHT)
        if name == "p" and value.isascii() and value.isdecimal() and len(value) <= 2 and int(value) <= _MAX_EXPONENT:
            return min(1 << int(value), _MAX_WEIGHT)
    return 1
