"""Callbacks: which run, with which arguments, and what their answers and errors become."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import pytest

from moesif_otel._capture.callbacks import Callbacks, check_signatures, run_steps
from moesif_otel._capture.exchange import Exchange, current_exchange, identify
from moesif_otel.errors import MoesifConfigError
from moesif_otel.settings import Settings
from tests.recording import RecordingPipeline

APP, ENVIRON, HEADERS = object(), {"k": "v"}, {"X": "y"}


def run(direction: Any = "Incoming", prepare: Any = None, **options: Any) -> tuple[Exchange, RecordingPipeline]:
    pipeline = RecordingPipeline(**options)
    exchange = Exchange(pipeline, direction, "GET")
    exchange.callback_arguments = (APP, ENVIRON)
    exchange.identify_arguments = (APP, ENVIRON, HEADERS)
    if prepare is not None:
        prepare(exchange)
    run_steps(Callbacks(pipeline.settings, direction, pipeline.guard).steps(exchange))
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
    run_steps(callbacks.identifying(exchange))
    run_steps(callbacks.steps(exchange))
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
        run_steps(callbacks.steps(exchange))
        assert exchange.user_id is None
    (record,) = caplog.records
    assert "tests.absent_module:identify" in record.getMessage()
    assert pipeline.guard.counts() == {"callback IDENTIFY_USER": 3}


def test_identify_outside_a_request_does_nothing() -> None:
    """Library code may call it anywhere."""
    identify(user_id="nobody")
    assert current_exchange.get() is None


def nested(*same_request: bool) -> list[Exchange]:
    """Incoming Exchanges one inside the other, the innermost current."""
    found = []
    for same in same_request:
        exchange = Exchange(RecordingPipeline(), "Incoming", "GET")
        exchange.same_request = same
        current_exchange.set(exchange)
        found.append(exchange)
    return found


def test_identify_speaks_of_the_innermost_call_only() -> None:
    """A sub-request (a batch endpoint) has its own user; what wraps the very same request gets it too."""
    token = current_exchange.set(None)
    try:
        outer, inner = nested(False, False)
        identify(user_id="inner")
        assert (outer.user_id, inner.user_id) == (None, "inner")
        other, outer, inner = nested(False, False, True)
        Exchange(RecordingPipeline(), "Outgoing", "GET")
        identify(company_id="acme")
        assert (other.company_id, outer.company_id, inner.company_id) == (None, "acme", "acme")
        outgoing = Exchange(RecordingPipeline(), "Outgoing", "GET")
        current_exchange.set(outgoing)
        identify(session_token="t")
        assert (other.session_token, outer.session_token, outgoing.session_token) == (None, "t", "t")
    finally:
        current_exchange.reset(token)


def test_metadata_is_that_of_the_moment() -> None:
    """A dict that the application goes on to use and change is copied, nested ones too."""
    shared: dict[str, Any] = {"n": 1, "deep": {"list": [1]}}
    exchange, _ = run(GET_METADATA=lambda app, environ: shared)
    token = current_exchange.set(exchange)
    identify(metadata={"said": shared})
    current_exchange.reset(token)
    shared["n"] = 2
    shared["deep"]["list"].append(2)
    assert exchange.metadata == {"n": 1, "deep": {"list": [1]}, "said": {"n": 1, "deep": {"list": [1]}}}


class Timeout(BaseException):
    """As gevent's."""


@pytest.mark.parametrize("error", [Timeout, asyncio.CancelledError, GeneratorExit])
def test_no_exception_of_a_callback_gets_out(error: type[BaseException]) -> None:
    """Also one that is no `Exception`."""

    def fail(app: Any, environ: Any) -> None:
        raise error

    exchange, pipeline = run(IDENTIFY_USER=fail, IDENTIFY_COMPANY=lambda *_: "acme")
    assert exchange.company_id == "acme"
    assert pipeline.guard.counts() == {"callback IDENTIFY_USER": 1}


def test_a_skip_that_cannot_be_imported_sends_nothing() -> None:
    """It protects data: better no event than one that was to be left out."""
    exchange, pipeline = run(SKIP="tests.absent_module:skip")
    assert exchange.skipped
    assert pipeline.guard.counts() == {"callback SKIP": 1}


