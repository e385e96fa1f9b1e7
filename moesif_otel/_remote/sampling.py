"""Sampling: whether a call is kept, and the weight of its event, as Moesif's API documentation specifies."""

from __future__ import annotations

import math
import os
from random import Random
from typing import TYPE_CHECKING, Final, NamedTuple

from moesif_otel._remote.expressions import Allowance, OutOfTimeError
from moesif_otel._remote.facts import as_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._remote.config import RemoteConfig
    from moesif_otel._remote.facts import CallFacts, Field

_FULL_RATE: Final = 100.0
# Limits the weight for absurdly small rates, such as 1e-300 percent.
_MAX_WEIGHT: Final = 1_000_000_000
# Not the application's generator, whose sequence we must not change; nor the system's, which releases the GIL.
_generator: Final = Random()  # noqa: S311 - no secret
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_generator.seed)


class Sampled(NamedTuple):
    """A decision: whether to keep a call, and the `weight` of its event."""

    keep: bool
    weight: int


def decide(
    config: RemoteConfig,
    facts: CallFacts,
    user_id: object = None,
    company_id: object = None,
    random: Callable[[], float] = _generator.random,
) -> Sampled:
    """Decide whether a call is kept. Thread-safe; never raises.

    Args:
        config: The configuration; the default keeps everything.
        facts: The facts that entries of `regex_config` test.
        user_id: The user's id, if known.
        company_id: The company's id, if known.
        random: Returns a number from 0 up to, not including, 1.

    Returns:
        Keep when `random() * 100 < rate`; weight `floor(100 / rate)`, 1 at rate 0.
    """
    rate = rate_for(config, facts, user_id, company_id)
    # No random number at the full rate, which is by far the most common.
    keep = rate >= _FULL_RATE or random() * 100 < rate
    return Sampled(keep, weight_for(rate))


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
            key = _safe_id(identity)
            if key is not None and key in rates:
                return rates[key]
    return config.sample_rate


def weight_for(rate: float) -> int:
    """Return the weight of an event that was kept at a rate in percent."""
    if rate <= 0:
        return 1
    return max(1, math.floor(min(_FULL_RATE / rate, float(_MAX_WEIGHT))))


def _fact(facts: CallFacts, field: Field) -> str | None:
    # Only the four fields of `CallFacts`: sampling does not test headers or bodies.
    value = getattr(facts, field.kind, None)
    return str(value) if value is not None and value != "" else None


def _safe_id(identity: object) -> str | None:
    try:
        return as_id(identity)
    except Exception:  # an identity whose __str__ raises is none
        return None
