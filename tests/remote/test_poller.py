"""The poller: when it asks, what it keeps, who shares it, and that it goes away."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.instrumentation.utils import is_http_instrumentation_enabled

from moesif_otel._guard import Guard
from moesif_otel._pipeline.sink import EventSink
from moesif_otel._remote import poller as poller_module
from moesif_otel._remote.config import DEFAULT_CONFIG
from moesif_otel._remote.governance import NO_RULES
from moesif_otel._remote.poller import ConfigPoller
from moesif_otel.settings import Settings
from tests.delivery.delivery_kit import MemoryTransport, Rig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from moesif_otel._delivery.delivery import Delivery

RULE = {"_id": "r", "type": "regex", "block": True, "response": {"status": 403}}


class Answers:
    """A transport whose answers are set by the test; it notes what it was asked."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.answer_304_with: str | None = None
        self.asked: list[tuple[str, str | None]] = []
        self.documents: dict[str, Any] = {"/v1/config": {"sample_rate": 50}, "/v1/rules": []}
        self.tags: dict[str, str] = {"/v1/config": "c1", "/v1/rules": "r1"}
        self.status: int | None = None
        self.instrumented: list[bool] = []

    def get_json(self, path: str, *, etag: str | None, timeout_s: float) -> tuple[int, bytes, Mapping[str, str]]:
        self.asked.append((path, etag))
        self.instrumented.append(is_http_instrumentation_enabled())
        if self.status is not None:
            if self.status == 0:
                raise ConnectionError
            return self.status, b"no", dict(self.headers)
        header = "X-Moesif-Config-ETag" if path == "/v1/config" else "X-Moesif-Rules-Tag"
        headers = {header: self.tags[path]}
        if self.answer_304_with is not None:
            return 304, b"", {header: self.answer_304_with}
        if etag == self.tags[path]:
            return 304, b"", headers
        document = self.documents[path]
        return 200, document if isinstance(document, bytes) else json.dumps(document).encode(), headers

    def paths(self) -> list[str]:
        asked, self.asked = self.asked, []
        return [path for path, _ in asked]


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def guard() -> Guard:
    return Guard()


BOTH = ["/v1/config", "/v1/rules"]


@pytest.fixture
def stepped(answers: Answers, clock: Clock, guard: Guard, monkeypatch: pytest.MonkeyPatch) -> ConfigPoller:
    """A poller whose steps the test makes, without jitter."""
    monkeypatch.setattr(poller_module, "_uniform", lambda low, high: 1.0)
    return ConfigPoller(settings_of("stepped"), answers, guard, clock)


def settings_of(application_id: str, base_uri: str = "http://127.0.0.1:9") -> Settings:
    return Settings.of({"APPLICATION_ID": application_id, "BASE_URI": base_uri, "EXPORT_TIMEOUT": 2})


def wait_until(holds: Callable[[], bool], limit_s: float = 30.0) -> None:
    end_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end_s, "did not come true"
        time.sleep(0.005)


def poller_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "moesif-otel-config"}


def test_before_the_first_answer_everything_is_kept_and_nothing_asked(answers: Answers) -> None:
    """Making a poller asks nothing."""
    poller = ConfigPoller(settings_of("fresh"), answers, Guard())
    assert poller.config is DEFAULT_CONFIG
    assert poller.rules is NO_RULES
    assert answers.asked == []


def test_it_asks_at_once_and_then_every_minute(stepped: ConfigPoller, answers: Answers, clock: Clock) -> None:
    """First both, then with the ETag after 60 s; a 304 keeps what is known."""
    poller = stepped
    assert poller.step() == pytest.approx(60.0)
    assert answers.asked == [("/v1/config", None), ("/v1/rules", None)]
    assert poller.config.sample_rate == 50
    config = poller.config
    answers.asked.clear()
    clock.now_s += 59.0
    assert poller.step() == pytest.approx(1.0)
    assert answers.asked == []
    clock.now_s += 1.0
    poller.step()
    assert answers.asked == [("/v1/config", "c1"), ("/v1/rules", "r1")]
    assert poller.config is config


