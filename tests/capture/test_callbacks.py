"""Callbacks: which run, with which arguments, and what their answers and errors become."""

from __future__ import annotations

from typing import Any

from moesif_otel._capture.callbacks import Callbacks
from moesif_otel._capture.exchange import Exchange, current_exchange, identify
from tests.recording import RecordingPipeline

APP, ENVIRON, HEADERS = object(), {"k": "v"}, {"X": "y"}


def run(direction: Any = "Incoming", prepare: Any = None, **options: Any) -> tuple[Exchange, RecordingPipeline]:
    pipeline = RecordingPipeline(**options)
    exchange = Exchange(pipeline, direction, "GET")
    exchange.callback_arguments = (APP, ENVIRON)
    exchange.identify_arguments = (APP, ENVIRON, HEADERS)
    if prepare is not None:
        prepare(exchange)
    Callbacks(pipeline.settings, direction, pipeline.guard).run(exchange)
    return exchange, pipeline


def test_identify_takes_two_or_three_arguments() -> None:
    """Both arities of the documentation work, and anything that takes any number."""

    class Callable3:
        def __call__(self, app: Any, environ: Any, response_headers: Any) -> Any:
            return (app, environ, response_headers)

    for function, expected in (
        (lambda app, environ: (app, environ), (APP, ENVIRON)),
        (lambda app, environ, response_headers={}: (app, environ, response_headers), (APP, ENVIRON, HEADERS)),
        (lambda *arguments: arguments, (APP, ENVIRON, HEADERS)),
        (Callable3(), (APP, ENVIRON, HEADERS)),
    ):
        exchange, pipeline = run(IDENTIFY_USER=function, IDENTIFY_COMPANY=function)
        assert exchange.user_id == expected
        assert exchange.company_id == expected
        assert pipeline.guard.counts() == {}


def test_skip_ends_it() -> None:
    """A true SKIP runs no other callback; a SKIP that raises does not skip."""
    seen: list[Any] = []
    exchange, _ = run(SKIP=lambda app, environ: True, GET_METADATA=lambda app, environ: seen.append(1))
    assert exchange.skipped
    assert seen == []
    exchange, pipeline = run(SKIP=lambda app, environ: 1 / 0, GET_SESSION_TOKEN=lambda app, environ: "t")
    assert not exchange.skipped
    assert exchange.session_token == "t"
    assert pipeline.guard.counts() == {"callback SKIP": 1}


def test_a_callback_that_raises_loses_its_own_value_only() -> None:
    """Each one is counted under its name; the others are asked all the same."""
    exchange, pipeline = run(
        IDENTIFY_USER=lambda app, environ: {}["x"],
        IDENTIFY_COMPANY=lambda app, environ: "acme",
        GET_METADATA=lambda app, environ: {"m": 1},
    )
    assert (exchange.user_id, exchange.company_id, exchange.metadata) == (None, "acme", {"m": 1})
    assert pipeline.guard.counts() == {"callback IDENTIFY_USER": 1}


def test_what_identify_said_stands() -> None:
    """Values given inside the request win; metadata is merged key by key."""

    def prepare(exchange: Exchange) -> None:
        token = current_exchange.set(exchange)
        identify(user_id="inside", metadata={"a": 1})
        identify(metadata={"b": 2})
        current_exchange.reset(token)

    exchange, _ = run(
        prepare=prepare,
        IDENTIFY_USER=lambda app, environ: "callback",
        IDENTIFY_COMPANY=lambda app, environ: "acme",
        GET_METADATA=lambda app, environ: {"a": 0, "c": 3},
    )
    assert (exchange.user_id, exchange.company_id) == ("inside", "acme")
    assert exchange.metadata == {"a": 1, "b": 2, "c": 3}


def test_identity_is_asked_for_once() -> None:
    """A rule that needed the identity early has had the callbacks run; they do not run again."""
    calls: list[int] = []
    pipeline = RecordingPipeline(IDENTIFY_USER=lambda app, environ: calls.append(1))
    exchange = Exchange(pipeline, "Incoming", "GET")
    exchange.callback_arguments = (APP, ENVIRON)
    callbacks = Callbacks(pipeline.settings, "Incoming", pipeline.guard)
    callbacks.identify(exchange)
    callbacks.run(exchange)
    assert calls == [1]


def test_outgoing_calls_have_callbacks_of_their_own() -> None:
    """The *_OUTGOING options are asked for outgoing calls, the others are not."""
    exchange, pipeline = run(
        "Outgoing",
        IDENTIFY_USER=lambda *arguments: "incoming",
        IDENTIFY_USER_OUTGOING=lambda request, response: (request, response),
        SKIP=lambda *arguments: True,
        GET_METADATA_OUTGOING=lambda request, response: 1 / 0,
    )
    assert exchange.user_id == (APP, ENVIRON)
    assert pipeline.guard.counts() == {"callback GET_METADATA_OUTGOING": 1}


def test_a_callback_that_cannot_be_imported_is_named_once(caplog: Any) -> None:
    """One clear error with the path; calls are recorded without the value."""
    pipeline = RecordingPipeline(IDENTIFY_USER="tests.absent_module:identify")
    callbacks = Callbacks(pipeline.settings, "Incoming", pipeline.guard)
    for _ in range(3):
        exchange = Exchange(pipeline, "Incoming", "GET")
        exchange.callback_arguments = exchange.identify_arguments = (APP, ENVIRON)
        callbacks.run(exchange)
        assert exchange.user_id is None
    (record,) = caplog.records
    assert "tests.absent_module:identify" in record.getMessage()
    assert pipeline.guard.counts() == {"callback IDENTIFY_USER": 3}


def test_identify_outside_a_request_does_nothing() -> None:
    """Library code may call it anywhere."""
    identify(user_id="nobody")
    assert current_exchange.get() is None
