"""Options of the zero-code run: taken from a configuration file or the environment, and never a reason not to start.

Owns: reading options so that a wrong one is logged, and its default used; whether OpenTelemetry is switched off.
Threads: the one that starts the process.
Never: raises, quotes the application id.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Final

from moesif_otel.errors import MoesifConfigError
from moesif_otel.settings import OPTIONS, Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["is_switched_off", "read_settings"]

_logger: Final = logging.getLogger(__name__)
_told: Final[set[str]] = set()


def is_switched_off(environ: Mapping[str, str] | None = None) -> bool:
    """Whether `OTEL_SDK_DISABLED` says true (OTel specification: only "true", in any case)."""
    source = os.environ if environ is None else environ
    return source.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def read_settings(options: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings | None:
    """Read options that were given by name, and the others from the environment; wrong ones are logged once.

    Args:
        options: Snake_case names to values; None means absent. Unknown ones are warned of.
        environ: The environment to read; `os.environ` by default.

    Returns:
        The settings, with the default of each option that was wrong; None without an application id.
    """
    given: dict[str, Any] = {}
    errors: list[MoesifConfigError] = []
    for name, value in options.items():
        option = OPTIONS.get(name.upper())
        if value is None or option is None:
            continue
        try:
            given[option.field_name] = option.read(value)
        except MoesifConfigError as error:
            errors.append(error)
    # What a file says is not asked of the environment again, right or wrong.
    names = {name.upper() for name, value in options.items() if value is not None}
    source = {
        key: value
        for key, value in (os.environ if environ is None else environ).items()
        if key.removeprefix("OTEL_").removeprefix("MOESIF_") not in names
    }
    if "application_id" in given:
        source["MOESIF_APPLICATION_ID"] = given["application_id"]
    settings, more = Settings.from_environment(source)
    wrong_id = any(map(_is_of_application_id, errors))
    errors += [one for one in more if not (wrong_id and _is_of_application_id(one))]
    for one in errors:
        _tell(one, starts=settings is not None)
    return None if settings is None else settings.with_changes(**given)


def _is_of_application_id(error: MoesifConfigError) -> bool:
    return str(error).startswith("APPLICATION_ID:")


def _tell(error: MoesifConfigError, *, starts: bool) -> None:
    missing = _is_of_application_id(error)
    if str(error) in _told or not (starts or missing):
        # Without an application id nothing else matters: one line says what to set.
        return
    _told.add(str(error))
    _logger.error("moesif_otel: %s: %s", "no calls are captured" if missing else "the default is used", error)
