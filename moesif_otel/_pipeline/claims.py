"""Which spans a pipeline has taken, so that an exporter of the same pipeline does not send their calls again.

Any thread and any finalizer may ask and claim: set and deque operations only, no lock, and a bound.
"""

from __future__ import annotations

from collections import deque
from typing import Final

# A batch processor holds 2,048 spans by default (OTel specification, OTEL_BSP_MAX_QUEUE_SIZE); ten times that.
_MAX_CLAIMS: Final = 20_480


class ClaimSet:
    """Recently claimed spans, the oldest forgotten first."""

    __slots__ = ("_claimed", "_order")

    def __init__(self) -> None:
        # Hashes of the pairs: 64 bits of two random ids tell them apart as well, in half the memory (90 bytes each).
        self._claimed: set[int] = set()
        self._order: deque[int] = deque()

    def add(self, trace_id: int, span_id: int) -> None:
        """Claim a span."""
        key = hash((trace_id, span_id))
        if key in self._claimed:
            return
        self._claimed.add(key)
        self._order.append(key)
        if len(self._order) > _MAX_CLAIMS:
            try:
                self._claimed.discard(self._order.popleft())
            except IndexError:  # another thread made room
                return

    def __contains__(self, key: tuple[int, int]) -> bool:
        return hash(key) in self._claimed


_claims: dict[tuple[str, str], ClaimSet] = {}


def claims_of(pipeline_key: tuple[str, str]) -> ClaimSet:
    """Return the claims of one application id and base URI."""
    # dict.setdefault is atomic: two threads get the same set.
    return _claims.get(pipeline_key) or _claims.setdefault(pipeline_key, ClaimSet())
