"""Real WSGI servers in processes of their own, raw sockets towards them, and what came back byte for byte."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = Path(__file__).with_name("launch.py")
BIN = Path(sys.executable).parent
START_PATIENCE_S = 60.0
ANSWER_PATIENCE_S = 60.0


@dataclass(frozen=True)
class ServerKind:
    """A server and what it can do."""

    name: str
    command: str  # words; {port} and {app} are filled in
    keeps_alive: bool = True
    decodes_chunks: bool = True
    reads_whole_request: bool = False  # before it calls the application
    sends_files: bool = False  # has a `wsgi.file_wrapper`
    by_descriptor: bool = False  # and uses sendfile

    def words(self, port: int, app: str, *extra: str) -> list[str]:
        return [*self.command.format(port=port, app=app, py=sys.executable, bin=BIN, launch=LAUNCH).split(), *extra]


ASGI_SERVERS = (
    ServerKind("uvicorn", "{py} -m uvicorn {app} --port {port} --log-level warning"),
    ServerKind("hypercorn", "{py} -m hypercorn {app} -b 127.0.0.1:{port} --log-level warning"),
    ServerKind("daphne", "{py} -m daphne {app} -b 127.0.0.1 -p {port} -v 0"),
    ServerKind("granian", "{py} -m granian --interface asgi {app} --host 127.0.0.1 --port {port} --log-level warning"),
)


def _gunicorn(worker: str, *, preload: bool) -> ServerKind:
    flags = " --preload" if preload else ""
    threads = " --threads 4" if worker == "gthread" else ""
    return ServerKind(
        f"gunicorn-{worker}{'-preload' if preload else ''}",
        f"{{py}} -m gunicorn {{app}} -k {worker}{threads}{flags} -w 1 -b 127.0.0.1:{{port}} --no-control-socket"
        " --log-level warning --graceful-timeout 10",
        keeps_alive=worker != "sync",
        sends_files=True,
        by_descriptor=worker != "gevent",
    )


KINDS = {
    kind.name: kind
    for kind in (
        ServerKind("wsgiref", "{py} {launch} wsgiref {port} {app}", False, False, sends_files=True),
        ServerKind("werkzeug", "{py} {launch} werkzeug {port} {app}", False),
        *(_gunicorn(worker, preload=preload) for worker in ("sync", "gthread", "gevent") for preload in (False, True)),
        ServerKind("gevent", "{py} {launch} gevent {port} {app}"),
        ServerKind("waitress", "{py} {launch} waitress {port} {app}", reads_whole_request=True, sends_files=True),
        ServerKind("cheroot", "{py} {launch} cheroot {port} {app}"),
        ServerKind(
            "uwsgi",
            "{bin}/uwsgi --http-socket 127.0.0.1:{port} --master --processes 2 --enable-threads --need-app --die-on-term"
            " --disable-logging --module {app}",
            keeps_alive=False,
            decodes_chunks=False,
            sends_files=True,
            by_descriptor=True,
        ),
    )
}


@dataclass
class RunningServer:
    """A server process; `exchange` talks to it."""

    port: int
    process: subprocess.Popen[bytes]
    output: Path
    host: str = "127.0.0.1"
    socket_timeout_s: float = field(default=ANSWER_PATIENCE_S)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=self.socket_timeout_s)

    def exchange(self, raw: bytes) -> bytes:
        """Send bytes, give everything that comes back until the server closes."""
        with self.connect() as client:
            client.sendall(raw)
            return read_all(client)

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def stop(self, how: signal.Signals = signal.SIGTERM, patience_s: float = 60.0) -> int:
        """End the process and its children, and give its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"the server did not stop; it said:\n{self.said()}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def spawn(kind: ServerKind, app: str, *extra: str, env: dict[str, str] | None = None) -> RunningServer:
    """Start a server; it may not listen yet."""
    port = free_port()
    handle, name = tempfile.mkstemp(prefix="moesif-otel-server-", suffix=".log")
    with os.fdopen(handle, "wb") as output:
        process = subprocess.Popen(
            kind.words(port, app, *extra),
            cwd=ROOT,
            env={**clean_environ(), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return RunningServer(port, process, Path(name))


def clean_environ() -> dict[str, str]:
    """The environment without options of ours or of OpenTelemetry that a developer may have set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MOESIF_", "OTEL_", "SERVERS_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def until_it_listens(server: RunningServer) -> RunningServer:
    """Wait for the first connection that is taken; the process must live."""
    deadline = time.monotonic() + START_PATIENCE_S
    while True:
        if server.process.poll() is not None:
            raise AssertionError(f"the server ended with {server.process.returncode}; it said:\n{server.said()}")
        try:
            server.connect().close()
            return server
        except OSError:
            if time.monotonic() > deadline:
                server.stop(signal.SIGKILL)
                raise AssertionError(f"the server does not listen; it said:\n{server.said()}") from None
            time.sleep(0.02)


@contextlib.contextmanager
def running(kind: ServerKind, app: str, *extra: str, env: dict[str, str] | None = None):
    """A server that listens, ended (gracefully) at the end."""
    server = spawn(kind, app, *extra, env=env)
    try:
        yield until_it_listens(server)
    finally:
        server.stop()
        server.output.unlink(missing_ok=True)


def request(
    method: str, target: str, *headers: str, body: bytes = b"", variant: str = "", version: str = "1.1"
) -> bytes:
    """Bytes of one request that asks for the connection to be closed after it."""
    return _head(method, target, ("Connection: close", *headers), body, variant, version) + body


def keep_alive_request(method: str, target: str, *headers: str, body: bytes = b"", variant: str = "") -> bytes:
    return _head(method, target, headers, body, variant, "1.1") + body


def _head(method, target, headers, body, variant, version) -> bytes:
    rows = [f"{method} {target} HTTP/{version}"]
    if version == "1.1" and not any(header.lower().startswith("host:") for header in headers):
        rows.append("Host: shop.example:8443")
    rows += [f"X-Variant: {variant}", *headers]
    if body and not any(header.lower().startswith(("content-length:", "transfer-encoding:")) for header in headers):
        rows.append(f"Content-Length: {len(body)}")
    return "\r\n".join(rows).encode("latin-1") + b"\r\n\r\n"


def read_all(client: socket.socket) -> bytes:
    """Everything until the other side closes (a reset ends it too)."""
    pieces = []
    try:
        while piece := client.recv(65_536):
            pieces.append(piece)
    except ConnectionResetError:
        pieces.append(b"<reset>")
    return b"".join(pieces)


def read_until(client: socket.socket, wanted: bytes, *, at_least_bytes: int = 0) -> bytes:
    """Read until `wanted` and so many bytes have come, or the connection ends."""
    got = b""
    while wanted not in got or len(got) < at_least_bytes:
        piece = client.recv(65_536)
        if not piece:
            break
        got += piece
    return got


def leave(client: socket.socket) -> None:
    """Go away as a client does that is killed: with a reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def eventually(question, patience_s: float = 60.0):
    """Ask until the answer is true, and give it; the last answer when patience ends."""
    deadline = time.monotonic() + patience_s
    while not (answer := question()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return answer


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def normal(answer: bytes) -> list[bytes]:
    """An answer as lines, without the two headers that differ from run to run (Date, Server)."""
    return [line for line in answer.split(b"\r\n") if not line.lower().startswith((b"date:", b"server:"))]


def without_transaction_id(lines: list[bytes]) -> tuple[list[bytes], list[str]]:
    """Take our documented header out; gives what is left and the ids."""
    name = b"x-moesif-transaction-id:"
    found = [line.split(b":", 1)[1].strip().decode() for line in lines if line.lower().startswith(name)]
    return [line for line in lines if not line.lower().startswith(name)], found
