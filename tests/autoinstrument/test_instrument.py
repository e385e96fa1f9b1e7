"""`instrument` from code: what it captures, what it joins, and that it can be undone."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

import flask
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import moesif_otel
from moesif_otel._autoinstrument import instrument as auto
from moesif_otel._autoinstrument.instrument import ROWS, ServedApplication
from moesif_otel.errors import MoesifConfigError
from moesif_otel.sandbox.server import Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    for handle in auto._handles:
        handle.stop(500)


def settings(sandbox: Sandbox, name: str = "auto", **options: Any) -> dict[str, Any]:
    return {"APPLICATION_ID": name, "BASE_URI": sandbox.url, "EVENT_BATCH_TIMEOUT": 0.05, **options}


def make_app() -> flask.Flask:
    app = flask.Flask("auto")

    @app.get("/hello")
    def hello() -> dict[str, str]:
        moesif_otel.identify(company_id="company")
        return {"hello": "world"}

    return app


def test_calls_are_captured_until_it_is_stopped(sandbox: Sandbox) -> None:
    """From the next request on, with `identify`; after `stop` the application is served on, unobserved."""
    app = make_app()
    client = app.test_client()
    handle = moesif_otel.instrument(settings(sandbox))
    answer = client.get("/hello")
    assert answer.json == {"hello": "world"}
    assert not [name for name in answer.headers.keys() if "moesif" in name.lower()]
    assert handle.force_flush()
    assert handle.stats()["delivered"] == 1
    handle.stop()
    handle.stop()
    assert client.get("/hello").status_code == 200
    (event,) = sandbox.events()
    assert event["company_id"] == "company"
    assert handle.stats()["accepted"] == 1


def test_a_wrong_option_raises_before_anything_changes(sandbox: Sandbox) -> None:
    """From code a mistake is heard of at once."""
    with pytest.raises(MoesifConfigError, match="BATCH_SIZE"):
        moesif_otel.instrument(settings(sandbox, BATCH_SIZE="many"))
    assert auto._handles == ()


def test_a_processor_of_equal_settings_is_joined(sandbox: Sandbox) -> None:
    """One pipeline, whichever exporter it has; `stop` leaves the processor to its owner."""
    exporter = InMemorySpanExporter()
    processor = moesif_otel.MoesifSpanProcessor(settings(sandbox), exporter=exporter)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    handle = moesif_otel.instrument(settings(sandbox))
    assert handle.pipeline() is processor.pipeline
    client = make_app().test_client()
    client.get("/hello")
    handle.stop()
    client.get("/hello")
    assert processor.force_flush()
    assert len(exporter.get_finished_spans()) == 1
    assert processor.pipeline.is_live
    processor.shutdown()
    other = moesif_otel.instrument(settings(sandbox))
    assert other.pipeline() is not processor.pipeline


def test_other_settings_are_another_pipeline(sandbox: Sandbox) -> None:
    """Two application ids both get the call; the same id twice gets it once, by what was said last."""
    first = moesif_otel.instrument(settings(sandbox, "first"))
    second = moesif_otel.instrument(settings(sandbox, "second"))
    again = moesif_otel.instrument(settings(sandbox, "second", IDENTIFY_USER=lambda *_: "mary"))
    make_app().test_client().get("/hello")
    for handle in (first, second, again):
        assert handle.force_flush()
    assert len(sandbox.events(application_id="first")) == 1
    (event,) = sandbox.events(application_id="second")
    assert event["user_id"] == "mary"


def test_equal_settings_twice_are_one_pipeline_until_both_have_stopped(sandbox: Sandbox) -> None:
    """Libraries and applications may both call it."""
    first, second = moesif_otel.instrument(settings(sandbox)), moesif_otel.instrument(settings(sandbox))
    assert first.pipeline() is second.pipeline()
    first.stop()
    make_app().test_client().get("/hello")
    assert second.force_flush()
    second.stop()
    assert not second.pipeline().is_live
    assert len(sandbox.events()) == 1


def test_a_middleware_in_the_code_takes_over(sandbox: Sandbox) -> None:
    """The same application id from the middleware: one event, the middleware's, with its header."""
    handle = moesif_otel.instrument(settings(sandbox))
    app = make_app()
    middleware = moesif_otel.MoesifMiddleware(app.wsgi_app, settings(sandbox, GET_METADATA=lambda *_: {"by": "middleware"}))
    app.wsgi_app = middleware  # type: ignore[method-assign]
    answer = app.test_client().get("/hello")
    assert "X-Moesif-Transaction-Id" in answer.headers
    assert middleware.force_flush()
    assert handle.force_flush()
    middleware.shutdown()
    (event,) = sandbox.events()
    assert event["metadata"]["by"] == "middleware"


