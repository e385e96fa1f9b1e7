"""Which calls are asked for: the filters of the address bar, of the API and of `tail`, as one WHERE clause.

Everything a caller gives is a bound parameter; the clause itself is put together from constants.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

from moesif_otel.sandbox.check import Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DIRECTIONS", "STATUS_CHOICES", "Filters"]

STATUS_CHOICES: Final = ("2xx", "3xx", "4xx", "5xx", "none")
DIRECTIONS: Final = ("incoming", "outgoing", "internal")

_MAX_CHARACTERS: Final = 1_000
_STATUS: Final = re.compile(r"[1-9]xx|[1-9]\d\d|none")


@dataclass(frozen=True, slots=True)
class Filters:
    """The conditions that calls must meet; an empty field sets none.

    Attributes:
        q: Text that the address, a name, an id or the start of a body holds, in any case.
        status: Statuses and classes of them, with commas: `404`, `5xx`, `none` (no answer).
        errors: `1` for failed calls only.
        marks: `blocked`, `hidden` or `truncated`.
    """

    q: str = ""
    verb: str = ""
    status: str = ""
    user: str = ""
    company: str = ""
    direction: str = ""
    application_id: str = ""
    route: str = ""
    trace: str = ""
    marks: str = ""
    errors: str = ""

    @classmethod
    def read(cls, given: Mapping[str, str]) -> Filters:
        """Read filters from query parameters; others are left alone.

        Raises:
            Refusal: Status 400; names the field and what it takes.
        """
        found = cls(**{f.name: given.get(f.name, "").strip()[:_MAX_CHARACTERS] for f in fields(cls)})
        if found.direction and found.direction not in DIRECTIONS:
            raise _wrong("direction", f"one of {', '.join(DIRECTIONS)}")
        if any(not _STATUS.fullmatch(word) for word in found.statuses):
            raise _wrong("status", "statuses such as 404, 5xx or none, separated by commas")
        if found.marks and found.marks not in _MARKS:
            raise _wrong("marks", f"one of {', '.join(_MARKS)}")
        return replace(found, errors="1" if found.errors not in {"", "0", "false"} else "")

    @property
    def statuses(self) -> tuple[str, ...]:
        """The statuses and classes asked for."""
        return tuple(word.strip().lower() for word in self.status.split(",") if word.strip())

    @property
    def is_empty(self) -> bool:
        """Tell whether no condition is set."""
        return self == Filters()

    def given(self) -> dict[str, str]:
        """Return the fields that ask something."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}

    def query(self, **changes: str | int | None) -> str:
        """Return the filters as a query string with its question mark, some of them changed; empty for none."""
        values: dict[str, Any] = {**self.given(), **changes}
        text = urlencode({name: value for name, value in values.items() if value not in {None, ""}})
        return f"?{text}" if text else ""

    def where(self) -> tuple[str, dict[str, Any]]:
        """Return a WHERE condition on the tables `events` and `payloads`, and its parameters."""
        clauses = ["1"]
        given: dict[str, Any] = {}
        for name, column in _COLUMNS.items():
            if value := getattr(self, name):
                clauses.append(f"{column} = :{name}")
                given[name] = value
        if self.verb:
            clauses.append("verb = :verb")
            given["verb"] = self.verb
        if self.direction:
            clauses.append("direction = :direction")
            given["direction"] = self.direction.capitalize()
        if self.statuses:
            clauses.append(_status_clause(self.statuses))
        if self.marks:
            clauses.append(_MARKS[self.marks])
        if self.errors:
            clauses.append("failed = 1")
        if self.q:
            clauses.append(
                "EXISTS (SELECT 1 FROM payloads WHERE payloads.sequence = events.sequence AND instr(search, :q))"
            )
            given["q"] = self.q.lower()
        return " AND ".join(clauses), given


_COLUMNS: Final = {
    "user": "user_id",
    "company": "company_id",
    "application_id": "application_id",
    "route": "route",
    "trace": "trace_id",
}
_MARKS: Final = {"blocked": "blocked = 1", "hidden": "hidden = 1", "truncated": "truncated = 1"}


def _status_clause(words: tuple[str, ...]) -> str:
    """Return a condition; the words have been checked: digits, `x` and `none` only."""
    if len(words) == 1:
        word = words[0]
        return "status_class = 0" if word == "none" else f"status_class = {word[0]}" + _exactly(word)
    # The plus keeps SQLite from collecting all rows of several classes and sorting them.
    terms = ("+status_class = 0" if w == "none" else f"(+status_class = {w[0]}{_exactly(w)})" for w in words)
    return f"({' OR '.join(terms)})"


def _exactly(word: str) -> str:
    return "" if word.endswith("xx") else f" AND status = {word}"


def _wrong(field: str, takes: str) -> Refusal:
    return Refusal(400, "wrong_value", f"{field} takes {takes}", field=field)
