"""Hides secrets in JSON text: they are replaced where they stand, and all else stays byte for byte.

No value is built, so that numbers keep their digits, names that stand twice are both seen, and a long text takes no
memory. The same function reads one JSON text, JSON Lines, JSON text sequences, and the first part of any of these.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final

from moesif_otel._redaction.budget import MAX_NODES, OverBudget
from moesif_otel._redaction.cards import has_card_number, number_digits
from moesif_otel._redaction.names import HIDDEN, Verdict

if TYPE_CHECKING:
    from moesif_otel._redaction.budget import Inspection
    from moesif_otel._redaction.rules import Rules

_CHARACTERS: Final = r'[^"\\\x00-\x1f]*(?:\\[^\x00-\x1f][^"\\\x00-\x1f]*)*'
_STRING: Final = rf'"({_CHARACTERS})"'
# These two match at every quote, closed or not: a search that went on behind a quote that nothing closes, to begin at
# each escaped quote after it, would take quadratic time.
_STRINGS: Final = re.compile(rf'"(?:({_CHARACTERS})"(\s*:)?)?')
_STRING_ENDS: Final = re.compile(rf'"{_CHARACTERS}("|\\?\Z|)')
_TOKENS: Final = re.compile(_STRING + r"(\s*:)?|([{\[])|([}\]])|(-?[0-9][0-9.eE+\-]*)|(\")")
_BRACKETS: Final = re.compile(_STRING + r"|([{\[])|([}\]])|(\")")
_VALUE: Final = re.compile(r"\s*(?:(" + _STRING + r")|([{\[])|([^\s,\]}\"{\[]+))?")
_NO_JSON: Final = re.compile(r"[^\s\[\]{},:0-9.+\-\x1eA-Za-z]")
_LETTERS: Final = re.compile(r"[A-Za-z]+")
_WORDS: Final = frozenset({"true", "false", "null", "NaN", "Infinity", "e", "E"})
# Without one of these a string holds no name with a value.
_MARKED: Final = re.compile(r"[=:%@<\\&'\-]")
_FOLLOWING: Final = re.compile(r"\s*,\s*(" + _STRING + r")(?!\s*:)")
_OPEN_QUOTE: Final = 6
_KEEPERS: Final = frozenset({"true", "false", "null"})
_HIDDEN_JSON: Final = f'"{HIDDEN}"'


def is_json_text(text: str) -> bool:
    """Tell whether a text has only tokens of JSON, to its end or to where it was cut."""
    pieces = _STRING_ENDS.split(text)
    ends = pieces[1::2]
    if "" in ends[:-1] or (ends and not ends[-1] and pieces[-1]):
        return False  # a string that a control character ends
    rest = "".join(pieces[::2])
    if _NO_JSON.search(rest) is not None:
        return False
    for match in _LETTERS.finditer(rest):
        word = match[0]
        if word not in _WORDS and not (match.end() == len(rest) and any(one.startswith(word) for one in _WORDS)):
            return False
    return True


def is_clean_json(rules: Rules, text: str) -> bool:
    """Tell, in a tenth of the time that hiding takes, whether valid JSON has nothing to hide; False means unknown.

    Many names look like a secret's to the quick scan: `records`, `max_tokens`, `coordinates`.
    """
    if '\\"' in text or "\\u" in text:
        return False
    # Every quote begins or ends a string; outside of strings a colon stands behind names only.
    pieces = text.split('"')
    if len(pieces) > MAX_NODES:
        return False
    values: set[str] = set()
    names: set[str] = set()
    for place in range(1, len(pieces) - 1, 2):
        (names if ":" in pieces[place + 1] else values).add(pieces[place])
    if any(rules.verdict(name) is not Verdict.KEEP for name in names):
        return False
    marked = [value for value in (*values, *names) if _MARKED.search(value) is not None]
    return not marked or not rules.may_concern_text("\n".join(marked))


def redact_json(look: Inspection, text: str, *, card: bool = False, cut: bool = False) -> str:
    """Return valid JSON, or a text of which `is_json_text` is true, with everything hidden.

    `card`: it lies below a name like a card's. `cut`: it may end anywhere; its end is dropped if it cannot be judged.
    """
    return _JsonPass(look, text, cut=cut).run(card=card)


class _JsonPass:
    """One pass over one text."""

    __slots__ = ("_at", "_cut", "_done", "_look", "_out", "_text")

    def __init__(self, look: Inspection, text: str, *, cut: bool) -> None:
        self._look = look
        self._text = text
        self._cut = cut
        self._out: list[str] = []
        self._done = 0
        self._at = 0

    def run(self, *, card: bool) -> str:
        self._look.spend(len(self._text))
        # The verdicts on the container that we are in and on those around it; empty outside of such containers.
        modes = [Verdict.CARD] if card else []
        while self._within(modes) if modes else self._outside(modes):
            pass
        return self._ended()

    def _outside(self, modes: list[Verdict]) -> bool:
        """Find the next name that counts and handle its value; return whether there was one."""
        look = self._look
        verdict_of = look.rules.verdict
        known: set[str] = set()
        left = look.nodes_left
        match = None
        for match in _STRINGS.finditer(self._text, self._at):
            left -= 1
            if left < 0:
                raise OverBudget
            name, colon = match.groups()
            if name is None:  # a quote that nothing closes: the text was cut behind it
                look.nodes_left = left
                self._at = match.start()
                return False
            if colon is None:
                if _MARKED.search(name) is None:
                    continue
                look.nodes_left = left
                self._at = match.end()
                if self._string(name, match.start(), self._at, in_card=False):
                    return True
                left = look.nodes_left
            elif name not in known:
                verdict = verdict_of(_clear(name))
                if verdict is not Verdict.KEEP:
                    look.nodes_left = left
                    self._value(match.end(), verdict, modes, Verdict.KEEP)
                    return True
                if _MARKED.search(name) is not None:
                    # A text of its own: `{"https://joe:password@host": …}`.
                    done, look.nodes_left = self._done, left
                    self._string(name, match.start(), match.end(1) + 1, in_card=False)
                    left = look.nodes_left
                    if self._done != done:
                        continue
                known.add(name)
        look.nodes_left = left
        if match is not None:
            self._at = match.end()
        return False

    def _within(self, modes: list[Verdict]) -> bool:
        """Handle the next token of a container whose values are hidden or checked; return whether there was one."""
        match = _TOKENS.search(self._text, self._at)
        if match is None or match.lastindex == _OPEN_QUOTE:
            return False
        self._look.spend(0)
        self._at = match.end()
        mode, name = modes[-1], match[1]
        if name is None:
            self._structure(match, modes, mode)
        elif match[2] is not None:
            verdict = self._look.rules.verdict(_clear(name))
            if verdict is not Verdict.KEEP:
                self._value(match.end(), verdict, modes, mode)
            elif _MARKED.search(name) is not None:
                self._string(name, match.start(), match.end(1) + 1, in_card=False)
        elif mode is not Verdict.HIDE:
            self._string(name, match.start(), match.end(), in_card=mode is Verdict.CARD)
        elif name:
            self._replace(match.start(), match.end(), _HIDDEN_JSON)
        return True

    def _structure(self, match: re.Match[str], modes: list[Verdict], mode: Verdict) -> None:
        """Follow a bracket, or hide a card's number."""
        if match[3] is not None:
            modes.append(mode)
        elif match[4] is not None:
            if modes:
                modes.pop()
        elif mode is Verdict.CARD and self._is_card(match[5], match.end()):
            self._replace(match.start(), match.end(), _HIDDEN_JSON)

    def _value(self, at: int, verdict: Verdict, modes: list[Verdict], mode: Verdict) -> None:
        """Handle the value of a name that counts, and continue behind it, or inside if it is a container."""
        self._at = at
        match = _VALUE.match(self._text, at)
        if match is None or match.lastindex is None:
            return  # nothing there, or a string that was cut: the end of the pass drops it
        end = self._at = match.end()
        string, opening, word = match[1], match[3], match[4]
        start = end - len(string or opening or word)
        if opening is not None and verdict is not Verdict.REMOVE:
            # Its texts are hidden; its shape, numbers and flags stay. What is hidden around it stays hidden.
            modes.append(Verdict.HIDE if mode is Verdict.HIDE else verdict)
        elif verdict is Verdict.REMOVE:
            if opening is not None:
                end = self._at = self._end_of_container(end)
            self._replace(start, end, "null")
        elif verdict is Verdict.HIDE or (mode is Verdict.HIDE and string is not None):
            if word not in _KEEPERS:
                self._replace(start, end, _HIDDEN_JSON)
        elif string is not None:
            self._string(match[2], start, end, in_card=True)
        elif word not in _KEEPERS and self._is_card(word, end):
            self._replace(start, end, _HIDDEN_JSON)

    def _is_card(self, number: str, end: int) -> bool:
        cut = self._cut and end == len(self._text)
        if "." in number or "e" in number or "E" in number:
            # Where it was cut, an exponent may have made it whole.
            number = number_digits(number) or (number.lower().partition("e")[0] if cut else "")
        return has_card_number(number, cut=cut)

    def _string(self, raw: str, start: int, end: int, *, in_card: bool) -> bool:
        """Inspect a string; return whether the next one was handled with it (`"--password", "x"`)."""
        if not in_card and _MARKED.search(raw) is None:
            return False
        clear = _clear(raw)
        hidden = self._look.inspect(clear, card=in_card)
        if hidden != clear:
            self._replace(start, end, json.dumps(hidden))
        elif clear.startswith("-") and self._look.rules.verdict(clear.lstrip("-")) in {Verdict.HIDE, Verdict.REMOVE}:
            following = _FOLLOWING.match(self._text, end)
            if following is not None:
                self._at = following.end()
                self._replace(following.start(1), self._at, _HIDDEN_JSON)
                return True
        return False

    def _end_of_container(self, at: int) -> int:
        depth = 1
        while (match := _BRACKETS.search(self._text, at)) is not None:
            self._look.spend(0)
            if match[4] is not None:
                break
            at = match.end()
            depth += (match[2] is not None) - (match[3] is not None)
            if not depth:
                return at
        return len(self._text)

    def _replace(self, start: int, end: int, by: str) -> None:
        self._out += (self._text[self._done : start], by)
        self._done = end

    def _ended(self) -> str:
        text = self._text
        # A string that was cut cannot be judged: its name may come later, or its other half.
        quote = text.find('"', self._at) if self._cut else -1
        rest = text[self._done :] if quote < 0 else text[self._done : quote]
        return "".join((*self._out, rest)) if self._out or quote >= 0 else text


def _clear(raw: str) -> str:
    """Return a string without its escapes; `raw` itself if they are broken."""
    if "\\" not in raw:
        return raw
    try:
        return str(json.loads(f'"{raw}"'))
    except ValueError:
        return raw
