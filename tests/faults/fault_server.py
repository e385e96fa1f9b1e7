"""A server on a real socket that answers as a script says: right, wrong, late, by halves, or not at all.

Owns: the socket, and the record of every request. Threads: one that accepts, one a connection.
It knows nothing of the code under test: it parses HTTP by itself and reads events as JSON.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import ssl
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path

CERTIFICATE = Path(__file__).with_name("localhost.pem")
"""Key and self-signed certificate of "localhost", good for a hundred years and for nothing else."""


@dataclass
class Request:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    raw_body: bytes
    connection: int

    @property
    def body(self) -> bytes:
        if self.headers.get("content-encoding") == "gzip":
            return gzip.decompress(self.raw_body)
        return self.raw_body

    @property
    def events(self) -> list:
        return json.loads(self.body)

    @property
    def ids(self) -> list[str]:
        return [event["transaction_id"] for event in self.events]


@dataclass
class Status:
    """Answer with a status."""

    code: int = 201
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Hang:
    """Take the request and never answer."""


class Reset:
    """Take the whole request, then reset the connection."""


class Close:
    """Take the whole request, then close the connection without a word."""


class HalfStatusLine:
    """Answer with half a status line."""


@dataclass
class HalfBody:
    """Answer with a status, promise a body, and send half of it."""

    code: int = 201


@dataclass
class Drip:
    """Answer one byte at a time, for ever."""

    every_s: float = 0.05
    code: int = 201
    head_at_once: bool = False


class Garbage:
    """Answer with something that is no HTTP."""


class FaultServer:
    """Answers by its script; when that is over, by `then`.

    Args:
        script: One entry a request.
        then: What comes after the script: an entry, or a function of the request that gives one.
        tls: Speak TLS with a certificate that nobody has signed.
    """

    def __init__(self, *script, then=None, tls=False) -> None:
        self.script = list(script)
        self.then = then if then is not None else Status(201)
        self.requests: list[Request] = []
        self.answers: list = []
        self.acknowledged: list[str] = []
        self.connections = 0
        self.errors: list[str] = []
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._sending = threading.Lock()
        self._ended = threading.Event()
        self._open: set[socket.socket] = set()
        self._tls = None
        if tls:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(CERTIFICATE)
        self.port = 0
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []
        self.listen()

    # -- for tests

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://localhost:{self.port}" if self._tls else f"http://127.0.0.1:{self.port}"

    @property
    def received(self) -> list[str]:
        with self._lock:
            return [i for request in self.requests if request.path.endswith("/events/batch") for i in request.ids]

    def wait_for_requests(self, n: int, timeout: float = 10) -> bool:
        with self._arrived:
            return self._arrived.wait_for(lambda: len(self.requests) >= n, timeout)

    def wait_for_acknowledged(self, n: int, timeout: float = 10) -> bool:
        with self._arrived:
            return self._arrived.wait_for(lambda: len(self.acknowledged) >= n, timeout)

    def refuse(self) -> None:
        """Stop listening and cut every connection: further ones are refused."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with contextlib.suppress(OSError), self._sending:
                connection.shutdown(socket.SHUT_RDWR)

    def listen(self) -> None:
        """Listen, again on the same port."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._start(self._accept, listener)

    def close(self) -> None:
        self._ended.set()
        self.refuse()
        for thread in self._threads:
            thread.join(30)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()
        assert not self.errors, self.errors

    # -- inside

    def _start(self, target, *args) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                number = self.connections
                self._open.add(connection)
            self._start(self._serve, connection, number)

    def _serve(self, plain, number) -> None:
        connection = plain
        try:
            plain.settimeout(30)
            if self._tls is not None:
                connection = self._tls.wrap_socket(plain, server_side=True)
                with self._lock:
                    self._open.add(connection)
            reader = connection.makefile("rb")
            while (request := self._read(reader, connection, number)) is not None:
                if not self._answer(connection, request):
                    break
        except (OSError, ssl.SSLError):
            pass
        except Exception as exc:
            self.errors.append(repr(exc))
        finally:
            for one in {plain, connection}:
                with contextlib.suppress(OSError):
                    one.close()
            with self._lock:
                self._open -= {plain, connection}

    def _read(self, reader, connection, number) -> Request | None:
        line = reader.readline().decode("latin-1").split()
        if len(line) != 3:
            return None
        headers = {}
        while (text := reader.readline().decode("latin-1").strip()):
            name, _, value = text.partition(":")
            headers[name.strip().lower()] = value.strip()
        if headers.get("expect"):
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        size = int(headers.get("content-length", 0))
        body = reader.read(size)
        if len(body) < size:
            return None
        return Request(line[0], line[1], headers, body, number)

    def _choose(self, request):
        with self._lock:
            entry = self.script.pop(0) if self.script else self.then
        if not isinstance(entry, (Status, Hang, Reset, Close, HalfStatusLine, HalfBody, Drip, Garbage)):
            entry = entry(request)  # outside the lock: it may take its time
        return entry

    def _note(self, request, entry) -> None:
        with self._arrived:
            self.requests.append(request)
            self.answers.append(entry)
            code = getattr(entry, "code", 500)
            # Of a drip the client cannot know the status, unless the head comes at once.
            told = not isinstance(entry, Drip) or entry.head_at_once
            if 200 <= code < 300 and told and request.path.endswith("/events/batch"):
                self.acknowledged += request.ids
            self._arrived.notify_all()

    def _take_back(self, request, entry) -> None:
        with self._lock:
            if 200 <= entry.code < 300 and request.path.endswith("/events/batch"):
                for i in request.ids:
                    self.acknowledged.remove(i)

    def _send(self, connection, entry) -> bool:
        if isinstance(entry, HalfBody):
            connection.sendall(b"HTTP/1.1 %d Because\r\nContent-Length: 1000\r\n\r\nhalf" % entry.code)
            return False
        head = f"HTTP/1.1 {entry.code} Because\r\nContent-Length: {len(entry.body)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in entry.headers.items())
        connection.sendall(head.encode("latin-1") + b"\r\n" + entry.body)
        return True

    def _answer(self, connection, request) -> bool:
        entry = self._choose(request)
        if isinstance(entry, (Status, HalfBody)):
            # Noted and sent in one step for `refuse`: what is noted as acknowledged has left.
            with self._sending:
                self._note(request, entry)
                try:
                    return self._send(connection, entry)
                except OSError:
                    self._take_back(request, entry)
                    raise
        self._note(request, entry)
        if isinstance(entry, HalfStatusLine):
            connection.sendall(b"HTTP/1.")
        elif isinstance(entry, Garbage):
            connection.sendall(b"\x00\xff\x01 what?\r\n\r\n")
        elif isinstance(entry, Drip):
            head = b"HTTP/1.1 %d Because\r\nContent-Length: 100000000\r\nX-Long: " % entry.code
            if entry.head_at_once:
                connection.sendall(head + b"y\r\n\r\n")
                head = b""
            for byte in head + b"x" * 1_000_000:
                if self._ended.wait(entry.every_s):
                    break
                connection.sendall(bytes([byte]))
        elif isinstance(entry, Hang):
            self._ended.wait(60)
        elif isinstance(entry, Reset):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False
