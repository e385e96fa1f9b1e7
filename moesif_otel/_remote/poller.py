"""Asking Moesif for its configuration and its rules: every minute, and when an answer to events brings a new tag.

A poller has one daemon thread (`moesif-otel-config`), started at the first event and once in each process. Requests
read `config` and `rules`, senders call `note_tags`; nobody waits for the thread. It holds the poller weakly, so that a
pipeline that is thrown away takes its thread with it. What is known is never replaced by an answer that failed or is
malformed. A forked child sees another process id and starts a thread of its own, without an at-fork hook (uWSGI runs
none); what the parent had learned stays valid.
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

    # True: look what is due; False: end. Its `put` is safe in a finalizer.
    _Wakes = queue.SimpleQueue[bool]

__all__ = ["ConfigPoller"]

_logger: Final = get_logger(__name__)

POLL_INTERVAL_S: Final = 60.0
"""Moesif is asked this often (its API documentation), give or take a tenth."""
# Answers of two servers with two tags may take turns: one request a second at most.
_LEAST_GAP_S: Final = 1.0
# After a failure it is asked sooner than in a minute: a service that starts before its network shall not be without
# rules for so long.
_FIRST_RETRY_S: Final = 5.0
_START_AGAIN_S: Final = 1.0  # after the system refused a thread
_SAID_FOR_EVENTS: Final = frozenset({401, 402, 403, 407, 408, 425, 429})
_JITTER: Final = 0.1  # processes that were started together must not ask together for ever
_SENDABLE: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,998}[\x21-\x7e])?")
_uniform = SystemRandom().uniform  # the application's `random` is left alone, and forked children do not share it


class _Document:
    """When to ask for the configuration, or the rules, again, and with which ETag.

    Args:
        name: For messages.
        path: Where it is asked for.
        tag_header: Lower-case name of the header, on answers to events and on its own, that carries its tag.
    """

    def __init__(self, name: str, path: str, tag_header: str) -> None:
        self.name = name
        self.path = path
        self._tag_header = tag_header
        self.etag: str | None = None
        self._tags: frozenset[str] = frozenset()
        self._noted_tag: str | None = None
        self._requested = False
        self._earliest_s = 0.0  # no new tag has it asked for before
        self._next_s: float | None = None  # None: never asked
        self._failures = 0

    def note_tag(self, tag: str | None) -> bool:
        """Take note of a tag on an answer to events; True when it is new, so that this should be asked for again."""
        if not tag or tag == self._noted_tag or tag in self._tags:
            return False
        # Remembered even if the answer then carries another one: a tag has it asked for once, not with every batch.
        self._noted_tag = tag
        self._requested = True
        return True

    def wait_s(self, now_s: float) -> float:
        """Return the seconds until it is due; 0 or less: now."""
        if self._next_s is None:
            return 0.0
        at_s = min(self._next_s, self._earliest_s) if self._requested else self._next_s
        return at_s - now_s

    def begin(self, now_s: float) -> None:
        """Take note that it is being asked for; a tag that comes from now on has it asked for again."""
        self._earliest_s = now_s + _LEAST_GAP_S
        self._requested = False

    def worked(self, headers: dict[str, str], now_s: float, *, changed: bool) -> None:
        """Take note of a good answer."""
        found = [headers.get("etag"), headers.get(self._tag_header)]
        # What could not be sent back in a header would keep us from asking ever again.
        tags = [tag for tag in found if tag and _SENDABLE.fullmatch(tag)]
        self._tags = frozenset(tags)
        if changed:
            self.etag = tags[0] if tags else None
        elif self.etag is not None:
            self._tags |= {self.etag}
        self._failures = 0
        self._next_s = now_s + POLL_INTERVAL_S * _uniform(1 - _JITTER, 1 + _JITTER)

    def failed(self, retry_after_s: float | None, now_s: float) -> None:
        """Take note that no good answer came: ask again later each time, and never before the server wishes."""
        asked_s = retry_after_s or 0.0  # bounded where it is read
        wait_s = max(asked_s, min(_FIRST_RETRY_S * 2.0 ** min(self._failures, 8), POLL_INTERVAL_S))
        self._failures += 1
        self._earliest_s = max(self._earliest_s, now_s + asked_s)
        self._next_s = now_s + wait_s * _uniform(1, 1 + 2 * _JITTER)


class ConfigPoller:
    """What Moesif said last, and the thread that asks.

    Args:
        settings: The pipeline's; `EXPORT_TIMEOUT` bounds a request.
        transport: Asks Moesif.
        clock: Monotonic seconds.

    Thread-safe and fork-safe. Nothing is started or asked at construction.

    Attributes:
        config: The last good configuration; before the first answer everything is kept.
        rules: The last good rules; none before the first answer.
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
        self._config_document = _Document("configuration", "/v1/config", "x-moesif-config-etag")
        self._rules_document = _Document("governance rules", "/v1/rules", "x-moesif-rules-tag")
        self._released = False
        self._running_pid = 0
        self._start_again_s = 0.0
        self._locks: dict[int, threading.Lock] = {}
        self._wakes: _Wakes = queue.SimpleQueue()

    def ensure_started(self) -> None:
        """Start the thread in this process, if it does not run: cheap, for every event. Never raises."""
        pid = os.getpid()
        if self._running_pid == pid or self._released or self._clock() < self._start_again_s:
            return
        # A lock for each process: a parent's may be held for ever in a forked child.
        with self._locks.setdefault(pid, threading.Lock()):
            if self._running_pid == pid or self._released:
                return
            # A queue of its own for each thread: nothing of a parent process, or of a thread that is ending, is in it.
            self._wakes = queue.SimpleQueue()
            thread = threading.Thread(
                target=_poll, args=(weakref.ref(self), self._wakes), name="moesif-otel-config", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as exc:  # no more threads for now, or the process ends (Python 3.12 and later)
                self._skips.caught("starting the thread that asks Moesif for rules and sampling", exc)
                self._start_again_s = self._clock() + _START_AGAIN_S
            else:
                self._running_pid = pid

    def note_tags(self, config_etag: str | None, rules_tag: str | None) -> None:
        """Take note of the tags of an answer to events; a new one has its document asked for soon.

        Never blocks and never raises; called by sender threads.
        """
        # Both are noted, so no `or`.
        changed = [self._config_document.note_tag(config_etag), self._rules_document.note_tag(rules_tag)]
        if any(changed):
            self._wakes.put(True)

    def counts(self) -> dict[str, int]:
        """Return the number of pieces left out, and of failed answers, by kind."""
        return self._skips.counts()

    def release(self) -> None:
        """End the thread; what was known can still be read. Idempotent."""
        self._released = True
        self._wakes.put(False)

    def step(self) -> float:
        """Ask for whatever is due; return the seconds until something is. Runs on the poller's thread."""
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

    def _refresh(self, document: _Document, take: Callable[[bytes], None]) -> None:
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
            self._say(document, f"status {status}", common=status in _SAID_FOR_EVENTS or status >= 500)
        except MalformedError as exc:
            self._say(document, str(exc), common=False)
        except OSError as exc:
            self._say(document, f"no answer ({type(exc).__name__})", common=True)
        except Exception as exc:  # ours to mend
            self._skips.caught(f"{document.name} request", exc)
        document.failed(retry_after_s, self._clock())

    def _say(self, document: _Document, why: str, *, common: bool) -> None:
        """Count an answer that was none. What fails for events as well (`common`) delivery says, with what to do."""
        kind, address = f"{document.name} request", f"{self._address.rstrip('/')}{document.path}"
        if common:
            self._skips.count(kind)
            _logger.debug("moesif_otel: no %s from %s: %s", document.name, address, why)
        else:
            self._skips.note(
                kind, f"no {document.name} from {address} ({why}); what was known before applies. Check BASE_URI"
            )

    def _note_stale(self) -> None:
        # Before both have been read one of them is empty, which is not stale.
        if self.rules is not NO_RULES and self.config is not DEFAULT_CONFIG and self.rules.has_unknown_ids(self.config):
            self._skips.note(
                "cohort entry of an unknown rule",
                "Moesif's configuration names a governance rule that is not among the rules: one of both is older, "
                "which the next minutes mend",
            )

    def __del__(self) -> None:
        # Finalizer: the queue's `put` takes no lock that could be held here.
        self._wakes.put(False)


def _poll(reference: weakref.ref[ConfigPoller], wakes: _Wakes) -> None:
    """Run a poller's thread. It holds the poller only while it asks."""
    with suppress_instrumentation():
        while True:
            poller = reference()
            if poller is None or poller._released:
                return
            try:
                wait_s = poller.step()
            except Exception as exc:  # ours to mend; the thread lives on
                poller._skips.caught("asking Moesif for rules and sampling", exc)
                wait_s = POLL_INTERVAL_S
            del poller
            try:
                if not wakes.get(timeout=wait_s):
                    return
            except queue.Empty:
                continue