def test_awaitables_are_yielded_to_who_can_await_them() -> None:
    """Steps: each awaitable comes out, its result or its error goes in; the next callback runs all the same."""

    async def user(app: Any, environ: Any) -> str:
        return "ann"

    async def company(app: Any, environ: Any) -> str:
        raise ValueError

    pipeline = RecordingPipeline()
    settings = Settings.of(
        {"APPLICATION_ID": "a", "IDENTIFY_USER": user, "IDENTIFY_COMPANY": company, "SKIP": lambda *_: False},
        async_callbacks=True,
    )
    exchange = Exchange(pipeline, "Incoming", "GET")
    exchange.callback_arguments = (APP, ENVIRON)
    steps = Callbacks(settings, "Incoming", pipeline.guard).steps(exchange)

    async def drive() -> None:
        said = None
        error = None
        while True:
            try:
                awaitable = steps.send(said) if error is None else steps.throw(error)
            except StopIteration:
                return
            said = error = None
            try:
                said = await awaitable
            except ValueError as exc:
                error = exc

    asyncio.run(drive())
    assert (exchange.user_id, exchange.company_id, exchange.skipped) == ("ann", None, False)
    assert pipeline.guard.counts() == {"callback IDENTIFY_COMPANY": 1}


def test_nobody_awaits_in_a_thread(caplog: pytest.LogCaptureFixture) -> None:
    """An awaitable is closed, without a warning, and counts as an error of its callback; the log says what to do."""

    async def later() -> str:
        return "never"

    exchange, pipeline = run(IDENTIFY_USER=lambda *_: later(), GET_SESSION_TOKEN=lambda *_: "t")
    assert (exchange.user_id, exchange.session_token) == (None, "t")
    assert pipeline.guard.counts() == {"callback IDENTIFY_USER": 1}
    (line,) = [record.getMessage() for record in caplog.records]
    assert "callback IDENTIFY_USER returned a coroutine, and nothing can await it here" in line
    assert "Make it a plain function" in line


def test_only_coroutines_are_closed() -> None:
    """An object of the user's that can be awaited, and closed, stays as it is: it may be a pool or a client."""
    closed = []

    class Pool:
        def __await__(self) -> Any:
            yield

        def close(self, reason: str) -> None:
            closed.append(reason)

    exchange, pipeline = run(IDENTIFY_USER=lambda *_: Pool(), SKIP=lambda *_: Pool(), GET_SESSION_TOKEN=lambda *_: "t")
    assert (exchange.session_token, exchange.skipped, closed) == ("t", False, [])
    assert pipeline.guard.counts() == {"callback IDENTIFY_USER": 1, "callback SKIP": 1}


class Methods:
    """Callbacks as classes have them."""

    def two(self, app: Any, environ: Any) -> None: ...

    @staticmethod
    def three(app: Any, environ: Any, response_headers: Any) -> None: ...

    def __call__(self, app: Any, environ: Any) -> None: ...


WSGI = (("app", "environ"), ("app", "environ", "response_headers"))


def check(**options: Any) -> None:
    check_signatures(Settings.of({"APPLICATION_ID": "a", **options}), WSGI[0], identify=WSGI[1])


@pytest.mark.parametrize(
    "function",
    [
        lambda app, environ: None,
        lambda app, environ, response_headers: None,
        lambda app, environ, response_headers=None: None,
        lambda *arguments: None,
        lambda app, *arguments, **named: None,
        functools.partial(lambda extra, app, environ: None, 1),
        functools.partial(lambda app, environ, extra: None, extra=1),
        Methods().two,
        Methods.three,
        Methods(),
        max,
        "tests.absent_module:callback",
    ],
)
def test_every_documented_signature_is_taken(function: Any) -> None:
    """Both arities, `partial`, methods, objects with `__call__`; an import path is not imported for it."""
    check(IDENTIFY_USER=function, IDENTIFY_COMPANY=function)


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        (lambda: None, "()"),
        (lambda request: None, r"\(request\)"),
        (lambda a, b, c, d: None, r"\(a, b, c, d\)"),
        (lambda app, environ, *, secret="hunter2": secret, None),
        (lambda app, environ, *, needed: None, r"needed\)"),
        (functools.partial(lambda extra, app, environ: None, 1, 2, 3), "partial"),
        (Methods.two, r"Methods.two\(self, app, environ\)"),
    ],
)
def test_a_wrong_signature_is_told_at_construction(function: Any, shown: str | None) -> None:
    """The message has what it got and the signatures that are expected; no default value is quoted."""
    if shown is None:
        check(SKIP=function)
        return
    if function is not Methods.two:
        with pytest.raises(MoesifConfigError, match=shown) as caught:
            check(IDENTIFY_USER=function)
        assert "takes a function (app, environ) or a function (app, environ, response_headers)" in str(caught.value)
    with pytest.raises(MoesifConfigError, match=r"SKIP: got .*takes a function \(app, environ\)$"):
        check(SKIP=function)
