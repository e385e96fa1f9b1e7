"""Secrets in text that has no form of its own: `name: value`, `name=value`, `--name value`, tables, and markup.

Where a value's end is not certain, the rest of the text is hidden. Every search here takes linear time.
"""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_plus

from moesif_otel._redaction.cards import has_card_number
from moesif_otel._redaction.names import HIDDEN, Verdict
from moesif_otel._redaction.urls import hide_user_info

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._redaction.budget import Inspection

    Leaf = Callable[[Inspection, str, bool], str]

__all__ = ["redact_prose", "unescaped"]

# One start a run of name characters, so that the search is linear. Behind the name: a quote, escaped or not, a bracket,
# and `=`, `:`, `=>` or `:=`.
_KEY: Final = re.compile(
    r"""(?<![\w.\-])([\w.\-]+)[\])]{0,4}(?:\\{0,31}["'`*]{1,2})?[\])\s]{0,4}(:=|={1,3}>?|:(?!:))[ \t\u00a0]{0,8}"""
)
_FLAG: Final = re.compile(r"""(?<![\w\-])--([A-Za-z][\w\-]*)[ \t]{1,8}(?![\s\-])(\\{0,31}["'])?""")
_LISTED: Final = re.compile(r"""\\{0,31}["']([\w.\- ]{1,64})\\{0,31}["'][ \t]{0,4}(?:[,;|]|\\{0,31}["'])""")
_WORD: Final = re.compile(r"\S*")
_NAME_TAIL: Final = re.compile(r"[\w.\-]+\Z")
_MAX_BEFORE: Final = 80
_LABEL: Final = re.compile(r"[\w.\-\[\] ]{1,80}\Z")
_QUOTED: Final = re.compile(r"""(\\{0,31}["'`]).*?(?<!\\)\1""", re.DOTALL)
_QUOTE: Final = re.compile(r"""\\{0,31}["'`]""")
# Behind a closing quote: another one, a letter, `+`, or a further piece of text says that the value goes on.
_GOES_ON: Final = re.compile(r"""\\{0,31}["'`\w]|\s{0,64}(?:\\{0,31}["'`]|\+|\.[ \t]*["'])|[ \t]{0,64}\\\r?\n""")
_OPENS: Final = re.compile(r"[\[{<]|[|>][+\-0-9]{0,2}[ \t]*(?:#[^\r\n]*)?(?=[\r\n]|\Z)")
_LINE: Final = re.compile(r"[^\r\n]*")
_PARAMETER: Final = re.compile(r"[^&;\r\n]*")
_NEXT_LINE: Final = re.compile(r"(?:\r\n|\r|\n)(?:[ \t]*(?:\r\n|\r|\n))*([ \t]*)")
_INDENT: Final = re.compile(r"[ \t]*")
_NEXT_KEY: Final = re.compile(r"""["']?[\w.\- ]{1,64}["']?\s?[:=]""")
_ORDER: Final = re.compile(r"(?:asc|desc|ascending|descending)\b", re.IGNORECASE)
_URL: Final = re.compile(r"""(?<![A-Za-z0-9])[A-Za-z][A-Za-z0-9+.\-]{1,19}:\\?/\\?/[^\s"<>\\]+""")
_TOKEN_START: Final = re.compile(r"[\s\"'(<>,]")
_ESCAPE: Final = re.compile(r"(?<!\\)\\{1,32}u([0-9A-Fa-f]{4})")
_QUERY_MARKS: Final = frozenset("?&#")
_URL_MARKS: Final = frozenset("/@")
_ESCAPED: Final = frozenset("nrtbf")
_PERCENT: Final = re.compile(r"%[0-9A-Fa-f]{2}")
_ENTITY: Final = re.compile(r"&(?:#|lt|quot|colon|equals|nbsp)")
_STRETCH: Final = 1_024
_LINE_START: Final = re.compile(r"\n")
_BETWEEN_TAGS: Final = re.compile(r">\s{0,256}(?=<)")
_MAX_UNDONE: Final = 4
_PART_NAME: Final = re.compile(r"""form-data;[^\r\n]{0,256}?\bname\*?=\\{0,31}"?([^";\\\r\n]{1,80})""", re.IGNORECASE)
_DELIMITERS: Final = ",;\t|"
_MAX_HEADER_LINE: Final = 4_096
_CARD_CHARACTERS: Final = 64

