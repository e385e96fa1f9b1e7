"""A server that hangs, and a flood of requests: bounded memory, every request answered, every event accounted for."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

from tests.servers.harness import ROOT, clean_environ

REQUESTS = 60_000
BODY_BYTES = 8_192
MOST_GROWTH_BYTES = 100_000_000

PROGRAM = """
import io, json, os, sys, threading
from wsgiref.util import setup_testing_defaults
from moesif_otel.wsgi import MoesifMiddleware

url, requests, body_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
body = json.dumps({"data": "x" * (body_bytes - 20)}).encode()

def app(environ, start_response):
    environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "application/json")])
    return [bytes(bytearray(body))]  # a new object for each answer, as real applications make them

middleware = MoesifMiddleware(app, {"APPLICATION_ID": "bounds", "BASE_URI": url, "SHUTDOWN_TIMEOUT": 1})
template = {"REQUEST_METHOD": "POST", "CONTENT_LENGTH": str(len(body)), "CONTENT_TYPE": "application/json"}
setup_testing_defaults(template)

def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

def ask():
    result = middleware({**template, "wsgi.input": io.BytesIO(bytes(bytearray(body)))}, lambda *_: None)
    assert len(b"".join(result)) == len(body)

for _ in range(50):
    ask()
before, broken = memory("VmRSS"), 0
for n in range(requests):
    ask()
    if n % 500 == 0:
        stats = middleware.stats()
        broken += stats["accepted"] != stats["delivered"] + sum(stats["dropped"].values()) + stats["pending"]
grown = memory("VmHWM") - before
stats = middleware.stats()
middleware.shutdown(500)
last = middleware.stats()
print(json.dumps({"grown": grown, "broken": broken, "stats": dict(stats), "last": dict(last)}))
"""


def test_a_hanging_moesif_and_sixty_thousand_requests() -> None:
    """The process grows by less than 100 MB, the law holds all along, and at the end nothing is pending."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:  # takes connections, answers nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-c", PROGRAM, url, str(REQUESTS), str(BODY_BYTES)]
        done = subprocess.run(
            command, cwd=ROOT, env=clean_environ(), capture_output=True, text=True, timeout=200, check=False
        )
    assert done.returncode == 0, done.stderr[-3_000:]
    found = json.loads(done.stdout)
    assert found["grown"] < MOST_GROWTH_BYTES
    assert found["broken"] == 0
    stats, last = found["stats"], found["last"]
    assert stats["accepted"] == REQUESTS + 50
    assert stats["pending"] <= 10_000
    assert stats["held_bytes"] <= 64 * 1024 * 1024 + 10_000 * 4_096
    assert last["pending"] == 0
    assert last["accepted"] == last["delivered"] + sum(last["dropped"].values())
