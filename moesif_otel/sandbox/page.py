"""The sandbox's page: what arrived, newest first, as plain HTML.

Owns: the HTML at `/`.
Threads: any; pure functions.
Never: runs a script, loads anything, or writes a value that is not escaped: what is shown came from anywhere.
"""

from __future__ import annotations

from datetime import datetime, timezone
from html import escape
from typing import TYPE_CHECKING, Final
from urllib.parse import urlencode

import orjson

from moesif_otel.sandbox.rows import Row, size_in_words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moesif_otel.sandbox.store import StoredEvent

__all__ = ["PAGE_HEADERS", "render_page"]

PAGE_HEADERS: Final[Mapping[str, str]] = {
    # Belt and braces: with everything escaped, a browser is told to run and load nothing all the same.
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
}

_STYLE: Final = """
body{font:14px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:80rem;padding:0 1rem;color:#1c2430;background:#fff}
h1{font-size:1.3rem;margin:0 0 .2rem}p{margin:.2rem 0 1rem;color:#566}form{margin:0 0 1rem}
table{border-collapse:collapse;width:100%}th{text-align:left;color:#566;font-weight:600}
th,td{padding:.3rem .6rem;border-bottom:1px solid #e3e7ec;white-space:nowrap}
td.path,td.who{white-space:normal;overflow-wrap:anywhere;min-width:5rem}td.path{font-family:ui-monospace,monospace}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.s2,.s3{color:#12733a}.s4{color:#9a5b00}.s5,.s0{color:#b3261e}code{background:#f2f4f7;padding:.1rem .3rem}
@media (prefers-color-scheme:dark){body{background:#12161c;color:#dde3ea}th,td{border-color:#2a323d}
p,th{color:#93a0b0}code{background:#1e2630}.s2,.s3{color:#5fd08a}.s4{color:#e9b04d}.s5,.s0{color:#ff8a80}a{color:#8ab4ff}}
"""

_COLUMNS: Final = (
    ("time (UTC)", ""),
    ("verb", ""),
    ("path", ""),
    ("status", "n"),
    ("ms", "n"),
    ("user", ""),
    ("company", ""),
    ("request", "n"),
    ("response", "n"),
    ("", ""),
)


def render_page(
    events: Sequence[StoredEvent],
    stats: Mapping[str, int],
    *,
    url: str,
    application_id: str | None,
    refresh_s: int,
) -> bytes:
    """Make the page.

    Args:
        events: What to list, newest last.
        stats: The counters.
        url: The sandbox's own address, for the line that says how to send here.
        application_id: The filter in force.
        refresh_s: Seconds until the browser loads the page again; 0 never.
    """
    rows = "\n".join(_row(stored) for stored in reversed(events))
    if not rows:
        rows = f'<tr><td colspan="{len(_COLUMNS)}">Nothing has arrived yet.</td></tr>'
    heads = "".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in _COLUMNS)
    refresh = f'<meta http-equiv="refresh" content="{refresh_s}">' if refresh_s else ""
    filters = {"application_id": application_id} if application_id else {}
    pause = urlencode({**filters, "refresh": 0 if refresh_s else 2})
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{refresh}<title>Moesif sandbox</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>Moesif sandbox</h1>
<p>Send here with <code>MOESIF_BASE_URI={escape(url)}</code> ·
{stats["stored"]} stored, {stats["duplicates"]} duplicates, {stats["rejected"]} refused, {stats["profiles"]} profiles ·
<a href="/?{escape(pause)}">{"pause" if refresh_s else "refresh by itself"}</a> ·
<a href="/api/events">all as JSON</a> · <a href="/api/requests">requests</a></p>
<form><label>Application id <input name="application_id" value="{escape(application_id or "")}"></label>
<button>Show</button></form>
<table><thead><tr>{heads}</tr></thead><tbody>
{rows}
</tbody></table></body></html>
"""
    return page.encode("utf-8", "replace")


def _row(stored: StoredEvent) -> str:
    row = Row.of_event(orjson.loads(stored.event))
    arrived = datetime.fromtimestamp(stored.received_s, timezone.utc)
    status = "blocked " if row.blocked else ""
    status += "none" if row.status is None else str(row.status)
    cells = (
        f"<td>{arrived:%H:%M:%S}</td>",
        f"<td>{escape(row.verb)}</td>",
        f'<td class="path">{escape(row.path)}</td>',
        f'<td class="n s{(row.status or 0) // 100}">{status}</td>',
        f'<td class="n">{"-" if row.took_ms is None else f"{row.took_ms:.0f}"}</td>',
        f'<td class="who">{escape(row.user)}</td>',
        f'<td class="who">{escape(row.company)}</td>',
        f'<td class="n">{size_in_words(row.request_bytes)}</td>',
        f'<td class="n">{size_in_words(row.response_bytes)}</td>',
        f'<td><a href="/api/events/{stored.sequence}">JSON</a></td>',
    )
    return f"<tr>{''.join(cells)}</tr>"
