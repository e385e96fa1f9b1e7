"""The WSGI middleware, end to end: what goes through `MoesifMiddleware` arrives in a sandbox as its users expect."""

from __future__ import annotations

import datetime as dt
import io
import logging
import os
import threading
import traceback
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from moesif_otel import MoesifConfigError, identify
from moesif_otel.sandbox.server import Sandbox
from moesif_otel.wsgi import MoesifMiddleware


@pytest.fixture(scope="module")
def moesif() -> Any:
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(moesif: Sandbox) -> Any:
    moesif.clear()
    return moesif


def echo(environ: dict[str, Any], start_response: Any) -> Any:
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response("200 OK", [("Content-Type", "application/json"), ("X-Api-User", "from-response")])
    return [body or b'{"empty": true}']


def ask(app: Any, path: str = "/items", body: bytes = b"", **environ_values: Any) -> tuple[str, dict[str, str], bytes]:
    """Do what a server does; gives status, headers and body."""
    environ: dict[str, Any] = {"PATH_INFO": path, "REMOTE_ADDR": "10.0.0.9", "HTTP_HOST": "shop.example"}
    setup_testing_defaults(environ)
    if body:
        environ.update(REQUEST_METHOD="POST", CONTENT_LENGTH=str(len(body)), CONTENT_TYPE="application/json")
    environ["wsgi.input"] = io.BytesIO(body)
    environ.update(environ_values)
    told: list[Any] = []
    result = app(environ, lambda status, headers, exc_info=None: told.append((status, headers)))
    try:
        content = b"".join(result)
    finally:
        if hasattr(result, "close"):
            result.close()
    return told[-1][0], dict(told[-1][1]), content


class Service:
    """A middleware on the sandbox; `events` flushes and gives what arrived."""

    def __init__(self, sandbox: Sandbox, app: Any = echo, **options: Any) -> None:
        self.sandbox = sandbox
        self.app = MoesifMiddleware(app, {"APPLICATION_ID": "service", "BASE_URI": sandbox.url, **options})

    def ask(self, *arguments: Any, **values: Any) -> Any:
        return ask(self.app, *arguments, **values)

    def events(self) -> list[dict[str, Any]]:
        assert self.app.force_flush(30_000)
        stats = self.app.stats()
        assert stats["accepted"] == stats["delivered"] + sum(stats["dropped"].values()) + stats["pending"]
        return self.sandbox.events()


def test_a_call_becomes_an_event(sandbox: Sandbox) -> None:
    """URL, verb, headers, bodies, status, address, direction and ids are those of the call."""
    service = Service(sandbox, API_VERSION="1.2")
    _, headers, _ = service.ask("/items/é".encode().decode("latin-1"), b'{"a": 1}', QUERY_STRING="q=1", SCRIPT_NAME="/v1")
    (event,) = service.events()
    assert event["request"]["uri"] == "http://shop.example/v1/items/%C3%A9?q=1"
    assert event["request"]["verb"] == "POST"
    assert event["request"]["api_version"] == "1.2"
    assert event["request"]["ip_address"] == "10.0.0.9"
    assert event["request"]["body"] == {"a": 1}
    assert event["request"]["headers"]["Content-Type"] == "application/json"
    assert event["response"]["status"] == 200
    assert event["response"]["body"] == {"a": 1}
    assert event["response"]["headers"]["X-Api-User"] == "from-response"
    assert event["direction"] == "Incoming"
    assert event["weight"] == 1
    assert event["transaction_id"] == headers["X-Moesif-Transaction-Id"]
    assert len(event["trace_id"]) == 32
    assert len(event["span"]["id"]) == 16
    assert dt.datetime.fromisoformat(event["request"]["time"]) <= dt.datetime.fromisoformat(event["response"]["time"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "APPLICATION_ID: got nothing"),
        ({"APPLICATION_ID": ""}, "APPLICATION_ID: got an empty string"),
        ({"APPLICATION_ID": "a", "BATCH_SIZE": "5"}, "BATCH_SIZE: got '5', takes a whole number"),
        ({"APPLICATION_ID": "a", "BATCH_SIZE": 0}, r"BATCH_SIZE: got 0 \(int\), takes a whole number"),
        ({"APPLICATION_ID": "a", "SKIP": 5}, r"SKIP: got 5 \(int\), takes a callable"),
        ({"APPLICATION_ID": "a", "BASE_URI": "localhost:8765"}, "BASE_URI: got 'localhost:8765'"),
        ({"APPLICATION_ID": "a", "LOG_BODY": "yes"}, "LOG_BODY: got 'yes', takes True or False"),
        ("app-id", "settings: got str, takes a dict"),
    ],
)
def test_wrong_options_are_told_at_construction(settings: Any, message: str) -> None:
    """Each names the option, what it got and what it takes; nothing was started."""
    threads = threading.active_count()
    with pytest.raises(MoesifConfigError, match=message):
        MoesifMiddleware(echo, settings)
    assert threading.active_count() <= threads  # those of earlier tests may end


