"""`moesif-otel tail`: follows a sandbox that runs, in the terminal, with the filters of its page."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

import requests

from moesif_otel.sandbox.rows import Row

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping

    from moesif_otel.sandbox.terminal import Table

__all__ = ["TailError", "run_tail"]

_LOOK_S: Final = 0.4
_MOST_ROWS: Final = 500
_TIMEOUT_S: Final = 5.0
_NAMES: Final = tuple(f.name for f in fields(Row))


class TailError(Exception):
    """Nothing can be followed; the message says why and what to do."""


def run_tail(
    url: str,
    filters: Mapping[str, str],
    *,
    number: int,
    table: Table,
    as_json: bool,
    ended: threading.Event,
    say: Callable[[str], None],
    complain: Callable[[str], None],
) -> int:
    """Print the last calls that fit, and those that come, until `ended`.

    Args:
        url: The sandbox's address.
        filters: As the page's address bar has them.
        number: How many of the calls that are there already.
        table: How a call is written.
        as_json: Write the row as JSON instead.
        ended: Set to end it.
        say: Prints a line.
        complain: Prints a line about trouble.

    Returns:
        0.

    Raises:
        TailError: No sandbox is there, or it does not take the filters.
    """
    with requests.Session() as session:
        session.trust_env = False  # a proxy of the environment does not lead to this machine
        address = url if "://" in url else f"http://{url}"
        follower = _Follower(session, address.rstrip("/"), dict(filters))
        calls = follower.first(number)
        if not as_json:
            say(table.head())
        is_lost = False
        while True:
            for call in calls:
                say(json.dumps(call, ensure_ascii=False) if as_json else table.line(_row(call)))
            if ended.wait(_LOOK_S):
                return 0
            try:
                calls = follower.next()
                is_lost = False
            except requests.RequestException:
                if not is_lost:
                    complain(f"{follower.url} does not answer any more; waiting for it")
                is_lost, calls = True, []


class _Follower:
    """Asks a sandbox for what is new."""

    def __init__(self, session: requests.Session, url: str, filters: dict[str, str]) -> None:
        self._session = session
        self.url = url
        self._filters = filters
        self._last = 0

    def first(self, number: int) -> list[dict[str, Any]]:
        """Return the newest calls that fit, the oldest of them first."""
        try:
            return self._ask({"limit": str(max(number, 1))})[-number:] if number else self._ask({"limit": "1"})[:0]
        except requests.RequestException:
            raise TailError(
                f"no sandbox answers at {self.url}: start one with `moesif-otel sandbox`, or name another with --url"
            ) from None

    def next(self) -> list[dict[str, Any]]:
        """Return what has come since."""
        before = self._last
        calls = self._ask({"after": str(before), "limit": str(_MOST_ROWS)})
        # A sandbox that was started anew, or emptied, counts from one again.
        return self._ask({"limit": str(_MOST_ROWS)}) if self._last < before else calls

    def _ask(self, parameters: dict[str, str]) -> list[dict[str, Any]]:
        answer = self._session.get(f"{self.url}/api/calls", params={**self._filters, **parameters}, timeout=_TIMEOUT_S)
        try:
            found = answer.json()
            if answer.status_code != requests.codes.ok:
                raise TailError(str(found["error"]["message"]))
            calls: list[dict[str, Any]] = found["calls"][::-1]
            self._last = int(found["last"])
            for call in calls:
                _row(call)
        except (ValueError, KeyError, TypeError):
            raise TailError(f"{self.url} is not a sandbox of moesif-otel") from None
        return calls


def _row(call: Mapping[str, Any]) -> Row:
    row = Row(**{name: call[name] for name in _NAMES})
    if not (isinstance(row.verb, str) and isinstance(row.path, str) and isinstance(row.time_ms, int)):
        raise TypeError
    return row
