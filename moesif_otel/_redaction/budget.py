"""Limits the cost of one call: the bounds of everything that is decoded, parsed and inspected for its event.

What a client sends lies within these bounds or is left out with its reason in the event's metadata; nothing is
inspected by half and sent. One event has two sides, and each side's headers and body are inspected within an
`Inspection` of their own. An `Inspection` ends a body after `MAX_INSPECTED_BYTES` (a text inside a text counts again
at every level) and `MAX_NODES` steps of Python code: strings of JSON, pairs of a form, tags, parts, `name: value`
pairs. A step costs one to five microseconds and a byte some nanoseconds: the worst bodies known, of 450 KB once they
are decoded, cost 0.3 s of CPU, 32 KB of the worst headers 0.15 s, both measured on an ordinary machine of 2026.
`tests/redaction/test_budget.py` counts the calls, so that this stays so; what one search of a regular expression costs
no test counts, so each must be linear by its form. Ordinary JSON of 43 KB with nothing to hide costs 0.2 ms, with a
password in it 2.5 ms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._redaction.rules import Rules

MAX_DECODED_BYTES: Final = 450_000
"""Most bytes that undoing a Content-Encoding may make: the server truncates a body there."""

MAX_INSPECTED_BYTES: Final = 1_500_000
"""Most bytes that are inspected for one body, one list of headers, or one URL."""

MAX_NODES: Final = 50_000
"""Most steps in one inspection."""

MAX_HEADER_BYTES: Final = 32_768
"""Most bytes of names and values of one side's headers; the headers beyond are left out."""

MAX_DEPTH: Final = 200
"""Deepest JSON that is embedded as JSON (parsers give up at 254 levels and more); a deeper body goes as text."""

MAX_NESTING: Final = 6
"""A JSON text inside a URL inside a JSON text …: what lies deeper is hidden as a whole."""


class OverBudget(Exception):  # noqa: N818 - not an error: the answer that something is left out
    """Raised when an inspection has used up its bytes or its steps."""


class Inspection:
    """One inspection of a body, a list of headers or a URL, within the bounds. Belongs to one thread.

    Args:
        rules: What to hide.
        inspect_text: `text.inspect_text`; passed in, since `text` imports the modules that need it.
    """

    __slots__ = ("_inspect_text", "bytes_left", "nesting", "nodes_left", "rules")

    def __init__(self, rules: Rules, inspect_text: Callable[[Inspection, str, bool], str]) -> None:
        self.rules = rules
        self._inspect_text = inspect_text
        self.bytes_left = MAX_INSPECTED_BYTES
        self.nodes_left = MAX_NODES
        self.nesting = 0

    def inspect(self, text: str, *, card: bool = False) -> str:
        """Return a text found inside another with everything hidden; `card` where card numbers are expected."""
        return self._inspect_text(self, text, card)

    def spend(self, size_bytes: int, nodes: int = 1) -> None:
        """Count work that is about to be done; raises `OverBudget` instead of doing it."""
        self.bytes_left -= size_bytes
        self.nodes_left -= nodes
        if self.bytes_left < 0 or self.nodes_left < 0:
            raise OverBudget