def test_another_tag_has_only_its_own_thing_asked_for(stepped: ConfigPoller, answers: Answers, clock: Clock) -> None:
    """A new rules tag asks for the rules, a new config tag for the configuration; a known one for nothing."""
    poller = stepped
    poller.step()
    answers.paths()
    clock.now_s += 5.0
    poller.note_tags("c1", "r1")
    poller.note_tags(None, None)
    poller.note_tags("", "")
    poller.step()
    assert answers.paths() == []
    answers.documents["/v1/rules"], answers.tags["/v1/rules"] = [RULE], "r2"
    poller.note_tags("c1", "r2")
    poller.step()
    assert answers.paths() == ["/v1/rules"]
    assert len(poller.rules) == 1
    answers.documents["/v1/config"], answers.tags["/v1/config"] = {"sample_rate": 7}, "c2"
    poller.note_tags("c2", "r2")
    poller.step()
    assert answers.paths() == ["/v1/config"]
    assert poller.config.sample_rate == 7


def test_a_tag_that_the_answer_does_not_carry_is_asked_for_once(
    stepped: ConfigPoller, answers: Answers, clock: Clock
) -> None:
    """Every batch brings the tag again; only its first appearance asks, the minute does the rest."""
    poller = stepped
    poller.step()
    answers.paths()
    for _ in range(10):
        clock.now_s += 2.0
        poller.note_tags("elsewhere", None)
        poller.step()
    assert answers.paths() == ["/v1/config"]


def test_tags_that_take_turns_ask_once_a_second_at_most(stepped: ConfigPoller, answers: Answers, clock: Clock) -> None:
    """Two servers behind one address with two tags make no storm."""
    poller = stepped
    poller.step()
    answers.paths()
    for turn in range(100):
        clock.now_s += 0.1
        poller.note_tags(f"tag{turn % 2}", None)
        assert poller.step() <= 60.0
    assert len(answers.paths()) <= 11


@pytest.mark.parametrize("status", [0, 401, 404, 429, 500, 503, 302])
def test_a_failed_answer_keeps_the_last_good_one(
    stepped: ConfigPoller, answers: Answers, clock: Clock, guard: Guard, status: int
) -> None:
    """No answer, or a wrong one: what is known stays, it is counted, and it is tried again sooner than in a minute."""
    poller = stepped
    answers.documents["/v1/rules"] = [RULE]
    poller.step()
    config, rules = poller.config, poller.rules
    answers.status = status
    answers.paths()
    waits = []
    for _ in range(6):
        clock.now_s += 60.0
        waits.append(poller.step())
    assert (poller.config, poller.rules) == (config, rules)
    assert waits == [5, 10, 20, 40, 60, 60]
    assert sum(guard.counts().values()) == 12
    answers.status = None
    clock.now_s += 60.0
    assert poller.step() == pytest.approx(60.0)


@pytest.mark.parametrize("document", [b"", b"<html>", b"null", b"5", b'"x"'])
def test_a_malformed_answer_keeps_the_last_good_one(
    stepped: ConfigPoller, answers: Answers, clock: Clock, document: bytes
) -> None:
    """What is no configuration, or no rules, replaces nothing; and its ETag is not remembered."""
    poller = stepped
    answers.documents["/v1/rules"] = [RULE]
    poller.step()
    config, rules = poller.config, poller.rules
    for path in BOTH:
        answers.documents[path], answers.tags[path] = document, "bad"
    clock.now_s += 60.0
    poller.step()
    assert (poller.config, poller.rules) == (config, rules)
    answers.asked.clear()
    clock.now_s += 60.0
    poller.step()
    assert answers.asked == [("/v1/config", "c1"), ("/v1/rules", "r1")]


@pytest.mark.parametrize("tag", ["a\r\n b", "é", "x" * 5_000, " ", "\0"])
def test_a_tag_that_cannot_be_sent_back_is_not_kept(
    stepped: ConfigPoller, answers: Answers, clock: Clock, tag: str
) -> None:
    """The document counts, and the next request has no ETag instead of failing for ever."""
    poller = stepped
    answers.tags = dict.fromkeys(BOTH, tag)
    poller.step()
    assert poller.config.sample_rate == 50
    answers.asked.clear()
    clock.now_s += 60.0
    poller.step()
    assert answers.asked == [("/v1/config", None), ("/v1/rules", None)]


