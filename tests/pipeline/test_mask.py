"""MASK_EVENT_MODEL: the last look at an event; what fails is never sent."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import time
import warnings
import weakref
from functools import partial
from typing import Any

import pytest
from moesifapi.models import EventModel

from moesif_otel import MoesifSpanExporter, instrument
from moesif_otel._delivery.stats import DropReason
from moesif_otel._events.model import MoesifEvent
from moesif_otel._guard import Guard
from moesif_otel._pipeline import mask as mask_module
from moesif_otel._pipeline.mask import EventMask, _tell_at_exit
from moesif_otel.errors import MoesifConfigError
from moesif_otel.wsgi import MoesifMiddleware

GIVEN = {"APPLICATION_ID": "a", "BASE_URI": "http://127.0.0.1:9"}


def application(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return []


def event(request: Any = None, response: Any = None) -> dict[str, Any]:
    made: dict[str, Any] = {
        "request": {"uri": "http://a/b", "verb": "GET", "headers": {}},
        "response": {"status": 200, "headers": {}},
        "transaction_id": "t",
    }
    for name, body in (("request", request), ("response", response)):
        if body is not None:
            made[name] |= {"body": body, "transfer_encoding": "json"}
    return made


def masked(mask: Any, made: dict[str, Any], **how: Any) -> Any:
    return EventMask(mask, Guard(), **how).apply(made)


def mask_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "moesif-otel-mask"]


def until(true: Any, timeout_s: float = 30.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not true() and time.monotonic() < deadline_s:
        threading.Event().wait(0.01)
    return bool(true())


def test_the_documented_mask_works_on_every_call() -> None:
    """`if 'password' in event.response.body` finds a body, an empty one where there is none, which is not sent."""

    def mask(model: Any) -> Any:
        for part in (model.request, model.response):
            if "password" in part.body:
                part.body["password"] = None
        return model

    found = masked(mask, event(response={"password": "s", "a": 1}))
    assert found["response"]["body"] == {"password": None, "a": 1}
    assert "body" not in found["request"]


def test_what_a_mask_puts_into_an_absent_body_is_sent() -> None:
    """The mask can change anything, also add."""

    def mask(model: Any) -> Any:
        model.request.body["added"] = True
        return model

    assert masked(mask, event())["request"]["body"] == {"added": True}


def test_none_skips_the_event_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """A mask may decide that an event is not to be sent; one that forgets `return` hears of it at once."""
    masking = EventMask(lambda model: None, Guard())
    for _ in range(3):
        assert masking.apply(event()) is DropReason.MASKED_AWAY
    (record,) = caplog.records
    assert "returned None" in record.getMessage()


def test_a_mask_that_never_returned_an_event_is_told_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """Also when nobody shuts the pipeline down; not for a mask that skips some events, and only once."""
    forgetful = EventMask(lambda model: None, Guard())
    choosy = EventMask(lambda model: model if model.request.verb == "GET" else None, Guard())
    for masking in (forgetful, choosy):
        made = event()
        made["request"]["verb"] = "PUT"
        masking.apply(made)
        masking.apply(event())
    caplog.clear()
    choosy.tell_end()
    _tell_at_exit()
    forgetful.tell_end()
    assert [record.getMessage() for record in caplog.records].count(caplog.records[0].getMessage()) <= 2
    assert "for every event (2)" in caplog.text
    assert "return event" in caplog.text


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (lambda model: 1 / 0, "failed with ZeroDivisionError at test_mask.py"),
        (lambda model: {"request": {}}, "returned dict instead of the event"),
        (lambda model: "text", "returned str instead of the event"),
    ],
)
def test_a_mask_that_fails_loses_its_event(mask: Any, words: str, caplog: pytest.LogCaptureFixture) -> None:
    """Raising or returning another type drops it, counted, logged once, without a word of its data.

    The line says that the event is not sent, and by which name it is counted.
    """
    guard = Guard()
    masking = EventMask(mask, guard)
    with caplog.at_level(logging.DEBUG):
        for _ in range(2):
            assert masking.apply(event(request={"k": "the secret"})) is DropReason.MASK_FAILED
    assert guard.counts() == {"callback MASK_EVENT_MODEL": 2}
    (record,) = caplog.records
    assert words in record.getMessage()
    assert "this event is not sent (counted as mask_failed)" in record.getMessage()
    assert "the secret" not in caplog.text


@pytest.mark.parametrize("make", [lambda mask: MoesifMiddleware(application, {**GIVEN, "MASK_EVENT_MODEL": mask}), lambda mask: MoesifSpanExporter(application_id="a", mask_event_model=mask), lambda mask: instrument({**GIVEN, "MASK_EVENT_MODEL": mask})])  # fmt: skip
@pytest.mark.parametrize("mask", [lambda: None, lambda app, environ: None, partial(lambda model: model, None)])
def test_a_mask_that_takes_no_event_is_refused(make: Any, mask: Any) -> None:
    """At construction, and not by losing every event; the message shows what it takes."""
    with pytest.raises(MoesifConfigError, match=r"MASK_EVENT_MODEL: got .*, takes a function \(event\)"):
        make(mask)


def test_a_plain_event_model_is_taken_over() -> None:
    """A mask may build a new model of moesifapi's own class."""

    def mask(model: Any) -> Any:
        return EventModel(request=model.request, response=model.response, user_id="new")

    found = masked(mask, event())
    assert (found["user_id"], found["transaction_id"]) == ("new", "t")


