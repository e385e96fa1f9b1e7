"""Real frameworks behind the middleware: same bytes, and events with what was in them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import pytest

from moesif_otel.sandbox.server import Sandbox
from tests.servers.harness import KINDS, normal, request, running

SERVERS = {
    "flask": "gunicorn-gthread",
    "bottle": "wsgiref",
    "pyramid": "waitress",
    "falcon": "gunicorn-sync",
    "django": "uwsgi",
}
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="field"\r\n\r\nvalue\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="f.bin"\r\n\r\n' + b"\xff" * 5_000 + b"\r\n--b--\r\n"
)
REQUESTS = {
    "get": request("GET", "/items/7"),
    "post": request("POST", "/items/8", "Content-Type: application/json", body=b'{"deep": {"a": [1]}}'),
    "stream": request("GET", "/stream"),
    "file": request("GET", "/file"),
    "head": request("HEAD", "/items/9"),
    "boom": request("GET", "/boom"),
    "missing": request("GET", "/nothing"),
    "upload": request("POST", "/upload", "Content-Type: multipart/form-data; boundary=b", body=FORM),
}


@pytest.mark.parametrize("framework", SERVERS)
def test_a_framework_answers_the_same_and_is_recorded(framework: str) -> None:
    """JSON in and out, cookies, streams, files, uploads, HEAD, errors: the client sees no difference."""
    kind = KINDS[SERVERS[framework]]
    app = "tests.servers.frameworks:application"
    with Sandbox() as sandbox, ExitStack() as stack:
        env = {"SERVERS_FRAMEWORK": framework}
        bare = stack.enter_context(running(kind, app, env=env))
        server = stack.enter_context(running(kind, app, env={**env, "SERVERS_BASE_URI": sandbox.url}))
        for name, raw in REQUESTS.items():
            expected = normal(bare.exchange(raw))
            assert normal(server.exchange(raw)) == expected, name
            if name == "upload":
                assert b"5000" in b"".join(expected)
        events = {_key(event): event for event in sandbox.wait_for_events(len(REQUESTS))}
    assert len(events) == len(REQUESTS)
    posted = events["POST /items/8"]
    assert posted["request"]["body"] == {"deep": {"a": [1]}}
    assert posted["response"]["body"] == {"number": 8, "got": {"deep": {"a": [1]}}}
    cookies = {name.lower(): value for name, value in posted["response"]["headers"].items()}["set-cookie"]
    assert all(part in cookies for part in ("a=", "b="))
    # A framework without a method for HEAD says 404 or 405 itself.
    assert events["GET /items/7"]["response"]["status"] == 200
    assert events["GET /boom"]["response"]["status"] == 500
    assert events["GET /nothing"]["response"]["status"] == 404
    assert events["GET /stream"]["response"]["body"] == "b25lIHR3bw=="
    assert all("outcome" not in event.get("metadata", {}).get("moesif_otel", {}) for key, event in events.items() if key != "GET /boom")


def _key(event: dict[str, Any]) -> str:
    return f"{event['request']['verb']} {urlsplit(event['request']['uri']).path}"
