"""What is left out of a configuration or of rules: counted by kind, logged once a kind.

Owns: `Skips`, the guard of everything that Moesif tells us.
Threads: any; it takes no lock that a request could wait for (see `guard.Guard`).
Never: raises; logs an expression, a header, a body, an identity or anything of a request.
"""

from __future__ import annotations

import logging
from typing import Final

from moesif_otel._guard import Guard

__all__ = ["Skips"]

_logger: Final = logging.getLogger(__name__)
_MAX_SUBJECT_CHARS: Final = 60


class Skips(Guard):
    """A guard that can also note what was left out without an exception.

    One belongs to each poller, so to all pipelines that share an application id and a base URI.
    Thread-safe, as `Guard` is.
    """

    __slots__ = ("_told",)

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def note(self, kind: str, subject: str = "", reason: str = "") -> None:
        """Count one piece that is left out; log it when it is the first of its kind.

        Args:
            kind: What was left out; from a closed vocabulary of ours.
            subject: Id of a rule, where there is one (Moesif's own, nobody's data).
            reason: Why, in fixed words of ours.
        """
        self._deferred.append(kind)
        # Noted on every request in the worst case (a stale rule): fold now and then, as `caught` does.
        if len(self._deferred) > 1_000:
            self._fold()
        if kind in self._told:
            return
        self._told.add(kind)
        _logger.warning(
            "moesif_otel: %s%s is left out%s; everything else applies, further ones are counted only",
            kind,
            f" {subject[:_MAX_SUBJECT_CHARS]!r}" if subject else "",
            f": {reason}" if reason else "",
        )
