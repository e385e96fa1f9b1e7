"""Fetches configuration and rules from Moesif: every minute, and when an answer to a batch carries a new tag.

A poller has one daemon thread (`moesif-otel-config`) per process, started at the first event. Requests read `config`
and `rules`, senders call `note_tags`, and nothing waits for the thread. The thread holds the poller weakly, so it ends
with a pipeline that is discarded. A failed or malformed answer never replaces the last good one. A forked child notices
its new process id and starts its own thread, without an at-fork hook (uWSGI runs none). What the parent fetched stays
valid.
"""

from __future__ import annotations

import os
import queue
import re
import threading
import time
import weakref
from random import SystemRandom
from typing import TYPE_CHECKING, Final

from opentelemetry.instrumentation.utils import suppress_instrumentation

from moesif_otel._delivery.outcome import retry_after_seconds
from moesif_otel._guard import get_logger
from moesif_otel._remote.config import DEFAULT_CONFIG, RemoteConfig
from moesif_otel._remote.governance import NO_RULES, RuleSet
from moesif_otel._remote.rules import MalformedError, Skips

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._delivery.client import MoesifTransport
    from moesif_otel.settings import Settings

    # True: fetch what is due; False: end. Its `put` is safe in a finalizer.
    _Wakes = queue.SimpleQueue[bool]

_logger: Final = get_logger(__name__)

POLL_INTERVAL_S: Final = 60.0
"""The interval between polls (Moesif's API documentation), plus or minus a tenth."""
# Two servers behind one address may send two tags in turn: poll at most once a second.
_LEAST_GAP_S: Final = 1.0
# After a failure, poll sooner than in a minute: a service that starts before its network needs its rules.
_FIRST_RETRY_S: Final = 5.0
_START_AGAIN_S: Final = 1.0  # after the system refused a thread
_LOGGED_BY_DELIVERY: Final = frozenset({401, 402, 403, 407, 408, 425, 429})
_JITTER: Final = 0.1  # processes that were started together must not poll at the same moments
_SENDABLE: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,998}[\x21-\x7e])?")
_uniform = SystemRandom().uniform  # leaves the application's `random` alone, and is not shared by forked children


class _PolledDocument:
    """Decides when to fetch the configuration, or the rules, and with which ETag.

    Args:
        name: Its name in messages.
        path: Its path at Moesif.
        tag_header: Lower-case name of the header that carries its tag, on its own answers and on those to batches.
    """

    def __init__(self, name: str, path: str, tag_header: str) -> None:
        self.name = name
        self.path = path
        self._tag_header = tag_header
        self.etag: str | None = None
        self._tags: frozenset[str] = frozenset()
        self._noted_tag: str | None = None
        self._requested = False
        self._earliest_s = 0.0  # a new tag causes no request before this time
        self._next_s: float | None = None  # None: never requested
        self._failures = 0

    def note_tag(self, tag: str | None) -> bool:
        """Note a tag on the answer to a batch; return whether it is new, so that the document must be fetched."""
        if not tag or tag == self._noted_tag or tag in self._tags:
            return False
        # Remembered even if the document then carries another tag: one tag causes one request, not one per batch.
        self._noted_tag = tag
        self._requested = True
        return True

    def wait_s(self, now_s: float) -> float:
        """Return the seconds until the next request is due; zero or less if it is due now."""
        if self._next_s is None:
            return 0.0
        at_s = min(self._next_s, self._earliest_s) if self._requested else self._next_s
        return at_s - now_s

    def begin(self, now_s: float) -> None:
        """Note that a request begins; a tag that arrives from now on causes another one."""
        self._earliest_s = now_s + _LEAST_GAP_S
        self._requested = False

    def worked(self, headers: dict[str, str], now_s: float, *, changed: bool) -> None:
        """Note a good answer."""
        found = [headers.get("etag"), headers.get(self._tag_header)]
        # A tag that cannot be sent back in a header would make every later request fail.
        tags = [tag for tag in found if tag and _SENDABLE.fullmatch(tag)]
        self._tags = frozenset(tags)
        if changed:
            self.etag = tags[0] if tags else None
        elif self.etag is not None:
            self._tags |= {self.etag}
        self._failures = 0
        self._next_s = now_s + POLL_INTERVAL_S * _uniform(1 - _JITTER, 1 + _JITTER)

    def failed(self, retry_after_s: float | None, now_s: float) -> None:
        """Note that no good answer came: retry with growing delays, and never before `Retry-After`."""
        asked_s = retry_after_s or 0.0  # bounded by its parser
        wait_s = max(asked_s, min(_FIRST_RETRY_S * 2.0 ** min(self._failures, 8), POLL_INTERVAL_S))
        self._failures += 1
        self._earliest_s = max(self._earliest_s, now_s + asked_s)
        self._next_s = now_s + wait_s * _uniform(1, 1 + 2 * _JITTER)


