"""The exceptions that moesif_otel raises.

    MoesifError
    ├── MoesifConfigError     (also a ValueError)  an option or argument is wrong; raised at construction
    └── MoesifDeliveryError                        Moesif did not accept what a synchronous call sent

No other error of ours reaches the application: errors while a request is served are counted and logged by
`_guard.Guard`. No message contains a body, a credential, an identity or the application id.
"""

from __future__ import annotations

import importlib.metadata

__all__ = ["MoesifConfigError", "MoesifDeliveryError", "MoesifError", "install_command"]


class MoesifError(Exception):
    """Base class of every exception that moesif_otel raises on purpose."""


class MoesifConfigError(MoesifError, ValueError):
    """An option has a wrong type or value; the message says which option, what it got and what it takes.

    Attributes:
        option: Name of the option in upper case; None if the error is about something else.
    """

    def __init__(self, message: str, *, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class MoesifDeliveryError(MoesifError):
    """Moesif refused a synchronous call, or could not be reached.

    Attributes:
        status: HTTP status of Moesif's answer; None if there was no answer.
        undelivered: Indexes of the items in the batch that Moesif has not accepted; it has accepted the others.
    """

    def __init__(self, message: str, *, status: int | None = None, undelivered: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.undelivered = undelivered


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra, for messages.

    It names the packages themselves, so it works however moesif-otel was installed: from a clone, a wheel, Git or an
    index.

    Args:
        extra: Name of the extra, such as `sandbox`.
    """
    try:
        requirements = importlib.metadata.requires("moesif-otel") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        requirements = []
    marks = (f'extra == "{extra}"', f"extra == '{extra}'")
    packages = [line.partition(";")[0].strip() for line in requirements if line.endswith(marks)]
    return "pip install " + " ".join(f"'{package}'" for package in packages or [f"moesif-otel[{extra}]"])
