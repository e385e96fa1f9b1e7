"""Governance: what all rules together say about one request.

Owns: `RuleSet`, the compiled answer of `GET /v1/rules`, and its evaluation: order, cohorts, merging.
Threads: made on the poller's thread, evaluated by every request's; nothing in it changes.
Never: raises into a request, waits, or looks at a body that no rule asks for. Whatever cannot be decided lets the
call pass (fail open); the other rules still work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import orjson

from moesif_otel._remote.config import CohortEntry, MalformedError
from moesif_otel._remote.facts import as_id
from moesif_otel._remote.patterns import Allowance, OutOfTimeError
from moesif_otel._remote.rules import Condition, Conditions, Rule, RuleError, read_rule
from moesif_otel._remote.skips import Skips
from moesif_otel._remote.verdict import HeaderMerge, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from moesif_otel._remote.config import RemoteConfig
    from moesif_otel._remote.facts import RequestFacts

__all__ = ["NO_RULES", "RuleSet"]

_NO_VALUES: Final[Mapping[str, str]] = {}
_Entries = tuple[CohortEntry, ...]


class RuleSet:
    """Compiled rules; false when there are none, so that `if rules:` is all that a request pays then.

    Args:
        rules: Compiled rules in the server's order.
        skips: Where what is left out is counted.

    Thread-safe: it never changes.
    """

    __slots__ = ("_company", "_count", "_regex", "_skips", "_user", "needs_body", "needs_identity")

    def __init__(self, rules: Sequence[Rule] = (), skips: Skips | None = None) -> None:
        self._skips = skips if skips is not None else Skips()
        self._count = len(rules)
        self._regex = tuple(rule for rule in rules if rule.kind == "regex")
        self._company = _Cohorts([rule for rule in rules if rule.kind == "company"])
        self._user = _Cohorts([rule for rule in rules if rule.kind == "user"])
        self.needs_body: Final = any(rule.needs_body for rule in rules)
        """Whether a rule looks into request bodies, so that they must be read ahead."""
        self.needs_identity: Final = any(rule.kind != "regex" for rule in rules)
        """Whether a rule depends on the user or the company, so that the callbacks must run early."""

    @classmethod
    def from_json(cls, data: bytes, skips: Skips | None = None) -> RuleSet:
        """Compile the answer of `GET /v1/rules`; a rule that cannot be used is left out alone.

        Raises:
            MalformedError: The answer is no JSON array.
        """
        skips = skips if skips is not None else Skips()
        try:
            entries = orjson.loads(data)
        except orjson.JSONDecodeError as exc:
            raise MalformedError("rules are not JSON") from exc
        if not isinstance(entries, list):
            raise MalformedError("rules are not an array")
        conditions = Conditions()
        rules: list[Rule] = []
        for entry in entries:
            try:
                rules.append(read_rule(entry, conditions))
            except RuleError as exc:
                rule_id = entry.get("_id") if isinstance(entry, dict) else None
                skips.note("governance rule", rule_id if isinstance(rule_id, str) else "", str(exc))
            except Exception as exc:
                skips.caught("governance rule", exc)
        return cls(rules, skips)

    def __len__(self) -> int:
        return self._count

    def evaluate(
        self, facts: RequestFacts, user_id: object, company_id: object, config: RemoteConfig
    ) -> Verdict | None:
        """Decide about one request.

        Regex rules come first, then the company's, then the user's; a later one overrides an earlier one: headers
        merge, status, body and `blocked_by` are those of the last rule that blocks.

        Args:
            facts: What rules can look at.
            user_id: The user's id; None or empty for a call without one.
            company_id: The company's id, likewise.
            config: The configuration, which has the cohorts.

        Returns:
            The verdict, or None when no rule has anything to say. Never raises. Takes at most
            `patterns.REQUEST_LIMIT_S` of CPU time in expressions.
        """
        try:
            return self._evaluate(facts, as_id(user_id), as_id(company_id), config)
        except Exception as exc:
            self._skips.caught("governance", exc)
            return None

    def _evaluate(
        self, facts: RequestFacts, user_id: str | None, company_id: str | None, config: RemoteConfig
    ) -> Verdict | None:
        inquiry = _Inquiry(facts)
        merged = HeaderMerge(self._skips)
        status, body, blocked_by = 0, None, ""
        for rule, values in self._applicable(user_id, company_id, config):
            try:
                if not inquiry.matches(rule):
                    continue
                answer = rule.answer
                new_body = answer.body_for(values)  # before anything is merged: a rule applies whole or not at all
                merged.add(answer.headers_for(values), rule.rule_id)
            except OutOfTimeError:
                self._skips.note("slow governance rule", rule.rule_id, "its expressions take too long")
            except Exception as exc:
                self._skips.caught("governance rule at a request", exc)
            else:
                if answer.status is not None:
                    status, body, blocked_by = answer.status, new_body, rule.rule_id
        return merged.blocked(status, body, blocked_by) if blocked_by else merged.added()

    def _applicable(
        self, user_id: str | None, company_id: str | None, config: RemoteConfig
    ) -> Iterator[tuple[Rule, Mapping[str, str]]]:
        for rule in self._regex:
            yield rule, _NO_VALUES
        yield from self._company.applicable(company_id, config.company_rules)
        yield from self._user.applicable(user_id, config.user_rules)

    def has_unknown_ids(self, config: RemoteConfig) -> bool:
        """Whether a cohort entry of a configuration names a rule that is not here (one of both is stale)."""
        return self._company.has_unknown(config.company_rules) or self._user.has_unknown(config.user_rules)


class _Cohorts:
    """The rules of one kind, company or user."""

    __slots__ = ("_by_id", "_for_others", "_for_unidentified")

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._by_id = {rule.rule_id: rule for rule in rules}
        self._for_others = tuple(rule for rule in self._by_id.values() if rule.for_others)
        self._for_unidentified = tuple(rule for rule in rules if rule.for_unidentified)

    def applicable(
        self, identity: str | None, cohorts: Mapping[str, _Entries]
    ) -> Iterator[tuple[Rule, Mapping[str, str]]]:
        """Give the rules meant for an identity, with its values: its cohorts in their order, then the others."""
        if identity is None:
            for rule in self._for_unidentified:
                yield rule, _NO_VALUES
            return
        if not self._by_id:
            return
        entries = cohorts.get(identity, ())
        values = {entry.rule_id: entry.values for entry in entries}
        for entry in entries:
            found = self._by_id.get(entry.rule_id)
            if found is not None and not found.for_others:
                yield found, values[found.rule_id]
        for rule in self._for_others:
            if rule.rule_id not in values:
                yield rule, _NO_VALUES

    def has_unknown(self, cohorts: Mapping[str, _Entries]) -> bool:
        """Whether an entry names no rule of this kind."""
        return any(entry.rule_id not in self._by_id for entries in cohorts.values() for entry in entries)


class _Inquiry:
    """One request's answers to conditions; each distinct condition is asked once, in one allowance of time."""

    __slots__ = ("_allowance", "_facts", "_held")

    def __init__(self, facts: RequestFacts) -> None:
        self._facts = facts
        self._allowance = Allowance()
        self._held: dict[Condition, bool] = {}

    def matches(self, rule: Rule) -> bool:
        """Say whether any group of the rule holds. Raises `OutOfTimeError`."""
        if rule.groups is None:
            return True
        held = self._held
        # Written out: with 200 rules this loop is what a request pays, and generators would double it.
        for group in rule.groups:
            for condition in group:
                holds = held.get(condition)
                if holds is None:
                    holds = held[condition] = condition.holds(self._facts, self._allowance)
                if not holds:
                    break
            else:
                return True
        return False


# Last: a rule set is made of the classes above.
NO_RULES: Final = RuleSet()
