"""Reading an expression before an engine does: what it means to `re`, and whether it is small enough to compile.

Owns: `for_engine`, which writes an expression for the `regex` package so that it means there what it means to `re`, and
refuses what could cost too much to compile.
Threads: any; pure.
Never: puts an expression into a message.

What `regex` does and `re` does not (tried with 2023.12 to 2026.11):

* `{id}` in `/users/{id}` is an error, `{e}` is fuzzy matching; `[[:alpha:]]` is a POSIX class: braces and brackets are
  escaped where `re` takes them as they stand.
* Counted repetitions are unrolled: `(?:(?:a{100}b){100}c){100}` takes 285 MB. So the unrolled size is limited.
* Search tables for long literals are built in cubic time, outside the time limit (15 s for 4,000 characters, 0.2 s for
  1,000). So expressions are short, and `patterns` makes the first search where they are compiled.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["MAX_EXPRESSION_CHARS", "MAX_UNROLLED_SIZE", "PatternError", "for_engine"]

MAX_EXPRESSION_CHARS: Final = 1_000
"""A longer expression is refused."""
MAX_UNROLLED_SIZE: Final = 2_000
"""Most single items of an expression when its counted repetitions are written out."""

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


class PatternError(ValueError):
    """The expression cannot be used; the message is fixed text without the expression."""


def for_engine(expression: str) -> str:
    """Write an expression so that `regex` reads it as `re` does.

    Raises:
        PatternError: It is too long or too large, or uses what neither `re` nor JavaScript has.
    """
    if len(expression) > MAX_EXPRESSION_CHARS:
        raise PatternError("expression over 1,000 characters")
    written: list[str] = []
    size = _Size()
    position = 0
    while position < len(expression):
        token = _TOKEN.match(expression, position)
        if token is None:
            raise PatternError("invalid expression, or one that needs more than Python's re has")
        written.append(_rewritten(token))
        size.add(token)
        position = token.end()
    if size.total() > MAX_UNROLLED_SIZE:
        raise PatternError("expression with too many counted repetitions")
    return "".join(written)


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
        """Count one token."""
        kind = token.lastgroup
        if kind == "open":
            self._open.append(1)
        elif kind == "close":
            if len(self._open) == 1:
                raise PatternError("invalid expression")
            self._item(self._open.pop())
        elif kind == "count":
            self._multiply(int((token["most"] or token["least"] or "1")[:9]))
        elif kind not in {"repeat", "note", "bar"}:
            self._item(1)

    def _item(self, size: int) -> None:
        self._open[-1] += size
        self._last = size

    def _multiply(self, times: int) -> None:
        self._open[-1] += self._last * max(0, times - 1)
        self._last *= times

    def total(self) -> int:
        """Give the size of the whole."""
        return sum(self._open)
