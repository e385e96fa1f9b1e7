"""Stores what arrived, in SQLite: in memory, or in a file that outlives the sandbox.

Everything kept is bounded by number and by bytes; the oldest goes first. Questions are asked in SQL, and each one looks
at an index or at a bounded number of rows. One lock stands around one connection: the server calls from its worker
threads, never from its loop.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from moesif_otel.sandbox.check import MAX_EVENT_BYTES, Refusal
from moesif_otel.sandbox.jsontext import read_json, write_json
from moesif_otel.sandbox.query import Filters
from moesif_otel.sandbox.rows import Row, search_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["DEFAULT_MAX_BYTES", "MAX_DOCUMENT_BYTES", "Document", "Store", "StoredEvent", "StoredRow"]

DEFAULT_MAX_BYTES: Final = 256 * 1024 * 1024
MAX_DOCUMENT_BYTES: Final = 1024 * 1024

_FORMAT: Final = 2  # of the database file
_MAX_PROFILES: Final = 100_000
_MAX_DOCUMENTS: Final = 64
_PROFILE_SHARE: Final = 4  # profiles and actions may take a quarter of the bytes that events may, beside them
# What a row takes besides its text, indexes included; measured with 50,000 rows.
_ROW_BYTES: Final = 900
_PROFILE_ROW_BYTES: Final = 250
_READ_ROWS: Final = 200

# One transaction id is stored once for an application: the server deduplicates event by event, across batches too.
# An index ends in the row's sequence by itself, so that each serves "the newest of these" without sorting.
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS events (
  sequence INTEGER PRIMARY KEY AUTOINCREMENT,
  application_id TEXT NOT NULL,
  transaction_id TEXT,
  received_s REAL NOT NULL,
  source TEXT NOT NULL,
  size_bytes INTEGER NOT NULL,
  time_ms INTEGER NOT NULL,
  direction TEXT NOT NULL,
  verb TEXT NOT NULL COLLATE NOCASE,
  host TEXT NOT NULL,
  path TEXT NOT NULL,
  route TEXT NOT NULL,
  status INTEGER,
  status_class INTEGER NOT NULL,
  took_ms REAL,
  user_id TEXT,
  company_id TEXT,
  trace_id TEXT,
  span_id TEXT,
  parent_id TEXT,
  weight INTEGER NOT NULL,
  request_bytes INTEGER,
  response_bytes INTEGER,
  sizes_known INTEGER NOT NULL,
  blocked INTEGER NOT NULL,
  truncated INTEGER NOT NULL,
  hidden INTEGER NOT NULL,
  failed INTEGER NOT NULL,
  outcome TEXT NOT NULL,
  UNIQUE (application_id, transaction_id)
);
CREATE INDEX IF NOT EXISTS events_by_application ON events (application_id);
CREATE INDEX IF NOT EXISTS events_by_time ON events (time_ms);
CREATE INDEX IF NOT EXISTS events_by_verb ON events (verb);
CREATE INDEX IF NOT EXISTS events_by_direction ON events (direction);
CREATE INDEX IF NOT EXISTS events_by_route ON events (route);
CREATE INDEX IF NOT EXISTS events_by_status ON events (status_class);
CREATE INDEX IF NOT EXISTS events_by_user ON events (user_id) WHERE user_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS events_by_company ON events (company_id) WHERE company_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS events_by_trace ON events (trace_id) WHERE trace_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS events_that_failed ON events (failed) WHERE failed = 1;
CREATE INDEX IF NOT EXISTS events_blocked ON events (blocked) WHERE blocked = 1;
CREATE INDEX IF NOT EXISTS events_truncated ON events (truncated) WHERE truncated = 1;
CREATE INDEX IF NOT EXISTS events_hidden ON events (hidden) WHERE hidden = 1;
CREATE TABLE IF NOT EXISTS payloads (
  sequence INTEGER PRIMARY KEY,
  search TEXT NOT NULL,
  event BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS profiles (
  sequence INTEGER PRIMARY KEY AUTOINCREMENT,
  application_id TEXT NOT NULL,
  kind TEXT NOT NULL,
  id TEXT,
  updated_s REAL NOT NULL,
  profile BLOB NOT NULL,
  UNIQUE (application_id, kind, id)
);
CREATE INDEX IF NOT EXISTS profiles_by_kind ON profiles (kind, id);
CREATE TABLE IF NOT EXISTS documents (
  application_id TEXT NOT NULL,
  name TEXT NOT NULL,
  revision INTEGER NOT NULL,
  body BLOB NOT NULL,
  PRIMARY KEY (application_id, name)
);
"""

