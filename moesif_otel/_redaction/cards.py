"""Recognises card numbers."""

from __future__ import annotations

import re
from typing import Final

# Digits, maybe in groups: `4111 1111 …`, `4111-1111-…`, with up to three separators between two of them.
_DIGITS: Final = re.compile(r"[0-9]+(?:[ \-+._\u00a0\t]{1,3}[0-9]+)*", re.ASCII)
_GROUP: Final = re.compile(r"[0-9]+", re.ASCII)
_SEPARATORS: Final = re.compile(r"[^0-9]+", re.ASCII)
_SHORTEST, _LONGEST = 12, 19
# A longer run is not inspected: where cards are expected, it counts as one.
_MAX_RUN_DIGITS: Final = 24
_MAX_GROUPS: Final = 10
_DOUBLED: Final = bytes(sum(divmod(2 * (code - 48), 10)) if 48 <= code < 58 else 0 for code in range(256))
_MAX_CUT_DIGITS: Final = 6


def has_card_number(text: str, *, cut: bool = False) -> bool:
    """Tell whether 12 to 19 digits (ISO/IEC 7812), maybe in groups, whose Luhn check digit is right stand in `text`.

    `cut`: its end was cut off, maybe inside a number.
    """
    for match in _DIGITS.finditer(text):
        run = match[0]
        if cut and match.end() == len(text.rstrip()) and len(run) >= _MAX_CUT_DIGITS:
            return True
        if len(run) >= _SHORTEST:
            digits = _SEPARATORS.sub("", run)
            if len(digits) == len(run):
                if len(run) <= _LONGEST and _luhn(run):
                    return True
            elif len(digits) > _MAX_RUN_DIGITS or (len(digits) >= _SHORTEST and _groups_hold_card(run)):
                return True
    return False


def _groups_hold_card(run: str) -> bool:
    groups = _GROUP.findall(run)
    if len(groups) > _MAX_GROUPS:
        return True
    for first in range(len(groups)):
        digits = ""
        for group in groups[first:]:
            digits += group
            if len(digits) > _LONGEST:
                break
            if len(digits) >= _SHORTEST and _luhn(digits):
                return True
    return False


def _luhn(digits: str) -> bool:
    data = digits.encode("ascii")
    return (sum(data[-1::-2]) - 48 * len(data[-1::-2]) + sum(data[-2::-2].translate(_DOUBLED))) % 10 == 0


def number_digits(number: str) -> str:
    """Return the digits of a JSON number that is whole, without its exponent: `4.111e15` is `4111000…`.

    A number with digits behind the point is no card's; it has none.
    """
    mantissa, _, exponent = number.lower().partition("e")
    whole, _, fraction = mantissa.lstrip("-").partition(".")
    digits, places = whole + fraction, len(whole)
    if exponent.lstrip("+-").isdecimal() and len(exponent) < 4:
        places += int(exponent)
    if places >= len(digits):
        return digits + "0" * min(places - len(digits), _LONGEST)
    places = max(places, 0)
    return "" if digits[places:].strip("0") else digits[:places]
