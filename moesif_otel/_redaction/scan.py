"""The quick scan: tells from a text's bytes whether it must be inspected.

Nearly every body passes here without being parsed, so this is the module whose speed counts. It may say yes for
nothing, it must never say no for a text in which a name that counts could be read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from moesif_otel._redaction.names import fold

if TYPE_CHECKING:
    from collections.abc import Iterable

_UPPER, _LOWER_CASE = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"abcdefghijklmnopqrstuvwxyz"
_LOWER: Final = bytes.maketrans(_UPPER, _LOWER_CASE)
# Some consonants, and the marks that stand around names. All else is taken out first, which leaves a third of a text.
_KEPT: Final = b'pswdcrtknvygz"&='
_NOT_KEPT: Final = bytes(set(range(256)) - set(_KEPT + _KEPT.upper()))
# Every name of SENSITIVE_NAMES and CARD_NAMES, so reduced, matches one of these (a test says so). Each begins with a
# letter of its own, the rarer the better, since `re` then looks for that letter first; one expression of all of them
# takes ten times as long.
_SEARCHES: Final = tuple(
    re.compile(pattern).search
    for pattern in (
        rb"k(?:n(?<=tkn)|y(?<=[pstng]ky))",  # token, …_key
        rb"p(?:ss[wpc]|wd|ns(?<=srspns)=)",  # password, passphrase, passcode, pwd; SAMLResponse of a form
        rb"c(?:rd|r(?<=scr)t|v[vc]|cnr|dvrr)",  # credential and card, secret, cvv and cvc, ccnumber, code_verifier
        rb"z(?<=trz)tn",  # authorization
        rb"gn(?<=sgn)tr",  # signature
        rb"=(?:(?<=[sc][gd]=)|(?<=rtn=)|(?<=snd=))",  # of a query: sig, code, assertion; of a path: jsessionid
    )
)
_IGNORED: Final = b"\0_-+ \t"
# Blanks in a name do not count either where a URL or UTF-8 writes them so.
_SPELLED_BLANKS: Final = (b"%20", b"%2b", b"\xc2\xa0")
# Letters that need no escape but have one may spell a name: `%70assword`, `\u0070assword`, `&#112;assword`. An escaped
# percent sign may be the first half of an escape, an escaped `@` may end the password of a URL.
_SPELLED: Final = re.compile(
    rb"%(?:[46][1-9A-Fa-f]|[57][0-9Aa]|40|3[0-9]|2[5DEde]|5[CcFf]|(?<=(?i:ig|de|on|se)%)3[Dd]|[Cc]2%[Aa]0)"
    rb"|\\{1,32}u00[2-7]|&(?:#|nbsp|NonBr|colon|equals|quot|lowbar|UnderB|commat|sol)"
)
_USER_INFO: Final = re.compile(rb'/\\{0,8}/[^/?#\s"\\<>]*@')
# `64 in data` looks for one byte; `b"@" in data` tries its argument as a number first, and raises within.
_AT, _BACKSLASH, _PERCENT, _AMPERSAND = b"@\\%&"
_PLAIN_MASK: Final = re.compile(r"[ !#$'-.0-;=-\[\]-~]+\Z")  # ASCII without quotes, slashes and `%&<`


class QuickScan:
    """Looks for the names that count on one side of a call: masks, and with `auto` the well-known secrets."""

    __slots__ = ("_always", "_auto", "_needles")

    def __init__(self, masks: Iterable[str], *, auto: bool) -> None:
        names = tuple(masks)
        self._auto = auto
        # Such a name can be written in ways that the scan does not undo: then everything is inspected.
        self._always = not all(_PLAIN_MASK.match(name) for name in names)
        needles = {fold(name).encode("utf-8", "replace").translate(None, _IGNORED) for name in names}
        self._needles = tuple(needles - {b""})

    def may_concern(self, data: bytes) -> bool:
        """Tell whether a text may hold a name that counts, or a URL's password; False is certain."""
        if self._always:
            return True
        if self._auto:
            skeleton = data.translate(_LOWER, _NOT_KEPT)
            for search in _SEARCHES:
                if search(skeleton) is not None:
                    return True
            if _AT in data and _USER_INFO.search(data) is not None:
                return True
        elif not self._needles:
            return False
        if self._needles:
            flat = data.translate(_LOWER, _IGNORED)
            for blank in _SPELLED_BLANKS:
                flat = flat.replace(blank, b"")
            if self._has_name(flat):
                return True
            if _BACKSLASH in flat:  # blanks as JSON writes them, maybe inside of other JSON
                flat = flat.replace(b"\\t", b"").replace(b"\\u00a0", b"").replace(b"\\", b"")
                if self._has_name(flat):
                    return True
        return (_BACKSLASH in data or _PERCENT in data or _AMPERSAND in data) and _SPELLED.search(data) is not None

    def _has_name(self, flat: bytes) -> bool:
        for needle in self._needles:  # noqa: SIM110 - a generator would cost as much as the search
            if flat.find(needle) >= 0:
                return True
        return False
