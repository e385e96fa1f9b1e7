"""MASK_EVENT_MODEL: the last look at an event; what fails is never sent."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
from moesifapi.models import EventModel, EventRequestModel, EventResponseModel

from moesif_otel._delivery.stats import DropReason
from moesif_otel._events.build import MoesifEvent
from moesif_otel._guard import Guard
from moesif_otel._pipeline.mask import EventMask


def event(**parts: Any) -> MoesifEvent:
    return MoesifEvent(
        request=EventRequestModel(uri="http://a/b", verb="GET", headers={}, body=parts.get("request")),
        response=EventResponseModel(status=200, headers={}, body=parts.get("response")),
        transaction_id="t",
    )


def test_the_documented_mask_works_on_every_call() -> None:
    """`if 'password' in event.response.body` finds a body, an empty one where there is none, which is not sent."""

    def mask(model: Any) -> Any:
        for part in (model.request, model.response):
            if "password" in part.body:
                part.body["password"] = None
        return model

    masked = EventMask(mask, Guard()).apply(event(response={"password": "s", "a": 1}))
    assert isinstance(masked, MoesifEvent)
    assert masked.response.body == {"password": None, "a": 1}
    assert masked.request.body is None


def test_what_a_mask_puts_into_an_absent_body_is_sent() -> None:
    """The mask can change anything, also add."""

    def mask(model: Any) -> Any:
        model.request.body["added"] = True
        return model

    masked = EventMask(mask, Guard()).apply(event())
    assert isinstance(masked, MoesifEvent)
    assert masked.request.body == {"added": True}


def test_none_skips_the_event() -> None:
    """A mask may decide that an event is not to be sent."""
    assert EventMask(lambda model: None, Guard()).apply(event()) is DropReason.MASKED_AWAY


@pytest.mark.parametrize("mask", [lambda model: 1 / 0, lambda model: {"request": {}}, lambda model: "text"])
def test_a_mask_that_fails_loses_its_event(mask: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Raising or returning another type drops it, counted, logged once, without a word of its data."""
    guard = Guard()
    masking = EventMask(mask, guard)
    with caplog.at_level(logging.DEBUG):
        for _ in range(2):
            assert masking.apply(event(request={"k": "the secret"})) is DropReason.MASK_FAILED
    assert guard.counts() == {"callback MASK_EVENT_MODEL": 2}
    assert len(caplog.records) == 1
    assert "the secret" not in caplog.text


def test_a_plain_event_model_is_taken_over() -> None:
    """A mask may build a new model of moesifapi's own class."""

    def mask(model: Any) -> Any:
        return EventModel(request=model.request, response=model.response, user_id="new")

    masked = EventMask(mask, Guard()).apply(event())
    assert (masked.user_id, masked.transaction_id) == ("new", "t")


def test_a_mask_that_hangs_loses_its_event_and_stops_nobody() -> None:
    """After the limit the event is dropped; few threads are ever lost to it; it works again when it returns."""
    release, hanging = threading.Event(), [True]

    def mask(model: Any) -> Any:
        if hanging[0]:
            release.wait(30)
        return model

    guard = Guard()
    masking = EventMask(mask, guard, timeout_s=0.25)
    before = threading.active_count()
    for _ in range(12):
        assert masking.apply(event()) is DropReason.MASK_FAILED
    assert threading.active_count() - before <= 4
    hanging[0] = False
    release.set()
    for _ in range(200):
        if isinstance(masking.apply(event()), MoesifEvent):
            break
        threading.Event().wait(0.01)
    assert isinstance(masking.apply(event()), MoesifEvent)


def test_without_a_mask_events_pass_untouched() -> None:
    """No thread, no look."""
    plain = event()
    assert EventMask(None, Guard()).apply(plain) is plain
