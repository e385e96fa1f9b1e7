"""What a request costs on its own thread: bare application, OpenTelemetry's WSGI middleware, ours, and moesifwsgi.

    python benchmarks/wsgi.py                   # what is installed here
    python benchmarks/wsgi.py --rounds 60 --json

Run it in an environment with moesif_otel, and (moesifwsgi wants older packages) in one with moesifwsgi; what cannot be
imported is left out. Everything is delivered to a local server that answers 201 at once, in a process of its own.

The request path is measured with `time.thread_time` (CPU of the request's thread alone), the whole process with
`time.process_time` (our threads included, after a flush). Variants alternate in short blocks and the medians of the
blocks are compared, so that a noisy machine disturbs all of them alike.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import time

SIZES_BYTES = {"0.2 KB": 200, "4 KB": 4_000, "40 KB": 40_000}
SERVER = r"""
import socketserver, sys
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        while True:
            line = self.rfile.readline()
            if not line:
                return
            length, get = 0, line.startswith(b"GET")
            while (header := self.rfile.readline()) not in (b"\r\n", b""):
                name, _, value = header.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            self.rfile.read(length)
            body = b"{}" if get else b""
            status = b"200 OK" if get else b"201 Created"
            self.wfile.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))
class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
with Server(("127.0.0.1", 0), Handler) as server:
    print(server.server_address[1], flush=True)
    server.serve_forever()
"""


def payload(size_bytes):
    row = {"id": 12345, "name": "A name of some length", "tags": ["a", "b"], "price": 12.5, "active": True}
    rows = [row] * max(1, size_bytes // (len(json.dumps(row)) + 2))
    return json.dumps({"items": rows}).encode()


def make_app(body):
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]

    def app(environ, start_response):
        environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        start_response("200 OK", list(headers))
        return [body]

    return app


def make_environ(body):
    return {
        "REQUEST_METHOD": "POST",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/api/items/17",
        "QUERY_STRING": "expand=owner&limit=20",
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(body)),
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8000",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "10.1.2.3",
        "REMOTE_PORT": "51234",
        "HTTP_HOST": "shop.example",
        "HTTP_USER_AGENT": "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36",
        "HTTP_ACCEPT": "application/json",
        "HTTP_ACCEPT_ENCODING": "gzip, deflate, br",
        "HTTP_ACCEPT_LANGUAGE": "en-US,en;q=0.9",
        "HTTP_X_FORWARDED_FOR": "203.0.113.9, 10.0.0.1",
        "HTTP_CONNECTION": "keep-alive",
        "HTTP_AUTHORIZATION": "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJl",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }


def start_response(status, headers, exc_info=None):
    return None


def serve_block(app, bodies):
    """Serve one block of requests as a server would; gives CPU seconds of this thread, and the answers' bytes."""
    environs = [make_environ(body) for body in bodies]
    total = 0
    started_s = time.thread_time()
    while environs:
        # A server lets go of the environ after the request, and so do we.
        result = app(environs.pop(), start_response)
        for piece in result:
            total += len(piece)
        close = getattr(result, "close", None)
        if close is not None:
            close()
    return time.thread_time() - started_s, total


def variants(body, url):
    """Name to (application, flush); what is not installed is left out."""
    app = make_app(body)
    found = {"bare": (app, None)}
    try:
        from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware
        from opentelemetry.metrics import NoOpMeterProvider
        from opentelemetry.sdk.trace import TracerProvider

        found["OTel alone"] = (
            OpenTelemetryMiddleware(
                app, tracer_provider=TracerProvider(shutdown_on_exit=False), meter_provider=NoOpMeterProvider()
            ),
            None,
        )
    except ImportError:
        pass
    try:
        from moesif_otel.wsgi import MoesifMiddleware

        ours = MoesifMiddleware(app, {"APPLICATION_ID": "benchmark", "BASE_URI": url, "EVENT_QUEUE_SIZE": 1_000_000})
        found["moesif-otel"] = (ours, ours.force_flush)
        found["moesif-otel, no id header"] = (
            quiet := MoesifMiddleware(
                app,
                {
                    "APPLICATION_ID": "benchmark",
                    "BASE_URI": url,
                    "EVENT_QUEUE_SIZE": 1_000_000,
                    "DISABLED_TRANSACTION_ID": True,
                },
            ),
            quiet.force_flush,
        )
    except ImportError:
        pass
    try:
        from moesifwsgi import MoesifMiddleware as OldMiddleware

        old = OldMiddleware(app, {"APPLICATION_ID": "benchmark", "LOCAL_MOESIF_BASEURL": url, "BASE_URI": url})
        found["moesifwsgi"] = (old, lambda _millis: time.sleep(2.5))
    except ImportError:
        pass
    return found


def measure(size_bytes, url, *, rounds, block):
    body = payload(size_bytes)
    candidates = variants(body, url)
    expected = len(body) * block
    thread_us = {name: [] for name in candidates}
    process_us = {}
    for app, _flush in candidates.values():
        serve_block(app, [body] * block)
    for turn in range(rounds):
        names = list(candidates)
        names = names[turn % len(names) :] + names[: turn % len(names)]
        for name in names:
            spent_s, total = serve_block(candidates[name][0], [body] * block)
            assert total == expected
            thread_us[name].append(spent_s / block * 1e6)
            if candidates[name][1] is not None and name != "moesifwsgi":
                candidates[name][1](5_000)  # its threads shall not work while the next one is measured
    for name, (app, flush) in candidates.items():
        if flush is not None:
            flush(5_000)
        started_s = time.process_time()
        for _ in range(10):
            serve_block(app, [body] * block)
        if flush is not None:
            flush(5_000)
        process_us[name] = (time.process_time() - started_s) / (10 * block) * 1e6
    return {name: (statistics.median(thread_us[name]), process_us[name]) for name in candidates}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="blocks for each variant (default 40)")
    parser.add_argument("--block", type=int, default=100, help="requests in a block (default 100)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE)
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        results = {
            name: measure(size_bytes, url, rounds=options.rounds, block=options.block)
            for name, size_bytes in SIZES_BYTES.items()
        }
    finally:
        server.kill()
    if options.json:
        print(json.dumps(results, indent=1))
        return
    print(
        f"{'bodies':8} {'variant':26} {'request thread':>15} {'over OTel':>10} {'whole process':>14}   us of CPU"
    )
    for size, found in results.items():
        base = found.get("OTel alone", found["bare"])[0]
        for name, (thread, process) in found.items():
            print(f"{size:8} {name:26} {thread:15.1f} {thread - base:+10.1f} {process:14.1f}")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # moesifwsgi waits for ever at exit for a queue that is not empty