class ConfigPoller:
    """Holds the last configuration and rules, and runs the thread that fetches them.

    Args:
        settings: The pipeline's settings; `EXPORT_TIMEOUT` limits a request.
        transport: Makes the requests.
        clock: Returns monotonic seconds.

    Thread-safe and fork-safe. Construction starts nothing and sends nothing.

    Attributes:
        config: The last good configuration; until the first answer, one that keeps every call.
        rules: The last good rules; none until the first answer.
    """

    def __init__(
        self, settings: Settings, transport: MoesifTransport, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = DEFAULT_CONFIG
        self.rules = NO_RULES
        self._skips = Skips()
        self._transport = transport
        self._address = settings.shown_address
        self._timeout_s = settings.export_timeout
        self._clock = clock
        self._config_document = _PolledDocument("configuration", "/v1/config", "x-moesif-config-etag")
        self._rules_document = _PolledDocument("governance rules", "/v1/rules", "x-moesif-rules-tag")
        self._released = False
        self._running_pid = 0
        self._start_again_s = 0.0
        self._locks: dict[int, threading.Lock] = {}
        self._wakes: _Wakes = queue.SimpleQueue()

    def ensure_started(self) -> None:
        """Start the thread in this process unless it runs. Cheap enough for every event; never raises."""
        pid = os.getpid()
        if self._running_pid == pid or self._released or self._clock() < self._start_again_s:
            return
        # A lock for each process: in a forked child, the parent's may be held forever. Never waited for: whoever has it
        # starts the thread, and may be this very thread, which a signal handler has interrupted.
        lock = self._locks.setdefault(pid, threading.Lock())
        if not lock.acquire(blocking=False):
            return
        try:
            if self._running_pid != pid and not self._released:
                self._start(pid)
        finally:
            lock.release()

    def _start(self, pid: int) -> None:
        # A new queue for each thread, without entries from a parent process or for a thread that is ending.
        self._wakes = queue.SimpleQueue()
        thread = threading.Thread(
            target=_poll, args=(weakref.ref(self), self._wakes), name="moesif-otel-config", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as exc:  # no more threads for now, or the process ends (Python 3.12 and later)
            self._skips.caught("starting the thread that fetches sampling rates and rules", exc)
            self._start_again_s = self._clock() + _START_AGAIN_S
        else:
            self._running_pid = pid

    def note_tags(self, config_etag: str | None, rules_tag: str | None) -> None:
        """Note the tags of an answer to a batch; a new one causes a request soon.

        Never blocks and never raises; called by sender threads.
        """
        # Both are noted, so no `or`.
        changed = [self._config_document.note_tag(config_etag), self._rules_document.note_tag(rules_tag)]
        if any(changed):
            self._wakes.put(True)

    def counts(self) -> dict[str, int]:
        """Return the number of ignored parts, and of failed requests, by kind."""
        return self._skips.counts()

    def release(self) -> None:
        """End the thread; `config` and `rules` can still be read. Idempotent."""
        self._released = True
        self._wakes.put(False)

    def step(self) -> float:
        """Fetch what is due, and return the seconds until something is. Runs on the poller's thread."""
        for document, take in ((self._config_document, self._take_config), (self._rules_document, self._take_rules)):
            if document.wait_s(self._clock()) <= 0:
                self._refresh(document, take)
        now_s = self._clock()
        wait_s = min(self._config_document.wait_s(now_s), self._rules_document.wait_s(now_s))
        return max(wait_s, 0.0)

    def _take_config(self, data: bytes) -> None:
        self.config = RemoteConfig.from_json(data, self._skips)

    def _take_rules(self, data: bytes) -> None:
        self.rules = RuleSet.from_json(data, self._skips)

    def _refresh(self, document: _PolledDocument, take: Callable[[bytes], None]) -> None:
        document.begin(self._clock())
        retry_after_s: float | None = None
        try:
            status, body, raw_headers = self._transport.get_json(
                document.path, etag=document.etag, timeout_s=self._timeout_s
            )
            headers = {name.lower(): value for name, value in raw_headers.items()}
            if status == 200:
                take(body)
                document.worked(headers, self._clock(), changed=True)
                self._note_stale()
                return
            if status == 304 and document.etag is not None:
                document.worked(headers, self._clock(), changed=False)
                return
            retry_after_s = retry_after_seconds(headers.get("retry-after"), time.time())
            self._report(document, f"status {status}", common=status in _LOGGED_BY_DELIVERY or status >= 500)
        except MalformedError as exc:
            self._report(document, str(exc), common=False)
        except OSError as exc:
            self._report(document, f"no answer ({type(exc).__name__})", common=True)
        except Exception as exc:  # a defect of ours
            self._skips.caught(f"{document.name} request", exc)
        document.failed(retry_after_s, self._clock())

    def _report(self, document: _PolledDocument, why: str, *, common: bool) -> None:
        """Count a failed request, and log it, unless it fails for events as well (`common`): delivery logs that."""
        kind, address = f"{document.name} request", f"{self._address.rstrip('/')}{document.path}"
        if common:
            self._skips.count(kind)
            _logger.debug("moesif_otel: no %s from %s: %s", document.name, address, why)
        else:
            self._skips.note(
                kind,
                f"could not get {document.name} from {address} ({why}); the last ones that were received stay in use, "
                "and it is tried again. Check BASE_URI",
            )

    def _note_stale(self) -> None:
        # Until both have been received, one of them is empty, which does not mean stale.
        if self.rules is not NO_RULES and self.config is not DEFAULT_CONFIG and self.rules.has_unknown_ids(self.config):
            self._skips.note(
                "cohort entry of an unknown rule",
                "Moesif's configuration names a governance rule that Moesif's rules do not have, so that rule does not "
                "apply yet; if the rule exists, this resolves itself within minutes",
            )

    def __del__(self) -> None:
        # Finalizer: the queue's `put` takes no lock that could be held here.
        self._wakes.put(False)


def _poll(reference: weakref.ref[ConfigPoller], wakes: _Wakes) -> None:
    """Run a poller's thread. It holds the poller only during a request."""
    with suppress_instrumentation():
        while True:
            poller = reference()
            if poller is None or poller._released:
                return
            try:
                wait_s = poller.step()
            except Exception as exc:  # a defect of ours; the thread goes on
                poller._skips.caught("fetching sampling rates and rules", exc)
                wait_s = POLL_INTERVAL_S
            del poller
            try:
                if not wakes.get(timeout=wait_s):
                    return
            except queue.Empty:
                continue
