"""What went over the wire: a log of the last requests, the open connections, and counters.

Owns: `Wire`, where the server notes each request and tests read the facts.
Threads: any; one lock. The entries that it gives are copies.
Never: keeps a body; its headers stay on this machine, in memory.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

__all__ = ["COUNTERS", "Wire"]

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


class Wire:
    """The facts of the wire. Thread-safe.

    Args:
        log_size: Requests kept in the log; the oldest go first.
    """

    def __init__(self, log_size: int) -> None:
        self._lock = threading.Lock()
        self._log: deque[dict[str, Any]] = deque(maxlen=log_size)
        self._counts: Counter[str] = Counter()
        self._transports: dict[tuple[str, int], asyncio.Transport] = {}

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter of `COUNTERS`."""
        with self._lock:
            self._counts[name] += number

    def stats(self) -> dict[str, int]:
        """Give all counters."""
        with self._lock:
            return {name: self._counts[name] for name in COUNTERS}

    def begin(self, scope: Mapping[str, Any]) -> dict[str, Any]:
        """Note that a request's head has come; the entry is completed by `note`."""
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            headers[key] = f"{headers[key]}, {text}" if key in headers else text
        client = scope.get("client")
        entry = {
            "received_s": time.time(),
            "method": scope["method"],
            "path": scope["path"],
            "query": scope["query_string"].decode("latin-1"),
            "http_version": scope["http_version"],
            "headers": headers,
            "connection": f"{client[0]}:{client[1]}" if client else None,
            "application_id": headers.get("x-moesif-application-id"),
            "body_bytes": None,
            "decoded_bytes": None,
            "misbehaved": False,
            "status": None,
            "took_ms": None,
        }
        with self._lock:
            self._counts["requests"] += 1
            self._log.append(entry)
        return entry

    def note(self, entry: dict[str, Any], **facts: Any) -> None:
        """Complete an entry."""
        with self._lock:
            entry.update(facts)

    def requests(self) -> list[dict[str, Any]]:
        """Give the log, oldest first; status None means that no answer was sent (yet)."""
        with self._lock:
            return [{**entry, "headers": dict(entry["headers"])} for entry in self._log]

    def clear(self) -> None:
        """Empty the log and set the counters to zero; open connections stay open."""
        with self._lock:
            self._log.clear()
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
