"""What arrived, in SQLite: in memory, or in a file that outlives the sandbox.

Owns: the tables of events, profiles, actions and of the edited configuration and rules.
Threads: any; one lock around one connection. The server calls it from its worker threads, never from its loop.
Never: checks what it is given (check.py did).
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Document", "Store", "StoredEvent"]

# One transaction id is stored once for an application: the server deduplicates event by event, across batches too.
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS events (
  sequence INTEGER PRIMARY KEY AUTOINCREMENT,
  application_id TEXT NOT NULL,
  transaction_id TEXT,
  received_s REAL NOT NULL,
  source TEXT NOT NULL,
  event BLOB NOT NULL,
  UNIQUE (application_id, transaction_id)
);
CREATE TABLE IF NOT EXISTS profiles (
  sequence INTEGER PRIMARY KEY AUTOINCREMENT,
  application_id TEXT NOT NULL,
  kind TEXT NOT NULL,
  id TEXT,
  profile BLOB NOT NULL,
  UNIQUE (application_id, kind, id)
);
CREATE TABLE IF NOT EXISTS documents (
  application_id TEXT NOT NULL,
  name TEXT NOT NULL,
  revision INTEGER NOT NULL,
  body BLOB NOT NULL,
  PRIMARY KEY (application_id, name)
);
"""

# Column values of every query below are bound parameters; this one clause serves all.
_MINE: Final = "(:application_id IS NULL OR application_id = :application_id)"


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """One event as it was received, and what the sandbox knows about it.

    Attributes:
        sequence: Grows with each event stored; `since` of the queries compares with it.
        received_s: When it arrived, Unix seconds.
        source: `events` or `otlp`.
        event: Its JSON.
    """

    sequence: int
    application_id: str
    received_s: float
    source: str
    event: bytes


@dataclass(frozen=True, slots=True)
class Document:
    """The configuration or the rules, with the tag that changes at each edit."""

    body: bytes
    tag: str


