"""Django on real servers: with the middleware in MIDDLEWARE, without code changes, with both; clients see no difference."""

from __future__ import annotations

import base64
import contextlib
import gzip
import re
import signal
from typing import TYPE_CHECKING, Any

import pytest

from moesif_otel.sandbox import Sandbox
from tests.servers.harness import ServerKind, leave, normal, read_until, request, spawn, until_it_listens
from tests.zero_code.test_asgi_rows import WITHOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers.harness import RunningServer

SITE = "tests.servers.django_site"
GUNICORN = "-b 127.0.0.1:{port} --log-level warning --no-control-socket --graceful-timeout 10"
SERVERS = {
    "gunicorn": f"{{py}} -m gunicorn {SITE} {GUNICORN}",
    "gunicorn-gthread": f"{{py}} -m gunicorn {SITE} -k gthread --threads 4 {GUNICORN}",
    "gunicorn-uvicorn": f"{{py}} -m gunicorn {SITE}:asgi -k uvicorn_worker.UvicornWorker {GUNICORN}",
    "uvicorn": f"{{py}} -m uvicorn {SITE}:asgi --port {{port}} --log-level warning",
}
HOWS = ("middleware", "zero_code", "both")
JSON = "Content-Type: application/json"
FORM = (
    b'--xyz\r\nContent-Disposition: form-data; name="field"\r\n\r\nvalue\r\n'
    b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + bytes(300_000) + b"\r\n--xyz--\r\n"
)
PIECES = b"".join(b"%x\r\n%s\r\n" % (7, b"0123456") for _ in range(5)) + b"0\r\n\r\n"
REQUESTS = {
    "/items/7": (201, request("POST", "/items/7", JSON, body=b'{"a": 1}')),
    "/async/items/7": (201, request("POST", "/async/items/7", JSON, body=b'{"a": 1}')),
    "/items/8": (201, request("HEAD", "/items/8")),
    "/boom": (500, request("GET", "/boom")),
    "/missing": (404, request("GET", "/missing")),
    "/nowhere": (404, request("GET", "/nowhere")),
    "/stream": (200, request("GET", "/stream")),
    "/stream_async": (200, request("GET", "/stream_async")),
    "/file": (200, request("GET", "/file")),
    "/long": (200, request("GET", "/long", "Accept-Encoding: gzip")),
    "/fresh": (304, request("GET", "/fresh")),
    "/upload": (200, request("POST", "/upload", "Content-Type: multipart/form-data; boundary=xyz", body=FORM)),
    "/read": (200, request("POST", "/read", "Transfer-Encoding: chunked", "Content-Type: text/plain") + PIECES),
    "/items/9": (400, request("POST", "/items/9", "Host: evil.example", JSON, body=b'{"a": 1}')),
}


def start(server: str, how: str, moesif: str) -> RunningServer:
    env = {
        "MOESIF_BASE_URI": moesif,
        "MOESIF_APPLICATION_ID": f"{server} {how}",
        "MOESIF_EVENT_BATCH_TIMEOUT": "0.1",
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": f"{WITHOUT},asgi",
    }
    if how in {"middleware", "both"}:
        env["SERVERS_OURS"] = "1"
    command = SERVERS[server]
    if how in {"zero_code", "both"}:
        command = f"{{bin}}/opentelemetry-instrument {command}"
    return spawn(ServerKind(server, command), "", env=env)


@pytest.fixture(scope="module", params=SERVERS)
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, Sandbox, dict[str, dict[str, bytes]], dict[str, str]]]:
    """One server in every way, each asked everything, then ended by SIGTERM at once."""
    server: str = request.param
    with Sandbox() as sandbox, contextlib.ExitStack() as stack:
        running = {}
        for how in ("bare", *HOWS):
            running[how] = one = start(server, how, sandbox.url)
            stack.callback(one.output.unlink, missing_ok=True)
            stack.callback(one.stop, signal.SIGKILL)
        answers: dict[str, dict[str, bytes]] = {}
        for how, one in running.items():
            until_it_listens(one)
            answers[how] = {path: one.exchange(raw) for path, (_, raw) in REQUESTS.items()}
            with one.connect() as client:  # and one that leaves in the middle
                client.sendall(get("/forever"))
                read_until(client, b"200", at_least_bytes=200_000)
                leave(client)
            one.stop()
        yield server, sandbox, answers, {how: one.said() for how, one in running.items()}


def get(path: str) -> bytes:
    return request("GET", path)


def decoded(found: re.Match[bytes]) -> bytes:
    headers, _, body = found[0].partition(b"\r\n\r\n")
    return headers.split(b"\r\n", 1)[1] + b"\r\n\r\n" + gzip.decompress(body)


@pytest.mark.parametrize("how", HOWS)
def test_a_client_gets_the_same_bytes(how: str, served: Any) -> None:
    """Status line, headers in their order, body; of exceptions, refused hosts, streams and uploads too."""
    _, _, answers, said = served
    for path, (status, _) in REQUESTS.items():
        bare, ours = (answers[one][path] for one in ("bare", how))
        assert int(bare.split()[1]) == status, (path, bare[:300], said["bare"])
        if path == "/long":  # Django hides the true size of what it compresses by bytes at random
            bare, ours = (re.sub(rb"Content-Length: \d+(?s:.*)", decoded, one) for one in (bare, ours))
        assert normal(ours) == normal(bare), path


@pytest.mark.parametrize("how", HOWS)
def test_each_call_is_one_event(how: str, served: Any) -> None:
    """With both bodies, whoever captures; none is lost at the end of the process."""
    server, sandbox, _, said = served
    found = sandbox.events(application_id=f"{server} {how}")
    events = {event["request"]["uri"].split("/", 3)[3]: event for event in found}
    assert sorted("/" + path for path in events) == sorted((*REQUESTS, "/forever")), said[how]
    assert len(found) == len(events)
    for path, (status, _) in REQUESTS.items():
        assert events[path[1:]]["response"]["status"] == status
    for path in ("items/7", "async/items/7"):
        assert events[path]["request"]["body"] == {"a": 1}
        assert events[path]["response"]["body"] == {"number": 7, "got": {"a": 1}}
    for path in ("stream", "stream_async"):
        assert base64.b64decode(events[path]["response"]["body"]) == b"one two"
    assert base64.b64decode(events["long"]["response"]["body"]) == b"x" * 5000
    assert "body" not in events["items/8"]["response"]
    size_bytes = events["upload"]["metadata"]["moesif_otel"]["request_body"]["size_bytes"]
    assert size_bytes == len(FORM)
    assert events["items/9"]["request"]["uri"] == "http://evil.example/items/9"
    assert events["forever"]["metadata"]["moesif_otel"]["outcome"] == "client_aborted"
    if how != "zero_code":
        assert events["boom"]["metadata"]["moesif_otel"]["error_type"] == "LookupError"
        assert events["items/7"]["metadata"]["moesif_otel"]["route"] == "items/<int:number>"


@pytest.mark.parametrize("how", HOWS)
def test_nothing_goes_wrong_in_the_processes(how: str, served: Any) -> None:
    """Of ours there is one line at most; Django tells no more errors than without us."""
    said = served[3]
    ours = [line for line in said[how].splitlines() if "moesif_otel:" in line]
    assert all("captured the first call" in line for line in ours)
    assert said[how].count("Traceback") == said["bare"].count("Traceback"), said[how]