_ROW_COLUMNS: Final = (
    "sequence, application_id, source, received_s, time_ms, direction, verb, host, path, route, status, took_ms, "
    "user_id, company_id, trace_id, span_id, parent_id, weight, request_bytes, response_bytes, sizes_known, blocked, "
    "truncated, hidden, failed, outcome"
)
_INSERT: Final = (
    "INSERT OR IGNORE INTO events "  # noqa: S608 - constant
    "(application_id, transaction_id, received_s, source, size_bytes, time_ms, direction, verb, "
    "host, path, route, status, status_class, took_ms, user_id, company_id, trace_id, span_id, parent_id, weight, "
    "request_bytes, response_bytes, sizes_known, blocked, truncated, hidden, failed, outcome) "
    f"VALUES ({', '.join('?' * 28)})"
)


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
class StoredRow:
    """One stored event at one look, without its JSON."""

    sequence: int
    application_id: str
    source: str
    received_s: float
    row: Row


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
        max_bytes: Bytes that events may take, about; the oldest go first. Profiles and actions may take a quarter of
            that beside them.

    Thread-safe.
    """

    def __init__(
        self, database: str | None = None, *, max_events: int = 200_000, max_bytes: int = DEFAULT_MAX_BYTES
    ) -> None:
        self._max_events = max_events
        self._max_bytes = max(max_bytes, 2 * MAX_EVENT_BYTES)
        self._changed = threading.Condition(threading.Lock())
        # Replaced as a whole, so that it is read without a lock.
        self._listeners: tuple[Callable[[], None], ...] = ()
        self._listeners_lock = threading.Lock()
        self._connection = sqlite3.connect(database or ":memory:", check_same_thread=False)
        try:
            if database:
                # A killed sandbox may lose its last moments but not its file.
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = NORMAL")
            self._check_format()
            self._connection.executescript(_SCHEMA)
            self._connection.execute(f"PRAGMA user_version = {_FORMAT}")
            self._event_bytes, self._event_count, self._profile_bytes, self._profile_count = self._sizes()
        except sqlite3.Error:
            self._connection.close()
            raise

    def _check_format(self) -> None:
        found = self._one("PRAGMA user_version")
        if found != _FORMAT and self._one("SELECT COUNT(*) FROM sqlite_master WHERE name = 'events'"):
            raise sqlite3.DatabaseError("it was made by another version of moesif-otel; name a new file")

    def _sizes(self) -> tuple[int, int, int, int]:
        return (
            self._one("SELECT COALESCE(SUM(size_bytes), 0) FROM events"),
            self._one("SELECT COUNT(*) FROM events"),
            self._one(f"SELECT COALESCE(SUM(LENGTH(profile) + {_PROFILE_ROW_BYTES}), 0) FROM profiles"),  # noqa: S608 - constant
            self._one("SELECT COUNT(*) FROM profiles"),
        )

    def _one(self, statement: str, parameters: Any = ()) -> Any:
        return self._connection.execute(statement, parameters).fetchone()[0]

    def close(self) -> None:
        """Close the database; an in-memory one is gone."""
        with self._changed:
            self._connection.close()

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` after each change, in the thread that made it, until the function returned here is called."""
        with self._listeners_lock:
            self._listeners = (*self._listeners, listener)

        def stop() -> None:
            with self._listeners_lock:
                self._listeners = tuple(other for other in self._listeners if other is not listener)

        return stop

    def _tell(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()

    # Events

    def add_events(self, application_id: str, events: Sequence[tuple[dict[str, Any], bytes]], source: str) -> int:
        """Store events that are not there yet.

        Args:
            application_id: Whose events they are.
            events: Each as the sandbox's checks let it pass, and as JSON. One without a transaction id is never a
                duplicate.
            source: `events` or `otlp`.

        Returns:
            How many were new.
        """
        now_s = time.time()
        prepared = []
        for event, text in events:
            row = Row.of_event(event, text=text)
            search = search_text(event, row)
            size_bytes = len(text) + len(search) + _ROW_BYTES
            columns = _columns(application_id, event, row, received_s=now_s, source=source, size_bytes=size_bytes)
            prepared.append((columns, search, text, size_bytes))
        with self._changed:
            before = self._event_bytes, self._event_count
            try:
                with self._connection:
                    stored = sum(map(self._add_event, prepared))
                    self._forget_oldest_events()
            except BaseException:
                self._event_bytes, self._event_count = before
                raise
            self._tell()
        return stored

    def _add_event(self, prepared: tuple[tuple[Any, ...], str, bytes, int]) -> bool:
        columns, search, text, size_bytes = prepared
        cursor = self._connection.execute(_INSERT, columns)
        if cursor.rowcount != 1:
            return False
        self._connection.execute(
            "INSERT INTO payloads (sequence, search, event) VALUES (?, ?, ?)", (cursor.lastrowid, search, text)
        )
        self._event_bytes += size_bytes
        self._event_count += 1
        return True

    def _forget_oldest_events(self) -> None:
        """Delete what is over the bounds, by sequence."""
        execute = self._connection.execute
        excess = self._event_count - self._max_events
        first_kept = 0
        if excess > 0:
            first_kept = self._one("SELECT sequence FROM events ORDER BY sequence LIMIT 1 OFFSET ?", (excess,))
        if self._event_bytes > self._max_bytes:
            # A little more than needed, so that this does not run for each batch.
            surplus = self._event_bytes - self._max_bytes * 15 // 16
            for sequence, size_bytes in execute("SELECT sequence, size_bytes FROM events ORDER BY sequence"):
                if surplus <= 0:
                    break
                surplus -= size_bytes
                first_kept = max(first_kept, sequence + 1)
        if first_kept:
            gone = "SELECT COALESCE(SUM(size_bytes), 0), COUNT(*) FROM events WHERE sequence < ?"
            gone_bytes, gone_count = execute(gone, (first_kept,)).fetchone()
            execute("DELETE FROM payloads WHERE sequence < ?", (first_kept,))
            execute("DELETE FROM events WHERE sequence < ?", (first_kept,))
            self._event_bytes -= gone_bytes
            self._event_count -= gone_count

    def events(
        self, *, application_id: str | None = None, since: int = 0, limit: int | None = None
    ) -> list[StoredEvent]:
        """Return stored events, newest last.

        Args:
            application_id: Only this one's; None gives all.
            since: Only events with a greater sequence number.
            limit: At most so many, the newest ones.
        """
        filters = Filters(application_id=application_id or "")
        condition, given = filters.where()
        given.update(since=since, limit=-1 if limit is None else limit)
        with self._changed:
            rows = self._connection.execute(
                "SELECT events.sequence, application_id, received_s, source, event "  # noqa: S608 - constant clauses
                "FROM events JOIN payloads ON payloads.sequence = events.sequence "
                f"WHERE {condition} AND events.sequence > :since ORDER BY events.sequence DESC LIMIT :limit",
                given,
            ).fetchall()
        return [StoredEvent(*row) for row in reversed(rows)]

    def event(self, sequence: int) -> StoredEvent | None:
        """Return one event by its sequence number."""
        with self._changed:
            row = self._connection.execute(
                "SELECT events.sequence, application_id, received_s, source, event "
                "FROM events JOIN payloads ON payloads.sequence = events.sequence WHERE events.sequence = ?",
                (sequence,),
            ).fetchone()
        return None if row is None else StoredEvent(*row)

    def each_event(self, filters: Filters, *, since: int = 0, until: int | None = None) -> Iterator[list[StoredEvent]]:
        """Return the events that fit, oldest first, a few at a time; never all of them at once."""
        condition, given = filters.where()
        given["until"] = self.last_sequence() if until is None else until
        while True:
            with self._changed:
                rows = self._connection.execute(
                    "SELECT events.sequence, application_id, received_s, source, event "  # noqa: S608 - constant clauses
                    "FROM events JOIN payloads ON payloads.sequence = events.sequence "
                    f"WHERE {condition} AND events.sequence > :since AND events.sequence <= :until "
                    f"ORDER BY events.sequence LIMIT {_READ_ROWS}",
                    {**given, "since": since},
                ).fetchall()
            if not rows:
                return
            since = rows[-1][0]
            yield [StoredEvent(*row) for row in rows]

    def rows(
        self, filters: Filters, *, before: int | None = None, after: int | None = None, limit: int = 100
    ) -> list[StoredRow]:
        """Return calls that fit, newest first.

        Args:
            filters: What they must be like.
            before: Only those with a smaller sequence number: the page after it.
            after: Only those with a greater one. Without `before` the newest `limit` of them.
            limit: How many at most.
        """
        statement, given = self.rows_statement(filters, before=before, after=after, limit=limit)
        with self._changed:
            found = self._connection.execute(statement, given).fetchall()
        return [_stored_row(row) for row in found]

    @staticmethod
    def rows_statement(
        filters: Filters, *, before: int | None = None, after: int | None = None, limit: int = 100
    ) -> tuple[str, dict[str, Any]]:
        """Return the statement that `rows` runs, and its parameters."""
        condition, given = filters.where()
        if before is not None:
            condition += " AND events.sequence < :before"
            given["before"] = before
        if after is not None:
            condition += " AND events.sequence > :after"
            given["after"] = after
        given["limit"] = limit
        return (
            f"SELECT {_ROW_COLUMNS} FROM events WHERE {condition} ORDER BY events.sequence DESC LIMIT :limit",  # noqa: S608 - constant clauses
            given,
        )

    def newer_page_start(self, filters: Filters, first_shown: int, limit: int) -> int | None:
        """Return the call that comes `limit` places after the next newer one; None where there are not so many."""
        condition, given = filters.where()
        given.update(first=first_shown, offset=limit)
        with self._changed:
            row = self._connection.execute(
                f"SELECT sequence FROM events WHERE {condition} AND events.sequence > :first "  # noqa: S608 - constant clauses
                "ORDER BY events.sequence LIMIT 1 OFFSET :offset",
                given,
            ).fetchone()
        return None if row is None else int(row[0])

    def count_rows(self, filters: Filters, *, at_most: int, after: int = 0) -> int:
        """Count calls that fit, up to `at_most`."""
        condition, given = filters.where()
        with self._changed:
            return int(
                self._one(
                    "SELECT COUNT(*) FROM (SELECT 1 FROM events "  # noqa: S608 - constant clauses
                    f"WHERE {condition} AND events.sequence > :after LIMIT :at_most)",
                    {**given, "at_most": at_most, "after": after},
                )
            )

    def neighbours(self, filters: Filters, sequence: int) -> tuple[int | None, int | None]:
        """Return the next newer and the next older call that fit."""
        older = self.rows(filters, before=sequence, limit=1)
        return self.newer_page_start(filters, sequence, 0), (older[0].sequence if older else None)

    def ask(self, statement: str, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        """Run a question that another module put together from constants."""
        with self._changed:
            return self._connection.execute(statement, parameters).fetchall()

    def last_sequence(self) -> int:
        """Return the newest event's sequence number; 0 when there is none."""
        with self._changed:
            return int(self._one("SELECT COALESCE(MAX(sequence), 0) FROM events"))

    def count_events(self, application_id: str | None = None) -> int:
        """Count the stored events."""
        with self._changed:
            return self._count(application_id)

    def wait_for_events(self, count: int, timeout_s: float, application_id: str | None = None) -> bool:
        """Wait until `count` events are stored; False when the time is over first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count(application_id) >= count, timeout_s)

    def _count(self, application_id: str | None) -> int:
        if application_id is None:
            return self._event_count
        return int(self._one("SELECT COUNT(*) FROM events WHERE application_id = ?", (application_id,)))

    # Profiles and actions

    def merge_profiles(self, application_id: str, kind: str, profiles: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Add profiles, or merge them into those with the same id, as the server's upserts do.

        Raises:
            Refusal: Status 413 where a profile would become larger than an event may be; nothing is stored then.
        """
        now_s = time.time()
        with self._changed:
            before = self._profile_bytes, self._profile_count
            try:
                with self._connection:
                    for key, profile in profiles:
                        self._merge_profile((application_id, kind, key), profile, now_s)
                    self._forget_oldest_profiles()
            except BaseException:
                self._profile_bytes, self._profile_count = before
                raise
            self._tell()

    def _merge_profile(self, where: tuple[str, str, str], profile: dict[str, Any], now_s: float) -> None:
        row = self._connection.execute(
            "SELECT profile FROM profiles WHERE application_id = ? AND kind = ? AND id = ?", where
        ).fetchone()
        text = write_json(_merge(read_json(row[0]), profile) if row else profile)
        if len(text) > MAX_EVENT_BYTES:
            raise Refusal(413, "profile_too_large", f"a profile must have at most {MAX_EVENT_BYTES} bytes")
        self._connection.execute(
            "INSERT INTO profiles (application_id, kind, id, updated_s, profile) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (application_id, kind, id) DO UPDATE SET profile = excluded.profile, "
            "updated_s = excluded.updated_s",
            (*where, now_s, text),
        )
        self._profile_bytes += len(text) - len(row[0]) if row else len(text) + _PROFILE_ROW_BYTES
        self._profile_count += 0 if row else 1

    def add_actions(self, application_id: str, actions: Sequence[dict[str, Any]]) -> None:
        """Add actions; each one stands for itself."""
        now_s = time.time()
        texts = [write_json(action) for action in actions]
        with self._changed, self._connection as connection:
            connection.executemany(
                "INSERT INTO profiles (application_id, kind, updated_s, profile) VALUES (?, 'actions', ?, ?)",
                [(application_id, now_s, text) for text in texts],
            )
            self._profile_bytes += sum(len(text) + _PROFILE_ROW_BYTES for text in texts)
            self._profile_count += len(texts)
            self._forget_oldest_profiles()
            self._tell()

    def _forget_oldest_profiles(self) -> None:
        most_bytes = self._max_bytes // _PROFILE_SHARE
        surplus = self._profile_bytes - most_bytes
        excess = self._profile_count - _MAX_PROFILES
        if surplus <= 0 and excess <= 0:
            return
        surplus = max(surplus, 0) + most_bytes // 16
        last_gone = 0
        every = "SELECT sequence, LENGTH(profile) FROM profiles ORDER BY sequence"
        for sequence, length in self._connection.execute(every):
            if surplus <= 0 and excess <= 0:
                break
            surplus -= length + _PROFILE_ROW_BYTES
            excess -= 1
            last_gone = sequence
        self._connection.execute("DELETE FROM profiles WHERE sequence <= ?", (last_gone,))
        _, _, self._profile_bytes, self._profile_count = self._sizes()

    def profiles(self, kind: str, application_id: str | None = None) -> list[bytes]:
        """Return the JSON of each profile of a kind (`actions` too), in the order of their first arrival."""
        with self._changed:
            rows = self._connection.execute(
                "SELECT profile FROM profiles WHERE kind = :kind "
                "AND (:application_id IS NULL OR application_id = :application_id) ORDER BY sequence",
                {"kind": kind, "application_id": application_id},
            ).fetchall()
        return [row[0] for row in rows]

    # Configuration and rules

    def document(self, application_id: str, name: str, default: bytes) -> Document:
        """Return the configuration or the rules of an application: its own, else those of all, else the default."""
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
        """Replace the configuration or the rules; an empty application id means every application without its own.

        Raises:
            Refusal: Status 413, for a document that is too large or one too many.
        """
        if len(body) > MAX_DOCUMENT_BYTES:
            raise Refusal(413, "too_large", f"{name} must have at most {MAX_DOCUMENT_BYTES} bytes")
        with self._changed, self._connection as connection:
            others = self._one(
                "SELECT COUNT(*) FROM documents WHERE NOT (application_id = ? AND name = ?)", (application_id, name)
            )
            if others >= _MAX_DOCUMENTS:
                raise Refusal(413, "too_many", f"the sandbox keeps at most {_MAX_DOCUMENTS} configurations and rules")
            connection.execute(
                "INSERT INTO documents (application_id, name, revision, body) VALUES (?, ?, 1, ?) "
                "ON CONFLICT (application_id, name) DO UPDATE SET revision = revision + 1, body = excluded.body",
                (application_id, name, body),
            )
            self._tell()

    def application_ids(self) -> list[str]:
        """Return the application ids that events or documents came with, up to fifty."""
        with self._changed:
            rows = self._connection.execute(
                # One look into the index for each id, however many events it has.
                "WITH RECURSIVE ids (id) AS (SELECT MIN(application_id) FROM events UNION ALL "
                "SELECT (SELECT MIN(application_id) FROM events WHERE application_id > id) FROM ids "
                "WHERE id IS NOT NULL LIMIT 50) "
                "SELECT id FROM ids WHERE id IS NOT NULL UNION SELECT application_id FROM documents "
                "WHERE application_id <> '' ORDER BY 1"
            ).fetchall()
        return [row[0] for row in rows]

    def clear(self) -> None:
        """Forget events, profiles and actions; the configuration and the rules stay."""
        with self._changed, self._connection as connection:
            for table in ("events", "payloads", "profiles"):
                connection.execute(f"DELETE FROM {table}")  # noqa: S608 - constant
            self._event_bytes = self._event_count = self._profile_bytes = self._profile_count = 0
            self._tell()


def _columns(
    application_id: str, event: dict[str, Any], row: Row, *, received_s: float, source: str, size_bytes: int
) -> tuple[Any, ...]:
    status_class = row.status // 100 if row.status is not None and 100 <= row.status <= 999 else 0
    return (
        application_id, event.get("transaction_id"), received_s, source, size_bytes, row.time_ms, row.direction,
        row.verb, row.host, row.path, row.route, row.status, status_class, row.took_ms, row.user or None,
        row.company or None, row.trace_id or None, row.span_id or None, row.parent_id or None, row.weight,
        row.request_bytes, row.response_bytes, row.sizes_known, row.blocked, row.truncated, row.hidden, row.failed,
        row.outcome,
    )  # fmt: skip


def _stored_row(columns: tuple[Any, ...]) -> StoredRow:
    sequence, application_id, source, received_s, *rest = columns
    (
        time_ms, direction, verb, host, path, route, status, took_ms, user, company, trace_id, span_id, parent_id,
        weight, request_bytes, response_bytes, sizes_known, blocked, truncated, hidden, failed, outcome,
    ) = rest  # fmt: skip
    row = Row(
        time_ms, direction, verb, host, path, route, status, took_ms, user or "", company or "", trace_id or "",
        span_id or "", parent_id or "", weight, request_bytes, response_bytes, bool(sizes_known), bool(blocked),
        bool(truncated), bool(hidden), bool(failed), outcome,
    )  # fmt: skip
    return StoredRow(sequence, application_id, source, received_s, row)


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for name, value in new.items():
        before = merged.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            merged[name] = _merge(before, value)
        elif value is not None:
            merged[name] = value
    return merged
