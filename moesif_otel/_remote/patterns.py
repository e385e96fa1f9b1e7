"""Regular expressions that other people wrote, matched against text that yet other people sent, in bounded time.

Owns: compiling an expression of a rule or of the configuration, and asking whether it matches.
Threads: a pattern is shared by every thread; its few counters may lose an increment and nothing else.
Never: lets one search take over `SEARCH_LIMIT_S`, or the searches of one request over `REQUEST_LIMIT_S`.

Which engine, and why (tried in November 2026):

* `re` has no time limit: `^(a+)+$` on 40 characters does not return.
* `google-re2` is linear, but has no lookaheads and no back references (both are documented for `re.search`), and no
  wheel for musl, so that `pip install` on Alpine would want a C++ compiler and Abseil: too much for a core install.
* `regex` takes what `re` takes and JavaScript's `(?<name>…)` too, has wheels for every platform that Python has, no
  dependencies, and a time limit that is measured in CPU time: a busy machine does not make it fire. Its limit does not
  cover compiling: `expressions` does. 60,000 searches with random hostile expressions took 17 ms at most.

Most expressions in real rules are plain text (`GET`, `^/api/v1/`, `.*users.*`): those never reach an engine.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import Final, Protocol

import regex

from moesif_otel._remote.expressions import PatternError, for_engine

__all__ = [
    "MAX_TEXT_CHARS",
    "REQUEST_LIMIT_S",
    "SEARCH_LIMIT_S",
    "Allowance",
    "OutOfTimeError",
    "Pattern",
    "PatternError",
    "compile_pattern",
]

MAX_TEXT_CHARS: Final = 8_192
"""Of a longer text (URI, header, body value) the first so many characters are looked at."""
SEARCH_LIMIT_S: Final = 0.010
"""Most CPU seconds of one search; an ordinary one takes 0.000002."""
REQUEST_LIMIT_S: Final = 0.025
"""Most CPU seconds of all searches of one request, or of one sampling decision."""

# An expression that runs out of time this often in a row does so on ordinary traffic: it rests, and is tried again.
_STRIKES: Final = 20
_REST_S: Final = 60.0

_WARM_UP: Final = "\0" * MAX_TEXT_CHARS

_PLAIN: Final = re.compile(r"(?:[\w/ ,:;=@%&!~<>'\"-]|\\[^\w\s])*")
_ANY_START: Final = re.compile(r"\.\*\??(?![+?*{])")


class OutOfTimeError(Exception):
    """A search was given up; whatever depends on it is skipped."""


class Allowance:
    """CPU time that the searches of one request may still take."""

    __slots__ = ("remaining_s",)

    def __init__(self, limit_s: float = REQUEST_LIMIT_S) -> None:
        self.remaining_s = limit_s


class Pattern(Protocol):
    """A compiled expression."""

    def matches(self, text: str, allowance: Allowance) -> bool:
        """Say whether the expression is found in the text, as `re.search` would.

        Raises:
            OutOfTimeError: It cannot be said in the time that is left.
        """
        ...


def compile_pattern(expression: str) -> Pattern:
    """Compile an expression written for `re.search`.

    Args:
        expression: The expression; JavaScript's named groups and Unicode classes are taken as well.

    Raises:
        PatternError: It is not valid, too long, or too deep.
    """
    literal = _as_literal(_without_free_ends(expression))
    return literal if literal is not None else _Engine(expression)


class _Literal:
    """Plain text, perhaps tied to the start or the end: no engine, no limit needed."""

    __slots__ = ("_at_end", "_at_start", "_literal")

    def __init__(self, literal: str, *, at_start: bool, at_end: bool) -> None:
        self._literal = literal
        self._at_start = at_start
        self._at_end = at_end

    def matches(self, text: str, allowance: Allowance) -> bool:  # noqa: ARG002 - plain text needs no limit
        if not self._at_end:
            return text.startswith(self._literal) if self._at_start else self._literal in text
        # `$` is also found before a newline that ends the text.
        ends = (text, text[:-1]) if text.endswith("\n") else (text,)
        if self._at_start:
            return self._literal in ends
        return any(end.endswith(self._literal) for end in ends)


class _Engine:
    """An expression that needs an engine, under a time limit."""

    __slots__ = ("_compiled", "_rests_until_s", "_start", "_strikes")

    def __init__(self, expression: str) -> None:
        try:
            self._compiled = regex.compile(for_engine(expression))
            # Builds the engine's search tables here, on our own thread and with the GIL given up: see `expressions`.
            with suppress(TimeoutError):
                self._compiled.search(_WARM_UP, timeout=SEARCH_LIMIT_S, concurrent=True)
        except PatternError:
            raise
        # `regex` raises more than its own error on odd input; the other rules shall be compiled in any case.
        except Exception as exc:
            raise PatternError("invalid expression") from exc
        self._start = _fixed_start(expression)
        self._strikes = 0
        self._rests_until_s = 0.0

    def matches(self, text: str, allowance: Allowance) -> bool:
        if not text.startswith(self._start):
            return False
        if allowance.remaining_s <= 0.0 or (self._rests_until_s and self._resting()):
            raise OutOfTimeError
        limit_s = min(SEARCH_LIMIT_S, allowance.remaining_s)
        began_s = time.perf_counter()
        try:
            # concurrent=False keeps the GIL: giving it up 200 times a request would cost up to 5 ms each time.
            found = self._compiled.search(text, timeout=limit_s, concurrent=False) is not None
        except TimeoutError:
            allowance.remaining_s -= limit_s
            self._strike()
            raise OutOfTimeError from None
        except MemoryError:
            self._strike()
            raise OutOfTimeError from None
        # At most the limit: another thread may have run in between, and that is not the expression's doing.
        allowance.remaining_s -= min(time.perf_counter() - began_s, limit_s)
        self._strikes = 0
        return found

    def _strike(self) -> None:
        self._strikes += 1
        if self._strikes >= _STRIKES:
            self._strikes = 0
            self._rests_until_s = time.monotonic() + _REST_S

    def _resting(self) -> bool:
        if time.monotonic() < self._rests_until_s:
            return True
        self._rests_until_s = 0.0
        return False


def _without_free_ends(expression: str) -> str:
    """Take a `.*` off both ends: it may match nothing, so a search finds the same without it."""
    begin = _ANY_START.match(expression)
    if begin:
        expression = expression[begin.end() :]
    if expression.endswith(".*"):
        rest = expression[:-2]
        if (len(rest) - len(rest.rstrip("\\"))) % 2 == 0:
            return rest
    return expression


def _as_literal(expression: str) -> _Literal | None:
    at_start = expression.startswith("^")
    middle = expression[at_start:]
    at_end = middle.endswith("$") and not middle.endswith("\\$")
    middle = middle[:-1] if at_end else middle
    if _PLAIN.fullmatch(middle) is None:
        return None
    return _Literal(re.sub(r"\\(.)", r"\1", middle), at_start=at_start, at_end=at_end)


def _fixed_start(expression: str) -> str:
    """Give the plain text that every match begins the text with; "" where that is not plain to see."""
    if not expression.startswith("^") or "|" in expression or "(?" in expression:
        return ""
    plain = _PLAIN.match(expression, 1)
    end = plain.end() if plain else 1
    # The last character may belong to a quantifier, and an escape is two characters: leave both out.
    return expression[1 : max(1, end - 1)].partition("\\")[0]