def test_outgoing_calls_where_nothing_is_served(sandbox: Sandbox) -> None:
    """A script that only calls others: captured with the option, and no more after `stop`."""
    import requests

    with Sandbox() as upstream:
        handle = moesif_otel.instrument(settings(sandbox, CAPTURE_OUTGOING_REQUESTS=True))
        before = requests.get(f"{upstream.url}/", timeout=5)
        assert before.status_code == 200
        assert handle.force_flush()
        handle.stop()
        requests.get(f"{upstream.url}/", timeout=5)
    (event,) = sandbox.events()
    assert event["direction"] == "Outgoing"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.module)
def test_the_place_of_each_row_is_there(row: Any) -> None:
    """The canary: a release that has moved it fails here, and by name."""
    module = pytest.importorskip(row.module)
    owner, _, name = row.attribute.rpartition(".")
    assert inspect.isroutine(inspect.getattr_static(getattr(module, owner) if owner else module, name))


def test_a_sandbox_of_the_same_process_is_not_captured(sandbox: Sandbox) -> None:
    """It is an ASGI application itself: what is delivered to it would be captured and delivered for ever."""
    handle = moesif_otel.instrument(settings(sandbox))
    make_app().test_client().get("/hello")
    for _ in range(3):
        assert handle.force_flush()
    handle.stop()
    assert len(sandbox.events()) == 1


def test_a_row_whose_place_is_gone_harms_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is logged once, and the import that met it goes on."""
    monkeypatch.setattr(auto, "ROWS", [ROWS[0]._replace(module="json.tool", attribute="Gone.__call__")])
    monkeypatch.delitem(sys.modules, "json.tool", raising=False)
    auto.install()
    importlib.import_module("json.tool")
    assert "json.tool" in caplog.text


def test_a_served_application_is_the_application_to_everyone() -> None:
    """Type, attributes, equality and calls that are no WSGI calls go through."""

    class App:
        name = "mine"

        def __call__(self, *args: Any) -> Any:
            return args

    app = App()
    served = ServedApplication(app)
    assert isinstance(served, App)
    assert served.name == "mine"
    assert served == app
    assert served("scope", "receive", "send") == ("scope", "receive", "send")
    assert served(1, 2) == (1, 2)
    served.name = "changed"
    assert app.name == "changed"


def test_calls_that_are_no_wsgi_calls_pass(sandbox: Sandbox) -> None:
    """What is called by other means, with other arguments, raises or answers as without us."""
    moesif_otel.instrument(settings(sandbox))
    app = make_app()
    with pytest.raises(TypeError):
        app()
    environ: dict[str, Any] = {"PATH_INFO": "/hello"}
    setup_testing_defaults(environ)
    answered: list[str] = []
    assert b"".join(app(environ=environ, start_response=lambda status, *_: answered.append(status))) == b'{"hello":"world"}\n'
    assert answered == ["200 OK"]


def test_nothing_that_delivers_is_imported_before_it_is_needed() -> None:
    """The zero-code entry points import no `requests`: gevent must be able to patch before."""
    code = textwrap.dedent(
        """
        import os, sys
        os.environ["MOESIF_APPLICATION_ID"] = "light"
        from moesif_otel._autoinstrument.instrumentor import MoesifInstrumentor
        from moesif_otel._autoinstrument.exporter import AutoSpanExporter
        import moesif_otel._autoinstrument.environment
        MoesifInstrumentor().instrument()
        AutoSpanExporter()
        print(sorted({"requests", "urllib3", "moesifapi", "orjson", "flask", "tornado"} & set(sys.modules)))
        """
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert shown.stdout.strip() == "[]", shown.stderr


def test_falcons_own_test_client_knows_the_application_for_wsgi(sandbox: Sandbox) -> None:
    """It counts the arguments of `App.__call__`; a layer that said `(*args)` was taken for ASGI, and every test failed."""
    falcon = pytest.importorskip("falcon")
    from falcon import testing

    class Hello:
        def on_get(self, request: Any, response: Any) -> None:
            response.media = {"hello": "world"}

    app = falcon.App()
    app.add_route("/hello", Hello())
    handle = moesif_otel.instrument(settings(sandbox))
    assert testing.TestClient(app).simulate_get("/hello").json == {"hello": "world"}
    assert handle.force_flush()
    assert [event["request"]["uri"] for event in sandbox.events()] == ["http://falconframework.org/hello"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.module)
def test_a_layer_has_the_signature_of_what_it_wraps(sandbox: Sandbox, row: Any) -> None:
    """To `inspect`, also to those who do not follow `__wrapped__`, and to those who count arguments."""
    module = pytest.importorskip(row.module)
    moesif_otel.instrument(settings(sandbox))
    owner, _, method = row.attribute.rpartition(".")
    layer = inspect.getattr_static(getattr(module, owner) if owner else module, method)
    original = layer.__wrapped__
    assert inspect.getfullargspec(layer) == inspect.getfullargspec(original)
    assert inspect.signature(layer, follow_wrapped=False) == inspect.signature(original)
    assert (layer.__name__, layer.__qualname__, layer.__module__) == (original.__name__, original.__qualname__, original.__module__)
    assert layer.__code__.co_argcount == original.__code__.co_argcount


def test_falcons_asgi_applications_are_captured_under_any_server(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own test client among them, which looks at the signature that it calls."""
    import falcon.asgi
    import falcon.testing
    import falcon.util.sync

    class Items:
        async def on_post(self, request: Any, response: Any) -> None:
            response.media = await request.get_media()

    handle = moesif_otel.instrument(settings(sandbox))
    app = falcon.asgi.App()
    app.add_route("/items", Items())
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        # Its test client would keep an event loop of its own as long as the process lives.
        runner = SimpleNamespace(run=loop.run_until_complete)
        monkeypatch.setattr(falcon.util.sync, "_active_runner", lambda: runner)
        assert falcon.testing.TestClient(app).simulate_post("/items", json={"n": 1}).json == {"n": 1}
    assert handle.force_flush()
    (event,) = sandbox.events()
    assert (event["request"]["body"], event["response"]["body"]) == ({"n": 1}, {"n": 1})


