"""Writes the tables that come from the code into the pages: `python docs/_tables.py`, after an option or list changed.

A table stands between two marks, such as `<!-- options -->` and `<!-- /options -->`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesif_otel._redaction import budget
from moesif_otel._redaction.media import LEFT_OUT_TYPES
from moesif_otel._redaction.names import QUERY_NAMES, SENSITIVE_COOKIES, SENSITIVE_NAMES
from moesif_otel.settings import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def _default(name: str, value: Any) -> str:
    if name == "APPLICATION_ID":
        return "required"
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, tuple):
        return f"`{', '.join(value)}`"
    if name.endswith("_BYTES") and value % (1024 * 1024) == 0:
        return f"{value // (1024 * 1024)} MiB"
    if isinstance(value, float):
        return f"{value:g} s"
    return _number(value) if isinstance(value, int) else f"`{value}`"


def _number(value: int) -> str:
    return f"{value:,}".replace(",", " ")


def options_table() -> str:
    """Return every option with its default, what it takes and what it means."""
    rows = []
    for name, option in OPTIONS.items():
        takes = option.takes[0].upper() + option.takes[1:]
        rows.append(f"| `{name}` | {_default(name, option.default)} | {option.meaning} | {takes} |")
    return "\n".join(["| option | default | meaning | takes |", "|---|---|---|---|", *rows])


def budget_table() -> str:
    """Return the bounds of one event."""
    rows = (
        ("bytes after decompression, for each body", budget.MAX_DECODED_BYTES),
        ("bytes inspected, for each body", budget.MAX_INSPECTED_BYTES),
        ("values, pairs or tags inspected, for each body", budget.MAX_NODES),
        ("bytes of headers, for the request and the response each", budget.MAX_HEADER_BYTES),
        ("levels of nested JSON, in a body that is sent as JSON", budget.MAX_DEPTH),
    )
    lines = [f"| {what} | {_number(bound)} |" for what, bound in rows]
    return "\n".join(["| | at most |", "|---|---|", *lines])


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) + "."


TABLES: dict[str, Callable[[], str]] = {
    "options": options_table,
    "budget": budget_table,
    "secret-names": lambda: _listed(SENSITIVE_NAMES),
    "secret-cookies": lambda: _listed(SENSITIVE_COOKIES),
    "secret-query": lambda: _listed(QUERY_NAMES),
    "left-out-types": lambda: _listed(LEFT_OUT_TYPES),
}


def with_tables(page: str) -> str:
    """Return a page with its tables as the code has them now."""
    for name, table in TABLES.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        if mark:
            _, end, after = rest.partition(f"<!-- /{name} -->")
            page = f"{before}{mark}{table()}\n{end}{after}"
    return page


if __name__ == "__main__":
    for path in Path(__file__).parent.glob("*.md"):
        path.write_text(with_tables(path.read_text()))
