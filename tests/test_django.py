"""The Django middleware: under WSGI, ASGI and the test clients; what Django knows is in the event, and nothing changes."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
import time
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

import django
import pytest

from tests.servers import django_project  # configures Django

from django.core.handlers.asgi import ASGIHandler  # isort: skip
from django.core.handlers.wsgi import WSGIHandler  # isort: skip
from django.test import AsyncClient, Client, override_settings  # isort: skip

from moesif_otel.django import MoesifMiddleware
from moesif_otel.errors import MoesifConfigError
from moesif_otel.sandbox import Sandbox
from moesif_otel.wsgi import MoesifMiddleware as WsgiMiddleware
from tests.capture.asgi.driver import DISCONNECT, Connection, http_scope, request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OURS = django_project.OURS
BOUNDARY = b"xyz"
FORM = (
    b'--xyz\r\nContent-Disposition: form-data; name="field"\r\n\r\nvalue\r\n'
    b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + bytes(3000) + b"\r\n--xyz--\r\n"
)


@pytest.fixture(scope="module")
def moesif() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(moesif: Sandbox) -> Sandbox:
    for pipeline in _pipelines():  # what earlier tests did not wait for
        pipeline.force_flush(5)
    moesif.clear()
    return moesif


class Site:
    """A project under one protocol; `ask` gives status, headers and body as a client gets them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.app: Any = WSGIHandler() if kind == "wsgi" else ASGIHandler()

    def ask(self, path: str, body: bytes = b"", content_type: str = "application/json", **headers: str) -> Any:
        return self.wsgi(path, body, content_type, headers) if self.kind == "wsgi" else self.asgi(path, body, content_type, headers)

    def wsgi(self, path: str, body: bytes, content_type: str, headers: dict[str, str]) -> Any:
        environ: dict[str, Any] = {"PATH_INFO": path, "HTTP_HOST": "shop.example", "REMOTE_ADDR": "10.0.0.9"}
        if body:
            environ.update(REQUEST_METHOD="POST", CONTENT_LENGTH=str(len(body)), CONTENT_TYPE=content_type)
        environ.update({f"HTTP_{name.upper()}": value for name, value in headers.items()})
        environ["wsgi.input"] = io.BytesIO(body)
        setup_testing_defaults(environ)
        told: list[Any] = []
        result = self.app(environ, lambda status, fields, exc_info=None: told.append((status, fields)))
        content = b"".join(result)
        if hasattr(result, "close"):
            result.close()
        status, fields = told[-1]
        return int(status[:3]), sorted((name.lower(), value) for name, value in fields), content

    def asgi(self, path: str, body: bytes, content_type: str, headers: dict[str, str]) -> Any:
        fields = [(b"host", b"shop.example"), *((name.replace("_", "-").encode(), value.encode()) for name, value in headers.items())]
        if body:
            fields += [(b"content-type", content_type.encode()), (b"content-length", b"%d" % len(body))]
        scope = http_scope("POST" if body else "GET", path, headers=fields)
        connection = asyncio.run(Connection(request(body)).serve(self.app, scope))
        start, *rest = connection.sent
        content = b"".join(message.get("body", b"") for message in rest)
        return start["status"], sorted((name.decode().lower(), value.decode()) for name, value in start["headers"]), content


@pytest.fixture(params=["wsgi", "asgi"])
def site(request: pytest.FixtureRequest, sandbox: Sandbox) -> Iterator[Callable[..., Site]]:
    """Make the project with our middleware and some options; what is pending is delivered at the end."""
    overrides: list[Any] = []

    def make(*before: str, **options: Any) -> Site:
        middleware = [*(before or django_project.BEFORE), OURS]
        settings = django_project.moesif_options(BASE_URI=sandbox.url, **options)
        overrides.append(override_settings(MIDDLEWARE=middleware, MOESIF_MIDDLEWARE=settings))
        overrides[-1].enable()
        return Site(request.param)

    yield make
    for one in overrides:
        one.disable()