_TAG: Final = re.compile(
    r"""<!--|<!\[CDATA\[|<(/?)([A-Za-z_][\w.\-]*(?::[\w.\-]+)?)(?=[\s/>]|\Z)((?:[^<>"']+|"[^"]*"|'[^']*')*)(>?)"""
)
_MARKUP: Final = re.compile(r"</?[A-Za-z_!?]")
# An attribute's value; in markup that lies in broken JSON its quotes are escaped.
_VALUED: Final = r"""\s{0,4}=\s{0,4})(\\{0,31}"[^"]*"|\\{0,31}'[^']*'|[^\s"'>]+)"""
_NAMING: Final = re.compile(r"(?<![\w\-])((?:name|key)" + _VALUED, re.IGNORECASE)
_ATTRIBUTE: Final = re.compile(r"""(?<![^\s"'>/=])([^\s"'>/=]+)(""" + _VALUED)
_SHOWN_ATTRIBUTES: Final = frozenset({"name", "key", "id", "type", "class", "for", "form", "autocomplete", "style"})
_CELLS: Final = frozenset({"th", "td", "cell", "data", "c", "v", "col", "column"})
_VOID: Final = frozenset({"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param"})


def redact_prose(look: Inspection, text: str, leaf: Leaf, *, card: bool = False, cut: bool = False) -> str:
    """Return a text with everything hidden that stands behind a name.

    Args:
        look: The inspection that this is part of.
        text: Any text, markup or not.
        leaf: Looks into a URL or JSON that stands in the text: `(look, text, in_card) -> text`.
        card: Whether it lies below a name like a card's.
        cut: Whether the text may end anywhere.
    """
    shown = probe = _pass(look, text, leaf, card=card, cut=cut)
    for _ in range(_MAX_UNDONE):
        if "%" not in probe and "\\u" not in probe and "&" not in probe:
            break
        # Escapes may spell a name, or the marks around it: JSON that was cut, or a query in a text.
        clear = unescaped(unquote_plus(probe) if _PERCENT.search(probe) is not None else probe)
        if "&" in clear and _ENTITY.search(clear) is not None:
            clear = html.unescape(clear)
        if clear == probe:
            break
        probe = _pass(look, clear, leaf, card=card, cut=cut)
        if probe != clear:
            shown = probe
    return shown


def _pass(look: Inspection, text: str, leaf: Leaf, *, card: bool, cut: bool) -> str:
    look.spend(len(text))
    if look.rules.auto:
        text = hide_user_info(text)
    if "://" in text or "/\\/" in text:
        text = _URL.sub(lambda match: leaf(look, match[0], False), text)
    return _hidden(look, text, leaf, card=card, cut=cut)


def unescaped(text: str) -> str:
    """Undo JSON's escapes of what names are written with, however deep that JSON lies in other JSON."""
    for _ in range(4):
        clear = _ESCAPE.sub(_escaped_character, text)
        if clear == text:
            break
        text = clear
    return text


def _escaped_character(match: re.Match[str]) -> str:
    found = chr(int(match[1], 16))
    # Never a quote: it would end the value that it stands in.
    return found if found.isalnum() or found in "_-. \\" else match[0]


def _hidden(look: Inspection, text: str, leaf: Leaf, *, card: bool, cut: bool) -> str:
    odd = look.rules.odd_masks.search(text) if look.rules.odd_masks is not None else None
    if odd is not None:
        return _hidden(look, text[: odd.start()], leaf, card=card, cut=False) + odd[0] + HIDDEN
    if "<" in text and _MARKUP.search(text) is not None:
        return _Markup(look, text, leaf, card=card, cut=cut).run()
    shown, _ = _keyed(look, text, card=card, cut=cut)
    return shown


def _keyed(look: Inspection, text: str, *, card: bool, cut: bool, more: bool = False) -> tuple[str, bool]:
    """Return a text without markup, hidden, and whether what follows the text must be hidden, too."""
    if card and has_card_number(text, cut=cut):
        return HIDDEN, False
    end = _end_of_table_head(look, text)
    if end is None and "form-data" in text:
        end = _end_of_part_head(look, text)
    if end is not None:
        shown, _ = _pairs(look, text[:end], cut=False, more=False)
        return shown if shown.endswith(HIDDEN) else shown + HIDDEN, True
    return _pairs(look, text, cut=cut, more=more)


def _pairs(look: Inspection, text: str, *, cut: bool, more: bool) -> tuple[str, bool]:
    """Do the same for `name: value`, `--name value` and `"name", "value"`."""
    out: list[str] = []
    done = at = 0
    looked_to = 0
    while True:
        if at >= looked_to:
            at, looked_to = _next_concerned(look, text, at, _LINE_START)
        match = _KEY.search(text, at)
        if match is None:
            break
        look.spend(0)
        at = match.end()
        verdict = _verdict(look, text, match)
        if verdict is Verdict.KEEP or text.startswith(HIDDEN, at):
            continue
        if verdict is Verdict.CARD:
            # Only so far, or a thousand such names would each look through the rest of the text.
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


