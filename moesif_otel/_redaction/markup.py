"""Hides secrets in XML and HTML, and in any text that may contain tags, URLs, JSON or escapes.

Elements and attributes whose names count are hidden; the text between tags is prose. Names are also found if they are
written with escapes.
"""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_plus

from moesif_otel._redaction.cards import has_card_number
from moesif_otel._redaction.json_text import is_json_text
from moesif_otel._redaction.names import HIDDEN, Verdict
from moesif_otel._redaction.prose import QUOTE, hide_pairs, is_card_label, is_label, next_concerned
from moesif_otel._redaction.urls import hide_user_info, inspect_url

if TYPE_CHECKING:
    from moesif_otel._redaction.budget import Inspection

_URL: Final = re.compile(r"""(?<![A-Za-z0-9])[A-Za-z][A-Za-z0-9+.\-]{1,19}:\\?/\\?/[^\s"<>\\]+""")
_ESCAPE: Final = re.compile(r"(?<!\\)\\{1,32}u([0-9A-Fa-f]{4})")
_PERCENT: Final = re.compile(r"%[0-9A-Fa-f]{2}")
_ENTITY: Final = re.compile(r"&(?:amp;)*(?:#|lt|quot|colon|equals|nbsp)")
_BETWEEN_TAGS: Final = re.compile(r">\s{0,256}(?=<)")
_MAX_UNDONE: Final = 4
_TAG: Final = re.compile(
    r"""<!--|<!\[CDATA\[|<(/?)([A-Za-z_][\w.\-]*(?::[\w.\-]+)?)(?=[\s/>]|\Z)((?:[^<>"']+|"[^"]*"|'[^']*')*)(>?)"""
)
_PRIVATE_KEY: Final = re.compile(
    r"(-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----).*?(?=-----END|\Z)", re.DOTALL
)
_MARKUP: Final = re.compile(r"</?[A-Za-z_!?]")
# An attribute's value; in markup that lies in broken JSON its quotes are escaped.
_VALUED: Final = r"""\s{0,4}=\s{0,4})(\\{0,31}"[^"]*"|\\{0,31}'[^']*'|[^\s"'>]+)"""
_NAMING: Final = re.compile(r"(?<![\w\-])((?:name|key)" + _VALUED, re.IGNORECASE)
_ATTRIBUTE: Final = re.compile(r"""(?<![^\s"'>/=])([^\s"'>/=]+)(""" + _VALUED)
_SHOWN_ATTRIBUTES: Final = frozenset({"name", "key", "id", "type", "class", "for", "form", "autocomplete", "style"})
_CELLS: Final = frozenset({"th", "td", "cell", "data", "c", "v", "col", "column"})
_VOID: Final = frozenset({"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param"})


def redact_prose(look: Inspection, text: str, *, card: bool = False, cut: bool = False) -> str:
    """Return a text, markup or not, with everything hidden that stands behind a name.

    `card`: it lies below a name like a card's. `cut`: it may end anywhere.
    """
    shown = probe = _pass(look, text, card=card, cut=cut)
    for _ in range(_MAX_UNDONE):
        if "%" not in probe and "\\u" not in probe and "&" not in probe:
            break
        # Escapes may spell a name, or the marks around it: JSON that was cut, or a query in a text.
        clear = unescaped(unquote_plus(probe) if _PERCENT.search(probe) is not None else probe)
        if "&" in clear and _ENTITY.search(clear) is not None:
            clear = html.unescape(clear)
        if clear == probe:
            break
        probe = _pass(look, clear, card=card, cut=cut)
        if probe != clear:
            shown = probe
    return shown


def _pass(look: Inspection, text: str, *, card: bool, cut: bool) -> str:
    look.spend(len(text), 4)  # a dozen searches, however short the text
    if look.rules.auto:
        text = hide_user_info(text)
        if "PRIVATE KEY" in text:
            text = _PRIVATE_KEY.sub(rf"\1{HIDDEN}", text)
    if "://" in text or "/\\/" in text:
        text = _URL.sub(lambda match: _url(look, match[0]), text)
    return _hidden(look, text, card=card, cut=cut)


def _url(look: Inspection, url: str) -> str:
    return inspect_url(look, url) if look.rules.may_concern_text(url) else url


def unescaped(text: str) -> str:
    """Decode JSON's escapes of the characters of names, however deep that JSON lies in other JSON."""
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


def _hidden(look: Inspection, text: str, *, card: bool, cut: bool) -> str:
    odd = look.rules.odd_masks.search(text) if look.rules.odd_masks is not None else None
    if odd is not None:
        return _hidden(look, text[: odd.start()], card=card, cut=False) + odd[0] + HIDDEN
    if "<" in text and _MARKUP.search(text) is not None:
        return _Markup(look, text, card=card, cut=cut).run()
    shown, _ = hide_pairs(look, text, card=card, cut=cut)
    return shown


