"""Evaluates all governance rules for one request.

A `RuleSet` is built on the poller's thread, evaluated by the threads of requests, and immutable. If a rule cannot be
decided, it does not apply, and this is counted; the other rules still do.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import orjson

from moesif_otel._capture.body import NO_BODY_STATUSES
from moesif_otel._capture.exchange import Decision
from moesif_otel._guard import PROCESS_GUARD
from moesif_otel._remote.expressions import OutOfTimeError, RuleError
from moesif_otel._remote.facts import BodyNeededError, as_id
from moesif_otel._remote.rules import Conditions, MalformedError, Rule, read_rule

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from moesif_otel._guard import Guard
    from moesif_otel._remote.config import Cohorts, RemoteConfig
    from moesif_otel._remote.facts import RequestFacts

_MAX_RULES: Final = 2_000
_MAX_ID_CHARS: Final = 60  # in a message
_NO_VALUES: Final[Mapping[str, str]] = {}
_NO_COHORT: Final[Mapping[str, Mapping[str, str]]] = {}
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_VALUE: Final = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")  # RFC 9110, 5.5, as latin-1: what PEP 3333 and Tornado send
# Set by the server only: PEP 3333 forbids hop-by-hop headers, and a wrong length breaks the connection.
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
_NO_BODY: Final = NO_BODY_STATUSES | {205}


class RuleSet:
    """Compiled rules in the server's order; falsy if there are none, so that a request then only pays for `if rules:`.

    Immutable, and so thread-safe.
    """

    def __init__(self, rules: Sequence[Rule], guard: Guard) -> None:
        self._guard = guard
        self._count = len(rules)
        self._regex = tuple(rule for rule in rules if rule.kind == "regex")
        self._company = _Cohorts([rule for rule in rules if rule.kind == "company"])
        self._user = _Cohorts([rule for rule in rules if rule.kind == "user"])
        self.needs_identity: Final = len(self._regex) < len(rules)
        """True if a rule depends on the user or the company, so that the callbacks must run early."""

    @classmethod
    def from_json(cls, data: bytes, guard: Guard) -> RuleSet:
        """Compile the answer of `GET /v1/rules`; if a rule cannot be used, only that rule is ignored.

        Raises:
            MalformedError: The answer is not a JSON array of objects.
        """
        try:
            entries = orjson.loads(data)
        except orjson.JSONDecodeError as exc:
            raise MalformedError("rules are not JSON") from exc
        # One in which nothing is an object has no rule that could be wrong: it is somebody else's answer.
        if not isinstance(entries, list) or (entries and not any(isinstance(entry, dict) for entry in entries)):
            raise MalformedError("rules are not an array of objects")
        conditions = Conditions()
        rules: list[Rule] = []
        for entry in entries:
            if len(rules) >= _MAX_RULES:
                guard.note(
                    "governance rule", f"there are more than {_MAX_RULES:,} governance rules; only the first ones apply"
                )
                break
            try:
                rules.append(read_rule(entry, conditions))
            except RuleError as exc:
                guard.note(
                    "governance rule",
                    f"governance rule{_shown_id(entry)} from Moesif cannot be used ({exc}) and is ignored; the other "
                    "rules apply",
                )
            except Exception as exc:
                guard.caught("governance rule", exc)
        return cls(rules, guard)

    def __len__(self) -> int:
        return self._count

    def evaluate(
        self, facts: RequestFacts, user_id: object, company_id: object, config: RemoteConfig
    ) -> Decision | None:
        """Evaluate the rules for one request; return None if none applies.

        Regex rules come first, then company rules, then user rules. A later rule overrides an earlier one: headers are
        merged; status, body and `blocked_by` are those of the last rule that blocks.

        Raises:
            BodyNeededError: A rule whose other conditions hold depends on the body. Nothing else is raised.
        """
        try:
            return self._evaluate(facts, as_id(user_id), as_id(company_id), config)
        except BodyNeededError:
            raise
        except Exception as exc:
            self._guard.caught("governance rules", exc)
            return None

    def _evaluate(
        self, facts: RequestFacts, user_id: str | None, company_id: str | None, config: RemoteConfig
    ) -> Decision | None:
        merged: dict[str, tuple[str, str]] = {}  # a later header overrides an earlier one of that name, in any case
        status, body, blocked_by = 0, None, ""
        for rule, values in self._applicable(user_id, company_id, config):
            try:
                if not _matches(rule, facts):
                    continue
                action = rule.action
                new_body = action.body_for(values)  # before anything is merged: a rule applies whole or not at all
                merged.update(self._sendable(action.headers_for(values), rule.rule_id))
            except BodyNeededError:
                raise
            except OutOfTimeError:
                self._guard.note(
                    "slow governance rule",
                    f"governance rule {_shown(rule.rule_id)} was not applied to a request, because its expression "
                    "takes too long to match what the client sent; simplify the expression in Moesif",
                )
            except Exception as exc:
                self._guard.caught("a governance rule", exc)
            else:
                if action.status is not None:
                    status, body, blocked_by = action.status, new_body, rule.rule_id
        if blocked_by:
            return _block(status, merged, body, blocked_by)
        return Decision(False, 0, list(merged.values()), None, None) if merged else None

    def _applicable(
        self, user_id: str | None, company_id: str | None, config: RemoteConfig
    ) -> Iterator[tuple[Rule, Mapping[str, str]]]:
        for rule in self._regex:
            yield rule, _NO_VALUES
        yield from self._company.applicable(company_id, config.company_rules)
        yield from self._user.applicable(user_id, config.user_rules)

    def _sendable(self, headers: Iterable[tuple[str, str]], rule_id: str) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yield a rule's headers by lower-case name, except those that cannot be sent."""
        for name, value in headers:
            key = name.lower()
            if key in _FRAMING or _TOKEN.fullmatch(name) is None or _VALUE.fullmatch(value) is None:
                why = "the server sets it itself" if key in _FRAMING else "its name or value cannot be sent"
                self._guard.note(
                    "governance header", f"a header of governance rule {_shown(rule_id)} is left out: {why}"
                )
            else:
                yield key, (name, value.strip(" \t"))

    def has_unknown_ids(self, config: RemoteConfig) -> bool:
        """Return whether a cohort entry of a configuration names a rule that is not in this set (one is stale)."""
        return self._company.has_unknown(config.company_rules) or self._user.has_unknown(config.user_rules)