@pytest.mark.parametrize("client", ["requests", "httpx"])
def test_outgoing_calls_of_every_client(sandbox: Sandbox, client: str) -> None:
    """With `CAPTURE_OUTGOING_REQUESTS`; after `stop` none is."""
    library = pytest.importorskip(client)
    handle = moesif_otel.instrument(settings(sandbox, CAPTURE_OUTGOING_REQUESTS=True))
    with Sandbox() as other:
        library.get(other.url + "/captured")
        assert handle.force_flush()
        handle.stop()
        library.get(other.url + "/not-captured")
    assert [event["request"]["uri"].rpartition("/")[2] for event in sandbox.events()] == ["captured"]


def test_a_framework_that_is_not_captured_is_named_once(tmp_path: Path) -> None:
    """One line with what to use, when it is imported; clients only where outgoing calls are asked for."""
    for name in ("sanic", "httplib2", "pycurl"):
        (tmp_path / f"{name}.py").write_text("")
    program = """
        import logging
        logging.basicConfig(format="%(message)s")
        import moesif_otel
        moesif_otel.instrument({"APPLICATION_ID": "a", "BASE_URI": "http://127.0.0.1:9"})
        import sanic, pycurl
        options = {"APPLICATION_ID": "b", "BASE_URI": "http://127.0.0.1:9", "CAPTURE_OUTGOING_REQUESTS": True}
        for _ in range(2):
            moesif_otel.instrument(options)
        import httplib2
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    lines = [line for line in ended.stderr.splitlines() if "not captured" in line]
    assert [line.split(" are not ")[0] for line in lines] == [
        "moesif_otel: calls served by sanic",
        "moesif_otel: calls made with pycurl",
        "moesif_otel: calls made with httplib2",
    ]
    assert "ASGI server" in lines[0]


def test_tornado_is_captured_where_it_is_imported_after_us(tmp_path: Path) -> None:
    """Also by Tornado before 6.3: there `tornado.web` is no attribute of `tornado` while it is being imported."""
    program = """
        import moesif_otel, tornado
        del tornado.__getattr__
        handle = moesif_otel.instrument({"APPLICATION_ID": "a", "BASE_URI": "http://127.0.0.1:9"})
        import tornado.web
        print(handle.stats()["errors"])
    """
    words = [sys.executable, "-c", textwrap.dedent(program)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=True)
    assert ended.stdout.strip() == "{}", ended.stderr
