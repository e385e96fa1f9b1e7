"""Nothing leaves that should not: which names count, and hiding their values.

Owns: `Rules` (what is hidden on one side of a call), the quick scan, JSON values; `redaction_for` from settings.
Threads: any; a `Rules` never changes but for a bounded memory of names that it has judged.
Never: passes on a text that it could not look into.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import unquote_to_bytes

from moesif_otel._redaction.formats import redact_body_bytes
from moesif_otel._redaction.headers import COOKIES
from moesif_otel._redaction.names import (
    CARD_WORDS,
    CREDENTIAL_HEADERS,
    HIDDEN,
    SENSITIVE_NAMES,
    SKELETON_LETTERS,
    SKELETONS,
    Verdict,
    fold,
    has_card_number,
)
from moesif_otel._redaction.text import MAX_NESTING, redact_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moesif_otel._events.media import Media
    from moesif_otel.settings import Settings

__all__ = ["Redaction", "Rules", "redaction_for"]

# Names are judged once each; clients can invent names without end, so the memory is bounded.
_MAX_JUDGED: Final = 4_096
_MAX_NAME_CHARACTERS: Final = 256

_LOWER: Final = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"abcdefghijklmnopqrstuvwxyz")
_IGNORED: Final = b"\0_-+ "
_NOT_IN_SKELETON: Final = bytes(set(range(256)) - set(SKELETON_LETTERS + SKELETON_LETTERS.upper()))
_SKELETON_SEARCHES: Final = tuple(re.compile(pattern).search for pattern in SKELETONS)
_ASCII_ESCAPE: Final = re.compile(rb"\\u00[2-7]")
# `https://user:password@host`, slashes escaped or not.
_USER_INFO: Final = re.compile(rb':\\?/\\?/[^/?#\s"\\<>]*@')
_SEGMENTS: Final = re.compile(r"[.\[\]:/$@]+")
_HIDE: Final = frozenset(fold(name) for name in SENSITIVE_NAMES)
_PLAIN_NAME: Final = re.compile(r'[^"\\/\x00-\x1f\x7f-\U0010ffff]+\Z')


class Rules:
    """What is hidden on one side of a call (request or response).

    Args:
        body_masks: Names whose values are removed from bodies, query strings and cookies.
        header_masks: Headers, and cookies, whose values are removed.
        auto: Whether well-known secrets are hidden.
        credential_headers: Headers that carry credentials besides the usual ones.
        opaque_allowed: Whether archives may pass although nobody can look into them.

    Thread-safe.
    """

    __slots__ = (
        "_always",
        "_judged",
        "_judged_headers",
        "_needles",
        "auto",
        "body_masks",
        "credential_headers",
        "header_masks",
        "opaque_allowed",
    )

    def __init__(
        self,
        body_masks: Iterable[str] = (),
        header_masks: Iterable[str] = (),
        *,
        auto: bool,
        credential_headers: Iterable[str] = (),
        opaque_allowed: bool = False,
    ) -> None:
        masks = tuple(body_masks)
        self.body_masks = frozenset(filter(None, map(fold, masks)))
        self.header_masks = frozenset(filter(None, map(fold, header_masks)))
        self.auto = auto
        self.credential_headers = frozenset(name.lower() for name in (*CREDENTIAL_HEADERS, *credential_headers))
        self.opaque_allowed = opaque_allowed
        self._judged: dict[str, Verdict] = {}
        self._judged_headers: dict[str, Verdict] = {}
        # Such a name can be written in several ways that the scan does not undo: then everything is looked into.
        self._always = not all(_PLAIN_NAME.match(name) for name in masks)
        self._needles = tuple(
            name.encode("utf-8", "replace").translate(None, _IGNORED) for name in sorted(self.body_masks)
        )

    @property
    def active(self) -> bool:
        """Whether there is anything to hide in bodies and texts."""
        return self.auto or bool(self._needles)

    def verdict(self, name: str) -> Verdict:
        """Judge a field's name; `user[password]` and `user.password` are judged by their parts too."""
        found = self._judged.get(name)
        if found is None:
            found = self._judge(name)
            if len(self._judged) < _MAX_JUDGED and len(name) <= _MAX_NAME_CHARACTERS:
                self._judged[name] = found
        return found

    def _judge(self, name: str) -> Verdict:
        whole = self._judge_folded(fold(name))
        if whole is Verdict.KEEP or whole is Verdict.CARD:
            for part in _SEGMENTS.split(name):
                found = self._judge_folded(fold(part))
                if found is Verdict.REMOVE or found is Verdict.HIDE:
                    return found
        return whole

    def _judge_folded(self, name: str) -> Verdict:
        if name in self.body_masks:
            return Verdict.REMOVE
        if self.auto:
            if name in _HIDE:
                return Verdict.HIDE
            if any(word in name for word in CARD_WORDS):
                return Verdict.CARD
        return Verdict.KEEP

    def header_verdict(self, name: str) -> Verdict:
        """Judge a header's lower-case name: a mask's, credentials, or a well-known secret's, also behind `x-`."""
        found = self._judged_headers.get(name)
        if found is None:
            found = self._judge_header(name)
            if len(self._judged_headers) < _MAX_JUDGED and len(name) <= _MAX_NAME_CHARACTERS:
                self._judged_headers[name] = found
        return found

    def _judge_header(self, name: str) -> Verdict:
        folded = fold(name)
        if folded in self.header_masks:
            return Verdict.REMOVE
        if self.auto and (name in self.credential_headers or not _HIDE.isdisjoint((folded, folded.removeprefix("x")))):
            return Verdict.HIDE
        return Verdict.KEEP

    def cookie_verdict(self, name: str) -> Verdict:
        """Judge a cookie's name: masks of bodies and of headers, well-known secrets, session cookies."""
        folded = fold(name)
        if folded in self.header_masks:
            return Verdict.REMOVE
        found = self.verdict(name)
        if found is Verdict.KEEP and self.auto and folded in COOKIES:
            return Verdict.HIDE
        return found

    def may_concern(self, data: bytes) -> bool:
        """Whether a text may hold a name that counts; False is certain, True asks for a closer look.

        Looks at the bytes as they are, without case, separators and the zeros of UTF-16. A URL with a password, and a
        text in which JSON's escapes could spell a name, ask for a closer look, too.
        """
        if self._always:
            return True
        if self.auto:
            skeleton = data.translate(_LOWER, _NOT_IN_SKELETON)
            for search in _SKELETON_SEARCHES:
                if search(skeleton) is not None:
                    return True
            if b"@" in data and _USER_INFO.search(data) is not None:
                return True
        if self._needles:
            flat = data.translate(_LOWER, _IGNORED)
            for needle in self._needles:
                if needle in flat:
                    return True
        if b"\\" not in data or not self.active:
            return False
        return _ASCII_ESCAPE.search(data.replace(b"\0", b"")) is not None

    def may_concern_text(self, text: str) -> bool:
        """The same for a text in which percent-escapes may spell a name as well."""
        return self.may_concern_encoded(text.encode("utf-8", "replace"))

    def may_concern_encoded(self, data: bytes) -> bool:
        """The same for bytes in which percent-escapes, of percent-escapes maybe, may spell a name as well."""
        for _ in range(MAX_NESTING):
            if self.may_concern(data):
                return True
            clear = unquote_to_bytes(data) if b"%" in data else data
            if clear == data:
                return False
            data = clear
        return self.active

    def redact_bytes(self, data: bytes, media: Media, *, whole: bool, readable: bool) -> bytes | None:
        """Give a body that is no JSON with everything hidden, or None when it must be left out.

        Args:
            data: The clear bytes.
            media: Its Content-Type.
            whole: Whether it is all of the body.
            readable: Whether its Content-Encoding could be undone.
        """
        if not self.active:
            return data
        return redact_body_bytes(self, data, media, whole=whole) if readable else None

    def redact_value(self, root: Any, *, card: bool = False, nesting: int = 0) -> Any:
        """Hide in a JSON value, in place; any depth, without recursion.

        Args:
            root: What a parser gave; nobody else may hold it.
            card: Whether it lies below a name like a card's.
            nesting: How many texts inside texts it lies in.

        Returns:
            The value; another one if `root` itself is a text or a number.
        """
        if root.__class__ is not dict and root.__class__ is not list:
            return self._leaf(root, card, nesting)
        stack: list[tuple[Any, bool]] = [(root, card)]
        while stack:
            node, in_card = stack.pop()
            if node.__class__ is list:
                for place, value in enumerate(node):
                    kind = value.__class__
                    if kind is dict or kind is list:
                        stack.append((value, in_card))
                    elif kind is str or in_card:
                        node[place] = self._leaf(value, in_card, nesting)
                continue
            for key, value in node.items():
                verdict = self.verdict(key)
                if verdict is Verdict.REMOVE:
                    node[key] = None
                elif verdict is Verdict.HIDE:
                    # Flags and nulls are no secrets, and say that there is none.
                    if value is not None and value.__class__ is not bool:
                        node[key] = HIDDEN
                else:
                    below = in_card or verdict is Verdict.CARD
                    kind = value.__class__
                    if kind is dict or kind is list:
                        stack.append((value, below))
                    elif kind is str or below:
                        node[key] = self._leaf(value, below, nesting)
        return root

    def _leaf(self, value: Any, card: bool, nesting: int) -> Any:
        if card and value.__class__ in {str, int} and has_card_number(str(value)):
            return HIDDEN
        if value.__class__ is str and ("=" in value or ":" in value or "%" in value):
            return redact_text(self, value, card=card, nesting=nesting)
        return value


class Redaction(NamedTuple):
    """The rules of both sides of a call."""

    request: Rules
    response: Rules


def redaction_for(settings: Settings) -> Redaction:
    """Give the rules that the settings ask for; made once for the same options."""

    def side(body_masks: tuple[str, ...], header_masks: tuple[str, ...]) -> Rules:
        return _side(
            body_masks,
            header_masks,
            auto=settings.auto_hide_sensitive,
            credential_headers=settings.authorization_header_name,
            opaque_allowed=settings.log_binary_body,
        )

    return Redaction(
        side(settings.request_body_masks, settings.request_header_masks),
        side(settings.response_body_masks, settings.response_header_masks),
    )


@lru_cache(maxsize=128)  # two entries a pipeline; values, not state
def _side(
    body_masks: tuple[str, ...],
    header_masks: tuple[str, ...],
    *,
    auto: bool,
    credential_headers: tuple[str, ...],
    opaque_allowed: bool,
) -> Rules:
    return Rules(
        body_masks,
        header_masks,
        auto=auto,
        credential_headers=credential_headers,
        opaque_allowed=opaque_allowed,
    )
