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
    from collections.abc import MutableMapping

# The command looks for names that begin with OTEL_ in this module.
globals().update({f"OTEL_MOESIF_{name}": f"OTEL_MOESIF_{name}" for name in OPTIONS})

_DEFAULT_EXPORTER: Final = "otlp_proto_grpc"  # opentelemetry-distro's default for every signal
_OTEL_DISTRO: Final = "opentelemetry.distro"


def prepare(environ: MutableMapping[str, str]) -> None:
    """Choose no exporter for each signal whose default exporter is not installed, before OpenTelemetry's setup.

    OpenTelemetry's distro uses OTLP over gRPC by default. If that package is missing, no instrumentation is loaded at
    all, ours included, and the long traceback does not say why. Other distros have their own defaults.
    """
    chosen = any(name.startswith("OTEL_EXPORTER_OTLP") and name.endswith("PROTOCOL") for name in environ)
    distros = {found.value.partition(":")[0] for found in entry_points(group="opentelemetry_distro")}
    if chosen or environ.get("OTEL_CONFIG_FILE") or distros != {_OTEL_DISTRO}:
        return
    for signal in ("traces", "metrics", "logs"):
        if not any(entry_points(group=f"opentelemetry_{signal}_exporter", name=_DEFAULT_EXPORTER)):
            environ.setdefault(f"OTEL_{signal.upper()}_EXPORTER", "none")


if os.path.basename(sys.argv[0]).startswith("opentelemetry-instrument"):  # noqa: PTH119 - a name, not a file
    prepare(os.environ)