def bare(kind: str) -> Site:
    with override_settings(MIDDLEWARE=list(django_project.BEFORE)):
        return Site(kind)


CASES: dict[str, Any] = {
    "json": ("/items/7", b'{"a": 1}'),
    "async view": ("/async/items/7", b'{"a": 1}'),
    "upload": ("/upload", FORM, "multipart/form-data; boundary=xyz"),
    "request.read": ("/read", b"0123456789" * 10, "text/plain"),
    "no body": ("/items/7",),
    "boom": ("/boom",),
    "404 of a view": ("/missing",),
    "404": ("/nowhere",),
    "stream": ("/stream",),
    "async stream": ("/stream_async",),
    "file": ("/file",),
    "long": ("/long",),
    "304": ("/fresh",),
    "redirect": ("/items/7/",),
}


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")
@pytest.mark.parametrize("case", CASES)
def test_a_client_gets_what_it_would_get_without_us(site: Any, sandbox: Sandbox, case: str) -> None:
    """Status, headers and body are the same, and the event has them."""
    arguments = CASES[case]
    ours = site()
    plain = bare(ours.kind)
    expected = plain.ask(*arguments)
    assert ours.ask(*arguments) == expected
    (event,) = sandbox.wait_for_events(1)
    status, headers, _content = expected
    assert event["response"]["status"] == status
    assert event["request"]["uri"] == f"http://shop.example{arguments[0]}"
    assert {name.lower() for name in event["response"]["headers"]} == {name for name, _ in headers}
    if case == "json":
        assert event["request"]["body"] == {"a": 1}
        assert event["response"]["body"] == {"number": 7, "got": {"a": 1}}
        assert event["metadata"]["moesif_otel"]["route"] == "items/<int:number>"
        assert event["response"]["headers"]["Set-Cookie"].count("=") > 2
    assert ("error_type" in event.get("metadata", {}).get("moesif_otel", {})) == (case == "boom")


def test_compressed_answers_are_recorded_as_they_leave(site: Any, sandbox: Sandbox) -> None:
    """By a middleware outside of ours; the event has the text."""
    ours = site()
    _status, headers, content = ours.ask("/long", accept_encoding="gzip")
    assert ("content-encoding", "gzip") in headers
    assert len(content) < 5000
    (event,) = sandbox.wait_for_events(1)
    assert {name.lower(): value for name, value in event["response"]["headers"].items()}["content-encoding"] == "gzip"


def test_callbacks_take_djangos_request_and_response(site: Any, sandbox: Sandbox) -> None:
    """With the view's answer in them."""
    ours = site(
        SKIP=lambda request, response: request.path == "/long",
        IDENTIFY_USER=lambda request, response: request.headers["x-user"],
        IDENTIFY_COMPANY=lambda request, response: f"{response.status_code} {response.content.decode()}",
        GET_METADATA=lambda request, response: {"route": request.resolver_match.route},
        GET_SESSION_TOKEN=lambda request, response: "token",
    )
    ours.ask("/long", x_user="john")
    ours.ask("/items/7", b"1", x_user="mary")
    (event,) = sandbox.wait_for_events(1)
    assert (event["user_id"], event["company_id"]) == ("mary", '201 {"number": 7, "got": 1}')
    assert event["metadata"]["route"] == "items/<int:number>"


def test_async_callbacks_are_awaited_under_asgi(sandbox: Sandbox) -> None:
    """Plain ones run in a thread, where models may be used; coroutine functions are awaited."""

    async def identify_user(request: Any, response: Any) -> str:
        await asyncio.sleep(0.01)
        return "mary"

    def identify_company(request: Any, response: Any) -> str:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return "acme"

    options = django_project.moesif_options(BASE_URI=sandbox.url, IDENTIFY_USER=identify_user, IDENTIFY_COMPANY=identify_company)
    with override_settings(MIDDLEWARE=[OURS], MOESIF_MIDDLEWARE=options):
        Site("asgi").ask("/async/items/7", b"1")
    (event,) = sandbox.wait_for_events(1)
    assert (event["user_id"], event["company_id"]) == ("mary", "acme")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="nobody can tell it from a cancellation of the call's task")
