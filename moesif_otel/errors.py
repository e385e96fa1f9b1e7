"""The exceptions that users of moesif_otel can meet.

    MoesifError
    ├── MoesifConfigError     (also a ValueError)  an option or argument is wrong; raised at construction
    └── MoesifDeliveryError                        Moesif did not take what a synchronous call sent

Nothing else of ours is ever raised into an application: what fails while a request is served is counted and
logged by `_guard.Guard`. No message carries a body, a credential, an identity or the application id.
"""

from __future__ import annotations

import importlib.metadata

__all__ = ["MoesifConfigError", "MoesifDeliveryError", "MoesifError", "install_command"]


class MoesifError(Exception):
    """Base class of every exception that moesif_otel raises on purpose."""


class MoesifConfigError(MoesifError, ValueError):
    """An option has a wrong type or value; the message names the option, what it got and what it takes.

    Attributes:
        option: Name of the option in upper case; None when the error is about something else.
    """

    def __init__(self, message: str, *, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class MoesifDeliveryError(MoesifError):
    """Moesif refused, or could not be reached by, a synchronous call.

    Attributes:
        status: HTTP status of Moesif's answer; None when no answer came.
        undelivered: Indexes of what Moesif has not taken, in the batch that the call was given; the rest was taken.
    """

    def __init__(self, message: str, *, status: int | None = None, undelivered: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.undelivered = undelivered


def install_command(extra: str) -> str:
    """Return the command that installs what an extra of ours brings: for messages.

    It names the packages themselves, so it is right wherever moesif-otel was installed from: a clone, a wheel, a Git
    address or an index.

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
