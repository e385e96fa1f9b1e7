"""The verdict on a request: which headers are added, and what is answered instead of the application.

Owns: `Verdict`, the merging of headers of several rules, and which headers may be sent at all.
Threads: a verdict belongs to the request that it was made for.
Never: gives a header that would break the answer (line breaks, framing, hop-by-hop, outside latin-1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moesif_otel._remote.skips import Skips

__all__ = ["HeaderMerge", "Verdict", "add_headers", "phrase_of"]

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_VALUE: Final = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")  # RFC 9110, 5.5, as latin-1: what PEP 3333 and Tornado send
# The server's own business: PEP 3333 forbids hop-by-hop headers, and a wrong length breaks the connection.
_FRAMING: Final = frozenset(
    {
        "connection",
        "content-length",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "trailers",
        "transfer-encoding",
        "upgrade",
    }
)
_FALLBACK_PHRASES: Final = {
    1: "Informational",
    2: "Success",
    3: "Redirection",
    4: "Client Error",
    5: "Server Error",
}
_NO_BODY: Final = frozenset({204, 205, 304})


def phrase_of(status: int) -> str:
    """Give the phrase of a status, that of its class (RFC 9110, 15) when it has none of its own."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return _FALLBACK_PHRASES.get(status // 100, "Unknown Status")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What governance decided about one request.

    Attributes:
        blocked: The application must not be called; answer with the rest of this verdict.
        status: Status of the answer; 0 when not blocked.
        headers: Headers to add; when blocked all of the answer's, `Content-Type` and `Content-Length` included.
        body: Body of the answer; None when not blocked, empty when the rule has none.
        blocked_by: Id of the rule that blocked, for the event.
    """

    blocked: bool
    status: int
    headers: list[tuple[str, str]]
    body: bytes | None
    blocked_by: str | None

    @property
    def phrase(self) -> str:
        """The status's phrase (Tornado's `reason`)."""
        return phrase_of(self.status)

    @property
    def status_line(self) -> str:
        """Status and phrase, as WSGI's `start_response` takes them."""
        return f"{self.status} {self.phrase}"

    def added_to(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Give the application's headers with this verdict's behind them (`add_headers`). Never raises."""
        try:
            return add_headers(headers, self.headers)
        except Exception:  # no pairs of strings: the application's affair, and the server will tell it
            return headers


class HeaderMerge:
    """Headers of several rules: a later one overrides an earlier one of the same name, in any case."""

    __slots__ = ("_by_name", "_skips")

    def __init__(self, skips: Skips) -> None:
        self._by_name: dict[str, tuple[str, str]] = {}
        self._skips = skips

    def __len__(self) -> int:
        return len(self._by_name)

    def add(self, headers: Iterable[tuple[str, str]], rule_id: str) -> None:
        """Merge one rule's headers; one that cannot be sent is left out alone."""
        for name, value in headers:
            key = name.lower()
            if _TOKEN.fullmatch(name) is None or _VALUE.fullmatch(value) is None:
                self._skips.note("governance header", rule_id, "name or value cannot be sent in a header")
            elif key in _FRAMING:
                self._skips.note("governance header", rule_id, "the server sets this header itself")
            else:
                self._by_name[key] = (name, value.strip(" \t"))

    def added(self) -> Verdict | None:
        """Give the verdict on a request that no rule blocks."""
        if not self._by_name:
            return None
        return Verdict(blocked=False, status=0, headers=list(self._by_name.values()), body=None, blocked_by=None)

    def blocked(self, status: int, body: bytes | None, rule_id: str) -> Verdict:
        """Give the verdict on a request that a rule blocks."""
        if status in _NO_BODY or status < 200:
            body = None  # RFC 9110, 6.4.1: a body there would be read as the next answer
        headers = dict(self._by_name)
        if body is not None:
            headers.setdefault("content-type", ("Content-Type", "application/json"))
        sized = list(headers.values())
        if status not in {204, 304} and status >= 200:
            sized.append(("Content-Length", str(len(body or b""))))
        return Verdict(blocked=True, status=status, headers=sized, body=body or b"", blocked_by=rule_id)


def add_headers(headers: list[tuple[str, str]], added: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Give the application's headers with a verdict's behind them.

    Order and repetition of the application's own stay as they are. A `Content-Type` of the application is not
    repeated: two of them make an answer that clients read differently.

    Args:
        headers: What the application sent; not changed.
        added: `Verdict.headers`.
    """
    has_type = any(name.lower() == "content-type" for name, _ in headers)
    return [*headers, *((name, value) for name, value in added if not (has_type and name.lower() == "content-type"))]
