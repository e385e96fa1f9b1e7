"""What our objects, exceptions and log lines show of what they hold: names and numbers, never the data."""

from __future__ import annotations

import functools
import sys
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from moesif_otel import MoesifClient, MoesifMiddleware, MoesifSpanExporter, MoesifSpanProcessor, instrument
from moesif_otel._autoinstrument.instrument import read_settings
from moesif_otel._autoinstrument.instrumentor import MoesifOptions
from moesif_otel._capture.body import ByteBudget, CapturedBody
from moesif_otel._delivery.queue import Prepared
from moesif_otel._events.body import Body
from moesif_otel._events.codings import decode_content
from moesif_otel.errors import MoesifConfigError, MoesifDeliveryError, MoesifError
from moesif_otel.outgoing import start_capture_outgoing
from moesif_otel.sandbox import Sandbox
from moesif_otel.settings import OPTIONS, Settings
from moesif_otel.tornado import MoesifMiddleware as TornadoMiddleware
from tests.calls import Calls, build_event

from .planting import Case, text_for
from .serving import send, wsgi_app, wsgi_server
from .watching import Logs, assert_absent

if TYPE_CHECKING:
    from pathlib import Path

APPLICATION_ID = text_for("application id")
SECRET = text_for("a secret to be shown")
NOWHERE = "http://127.0.0.1:9"


def _forms(*things: Any) -> list[str]:
    return [form for thing in things for form in (repr(thing), str(thing), f"{thing}", f"{[thing]!r}")]


def test_public_objects() -> None:
    """Middlewares, exporter, processor, client, capture, settings and counters."""
    callback = functools.partial(print, SECRET)
    options = {"APPLICATION_ID": APPLICATION_ID, "BASE_URI": f"http://ann:{SECRET}@127.0.0.1:9", "IDENTIFY_USER": callback}
    settings = Settings.of(options)
    things: list[Any] = [
        settings,
        MoesifMiddleware(lambda *_: [], options),
        TornadoMiddleware(options),
        MoesifSpanExporter(APPLICATION_ID, base_uri=options["BASE_URI"]),
        MoesifSpanProcessor(settings),
        MoesifClient(APPLICATION_ID),
        MoesifOptions(application_id=APPLICATION_ID, base_uri=options["BASE_URI"]),
        start_capture_outgoing(options),
        instrument(options),
    ]
    stats = [thing.stats() for thing in things if hasattr(thing, "stats")]
    assert_absent("public objects", _forms(*things, *stats), [APPLICATION_ID, SECRET])
    assert "base_uri" in repr(settings)
    for thing in reversed(things):
        for name in ("stop", "shutdown", "close"):
            if hasattr(thing, name):
                getattr(thing, name)()
                break


