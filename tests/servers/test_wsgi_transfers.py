"""A quarter of a gigabyte each way: streams stay streams, and the worker stays small."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, urlsplit

import pytest

from moesif_otel.sandbox.server import Sandbox
from tests.servers.harness import KINDS, RunningServer, read_until, request, running

SIZE_BYTES = 256 * 1024 * 1024
MOST_GROWTH_BYTES = 32 * 1024 * 1024
PIECE = b"u" * 1_048_576


def _memory(server: RunningServer) -> dict[str, int]:
    return json.loads(server.exchange(request("GET", "/memory")).split(b"\r\n\r\n", 1)[1])


def _download(server: RunningServer) -> int:
    """Bytes of the body that arrive."""
    with server.connect() as client:
        client.sendall(request("GET", f"/download?case=download&size={SIZE_BYTES}", variant="on"))
        got = len(read_until(client, b"\r\n\r\n").split(b"\r\n\r\n", 1)[1])
        buffer = bytearray(1_048_576)
        while count := client.recv_into(buffer):
            got += count
        return got


def _upload(server: RunningServer) -> bytes:
    with server.connect() as client:
        client.sendall(request("POST", "/upload?case=upload", f"Content-Length: {SIZE_BYTES}", variant="on"))
        for _ in range(SIZE_BYTES // len(PIECE)):
            client.sendall(PIECE)
        return read_until(client, str(SIZE_BYTES).encode())


@pytest.mark.parametrize("name", ["gunicorn-gthread", "werkzeug"])
def test_a_large_transfer_leaves_the_worker_small(name: str) -> None:
    """256 MB down and 256 MB up arrive whole; the worker's peak grows by less than 32 MB, the events know the sizes."""
    with Sandbox() as sandbox:
        env = {"SERVERS_BASE_URI": sandbox.url, "SERVERS_NAME": name}
        with running(KINDS[name], "tests.servers.apps:application", env=env) as server:
            server.exchange(request("GET", "/list?case=warm", variant="on"))
            sandbox.wait_for_events(1)
            before = _memory(server)["VmRSS"]
            assert _download(server) == SIZE_BYTES
            assert _upload(server).endswith(str(SIZE_BYTES).encode())
            # The peak since `before` was read, not what is left of it.
            assert _memory(server)["VmHWM"] - before < MOST_GROWTH_BYTES
            events = {
                parse_qs(urlsplit(event["request"]["uri"]).query)["case"][0]: event.get("metadata", {}).get("moesif_otel")
                for event in sandbox.wait_for_events(3)
            }
    for case, side in (("download", "response_body"), ("upload", "request_body")):
        assert events[case][side]["size_bytes"] == SIZE_BYTES
        assert events[case][side]["truncated"] is True
