"""Captures: they record what passes between a server and an application in an Exchange."""

from __future__ import annotations

from typing import Final

EXCHANGES_KEY: Final = "moesif_otel.exchanges"
"""Key of an environ or scope under which it carries the Exchanges of its call, so that no call is captured twice."""

INTERNAL: Final = "_moesif_otel_internal"
"""Attribute of applications and servers of our own, the sandbox's: a process may have one beside what it captures."""
