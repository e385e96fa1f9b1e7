"""What the tests of outgoing calls share: real upstream servers, and a pipeline that keeps what it is given."""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
import threading
import time
import weakref
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import trustme
import urllib3

from moesif_otel._capture.body import ByteBudget
from moesif_otel._capture.outgoing import Route, add_route, remove_route
from moesif_otel._guard import Guard
from moesif_otel.settings import Settings

if TYPE_CHECKING:
    import ssl

URLLIB3_1 = urllib3.__version__.startswith("1.")
LINES = b"".join(b"line %d\n" % i for i in range(300))
JSON = b'{"name": "M\xc3\xb6hre", "list": [1, 2, 3]}'


class Upstream(ThreadingHTTPServer):
    """An HTTP/1.1 server with the answers that break naive captures; notes what it was sent, connection by connection."""

    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.scheme = "https" if tls is not None else "http"
        self.requests: list[dict[str, Any]] = []
        self.connections = 0
        self.may_go_on = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    def wait_for_requests(self, number=1):
        """Wait until it was sent so many requests: one that nobody waits for may arrive after its caller has left."""
        while len(self.requests) < number:
            time.sleep(0.005)

    def handle_error(self, request, client_address):
        pass  # clients that leave are part of the game

    def __enter__(self):
        self._thread.start()
        _RUNNING[self.url] = self
        return self

    def __exit__(self, *_):
        self.may_go_on.set()
        self.shutdown()
        self.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        host = "localhost" if self.scheme == "https" else "127.0.0.1"
        return f"{self.scheme}://{host}:{self.server_port}"


_RUNNING: weakref.WeakValueDictionary[str, Upstream] = weakref.WeakValueDictionary()


