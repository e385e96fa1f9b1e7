"""Runs in the command `opentelemetry-instrument`, before it starts the program.

It defines a constant `OTEL_MOESIF_<OPTION>` for each option, from which the command makes flags such as
`--moesif_application_id`. It also turns off default exporters that are not installed. It never overrides a variable
that is set.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final

from moesif_otel.settings import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Collection, MutableMapping

# The command looks for names that begin with OTEL_ in this module.
globals().update({f"OTEL_MOESIF_{name}": f"OTEL_MOESIF_{name}" for name in OPTIONS})

_SIGNALS: Final = ("traces", "metrics", "logs")
_DEFAULT_EXPORTER: Final = "otlp_proto_grpc"  # opentelemetry-distro's default for every signal
_OTEL_DISTRO: Final = "opentelemetry.distro"


def leave_out_missing_exporters(
    environ: MutableMapping[str, str], distros: Collection[str], present: Collection[str]
) -> None:
    """Choose no exporter for each signal whose default exporter is not installed.

    OpenTelemetry's distro uses OTLP over gRPC by default. If that package is missing, no instrumentation is loaded at
    all, ours included, and the long traceback does not say why.

    Args:
        environ: The environment that the program will have.
        distros: Modules of the installed distros; distros other than OpenTelemetry's have their own defaults.
        present: The signals whose default exporter is installed.
    """
    chosen = any(name.startswith("OTEL_EXPORTER_OTLP") and name.endswith("PROTOCOL") for name in environ)
    if chosen or environ.get("OTEL_CONFIG_FILE") or set(distros) != {_OTEL_DISTRO}:
        return
    for signal in _SIGNALS:
        if signal not in present:
            environ.setdefault(f"OTEL_{signal.upper()}_EXPORTER", "none")


def _installed_distros() -> list[str]:
    return [found.value.partition(":")[0] for found in entry_points(group="opentelemetry_distro")]


def _signals_with_default_exporter() -> list[str]:
    return [
        signal
        for signal in _SIGNALS
        if any(entry_points(group=f"opentelemetry_{signal}_exporter", name=_DEFAULT_EXPORTER))
    ]


def prepare(environ: MutableMapping[str, str]) -> None:
    """Prepare the environment before OpenTelemetry's setup reads it."""
    leave_out_missing_exporters(environ, _installed_distros(), _signals_with_default_exporter())


if os.path.basename(sys.argv[0]).startswith("opentelemetry-instrument"):  # noqa: PTH119 - a name, not a file
    prepare(os.environ)
