"""Asking Moesif what it has to say: one poller for all pipelines with the same application id and base URI.

Owns: the poller thread, when it asks, what it keeps, and the sharing of pollers.
Threads: one daemon thread a poller (`moesif-otel-config`), started at the first event, once in each process.
Requests read `config` and `rules`; senders call `note_tags`; nobody waits for the thread, and the thread holds its
poller weakly, so that pipelines that are thrown away without `release` take their poller with them.
Never: raises; replaces what is known by an answer that failed or is malformed; blocks in `note_tags`.

After a fork the child sees another process id and starts a thread of its own with queue and lock of its own; that
needs no at-fork hook, which uWSGI would not run anyway. What the parent had learned stays valid.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from typing import TYPE_CHECKING, Final

from opentelemetry.instrumentation.utils import suppress_instrumentation

from moesif_otel._remote.config import DEFAULT_CONFIG, RemoteConfig
from moesif_otel._remote.governance import NO_RULES, RuleSet
from moesif_otel._remote.skips import Skips
from moesif_otel._remote.topic import POLL_INTERVAL_S, Topic

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._remote.topic import Fetched, JsonSource
    from moesif_otel.settings import Settings

    # True: look what is due; False: end. Its `put` is safe in a finalizer.
    _Wakes = queue.SimpleQueue[bool]

__all__ = ["ConfigPoller", "Feed", "shared_poller"]


class ConfigPoller:
    """One pipeline's hold on what Moesif says; pipelines with the same key share what is behind it.

    Made by `shared_poller`. Thread-safe.
    """

    __slots__ = ("__weakref__", "_feed", "_source")

    def __init__(self, feed: Feed, source: JsonSource) -> None:
        self._feed = feed
        self._source = source
        feed.join(self)

    @property
    def source(self) -> JsonSource:
        """The transport to ask with."""
        return self._source

    @property
    def config(self) -> RemoteConfig:
        """The last good configuration; before the first answer everything is kept."""
        return self._feed.config

    @property
    def rules(self) -> RuleSet:
        """The last good rules; none before the first answer."""
        return self._feed.rules

    def ensure_started(self) -> None:
        """Start the poller's thread in this process, if it does not run: cheap, for every event. Never raises."""
        self._feed.ensure_started()

    def note_tags(self, config_etag: str | None, rules_tag: str | None) -> None:
        """Take note of the tags of an events answer; another tag than the known one has it asked for soon.

        Never blocks and never raises; called by sender threads.
        """
        self._feed.note_tags(config_etag, rules_tag)

    def counts(self) -> dict[str, int]:
        """Give the number of pieces left out, and of failed answers, by kind."""
        return self._feed.skips.counts()

    def release(self) -> None:
        """Let go; the thread ends when the last pipeline has. What was known can still be read. Idempotent."""
        self._feed.leave(self)