class Store:
    """Keeps what arrived.

    Args:
        database: Path of an SQLite file; None keeps everything in memory.
        max_events: Events kept at most; the oldest go first.

    Thread-safe.
    """

    def __init__(self, database: str | None = None, *, max_events: int = 200_000) -> None:
        self._max_events = max_events
        self._changed = threading.Condition(threading.Lock())
        self._connection = sqlite3.connect(database or ":memory:", check_same_thread=False)
        try:
            if database:
                # A killed sandbox may lose its last moments but not its file.
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.executescript(_SCHEMA)
        except sqlite3.Error:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the database; an in-memory one is gone."""
        with self._changed:
            self._connection.close()

    def add_events(self, application_id: str, events: Sequence[tuple[str | None, bytes]], source: str) -> int:
        """Store events that are not there yet.

        Args:
            application_id: Whose events they are.
            events: Transaction id (None is never a duplicate) and JSON of each.
            source: `events` or `otlp`.

        Returns:
            How many were new.
        """
        now_s = time.time()
        rows = [(application_id, transaction_id, now_s, source, event) for transaction_id, event in events]
        with self._changed, self._connection as connection:
            before = connection.total_changes
            connection.executemany(
                "INSERT OR IGNORE INTO events (application_id, transaction_id, received_s, source, event) "
                "VALUES (?, ?, ?, ?, ?)",
                rows,
            )
            stored = connection.total_changes - before
            connection.execute(
                "DELETE FROM events WHERE sequence <= (SELECT MAX(sequence) FROM events) - ?", (self._max_events,)
            )
            self._changed.notify_all()
        return stored

    def events(
        self, *, application_id: str | None = None, since: int = 0, limit: int | None = None
    ) -> list[StoredEvent]:
        """Give stored events, newest last.

        Args:
            application_id: Only this one's; None gives all.
            since: Only events with a greater sequence number.
            limit: At most so many, the newest ones.
        """
        parameters = {"application_id": application_id, "since": since, "limit": -1 if limit is None else limit}
        with self._changed:
            rows = self._connection.execute(
                "SELECT sequence, application_id, received_s, source, event FROM events WHERE "  # noqa: S608 - constant
                f"{_MINE} AND sequence > :since ORDER BY sequence DESC LIMIT :limit",
                parameters,
            ).fetchall()
        return [StoredEvent(*row) for row in reversed(rows)]

    def event(self, sequence: int) -> bytes | None:
        """Give one event's JSON by its sequence number."""
        with self._changed:
            row = self._connection.execute("SELECT event FROM events WHERE sequence = ?", (sequence,)).fetchone()
        return None if row is None else row[0]

    def count_events(self, application_id: str | None = None) -> int:
        """Say how many events are stored."""
        with self._changed:
            return self._count(application_id)

    def wait_for_events(self, count: int, timeout_s: float, application_id: str | None = None) -> bool:
        """Wait until `count` events are stored; False when the time is over first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count(application_id) >= count, timeout_s)

    def _count(self, application_id: str | None) -> int:
        row = self._connection.execute(
            f"SELECT COUNT(*) FROM events WHERE {_MINE}",  # noqa: S608 - constant
            {"application_id": application_id},
        ).fetchone()
        return int(row[0])

    def merge_profiles(self, application_id: str, kind: str, profiles: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Add profiles, or merge them into those with the same id, as the server's upserts do."""
        with self._changed, self._connection as connection:
            for key, profile in profiles:
                where = (application_id, kind, key)
                row = connection.execute(
                    "SELECT profile FROM profiles WHERE application_id = ? AND kind = ? AND id = ?", where
                ).fetchone()
                merged = _merge(orjson.loads(row[0]), profile) if row else profile
                connection.execute(
                    "INSERT INTO profiles (application_id, kind, id, profile) VALUES (?, ?, ?, ?) "
                    "ON CONFLICT (application_id, kind, id) DO UPDATE SET profile = excluded.profile",
                    (*where, orjson.dumps(merged)),
                )
            self._changed.notify_all()

    def add_actions(self, application_id: str, actions: Sequence[dict[str, Any]]) -> None:
        """Add actions; each one stands for itself."""
        with self._changed, self._connection as connection:
            connection.executemany(
                "INSERT INTO profiles (application_id, kind, profile) VALUES (?, 'actions', ?)",
                [(application_id, orjson.dumps(action)) for action in actions],
            )
            self._changed.notify_all()

    def profiles(self, kind: str, application_id: str | None = None) -> list[bytes]:
        """Give the JSON of each profile of a kind (`actions` too), in the order of their first arrival."""
        with self._changed:
            rows = self._connection.execute(
                f"SELECT profile FROM profiles WHERE kind = :kind AND {_MINE} ORDER BY sequence",  # noqa: S608 - constant
                {"kind": kind, "application_id": application_id},
            ).fetchall()
        return [row[0] for row in rows]

    def document(self, application_id: str, name: str, default: bytes) -> Document:
        """Give the configuration or the rules of an application: its own, else those of all, else the default."""
        with self._changed:
            row = self._connection.execute(
                "SELECT application_id, revision, body FROM documents "
                "WHERE name = ? AND application_id IN (?, '') ORDER BY application_id DESC LIMIT 1",
                (name, application_id),
            ).fetchone()
        owner, revision, body = row or ("", 0, default)
        seed = b"\0".join((name.encode(), owner.encode(), str(revision).encode(), body))
        return Document(body, hashlib.sha256(seed).hexdigest()[:32])

    def put_document(self, application_id: str, name: str, body: bytes) -> None:
        """Replace the configuration or the rules; an empty application id means every application without its own."""
        with self._changed, self._connection as connection:
            connection.execute(
                "INSERT INTO documents (application_id, name, revision, body) VALUES (?, ?, 1, ?) "
                "ON CONFLICT (application_id, name) DO UPDATE SET revision = revision + 1, body = excluded.body",
                (application_id, name, body),
            )

    def clear(self) -> None:
        """Forget events, profiles and actions; the configuration and the rules stay."""
        with self._changed, self._connection as connection:
            connection.execute("DELETE FROM events")
            connection.execute("DELETE FROM profiles")


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for name, value in new.items():
        before = merged.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            merged[name] = _merge(before, value)
        elif value is not None:
            merged[name] = value
    return merged