def test_records_of_a_call() -> None:
    """Whatever stands in a frame of ours while a crash reporter looks at it."""
    calls = Calls()
    data = b'{"x": "%s"}' % SECRET.encode()
    headers = [("Authorization", f"Bearer {SECRET}"), ("Cookie", f"a={SECRET}")]
    exchange = calls.exchange(url=f"https://x/?a={SECRET}", request_headers=headers, request=data, response=data, user_id=SECRET)
    things = [
        exchange,
        exchange.request_body,
        CapturedBody(10, ByteBudget(10)),
        build_event(exchange, None, calls.settings, parse_bodies=True),
        Body(SECRET, "json", None),
        decode_content(data, None, truncated=False, max_bytes=1_000),
        Prepared(data, len(data)),
        calls.guard,
        calls.budget,
    ]
    assert_absent("records", _forms(*things), [SECRET])


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_the_application_id_is_in_no_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option wrong in turn, in code and in the environment, beside a right application id."""
    wrong: Any = object()
    options = {"APPLICATION_ID": APPLICATION_ID, name: wrong}
    with pytest.raises(MoesifError) as told:
        Settings.of(options)
    text = "".join(traceback.format_exception(told.value))
    assert_absent("the error", [text, repr(told.value)], [APPLICATION_ID])
    assert name in str(told.value)
    monkeypatch.setenv("MOESIF_APPLICATION_ID", APPLICATION_ID)
    monkeypatch.setenv(f"MOESIF_{name}", " nonsense: !" if name != "APPLICATION_ID" else APPLICATION_ID)
    with Logs().listening() as logs:
        read_settings({"unheard_of": 1, "application_id": APPLICATION_ID})
    assert_absent("the log", logs.lines, [APPLICATION_ID])


@pytest.mark.parametrize("wrong", [[APPLICATION_ID], {APPLICATION_ID: 1}, APPLICATION_ID.encode(), (APPLICATION_ID,)])
def test_a_wrong_application_id_is_not_quoted(wrong: Any) -> None:
    """Not even one of another type, nor settings that are none."""
    with pytest.raises(MoesifConfigError) as told:
        Settings.of({"APPLICATION_ID": wrong})
    assert_absent("the error", _forms(told.value), [APPLICATION_ID])
    with pytest.raises(MoesifConfigError) as told_again:
        Settings.of(wrong if not isinstance(wrong, dict) else [APPLICATION_ID])  # type: ignore[arg-type]
    assert_absent("the error", _forms(told_again.value), [APPLICATION_ID])


@pytest.mark.parametrize("application_id", [f"{APPLICATION_ID}\nX: y", f"{APPLICATION_ID}\u20ac", f"{APPLICATION_ID}\0"])
def test_an_application_id_that_is_no_header(application_id: str) -> None:
    """It could never be sent: refused at once, and not quoted."""
    with pytest.raises(MoesifConfigError, match="APPLICATION_ID: got str, takes") as told:
        MoesifMiddleware(wsgi_app([]), {"APPLICATION_ID": application_id})
    assert_absent("the error", _forms(told.value), [APPLICATION_ID])


@pytest.mark.parametrize(
    "source",
    [
        "raise ImportError('{secret}')",
        "raise TypeError('{secret}')",
        "raise RuntimeError('{secret}')",
        "from {module} import nothing",
        "import nothing_of_this_name",
    ],
)
def test_a_callback_whose_module_fails(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says which callback and where it failed; the module's own message stays with it."""
    module = f"hooks_{text_for(source)[:8].lower()}"
    (tmp_path / f"{module}.py").write_text(source.format(secret=SECRET, module="json"))
    monkeypatch.syspath_prepend(tmp_path)
    cases = [Case("call")]
    options = {"APPLICATION_ID": APPLICATION_ID, "BASE_URI": NOWHERE, "IDENTIFY_USER": f"{module}:who"}
    with Logs().listening() as logs:
        middleware = MoesifMiddleware(wsgi_app(cases), options)
        with wsgi_server(middleware) as port:
            send(port, cases[0])
        middleware.shutdown(100)
    sys.modules.pop(module, None)
    assert_absent("the log", logs.lines, [SECRET, APPLICATION_ID])
    (line,) = [line for line in logs.ours if "cannot be imported" in line]
    assert module in line
    if source.startswith("import nothing"):
        assert "nothing_of_this_name" in line


@pytest.mark.parametrize("status", [400, 401, 402, 413, 500])
def test_profiles_that_fail(status: int) -> None:
    """Neither the exception of `MoesifClient` nor the log of a middleware has a word of who was told of."""
    user = {"user_id": SECRET, "metadata": {"email": SECRET}}
    with Logs().listening() as logs, Sandbox() as sandbox:
        sandbox.behave(status=status, body=f"no {SECRET}")
        options = {"APPLICATION_ID": APPLICATION_ID, "BASE_URI": sandbox.url, "EXPORT_TIMEOUT": 1, "DEBUG": True}
        middleware = MoesifMiddleware(lambda *_: [], options)
        told: list[BaseException] = []
        with MoesifClient(APPLICATION_ID, base_uri=sandbox.url) as client:
            for call in (client.update_user, client.update_users_batch):
                try:
                    call(user if call == client.update_user else [user])
                except MoesifDeliveryError as exc:
                    told.append(exc)
        assert len(told) == 2
        assert middleware.update_user(user) is False
        with pytest.raises(ValueError, match="user_id") as wrong:
            middleware.update_user({"metadata": {"email": SECRET}})
        with pytest.raises(ValueError, match="users") as wrong_again:
            middleware.update_users_batch([user, {"user_id": 5, "metadata": SECRET}])
        told += [wrong.value, wrong_again.value]
        middleware.shutdown(100)
    shown = [text for exc in told for text in (*_forms(exc), *map(repr, exc.args), "".join(traceback.format_exception(exc)))]
    assert_absent("exceptions", shown, [SECRET, APPLICATION_ID])
    assert_absent("the log", logs.lines, [SECRET, APPLICATION_ID])


def test_a_server_s_words_are_not_logged() -> None:
    """A server, or a proxy on the way, may send back what it was sent."""
    cases = [Case("call")]
    with Logs().listening() as logs, Sandbox() as sandbox:
        sandbox.behave(status=400, body=f"refused: {SECRET} of {APPLICATION_ID}", headers={"X-Echo": SECRET, "Retry-After": SECRET})
        middleware = MoesifMiddleware(wsgi_app(cases), {"APPLICATION_ID": APPLICATION_ID, "BASE_URI": sandbox.url, "DEBUG": True})
        with wsgi_server(middleware) as port:
            send(port, cases[0])
        middleware.force_flush(2_000)
        middleware.shutdown(500)
    assert_absent("logs and counters", [*logs.lines, *_forms(middleware.stats())], [SECRET, APPLICATION_ID])
