"""Matches regular expressions from rules against text from clients, in bounded time.

Python's `re` has no time limit: `^(a+)+$` on 40 characters does not return. `google-re2` is linear, but has no
lookaheads, no back references and no wheel for musl. `regex` accepts what `re` accepts and JavaScript's `(?<name>…)`
too, has wheels for every platform, and has a time limit in CPU time. Before `regex` compiles an expression, we check
it, and rewrite it where `regex` differs from `re` (tested with 2023.12 to 2026.11):

* `{id}` in `/users/{id}` is an error, `{e}` is fuzzy matching, `[[:alpha:]]` is a POSIX class. Braces and brackets that
  `re` takes literally are escaped.
* Counted repetitions are unrolled: `(?:(?:a{100}b){100}c){100}` takes 285 MB. So the unrolled size is limited.
* Search tables for long literals are built in cubic time, outside the time limit (15 s for 4,000 characters, 0.2 s for
  1,000). So the length of an expression is limited, and the first search is made at compile time.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from moesif_otel._guard import LATE_IMPORTS

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_EXPRESSION_CHARS: Final = 1_000  # a longer expression is refused
# The most items that an expression may have after its counted repetitions are unrolled.
MAX_UNROLLED_SIZE: Final = 2_000
SEARCH_LIMIT_S: Final = 0.010  # the most CPU time of one search; an ordinary one takes 2 µs
REQUEST_LIMIT_S: Final = 0.025  # the CPU time for all searches of one request, or of one sampling decision
# Each search gets at least this: slow input for one expression must not switch the others off.
LEAST_LIMIT_S: Final = 0.0005
SLOW_LIMIT_S: Final = 0.002  # the most CPU time of a search whose expression has run out of time within the last minute

_SLOW_FOR_S: Final = 60.0
_WARM_UP: Final = "\0" * 8_192

_TOKEN: Final = re.compile(
    r"""
      (?P<escape> \\ (?: [NpPxu]\{[^{}]*\} | . ) )
    | (?P<class>  \[ \^? \]? (?: \\. | [^\\\]] )* \] )
    | (?P<note>   \(\?\# [^)]* \) | \(\? [aiLmsux]+ \) )              # comment, flags for the whole expression
    | (?P<again>  \(\?P= \w+ \) )                                     # back reference by name
    | (?P<open>   \( (?: \? (?: [:=!>] | <[=!] | P?<\w+> | [aiLmsux]* (?: -[imsx]+ )? : | \(\w+\) ) | (?!\?) ) )
    | (?P<close>  \) )
    | (?P<count>  \{ (?!\}) (?P<least>\d*) (?P<comma>,?) (?P<most>\d*) \} )
    | (?P<repeat> [*+?] )
    | (?P<edge>   [\^$] )
    | (?P<bar>    \| )
    | (?P<other>  (?! \(\? | \[ | \\ ) . )
    """,
    re.VERBOSE | re.DOTALL,
)
_ANY_START: Final = re.compile(r"\.\*\??(?![+?*{])")
# Without alternatives, repetitions and groups, a search takes at most (characters of the expression) x (characters of
# the text) steps. If that is small, it needs no time limit, whose clock is most of the cost (2.0 µs; 0.1 µs without).
_SIMPLE: Final = frozenset({"escape", "class", "edge", "other"})
_MAX_UNTIMED_STEPS: Final = 200_000  # a fifth of a millisecond, at worst


class RuleError(ValueError):
    """A rule, or an entry of the configuration, cannot be used; the message is fixed text, without the expression."""


class OutOfTimeError(Exception):
    """A search ran out of time, so its condition is undecided."""


class Allowance:
    """The CPU time that the searches of one request may still take."""

    __slots__ = ("remaining_s",)

    def __init__(self, limit_s: float = REQUEST_LIMIT_S) -> None:
        self.remaining_s = limit_s


class Pattern:
    """An expression written for `re.search`; JavaScript's named groups and Unicode classes are accepted too.

    Thread-safe: its only mutable state is a time, for which a race does no harm.

    Raises:
        RuleError: The expression is invalid, too long or too large.
    """

    __slots__ = ("_search", "_slow_until_s", "_untimed", "_untimed_chars")
    _untimed: Callable[[str], Any]

    def __init__(self, expression: str) -> None:
        with LATE_IMPORTS:
            import regex  # late: most services have no rules, and importing it takes long

        self._slow_until_s = 0.0
        self._untimed_chars = _MAX_UNTIMED_STEPS // (len(expression) + 1)
        source, kinds = _for_engine(_without_free_ends(expression))
        try:
            compiled = regex.compile(source)
            # Builds the engine's search tables here, on our own thread and with the GIL released.
            with suppress(TimeoutError):
                compiled.search(_WARM_UP, timeout=SEARCH_LIMIT_S, concurrent=True)
        # `regex` raises more than its own error on odd input; the other rules must still be compiled.
        except Exception as exc:
            raise RuleError("invalid expression") from exc
        self._search = self._untimed = compiled.search
        if not kinds <= _SIMPLE:
            self._untimed_chars = -1
        elif "class" not in kinds:  # of which `re` warns, since they may mean something else one day
            with suppress(re.error):
                self._untimed = re.compile(source).search  # the same, in half the time

    def matches(self, text: str, allowance: Allowance) -> bool:
        """Return whether the expression is found in the text, as `re.search` would find it.

        Raises:
            OutOfTimeError: The search did not finish in time.
        """
        if len(text) <= self._untimed_chars:
            return self._untimed(text) is not None
        limit_s = min(SEARCH_LIMIT_S, max(allowance.remaining_s, LEAST_LIMIT_S))
        began_s = time.perf_counter()
        if self._slow_until_s > began_s:
            # The rule stays in force, with a limit that ordinary texts never reach: a client that sends slow texts
            # again and again can neither switch the rule off nor cost 10 ms each time.
            limit_s = min(limit_s, SLOW_LIMIT_S)
        try:
            # concurrent=False keeps the GIL: releasing it 200 times per request would cost up to 5 ms each time.
            found = self._search(text, timeout=limit_s, concurrent=False) is not None
        except (TimeoutError, MemoryError):
            allowance.remaining_s -= limit_s
            self._slow_until_s = time.perf_counter() + _SLOW_FOR_S
            raise OutOfTimeError from None
        # At most the limit: another thread may have run in between, which is not the expression's fault.
        allowance.remaining_s -= min(time.perf_counter() - began_s, limit_s)
        return found


def _without_free_ends(expression: str) -> str:
    """Remove a `.*` at either end: it may match nothing, so a search finds the same without it, and faster."""
    begin = _ANY_START.match(expression)
    if begin:
        expression = expression[begin.end() :]
    if expression.endswith(".*"):
        rest = expression[:-2]
        if (len(rest) - len(rest.rstrip("\\"))) % 2 == 0:
            return rest
    return expression


def _for_engine(expression: str) -> tuple[str, set[str | None]]:
    """Return the expression rewritten so that `regex` reads it as `re` does, and the kinds of tokens in it.

    Raises:
        RuleError: It is too long or too large, or uses what neither `re` nor JavaScript has.
    """
    if len(expression) > MAX_EXPRESSION_CHARS:
        raise RuleError("expression over 1,000 characters")
    written: list[str] = []
    kinds: set[str | None] = set()
    size = _Size()
    position = 0
    while position < len(expression):
        token = _TOKEN.match(expression, position)
        if token is None:
            raise RuleError("invalid expression, or one that needs more than Python's re has")
        written.append(_rewritten(token))
        kinds.add(token.lastgroup)
        size.add(token)
        position = token.end()
    if size.total() > MAX_UNROLLED_SIZE:
        raise RuleError("expression with too many counted repetitions")
    return "".join(written), kinds


def _rewritten(token: re.Match[str]) -> str:
    text = token.group()
    if token.lastgroup == "other" and text == "{":
        return "\\{"
    if token.lastgroup == "class":
        # The first bracket opens the class; the others are members of it.
        return "[" + re.sub(r"\\.|\[", lambda m: "\\[" if m.group() == "[" else m.group(), text[1:], flags=re.DOTALL)
    return text


class _Size:
    """Counts the items of an expression, counted repetitions multiplied."""

    __slots__ = ("_last", "_open")

    def __init__(self) -> None:
        self._open = [0]
        self._last = 0  # size of what a count would multiply

    def add(self, token: re.Match[str]) -> None:
        kind = token.lastgroup
        if kind == "open":
            self._open.append(1)
        elif kind == "close":
            if len(self._open) == 1:
                raise RuleError("invalid expression")
            self._item(self._open.pop())
        elif kind == "count":
            times = int((token["most"] or token["least"] or "1")[:9])
            self._open[-1] += self._last * max(0, times - 1)
            self._last *= times
        elif kind not in {"repeat", "note", "bar"}:
            self._item(1)

    def _item(self, size: int) -> None:
        self._open[-1] += size
        self._last = size

    def total(self) -> int:
        return sum(self._open)
