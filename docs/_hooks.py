"""Fills in what the code knows better than a page: the options, the reasons for drops, the lists of secret names.

A page asks with a line such as `<!-- options -->`.
"""

from __future__ import annotations

from typing import Any

from moesif_otel.settings import OPTIONS


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
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else f"`{value}`"


def options_table() -> str:
    """Return every option with its default, what it takes and what it means."""
    rows = []
    for name, option in OPTIONS.items():
        takes = option.takes[0].upper() + option.takes[1:]
        rows.append(f"| `{name}` | {_default(name, option.default)} | {option.meaning} | {takes} |")
    return "\n".join(["| option | default | meaning | takes |", "|---|---|---|---|", *rows])


TABLES = {"options": options_table}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each request by its table (MkDocs calls this for every page)."""
    for name, table in TABLES.items():
        request = f"<!-- {name} -->"
        if request in markdown:
            markdown = markdown.replace(request, table())
    return markdown
