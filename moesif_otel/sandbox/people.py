"""Users, companies, subscriptions and actions: what their profiles say, and how many calls they made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from moesif_otel.sandbox.jsontext import read_json

if TYPE_CHECKING:
    from moesif_otel.sandbox.store import Store

__all__ = ["PAGE_ROWS", "Item", "Person", "actions_of", "people_of", "subscriptions_of"]

PAGE_ROWS: Final = 50
_MAX_PAGE: Final = 10_000


@dataclass(frozen=True, slots=True)
class Person:
    """A user or a company: known by its calls, by its profile, or by both.

    Attributes:
        last_ms: When its last call arrived, Unix milliseconds; None without calls.
        profile: Its JSON; None when none was sent.
    """

    id: str
    calls: int
    failed: int
    last_ms: float | None
    profile: bytes | None
    summary: str


@dataclass(frozen=True, slots=True)
class Item:
    """A subscription or an action."""

    id: str
    text: bytes
    updated_ms: float
    value: dict[str, Any]


# One row an id that calls or profiles name; each count looks at one index.
_PEOPLE: Final = """
WITH called AS (
  SELECT {column} AS id, COUNT(*) AS calls, SUM(failed) AS failed, MAX(sequence) AS last
  FROM events WHERE {column} IS NOT NULL AND (:q = '' OR instr(lower({column}), :q)) GROUP BY {column}
), known AS (
  SELECT id, MAX(sequence) AS at FROM profiles
  WHERE kind = :kind AND (:q = '' OR instr(lower(id), :q) OR instr(lower(CAST(profile AS TEXT)), :q)) GROUP BY id
), everyone AS (SELECT id FROM called UNION SELECT id FROM known)
SELECT everyone.id, COALESCE(calls, 0), COALESCE(failed, 0),
  (SELECT received_s FROM events WHERE sequence = last), (SELECT profile FROM profiles WHERE sequence = at)
FROM everyone LEFT JOIN called ON called.id = everyone.id LEFT JOIN known ON known.id = everyone.id
ORDER BY calls DESC, everyone.id LIMIT :limit OFFSET :offset
"""
_ITEMS: Final = """
SELECT id, profile, updated_s FROM profiles
WHERE kind = :kind AND (:q = '' OR instr(lower(CAST(profile AS TEXT)), :q))
ORDER BY sequence DESC LIMIT :limit OFFSET :offset
"""
_COLUMNS: Final = {"users": "user_id", "companies": "company_id"}


def people_of(store: Store, kind: str, q: str, page: int) -> list[Person]:
    """Return one page of users or companies, those with the most calls first; one row too many tells of more."""
    rows = store.ask(_PEOPLE.format(column=_COLUMNS[kind]), _parameters(kind, q, page))
    return [
        Person(
            id=identity,
            calls=calls,
            failed=failed,
            last_ms=None if last_s is None else last_s * 1000,
            profile=profile,
            summary=_summary(profile),
        )
        for identity, calls, failed, last_s, profile in rows
    ]


def subscriptions_of(store: Store, q: str, page: int) -> list[Item]:
    """Return one page of subscriptions, the newest first."""
    return _items(store, "subscriptions", q, page)


def actions_of(store: Store, q: str, page: int) -> list[Item]:
    """Return one page of actions, the newest first."""
    return _items(store, "actions", q, page)


def _items(store: Store, kind: str, q: str, page: int) -> list[Item]:
    rows = store.ask(_ITEMS, _parameters(kind, q, page))
    return [Item(identity or "", text, updated_s * 1000, read_json(text)) for identity, text, updated_s in rows]


def _parameters(kind: str, q: str, page: int) -> dict[str, Any]:
    place = min(max(page, 1), _MAX_PAGE) - 1
    return {"kind": kind, "q": q.lower(), "limit": PAGE_ROWS + 1, "offset": place * PAGE_ROWS}


def _summary(profile: bytes | None) -> str:
    """Return what tells a profile from others at one look."""
    if profile is None:
        return ""
    value = read_json(profile)
    metadata = value.get("metadata")
    parts = [value.get("company_domain")]
    if isinstance(metadata, dict):
        parts += [metadata.get(name) for name in ("name", "email", "company_name", "plan", "title")]
    return " · ".join(part[:80] for part in parts if isinstance(part, str) and part)
