"""SERVER and CLIENT spans of Tornado, made by OpenTelemetry's own instrumentor on the provider of the user's.

The instrumentor is process-wide and one of its kind: once active, a later `.instrument(hooks)` of the application would
be ignored. So ours is undone at that call, before it takes effect: the application finds Tornado as without us. One
that is active already is left alone, no metrics are recorded, and nothing is done for a provider that nobody reads.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import Any, Final

from opentelemetry.metrics import NoOpMeterProvider

from moesif_otel._capture.patching import Patch, PatchSet
from moesif_otel._guard import LATE_IMPORTS

_Instrumentor: Any
try:
    from opentelemetry.instrumentation.tornado import TornadoInstrumentor as _Instrumentor
except ImportError:  # an application may have Tornado, and spans of its own or none
    _Instrumentor = None

_DISABLED_VARIABLE: Final = "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS"


def _record_nothing(_record: Any, /, *_args: Any, **_kwargs: Any) -> None:
    """Stand in for what finds the attributes of request metrics.

    It takes half of the instrumentor's time, and there is no meter to record them.
    """


_metrics: Final = PatchSet(
    Patch("opentelemetry.instrumentation.tornado", name, _record_nothing)
    for name in ("_record_prepare_metrics", "_record_on_finish_metrics")
)


class YieldingInstrumentation:
    """The instrumentor, activated by us as long as somebody holds it and the application does not want it itself.

    Thread-safe. Its lock is that of late imports: activating imports, and a fork must not leave it half done.
    """

    def __init__(self) -> None:
        self._holders: weakref.WeakSet[Any] = weakref.WeakSet()  # a holder that is gone wants nothing
        self._provider: Any = None  # the one that the instrumentor works on for us

    def hold(self, holder: object, provider: Any) -> bool:
        """Let spans be made on `provider` for `holder`.

        Args:
            holder: Whoever wants them.
            provider: An SDK tracer provider that the application shares with us.

        Returns:
            Whether the instrumentor works on that provider on our behalf. False where the application has activated
            it, where it works on another provider, where it is switched off or not installed: calls then have the
            application's spans, or none.
        """
        with LATE_IMPORTS:
            if self._provider is None and not self._activate(provider):
                return False
            if self._provider is not provider:
                return False
            self._holders.add(holder)
            return True

    def release(self, holder: object) -> None:
        """Release the activation; the last one ends it."""
        with LATE_IMPORTS:
            self._holders.discard(holder)
            if not self._holders:
                self._deactivate()

    def _activate(self, provider: Any) -> bool:
        if _Instrumentor is None or _switched_off():
            return False
        instrumentor = _Instrumentor()
        if instrumentor.is_instrumented_by_opentelemetry:
            return False
        # Request metrics are the application's own business.
        instrumentor.instrument(tracer_provider=provider, meter_provider=NoOpMeterProvider())
        if not instrumentor.is_instrumented_by_opentelemetry:
            return False
        self._provider = provider
        with contextlib.suppress(AttributeError):  # another version may name them otherwise
            _metrics.hold(self)
        _set_flag(instrumentor, value=False)
        instrumentor.__dict__["instrument"] = self._give_way
        return True

    def _give_way(self, **kwargs: Any) -> Any:
        """Stand in for `instrument` on the one instance there is: the application's call has come."""
        with LATE_IMPORTS:
            self._holders.clear()
            self._deactivate()
        return _Instrumentor().instrument(**kwargs)

    def _deactivate(self) -> None:
        if self._provider is None:
            return
        self._provider = None
        _metrics.release(self)
        instrumentor = _Instrumentor()
        instrumentor.__dict__.pop("instrument", None)
        _set_flag(instrumentor, value=True)
        instrumentor.uninstrument()


def _set_flag(instrumentor: Any, *, value: bool) -> None:
    # What an application asks before it instruments. `tests/capture/test_tornado_spans.py` is the canary.
    instrumentor._is_instrumented_by_opentelemetry = value


def _switched_off() -> bool:
    names = os.environ.get(_DISABLED_VARIABLE, "").split(",")
    return any(name.strip() in {"tornado", "*"} for name in names)


instrumentation: Final = YieldingInstrumentation()
"""The one of this process, as the instrumentor is."""
