"""Our one processor on a tracer provider, and claims: a span that one pipeline took, its exporters know of."""

from __future__ import annotations

import threading
from typing import Any

from opentelemetry.sdk.trace import TracerProvider

from moesif_otel._pipeline.spans import ClaimSet, Dispatcher, claims_of, dispatcher_on


def test_claims_belong_to_an_application_id_and_base_uri() -> None:
    """Two pipelines with two ids may both send a call; two with the same may not."""
    assert claims_of(("a", "u")) is claims_of(("a", "u"))
    assert claims_of(("a", "u")) is not claims_of(("b", "u"))
    claims_of(("a", "u")).add(1, 2)
    assert (1, 2) in claims_of(("a", "u"))
    assert (1, 2) not in claims_of(("b", "u"))


def test_the_oldest_claims_are_forgotten() -> None:
    """Memory stays bounded however many spans pass."""
    claims = ClaimSet()
    for number in range(20_490):
        claims.add(1, number)
        claims.add(1, number)
    assert (1, 9) not in claims
    assert (1, 10) in claims
    assert (1, 20_489) in claims


def test_a_signal_handler_may_make_the_first_call_while_a_first_call_is_made() -> None:
    """A call that a signal handler makes while its own thread adds our processor does not wait for that thread."""
    found: list[Dispatcher] = []

    class Interrupted(TracerProvider):
        def add_span_processor(self, span_processor: Any) -> None:
            if not found:
                found.append(span_processor)
                dispatcher_on(self)
            super().add_span_processor(span_processor)

    provider = Interrupted()
    thread = threading.Thread(target=lambda: found.append(dispatcher_on(provider)), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert dispatcher_on(provider) is found[-1]
