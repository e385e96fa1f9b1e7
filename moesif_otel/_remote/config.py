"""The configuration that Moesif returns for an application: sampling rates, and who is in which cohort.

It is parsed on the poller's thread, used by every thread, and immutable. If a part is malformed, only that part is
ignored. `sampled_weight` decides by it, as Moesif's API documentation specifies, whether a call is kept.
"""

from __future__ import annotations

import math
import os
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import orjson

from moesif_otel._remote.expressions import Allowance, OutOfTimeError, RuleError
from moesif_otel._remote.facts import Condition, as_id, as_text
from moesif_otel._remote.rules import MAX_VALUE_CHARS, Conditions, MalformedError, read_conditions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from moesif_otel._guard import Guard
    from moesif_otel._remote.facts import CallFacts, Field

FULL_RATE: Final = 100.0
# Limits the weight for absurdly small rates, such as 1e-300 percent.
_MAX_WEIGHT: Final = 1_000_000_000.0
# Not the application's generator, whose sequence we must not change; nor the system's, which releases the GIL.
_generator: Final = Random()  # noqa: S311 - no secret
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_generator.seed)


class SampleRule(NamedTuple):
    """One entry of the configuration's `regex_config`: the rate if all conditions hold."""

    conditions: tuple[Condition, ...]
    rate: float


Cohorts: TypeAlias = "Mapping[str, Mapping[str, Mapping[str, str]]]"
"""By an identity, the rules whose cohort it is in, in order; by their id, its values for the rule's merge tags."""


class RemoteConfig(NamedTuple):
    """Sampling rates in percent, and cohorts, by id of the user or company. Immutable, and so thread-safe."""

    sample_rate: float = FULL_RATE  # used if no other applies
    user_sample_rates: Mapping[str, float] = MappingProxyType({})
    company_sample_rates: Mapping[str, float] = MappingProxyType({})
    sample_rules: tuple[SampleRule, ...] = ()  # the first that matches a call is used
    user_rules: Cohorts = MappingProxyType({})
    company_rules: Cohorts = MappingProxyType({})

    @classmethod
    def from_json(cls, data: bytes, guard: Guard) -> RemoteConfig:
        """Parse the answer of `GET /v1/config`; the guard counts the parts that are ignored.

        Raises:
            MalformedError: The answer is not a JSON object.
        """
        try:
            raw = orjson.loads(data)
        except orjson.JSONDecodeError as exc:
            raise MalformedError("configuration is not JSON") from exc
        if not isinstance(raw, dict):
            raise MalformedError("configuration is not an object")
        reader = _ConfigReader(raw, guard)
        rate = _rate(raw.get("sample_rate", FULL_RATE))
        if rate is None:
            reader.skip("sample_rate")
        return cls(
            sample_rate=FULL_RATE if rate is None else rate,
            user_sample_rates=reader.rates("user_sample_rate"),
            company_sample_rates=reader.rates("company_sample_rate"),
            sample_rules=reader.sample_rules(),
            user_rules=reader.cohorts("user_rules"),
            company_rules=reader.cohorts("company_rules"),
        )


DEFAULT_CONFIG: Final = RemoteConfig()
"""Used before the first answer: every call is kept."""


