"""Trace and span ids of calls, also of those that no span describes.

Owns: when and how an Exchange's ids are fixed.
Threads: the request's, or ours for calls that a finalizer ended; an Exchange is fixed by one thread at a time.
Never: changes ids that are fixed; guesses a parent.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from moesif_otel._capture.exchange import random_id

if TYPE_CHECKING:
    from moesif_otel._capture.exchange import Exchange

__all__ = ["fix_ids"]

# W3C Trace Context, "traceparent": version, trace id, parent id, flags; later versions may append fields.
_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(?:-|$)"
)


def fix_ids(exchange: Exchange) -> None:
    """Give the Exchange a trace id and a span id if it has none.

    The trace is the enclosing call's, else that of the span around it, else `traceparent`'s, else a new one.
    """
    if exchange.span_id:
        return
    outer = exchange.outer
    if outer is not None and not exchange.trace_id:
        fix_ids(outer)
        exchange.trace_id, exchange.parent_span_id = outer.trace_id, outer.span_id
    if not exchange.trace_id and exchange.has_remote_parent:
        _take_remote_parent(exchange)
    if not exchange.trace_id:
        exchange.trace_id = random_id(16)
    exchange.span_id = random_id(8)


def _take_remote_parent(exchange: Exchange) -> None:
    for name, value in exchange.request_headers:
        if name.lower() == "traceparent":
            found = _TRACEPARENT.match(value.strip())
            if found is not None:
                exchange.trace_id, exchange.parent_span_id = int(found[1], 16), int(found[2], 16)
            return
