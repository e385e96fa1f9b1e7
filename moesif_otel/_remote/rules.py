"""One compiled governance rule: whom it applies to, which requests it matches, what it answers.

Rules are parsed strictly on the poller's thread, so that errors show there and not in a request. A rule that cannot be
used is ignored and counted. A `Rule` is immutable.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from moesif_otel._remote.expressions import Pattern, RuleError
from moesif_otel._remote.facts import Condition, Field, as_text

if TYPE_CHECKING:
    from collections.abc import Mapping

_KINDS: Final = frozenset({"regex", "company", "user"})
# `100 Continue` and the like would not end a call, but a rule may ask for any status of three digits.
_STATUSES: Final = range(100, 1_000)
# With spaces inside the braces it is the syntax of another template language.
_TAG: Final = re.compile(r"\{\{([^{}\s](?:[^{}]*[^{}\s])?)\}\}")
_UNKNOWN: Final = "UNKNOWN"  # what a tag without a value becomes (Moesif's API documentation)
# orjson writes at most 254 levels, and a tag may stand at any of them.
_MAX_BODY_DEPTH: Final = 200
# Rules come from Moesif, or from whatever answers in its place: their cost for a request is bounded.
_MAX_CONDITIONS: Final = 2_000  # distinct ones: compiling them holds the interpreter lock
_MAX_USES: Final = 20_000  # of conditions in groups
_MAX_HEADERS: Final = 100  # of one rule
_MAX_BODY_BYTES: Final = 256 * 1024  # of one rule, as JSON, before tags are replaced
MAX_VALUE_CHARS: Final = 1_000  # longest text that a merge tag may be replaced by


class MalformedError(ValueError):
    """A whole answer of Moesif is malformed; the last good one stays in use. The message is fixed text."""


class Conditions:
    """All conditions of a set of rules, so that equal ones are compiled once, and evaluated once per request."""

    def __init__(self) -> None:
        self._uses = 0
        self._conditions: dict[tuple[str, str], Condition] = {}
        self._fields: dict[str, Field] = {}

    def get_or_make(self, path: str, expression: str) -> Condition:
        """Return the condition for this path and expression. Raises `RuleError`."""
        self._uses += 1
        if self._uses > _MAX_USES:
            raise RuleError(f"over {_MAX_USES:,} conditions")
        found = self._conditions.get((path, expression))
        if found is None:
            if len(self._conditions) >= _MAX_CONDITIONS:
                raise RuleError(f"over {_MAX_CONDITIONS:,} different conditions")
            known = self._fields.get(path) or self._fields.setdefault(path, Field.of(path))
            found = self._conditions[path, expression] = Condition(known, Pattern(expression))
        return found


class Action(NamedTuple):
    """The headers that a rule adds to a response, or the response that it sends instead of the application's."""

    headers: tuple[tuple[str, str], ...] = ()
    status: int | None = None  # None: the rule does not block
    body: bytes | None = None  # as JSON
    body_template: Any = None  # of a body with tags, which is filled in for each request
    header_tags: bool = False

    def headers_for(self, values: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        """Return the headers with their tags replaced."""
        if not self.header_tags:
            return self.headers
        return tuple((_filled(name, values), _filled(value, values)) for name, value in self.headers)

    def body_for(self, values: Mapping[str, str]) -> bytes | None:
        """Return the body as JSON with its tags replaced; None if the rule has no body."""
        return self.body if self.body_template is None else orjson.dumps(_filled(self.body_template, values))


class Rule(NamedTuple):
    """A compiled rule; `rule_id` is the event's `blocked_by`."""

    rule_id: str
    kind: str
    for_others: bool  # `applied_to` is `not_matching`: it applies to those outside the cohort
    for_unidentified: bool
    groups: tuple[tuple[Condition, ...], ...] | None  # all conditions of one group must hold; None matches everything
    action: Action


def read_rule(raw: object, conditions: Conditions) -> Rule:
    """Compile one rule of `GET /v1/rules`. Raises `RuleError` if any part of it cannot be used."""
    if not isinstance(raw, dict):
        raise RuleError("not an object")
    rule_id, kind = raw.get("_id"), raw.get("type")
    if not isinstance(rule_id, str) or not rule_id:
        raise RuleError("no _id")
    if not isinstance(kind, str) or kind not in _KINDS:
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
        action=_action(raw),
    )


def read_conditions(raw: object, conditions: Conditions) -> tuple[Condition, ...]:
    """Compile the conditions of one group. Raises `RuleError`."""
    if not isinstance(raw, dict) or not isinstance(raw.get("conditions"), list):
        raise RuleError("conditions are not a list")
    found = []
    for entry in raw["conditions"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise RuleError("a condition without a path")
        expression = as_text(entry.get("value"))
        if expression is None:
            raise RuleError("a condition whose value is not text")
        found.append(conditions.get_or_make(entry["path"], expression))
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


def _action(raw: dict[str, Any]) -> Action:
    blocks = _flag(raw, "block")
    response = raw.get("response")
    if response is None and not blocks:
        return Action()
    if not isinstance(response, dict):
        raise RuleError("response is not an object")
    variables = raw.get("variables") or []
    if not isinstance(variables, list) or not all(isinstance(variable, dict) for variable in variables):
        raise RuleError("variables are not a list of objects")
    headers = _headers(response.get("headers"))
    header_tags = bool(variables) and _has_tags(dict(headers), 0)
    if not blocks:
        return Action(headers=headers, header_tags=header_tags)
    body = response.get("body")
    tagged = _has_tags(body, 0) and bool(variables)  # checked first in any case: it may be too deep to be written
    written = orjson.dumps(body)
    if len(written) > _MAX_BODY_BYTES:
        raise RuleError("response body over 256 KiB")
    return Action(
        headers=headers,
        header_tags=header_tags,
        status=_status(response.get("status")),
        body=None if tagged or "body" not in response else written,
        body_template=body if tagged else None,
    )


def _headers(raw: object) -> tuple[tuple[str, str], ...]:
    if raw is None:
        return ()
    if not isinstance(raw, dict):
        raise RuleError("response headers are not an object")
    if len(raw) > _MAX_HEADERS:
        raise RuleError(f"over {_MAX_HEADERS} response headers")
    # A value that is not text becomes a line break, which no header may contain: only that header is left out later.
    return tuple((name, "\n" if (text := as_text(value)) is None else text) for name, value in raw.items())


def _status(raw: object) -> int:
    if isinstance(raw, str) and len(raw) == 3 and raw.isascii() and raw.isdecimal():
        raw = int(raw)
    if isinstance(raw, bool) or not isinstance(raw, int) or raw not in _STATUSES:
        raise RuleError("status is not a number of three digits")
    return raw


def _has_tags(value: Any, depth: int) -> bool:
    """Return whether a JSON value, keys included, has a merge tag. Raises `RuleError` if it is nested too deeply."""
    if isinstance(value, str):
        return "{{" in value
    if isinstance(value, (dict, list)):
        if depth >= _MAX_BODY_DEPTH:
            raise RuleError("response body nested too deeply")
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return any([_has_tags(part, depth + 1) for part in parts])  # noqa: C419 - visits all, to check the depth
    return False


def _filled(value: Any, values: Mapping[str, str]) -> Any:
    """Return a JSON value with every tag `{{name}}` replaced; tags in the replacements are not replaced again."""
    if isinstance(value, str):
        return _TAG.sub(lambda tag: values.get(tag.group(1), _UNKNOWN), value) if "{{" in value else value
    if isinstance(value, dict):
        return {_filled(key, values): _filled(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, values) for item in value]
    return value