def test_tags_that_grow_without_end_are_forgotten(stepped: ConfigPoller, answers: Answers, clock: Clock) -> None:
    """A server that answers 304 with another tag each time makes us remember no more than a few."""
    poller = stepped
    poller.step()
    for turn in range(200):
        clock.now_s += 60.0
        answers.answer_304_with = f"t{turn}"
        poller.step()
    assert len(poller._config_document._tags) <= 3


def test_no_document_of_one_breaks_the_other(stepped: ConfigPoller, answers: Answers) -> None:
    """Malformed rules leave the configuration alone."""
    poller = stepped
    answers.documents["/v1/rules"] = b"no"
    poller.step()
    assert poller.config.sample_rate == 50
    assert poller.rules is NO_RULES


def test_stale_cohort_entries_are_counted(stepped: ConfigPoller, answers: Answers, guard: Guard) -> None:
    """A configuration that names a rule which is gone is noticed, and no more than that."""
    poller = stepped
    answers.documents["/v1/config"] = {"user_rules": {"u": [{"rules": "gone"}]}}
    answers.documents["/v1/rules"] = [RULE]
    poller.step()
    assert guard.counts() == {"cohort entry of an unknown rule": 1}


def test_the_server_may_ask_to_be_left_alone(stepped: ConfigPoller, answers: Answers, clock: Clock) -> None:
    """Retry-After is obeyed, in seconds and as a date, but for five minutes at most; a tag does not cut it short."""
    poller = stepped
    answers.status = 429
    for value, waited in (("240", 240), ("86400", 300), ("Fri, 31 Dec 2199 23:59:59 GMT", 300)):
        answers.headers = {"Retry-After": value}
        answers.paths()
        poller.step()
        assert answers.paths() == BOTH
        clock.now_s += waited - 1
        poller.note_tags(f"another {value}", f"another {value}")
        assert poller.step() == pytest.approx(1.0)
        assert answers.paths() == []
        clock.now_s += 1


def test_processes_that_start_together_do_not_ask_together(answers: Answers, clock: Clock) -> None:
    """Every wait has some jitter, after good answers as after failures and Retry-After; the latter only gets longer."""
    pollers = [ConfigPoller(settings_of(str(n)), answers, Guard(), clock) for n in range(20)]
    assert len({poller.step() for poller in pollers}) > 1
    answers.status, answers.headers = 503, {"Retry-After": "30"}
    clock.now_s += 100
    waits = {poller.step() for poller in pollers}
    assert len(waits) > 10
    assert all(30 <= wait_s <= 36 for wait_s in waits)


def test_not_modified_without_a_document_is_a_failure(stepped: ConfigPoller, answers: Answers, clock: Clock) -> None:
    """A 304 to a question without an ETag brings nothing: it is asked again soon, and never in a loop."""
    poller = stepped
    answers.status = 304
    assert poller.step() == pytest.approx(5.0)
    assert poller.config is DEFAULT_CONFIG
    clock.now_s += 5.0
    assert poller.step() == pytest.approx(10.0)
    assert len(answers.asked) == 4


@pytest.mark.parametrize(
    ("status", "document", "told"),
    [
        (404, None, "could not get configuration from http://(hidden)@127.0.0.1:9/v1/config (status 404)"),
        (200, b"<html>", "could not get configuration from http://(hidden)@127.0.0.1:9/v1/config (configuration is not JSON)"),
        (0, None, None),
        (401, None, None),
        (503, None, None),
    ],
)
def test_what_only_the_poller_meets_is_said_once(
    answers: Answers, clock: Clock, guard: Guard, caplog: pytest.LogCaptureFixture, status: int, document: Any, told: str | None
) -> None:
    """Address, cause and what to check, once; what events meet as well is left to delivery's line about them."""
    poller = ConfigPoller(settings_of("x", "http://joe:hunter2@127.0.0.1:9/"), answers, guard, clock)
    if status != 200:
        answers.status = status
    for path in BOTH:
        answers.documents[path] = document
    with caplog.at_level("WARNING"):
        for _ in range(5):
            poller.step()
            clock.now_s += 100.0
    texts = [record.getMessage() for record in caplog.records if "configuration from" in record.getMessage()]
    assert len(texts) == (1 if told else 0)
    assert told is None or told in texts[0]
    assert "hunter2" not in caplog.text
    assert guard.counts()["configuration request"] == 5


