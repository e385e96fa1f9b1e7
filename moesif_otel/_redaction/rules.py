"""Decides what is hidden on one side of a call, name by name: the options' masks and the well-known names.

A `Rules` never changes, except for a bounded memory of names that it has judged. Thread-safe.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from moesif_otel._redaction.names import (
    COOKIE_HEADERS,
    CREDENTIAL_HEADERS,
    SENSITIVE_NAMES,
    Verdict,
    fold,
    is_card_name,
    is_secret_cookie,
    is_secret_header,
    is_secret_name,
    is_secret_query,
)
from moesif_otel._redaction.scan import QuickScan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moesif_otel.settings import Settings

# Clients can invent names without end: the memory forgets what was not asked for longest, and long names at once.
_MAX_JUDGED: Final = 4_096
MAX_REMEMBERED: Final = 128
"""Names of more characters are judged anew each time."""

_SEGMENTS: Final = re.compile(r"[.\[\]:/$@!]+")
_WORDS: Final = re.compile(r"[^\W_]+")
_WORDY: Final = re.compile(r"[\w.\- ]+\Z")


class Rules:
    """Decides what is hidden on one side of a call (request or response).

    Args:
        body_masks: Names whose values are removed from bodies, query strings and cookies.
        header_masks: Headers, and cookies, whose values are removed.
        auto: Well-known secrets are hidden.
        credential_headers: Headers that carry credentials besides the usual ones.
        opaque_allowed: Bodies that cannot be inspected may pass (`LOG_BINARY_BODY`).

    Attributes:
        active: There is anything to hide in bodies and texts.
        last_words: The words with which names of several words end, so that `API Key: …` is seen from its end.
        odd_masks: Finds masks that are no words at all, where texts are not split into names; or None.
    """

    __slots__ = (
        "_body_masks", "_header_masks", "_hides_cookies", "_judged", "_judged_headers", "_judged_query", "active",
        "auto", "credential_headers", "last_words", "may_concern", "odd_masks", "opaque_allowed",
    )  # fmt: skip

    def __init__(
        self,
        body_masks: Iterable[str] = (),
        header_masks: Iterable[str] = (),
        *,
        auto: bool,
        credential_headers: Iterable[str] = (),
        opaque_allowed: bool = False,
    ) -> None:
        masks = tuple(mask for mask in body_masks if fold(mask))
        self._body_masks = frozenset(map(fold, masks))
        self._header_masks = frozenset(filter(None, map(fold, header_masks)))
        self.auto = auto
        self.active = auto or bool(masks)
        self._hides_cookies = self.active or bool(self._header_masks)
        self.credential_headers = frozenset(name.lower() for name in (*CREDENTIAL_HEADERS, *credential_headers))
        self.opaque_allowed = opaque_allowed
        self.may_concern = QuickScan(masks, auto=auto).may_concern
        named = [_WORDS.findall(name.lower()) for name in (*masks, *(SENSITIVE_NAMES if auto else ()))]
        self.last_words = frozenset(words[-1] for words in named if len(words) > 1)
        odd = [re.escape(mask) for mask in masks if not _WORDY.match(mask)]
        self.odd_masks = re.compile("|".join(odd), re.IGNORECASE) if odd else None
        self._judged = lru_cache(_MAX_JUDGED)(self._judge)
        self._judged_headers = lru_cache(_MAX_JUDGED)(self._judge_header)
        self._judged_query = lru_cache(_MAX_JUDGED)(self._judge_query)

    def may_concern_text(self, text: str) -> bool:
        """Tell whether a text may hold a name that counts; False is certain."""
        return self.may_concern(text.encode("utf-8", "surrogatepass"))

    def verdict(self, name: str) -> Verdict:
        """Judge a field's name; `user[password]` and `user.password` are judged by their parts too."""
        return self._judged(name) if len(name) <= MAX_REMEMBERED else self._judge(name)

    def _judge(self, name: str) -> Verdict:
        whole = self._judge_folded(fold(name))
        if whole is Verdict.KEEP and _SEGMENTS.search(name) is not None:
            for part in _SEGMENTS.split(name):
                found = self._judge_folded(fold(part))
                if found is not Verdict.KEEP:
                    return found
        if whole is Verdict.KEEP and self.auto and is_card_name(name):
            return Verdict.CARD
        return whole

    def is_label(self, text: str) -> bool:
        """Tell whether a whole text is a name whose value is hidden; texts are without end, so none is remembered."""
        if self._judge_folded(fold(text)) is not Verdict.KEEP:
            return True
        return ("." in text or "[" in text) and self._judge(text) in {Verdict.HIDE, Verdict.REMOVE}

    def _judge_folded(self, folded: str) -> Verdict:
        if folded in self._body_masks:
            return Verdict.REMOVE
        return Verdict.HIDE if self.auto and is_secret_name(folded) else Verdict.KEEP

    def header_verdict(self, name: str) -> Verdict:
        """Judge a header's lower-case name: a mask's, credentials, or a well-known secret's."""
        return self._judged_headers(name) if len(name) <= MAX_REMEMBERED else self._judge_header(name)

    def _judge_header(self, name: str) -> Verdict:
        if fold(name) in self._header_masks:
            return Verdict.REMOVE
        if self.auto and (name in self.credential_headers or is_secret_header(name)):
            return Verdict.HIDE
        return Verdict.KEEP

    def header_stays(self, name: str) -> bool:
        """Tell whether a header, by its lower-case name, is shown as it is unless its value looks concerned."""
        if name in COOKIE_HEADERS and self._hides_cookies:
            return False
        return self.header_verdict(name) is Verdict.KEEP

    def cookie_verdict(self, name: str) -> Verdict:
        """Judge a cookie's name: masks of bodies and of headers, well-known secrets, session cookies."""
        if fold(name) in self._header_masks:
            return Verdict.REMOVE
        found = self.verdict(name)
        return Verdict.HIDE if found is Verdict.KEEP and self.auto and is_secret_cookie(name) else found

    def query_verdict(self, name: str) -> Verdict:
        """Judge the name of a query parameter: fields' names, and names of credentials in URLs."""
        return self._judged_query(name) if len(name) <= MAX_REMEMBERED else self._judge_query(name)

    def _judge_query(self, name: str) -> Verdict:
        found = self.verdict(name)
        return Verdict.HIDE if found is Verdict.KEEP and self.auto and is_secret_query(fold(name)) else found


class Redaction(NamedTuple):
    """The rules of both sides of a call."""

    request: Rules
    response: Rules


def redaction_for(settings: Settings) -> Redaction:
    """Return the rules that the settings ask for."""

    def side(body_masks: Iterable[str], header_masks: Iterable[str]) -> Rules:
        return Rules(
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