class _ConfigReader:
    """Reads the members of one configuration."""

    def __init__(self, raw: dict[str, Any], guard: Guard) -> None:
        self._raw = raw
        self._guard = guard

    def skip(self, name: str, reason: str = "wrong type") -> None:
        self._guard.note(
            f"configuration {name}",
            f"Moesif's configuration has a {name} that cannot be used ({reason}) and is ignored; the rest applies",
        )

    def _object(self, name: str) -> dict[str, Any]:
        value = self._raw.get(name)
        if isinstance(value, dict):
            return value
        if value is not None:
            self.skip(name)
        return {}

    def rates(self, name: str) -> dict[str, float]:
        found = {}
        for identity, value in self._object(name).items():
            rate = _rate(value)
            if rate is None:
                self.skip(f"{name} entry", "not a number")
            else:
                found[identity] = rate
        return found

    def sample_rules(self) -> tuple[SampleRule, ...]:
        entries = self._raw.get("regex_config")
        if not isinstance(entries, list):
            if entries is not None:
                self.skip("regex_config")
            return ()
        conditions = Conditions()
        found = []
        for entry in entries:
            try:
                read, rate = read_conditions(entry, conditions), _rate(entry.get("sample_rate"))
            except RuleError as exc:
                self.skip("regex_config entry", str(exc))
            except Exception as exc:
                self._guard.caught("configuration regex_config entry", exc)
            else:
                if rate is None:
                    self.skip("regex_config entry", "sample_rate is not a number")
                elif read:  # without conditions it matches nothing, as in the Python SDK
                    found.append(SampleRule(read, rate))
        return tuple(found)

    def cohorts(self, name: str) -> dict[str, dict[str, dict[str, str]]]:
        found = {}
        for identity, entries in self._object(name).items():
            if not isinstance(entries, list):
                self.skip(name, "entries are not a list")
                continue
            cohort: dict[str, dict[str, str]] = {}
            for entry in entries:
                if not isinstance(entry, dict) or not isinstance(entry.get("rules"), str):
                    self.skip("cohort entry", "names no rule")
                    continue
                cohort.pop(entry["rules"], None)  # of a rule that is named twice the last entry counts, in its place
                cohort[entry["rules"]] = self._cohort_values(entry.get("values"))
            if cohort:
                found[identity] = cohort
        return found

    def _cohort_values(self, raw: object) -> dict[str, str]:
        if not isinstance(raw, dict):
            if raw is not None:
                self.skip("cohort values")
            return {}
        texts = {name: as_text(value) for name, value in raw.items()}
        return {name: text for name, text in texts.items() if text is not None and len(text) <= MAX_VALUE_CHARS}


def _rate(value: object) -> float | None:
    """Return a rate limited to 0..100; None if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return min(max(float(value), 0.0), FULL_RATE)


# Sampling.


def sampled_weight(
    config: RemoteConfig,
    facts: CallFacts,
    user_id: object = None,
    company_id: object = None,
    random: Callable[[], float] = _generator.random,
) -> int:
    """Return the number of calls that a call's event stands for, `floor(100 / rate)`; 0: it is left out.

    A call is kept when `random() * 100 < rate`. Thread-safe; never raises.
    """
    rate = rate_for(config, facts, user_id, company_id)
    # No random number at the full rate, which is by far the most common.
    if rate < FULL_RATE and random() * 100 >= rate:
        return 0
    return math.floor(min(FULL_RATE / rate, _MAX_WEIGHT))


def rate_for(config: RemoteConfig, facts: CallFacts, user_id: object = None, company_id: object = None) -> float:
    """Return a call's rate: that of the first matching entry, else the user's, the company's or the general rate."""
    if config.sample_rules:
        allowance = Allowance()
        for rule in config.sample_rules:
            try:
                if all(
                    (text := _fact(facts, condition.field)) is not None and condition.pattern.matches(text, allowance)
                    for condition in rule.conditions
                ):
                    return rule.rate
            except OutOfTimeError:
                continue  # only that entry is skipped
    for identity, rates in ((user_id, config.user_sample_rates), (company_id, config.company_sample_rates)):
        if rates:
            try:
                key = as_id(identity)
            except Exception:  # an identity whose __str__ raises is none
                key = None
            if key is not None and key in rates:
                return rates[key]
    return config.sample_rate


def _fact(facts: CallFacts, field: Field) -> str | None:
    # Only the four fields of `CallFacts`: sampling does not test headers or bodies.
    value = getattr(facts, field.kind, None)
    return str(value) if value is not None and value != "" else None
