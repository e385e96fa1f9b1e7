"""Outgoing calls of a service on gunicorn: captured in its workers, whatever their class, started before the fork."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from moesif_otel.sandbox.server import Sandbox
from tests.capture.upstream import Upstream
from tests.ports import free_port

ROOT = Path(__file__).parents[2]

APP = """
    import os
    import requests
    from moesif_otel.outgoing import start_capture_outgoing
    from moesif_otel.wsgi import MoesifMiddleware

    options = {"BASE_URI": os.environ["SANDBOX"], "EVENT_BATCH_TIMEOUT": 0.1}
    start_capture_outgoing({**options, "APPLICATION_ID": "calls"})
    session = requests.Session()

    def app(environ, start_response):
        name = environ["PATH_INFO"][1:]
        echoed = session.post(os.environ["UPSTREAM"] + "/echo?" + name, data=iter([name.encode()])).text
        streamed = requests.get(os.environ["UPSTREAM"] + "/chunked?" + name, stream=True)
        size = sum(len(piece) for piece in streamed.iter_content(500))
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [f"{echoed} {size}".encode()]

    app = MoesifMiddleware(app, {**options, "APPLICATION_ID": "served"})
"""


@pytest.mark.parametrize(
    "arguments",
    [["--workers", "2", "--preload"], ["--worker-class", "gthread", "--threads", "4"], ["--worker-class", "gevent"]],
    ids=["sync, preloaded", "gthread", "gevent"],
)
def test_in_the_workers_of_gunicorn(tmp_path, arguments):
    """Each call once, with its own bodies, a child of the request it was made in; delivered at the latest by SIGTERM."""
    pytest.importorskip("gunicorn")
    (tmp_path / "service.py").write_text(textwrap.dedent(APP))
    port = free_port()
    with Upstream() as upstream, Sandbox() as sandbox:
        environ = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path))),
            "SANDBOX": sandbox.url,
            "UPSTREAM": upstream.url,
        }
        command = [sys.executable, "-m", "gunicorn", "service:app", "--bind", f"127.0.0.1:{port}", *arguments]
        service = subprocess.Popen(command, env=environ, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        try:
            wait_for(port, service)
            with ThreadPoolExecutor(4) as pool:
                answers = list(
                    pool.map(lambda n: requests.get(f"http://127.0.0.1:{port}/{n}", timeout=10).text, range(12))
                )
            assert answers == [f"{n} 2590" for n in range(12)]
        finally:
            service.send_signal(signal.SIGTERM)
            _, errors = service.communicate(timeout=200)
        assert "Traceback" not in errors, errors
        sandbox.wait_for_events(36)
        made, served = (sandbox.events(application_id=name) for name in ("calls", "served"))
    requests_of = {event["request"]["uri"].rpartition("/")[2]: event for event in served}
    assert (len(made), len(requests_of)) == (24, 12)
    for event in made:
        name = event["request"]["uri"].partition("?")[2]
        if "/echo" in event["request"]["uri"]:
            assert event["request"]["body"] == event["response"]["body"]
        assert event["trace_id"] == requests_of[name]["trace_id"]
        assert event["span"]["parent_id"] == requests_of[name]["span"]["id"]


def wait_for(port, service):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and service.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), 1):
                return
        except OSError:
            time.sleep(0.05)
    service.kill()
    raise AssertionError(f"gunicorn did not start: {service.communicate()[1]}")
