"""One governance rule, compiled: whom it is for, which requests it matches, what it answers.

Owns: reading one rule of `GET /v1/rules` strictly, so that a request meets no surprise later.
Threads: read on the poller's thread, used by every thread; nothing in a `Rule` changes.
Never: lets a malformed rule through; a `RuleError` names what is wrong in fixed words, without its content.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import orjson

from moesif_otel._remote.facts import Field, as_text, read_path
from moesif_otel._remote.merge_tags import fill, has_tags
from moesif_otel._remote.patterns import Allowance, Pattern, PatternError, compile_pattern

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moesif_otel._remote.facts import RequestFacts

__all__ = ["Answer", "Condition", "Conditions", "Rule", "RuleError", "read_conditions", "read_rule"]

_KINDS: Final = frozenset({"regex", "company", "user"})
# `100 Continue` and the like would not end a call, but any three digits are a status that a rule may ask for.
_LOWEST_STATUS: Final = 100
_HIGHEST_STATUS: Final = 999


class RuleError(ValueError):
    """A rule, or an entry of the configuration, cannot be used; the message is fixed text."""


@dataclass(frozen=True, eq=False, slots=True)
class Condition:
    """One path and the expression that its text must match; equal ones are one object, asked once a request."""

    field: Field
    pattern: Pattern

    def holds(self, facts: RequestFacts, allowance: Allowance) -> bool:
        """Say whether the request has such a text. Raises `OutOfTimeError`."""
        for text in facts.texts(self.field):  # noqa: SIM110 - a generator costs as much as the match
            if self.pattern.matches(text, allowance):
                return True
        return False


class Conditions:
    """Every condition of a set of rules, by path and expression."""

    __slots__ = ("_conditions", "_fields")

    def __init__(self) -> None:
        self._conditions: dict[tuple[str, str], Condition] = {}
        self._fields: dict[str, Field] = {}

    def get_or_make(self, path: str, expression: str) -> Condition:
        """Give the one condition of this path and expression. Raises `PatternError`."""
        found = self._conditions.get((path, expression))
        if found is None:
            known = self._fields.setdefault(path, read_path(path))
            found = self._conditions[path, expression] = Condition(known, compile_pattern(expression))
        return found


@dataclass(frozen=True, slots=True)
class Answer:
    """What a rule adds to a response, and what it answers instead of the application."""

    headers: tuple[tuple[str, str], ...] = ()
    status: int | None = None  # None: the rule does not block
    body: bytes | None = None
    body_template: Any = None  # set where the body has tags; `body` is then made for each request
    header_tags: bool = False

    def headers_for(self, values: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        """Give the headers with their tags replaced."""
        if not self.header_tags:
            return self.headers
        return tuple((fill(name, values), fill(value, values)) for name, value in self.headers)

    def body_for(self, values: Mapping[str, str]) -> bytes | None:
        """Give the body as JSON with its tags replaced; None when the rule has no body."""
        if self.body_template is None:
            return self.body
        return orjson.dumps(fill(self.body_template, values))


@dataclass(frozen=True, slots=True)
class Rule:
    """A compiled rule.

    Attributes:
        rule_id: Moesif's id of it, the event's `blocked_by`.
        kind: `regex`, `company` or `user`.
        for_others: `applied_to` is `not_matching`: it applies to those outside the cohort.
        for_unidentified: It applies to calls without an identity.
        groups: Any of these groups must hold, in it all conditions; None matches every request.
        answer: What it does.
    """

    rule_id: str
    kind: str
    for_others: bool = False
    for_unidentified: bool = False
    groups: tuple[tuple[Condition, ...], ...] | None = None
    answer: Answer = field(default_factory=Answer)

    @property
    def needs_body(self) -> bool:
        """Whether a condition looks into the request's body."""
        return any(condition.field.kind == "body" for group in self.groups or () for condition in group)


def read_rule(raw: object, conditions: Conditions) -> Rule:
    """Compile one rule.

    Raises:
        RuleError: A part is missing, has a wrong type, or an expression cannot be used.
    """
    if not isinstance(raw, dict):
        raise RuleError("not an object")
    rule_id, kind = raw.get("_id"), raw.get("type")
    if not isinstance(rule_id, str) or not rule_id:
        raise RuleError("no _id")
    if kind not in _KINDS:
        raise RuleError("unknown type")
    applied_to = raw.get("applied_to") or "matching"
    if applied_to not in {"matching", "not_matching"}:
        raise RuleError("unknown applied_to")
    return Rule(
        rule_id=rule_id,
        kind=kind,
        for_others=applied_to == "not_matching",
        for_unidentified=_flag(raw, "applied_to_unidentified"),
        groups=_groups(raw.get("regex_config"), conditions),
        answer=_answer(raw),
    )


def read_conditions(raw: object, conditions: Conditions) -> tuple[Condition, ...]:
    """Compile the conditions of one group.

    Raises:
        RuleError: They are no list of path and expression, or an expression cannot be used.
    """
    if not isinstance(raw, dict) or not isinstance(raw.get("conditions"), list):
        raise RuleError("conditions are not a list")
    found = []
    for entry in raw["conditions"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise RuleError("a condition without a path")
        expression = as_text(entry.get("value"))
        if expression is None:
            raise RuleError("a condition whose value is no text")
        try:
            found.append(conditions.get_or_make(entry["path"], expression))
        except PatternError as exc:
            raise RuleError(str(exc)) from exc
    return tuple(found)


def _flag(raw: dict[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise RuleError(f"{name} is not true or false")
    return bool(value)


def _groups(raw: object, conditions: Conditions) -> tuple[tuple[Condition, ...], ...] | None:
    if raw is None or raw == []:
        return None
    if not isinstance(raw, list):
        raise RuleError("regex_config is not a list")
    # A group without conditions matches nothing, as in the Python SDK.
    return tuple(group for group in (read_conditions(entry, conditions) for entry in raw) if group)


def _answer(raw: dict[str, Any]) -> Answer:
    blocks = _flag(raw, "block")
    response = raw.get("response")
    if response is None and not blocks:
        return Answer()
    if not isinstance(response, dict):
        raise RuleError("response is not an object")
    variables = raw.get("variables") or []
    if not isinstance(variables, list) or not all(isinstance(variable, dict) for variable in variables):
        raise RuleError("variables are not a list of objects")
    tagged = bool(variables)
    headers = _headers(response.get("headers"))
    header_tags = tagged and any(has_tags(name) or has_tags(value) for name, value in headers)
    if not blocks:
        return Answer(headers=headers, header_tags=header_tags)
    body = response.get("body")
    template = body if tagged and has_tags(body) else None
    return Answer(
        headers=headers,
        header_tags=header_tags,
        status=_status(response.get("status")),
        body=None if template is not None or "body" not in response else orjson.dumps(body),
        body_template=template,
    )


def _headers(raw: object) -> tuple[tuple[str, str], ...]:
    if raw is None:
        return ()
    if not isinstance(raw, dict):
        raise RuleError("response headers are not an object")
    # A value that is no text at all is kept as a line break, which no header can hold: that header alone is left out.
    return tuple((name, "\n" if (text := as_text(value)) is None else text) for name, value in raw.items())


def _status(raw: object) -> int:
    if isinstance(raw, str) and len(raw) == 3 and raw.isascii() and raw.isdecimal():
        raw = int(raw)
    if isinstance(raw, bool) or not isinstance(raw, int) or not _LOWEST_STATUS <= raw <= _HIGHEST_STATUS:
        raise RuleError("status is not a number of three digits")
    return raw
