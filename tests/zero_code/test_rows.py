"""Every framework under every server: one event a call, with bodies and identity, in an app that does not know us."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from moesif_otel.sandbox.server import Sandbox
from tests.ports import free_port
from tests.zero_code.kit import Program, command, environment, running, script

if TYPE_CHECKING:
    from collections.abc import Iterator

FRAMEWORKS = {
    "flask": "_InstrumentedFlask",  # OpenTelemetry's subclass, which the application itself got
    "bottle": "Bottle",
    "pyramid": "Router",
    "falcon": "FalconAPI",  # the same of Falcon's
    "django": "WSGIHandler",
    "plain": "function",
}

SERVE = (sys.executable, "serve.py")
GUNICORN = (script("gunicorn"), "--workers", "2", "--bind", "127.0.0.1:{port}")
UWSGI = (script("uwsgi"), "--http", "127.0.0.1:{port}", "--master", "--processes", "2", "--enable-threads", "--die-on-term")
SERVERS = {
    "wsgiref": (*SERVE, "wsgiref", "{port}"),
    "werkzeug": (*SERVE, "werkzeug", "{port}"),
    "waitress": (*SERVE, "waitress", "{port}"),
    "cheroot": (*SERVE, "cheroot", "{port}"),
    "gevent": (*SERVE, "gevent", "{port}"),
    "gunicorn": (*GUNICORN, "composite:application"),
    "gunicorn --preload": (*GUNICORN, "--preload", "composite:application"),
    "gunicorn gthread": (*GUNICORN, "--worker-class", "gthread", "composite:application"),
    "gunicorn gevent": (*GUNICORN, "--worker-class", "gevent", "composite:application"),
    "uwsgi": (*UWSGI, "--module", "composite:application"),
}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Sandbox, dict[str, Program], dict[str, dict[str, Any]]]]:
    """All servers side by side, each called once for each framework, then ended."""
    with Sandbox() as sandbox:
        programs = {}
        for name, words in SERVERS.items():
            port = free_port()
            env = environment(
                sandbox.url,
                name,
                DJANGO_SETTINGS_MODULE="django_settings",
                MOESIF_IDENTIFY_USER="hooks:identify_user",
                MOESIF_GET_METADATA="hooks:metadata",
            )
            programs[name] = Program(command(*(word.format(port=port) for word in words)), env, port)
        answers: dict[str, dict[str, Any]] = {}
        with running(programs):
            for name, program in programs.items():
                answers[name] = {
                    framework: program.call(
                        "POST", f"/{framework}/echo", b'{"n": 1}', Content_Type="application/json", X_User="mary"
                    )
                    for framework in FRAMEWORKS
                }
                answers[name]["stream"] = program.call("GET", "/flask/stream")
                answers[name]["fail"] = program.call("GET", "/flask/fail")
            # A uWSGI worker that is still busy with the end of a request when it is told to end runs no exit handlers.
            sandbox.wait_for_events(7, application_id="uwsgi")
        # All processes have ended: what the others had to deliver they have delivered.
        yield sandbox, programs, answers


@pytest.mark.parametrize("server", SERVERS)
def test_each_call_is_one_event_with_both_bodies(server: str, served: Any) -> None:
    """The client gets what the application says, without a header of ours, and Moesif gets each call once."""
    sandbox, programs, answers = served
    expected = set(FRAMEWORKS) - ({"plain"} if server == "uwsgi" else set())  # uWSGI has no Python function to patch
    events = sandbox.events(application_id=server)
    by_path: dict[str, list[Any]] = {}
    for event in events:
        by_path.setdefault(event["request"]["uri"].partition("127.0.0.1")[2].partition("/")[2], []).append(event)
    for framework in FRAMEWORKS:
        status, body, headers = answers[server][framework]
        assert (status, json.loads(body)) == (201, {"by": framework, "got": {"n": 1}}), programs[server].output
        assert not [name for name in headers if name.lower().startswith("x-moesif")]
    for framework in expected:
        (event,) = by_path.pop(f"{framework}/echo")
        assert event["request"]["body"] == {"n": 1}
        assert event["response"]["status"] == 201
        assert event["response"]["body"] == {"by": framework, "got": {"n": 1}}
        assert event["direction"] == "Incoming"
        assert event["user_id"] == "mary"
        assert event["metadata"]["app"] == FRAMEWORKS[framework]
        assert event["weight"] == 1
        assert len(event["trace_id"]) == 32
    assert answers[server]["stream"][1] == b"one two"
    assert answers[server]["fail"][0] == 500
    (stream,), (failed,) = by_path.pop("flask/stream"), by_path.pop("flask/fail")
    assert stream["response"]["status"] == 200
    assert failed["response"]["status"] == 500
    assert by_path == {}


@pytest.mark.parametrize("server", SERVERS)
def test_nothing_goes_wrong_in_the_processes(server: str, served: Any) -> None:
    """No line of ours in the log, no traceback but that of the application's own failure."""
    output = served[1][server].output
    assert "moesif_otel" not in output, output
    assert output.count("Traceback") <= output.count("LookupError"), output
