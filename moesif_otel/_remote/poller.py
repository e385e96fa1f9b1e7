"""Fetches configuration and rules from Moesif: every minute, and when an answer to a batch carries a new tag.

Delivery runs it on a daemon thread (`moesif-otel-config`) of its own. Requests read `config` and `rules`, senders call
`note_tags`, and nothing waits for the thread. A failed or malformed answer never replaces the last good one. In a
forked child, what the parent fetched stays valid.
"""

from __future__ import annotations

import re
import time
from random import SystemRandom
from typing import TYPE_CHECKING, Final

from moesif_otel._delivery.outcome import retry_after_seconds
from moesif_otel._guard import get_logger
from moesif_otel._remote.config import DEFAULT_CONFIG, RemoteConfig
from moesif_otel._remote.governance import NO_RULES, RuleSet
from moesif_otel._remote.rules import MalformedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._delivery.client import MoesifTransport
    from moesif_otel._guard import Guard
    from moesif_otel.settings import Settings

_logger: Final = get_logger(__name__)

_POLL_INTERVAL_S: Final = 60.0  # between polls (Moesif's API documentation), plus or minus `_JITTER`
# Two servers behind one address may send two tags in turn: poll at most once a second.
_LEAST_GAP_S: Final = 1.0
# After a failure, poll sooner than in a minute: a service that starts before its network needs its rules.
_FIRST_RETRY_S: Final = 5.0
_LOGGED_BY_DELIVERY: Final = frozenset({401, 402, 403, 407, 408, 425, 429})
_JITTER: Final = 0.1  # processes that were started together must not poll at the same moments
_SENDABLE: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,998}[\x21-\x7e])?")
_uniform = SystemRandom().uniform  # leaves the application's `random` alone, and is not shared by forked children


class _PolledDocument:
    """Decides when to fetch the configuration, or the rules, and with which ETag.

    `tag_header` is the lower-case name of the header that carries its tag, on its own answers and on those to batches.
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
        self._next_s = now_s + _POLL_INTERVAL_S * _uniform(1 - _JITTER, 1 + _JITTER)

    def failed(self, retry_after_s: float | None, now_s: float) -> None:
        """Note that no good answer came: retry with growing delays, and never before `Retry-After`."""
        asked_s = retry_after_s or 0.0  # bounded by its parser
        wait_s = max(asked_s, min(_FIRST_RETRY_S * 2.0 ** min(self._failures, 8), _POLL_INTERVAL_S))
        self._failures += 1
        self._earliest_s = max(self._earliest_s, now_s + asked_s)
        self._next_s = now_s + wait_s * _uniform(1, 1 + 2 * _JITTER)


class ConfigPoller:
    """Holds the last configuration and rules, and fetches them when they are due; `EXPORT_TIMEOUT` limits a request.

    Attributes:
        config: The last good configuration; until the first answer, one that keeps every call.
        rules: The last good rules; none until the first answer.
    """

    def __init__(
        self, settings: Settings, transport: MoesifTransport, guard: Guard, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = DEFAULT_CONFIG
        self.rules = NO_RULES
        self._guard = guard
        self._transport = transport
        self._address = settings.shown_address
        self._timeout_s = settings.export_timeout
        self._clock = clock
        self._config_document = _PolledDocument("configuration", "/v1/config", "x-moesif-config-etag")
        self._rules_document = _PolledDocument("governance rules", "/v1/rules", "x-moesif-rules-tag")

    def note_tags(self, config_etag: str | None, rules_tag: str | None) -> bool:
        """Note the tags of an answer to a batch, on a sender's thread; return whether that makes a request due."""
        # Both are noted, so no `or`.
        return any([self._config_document.note_tag(config_etag), self._rules_document.note_tag(rules_tag)])

    def step(self) -> float:
        """Fetch what is due, and return the seconds until something is. Runs on the poller's thread."""
        documents = (self._config_document, self._rules_document)
        for document in documents:
            if document.wait_s(self._clock()) <= 0:
                self._refresh(document)
        now_s = self._clock()
        return max(0.0, min(document.wait_s(now_s) for document in documents))

    def _refresh(self, document: _PolledDocument) -> None:
        document.begin(self._clock())
        retry_after_s: float | None = None
        try:
            status, body, raw_headers = self._transport.get_json(
                document.path, etag=document.etag, timeout_s=self._timeout_s
            )
            headers = {name.lower(): value for name, value in raw_headers.items()}
            if status == 200:
                if document is self._config_document:
                    self.config = RemoteConfig.from_json(body, self._guard)
                else:
                    self.rules = RuleSet.from_json(body, self._guard)
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
            self._guard.caught(f"{document.name} request", exc)
        document.failed(retry_after_s, self._clock())

    def _report(self, document: _PolledDocument, why: str, *, common: bool) -> None:
        """Count a failed request, and log it, unless it fails for events as well (`common`): delivery logs that."""
        kind, address = f"{document.name} request", f"{self._address.rstrip('/')}{document.path}"
        if common:
            self._guard.count(kind)
            _logger.debug("moesif_otel: no %s from %s: %s", document.name, address, why)
        else:
            self._guard.note(
                kind,
                f"could not get {document.name} from {address} ({why}); the last ones that were received stay in use, "
                "and it is tried again. Check BASE_URI",
            )

    def _note_stale(self) -> None:
        # Until both have been received, one of them is empty, which does not mean stale.
        if self.rules is not NO_RULES and self.config is not DEFAULT_CONFIG and self.rules.has_unknown_ids(self.config):
            self._guard.note(
                "cohort entry of an unknown rule",
                "Moesif's configuration names a governance rule that Moesif's rules do not have, so that rule does not "
                "apply yet; if the rule exists, this resolves itself within minutes",
            )