async def until_asked(url):
    """Wait until the upstream at an address has been sent a request."""
    while not _RUNNING[url].requests:  # noqa: ASYNC110 - they arrive on threads
        await asyncio.sleep(0.005)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Upstream

    def setup(self):
        super().setup()
        self.server.connections += 1
        self.connection_number = self.server.connections

    def log_message(self, *_):
        pass

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces = []
            while True:
                size = int(self.rfile.readline(), 16)
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
                if not size:
                    return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _serve(self):
        parts = urlsplit(self.path)
        name, _, rest = parts.path[1:].partition("/")
        query = dict(parse_qsl(parts.query))
        if name == "refuse-upload":
            self.close_connection = True
            self._send(413, b"too much")
            return
        body = self._read_body()
        self.server.requests.append(
            {
                "method": self.command,
                "path": self.path,
                "headers": self.headers.items(),
                "body": body,
                "connection": self.connection_number,
            }
        )
        getattr(self, "_" + name.replace("-", "_"))(rest, query, body)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = do_PATCH = _serve

    def _send(self, status, body, *headers, length=True):
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        if length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _start_chunked(self, *headers):
        self.send_response(200)
        for header in headers:
            self.send_header(*header)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _json(self, *_):
        self._send(200, JSON, ("Content-Type", "application/json"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"))

    def _echo(self, _rest, _query, body):
        self._send(200, body, ("Content-Type", self.headers.get("Content-Type", "text/plain")))

    def _status(self, rest, *_):
        self._send(int(rest), b"status " + rest.encode(), ("Content-Type", "text/plain"))

    _health = _json

    def _empty(self, *_):
        self.send_response(204)
        self.end_headers()

    def _nothing(self, *_):
        self._send(200, b"")

    def _lines(self, *_):
        self._send(200, LINES, ("Content-Type", "text/plain"))

    def _chunked(self, *_):
        self._start_chunked(("Content-Type", "text/plain"))
        for i in range(0, len(LINES), 500):
            self._chunk(LINES[i : i + 500])
        self._chunk(b"")

    def _until_close(self, *_):
        self.close_connection = True
        self._send(200, LINES, ("Connection", "close"), length=False)

    def _gzip(self, *_):
        self._send(200, gzip.compress(LINES, mtime=0), ("Content-Encoding", "gzip"), ("Content-Type", "text/plain"))

    def _gzip_chunked(self, *_):
        self._start_chunked(("Content-Encoding", "gzip"), ("Content-Type", "text/plain"))
        data = gzip.compress(LINES, mtime=0)
        for i in range(0, len(data), 100):
            self._chunk(data[i : i + 100])
        self._chunk(b"")

    def _not_gzip(self, *_):
        self._send(200, b"no gzip at all", ("Content-Encoding", "gzip"))

    def _unknown_coding(self, *_):
        self._send(200, b"opaque", ("Content-Encoding", "x-own"))

    def _slow(self, *_):
        self._start_chunked(("Content-Type", "text/event-stream"))
        self._chunk(b"data: 1\n\n")
        self.server.may_go_on.wait(10)
        self._chunk(b"data: 2\n\n")
        self._chunk(b"")

    def _silent(self, *_):
        self.server.may_go_on.wait(10)
        self.close_connection = True

    def _redirect(self, rest, query, _body):
        left = int(rest)
        status = int(query.get("status", 302))
        target = f"/redirect/{left - 1}?status={status}" if left > 1 else query.get("to", "/json")
        self._send(status, b"moved", ("Location", target), ("Set-Cookie", f"hop{left}=1"))

    def _redirect_echo(self, *_):
        self._send(307, b"moved", ("Location", "/echo"))

    def _drop(self, *_):
        self.close_connection = True

    def _reset(self, *_):
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 100)
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _short(self, *_):
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 100)

    def _bad_chunk(self, *_):
        self.close_connection = True
        self._start_chunked()
        self._chunk(b"first")
        self.wfile.write(b"zzz\r\n")

    def _big(self, rest, *_):
        size = int(rest)
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        piece = b"\0" * 65_536
        for _ in range(size // len(piece)):
            self.wfile.write(piece)
        self.wfile.write(piece[: size % len(piece)])


class RecordingPipeline:
    """Fulfils `Pipeline` and keeps what the capture gives it, with what a callback and a converter would see."""

    def __init__(self, **options):
        self.settings = Settings.of({"APPLICATION_ID": "recording", **options})
        self.guard = Guard()
        self.budget = ByteBudget(self.settings.event_queue_bytes)
        self.generation = 0
        self.open: list[Any] = []
        self.exchanges: list[Any] = []
        self.late: list[Any] = []
        self.seen_by_callbacks: list[tuple[Any, ...]] = []
        self.while_callbacks_run = lambda request, response: None

    def watch(self, provider):
        pass

    def watch_global_provider(self):
        pass

    def has_callbacks(self, exchange):
        return True

    def opened(self, exchange):
        self.open.append(exchange)

    def finished(self, exchange):
        arguments = tuple(exchange.callback_arguments)
        self.seen_by_callbacks.append(arguments)
        try:
            self.while_callbacks_run(*arguments)
        except Exception as exc:
            self.guard.caught("callback", exc)
        exchange.release()
        self.exchanges.append(exchange)

    def finished_late(self, exchange):
        self.late.append(exchange)

    def superseded(self, exchange):
        exchange.discard()

    @property
    def only(self):
        """The one exchange that came."""
        (exchange,) = self.exchanges
        return exchange

    def run_late(self):
        """Do what the pipeline's own thread does with calls that finalizers ended."""
        while self.late:
            self.finished(self.late.pop(0))


def add(pipeline, **more):
    """Capture for a pipeline; gives what `remove_route` takes."""
    route = Route(pipeline, **more)
    add_route(route)
    return route


@contextmanager
def capturing(*pipelines, everywhere=True, clients=("requests",), **options):
    """Capture for pipelines (one of its own by default), and stop again."""
    pipelines = pipelines or (RecordingPipeline(**options),)
    routes = [add(pipeline, everywhere=everywhere, clients=clients) for pipeline in pipelines]
    try:
        yield pipelines[0] if len(pipelines) == 1 else pipelines
    finally:
        for route in routes:
            remove_route(route)
    for pipeline in pipelines:
        assert pipeline.guard.counts() == {}, "the capture had an error of its own"


def make_certificate(directory):
    """Make a CA of our own and a certificate of `localhost` signed by it: (CA file, certificate and key file)."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    both = directory / "server.pem"
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(both)
    return directory / "ca.pem", both
