"""Sampling: whether a call is kept, and the weight of its event, as Moesif's API documentation specifies."""

from __future__ import annotations

import math
import os
from random import Random
from typing import TYPE_CHECKING, Final

from moesif_otel._remote.config import FULL_RATE
from moesif_otel._remote.expressions import Allowance, OutOfTimeError
from moesif_otel._remote.facts import as_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._remote.config import RemoteConfig
    from moesif_otel._remote.facts import CallFacts, Field

# Limits the weight for absurdly small rates, such as 1e-300 percent.
_MAX_WEIGHT: Final = 1_000_000_000.0
# Not the application's generator, whose sequence we must not change; nor the system's, which releases the GIL.
_generator: Final = Random()  # noqa: S311 - no secret
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_generator.seed)


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
