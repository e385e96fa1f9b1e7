"""Keeps what went over the wire: a log of the last requests, the open connections, and counters.

Any thread may call; entries that are given out are copies. No body is kept; headers stay on this machine, in memory,
and the log is bounded by number and by bytes.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

__all__ = ["COUNTERS", "Wire", "headers_of"]

_MAX_LOG_BYTES: Final = 16 * 1024 * 1024
_MAX_TEXT_CHARACTERS: Final = 2_000  # of one header, path or query in the log
_ENTRY_BYTES: Final = 1_000

COUNTERS: Final = (
    "requests",  # to Moesif's own paths, misbehaved ones too
    "connections",  # TCP connections accepted
    "batches",  # requests to an events path that were taken
    "received",  # events in those, duplicates too
    "duplicates",  # events whose transaction id was there already
    "rejected",  # requests that our checks refused (400, 401, 413, 415)
    "misbehaved",  # requests that got what a behaviour says
    "profiles",  # users, companies, subscriptions and actions taken
    "body_bytes",  # request bodies as sent
    "decoded_bytes",  # request bodies decoded
)


def headers_of(scope: Mapping[str, Any]) -> dict[str, str]:
    """Return a request's headers by their names in lower case; repeated ones are joined with a comma."""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return headers


class Wire:
    """The facts of the wire. Thread-safe.

    Args:
        log_size: Requests kept in the log; the oldest go first.
    """

    def __init__(self, log_size: int) -> None:
        self._lock = threading.Lock()
        self._log: deque[tuple[int, dict[str, Any]]] = deque()
        self._log_size = log_size
        self._log_bytes = 0
        self._numbers = itertools.count(1)
        self._counts: Counter[str] = Counter()
        self._transports: dict[tuple[str, int], asyncio.Transport] = {}

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter of `COUNTERS`."""
        with self._lock:
            self._counts[name] += number

    def stats(self) -> dict[str, int]:
        """Return all counters."""
        with self._lock:
            return {name: self._counts[name] for name in COUNTERS}

    def begin(self, scope: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
        """Note that a request's head has come, long values shortened; the entry is completed by `note`."""
        client = scope.get("client")
        logged = {name[:_MAX_TEXT_CHARACTERS]: text[:_MAX_TEXT_CHARACTERS] for name, text in headers.items()}
        entry = {
            "received_s": time.time(),
            "method": scope["method"],
            "path": scope["path"][:_MAX_TEXT_CHARACTERS],
            "query": scope["query_string"].decode("latin-1")[:_MAX_TEXT_CHARACTERS],
            "http_version": scope["http_version"],
            "headers": logged,
            "connection": f"{client[0]}:{client[1]}" if client else None,
            "application_id": logged.get("x-moesif-application-id"),
            "body_bytes": None,
            "decoded_bytes": None,
            "items": None,
            "misbehaved": False,
            "error": None,
            "status": None,
            "took_ms": None,
        }
        size_bytes = _ENTRY_BYTES + sum(len(name) + len(text) + 100 for name, text in logged.items())
        with self._lock:
            entry["number"] = next(self._numbers)
            self._counts["requests"] += 1
            self._log.append((size_bytes, entry))
            self._log_bytes += size_bytes
            while len(self._log) > self._log_size or self._log_bytes > _MAX_LOG_BYTES:
                self._log_bytes -= self._log.popleft()[0]
        return entry

    def note(self, entry: dict[str, Any], **facts: Any) -> None:
        """Complete an entry."""
        with self._lock:
            entry.update(facts)

    def requests(self, *, before: int | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """Return the log, oldest first; status None means that no answer was sent (yet).

        Args:
            before: Only entries with a smaller number.
            limit: The newest of them only.
        """
        with self._lock:
            found = [entry for _, entry in self._log if before is None or entry["number"] < before]
            if limit is not None:
                found = found[-limit:]
            return [{**entry, "headers": dict(entry["headers"])} for entry in found]

    def clear(self) -> None:
        """Empty the log and set the counters to zero; open connections stay open."""
        with self._lock:
            self._log.clear()
            self._log_bytes = 0
            self._counts.clear()

    def opened(self, client: tuple[str, int], transport: asyncio.Transport) -> None:
        """Note a new connection."""
        with self._lock:
            self._counts["connections"] += 1
            self._transports[client] = transport

    def closed(self, client: tuple[str, int]) -> None:
        """Note that a connection is gone."""
        with self._lock:
            self._transports.pop(client, None)

    def drop(self, client: tuple[str, int] | None) -> None:
        """Close a connection without an answer; called on the server's loop."""
        with self._lock:
            transport = self._transports.get(client) if client else None
        if transport is not None:
            transport.abort()

    def drop_all(self) -> None:
        """Close every connection that is still open; called on the server's loop."""
        with self._lock:
            transports = list(self._transports.values())
        for transport in transports:
            transport.abort()
