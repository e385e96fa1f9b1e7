"""The example for outgoing calls runs as its documentation says, and its calls arrive."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from moesif_otel.sandbox.server import Sandbox
from tests.capture.upstream import Upstream

_ROOT = Path(__file__).parents[2]


def run_example(name, upstream, sandbox):
    environ = {
        **os.environ,
        "MOESIF_APPLICATION_ID": "example",
        "MOESIF_BASE_URI": sandbox.url,
        "PYTHONPATH": str(_ROOT),
    }
    command = [sys.executable, str(_ROOT / "examples" / "outgoing" / name), upstream.url + "/echo"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def in_order(events):
    """Sort events as the example calls, whichever of two senders was first: POST, PUT, a stream and a failure."""
    return sorted(events, key=lambda event: (["POST", "PUT", "GET"].index(event["request"]["verb"]), "response" not in event))


def test_every_call_of_the_httpx_example_is_recorded():
    """A POST whose card number is masked, a stream and a failure; the health check is left out."""
    with Upstream() as upstream, Sandbox() as sandbox:
        assert run_example("httpx_client.py", upstream, sandbox) == [
            "posted: 200",
            "streamed: 0 bytes",
            "failed: recorded without a response",
            "delivered: 3",
        ]
        events = in_order(sandbox.wait_for_events(3))
    assert [event["request"]["verb"] for event in events] == ["POST", "GET", "GET"]
    assert {event["user_id"] for event in events} == {"ann"}
    assert "4111 1111" not in str(events[0])
    assert "response" not in events[2]


def test_every_call_of_the_example_is_recorded():
    """A POST whose card number is masked, an upload, a stream and a failure, each with user and metadata."""
    with Upstream() as upstream, Sandbox() as sandbox:
        assert run_example("main.py", upstream, sandbox) == [
            "posted: 200",
            "uploaded: 200",
            "streamed: 0 bytes",
            "failed: recorded without a response",
            "delivered: 4",
        ]
        events = in_order(sandbox.wait_for_events(4))
        assert upstream.requests[0]["body"] == b'{"order": 7, "card_number": "4111 1111 1111 1111"}'
    assert [event["request"]["verb"] for event in events] == ["POST", "PUT", "GET", "GET"]
    assert {event["user_id"] for event in events} == {"ann"}
    assert [event["metadata"]["retryable"] for event in events] == [False, False, False, True]
    assert "4111 1111" not in str(events[0]["request"])
    assert "response" not in events[3]
