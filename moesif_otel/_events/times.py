"""Times as Moesif takes them.

Owns: nanoseconds since the epoch to text.
Threads: any; a pure function.
Never: reads a clock.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Final

__all__ = ["moesif_time"]

_LAST_SECOND: Final = 253_402_300_799  # 9999-12-31T23:59:59, the last that `datetime` knows


def moesif_time(time_ns: int | None) -> str:
    """Give nanoseconds since the epoch as `2024-10-30T04:45:42.914`, UTC, cut to milliseconds."""
    seconds, rest_ns = divmod(max(time_ns or 0, 0), 1_000_000_000)
    moment = datetime.fromtimestamp(min(seconds, _LAST_SECOND), timezone.utc)
    return f"{moment.isoformat()[:19]}.{rest_ns // 1_000_000:03d}"