def test_wrong_arguments_are_told_at_construction() -> None:
    """The application must be callable, the provider a provider."""
    with pytest.raises(MoesifConfigError, match="app: got NoneType"):
        MoesifMiddleware(None, {"APPLICATION_ID": "a"})
    with pytest.raises(MoesifConfigError, match="tracer_provider: got str"):
        MoesifMiddleware(echo, {"APPLICATION_ID": "a"}, tracer_provider="console")  # type: ignore[arg-type]


def test_an_unknown_option_is_a_warning_with_the_nearest_name(caplog: pytest.LogCaptureFixture) -> None:
    """A misspelt option is told and ignored; the root logger stays as it was."""
    handlers = list(logging.getLogger().handlers)
    MoesifMiddleware(echo, {"APPLICATION_ID": "a", "IDENTIFY_USR": None})
    assert "did you mean IDENTIFY_USER?" in caplog.text
    assert logging.getLogger().handlers == handlers


def test_construction_and_import_start_nothing(sandbox: Sandbox) -> None:
    """Threads begin with the first request."""
    before = set(threading.enumerate())
    service = Service(sandbox)
    assert set(threading.enumerate()) <= before  # those of earlier tests may end
    service.ask()
    assert any(thread.name.startswith("moesif-otel") for thread in set(threading.enumerate()) - before)
    service.events()


@pytest.mark.parametrize("arity", [2, 3])
def test_identify_callbacks_of_both_arities(sandbox: Sandbox, arity: int) -> None:
    """`(app, environ)` and `(app, environ, response_headers)` both work, each called once a call."""
    seen: list[tuple[Any, ...]] = []

    def two(app: Any, environ: Any) -> str:
        seen.append((app, environ["PATH_INFO"]))
        return "user-2"

    def three(app: Any, environ: Any, response_headers: Any) -> str:
        seen.append((app, environ["PATH_INFO"]))
        return "user-" + response_headers["X-Api-User"]

    callback = two if arity == 2 else three
    service = Service(
        sandbox,
        IDENTIFY_USER=callback,
        IDENTIFY_COMPANY=callback,
        GET_METADATA=lambda app, environ: {"when": dt.datetime(2026, 1, 2), "path": environ["PATH_INFO"]},
        GET_SESSION_TOKEN=lambda app, environ: "session",
    )
    service.ask()
    (event,) = service.events()
    expected = "user-2" if arity == 2 else "user-from-response"
    assert (event["user_id"], event["company_id"], event["session_token"]) == (expected, expected, "session")
    assert event["metadata"]["path"] == "/items"
    assert "2026-01-02" in event["metadata"]["when"]
    assert seen == [(echo, "/items")] * 2


