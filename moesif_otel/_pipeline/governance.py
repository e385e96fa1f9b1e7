"""Asking the governance rules about one request.

Owns: `decide`: which facts the rules get, and when the identity callbacks run early.
Threads: the request's.
Never: raises; looks at a body or an identity that no rule asks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesif_otel._events.body import read_body
from moesif_otel._events.client_ip import client_address
from moesif_otel._events.identity import user_from_headers
from moesif_otel._remote.facts import RequestFacts

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._capture.callbacks import Callbacks
    from moesif_otel._capture.exchange import Exchange
    from moesif_otel._remote.config import RemoteConfig
    from moesif_otel._remote.governance import RuleSet
    from moesif_otel._remote.verdict import Verdict

__all__ = ["decide"]


def decide(
    rules: RuleSet,
    config: RemoteConfig,
    exchange: Exchange,
    callbacks: Callbacks,
    read_ahead: Callable[[], bytes | None],
) -> Verdict | None:
    """Give the rules' verdict on a request; the Exchange notes by which rule it is blocked.

    Args:
        rules: Not empty.
        config: The configuration, which has the cohorts.
        exchange: The request.
        callbacks: Run early, once, when a rule depends on who calls.
        read_ahead: Gives the raw request body, or None.
    """
    settings = exchange.pipeline.settings
    headers = _by_lower_name(exchange)
    user_id: Any = None
    if rules.needs_identity:
        exchange.identify_arguments = exchange.identify_arguments or (*exchange.callback_arguments, {})
        callbacks.identify(exchange)
        user_id = exchange.user_id or user_from_headers(
            headers, settings.authorization_header_name, settings.authorization_user_id_field
        )
    facts = RequestFacts(
        verb=exchange.method,
        uri=exchange.url,
        ip_address=client_address(headers, exchange.peer_address),
        header=headers.get,
        body=lambda: _parsed(read_ahead(), headers),
        guard=exchange.pipeline.guard,
    )
    verdict = rules.evaluate(facts, user_id, exchange.company_id, config)
    if verdict is not None:
        exchange.blocked_by = verdict.blocked_by
    return verdict


def _by_lower_name(exchange: Exchange) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in exchange.request_headers:
        key = name.lower()
        found[key] = f"{found[key]}, {value}" if key in found else value
    return found


def _parsed(data: bytes | None, headers: dict[str, str]) -> Any:
    if not data:
        return None
    body = read_body(
        data, headers.get("content-type"), headers.get("content-encoding"), truncated=False, parse=True
    )
    return body.value if body.transfer_encoding == "json" else None
