"""The public names: pinned, each importable, and none of them imported before it is asked for."""

from __future__ import annotations

import subprocess
import sys

import moesif_otel

NAMES = [
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


def test_the_names_are_these() -> None:
    """A new name is added here on purpose, and none goes away without a word."""
    assert moesif_otel.__all__ == NAMES == sorted(NAMES)


def test_each_name_can_be_imported() -> None:
    """Every one is what its own module calls by that name."""
    for name in NAMES:
        assert getattr(moesif_otel, name) is not None
        assert name in dir(moesif_otel)


def test_another_name_is_an_attribute_error() -> None:
    """As for any module."""
    assert not hasattr(moesif_otel, "MoesifManager")


def test_the_package_alone_imports_nothing_heavy() -> None:
    """`import moesif_otel` brings neither what delivers nor a framework."""
    code = (
        "import sys, moesif_otel; "
        "print(sorted({'requests', 'moesifapi', 'orjson', 'opentelemetry', 'tornado', 'flask'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200).stdout
    assert shown.strip() == "[]"