def test_callbacks_that_raise_cost_their_value_only(sandbox: Sandbox) -> None:
    """The answer and the event go on; each kind is counted; a failing IDENTIFY_USER falls back to the header."""

    def fail(*_: Any) -> Any:
        raise KeyError

    names = ("SKIP", "IDENTIFY_USER", "IDENTIFY_COMPANY", "GET_METADATA", "GET_SESSION_TOKEN")
    service = Service(sandbox, **dict.fromkeys(names, fail))
    assert service.ask(HTTP_AUTHORIZATION="Basic am9lOnNlY3JldA==")[2] == b'{"empty": true}'
    (event,) = service.events()
    assert event["user_id"] == "joe"
    assert "secret" not in str(event)
    assert {f"callback {name}" for name in names} <= set(service.app.stats()["errors"])


def test_skip(sandbox: Sandbox) -> None:
    """A skipped call is answered, counted and not delivered."""
    service = Service(sandbox, SKIP=lambda app, environ: "health" in environ["PATH_INFO"])
    assert service.ask("/health")[2] == b'{"empty": true}'
    service.ask("/items")
    (event,) = service.events()
    assert event["request"]["uri"].endswith("/items")
    assert service.app.stats()["skipped"] == 1


@pytest.mark.parametrize(
    ("outcome", "reason"), [("raises", "mask_failed"), ("none", "masked_away"), ("wrong", "mask_failed")]
)
def test_a_mask_that_fails_drops_the_event(sandbox: Sandbox, outcome: str, reason: str) -> None:
    """Nothing leaves unmasked: raising and another type drop the event, None skips it, each counted."""

    def mask(event: Any) -> Any:
        if "keep" in event.request.uri:
            event.response.body["secret"] = "hidden"
            return event
        if outcome == "raises":
            raise RuntimeError
        return None if outcome == "none" else {"not": "an event"}

    service = Service(sandbox, MASK_EVENT_MODEL=mask)
    service.ask("/drop", b'{"secret": 1}')
    service.ask("/keep", b'{"secret": 1}')
    (event,) = service.events()
    assert event["response"]["body"] == {"secret": "hidden"}
    assert service.app.stats()["dropped"] == {reason: 1}


def test_log_body_false_and_caps(sandbox: Sandbox) -> None:
    """Without LOG_BODY no body leaves; a cap keeps the first part and tells the true size."""
    without = Service(sandbox, LOG_BODY=False)
    without.ask(body=b'{"a": 1}')
    without.events()
    service = Service(sandbox, REQUEST_MAX_BODY_SIZE=4, RESPONSE_MAX_BODY_SIZE=5)
    service.ask(body=b"0123456789")
    events = {"cap" if "body" in event["request"] else "none": event for event in service.events()}
    assert "body" not in events["none"]["response"]
    ours = events["cap"]["metadata"]["moesif_otel"]
    for side, kept in (("request", 4), ("response", 5)):
        assert ours[f"{side}_body"]["size_bytes"] == 10
        assert ours[f"{side}_body"]["truncated"] is True
        assert len(events["cap"][side]["body"]) == (kept + 2) // 3 * 4


def test_identify_inside_a_request(sandbox: Sandbox) -> None:
    """What `identify` says wins over the callbacks; metadata is merged under it; outside a request it does nothing."""

    def app(environ: Any, start_response: Any) -> Any:
        identify(user_id="said", metadata={"plan": "gold"})
        identify(company_id="acme", metadata={"seats": 3})
        return echo(environ, start_response)

    identify(user_id="nobody")
    service = Service(
        sandbox, app, IDENTIFY_USER=lambda *_: "callback", GET_METADATA=lambda *_: {"plan": "from callback", "more": 1}
    )
    service.ask()
    (event,) = service.events()
    assert (event["user_id"], event["company_id"]) == ("said", "acme")
    assert event["metadata"] == {"plan": "gold", "seats": 3, "more": 1}


