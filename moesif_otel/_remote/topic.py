"""One thing that Moesif is asked for, configuration or rules: when to ask again, and with which ETag.

Owns: the schedule, the tags, and the reading of one answer's status and headers.
Threads: everything but `note_tag` runs on the poller's thread.
Never: reads a clock; the time is given to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["POLL_INTERVAL_S", "AnswerError", "Fetched", "JsonSource", "Topic"]

POLL_INTERVAL_S: Final = 60.0
"""Moesif is asked this often (its API documentation)."""
# Answers of two servers with two tags may take turns: one question a second at most.
_LEAST_GAP_S: Final = 1.0
# After a failure it is asked sooner than in a minute: a service that starts before its network shall not be
# without rules for so long.
_FIRST_RETRY_S: Final = 5.0
_MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024


class JsonSource(Protocol):
    """What the poller needs of a transport (`delivery.client.MoesifTransport`)."""

    def get_json(self, path: str, *, etag: str | None, timeout_s: float) -> tuple[int, bytes, Mapping[str, str]]:
        """GET `path`, with `If-None-Match` when there is an ETag; give status, body and headers."""
        ...


class AnswerError(Exception):
    """An answer that says nothing; fixed text."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A good answer; `body` is None when nothing has changed (304)."""

    body: bytes | None
    etag: str | None
    tags: frozenset[str]


class Topic:
    """When to ask for one thing again.

    Args:
        name: For messages.
        path: Where it is asked for.
        tag_header: Lower-case name of the header, on events answers and its own, that carries its tag.
    """

    __slots__ = (
        "_begun_s",
        "_etag",
        "_failures",
        "_next_s",
        "_noted_tag",
        "_requested",
        "_tag_header",
        "_tags",
        "name",
        "path",
    )

    def __init__(self, name: str, path: str, tag_header: str) -> None:
        self.name = name
        self.path = path
        self._tag_header = tag_header
        self._etag: str | None = None
        self._tags: frozenset[str] = frozenset()
        self._noted_tag: str | None = None
        self._requested = False
        self._begun_s: float | None = None
        self._next_s: float | None = None  # None: never asked
        self._failures = 0

    def note_tag(self, tag: str | None) -> bool:
        """Take note of a tag on an events answer; True when it is new, so that this should be asked for again."""
        if not tag or tag == self._noted_tag or tag in self._tags:
            return False
        # Remembered even if the answer then carries another one: a tag has it asked for once, not with every batch.
        self._noted_tag = tag
        self._requested = True
        return True

    def is_due(self, now_s: float) -> bool:
        """Whether to ask now."""
        return self.wait_s(now_s) <= 0

    def wait_s(self, now_s: float) -> float:
        """Seconds until it is due."""
        if self._next_s is None or self._begun_s is None:
            return 0.0
        at_s = min(self._next_s, self._begun_s + _LEAST_GAP_S) if self._requested else self._next_s
        return at_s - now_s

    def begin(self, now_s: float) -> None:
        """Take note that it is being asked for; a tag that comes from now on has it asked for again."""
        self._begun_s = now_s
        self._requested = False

    def ask(self, source: JsonSource, timeout_s: float) -> Fetched:
        """Ask once.

        Raises:
            AnswerError: The answer is neither 200 nor 304.
            Exception: Whatever the transport raises.
        """
        status, body, raw_headers = source.get_json(self.path, etag=self._etag, timeout_s=timeout_s)
        headers = {name.lower(): value for name, value in raw_headers.items()}
        tag, etag = headers.get(self._tag_header), headers.get("etag")
        tags = frozenset(text for text in (tag, etag) if text)
        if status == 304:
            return Fetched(None, self._etag, tags)
        if status != 200:
            raise AnswerError(f"status {status}")
        if len(body) > _MAX_ANSWER_BYTES:
            raise AnswerError("answer over 16 MiB")
        return Fetched(body, etag or tag, tags)

    def settle(self, fetched: Fetched | None, now_s: float) -> None:
        """Take note of how asking ended: None when it failed or the answer was malformed."""
        if fetched is None:
            self._next_s = now_s + min(_FIRST_RETRY_S * 2.0 ** min(self._failures, 8), POLL_INTERVAL_S)
            self._failures += 1
            return
        self._failures = 0
        self._next_s = now_s + POLL_INTERVAL_S
        if fetched.body is not None:
            self._etag = fetched.etag
            self._tags = fetched.tags
        else:
            self._tags |= fetched.tags
