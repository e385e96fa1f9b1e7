"""What a rule can look at: the fields of a request, by the names that conditions use.

Owns: reading a condition's path once (`read_path`), and giving the texts that a path stands for (`RequestFacts`).
Threads: a `RequestFacts` belongs to the one thread or task that serves its request.
Never: reads a body itself (it is given a function), keeps a request beyond the decision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import orjson

from moesif_otel._remote.patterns import MAX_TEXT_CHARS

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._guard import Guard

__all__ = ["UNKNOWN_FIELD", "CallFacts", "Field", "RequestFacts", "as_id", "as_text", "read_path", "route_of"]

_HEADERS: Final = "request.headers."
_BODY: Final = "request.body."
_PLAIN_FIELDS: Final = {
    "request.verb": "verb",
    "request.route": "route",
    "request.ip_address": "ip_address",
    "request.ip": "ip_address",  # the Python SDK's name of it
    "response.status": "status",  # sampling only: governance decides before there is a response
}


@dataclass(frozen=True, eq=False, slots=True)
class Field:
    """A condition's path, read: what kind of thing it names, and its name among them.

    One object for a path in a set of rules: it is looked up by identity, hundreds of times a request.
    """

    kind: str
    name: str = ""


UNKNOWN_FIELD: Final = Field("unknown")


def read_path(path: str) -> Field:
    """Read a condition's path; one that nobody documented names a field that is always missing."""
    if path in _PLAIN_FIELDS:
        return Field(_PLAIN_FIELDS[path])
    if path.startswith(_HEADERS):
        return Field("header", path[len(_HEADERS) :].lower())
    if path.startswith(_BODY):
        return Field("body", path[len(_BODY) :])
    return UNKNOWN_FIELD


def route_of(uri: str) -> str:
    """Give the path of a URI without its query, `/` when it has none; what cannot be split is given as it is."""
    try:
        return urlsplit(uri).path or "/"
    except ValueError:
        return uri.partition("?")[0]


def as_text(value: object) -> str | None:
    """Give a JSON scalar as text (`true`, `5`, `1.5`); None for null, lists, objects and anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        try:
            return orjson.dumps(value).decode()
        except orjson.JSONEncodeError:  # over 64 bits
            return str(value)
    return None


def as_id(value: object) -> str | None:
    """Give an identity as the text that Moesif keys its cohorts by; None when there is none."""
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else str(value)


@dataclass(frozen=True, slots=True)
class CallFacts:
    """What sampling can look at; an absent fact is None.

    Attributes:
        verb: HTTP method.
        route: Path without query.
        ip_address: The client's address.
        status: Status of the response; a number is fine, expressions see its text.
    """

    verb: str | None = None
    route: str | None = None
    ip_address: str | None = None
    status: int | str | None = None


class RequestFacts:
    """What governance can look at.

    Args:
        verb: HTTP method.
        uri: Full URI, query included.
        ip_address: The client's address.
        header: Gives a request header by its lower-case name, repeated ones joined with a comma; None without it.
        body: Gives the parsed JSON body, or None when there is none; called once at most, and only when a rule that
            has come so far has a body condition.
        guard: Where a failing `header` or `body` is counted.

    Belongs to one thread.
    """

    __slots__ = ("_body", "_guard", "_header", "_parsed", "_seen", "ip_address", "route", "uri", "verb")

    def __init__(
        self,
        *,
        verb: str,
        uri: str,
        ip_address: str | None = None,
        header: Callable[[str], str | None] | None = None,
        body: Callable[[], Any] | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.verb = verb
        self.uri = uri
        self.route = route_of(uri)
        self.ip_address = ip_address
        self._header = header
        self._body = body
        self._guard = guard
        self._parsed: Any = None
        self._seen: dict[Field, tuple[str, ...]] = {}

    def texts(self, field: Field) -> tuple[str, ...]:
        """Give the texts that a path stands for, any of which may match; empty when the field is missing.

        `request.route` stands for the full URI and for the path: rules are written for either.
        """
        found = self._seen.get(field)
        if found is None:
            found = self._seen[field] = tuple(text[:MAX_TEXT_CHARS] for text in self._find(field) if text)
        return found

    def _find(self, field: Field) -> tuple[str | None, ...]:
        kind = field.kind
        if kind == "route":
            return (self.uri, self.route)
        if kind == "verb":
            return (self.verb,)
        if kind == "ip_address":
            return (self.ip_address,)
        try:
            if kind == "header" and self._header is not None:
                return (as_text(self._header(field.name)),)
            if kind == "body":
                body = self._body_once()
                return (as_text(body.get(field.name)),) if isinstance(body, dict) else ()
        except Exception as exc:
            if self._guard is not None:
                self._guard.caught("governance: reading a request", exc)
        return ()

    def _body_once(self) -> Any:
        if self._body is not None:
            read, self._body = self._body, None
            self._parsed = read()
        return self._parsed
