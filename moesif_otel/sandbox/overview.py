"""The figures above the list: calls by status over the last minutes, latency, errors, and who and what came most.

All of it is asked in SQL, of the newest calls in the window only, so that what was stored before costs an open page
nothing. Geometry is in units of a drawing whose width and height the page stretches.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from moesif_otel.sandbox.query import Filters
    from moesif_otel.sandbox.store import Store

__all__ = ["HEIGHT", "WIDTH", "WINDOWS", "Bar", "Overview", "Top", "overview_of", "question"]

WINDOWS: Final = {"1m": 60, "5m": 300, "1h": 3_600, "24h": 86_400}
"""The windows that may be chosen, and their seconds."""

WIDTH: Final = 600
HEIGHT: Final = 100
_BUCKETS: Final = 60
_BAR: Final = WIDTH / _BUCKETS
_MOST_ROWS: Final = 10_000
_TOP_ROWS: Final = 5
_CLASSES: Final = (2, 3, 4, 5, 0)  # from the bottom up; 0 has no answer
_NAMES: Final = {1: "1xx", 2: "2xx", 3: "3xx", 4: "4xx", 5: "5xx", 0: "none"}


@dataclass(frozen=True, slots=True)
class Bar:
    """One piece of the bar chart."""

    x: float
    y: float
    height: float
    kind: str


@dataclass(frozen=True, slots=True)
class Top:
    """One line of a top list; `share` is its width of 100."""

    name: str
    calls: int
    failed: int
    share: float


@dataclass(frozen=True, slots=True)
class Overview:
    """The figures that the page draws.

    Attributes:
        classes: Status class to the number of calls, those that came only.
        per_second: Calls a second over the last whole bucket or two.
        percentiles: p50, p95, p99 of the whole window in milliseconds; empty without an answer.
        lines: For each percentile the pieces of its line, as `points` of a path.
        errors_line: The error rate as the outline of an area.
        buckets: For tooltips: place, time and numbers of each bucket with a call.
        is_cut: Whether more calls lie in the window than were looked at.
    """

    window: str
    calls: int
    failed: int
    per_second: float
    most_in_bucket: int
    bucket_s: float
    classes: dict[str, int]
    bars: list[Bar]
    percentiles: list[float]
    highest_ms: float
    lines: list[list[str]]
    errors_line: str
    buckets: list[tuple[float, str]]
    tops: dict[str, list[Top]]
    is_cut: bool

    @property
    def error_percent(self) -> float:
        """Failed calls of all, in percent."""
        return 100 * self.failed / self.calls if self.calls else 0.0


def question(filters: Filters, select: str) -> tuple[str, dict[str, Any]]:
    """Return a statement over the newest calls of the window that fit."""
    condition, given = filters.where()
    # By time: where most calls fit a filter, its own index would have SQLite read and sort all that are stored.
    recent = (
        "WITH recent AS (SELECT CAST((time_ms - :start_ms) / :step_ms AS INTEGER) AS bucket, status_class, failed, "  # noqa: S608 - constants
        "took_ms, route, user_id, company_id FROM events INDEXED BY events_by_time "
        f"WHERE {condition} AND time_ms >= :start_ms AND time_ms < :end_ms ORDER BY time_ms DESC LIMIT {_MOST_ROWS}) "
    )
    return recent + select, given


_BY_CLASS: Final = (
    "SELECT bucket, status_class, COUNT(*), SUM(failed) FROM recent GROUP BY bucket, status_class ORDER BY bucket"
)
_PERCENTILE: Final = "MIN(CASE WHEN place * 100 >= {0} * number THEN took_ms END)"
_PERCENTILES: Final = ", ".join(_PERCENTILE.format(percent) for percent in (50, 95, 99))
_RANKED: Final = (
    ", ranked AS (SELECT {0} AS part, took_ms, ROW_NUMBER() OVER (PARTITION BY {0} ORDER BY took_ms) AS place, "  # noqa: S608 - constants
    "COUNT(*) OVER (PARTITION BY {0}) AS number FROM recent WHERE took_ms IS NOT NULL) "
    f"SELECT part, {_PERCENTILES} FROM ranked GROUP BY part ORDER BY part"
)
_TOP: Final = (
    "SELECT {0}, COUNT(*), SUM(failed) FROM recent WHERE {0} IS NOT NULL AND {0} <> '' "  # noqa: S608 - constants
    f"GROUP BY {{0}} ORDER BY 2 DESC, 1 LIMIT {_TOP_ROWS}"
)
_TOPS: Final = {"route": "route", "user": "user_id", "company": "company_id"}


def overview_of(store: Store, filters: Filters, window: str, *, now_s: float | None = None) -> Overview:
    """Ask for the figures of the last `window`, of calls that fit."""
    now_ms = (time.time() if now_s is None else now_s) * 1000
    step_ms = WINDOWS[window] * 1000 / _BUCKETS
    end_ms = math.ceil(now_ms / step_ms) * step_ms
    times = {"start_ms": end_ms - WINDOWS[window] * 1000, "end_ms": end_ms, "step_ms": step_ms}

    def ask(select: str) -> list[tuple[Any, ...]]:
        statement, given = question(filters, select)
        return store.ask(statement, {**given, **times})

    counted = ask(_BY_CLASS)
    by_bucket: dict[int, dict[int, int]] = {}
    failed: dict[int, int] = {}
    for bucket, kind, number, bad in counted:
        by_bucket.setdefault(bucket, {})[kind] = number
        failed[bucket] = failed.get(bucket, 0) + bad
    calls = sum(number for _, _, number, _ in counted)
    most = max((sum(kinds.values()) for kinds in by_bucket.values()), default=0)
    whole = ask(_RANKED.format("0"))
    percentiles = [float(value) for value in whole[0][1:]] if whole else []
    parts = ask(_RANKED.format("bucket")) if whole else []
    highest_ms = max((row[3] for row in parts), default=0.0)
    recent_calls = sum(sum(by_bucket.get(place, {}).values()) for place in (_BUCKETS - 2, _BUCKETS - 1))
    recent_s = (step_ms + now_ms - (end_ms - step_ms)) / 1000
    return Overview(
        window=window,
        calls=calls,
        failed=sum(failed.values()),
        per_second=recent_calls / max(recent_s, 1.0),
        most_in_bucket=most,
        bucket_s=step_ms / 1000,
        classes=_class_totals(counted),
        bars=_bars(by_bucket, most),
        percentiles=percentiles,
        highest_ms=highest_ms,
        lines=[_pieces((row[0], _latency_y(row[place], highest_ms)) for row in parts) for place in (1, 2, 3)],
        errors_line=_area({place: bad / sum(by_bucket[place].values()) for place, bad in failed.items()}),
        buckets=[
            (place * _BAR, _tooltip(times["start_ms"] + place * step_ms, kinds)) for place, kinds in by_bucket.items()
        ],
        tops={name: _top(ask(_TOP.format(column))) for name, column in _TOPS.items()},
        is_cut=calls >= _MOST_ROWS,
    )


def _class_totals(counted: Sequence[tuple[Any, ...]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for kind in (*_CLASSES[:-1], 1, 0):
        number = sum(row[2] for row in counted if row[1] == kind)
        if number:
            totals[_NAMES[kind]] = number
    return totals


def _bars(by_bucket: dict[int, dict[int, int]], most: int) -> list[Bar]:
    bars = []
    for place, kinds in by_bucket.items():
        top = float(HEIGHT)
        for kind in (*_CLASSES, *sorted(set(kinds) - set(_CLASSES))):
            if number := kinds.get(kind, 0):
                height = number / most * HEIGHT
                top -= height
                name = _NAMES.get(kind, "none")
                bars.append(Bar(round(place * _BAR, 2), round(top, 2), round(height, 2), name))
    return bars


def _latency_y(took_ms: float, highest_ms: float) -> float:
    """Return the height in the drawing, by the logarithm: a slow call must not flatten all others."""
    return HEIGHT - 4 - (HEIGHT - 8) * math.log1p(max(took_ms, 0.0)) / (math.log1p(highest_ms) or 1.0)


def _pieces(points: Iterable[tuple[int, float]]) -> list[str]:
    """Return the pieces of a line that breaks where a bucket had no call."""
    pieces: list[list[str]] = []
    last = -2
    for place, y in points:
        text = f"{(place + 0.5) * _BAR:.1f},{y:.1f}"
        if place == last + 1:
            pieces[-1].append(text)
        else:
            pieces.append([text])
        last = place
    # A line from a point to itself is drawn as a dot.
    return ["M" + " L".join(piece if len(piece) > 1 else piece * 2) for piece in pieces]


def _area(rates: dict[int, float]) -> str:
    parts = []
    for place, rate in sorted(rates.items()):
        if rate:
            height = round(max(rate * HEIGHT, 2), 1)
            parts.append(f"M{place * _BAR:.1f},{HEIGHT}v-{height}h{_BAR * 0.8:.1f}v{height}z")
    return "".join(parts)


def _tooltip(start_ms: float, kinds: dict[int, int]) -> str:
    began = time.strftime("%H:%M:%S", time.localtime(start_ms / 1000))
    return f"{began}: " + ", ".join(f"{number} × {_NAMES.get(kind, 'none')}" for kind, number in sorted(kinds.items()))


def _top(rows: Sequence[tuple[Any, ...]]) -> list[Top]:
    most = max((row[1] for row in rows), default=1)
    return [Top(name, calls, bad, round(calls / most * 100, 1)) for name, calls, bad in rows]