class _Markup:
    """One pass over XML or HTML, or over a text that has tags in it."""

    def __init__(self, look: Inspection, text: str, *, card: bool, cut: bool) -> None:
        self._look = look
        self._text = text
        self._card = card
        self._cut = cut
        self._card_tag, self._card_depth = "", 0
        self._label = self._valued = False
        self._within = ""
        self._out: list[str] = []

    def run(self) -> str:
        text, start, at, looked_to = self._text, 0, 0, 0
        while True:
            if start == at >= looked_to and not (self._card or self._card_depth or self._label):
                at, looked_to = next_concerned(self._look, text, at, _BETWEEN_TAGS)
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
            if self._valued and tag[1] == "/":
                self._label = self._valued = False
            if tag[0] == "<!--" and self._label:
                # Not the value that is waited for.
                comment_end = text.find("-->", at)
                self._out.append(f"<!--{HIDDEN}-->")
                start = at = len(text) if comment_end < 0 else comment_end + 3
                continue
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
        self._node(text[start:], before_closing=True, last=True)
        return "".join(self._out)

    def _rest_hidden(self) -> str:
        return "".join((*self._out, "" if self._out and self._out[-1].endswith(HIDDEN) else HIDDEN))

    def _concerned(self, tag: re.Match[str]) -> bool:
        return self._look.rules.verdict(_local(tag[2])) is not Verdict.KEEP or _NAMING.search(tag[3]) is not None

    def _node(self, node: str, *, before_closing: bool, last: bool) -> bool:
        """Inspect the text between two tags; return whether all that follows must be hidden."""
        if not node:
            return False
        if node.isspace():
            self._out.append(node)
            return False
        if self._label:
            # The text before it, an element of its own, was the name: `<key>password</key><string>x</string>`.
            self._valued = True
            self._out.append(HIDDEN)
            return False
        if before_closing and not last and is_label(self._look, node):
            if self._within.lower() in _CELLS:
                self._out.append(node)
                return True
            self._label = True
        # The cells below it, wherever they are, may hold card numbers.
        self._card = self._card or (self._within.lower() in _CELLS and is_card_label(self._look, node))
        card = self._card or self._card_depth > 0
        # Only what is JSON: another text would come back here, with each level of nesting once.
        if node.lstrip()[:1] in {"{", "["} and is_json_text(node):
            node = self._look.inspect(node, card=card)
        shown, rest = hide_pairs(self._look, node, card=card, cut=self._cut and last, more=not last)
        if "&" in node:
            clear = html.unescape(node)
            if clear != node:
                if _MARKUP.search(clear) is not None:
                    hidden, beyond = _Markup(self._look, clear, card=card, cut=self._cut and last).run(), False
                else:
                    hidden, beyond = hide_pairs(self._look, clear, card=card, cut=self._cut and last, more=not last)
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
        if closing:
            if self._card_depth and name == self._card_tag:
                self._card_depth -= 1
            return tag[0], False
        verdict = rules.verdict(_local(name))
        alone = inside.endswith("/") or name.lower() in _VOID
        named = False
        if "=" in inside:
            named = any(
                rules.verdict(found[2].strip("\"'\\")) in {Verdict.HIDE, Verdict.REMOVE}
                for found in _NAMING.finditer(inside)
            )
            inside = _ATTRIBUTE.sub(lambda found: self._attribute(found, hide=named), inside)
        shown = f"<{name}{inside}{tag[4]}"
        if alone:
            return shown, False
        if self._card_depth and name == self._card_tag:
            self._card_depth += 1
        elif verdict is Verdict.CARD and not self._card_depth:
            self._card_tag, self._card_depth = name, 1
        return shown, named or verdict in {Verdict.HIDE, Verdict.REMOVE}

    def _attribute(self, found: re.Match[str], *, hide: bool) -> str:
        self._look.spend(0)
        rules = self._look.rules
        name, value = _local(found[1]), found[3]
        quoted = QUOTE.match(value)
        quote = quoted[0] if quoted is not None else ""
        verdict = rules.verdict(name)
        content = value[len(quote) : -len(quote)] if quote else value
        if verdict is Verdict.REMOVE:
            return f"{found[1]}{found[2]}{quote}{quote}"
        secret = verdict is Verdict.HIDE or (hide and name.lower() not in _SHOWN_ATTRIBUTES)
        if secret or (verdict is Verdict.CARD and has_card_number(content)):
            return f"{found[1]}{found[2]}{quote}{HIDDEN}{quote}"
        if "=" in content or ":" in content:
            clear = html.unescape(content)
            shown, _ = hide_pairs(self._look, clear, card=False, cut=False)
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