class Feed:
    """What Moesif said last, and the thread that asks; shared by its `ConfigPoller`s.

    Args:
        timeout_s: Seconds that one question may take.
        clock: Monotonic seconds.

    Thread-safe.
    """

    __slots__ = (
        "__weakref__",
        "_clock",
        "_config_topic",
        "_locks",
        "_members",
        "_rules_topic",
        "_running_pid",
        "_timeout_s",
        "_wakes",
        "config",
        "rules",
        "skips",
    )

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.skips = Skips()
        self.config = DEFAULT_CONFIG
        self.rules = NO_RULES
        self._timeout_s = timeout_s
        self._clock = clock
        self._config_topic = Topic("configuration", "/v1/config", "x-moesif-config-etag")
        self._rules_topic = Topic("rules", "/v1/rules", "x-moesif-rules-tag")
        self._members: tuple[weakref.ref[ConfigPoller], ...] = ()
        self._running_pid = 0
        self._locks: dict[int, threading.Lock] = {}
        self._wakes: _Wakes = queue.SimpleQueue()

    def join(self, poller: ConfigPoller) -> None:
        """Count one pipeline in."""
        with lock_of_process(self._locks):
            alive = [ref for ref in self._members if ref() is not None]
            self._members = (*alive, weakref.ref(poller))

    def leave(self, poller: ConfigPoller) -> None:
        """Count one pipeline out; after the last one the thread ends."""
        with lock_of_process(self._locks):
            self._members = tuple(ref for ref in self._members if ref() not in {None, poller})
            if not self._members:
                self._running_pid = 0
                self._wakes.put(False)

    def ensure_started(self) -> None:
        """Start the thread unless it runs in this process."""
        if self._running_pid == os.getpid():
            return
        with lock_of_process(self._locks):
            if self._running_pid == os.getpid() or not self._members:
                return
            # A queue of its own for each thread: nothing of a parent process, or of a thread that is ending, is in it.
            self._wakes = queue.SimpleQueue()
            thread = threading.Thread(
                target=_poll, args=(weakref.ref(self), self._wakes), name="moesif-otel-config", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as exc:  # Python 3.12+ starts no threads while it exits
                self.skips.caught("starting the configuration poller", exc)
            self._running_pid = os.getpid()

    def note_tags(self, config_etag: str | None, rules_tag: str | None) -> None:
        """Mark as due whatever has another tag now."""
        # Both are asked, so no `or`.
        changed = [self._config_topic.note_tag(config_etag), self._rules_topic.note_tag(rules_tag)]
        if any(changed):
            self._wakes.put(True)

    def step(self) -> float:
        """Ask for whatever is due; give the seconds until something is. Runs on the poller's thread."""
        if self._config_topic.is_due(self._clock()):
            self._refresh(self._config_topic, self._take_config)
        if self._rules_topic.is_due(self._clock()):
            self._refresh(self._rules_topic, self._take_rules)
        now_s = self._clock()
        wait_s = min(self._config_topic.wait_s(now_s), self._rules_topic.wait_s(now_s))
        return min(max(wait_s, 0.0), POLL_INTERVAL_S)

    def _take_config(self, data: bytes) -> None:
        self.config = RemoteConfig.from_json(data, self.skips)

    def _take_rules(self, data: bytes) -> None:
        self.rules = RuleSet.from_json(data, self.skips)

    def _refresh(self, topic: Topic, take: Callable[[bytes], None]) -> None:
        fetched = self._ask(topic)
        if fetched is not None and fetched.body is not None:
            try:
                take(fetched.body)
                self._note_stale()
            except Exception as exc:
                self.skips.caught(f"{topic.name} answer", exc)
                fetched = None
        topic.settle(fetched, self._clock())

    def _note_stale(self) -> None:
        # Before both have been read one of them is empty, which is not stale.
        if self.rules is not NO_RULES and self.config is not DEFAULT_CONFIG and self.rules.has_unknown_ids(self.config):
            self.skips.note("cohort entry of an unknown rule", reason="configuration and rules differ in age")

    def _ask(self, topic: Topic) -> Fetched | None:
        topic.begin(self._clock())
        for member in self._members:
            poller = member()
            if poller is None:
                continue
            try:
                return topic.ask(poller.source, self._timeout_s)
            except Exception as exc:  # another pipeline's transport may still be open
                self.skips.caught(f"{topic.name} request", exc)
        return None

    def __del__(self) -> None:
        # Finalizer: the queue's `put` takes no lock that could be held here.
        self._wakes.put(False)


def _poll(feed_ref: weakref.ref[Feed], wakes: _Wakes) -> None:
    """Run a feed's thread. It holds the feed only while it asks."""
    with suppress_instrumentation():
        while True:
            feed = feed_ref()
            if feed is None:
                return
            try:
                wait_s = feed.step()
            except Exception as exc:  # ours to mend; the thread lives on
                feed.skips.caught("configuration poller", exc)
                wait_s = POLL_INTERVAL_S
            del feed
            try:
                if not wakes.get(timeout=wait_s):
                    return
            except queue.Empty:
                continue


_feeds: weakref.WeakValueDictionary[tuple[str, str], Feed] = weakref.WeakValueDictionary()
_feeds_locks: Final[dict[int, threading.Lock]] = {}


def shared_poller(
    settings: Settings, transport: JsonSource, *, clock: Callable[[], float] = time.monotonic
) -> ConfigPoller:
    """Give a pipeline its hold on the poller of its application id and base URI; nothing is started or asked yet.

    Args:
        settings: The pipeline's; `EXPORT_TIMEOUT` bounds a question.
        transport: Asks Moesif; used for as long as the pipeline holds its poller.
        clock: Monotonic seconds.

    Thread-safe.
    """
    with lock_of_process(_feeds_locks):
        feed = _feeds.get(settings.pipeline_key)
        if feed is None:
            feed = _feeds[settings.pipeline_key] = Feed(settings.export_timeout, clock)
        return ConfigPoller(feed, transport)


def lock_of_process(locks: dict[int, threading.Lock]) -> threading.Lock:
    """Give the lock of this process: a parent's, which may be held for ever in a forked child, is not used there."""
    return locks.setdefault(os.getpid(), threading.Lock())