def _next_concerned(look: Inspection, text: str, at: int, edge: re.Pattern[str]) -> tuple[int, int]:
    """Return start and end of the next stretch of a text that has to be looked into: most of a page, or a log, has not.

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
            back = max(0, match.start() - 2_048)
            starts = [found.end() for found in _TOKEN_START.finditer(text, back, match.start())]
            token = text[starts[-1] if starts else back : match.start()]
            if token.startswith("/") or "//" in token:
                return Verdict.KEEP
    return verdict


def _verdict_of_words(look: Inspection, text: str, at: int, name: str) -> Verdict:
    """Judge a name together with the words that stand before it in its line."""
    look.spend(0, 2)
    line = text[max(0, at - _MAX_BEFORE) : at]
    words = line[max(line.rfind("\n"), line.rfind("\r")) + 1 :].rsplit(None, 4)[-4:]
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
    quote = _QUOTE.match(text, at)
    if quote is not None:
        whole = _QUOTED.match(text, at)
        if whole is None or _GOES_ON.match(text, whole.end()) is not None:
            return None
        return at, whole.end(), whole[1]
    if _OPENS.match(text, at) is not None:
        return None
    colon = key[2] == ":"
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


def _end_of_table_head(look: Inspection, text: str) -> int | None:
    """Return where the first line ends if it names the columns of a table, one of which counts."""
    start = len(text) - len(text.lstrip("\ufeff\r\n \t"))
    head = _LINE.match(text, start, start + _MAX_HEADER_LINE)
    if head is None or head.end() >= len(text):
        return None
    line = head[0]
    if _is_secret(look, line):
        return head.end()  # a table of one column, or a label over its value
    following = text[head.end() : head.end() + _MAX_HEADER_LINE].lstrip("\r\n")
    for delimiter in _DELIMITERS:
        if delimiter in line and delimiter in following.partition("\n")[0]:
            look.spend(0, line.count(delimiter))
            if any(_is_secret(look, cell) for cell in line.split(delimiter)):
                return head.end()
    return None


def _end_of_part_head(look: Inspection, text: str) -> int | None:
    """Return where the name of a part ends that counts, in a multipart body under another type."""
    for match in _PART_NAME.finditer(text):
        look.spend(0)
        if _is_secret(look, match[1]):
            return match.end()
    return None


def _is_secret(look: Inspection, label: str) -> bool:
    """Whether a cell, or the text of an element, is nothing but a name whose value is hidden."""
    label = label.strip().strip("\"'`*:").strip()
    return _LABEL.match(label) is not None and look.rules.is_label(label)


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
    """Return where a quoted name ends that is followed by a comma or another quoted text: `"password";s:7:"x"`."""
    for match in _LISTED.finditer(text):
        look.spend(0)
        if look.rules.verdict(match[1]) in {Verdict.HIDE, Verdict.REMOVE}:
            return match.end(1)
    return None


class _Markup:
    """One pass over XML or HTML, or over a text that has tags in it."""

    __slots__ = ("_card", "_card_depth", "_card_tag", "_cut", "_label", "_leaf", "_look", "_out", "_text", "_within")

    def __init__(self, look: Inspection, text: str, leaf: Leaf, *, card: bool, cut: bool) -> None:
        self._look = look
        self._leaf = leaf
        self._text = text
        self._card = card
        self._cut = cut
        self._card_tag, self._card_depth = "", 0
        self._label, self._within = False, ""
        self._out: list[str] = []

    def run(self) -> str:
        text, start, at, looked_to = self._text, 0, 0, 0
        while True:
            if start == at >= looked_to and not (self._card or self._card_depth or self._label):
                at, looked_to = _next_concerned(self._look, text, at, _BETWEEN_TAGS)
                self._out.append(text[start:at])
                start = at
            tag = _TAG.search(text, at)
            if tag is None:
                break
            self._look.spend(0, 2)
            at = tag.end()
            if tag[2] is not None and not tag[4]:
                # Not closed: no tag after all, or one that was cut.
                if self._concerned(tag):
                    self._node(text[start : tag.start()], before_closing=False, last=False)
                    return self._rest_hidden()
                continue
            if self._node(text[start : tag.start()], before_closing=tag[1] == "/", last=False):
                return self._rest_hidden()
            start = at
            if tag[2] is None:
                # The text of a comment or a CDATA section is text; its end is no tag.
                self._out.append(tag[0])
                continue
            shown, secret = self._tag(tag)
            self._out.append(shown)
            if secret:
                end = self._end_of_element(tag[2], at)
                self._out.append(HIDDEN)
                if end is None:
                    return "".join(self._out)
                start = at = end
        return self._finished(start)

    def _finished(self, at: int) -> str:
        self._node(self._text[at:], before_closing=True, last=True)
        return "".join(self._out)

    def _rest_hidden(self) -> str:
        return "".join((*self._out, "" if self._out and self._out[-1].endswith(HIDDEN) else HIDDEN))

    def _concerned(self, tag: re.Match[str]) -> bool:
        return self._look.rules.verdict(_local(tag[2])) is not Verdict.KEEP or _NAMING.search(tag[3]) is not None

    def _node(self, node: str, *, before_closing: bool, last: bool) -> bool:
        """Look into the text between two tags; returns whether all that follows must be hidden."""
        if not node:
            return False
        if node.isspace():
            self._out.append(node)
            return False
        if self._label:
            # The text before it, an element of its own, was the name: `<key>password</key><string>x</string>`.
            self._label = False
            self._out.append(HIDDEN)
            return False
        if before_closing and not last and _is_secret(self._look, node):
            if self._within.lower() in _CELLS:
                self._out.append(node)
                return True
            self._label = True
        card = self._card or self._card_depth > 0
        if node.lstrip()[:1] in {"{", "["}:
            node = self._leaf(self._look, node, card)
        shown, rest = _keyed(self._look, node, card=card, cut=self._cut and last, more=not last)
        if "&" in node:
            clear = html.unescape(node)
            if clear != node:
                if _MARKUP.search(clear) is not None:
                    hidden, beyond = (
                        _Markup(self._look, clear, self._leaf, card=card, cut=self._cut and last).run(),
                        False,
                    )
                else:
                    hidden, beyond = _keyed(self._look, clear, card=card, cut=self._cut and last, more=not last)
                if hidden != clear:
                    shown, rest = html.escape(hidden, quote=False), rest or beyond
        self._out.append(shown)
        # `password: a<b>c</b>`: the value goes on behind an opening tag.
        return rest or (shown != node and shown.rstrip().endswith(HIDDEN) and not before_closing)

    def _tag(self, tag: re.Match[str]) -> tuple[str, bool]:
        """Return a tag with its attributes hidden, and whether its content must be hidden."""
        rules = self._look.rules
        closing, name, inside = tag[1], tag[2], tag[3]
        self._within = "" if closing else _local(name)
        verdict = rules.verdict(_local(name))
        if closing:
            if self._card_depth and name == self._card_tag:
                self._card_depth -= 1
            return tag[0], False
        alone = inside.endswith("/") or name.lower() in _VOID
        named = any(
            rules.verdict(found[2].strip("\"'\\")) in {Verdict.HIDE, Verdict.REMOVE}
            for found in _NAMING.finditer(inside)
        ) if inside else False  # fmt: skip
        if inside:
            inside = _ATTRIBUTE.sub(lambda found: self._attribute(found, hide=named), inside)
        if verdict is Verdict.CARD and not alone:
            if not self._card_depth:
                self._card_tag, self._card_depth = name, 1
            elif name == self._card_tag:
                self._card_depth += 1
        elif self._card_depth and name == self._card_tag and not alone:
            self._card_depth += 1
        secret = (named or verdict is Verdict.HIDE or verdict is Verdict.REMOVE) and not alone
        return f"<{name}{inside}{tag[4]}", secret

    def _attribute(self, found: re.Match[str], *, hide: bool) -> str:
        self._look.spend(0)
        rules = self._look.rules
        name, value = _local(found[1]), found[3]
        quoted = _QUOTE.match(value)
        quote = quoted[0] if quoted is not None else ""
        verdict = rules.verdict(name)
        content = value[len(quote) : -len(quote)] if quote else value
        if verdict is Verdict.REMOVE:
            return f"{found[1]}{found[2]}{quote}{quote}"
        if verdict is Verdict.HIDE or (hide and name.lower() not in _SHOWN_ATTRIBUTES):
            return f"{found[1]}{found[2]}{quote}{HIDDEN}{quote}"
        if verdict is Verdict.CARD and has_card_number(content):
            return f"{found[1]}{found[2]}{quote}{HIDDEN}{quote}"
        if "=" in content or ":" in content:
            clear = html.unescape(content)
            shown, _ = _keyed(self._look, clear, card=False, cut=False)
            if shown != clear:
                return f"{found[1]}{found[2]}{quote}{html.escape(shown)}{quote}"
        return found[0]

    def _end_of_element(self, name: str, at: int) -> int | None:
        """Return where the closing tag of an element begins, or None where there is none."""
        depth = 1
        text = self._text
        while (tag := _TAG.search(text, at)) is not None:
            self._look.spend(0)
            at = tag.end()
            if tag[2] is None:
                closing = text.find("-->" if tag[0] == "<!--" else "]]>", at)
                if closing < 0:
                    return None
                at = closing
            elif tag[2] == name:
                if tag[1]:
                    depth -= 1
                    if not depth:
                        return tag.start()
                elif not tag[3].endswith("/"):
                    depth += 1
        return None


def _local(name: str) -> str:
    return name.rpartition(":")[2]
