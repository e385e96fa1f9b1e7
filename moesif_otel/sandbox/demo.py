"""`moesif-otel demo`: a sandbox, a small API behind a real server, and calls that are captured before your eyes.

Traffic and printing run in the caller's thread; the servers have their own, ended before the demo returns.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import logging
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final

from moesif_otel.sandbox import missing_package
from moesif_otel.sandbox.demo_traffic import (
    ACTIONS,
    CALLS,
    COMPANIES,
    COMPANY_RULES,
    GOVERNED_CALL,
    RULES,
    SUBSCRIPTIONS,
    USER_HEADERS,
    USERS,
    DemoCall,
)
from moesif_otel.sandbox.rows import Row, size_in_words
from moesif_otel.sandbox.server import Sandbox
from moesif_otel.sandbox.terminal import Table, event_lines
from moesif_otel.wsgi import MoesifMiddleware

try:
    from waitress.server import create_server

    from moesif_otel.sandbox.demo_api import company_of, make_api, make_payments, metadata_of
except ModuleNotFoundError as error:
    explained = missing_package(error)
    if explained is None:
        raise
    raise explained from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["run_demo"]

_APPLICATION_ID: Final = "demo-application-id"
_ARRIVAL_TIMEOUT_S: Final = 15.0
_PAUSE_S: Final = 0.35  # between calls, so that a person can follow
_RULE_TIMEOUT_S: Final = 10.0
_LOOK_S: Final = 0.05
_CALL_TIMEOUT_S: Final = 10
_BLOCKED_STATUS: Final = 429
_OK_STATUS: Final = 200
_JOIN_TIMEOUT_S: Final = 5.0
_SHOWN_WHOLE: Final = ("POST", "/orders/1001/pay")


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
        sandbox.put_rules(RULES)  # nobody is in the cohort yet
        demo = stack.enter_context(_running_api(sandbox))
        say(f"Sandbox: {sandbox.url}/ (a local stand-in for Moesif; the page shows what it receives)")
        say(f"API:     {demo.url} (Flask behind waitress, wrapped in MoesifMiddleware)")
        if not once:
            say("Ctrl-C ends it\n")
        say(demo.table.head())
        demo.send_profiles()
        if once:
            demo.send_all(ended)
            demo.exceed_quota(ended)
        else:
            demo.send_forever(ended, say)
        status = demo.finish(say)
        if once:
            say("\nTo look further: `moesif-otel demo` keeps it running, with all of this on a page in the browser;")
            say("`moesif-otel sandbox` waits for your own service, and `moesif-otel tail` follows it in a terminal.")
        return status


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
    port: int
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    table: Table = field(default_factory=Table)
    shown: int = 0
    rule_failed: bool = False

    @property
    def url(self) -> str:
        """The API's address."""
        return f"http://127.0.0.1:{self.port}"

    def send(self, call: DemoCall) -> int:
        """Make one call, read its answer to the end, and return its status."""
        # Not by a client that moesif_otel captures: the API's own outgoing calls are what should be seen.
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_CALL_TIMEOUT_S)
        try:
            connection.request(call.verb, call.path, body=call.data, headers=call.all_headers)
            answer = connection.getresponse()
            answer.read()
            self.sent[call.verb, call.path] += 1
            return answer.status
        finally:
            connection.close()

    def send_profiles(self) -> None:
        """Tell Moesif who the users and companies are, as the application would when they change."""
        self.middleware.update_users_batch([dict(user) for user in USERS])
        self.middleware.update_companies_batch([dict(company) for company in COMPANIES])
        self.middleware.update_subscriptions_batch([dict(subscription) for subscription in SUBSCRIPTIONS])
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000")
        for name, user, company in ACTIONS:
            seen = {"time": now, "uri": f"{self.url}/pricing"}
            self.middleware.send_action(
                {"action_name": name, "user_id": user, "company_id": company, "request": seen, "metadata": {"page": 3}}
            )

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
        """Print the calls that have arrived since the last time."""
        for stored in self.sandbox.recent_calls(after=self.shown, limit=1_000):
            self.shown = stored.sequence
            say(self.table.line(stored.row))

    def finish(self, say: Callable[[str], None]) -> int:
        """Deliver what is pending, show it, one event whole, and compare what was sent with what arrived."""
        self.middleware.force_flush()
        self._wait_for_incoming()
        self.show(say)
        events = self.sandbox.events(application_id=_APPLICATION_ID)
        rows = [Row.of_event(event) for event in events]
        incoming = [row for row in rows if row.direction == "Incoming"]
        whole = next(
            (event for event, row in zip(events, rows, strict=True) if (row.verb, row.path) == _SHOWN_WHOLE), None
        )
        if whole is not None:
            say("\nOne of these events, whole, as Moesif gets it:\n")
            for line in event_lines(whole, self.table.paint):
                say(line)
        say("")
        say(_totals(rows, self.sent.total()))
        # A hidden value in an address makes it another one than was sent; it is looked for by the rest.
        shown = Counter((row.verb, row.path.partition("?")[0]) for row in incoming)
        wanted = Counter[tuple[str, str]]()
        for (verb, path), number in self.sent.items():
            wanted[verb, path.partition("?")[0]] += number
        missing = wanted - shown
        for (verb, path), number in missing.items():
            say(f"did not arrive: {verb} {path}" + (f" ({number} times)" if number > 1 else ""))
        if self.rule_failed:
            say(f"the rule blocked nothing within {_RULE_TIMEOUT_S:g} s")
        return 1 if missing or self.rule_failed else 0

    def _wait_for_incoming(self) -> None:
        end_s = time.monotonic() + _ARRIVAL_TIMEOUT_S
        while time.monotonic() < end_s:
            if self.sandbox.count_calls(application_id=_APPLICATION_ID, direction="incoming") >= self.sent.total():
                return
            time.sleep(_LOOK_S)