def test_a_copy_of_the_event_is_an_event() -> None:
    """By way of its dict, as moesifapi's models can be copied."""
    found = masked(lambda model: type(model).from_dictionary(model.to_dictionary()), event(request={"a": 1}))
    assert found["request"]["body"] == {"a": 1}


def test_odd_values_of_a_mask_are_made_sound() -> None:
    """Metadata becomes an object, ids become text."""

    def mask(model: Any) -> Any:
        model.metadata, model.user_id = [1], 5
        return model

    found = masked(mask, event())
    assert (found["metadata"], found["user_id"]) == ({"value": [1]}, "5")


def test_a_mask_that_hangs_loses_its_event_and_stops_nobody() -> None:
    """After the limit the event is dropped; few threads are ever lost to it; it works again when it returns."""
    release, hanging = threading.Event(), [True]

    def mask(model: Any) -> Any:
        if hanging[0]:
            release.wait(30)
        return model

    masking = EventMask(mask, Guard(), timeout_s=0.25)
    before = threading.active_count()
    for _ in range(12):
        assert masking.apply(event()) is DropReason.MASK_FAILED
    assert threading.active_count() - before <= 4
    hanging[0] = False
    release.set()
    assert until(lambda: isinstance(masking.apply(event()), dict))


def test_no_thread_outlives_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline that rests, is shut down or is forgotten has no mask thread; the next event starts one."""
    monkeypatch.setattr(mask_module, "_IDLE_S", 0.05)
    masking = EventMask(lambda model: model, Guard())
    for _ in range(3):
        assert isinstance(masking.apply(event()), dict)
        assert until(lambda: not mask_threads())
    gone = weakref.ref(masking)
    del masking
    gc.collect()
    assert gone() is None


def test_events_follow_each_other_on_one_thread() -> None:
    """However many there are."""
    threads: set[int] = set()

    def mask(model: Any) -> Any:
        threads.add(threading.get_ident())
        return model

    masking = EventMask(mask, Guard())
    for _ in range(50):
        masking.apply(event())
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_an_async_mask_is_awaited() -> None:
    """On an event loop of the mask's own thread, which later events find again."""
    loops: set[int] = set()

    async def mask(model: Any) -> Any:
        await asyncio.sleep(0)
        loops.add(id(asyncio.get_running_loop()))
        model.user_id = "masked"
        return model

    masking = EventMask(mask, Guard())
    for _ in range(3):
        found = masking.apply(event())
        assert isinstance(found, dict)
        assert found["user_id"] == "masked"
    assert len(loops) == 1


def test_an_async_mask_that_hangs_loses_its_event_alone() -> None:
    """It is cancelled: no thread is lost."""

    async def mask(model: Any) -> Any:
        if model.user_id == "slow":
            await asyncio.sleep(60)
        return model

    masking = EventMask(mask, Guard(), timeout_s=0.1)
    assert masking.apply({**event(), "user_id": "slow"}) is DropReason.MASK_FAILED
    assert until(lambda: isinstance(masking.apply(event()), dict))


def test_the_mask_knows_its_thread() -> None:
    """A mask that asks for a flush must not wait for itself."""
    said: list[bool] = []

    def mask(model: Any) -> Any:
        said.append(masking.is_own_thread)
        return model

    masking = EventMask(mask, Guard())
    masking.apply(event())
    assert said == [True]
    assert not masking.is_own_thread


def test_a_model_has_no_drawn_id() -> None:
    """The server deduplicates by it."""
    assert MoesifEvent({"request": {}}).transaction_id is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_a_thread_of_its_own() -> None:
    """The parent's is not there; nobody waits for it."""
    masking = EventMask(lambda model: model, Guard())
    assert isinstance(masking.apply(event()), dict)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            began_s = time.monotonic()
            done = isinstance(masking.apply(event()), dict) and time.monotonic() - began_s < 4
            os.write(writing, b"1" if done else b"0")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reading, 1) == b"1"
    os.close(reading)
    os.close(writing)


def test_a_late_answer_of_a_mask_that_hung_is_not_taken_for_the_next_event() -> None:
    """The event whose mask took too long is dropped; the one after it gets its own answer, not the late one."""
    go_on = threading.Event()

    def mask(model: Any) -> Any:
        if model.request.uri == "http://slow/":
            go_on.wait(30)
        return model

    masking = EventMask(mask, Guard(), timeout_s=0.05)
    slow = event()
    slow["request"]["uri"] = "http://slow/"
    assert masking.apply(slow) is DropReason.MASK_FAILED
    (hung,) = masking._hung
    masking._timeout_s = 30.0
    go_on.set()
    assert until(lambda: hung._free)
    for n in range(3):
        made = event()
        made["request"]["uri"] = f"http://next/{n}"
        assert masking.apply(made)["request"]["uri"] == f"http://next/{n}"


def test_a_mask_that_fails_leaves_its_event_to_no_garbage_collector() -> None:
    """The event is gone with the call: a mask that fails on every large body must not fill the memory until gc runs."""
    seen: list[weakref.ref[Any]] = []

    def mask(model: Any) -> Any:
        seen.append(weakref.ref(model))
        raise ValueError

    masking = EventMask(mask, Guard())
    gc.disable()
    try:
        assert masking.apply(event()) is DropReason.MASK_FAILED
        assert until(lambda: seen[0]() is None)
    finally:
        gc.enable()
