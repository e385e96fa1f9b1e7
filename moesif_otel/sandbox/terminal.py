"""Calls on a terminal: one in a line, or one whole.

What arrives in a sandbox comes from anywhere: nothing is written that could steer a terminal.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any, Final, TextIO

from moesif_otel.sandbox.bodies import body_of
from moesif_otel.sandbox.detail import hidden_in
from moesif_otel.sandbox.rows import HIDDEN_MARK, Row, our_facts, size_in_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["Paint", "Table", "event_lines", "wants_colour"]

_HEADS: Final = ("time", "status", "", "verb", "path", "took", "user", "company", "request", "response", "")
_WIDTHS: Final = (8, 6, 3, 7, 0, 8, 10, 9, 9, 9, 0)  # 0: what is left, or as long as it is
_RIGHT: Final = frozenset({1, 5, 8, 9})
_MIN_PATH: Final = 20
_MAX_WIDTH: Final = 160
_MARKS_WIDTH: Final = 14
_CODES: Final = {"bold": "1", "faint": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "magenta": "35"}
_VERBS: Final = {"GET": "blue", "POST": "green", "PUT": "yellow", "PATCH": "yellow", "DELETE": "red"}
_MAX_BODY_LINES: Final = 24


def wants_colour(stream: TextIO, choice: str = "auto") -> bool:
    """Tell whether to write colours: `always`, `never`, or `auto` for a terminal whose user did not object."""
    if choice != "auto":
        return choice == "always"
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Paint:
    """Colours for a terminal, and text that cannot harm it.

    Args:
        colour: Whether to use colours.
        encoding: The stream's; what it has no sign for becomes a question mark.
    """

    def __init__(self, *, colour: bool, encoding: str | None = None) -> None:
        self._colour = colour
        self._encoding = encoding or "ascii"

    def safe(self, text: str) -> str:
        """Return text without anything that is not printed."""
        shown = "".join(character if character.isprintable() else "?" for character in text)
        return shown.encode(self._encoding, "replace").decode(self._encoding)

    def __call__(self, text: str, *styles: str) -> str:
        """Return text, already safe, in colours."""
        codes = ";".join(_CODES[style] for style in styles if style)
        return f"\x1b[{codes}m{text}\x1b[0m" if self._colour and codes and text else text


class Table:
    """One line a call, in columns as wide as the terminal has room for.

    Args:
        stream: Where the lines go; its encoding, and whether it is a terminal, count.
        colour: `auto`, `always` or `never`.
    """

    def __init__(self, stream: TextIO | None = None, colour: str = "auto") -> None:
        stream = sys.stdout if stream is None else stream
        self.paint = Paint(colour=wants_colour(stream, colour), encoding=stream.encoding)
        width = min(shutil.get_terminal_size((120, 24)).columns, _MAX_WIDTH)
        taken = sum(_WIDTHS) + len(_WIDTHS) - 1 + _MARKS_WIDTH
        self._path_width = max(_MIN_PATH, width - taken)

    def head(self) -> str:
        """Return the columns' names."""
        return self.paint(self._joined(_HEADS, ()), "faint")

    def line(self, row: Row) -> str:
        """Return one call."""
        status = "none" if row.status is None else str(row.status)
        marks = [
            name for name, is_so in (("blocked", row.blocked), ("cut", row.truncated), ("hidden", row.hidden)) if is_so
        ]
        cells = (
            time.strftime("%H:%M:%S", time.localtime(row.time_ms / 1000)),
            status,
            {"Outgoing": "out", "Incoming": "in"}.get(row.direction, "-"),
            row.verb,
            row.path.partition("://")[2] if row.direction == "Outgoing" else row.path,
            "-" if row.took_ms is None else f"{row.took_ms:.0f} ms",
            row.user or "-",
            row.company or "-",
            _size(row.request_bytes, row),
            _size(row.response_bytes, row),
            " ".join(
                [*marks, *([row.outcome] if row.outcome else []), *([f"x{row.weight}"] if row.weight != 1 else [])]
            ),
        )
        return self._joined(cells, _styles(row))

    def _joined(self, cells: Sequence[str], styles: Sequence[Sequence[str]]) -> str:
        parts = []
        for place, (cell, width) in enumerate(zip(cells, _WIDTHS, strict=True)):
            room = self._path_width if place == 4 else width
            text = self.paint.safe(cell)
            if room and len(text) > room:
                text = text[: room - 2] + ".."
            text = text.rjust(room) if place in _RIGHT else text.ljust(room)
            parts.append(self.paint(text, *(styles[place] if styles else ())))
        return " ".join(parts).rstrip()


def _size(size_bytes: int | None, row: Row) -> str:
    return size_in_words(size_bytes or None, known=row.sizes_known).replace("≈", "~")


def _styles(row: Row) -> tuple[tuple[str, ...], ...]:
    kind = _kind(row.status)
    verb = _VERBS.get(row.verb, "")
    return (
        ("faint",),
        (kind, "bold"),
        ("faint",),
        (verb,),
        (),
        ("faint",),
        (),
        (),
        ("faint",),
        ("faint",),
        ("magenta",),
    )


def _kind(status: int | None) -> str:
    if status is None or status >= 500:
        return "red"
    return "yellow" if status >= 400 else "green" if status < 300 else "blue"


def event_lines(event: Mapping[str, Any], paint: Paint) -> Iterator[str]:
    """Return one event whole, readable: request, response, who it was, and what was hidden."""
    row = Row.of_event(event)
    status = "no answer" if row.status is None else str(row.status)
    yield paint(paint.safe(f"{row.verb} {event['request']['uri']}"), "bold") + " -> " + paint(status, _kind(row.status))
    yield from _pairs(
        {
            "user": row.user,
            "company": row.company,
            "took": "" if row.took_ms is None else f"{row.took_ms:.0f} ms",
            "direction": row.direction,
            "transaction": str(event.get("transaction_id") or ""),
        },
        paint,
    )
    for side, size_bytes in (("request", row.request_bytes), ("response", row.response_bytes)):
        message = event.get(side)
        if message:
            yield f"{side}"
            yield from _pairs(message.get("headers") or {}, paint, indent="    ")
            yield from _body_lines(event, side, size_bytes, paint)
    hidden = hidden_in(event)
    if hidden:
        yield "hidden, before it left the service"
        for place in hidden:
            yield f"    {paint(paint.safe(place.place), 'magenta')} ({paint.safe(place.rule)})"


def _pairs(values: Mapping[str, str], paint: Paint, indent: str = "  ") -> Iterator[str]:
    for name, value in values.items():
        if value:
            text = paint.safe(value)
            shown = paint(text, "magenta") if HIDDEN_MARK in text else text
            yield f"{indent}{paint(paint.safe(name), 'faint')}: {shown}"


def _body_lines(event: Mapping[str, Any], side: str, size_bytes: int | None, paint: Paint) -> Iterator[str]:
    facts = our_facts(event).get(f"{side}_body")
    view = body_of(event[side], facts if isinstance(facts, dict) else {}, size_bytes, known=True)
    if view.note:
        yield f"    ({paint.safe(view.note)})"
    lines = (view.raw or view.text).splitlines() if view.kind != "none" else []
    for line in lines[:_MAX_BODY_LINES]:
        text = paint.safe(line[:200])
        yield f"    {paint(text, 'magenta') if HIDDEN_MARK in text else text}"
    if len(lines) > _MAX_BODY_LINES:
        yield f"    … {len(lines) - _MAX_BODY_LINES} more lines".replace("…", paint.safe("…"))
