"""`moesif-otel demo`: a sandbox, a small API behind a real server, and calls that are captured before your eyes.

Owns: the order of things, and what the terminal shows.
Threads: traffic and printing run in the caller's; waitress and the sandbox have their own, ended before it returns.
Never: writes a character to the terminal that could steer it: what arrives in a sandbox comes from anywhere.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson
import requests

from moesif_otel.sandbox.demo_traffic import CALLS, COMPANY_RULES, GOVERNED_CALL, RULE, USER_HEADERS, DemoCall
from moesif_otel.sandbox.rows import Row, size_in_words
from moesif_otel.sandbox.server import Sandbox
from moesif_otel.wsgi import MoesifMiddleware

try:
    from waitress.server import create_server

    from moesif_otel.sandbox.demo_api import company_of, make_api, metadata_of
except ModuleNotFoundError as error:
    _package = (error.name or "").partition(".")[0]
    if _package not in {"flask", "waitress", "werkzeug", "jinja2"}:
        raise
    raise ImportError(
        f"the demo needs the package {_package!r}; pip install 'moesif-otel[sandbox]'", name=error.name
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["run_demo"]

_APPLICATION_ID: Final = "demo-application-id"
_ARRIVAL_TIMEOUT_S: Final = 15.0
_PAUSE_S: Final = 0.4  # between calls, so that a person can follow
_RULE_TIMEOUT_S: Final = 10.0
_LOOK_S: Final = 0.05
_BLOCKED_STATUS: Final = 429
_OK_STATUS: Final = 200
_JOIN_TIMEOUT_S: Final = 5.0
_HEADS: Final = ("verb", "path", "status", "ms", "user", "company", "request", "response")
_WIDTHS: Final = (6, 28, 7, 6, 10, 9, 10, 10)
_RIGHT: Final = frozenset({2, 3, 6, 7})


def run_demo(*, ports: Sequence[int], once: bool, ended: threading.Event, say: Callable[[str], None]) -> int:
    """Run the demo.

    Args:
        ports: Ports to try for the sandbox, in order.
        once: Send every call once, print a table and return; else go on until `ended`.
        ended: Set to end it.
        say: Prints a line.

    Returns:
        0 when every call that was sent arrived and the rule blocked, else 1.

    Raises:
        OSError: None of the ports can be listened on.
    """
    with contextlib.ExitStack() as stack:
        sandbox = stack.enter_context(_sandbox(ports))
        sandbox.put_rules([RULE])  # nobody is in its cohort yet
        demo = stack.enter_context(_running_api(sandbox))
        say(f"Sandbox: {sandbox.url}/ (a Moesif of your own; the page lists what arrives)")
        say(f"API:     {demo.url} (Flask behind waitress, wrapped in MoesifMiddleware)")
        if not once:
            say("Ctrl-C ends it\n")
        say(_line(_HEADS))
        say(_line(["-" * width for width in _WIDTHS]))
        if once:
            demo.send_all(ended)
            demo.exceed_quota(ended)
        else:
            demo.send_forever(ended, say)
        return demo.finish(say)


@contextlib.contextmanager
def _sandbox(ports: Sequence[int]) -> Iterator[Sandbox]:
    for place, port in enumerate(ports, start=1):
        sandbox = Sandbox(port)
        try:
            sandbox.start()
        except OSError:
            sandbox.close()
            if place == len(ports):
                raise
            continue
        with sandbox:
            yield sandbox
        return


@dataclass
class _Demo:
    """The running demo: where calls go, what was sent, and how far the terminal has come."""

    sandbox: Sandbox
    middleware: MoesifMiddleware
    session: requests.Session
    url: str
    sent: Counter[tuple[str, str]]
    shown: int = 0
    rule_failed: bool = False

    def send(self, call: DemoCall) -> int:
        """Make one call, read its answer to the end, and give its status."""
        body: dict[str, Any] = {"data": call.body} if isinstance(call.body, bytes) else {"json": call.body}
        answer = self.session.request(call.verb, self.url + call.path, headers=call.headers, timeout=10, **body)
        self.sent[call.verb, call.path] += 1
        return answer.status_code

    def send_all(self, ended: threading.Event) -> None:
        """Make every call once."""
        for call in CALLS:
            if ended.is_set():
                return
            self.send(call)

    def send_forever(self, ended: threading.Event, say: Callable[[str], None]) -> None:
        """Make the calls over and over, showing what arrives; the quota is exceeded after the first round."""
        for number, call in enumerate(itertools.cycle(CALLS), start=1):
            self.send(call)
            over = ended.wait(_PAUSE_S)
            self.show(say)
            if over:
                return
            if number == len(CALLS):
                say(f"-- PUT {self.sandbox.url}/v1/config: initech is over its quota, its GET calls are answered 429")
                self.exceed_quota(ended)

    def exceed_quota(self, ended: threading.Event) -> None:
        """Put a company over its quota while everything runs, and see the rule block its calls.

        Moesif's answer to events carries the configuration's new tag; the middleware then fetches what has changed.
        """
        fetched = len(self._fetches())
        self.sandbox.put_config({"sample_rate": 100, "company_rules": COMPANY_RULES})
        self.send(GOVERNED_CALL)
        self.middleware.force_flush()
        end_s = time.monotonic() + _RULE_TIMEOUT_S
        while time.monotonic() < end_s:
            has_changed = len(self._fetches()) > fetched
            if ended.wait(_LOOK_S):  # the middleware needs a moment with what it fetched
                return
            if has_changed and self.send(GOVERNED_CALL) == _BLOCKED_STATUS:
                return
        self.rule_failed = True

    def _fetches(self) -> list[dict[str, Any]]:
        return [entry for entry in self.sandbox.requests("/v1/config") if entry["status"] == _OK_STATUS]

    def show(self, say: Callable[[str], None]) -> None:
        """Print the events that have arrived since the last time."""
        for stored in self.sandbox.stored_events(since=self.shown):
            self.shown = stored.sequence
            say(_line(_cells(Row.of_event(orjson.loads(stored.event)))))

    def finish(self, say: Callable[[str], None]) -> int:
        """Deliver what is pending, show it, and compare what was sent with what arrived."""
        self.middleware.force_flush()
        with contextlib.suppress(TimeoutError):
            self.sandbox.wait_for_events(self.sent.total(), _ARRIVAL_TIMEOUT_S, application_id=_APPLICATION_ID)
        self.show(say)
        events = self.sandbox.events(application_id=_APPLICATION_ID)
        rows = [Row.of_event(event) for event in events]
        missing = self.sent - Counter((row.verb, row.path) for row in rows)
        say("")
        say(_totals(rows, self.sent.total()))
        for (verb, path), number in missing.items():
            say(f"did not arrive: {verb} {path}" + (f" ({number} times)" if number > 1 else ""))
        if self.rule_failed:
            say(f"the rule blocked nothing within {_RULE_TIMEOUT_S:g} s")
        return 1 if missing or self.rule_failed else 0


@contextlib.contextmanager
def _running_api(sandbox: Sandbox) -> Iterator[_Demo]:
    """Run the API behind waitress, captured; everything is ended on leaving."""
    middleware = MoesifMiddleware(
        make_api().wsgi_app,
        {
            "APPLICATION_ID": _APPLICATION_ID,
            "BASE_URI": sandbox.url,
            "API_VERSION": "1.0",
            "AUTHORIZATION_HEADER_NAME": USER_HEADERS,
            "IDENTIFY_COMPANY": company_of,
            "GET_METADATA": metadata_of,
            "EVENT_BATCH_TIMEOUT": 0.5,
        },
    )
    # Its remark that a call waits for a thread would stand in the middle of the table.
    queue_log = logging.getLogger("waitress.queue")
    queue_log_level = queue_log.level
    queue_log.setLevel(logging.ERROR)
    server = create_server(middleware, host="127.0.0.1", port=0, threads=4)
    thread = threading.Thread(target=server.run, name="moesif-otel-demo-api", daemon=True)
    thread.start()
    try:
        with requests.Session() as session:
            session.trust_env = False  # a proxy of the environment does not lead to this machine
            url = f"http://127.0.0.1:{server.effective_port}"
            yield _Demo(sandbox, middleware, session, url, Counter())
    finally:
        middleware.shutdown()
        # In waitress's own thread: its loop ends when nothing is left to listen to.
        server.trigger.pull_trigger(lambda: server.asyncore.close_all(server._map))
        thread.join(_JOIN_TIMEOUT_S)
        server.task_dispatcher.shutdown()
        queue_log.setLevel(queue_log_level)


def _cells(row: Row) -> list[str]:
    return [
        row.verb,
        row.path,
        "none" if row.status is None else f"{row.status}{'!' if row.blocked else ''}",
        "-" if row.took_ms is None else f"{row.took_ms:.0f}",
        row.user or "-",
        row.company or "-",
        size_in_words(row.request_bytes),
        size_in_words(row.response_bytes),
    ]


def _line(cells: Sequence[str]) -> str:
    parts = []
    for place, (cell, width) in enumerate(zip(cells, _WIDTHS, strict=True)):
        text = "".join(character if character.isprintable() else "?" for character in cell)
        text = text.encode("ascii", "replace").decode()
        text = text if len(text) <= width else text[: width - 2] + ".."
        parts.append(text.rjust(width) if place in _RIGHT else text.ljust(width))
    return "  ".join(parts).rstrip()


def _totals(rows: Sequence[Row], sent: int) -> str:
    users = {row.user for row in rows if row.user}
    companies = {row.company for row in rows if row.company}
    failed = sum(1 for row in rows if (row.status or 0) >= 400)
    blocked = sum(1 for row in rows if row.blocked)
    request_bytes = sum(row.request_bytes or 0 for row in rows)
    response_bytes = sum(row.response_bytes or 0 for row in rows)
    return (
        f"{sent} calls sent, {len(rows)} captured: {failed} with an error status, {blocked} blocked by a rule (!),\n"
        f"from {len(users)} users of {len(companies)} companies; "
        f"bodies {size_in_words(request_bytes)} in, {size_in_words(response_bytes)} out"
    )