@contextlib.contextmanager
def _running_api(sandbox: Sandbox) -> Iterator[_Demo]:
    """Run the API behind waitress, captured, and the service that it calls; everything is ended on leaving."""
    with contextlib.ExitStack() as stack:
        payments_port = stack.enter_context(_served(make_payments(), "payments"))
        api = make_api(f"http://127.0.0.1:{payments_port}", f"http://127.0.0.1:{_closed_port()}")
        middleware = MoesifMiddleware(
            api.wsgi_app,
            {
                "APPLICATION_ID": _APPLICATION_ID,
                "BASE_URI": sandbox.url,
                "API_VERSION": "1.0",
                "AUTHORIZATION_HEADER_NAME": USER_HEADERS,
                "IDENTIFY_COMPANY": company_of,
                "GET_METADATA": metadata_of,
                "CAPTURE_OUTGOING_REQUESTS": True,
                "EVENT_BATCH_TIMEOUT": 0.5,
            },
        )
        stack.callback(middleware.shutdown)
        yield _Demo(sandbox, middleware, stack.enter_context(_served(middleware, "api")))


@contextlib.contextmanager
def _served(app: Any, name: str) -> Iterator[int]:
    """Serve a WSGI application; yields its port."""
    # Its remark that a call waits for a thread would stand in the middle of the table.
    queue_log = logging.getLogger("waitress.queue")
    queue_log_level = queue_log.level
    queue_log.setLevel(logging.ERROR)
    server = create_server(app, host="127.0.0.1", port=0, threads=4)
    thread = threading.Thread(target=server.run, name=f"moesif-otel-demo-{name}", daemon=True)
    thread.start()
    try:
        yield int(server.effective_port)
    finally:
        # In waitress's own thread: its loop ends when nothing is left to listen to.
        server.trigger.pull_trigger(lambda: server.asyncore.close_all(server._map))
        thread.join(_JOIN_TIMEOUT_S)
        server.task_dispatcher.shutdown()
        queue_log.setLevel(queue_log_level)


def _closed_port() -> int:
    """Return a port that nobody listens to."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port


def _totals(rows: Sequence[Row], sent: int) -> str:
    incoming = [row for row in rows if row.direction == "Incoming"]
    users = {row.user for row in rows if row.user}
    companies = {row.company for row in rows if row.company}
    failed = sum(1 for row in incoming if row.failed)
    blocked = sum(1 for row in incoming if row.blocked)
    request_bytes = sum(row.request_bytes or 0 for row in incoming)
    response_bytes = sum(row.response_bytes or 0 for row in incoming)
    return (
        f"{sent} calls sent, {len(incoming)} captured: {failed} with an error status, {blocked} blocked by a rule; "
        f"{len(rows) - len(incoming)} outgoing calls besides;\nfrom {len(users)} users of {len(companies)} companies; "
        f"bodies {size_in_words(request_bytes)} in, {size_in_words(response_bytes)} out"
    )