def _shown(rule_id: str) -> str:
    return repr(rule_id[:_MAX_ID_CHARS])


def _shown_id(raw: object) -> str:
    rule_id = raw.get("_id") if isinstance(raw, dict) else None
    return f" {_shown(rule_id)}" if isinstance(rule_id, str) and rule_id else ""


def _matches(rule: Rule, facts: RequestFacts) -> bool:
    """Return whether any group of the rule holds. Raises `BodyNeededError`, `OutOfTimeError`."""
    if rule.groups is None:
        return True
    out_of_time = False
    for group in rule.groups:
        try:
            # Written out: with 200 rules this loop is the cost of a request, and generators would double it.
            for condition in group:
                if not facts.holds(condition):
                    break
            else:
                return True
        except OutOfTimeError:
            out_of_time = True
    if out_of_time:
        raise OutOfTimeError
    return False


def _block(status: int, merged: dict[str, tuple[str, str]], body: bytes | None, rule_id: str) -> Decision:
    if status in _NO_BODY or status < 200:
        body = None  # RFC 9110, 6.4.1: a body there would be read as the next answer
    if body is not None:
        merged.setdefault("content-type", ("Content-Type", "application/json"))
    headers = list(merged.values())
    if status not in NO_BODY_STATUSES and status >= 200:
        headers.append(("Content-Length", str(len(body or b""))))
    return Decision(blocked=True, status=status, headers=headers, body=body or b"", blocked_by=rule_id)


class _Cohorts:
    """The rules of one kind, company or user."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._by_id = {rule.rule_id: rule for rule in rules}
        self._for_others = tuple(rule for rule in self._by_id.values() if rule.for_others)
        self._for_unidentified = tuple(rule for rule in rules if rule.for_unidentified)

    def applicable(self, identity: str | None, cohorts: Cohorts) -> Iterator[tuple[Rule, Mapping[str, str]]]:
        """Yield the rules that apply to an identity, with its values: its cohorts in order, then the other rules."""
        if identity is None:
            for rule in self._for_unidentified:
                yield rule, _NO_VALUES
            return
        if not self._by_id:
            return
        cohort = cohorts.get(identity, _NO_COHORT)
        for rule_id, values in cohort.items():
            found = self._by_id.get(rule_id)
            if found is not None and not found.for_others:
                yield found, values
        for rule in self._for_others:
            if rule.rule_id not in cohort:
                yield rule, _NO_VALUES

    def has_unknown(self, cohorts: Cohorts) -> bool:
        return any(rule_id not in self._by_id for cohort in cohorts.values() for rule_id in cohort)


# Defined last: a rule set needs the classes above.
NO_RULES: Final = RuleSet((), PROCESS_GUARD)