def test_a_clock_that_jumps_stops_nothing(stepped: ConfigPoller, answers: Answers, clock: Clock) -> None:
    """A machine that slept for a day is asked for at once, and never waits longer than a minute or so."""
    poller = stepped
    poller.step()
    answers.paths()
    clock.now_s += 86_400.0
    assert poller.step() <= 60.0
    assert answers.paths() == BOTH


# On delivery's thread.


@pytest.fixture
def polled(answers: Answers, guard: Guard) -> Iterator[tuple[ConfigPoller, Delivery[Any]]]:
    """A poller and the delivery whose thread runs it, which has asked once."""
    before = poller_threads()
    poller = ConfigPoller(settings_of("polled"), answers, guard)
    rig = Rig(MemoryTransport(), poll=poller.step)
    rig.delivery.ensure_started()
    wait_until(lambda: poller.config is not DEFAULT_CONFIG and len(answers.asked) == 2)
    assert len(poller_threads() - before) == 1
    yield poller, rig.delivery
    rig.delivery.shutdown(5)
    wait_until(lambda: not poller_threads() - before)


def test_its_questions_are_not_instrumented(polled: Any, answers: Answers) -> None:
    """The thread is suppressed for instrumentations: no spans of ours in the application's traces."""
    assert answers.instrumented == [False, False]


def test_after_a_shutdown_nothing_is_asked_and_all_is_still_known(polled: Any, answers: Answers) -> None:
    """The thread ends, once and for all; what was known can be read."""
    poller, delivery = polled
    delivery.shutdown(5)
    delivery.wake_poller()
    delivery.ensure_started()
    assert len(answers.asked) == 2
    assert poller.config.sample_rate == 50


def test_a_noted_tag_wakes_the_thread(polled: Any, answers: Answers) -> None:
    """A new tag is asked for within moments, not at the next minute (the least gap is a second)."""
    poller, delivery = polled
    answers.documents["/v1/rules"], answers.tags["/v1/rules"] = [RULE], "r2"
    assert poller.note_tags(None, "r2")
    delivery.wake_poller()
    wait_until(lambda: len(poller.rules) == 1)


def test_an_error_of_ours_ends_no_thread(guard: Guard) -> None:
    """A step that raises is counted, and the next one is made."""
    steps: list[int] = []
    rig = Rig(MemoryTransport(), poll=lambda: steps.append(1) or 1 / 0)
    rig.delivery.ensure_started()
    wait_until(lambda: len(steps) == 1)
    rig.delivery.wake_poller()
    wait_until(lambda: len(steps) == 2)
    assert rig.stats.errors["fetching sampling rates and rules"] >= 1
    rig.delivery.shutdown(5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_asks_for_itself(polled: Any, answers: Answers) -> None:
    """The child keeps what the parent knew, starts a thread of its own, and the parent's goes on."""
    poller, delivery = polled
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        try:
            known = poller.config.sample_rate
            answers.documents["/v1/config"], answers.tags["/v1/config"] = {"sample_rate": 3}, "c2"
            poller.note_tags("c2", None)
            delivery.ensure_started()
            wait_until(lambda: poller.config.sample_rate == 3)
            os.write(writing, f"{known:g} {poller.config.sample_rate:g}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "50 3"
    os.waitpid(child, 0)
    assert poller.config.sample_rate == 50


def test_against_the_sandbox() -> None:
    """Rules put into the sandbox are known after the next tag; the sandbox's own ETags work with ours."""
    sandbox_module = pytest.importorskip("moesif_otel.sandbox")
    with sandbox_module.Sandbox() as sandbox:
        sandbox.put_config({"sample_rate": 10})
        sandbox.put_rules([RULE])
        sink = EventSink(settings_of("sandboxed", sandbox.url))
        sink.delivery.ensure_started()
        wait_until(lambda: sink.remote.config.sample_rate == 10 and len(sink.remote.rules) == 1)
        sandbox.put_rules([])
        sink._note_tags(None, "another")
        wait_until(lambda: len(sink.remote.rules) == 0)
        sink.shutdown(5)