def test_a_cancelled_task_of_a_callback_cancels_no_call(sandbox: Sandbox) -> None:
    """It is an error of the callback's; a call that is cancelled itself stays so."""

    async def cancelled(request: Any, response: Any) -> Any:
        task = asyncio.ensure_future(asyncio.sleep(3600))
        asyncio.get_running_loop().call_soon(task.cancel)
        await task

    options = django_project.moesif_options(BASE_URI=sandbox.url, IDENTIFY_USER=cancelled, IDENTIFY_COMPANY=lambda request, response: "c")
    with override_settings(MIDDLEWARE=[*django_project.BEFORE, OURS], MOESIF_MIDDLEWARE=options):
        assert Site("asgi").ask("/items/7")[0] == 201
    (event,) = sandbox.wait_for_events(1)
    assert event["company_id"] == "c"


def test_a_failing_callback_harms_nothing(site: Any, sandbox: Sandbox) -> None:
    """The answer and the rest of the event are there."""

    def fails(request: Any, response: Any) -> str:
        raise LookupError

    ours = site(IDENTIFY_USER=fails, SKIP=fails, IDENTIFY_COMPANY=lambda request, response: "acme")
    assert ours.ask("/items/7", b"1")[0] == 201
    (event,) = sandbox.wait_for_events(1)
    assert event["company_id"] == "acme"


def test_the_user_is_taken_where_the_application_has_looked_it_up(site: Any, sandbox: Sandbox) -> None:
    """And the session by a token that is not its key: whoever has that has the session."""
    ours = site("django.contrib.sessions.middleware.SessionMiddleware")
    ours.ask("/login")
    (event,) = sandbox.wait_for_events(1)
    assert event["user_id"] == "mary"


def test_a_user_that_nobody_asked_for_is_not_looked_up(site: Any, sandbox: Sandbox) -> None:
    """Looking it up would vary every page by its cookie."""
    ours = site(
        "django.contrib.sessions.middleware.SessionMiddleware", "tests.servers.django_project.lazy_user"
    )
    _, headers, _ = ours.ask("/items/7", b"1")
    assert "vary" not in dict(headers)
    (event,) = sandbox.wait_for_events(1)
    assert "user_id" not in event


def test_an_answer_of_an_outer_middleware_is_captured(site: Any, sandbox: Sandbox) -> None:
    """Callbacks get a request and a bare response there."""
    ours = site(IDENTIFY_USER=lambda request, response: f"{request.get_host()} {response.status_code}")
    with override_settings(SECURE_SSL_REDIRECT=True):
        redirecting = Site(ours.kind)
    assert redirecting.ask("/items/7")[0] == 301
    (event,) = sandbox.wait_for_events(1)
    assert event["response"]["status"] == 301
    assert event["user_id"] == "shop.example 301"


