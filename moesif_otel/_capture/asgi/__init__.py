"""Capture of the calls of ASGI applications."""

from __future__ import annotations

from typing import Final

INTERNAL: Final = "_moesif_otel_internal"
"""Attribute of applications and servers of our own, the sandbox's: a process may have one beside what it captures."""