def test_debug_says_where_an_identity_came_from(sandbox: Sandbox) -> None:
    """A developer sees in each event who said it: code, a callback, a span, or the request's credential; else nobody."""

    def app(environ: Any, start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        if path == "/said":
            identify(user_id="mary", session_token="t")
        elif path == "/span":
            trace.get_current_span().set_attribute("user.id", "joe")
        return echo(environ, start_response)

    def session(_app: Any, environ: Any) -> Any:
        return "s" if environ["PATH_INFO"] == "/called" else None

    options = {"IDENTIFY_COMPANY": lambda *_: "acme", "GET_SESSION_TOKEN": session}
    for debug in (True, False):
        sandbox.clear()
        service = Service(sandbox, app, DEBUG=debug, REQUEST_BODY_MASKS=["pin"], **options)
        service.app = MoesifMiddleware(app, service.app.settings, tracer_provider=TracerProvider(shutdown_on_exit=False))
        service.ask("/said")
        service.ask("/called")
        service.ask("/span")
        service.ask("/header", HTTP_AUTHORIZATION="Basic YW5uOnRoZSBwYXNzd29yZA==")
        found = {event["request"]["uri"].rpartition("/")[2]: event for event in service.events()}
        users = {name: event.get("user_id") for name, event in found.items()}
        assert users == {"said": "mary", "called": None, "span": "joe", "header": "ann"}
        sources = {name: event.get("metadata", {}).get("moesif_otel", {}).get("identity") for name, event in found.items()}
        masks = [event.get("metadata", {}).get("moesif_otel", {}).get("masks") for event in found.values()]
        assert masks == [{"REQUEST_BODY_MASKS": ["pin"]} if debug else None] * 4
        of_company = {"company_id": "IDENTIFY_COMPANY"}
        assert sources == (
            {
                "said": {"user_id": "identify()", **of_company, "session_token": "identify()"},
                "called": {**of_company, "session_token": "GET_SESSION_TOKEN"},
                "span": {"user_id": "span attribute", **of_company},
                "header": {"user_id": "credential in a request header", **of_company},
            }
            if debug
            else dict.fromkeys(found)
        )


def test_two_application_ids_stay_apart(sandbox: Sandbox) -> None:
    """Two middlewares in a process, one of them around the other: each id has its calls, each with its own identity."""
    one = Service(sandbox, APPLICATION_ID="one", IDENTIFY_USER=lambda *_: "u1")
    two = Service(sandbox, one.app, APPLICATION_ID="two", IDENTIFY_USER=lambda *_: "u2")
    one.ask("/a")
    two.ask("/b")
    one.events()
    two.events()
    found = {
        name: sorted((event["request"]["uri"][-2:], event["user_id"]) for event in sandbox.events(application_id=name))
        for name in ("one", "two")
    }
    assert found == {"one": [("/a", "u1"), ("/b", "u1")], "two": [("/b", "u2")]}
    ids = [event["transaction_id"] for event in sandbox.events()]
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("0f8fad5b-d9cb-469f-a165-70867728950e", True),
        (" 0F8FAD5B-D9CB-469F-A165-70867728950E", True),
        ("0f8fad5b-d9cb-469f-a165-7086772895_e", False),
        ("not-a-uuid", False),
        ("x" * 36, False),
        ("", False),
    ],
)
def test_an_incoming_transaction_id_is_kept_if_it_is_a_uuid(sandbox: Sandbox, given: str, kept: bool) -> None:
    """The header answers with the event's id in every case; what a client says counts where that is asked for."""
    service = Service(sandbox, ACCEPT_TRANSACTION_ID=True)
    _, headers, _ = service.ask(HTTP_X_MOESIF_TRANSACTION_ID=given)
    (event,) = service.events()
    assert headers["X-Moesif-Transaction-Id"] == event["transaction_id"]
    assert (event["transaction_id"] == given.strip()) is kept