def test_middlewares_may_name_what_they_call(site: Any, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one answers by itself is captured, even if only the inside of it leads to our middleware."""
    ours = site("tests.servers.django_project.Gate", *django_project.BEFORE)
    assert ours.ask("/items/7", b"1")[0] == 201
    monkeypatch.setattr(django_project.Gate, "turn_away", True)
    assert ours.ask("/items/7", b"1")[::2] == (429, b'{"full": true}')
    events = sandbox.wait_for_events(2)
    assert [(event["response"]["status"], event["response"]["body"]) for event in events] == [(201, {"number": 7, "got": 1}), (429, {"full": True})]


@pytest.mark.skipif(django.VERSION < (5, 0), reason="Django 4.2 does not look whether the client is there")
def test_a_client_that_leaves_before_our_turn_is_one_event(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of a synchronous middleware goes on, through our middleware too."""
    came, left, went_on = threading.Event(), threading.Event(), threading.Event()

    class Leaving(Connection):
        async def receive(self) -> dict[str, Any]:
            message = await super().receive()
            if message is DISCONNECT:
                assert await asyncio.to_thread(came.wait, 10)
                asyncio.get_running_loop().call_soon(left.set)
            return message

    def wait() -> None:
        came.set()
        assert left.wait(10)
        went_on.set()

    monkeypatch.setattr(django_project.Gate, "wait", wait)
    seen: list[Any] = []
    options = django_project.moesif_options(
        BASE_URI=sandbox.url, IDENTIFY_USER=lambda request, response: seen.append(response.status_code) or "mary"
    )
    with override_settings(MIDDLEWARE=["tests.servers.django_project.Gate", OURS], MOESIF_MIDDLEWARE=options):
        handler: Any = ASGIHandler()

        async def serve() -> None:
            await Leaving(request(), DISCONNECT).serve(handler, http_scope(path="/async/items/7"))
            assert await asyncio.to_thread(went_on.wait, 10)
            while len(asyncio.all_tasks()) > 1:  # noqa: ASYNC110 - what a thread ends, nobody tells
                await asyncio.sleep(0.01)

        asyncio.run(serve())
        for pipeline in _pipelines():
            assert pipeline.force_flush(5)
    (event,) = sandbox.events()
    assert event["metadata"]["moesif_otel"]["outcome"] == "client_aborted"
    assert len(seen) == 1


def test_the_transaction_id_is_told_unless_disabled(site: Any, sandbox: Sandbox) -> None:
    """In the drop-in's header; it is the event's."""
    ours = site(DISABLED_TRANSACTION_ID=False)
    headers = dict(ours.ask("/items/7")[1])
    (event,) = sandbox.wait_for_events(1)
    assert headers["x-moesif-transaction-id"] == event["transaction_id"]


def test_header_names_are_those_of_the_package_that_is_replaced(site: Any, sandbox: Sandbox) -> None:
    """Moesifdjango's masks look for `X-USER`."""

    def mask(event: Any) -> Any:
        event.request.headers["X-USER"] = "masked"
        return event

    site(MASK_EVENT_MODEL=mask).ask("/items/7", x_user="mary")
    (event,) = sandbox.wait_for_events(1)
    assert {name: value for name, value in event["request"]["headers"].items() if name.lower() == "x-user"} == {"X-USER": "masked"}


# Governance.


@pytest.fixture
def governed(site: Any, sandbox: Sandbox) -> Iterator[Any]:
    def make(rule: dict[str, Any], **options: Any) -> Site:
        sandbox.put_rules([{"_id": "rule-1", "type": "regex", "state": 2, "block": True, "name": "r", **rule}])
        ours = site(API_VERSION=str(time.monotonic_ns()), **options)
        pipeline = _pipelines()[-1]
        ours.ask("/long")
        deadline = time.monotonic() + 30
        while not pipeline.has_rules:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        sandbox.wait_for_events(1)
        sandbox.clear()
        return ours

    yield make
    sandbox.put_rules([])


def _pipelines() -> list[Any]:
    from moesif_otel import django

    return list(django._shared.values())


def test_a_blocked_call_does_not_reach_the_view(governed: Any, sandbox: Sandbox) -> None:
    """The rule's answer, through the outer middlewares; the event says which rule."""
    ours = governed(
        {
            "regex_config": [{"conditions": [{"path": "request.route", "value": "/boom"}]}],
            "response": {"status": 429, "headers": {"X-Quota": "none"}, "body": {"error": "quota"}},
        }
    )
    status, headers, content = ours.ask("/boom")
    assert (status, content) == (429, b'{"error":"quota"}')
    assert {"x-quota": "none", "content-type": "application/json", "referrer-policy": "same-origin"}.items() <= dict(headers).items()
    (event,) = sandbox.wait_for_events(1)
    assert (event["blocked_by"], event["response"]["status"], event["response"]["body"]) == ("rule-1", 429, {"error": "quota"})


def test_a_body_rule_leaves_the_body_to_the_view(governed: Any, sandbox: Sandbox) -> None:
    """`request.body` is read for it, and read again by the view; headers of a rule that blocks nothing are added."""
    ours = governed(
        {
            "block": False,
            "regex_config": [{"conditions": [{"path": "request.body.plan", "value": "free"}]}],
            "response": {"headers": {"X-Plan": "free"}},
        }
    )
    status, headers, content = ours.ask("/items/7", b'{"plan": "free"}')
    assert (status, dict(headers)["x-plan"], content) == (201, "free", b'{"number": 7, "got": {"plan": "free"}}')
    assert "x-plan" not in dict(ours.ask("/items/7", b'{"plan": "paid"}')[1])


def test_a_rule_about_unreadable_bodies_leaves_calls_without_a_body_alone(governed: Any) -> None:
    """A body that is too long, or that Django itself refuses to read, is one that it can block."""
    ours = governed(
        {
            "regex_config": [{"conditions": [{"path": "request.body.$unreadable", "value": "too_large"}]}],
            "response": {"status": 413},
        },
        REQUEST_MAX_BODY_SIZE=50,
    )
    assert ours.ask("/long")[0] == 200
    assert ours.ask("/items/7", b'{"a": 1}')[0] == 201
    assert ours.ask("/items/7", b'{"a": "' + b"x" * 50 + b'"}')[0] == 413
    with override_settings(DATA_UPLOAD_MAX_MEMORY_SIZE=5):
        assert ours.ask("/items/7", b'{"a": 1}')[0] == 413


def test_a_body_that_was_not_announced_is_seen_by_rules(governed: Any) -> None:
    """HTTP/2 needs no Content-Length; under WSGI the view gets no such body either."""
    ours = governed(
        {
            "regex_config": [{"conditions": [{"path": "request.body.plan", "value": "free"}]}],
            "response": {"status": 402},
        }
    )
    if ours.kind == "wsgi":
        return
    headers = [(b"host", b"shop.example"), (b"content-type", b"application/json")]
    for body, status in ((b'{"plan": "free"}', 402), (b'{"plan": "paid"}', 201)):
        scope = http_scope("POST", "/items/7", headers=headers, http_version="2")
        connection = asyncio.run(Connection(request(body)).serve(ours.app, scope))
        assert connection.sent[0]["status"] == status


def test_an_identity_rule_asks_callbacks_before_the_view(governed: Any, sandbox: Sandbox) -> None:
    """With no response; unidentified callers are asked again after it."""
    seen: list[Any] = []

    def who(request: Any, response: Any) -> Any:
        seen.append(response and response.status_code)
        return request.headers.get("x-user")

    sandbox.put_config({"user_rules": {"mary": [{"rules": "rule-1"}]}})
    ours = governed({"type": "user", "applied_to": "matching", "response": {"status": 403, "body": "no"}}, IDENTIFY_USER=who)
    seen.clear()
    assert ours.ask("/items/7", x_user="mary")[0] == 403
    assert ours.ask("/items/7")[0] == 201
    assert seen == [None, None, 201]
    sandbox.put_config({})


# One event, whoever else is there.


def test_a_wsgi_middleware_around_it_makes_no_second_event(sandbox: Sandbox) -> None:
    """Of the same application id; it captures, and what Django knows is in its event."""
    options = django_project.moesif_options(BASE_URI=sandbox.url, IDENTIFY_USER=lambda request, response: request.path)
    with override_settings(MIDDLEWARE=[OURS], MOESIF_MIDDLEWARE=options):
        site = Site("wsgi")
        outer = {name: value for name, value in options.items() if not name.startswith("IDENTIFY")}
        site.app = WsgiMiddleware(site.app, outer)
        assert site.ask("/items/7", b"1")[0] == 201
        assert site.app.force_flush()
    (event,) = sandbox.events()
    assert event["user_id"] == "/items/7"
    assert event["metadata"]["moesif_otel"]["route"] == "items/<int:number>"
    site.app.shutdown()


def test_test_clients_are_captured(sandbox: Sandbox) -> None:
    """Without a handler of a server: off the request and its response."""
    options = django_project.moesif_options(BASE_URI=sandbox.url, IDENTIFY_USER=lambda request, response: request.path)
    with override_settings(MIDDLEWARE=[OURS], MOESIF_MIDDLEWARE=options):
        answer = Client().post("/items/7", {"a": 1}, content_type="application/json")
        assert answer.json() == {"number": 7, "got": {"a": 1}}

        async def ask() -> Any:
            return await AsyncClient().post("/async/items/8", {"a": 1}, content_type="application/json")

        assert asyncio.run(ask()).status_code == 201
        with pytest.raises(LookupError):
            Client().get("/boom")
        Client(raise_request_exception=False).get("/boom")
    events = sorted(sandbox.wait_for_events(4), key=lambda event: event["request"]["uri"])
    assert [event["request"]["uri"] for event in events] == [
        "http://testserver/async/items/8", "http://testserver/boom", "http://testserver/boom", "http://testserver/items/7",
    ]  # fmt: skip
    assert events[0]["request"]["body"] == events[3]["request"]["body"] == {"a": 1}
    assert events[3]["response"]["body"] == {"number": 7, "got": {"a": 1}}
    assert [event["response"]["status"] for event in events] == [201, 500, 500, 201]


def test_a_project_without_the_middleware_is_not_captured(site: Any, sandbox: Sandbox) -> None:
    """Also in a process where another has it, and after it."""
    ours = site()
    plain = bare(ours.kind)
    assert plain.ask("/items/7", b"1")[0] == 201
    ours.ask("/items/8", b"1")
    (event,) = sandbox.wait_for_events(1)
    assert event["request"]["uri"].endswith("/items/8")


def test_middlewares_of_equal_settings_share_a_pipeline(sandbox: Sandbox) -> None:
    """Django makes one for each handler, and a test client makes a handler."""
    with override_settings(MIDDLEWARE=[OURS], MOESIF_MIDDLEWARE=django_project.moesif_options(BASE_URI=sandbox.url)):
        assert MoesifMiddleware()._pipeline is MoesifMiddleware()._pipeline


def test_after_shutdown_the_site_is_served_on(site: Any, sandbox: Sandbox) -> None:
    """Calls after the pipeline's shutdown pass straight through: no header of ours, nothing counted."""
    ours = site(DISABLED_TRANSACTION_ID=False)
    ours.ask("/items/7")
    pipeline = MoesifMiddleware()._pipeline
    pipeline.shutdown(5)
    assert len(sandbox.events()) == 1
    accepted = pipeline.stats()["accepted"]  # sites of equal settings share it, those of other tests too
    status, headers, content = ours.ask("/items/7")
    assert (status, content) == bare(ours.kind).ask("/items/7")[::2]
    assert "x-moesif-transaction-id" not in dict(headers)
    stats = pipeline.stats()
    assert (stats["accepted"], stats["pending"]) == (accepted, 0)


def test_profile_calls_need_no_request(sandbox: Sandbox) -> None:
    """`MoesifMiddleware().update_user(…)`, as with moesifdjango."""
    with override_settings(MOESIF_MIDDLEWARE=django_project.moesif_options(BASE_URI=sandbox.url)):
        MoesifMiddleware().update_user({"user_id": "mary"})
    assert [user["user_id"] for user in sandbox.profiles()] == ["mary"]


def test_wrong_options_are_named() -> None:
    """At construction, which is when Django loads its middlewares."""
    with override_settings(MIDDLEWARE=[OURS], MOESIF_MIDDLEWARE={"APPLICATION_ID": "a", "LOG_BODY": "maybe"}):
        with pytest.raises(MoesifConfigError, match="LOG_BODY"):
            Site("wsgi")
