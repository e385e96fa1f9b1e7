"""The names by which `opentelemetry-instrument --help` shows our options as flags, `--moesif_application_id` and so on.

Owns: one constant `OTEL_MOESIF_<OPTION>` for each option, its value the name of its environment variable.
Threads: none; constants.
Never: reads the environment.
"""

from __future__ import annotations

from moesif_otel.settings import OPTIONS

__all__: list[str] = []

# The command looks for names that begin with OTEL_ in this module.
globals().update({f"OTEL_MOESIF_{name}": f"OTEL_MOESIF_{name}" for name in OPTIONS})