def test_a_client_chooses_no_transaction_id(sandbox: Sandbox) -> None:
    """Without ACCEPT_TRANSACTION_ID an incoming id says nothing: with it a client could evade metering."""
    service = Service(sandbox)
    given = "0f8fad5b-d9cb-469f-a165-70867728950e"
    _, headers, _ = service.ask(HTTP_X_MOESIF_TRANSACTION_ID=given)
    (event,) = service.events()
    assert headers["X-Moesif-Transaction-Id"] == event["transaction_id"] != given


def test_a_disabled_transaction_id_is_not_told(sandbox: Sandbox) -> None:
    """DISABLED_TRANSACTION_ID leaves the response as it is."""
    service = Service(sandbox, DISABLED_TRANSACTION_ID=True)
    assert "X-Moesif-Transaction-Id" not in service.ask()[1]
    assert len(service.events()) == 1


def test_an_exception_passes_with_its_own_traceback(sandbox: Sandbox) -> None:
    """What the server logs shows the application's frames once, and nothing of how we told the span."""

    def app(environ: Any, start_response: Any) -> Any:
        raise ValueError("of the application")

    service = Service(sandbox, app)
    with pytest.raises(ValueError, match="of the application") as caught:
        service.ask()
    files = [os.path.basename(frame.filename) for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "wsgi_span.py" not in files
    assert not any("opentelemetry" in frame.filename for frame in traceback.extract_tb(caught.value.__traceback__))
    assert caught.value.__context__ is None
    (event,) = service.events()
    assert event["response"]["status"] == 500
    assert event["metadata"]["moesif_otel"]["error_type"] == "ValueError"


def test_a_spans_ids_and_attributes_decorate_the_event(sandbox: Sandbox) -> None:
    """On a provider that was given, the SERVER span is the application's to see, and the event carries its ids."""
    spans = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))

    def app(environ: Any, start_response: Any) -> Any:
        trace.get_current_span().set_attribute("shop.cart", 5)
        return echo(environ, start_response)

    middleware = MoesifMiddleware(app, {"APPLICATION_ID": "service", "BASE_URI": sandbox.url}, tracer_provider=provider)
    # A framework's instrumentor that some other test imported would keep us from making a span.
    from moesif_otel._capture.wsgi import span as wsgi_span

    loaded, wsgi_span.WsgiServerSpans.instrumentations = wsgi_span.WsgiServerSpans.instrumentations, ()
    try:
        ask(middleware, body=b'{"password": "p"}')
    finally:
        wsgi_span.WsgiServerSpans.instrumentations = loaded
    assert middleware.force_flush(30_000)
    (event,) = sandbox.events()
    (span,) = spans.get_finished_spans()
    assert event["trace_id"] == f"{span.context.trace_id:032x}"
    assert event["span"]["id"] == f"{span.context.span_id:016x}"
    assert "shop.cart" in str(event["metadata"])
    assert not any("body" in key for key in span.attributes)


def test_after_shutdown_the_application_is_served_on(sandbox: Sandbox) -> None:
    """Calls after `shutdown` pass straight through: no callback, no span, no tee, no header, nothing counted."""
    service = Service(sandbox)
    service.ask()
    service.app.shutdown()
    assert service.ask()[2] == b'{"empty": true}'
    stats = service.app.stats()
    assert (stats["accepted"], stats["delivered"], stats["dropped"]) == (1, 1, {})
    assert "X-Moesif-Transaction-Id" not in service.ask()[1]
    assert len(sandbox.events()) == 1


def test_a_call_that_a_shutdown_ends_before_its_headers_is_answered_without_an_error(sandbox: Sandbox) -> None:
    """It has left as `unfinished`; the id header that its answer still gets is that of the event."""

    def app(environ: Any, start_response: Any) -> Any:
        service.app.shutdown()
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"served"]

    service = Service(sandbox, app)
    _status, headers, body = service.ask()
    assert body == b"served"
    assert headers["X-Moesif-Transaction-Id"] == sandbox.events()[0]["transaction_id"]
    assert service.app.stats()["errors"] == {}


