"""Hides secrets in text without a form of its own: `name: value`, `name=value`, `--name value`, lists and tables.

Where a value's end is not certain, the rest of the text is hidden. Every search here takes linear time.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from moesif_otel._redaction.cards import has_card_number
from moesif_otel._redaction.names import HIDDEN, Verdict, is_card_name

if TYPE_CHECKING:
    from moesif_otel._redaction.budget import Inspection

# One start a run of name characters, so that the search is linear. Behind the name: a quote, escaped or not, a bracket,
# and `=`, `:`, `=>` or `:=`; also `is:` and `?:`.
_KEY: Final = re.compile(
    r"""(?<![\w.\-])([\w.\-]+)[\])]{0,4}(?:\\{0,31}["'`*]{1,2})?[\])\s]{0,4}"""
    r"""(?:is[ \t]?|\?)?(:=|={1,3}>?|:(?!:)|\uff1a)[ \t\u00a0]{0,8}"""
)
_FLAG: Final = re.compile(r"""(?<![\w\-])--([A-Za-z][\w\-]*)[ \t]{1,8}(?![\s\-])(\\{0,31}["'])?""")
_LISTED: Final = re.compile(r"""\\{0,31}["']([\w.\- ]{1,64})\\{0,31}["'][ \t]{0,4}(?:[,;|]|\\{0,31}["'])""")
# The first cell of a row, its value in the next: `password,x`, `| password | x |`. Prose has a blank behind its commas.
_ROW: Final = re.compile(
    r"""^[ \t|]{0,16}["']?([\w.\-][\w.\- ]{0,63})["']?[ \t]{0,4}(?:[\t|]|[,;](?=[^\s,;]))""", re.MULTILINE
)
_QUOTES: Final = re.compile(r"[\"']")
_CELL_ENDS: Final = re.compile(r"[\t|,;]")
_ASSIGNED: Final = re.compile(r"[:=\uff1a]")
_WORD: Final = re.compile(r"\S*")
_NAME_TAIL: Final = re.compile(r"[\w.\-]+\Z")
_MAX_BEFORE: Final = 80
_LABEL: Final = re.compile(r"[\w.\-\[\] ]{1,80}\Z")
_QUOTED: Final = re.compile(r"""(\\{0,31}["'`]).*?(?<!\\)\1""", re.DOTALL)
QUOTE: Final = re.compile(r"""\\{0,31}["'`]""")
"""A quote that may be escaped, in a text that is a part of JSON."""
# Behind a closing quote: another one, a letter, `+`, or a further piece of text says that the value goes on.
_GOES_ON: Final = re.compile(r"""\\{0,31}["'`\w]|\s{0,64}(?:\\{0,31}["'`]|\+|\.[ \t]*["'])|[ \t]{0,64}\\\r?\n""")
_OPENS: Final = re.compile(r"[\[{<]|[|>][+\-0-9]{0,2}[ \t]*(?:#[^\r\n]*)?(?=[\r\n]|\Z)")
_LINE: Final = re.compile(r"[^\r\n]*")
_PARAMETER: Final = re.compile(r"[^&;\r\n]*")
_NEXT_LINE: Final = re.compile(r"(?:\r\n|\r|\n)(?:[ \t]*(?:\r\n|\r|\n))*([ \t]*)")
_INDENT: Final = re.compile(r"[ \t]*")
_NEXT_KEY: Final = re.compile(r"""["']?[\w.\- ]{1,64}["']?\s?[:=]""")
_ORDER: Final = re.compile(r"(?:asc|desc|ascending|descending)\b", re.IGNORECASE)
_TOKEN_START: Final = re.compile(r"[\s\"'(<>,]")
_MAX_PATH: Final = 512
_QUERY_MARKS: Final = frozenset("?&#")
_URL_MARKS: Final = frozenset("/@")
_ESCAPED: Final = frozenset("nrtbf")
_STRETCH: Final = 1_024
_LINE_START: Final = re.compile(r"\n")
_PART_NAME: Final = re.compile(r"""form-data;[^\r\n]{0,256}?\bname\*?=\\{0,31}"?([^";\\\r\n]{1,80})""", re.IGNORECASE)
_DELIMITERS: Final = ",;\t|"
_MAX_HEADER_LINE: Final = 4_096
_CARD_CHARACTERS: Final = 64


def hide_pairs(look: Inspection, text: str, *, card: bool, cut: bool, more: bool = False) -> tuple[str, bool]:
    """Return a text without markup with everything hidden, and whether all that follows it must be hidden, too."""
    if card and has_card_number(text, cut=cut):
        return HIDDEN, False
    end = _end_of_table_head(look, text, cut=cut)
    if end is None and "form-data" in text:
        end = _end_of_part_head(look, text)
    if end is not None:
        shown, _ = _pairs(look, text[:end], cut=False, more=False)
        return shown if shown.endswith(HIDDEN) else shown + HIDDEN, True
    return _pairs(look, text, cut=cut, more=more)


def _pairs(look: Inspection, text: str, *, cut: bool, more: bool) -> tuple[str, bool]:
    """Return the same for `name: value`, `--name value` and `"name", "value"`."""
    out: list[str] = []
    done = at = 0
    looked_to = 0
    assigned = _ASSIGNED.search(text) is not None
    while assigned:
        if at >= looked_to:
            at, looked_to = next_concerned(look, text, at, _LINE_START)
        match = _KEY.search(text, at)
        if match is None:
            break
        look.spend(0)
        at = match.end()
        verdict = _verdict(look, text, match)
        if verdict is Verdict.KEEP or text.startswith(HIDDEN, at):
            continue
        if verdict is Verdict.CARD:
            # Only so far, or a thousand such names would each have the rest of the text searched.
            beyond = at + _CARD_CHARACTERS >= len(text)
            if not has_card_number(text[at : at + _CARD_CHARACTERS], cut=cut and beyond):
                continue
        look.spend(0)
        span = _value(text, match, at, more=more)
        if span is None:
            return "".join((*out, text[done:at], "" if verdict is Verdict.REMOVE else HIDDEN)), True
        start, end, mark = span
        if start == end:
            continue
        out += (text[done:start], mark, "" if verdict is Verdict.REMOVE else HIDDEN, mark)
        done = at = end
    if out:
        out.append(text[done:])
        text = "".join(out)
    text = _without_flags(look, text)
    listed = _listed_at(look, text)
    return (text, False) if listed is None else (text[:listed] + HIDDEN, True)


def next_concerned(look: Inspection, text: str, at: int, edge: re.Pattern[str]) -> tuple[int, int]:
    """Return start and end of the next stretch of a text that must be inspected: most of a page, or of a log, need not.

    Stretches end where `edge` matches, so that nothing that counts lies on both sides.
    """
    concerned = look.rules.may_concern_text
    while at < len(text):
        found = edge.search(text, at + _STRETCH)
        end = found.end() if found is not None else len(text)
        if concerned(text[at:end]):
            return at, end
        at = end
    return at, at


def _verdict(look: Inspection, text: str, match: re.Match[str]) -> Verdict:
    """Judge the name before a `:` or `=`, which may be of several words: `API Key: …`."""
    rules = look.rules
    name = match[1].lstrip("-")
    before = text[match.start() - 1] if match.start() else ""
    verdict = (rules.query_verdict if before in _QUERY_MARKS else rules.verdict)(name)
    if verdict is Verdict.KEEP and before == ";" and name.lower() == "jsessionid" and rules.auto:
        return Verdict.HIDE
    if verdict is Verdict.KEEP and name[:1] in _ESCAPED and before == "\\":
        verdict = rules.verdict(name[1:])  # behind a line end that JSON wrote as an escape
    if verdict is Verdict.KEEP:
        if name.lower() not in rules.last_words:
            return verdict
        verdict = _verdict_of_words(look, text, match.start(1), name)
        if verdict is Verdict.KEEP:
            return verdict
    if match[2] == ":":
        end = match.end()
        if _ORDER.match(text, end) is not None and end == match.end(2):
            return Verdict.KEEP  # `sort=token:desc`
        if end == match.end(2) and before in _URL_MARKS:
            # A host and its port, or a path: `http://token:8080/`, `/v1/token:exchange`.
            start = match.start()
            back = max(0, start - _MAX_PATH)
            before_it = _TOKEN_START.search(text[back:start][::-1])
            token = text[back if before_it is None else start - before_it.start() : start]
            if token.startswith("/") or "//" in token:
                return Verdict.KEEP
    return verdict


def _verdict_of_words(look: Inspection, text: str, at: int, name: str) -> Verdict:
    """Judge a name together with the words that stand before it in its line."""
    if not at or not (text[at - 1].isspace() or text[at - 1] == "+"):
        return Verdict.KEEP
    look.spend(0, 2)
    line = text[max(0, at - _MAX_BEFORE) : at]
    words = line[max(line.rfind("\n"), line.rfind("\r")) + 1 :].replace("+", " ").rsplit(None, 4)[-4:]
    for word in reversed(words):
        tail = _NAME_TAIL.search(word)
        if tail is None:
            break
        name = f"{tail[0]} {name}"
        verdict = look.rules.verdict(name)
        if verdict is not Verdict.KEEP:
            return verdict
        if tail[0] != word:
            break
    return Verdict.KEEP


def _value(text: str, key: re.Match[str], at: int, *, more: bool) -> tuple[int, int, str] | None:
    """Return start and end of the value at `at` and its quotes, or None where its end is not certain.

    `more`: a tag follows the text, so that a value that would begin at its end may begin behind the tag.
    """
    quote = QUOTE.match(text, at)
    if quote is not None:
        whole = _QUOTED.match(text, at)
        if whole is None or _GOES_ON.match(text, whole.end()) is not None:
            return None
        return at, whole.end(), whole[1]
    if _OPENS.match(text, at) is not None:
        return None
    colon = key[2] in {":", "\uff1a"}
    found = (_LINE if colon else _PARAMETER).match(text, at)
    end = at if found is None else found.end()
    if text.endswith("\\", at, end):
        return None
    if end < len(text) and text[end] not in "\r\n":
        return at, end, ""
    if end == at and (end == len(text) or not colon):
        return None if more and end == len(text) else (at, at, "")
    # Lines that are indented more than the key's go on with the value; so does the one after an empty value.
    line = max(text.rfind("\n", 0, key.start()), text.rfind("\r", 0, key.start())) + 1
    indent = len(_INDENT.match(text, line)[0])  # type: ignore[index] # it matches everywhere
    empty = end == at
    while (following := _NEXT_LINE.match(text, end)) is not None and following.end() < len(text):
        deeper = len(following[1]) > indent
        if not deeper and not (empty and _NEXT_KEY.match(text, following.end()) is None):
            break
        empty = False
        end = _LINE.match(text, following.end()).end()  # type: ignore[union-attr] # it matches everywhere
    if empty:
        return None if more and not text[at:].strip() else (at, at, "")
    return at, end, ""


def _end_of_table_head(look: Inspection, text: str, *, cut: bool) -> int | None:
    """Return where the first line ends if it names the columns of a table, one of which counts."""
    start = len(text) - len(text.lstrip("\ufeff\r\n \t"))
    head = _LINE.match(text, start, start + _MAX_HEADER_LINE)
    if head is None or head.end() >= len(text):
        return None
    line = head[0]
    if is_label(look, line):
        return head.end()  # a table of one column, or a label over its value
    cells = [line]
    following = text[head.end() : head.end() + _MAX_HEADER_LINE].lstrip("\r\n")
    for delimiter in _DELIMITERS:
        if delimiter in line and delimiter in following.partition("\n")[0]:
            look.spend(0, line.count(delimiter))
            if any(is_label(look, cell) for cell in line.split(delimiter)):
                return head.end()
            cells += line.split(delimiter)
    if any(is_card_label(look, cell) for cell in cells) and has_card_number(text[head.end() :], cut=cut):
        return head.end()
    return None


def _end_of_part_head(look: Inspection, text: str) -> int | None:
    """Return where the name of a part ends that counts, in a multipart body under another type."""
    for match in _PART_NAME.finditer(text):
        look.spend(0)
        if is_label(look, match[1]):
            return match.end()
    return None


def is_label(look: Inspection, label: str) -> bool:
    """Tell whether a cell, or the text of an element, is nothing but a name whose value is hidden."""
    label = label.strip().strip("\"'`*:").strip()
    return _LABEL.match(label) is not None and look.rules.is_label(label)


def is_card_label(look: Inspection, label: str) -> bool:
    """Tell whether a cell is nothing but a name below which card numbers are expected."""
    label = label.strip().strip("\"'`*:").strip()
    return look.rules.auto and _LABEL.match(label) is not None and is_card_name(label)


def _without_flags(look: Inspection, text: str) -> str:
    """Hide what follows a flag of a command line: `--password x`."""
    if "--" not in text:
        return text

    out: list[str] = []
    done = at = 0
    while (match := _FLAG.search(text, at)) is not None:
        look.spend(0)
        at = match.end()
        verdict = look.rules.verdict(match[1])
        if verdict not in {Verdict.HIDE, Verdict.REMOVE} or text.startswith(HIDDEN, at):
            continue
        if match[2] is not None:
            end = text.find(match[2], at)
            end = len(text) if end < 0 else end
        else:
            end = _WORD.match(text, at).end()  # type: ignore[union-attr] # it matches everywhere
        out += (text[done:at], "" if verdict is Verdict.REMOVE else HIDDEN)
        done = at = end
    return "".join((*out, text[done:])) if out else text


def _listed_at(look: Inspection, text: str) -> int | None:
    """Return where a name ends that is followed by its value in a list or a row: `"password";s:7:"x"`, `password,x`."""
    for pattern, mark in ((_LISTED, _QUOTES), (_ROW, _CELL_ENDS)):
        if mark.search(text) is None:
            continue
        for match in pattern.finditer(text):
            look.spend(0)
            if look.rules.verdict(match[1]) in {Verdict.HIDE, Verdict.REMOVE}:
                return match.end(1)
    return None
