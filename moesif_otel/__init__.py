"""API analytics for Python services: captured with OpenTelemetry, delivered to Moesif.

Each public name is imported when it is first used, so that nothing imports a framework, or delivery, without need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from moesif_otel._autoinstrument.instrument import Instrumentation, instrument
    from moesif_otel._capture.exchange import identify
    from moesif_otel.client import MoesifClient
    from moesif_otel.errors import MoesifConfigError, MoesifDeliveryError, MoesifError
    from moesif_otel.exporter import MoesifSpanExporter
    from moesif_otel.processor import MoesifSpanProcessor
    from moesif_otel.wsgi import MoesifMiddleware

__all__ = [
    "Instrumentation",
    "MoesifClient",
    "MoesifConfigError",
    "MoesifDeliveryError",
    "MoesifError",
    "MoesifMiddleware",
    "MoesifSpanExporter",
    "MoesifSpanProcessor",
    "__version__",
    "identify",
    "instrument",
]

__version__ = "0.1.0"

_HOMES: Final = {
    "Instrumentation": "moesif_otel._autoinstrument.instrument",
    "MoesifClient": "moesif_otel.client",
    "MoesifConfigError": "moesif_otel.errors",
    "MoesifDeliveryError": "moesif_otel.errors",
    "MoesifError": "moesif_otel.errors",
    "MoesifMiddleware": "moesif_otel.wsgi",
    "MoesifSpanExporter": "moesif_otel.exporter",
    "MoesifSpanProcessor": "moesif_otel.processor",
    "identify": "moesif_otel._capture.exchange",
    "instrument": "moesif_otel._autoinstrument.instrument",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
