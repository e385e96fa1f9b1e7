"""Every ASGI framework under every server, in an application that does not know us: one event a call, none lost."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from moesif_otel.sandbox.server import Sandbox
from tests.ports import free_port
from tests.zero_code.kit import Program, command, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

FRAMEWORKS = ("fastapi", "starlette", "quart", "litestar", "falcon", "mounted", "plain")
APP = "tests.servers.asgi_composite:application"
SERVERS = {
    "uvicorn": ("-m", "uvicorn", APP, "--port", "{port}", "--log-level", "warning"),
    "hypercorn": ("-m", "hypercorn", APP, "-b", "127.0.0.1:{port}", "--log-level", "warning"),
    "daphne": ("-m", "daphne", APP, "-b", "127.0.0.1", "-p", "{port}", "-v", "0"),
    "granian": ("-m", "granian", "--interface", "asgi", APP, "--host", "127.0.0.1", "--port", "{port}"),
    "gunicorn": ("-m", "gunicorn", APP, "-k", "uvicorn_worker.UvicornWorker", "-b", "127.0.0.1:{port}"),
}
# Loading them takes longer than everything else here; test_asgi_own_telemetry has them.
WITHOUT = "aiohttp-client,celery,django,falcon,flask,httpx,pyramid,requests,starlette,fastapi,tornado,urllib3,wsgi"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Sandbox, dict[str, dict[str, Any]], dict[str, str]]]:
    """All servers side by side, each called once for each framework, then ended by SIGTERM at once."""
    with Sandbox() as sandbox:
        programs = {}
        for name, words in SERVERS.items():
            port = free_port()
            env = environment(
                sandbox.url,
                name,
                OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=WITHOUT,
                MOESIF_IDENTIFY_USER="asgi_hooks:identify_user",
                SERVERS_BASE_URI=sandbox.url,
                SERVERS_APPLICATION_ID="unused",
            )
            programs[name] = Program(command(sys.executable, *(word.format(port=port) for word in words)), env, port)
        answers: dict[str, dict[str, Any]] = {}
        try:
            for name, program in programs.items():
                program.wait_until_it_listens()
                answers[name] = {
                    framework: program.call(
                        "POST", f"/bare/{framework}/echo", b'{"n": 1}', Content_Type="application/json", X_User="mary"
                    )
                    for framework in FRAMEWORKS
                }
                program.stop()
        finally:
            for program in programs.values():
                program.stop()
        yield sandbox, answers, {name: program.output for name, program in programs.items()}


@pytest.mark.parametrize("server", SERVERS)
def test_each_call_is_one_event_with_both_bodies(server: str, served: Any) -> None:
    """The server's row, the framework's row and both together make one event; the callback has been awaited."""
    sandbox, answers, output = served
    events = {event["request"]["uri"].split("/")[4]: event for event in sandbox.events(application_id=server)}
    assert len(sandbox.events(application_id=server)) == len(FRAMEWORKS), output[server]
    for framework in FRAMEWORKS:
        status, body, _ = answers[server][framework]
        assert (status, json.loads(body)) == (201, {"by": framework, "got": {"n": 1}})
        event = events[framework]
        assert event["request"]["body"] == {"n": 1}
        assert event["response"]["body"] == {"by": framework, "got": {"n": 1}}
        assert event["user_id"] == "mary"


@pytest.mark.parametrize("server", SERVERS)
def test_nothing_goes_wrong_in_the_processes(server: str, served: Any) -> None:
    """Of ours there is one line at most, and no traceback."""
    ours = [line for line in served[2][server].splitlines() if "moesif_otel:" in line]
    assert all("captured the first call" in line for line in ours)
    assert "Traceback" not in served[2][server]
