"""The Tornado example runs as its documentation says, and its calls arrive."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import requests

from moesif_otel.sandbox.server import Sandbox
from tests.ports import free_port

_ROOT = Path(__file__).parents[2]


def test_the_notes_service_is_recorded():
    """Notes, an error, a stream and an upload; SIGTERM delivers what is pending."""
    port = free_port()
    with Sandbox() as sandbox:
        environ = {
            **os.environ,
            "MOESIF_APPLICATION_ID": "example",
            "MOESIF_BASE_URI": sandbox.url,
            "PYTHONPATH": str(_ROOT),
            "PORT": str(port),
        }
        service = subprocess.Popen(
            [sys.executable, str(_ROOT / "examples" / "tornado" / "app.py")],
            env=environ,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert service.stdout.readline() == f"serving on http://127.0.0.1:{port}\n"
            here = f"http://127.0.0.1:{port}"
            made = requests.post(f"{here}/notes", json={"text": "buy tea"}, headers={"X-User": "ann"}, timeout=10)
            assert (made.status_code, made.json()) == (201, {"id": 1, "text": "buy tea"})
            assert requests.get(f"{here}/notes/7", timeout=10).status_code == 404
            stream = requests.get(f"{here}/notes/stream", headers={"X-Company": "acme"}, timeout=10)
            assert stream.text == 'id: 1\ndata: "buy tea"\n\n'
            file = os.urandom(3 * 1024 * 1024)
            sent = requests.put(f"{here}/upload", data=file, timeout=10).json()
            assert sent == {"size_bytes": len(file), "sha256": hashlib.sha256(file).hexdigest()}
        finally:
            service.terminate()
            _, _ = service.communicate(timeout=200)
        assert service.returncode == 0
        events = {event["request"]["uri"].removeprefix(here): event for event in sandbox.wait_for_events(4)}
    assert set(events) == {"/notes", "/notes/7", "/notes/stream", "/upload"}
    assert events["/notes"]["user_id"] == "ann"
    assert events["/notes"]["request"]["body"] == {"text": "buy tea"}
    assert events["/notes"]["metadata"]["note"] == 1
    assert events["/notes/stream"]["company_id"] == "acme"
    assert events["/notes/7"]["response"]["status"] == 404
    assert events["/upload"]["response"]["body"]["size_bytes"] == len(file)
