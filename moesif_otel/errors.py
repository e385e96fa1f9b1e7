"""The exceptions that users of moesif_otel can meet.

    MoesifError
    ├── MoesifConfigError     (also a ValueError)  an option or argument is wrong; raised at construction
    └── MoesifDeliveryError                        Moesif did not take what a synchronous call sent

Nothing else of ours is ever raised into an application: what fails while a request is served is counted and
logged by `_guard.Guard`. No message carries a body, a credential, an identity or the application id.
"""

from __future__ import annotations

__all__ = ["MoesifConfigError", "MoesifDeliveryError", "MoesifError"]


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
