"""The configuration that Moesif returns for an application: sampling rates, and who is in which cohort.

It is parsed on the poller's thread, used by every thread, and immutable. If a part is malformed, only that part is
ignored.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import orjson

from moesif_otel._remote.expressions import RuleError
from moesif_otel._remote.facts import Condition, as_text
from moesif_otel._remote.rules import MAX_VALUE_CHARS, Conditions, MalformedError, read_conditions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moesif_otel._guard import Guard

FULL_RATE: Final = 100.0


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
