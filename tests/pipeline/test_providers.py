"""Our one processor on a tracer provider."""

from __future__ import annotations

import threading
from typing import Any

from opentelemetry.sdk.trace import TracerProvider

from moesif_otel._pipeline.providers import Dispatcher, dispatcher_on


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
