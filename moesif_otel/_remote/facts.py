"""The facts of a call that rules and sampling can test, by the names that conditions use.

A `RequestFacts` belongs to the thread or task that serves its request, and is dropped after the decision.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

import orjson

from moesif_otel._remote.expressions import Allowance, OutOfTimeError, Pattern

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_HEADERS: Final = "request.headers."
_BODY: Final = "request.body."
_PLAIN_FIELDS: Final = {
    "request.verb": "verb",
    "request.route": "route",
    "request.ip_address": "ip_address",
    "request.ip": "ip_address",  # its name in the Python SDK
    "response.status": "status",  # sampling only: governance decides before there is a response
}
# `request.body.$unreadable` is why a body could not be read as JSON; missing if it could, or if there is no body.
_UNREADABLE: Final = "$unreadable"
_NOT_ASKED: Final = object()
_SLASHES: Final = re.compile("//+")


class Field:
    """A parsed condition path: the kind of fact, and its name within that kind.

    There is one object per path in a set of rules: it is looked up by identity, hundreds of times per request.
    """

    __slots__ = ("kind", "name")

    def __init__(self, kind: str, name: str = "") -> None:
        self.kind = kind
        self.name = name

    @classmethod
    def of(cls, path: str) -> Field:
        """Parse a condition's path; an unknown path names a field that is always missing."""
        if path in _PLAIN_FIELDS:
            return cls(_PLAIN_FIELDS[path])
        if path.startswith(_HEADERS):
            return cls("header", path[len(_HEADERS) :].lower())
        if path.startswith(_BODY):
            return cls("body", path[len(_BODY) :])
        return cls("unknown")


class Condition:
    """A field and the expression that its text must match; equal ones are one object, evaluated once per request."""

    __slots__ = ("field", "pattern")

    def __init__(self, field: Field, pattern: Pattern) -> None:
        self.field = field
        self.pattern = pattern


def route_of(uri: str) -> str:
    """Return the path of a URI, or `/` if it has none; a malformed URI is returned without its query."""
    try:
        return urlsplit(uri).path or "/"
    except ValueError:
        return uri.partition("?")[0]


def _spellings(route: str) -> Iterator[str]:
    """Yield a path, and what frameworks make of it: they decode it (`/%61dmin`) and drop slashes (`//admin`)."""
    yield route
    decoded = unquote(route)
    if decoded != route:
        yield decoded
    if "//" in decoded:
        yield _SLASHES.sub("/", decoded)


def as_text(value: object) -> str | None:
    """Return a JSON scalar as text (`true`, `5`, `1.5`); None for null, lists, objects and anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, (bool, int, float)):
        try:
            return orjson.dumps(value).decode()
        except orjson.JSONEncodeError:  # over 64 bits
            return str(value)
    return None


def as_id(value: object) -> str | None:
    """Return an identity as the text that Moesif uses as the key of its cohorts; None if there is none."""
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else str(value)


class CallFacts(NamedTuple):
    """The facts that sampling can test; an absent one is None. The route is the path without query."""

    verb: str | None = None
    route: str | None = None
    ip_address: str | None = None
    status: int | str | None = None


class BodyNeededError(Exception):
    """A rule whose other conditions hold depends on the request's body, which has not been given yet."""


class RequestFacts:
    """The facts that governance can test, and the conditions evaluated so far.

    The URI is the full one; `headers` have lower-case names, and repeated ones are joined with a comma.
    """

    __slots__ = ("_allowance", "_body", "_headers", "_held", "_ip", "_routes", "_seen", "_unreadable", "_verb")

    def __init__(self, *, verb: str, uri: str, headers: Mapping[str, str], ip_address: str | None) -> None:
        route = route_of(uri)
        # The path first, so that a long query that makes a search slow hides nothing.
        self._routes = (*_spellings(route), uri) if "%" in route or "//" in route else (route, uri)
        self._verb = verb
        self._ip = ip_address
        self._headers = headers
        self._body: Any = _NOT_ASKED
        self._unreadable: str | None = None
        self._allowance = Allowance()
        self._held: dict[Condition, bool | None] = {}
        self._seen: dict[Field, tuple[str, ...]] = {}

    def give_body(self, value: Any, unreadable: str | None = None) -> None:
        """Set the parsed body; `unreadable` is why there is a body that could not be parsed."""
        self._body = value
        self._unreadable = unreadable

    def holds(self, condition: Condition) -> bool:
        """Return whether a condition holds; each is evaluated once, and all share one time limit.

        Raises:
            BodyNeededError: It depends on the body, which has not been given.
            OutOfTimeError: Its expression ran out of time.
        """
        if condition in self._held:
            held = self._held[condition]
        else:
            held = self._held[condition] = self._evaluate(condition)
        if held is None:
            raise OutOfTimeError
        return held

    def _evaluate(self, condition: Condition) -> bool | None:
        field, matches = condition.field, condition.pattern.matches
        texts = self._seen.get(field)
        if texts is None:
            texts = self._seen[field] = tuple(text for text in self._find(field) if text)
        answer: bool | None = False
        for text in texts:
            try:
                if matches(text, self._allowance):
                    return True
            except OutOfTimeError:
                answer = None  # unless another of the texts matches
        return answer

    def _find(self, field: Field) -> tuple[str | None, ...]:
        """Return the texts of a field, any of which may match; empty if the field is missing.

        `request.route` has the path and the full URI: rules are written for either.
        """
        kind = field.kind
        if kind == "route":
            return self._routes
        if kind == "verb":
            return (self._verb,)
        if kind == "ip_address":
            return (self._ip,)
        if kind == "body":
            if self._body is _NOT_ASKED:
                raise BodyNeededError
            if field.name == _UNREADABLE:
                return (self._unreadable,)
            return (as_text(self._body.get(field.name)),) if isinstance(self._body, dict) else ()
        if kind == "header":
            return (self._headers.get(field.name),)
        return ()
