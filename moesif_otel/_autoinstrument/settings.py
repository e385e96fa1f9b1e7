"""Reads the options of a run without code changes, from a configuration file or the environment. Never raises."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from moesif_otel._guard import get_logger
from moesif_otel.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["is_switched_off", "read_settings"]

_logger: Final = get_logger(__name__)
_told: Final[set[str]] = set()


def is_switched_off(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether `OTEL_SDK_DISABLED` is true (OTel specification: only "true", in any case)."""
    source = os.environ if environ is None else environ
    return source.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def read_settings(options: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings | None:
    """Read the given options, and the others from the environment; each wrong one is logged once.

    A harmless option with a wrong value keeps its default. If the destination, or an option that protects data, is
    wrong, nothing is captured.

    Args:
        options: Snake_case names to values; None means absent.
        environ: The environment to read; `os.environ` by default.

    Returns:
        The settings; None if nothing may be captured.
    """
    settings, errors = Settings.of_any(options, environ=environ)
    for error in errors:
        if str(error) not in _told:
            _told.add(str(error))
            _logger.error(
                "moesif_otel: %s: %s",
                "no calls are captured" if settings is None else "a wrong option is ignored, and its default is used",
                error,
            )
    return settings
