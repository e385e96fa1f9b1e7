"""Hides secrets in a text that is a value: JSON in a string, a URL, percent-encoded text, or prose.

The modules of the other forms call `inspect_text` for the texts inside theirs (`Inspection.inspect`). It decides what
they are, at most `MAX_NESTING` levels deep.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import orjson

from moesif_otel._guard import LATE_IMPORTS
from moesif_otel._redaction.budget import MAX_NESTING, Inspection, OverBudget
from moesif_otel._redaction.cards import has_card_number
from moesif_otel._redaction.json_text import is_json_text, redact_json
from moesif_otel._redaction.names import HIDDEN, Verdict
from moesif_otel._redaction.urls import hide_user_info, inspect_url

if TYPE_CHECKING:
    from moesif_otel._redaction.rules import Rules

# Without one of these a text holds no name with a value, only words.
_MARKED: Final = re.compile(r"[=:%@<]|--|[\"'] ?[,;|]|\n")
_PLAIN_QUERY: Final = re.compile(r"(?:[A-Za-z0-9_.\-]{1,64}(?:=[A-Za-z0-9_.,\-]*)?(?:&|\Z)){1,64}\Z")
_LONE_URL: Final = re.compile(r"\s*(?:[A-Za-z][A-Za-z0-9+.\-]{0,19}://|//|[/?#])[^\s\"<>{}]*\Z")


def redact_text(rules: Rules, text: str) -> str:
    """Return a text of any kind with everything hidden; all of it, if it cannot be inspected within the bounds."""
    try:
        return Inspection(rules, inspect_text).inspect(text)
    except OverBudget:
        return HIDDEN


def redact_url(rules: Rules, url: str) -> str:
    """Return a URL with user, password, and secrets in path parameters, query and fragment hidden."""
    if not rules.active or ("=" not in url and "@" not in url and "%" not in url) or _has_plain_query(rules, url):
        return url
    try:
        return inspect_url(Inspection(rules, inspect_text), url)
    except OverBudget:
        return hide_user_info(url.partition("?")[0].partition("#")[0].partition(";")[0]) + f"?{HIDDEN}"


def _has_plain_query(rules: Rules, url: str) -> bool:
    """Tell whether a URL has nothing but a path and a query in which no name counts and no value can hold one."""
    path, mark, query = url.partition("?")
    if not mark or _PLAIN_QUERY.match(query) is None or ";" in path or "@" in path or "%" in path or "=" in path:
        return False
    verdict_of = rules.query_verdict
    return all(verdict_of(pair.partition("=")[0]) is Verdict.KEEP for pair in query.split("&"))


def redact_value(rules: Rules, root: Any) -> Any:
    """Return a copy of a value that `orjson` takes, with everything hidden."""
    text = orjson.dumps(root)
    if not rules.active or not rules.may_concern(text):
        return root
    try:
        return orjson.loads(redact_json(Inspection(rules, inspect_text), text.decode()))
    except OverBudget:
        return {} if isinstance(root, dict) else HIDDEN


def inspect_text(look: Inspection, text: str, card: bool) -> str:
    """Return a field's value with everything hidden; `card` where card numbers are expected."""
    if card and has_card_number(text):
        return HIDDEN
    if _MARKED.search(text) is None or not look.rules.may_concern_text(text):
        return text
    if look.nesting >= MAX_NESTING:
        return HIDDEN
    look.nesting += 1
    try:
        if text.lstrip()[:1] in {"{", "["} and is_json_text(text):
            return redact_json(look, text, card=card, cut=not is_json(text))
        if _LONE_URL.match(text) is not None:
            return inspect_url(look, text)
        return inspect_prose(look, text, card=card)
    finally:
        look.nesting -= 1


def inspect_prose(look: Inspection, text: str, *, card: bool = False, cut: bool = False) -> str:
    """Return a text that has no form of its own with everything hidden."""
    # Late: few bodies need it, and its expressions take longer to compile than the rest of the package to import.
    with LATE_IMPORTS:
        from moesif_otel._redaction.markup import redact_prose

    return redact_prose(look, text, card=card, cut=cut)


def is_json(text: str | bytes) -> bool:
    """Tell whether a text is one JSON text that orjson takes (in UTF-8, numbers within a float's range)."""
    try:
        orjson.loads(text)
    except ValueError:
        return False
    return True