def test_a_callback_that_waits_does_not_delay_a_shutdown(sandbox: Sandbox) -> None:
    """A call that a shutdown ends is sent in time, without the answers of its callbacks if these take too long."""
    go_on, answers = threading.Event(), []

    def identify_user(app: Any, environ: dict[str, Any]) -> str:
        go_on.wait(30)
        answers.append("late")
        return "late"

    def stream(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return iter([b"one", b"two"])

    service = Service(sandbox, stream, IDENTIFY_USER=identify_user)
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    result = iter(service.app(environ, lambda *_: None))
    assert next(result) == b"one"
    service.app.shutdown(1_000)
    assert answers == []
    go_on.set()
    assert service.app.stats()["accepted"] == 1
    assert all("user_id" not in event for event in sandbox.events())


def test_an_open_stream_is_told_as_unfinished_at_shutdown(sandbox: Sandbox) -> None:
    """A stream that runs while the process ends is an event with what it had sent."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "application/json")])
        yield b'{"part": 1}'
        yield b"never sent"

    service = Service(sandbox, app)
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    stream = iter(service.app(environ, lambda *_: None))
    assert next(stream) == b'{"part": 1}'
    service.app.shutdown()
    (event,) = sandbox.events()
    assert event["metadata"]["moesif_otel"]["outcome"] == "unfinished"
    assert event["response"]["body"] == {"part": 1}
    assert next(stream) == b"never sent"
    stream.close()
    assert len(sandbox.events()) == 1


def test_a_hundred_threads(sandbox: Sandbox) -> None:
    """Calls from many threads at once are each delivered once, with their own bodies and identities."""
    service = Service(sandbox, IDENTIFY_USER=lambda app, environ: environ["QUERY_STRING"])

    def run(number: int) -> None:
        for turn in range(5):
            service.ask(body=b'{"n": %d}' % number, QUERY_STRING=f"n={number}&turn={turn}")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = service.events()
    assert len(events) == len({event["transaction_id"] for event in events}) == 500
    assert all(event["user_id"].startswith(f"n={event['request']['body']['n']}&") for event in events)


async def asgi_function(scope: Any, receive: Any, send: Any) -> None: ...


class AsgiClass:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...


class AsgiFactory:
    """As an application object whose `__call__` returns a coroutine of another method."""

    def __call__(self, scope: Any, receive: Any, send: Any) -> Any: ...


@pytest.mark.parametrize("app", [asgi_function, AsgiClass(), AsgiFactory()])
def test_an_asgi_application_is_refused_with_what_to_use(app: Any) -> None:
    """Wrapped as WSGI, every request would be a 500."""
    with pytest.raises(MoesifConfigError, match=r"moesif_otel\.asgi\.MoesifMiddleware"):
        MoesifMiddleware(app, {"APPLICATION_ID": "a"})


def own_spans(provider: TracerProvider, *, untraced: str) -> Any:
    """An application whose own instrumentation, deep inside, leaves one path out."""
    from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware

    traced = OpenTelemetryMiddleware(echo, tracer_provider=provider)

    def app(environ: Any, start_response: Any) -> Any:
        return (echo if environ["PATH_INFO"] == untraced else traced)(environ, start_response)

    return app


@pytest.fixture
def global_provider(monkeypatch: pytest.MonkeyPatch) -> Any:
    from moesif_otel._capture.wsgi import span as wsgi_span

    monkeypatch.setattr(wsgi_span.WsgiServerSpans, "instrumentations", ())
    provider = TracerProvider(shutdown_on_exit=False)
    provider.finished = InMemorySpanExporter()  # type: ignore[attr-defined]
    provider.add_span_processor(SimpleSpanProcessor(provider.finished))  # type: ignore[attr-defined]
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return provider


def test_one_untraced_call_changes_no_other(sandbox: Sandbox, global_provider: Any) -> None:
    """A health check that is not traced, or a caller's B3 `sampled=0`, says nothing of other calls' spans."""
    service = Service(sandbox, own_spans(global_provider, untraced="/health"))
    service.ask("/health")
    service.ask("/health", HTTP_X_B3_SAMPLED="0")
    for _ in range(3):
        service.ask("/items")
        service.ask("/health")
    finished = global_provider.finished.get_finished_spans()
    served = [span for span in finished if "items" in str(span.attributes)]
    assert len(served) == 3
    assert {(span.kind, span.parent) for span in served} == {(trace.SpanKind.SERVER, None)}
    assert len(service.events()) == 8


def test_an_instrumentation_around_us_is_seen_from_the_first_call_on(sandbox: Sandbox, global_provider: Any) -> None:
    """Its span has begun when we look for a provider; of two application ids both see that it is this call's."""
    from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware

    one = Service(sandbox, APPLICATION_ID="one")
    two = Service(sandbox, one.app, APPLICATION_ID="two")
    app = OpenTelemetryMiddleware(two.app, tracer_provider=global_provider)
    for _ in range(2):
        ask(app)
    one.events()
    two.events()
    spans = sorted(f"{span.context.span_id:016x}" for span in global_provider.finished.get_finished_spans())
    for name in ("one", "two"):
        assert sorted(event["span"]["id"] for event in sandbox.events(application_id=name)) == spans


def test_a_provider_that_is_set_up_after_the_first_calls(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A health check may come first; our thread looks for the provider meanwhile, no call does."""
    provider = TracerProvider(shutdown_on_exit=False)
    service = Service(sandbox, own_spans(provider, untraced="/health"))
    service.ask("/health")
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    service.app._pipeline.housekeeping()
    finished = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(finished))
    service.ask("/items")
    (span,) = finished.get_finished_spans()
    ids = {event["request"]["uri"][-6:]: event["span"]["id"] for event in service.events()}
    assert ids["/items"] == f"{span.context.span_id:016x}"


def test_a_span_is_made_where_nobody_else_makes_one(sandbox: Sandbox, global_provider: Any) -> None:
    """On a global provider: for a path that has shown it at once, for every other after some paths have."""
    service = Service(sandbox)
    service.ask("/a")
    assert not global_provider.finished.get_finished_spans()
    service.ask("/a")
    assert len(global_provider.finished.get_finished_spans()) == 1
    for number in range(20):
        service.ask(f"/items/{number}")
    assert 8 <= len(global_provider.finished.get_finished_spans()) < 20
    assert len(service.events()) == 22


@pytest.mark.parametrize("given", [True, False])
def test_processors_in_threads_of_their_own(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, given: bool) -> None:
    """With the SDK's `ConcurrentMultiSpanProcessor` each call is one event with the ids of its span, sent once."""
    from opentelemetry.sdk.trace import ConcurrentMultiSpanProcessor
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from moesif_otel import MoesifSpanExporter
    from moesif_otel._capture.wsgi import span as wsgi_span

    monkeypatch.setattr(wsgi_span.WsgiServerSpans, "instrumentations", ())
    concurrent = ConcurrentMultiSpanProcessor(4)
    provider = TracerProvider(shutdown_on_exit=False, active_span_processor=concurrent)
    exporter = MoesifSpanExporter(application_id="service", base_uri=sandbox.url)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    finished = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(finished))
    app = echo if given else own_spans(provider, untraced="")
    middleware = MoesifMiddleware(
        app, {"APPLICATION_ID": "service", "BASE_URI": sandbox.url}, tracer_provider=provider if given else None
    )
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    for _ in range(3):
        ask(middleware)
    assert middleware.force_flush(30_000)
    provider.force_flush()
    exporter.force_flush(30_000)
    spans = {f"{span.context.span_id:016x}" for span in finished.get_finished_spans()}
    assert len(spans) == 3
    assert sorted(event["span"]["id"] for event in sandbox.events()) == sorted(spans)
    provider.shutdown()
    concurrent._executor.shutdown()
