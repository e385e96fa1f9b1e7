"""Standing at every way out of the process: the wire, the logs, the console, the metrics, other exporters' spans."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from .planting import TAGS
from .reading import found_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# What these log on a thread of the application's they log without us too: its own errors, its own calls.
_THE_APPLICATIONS_OWN = ("cheroot", "tornado.", "urllib3.", "asyncio")


@dataclass(frozen=True)
class Sent:
    """One request as it went over the wire."""

    head: bytes
    body: bytes

    @property
    def headers(self) -> list[tuple[str, str]]:
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]

    def without_header(self, wanted: str) -> bytes:
        """All of its bytes but one header's value."""
        lines = self.head.split(b"\r\n")
        kept = [line for line in lines if not line.lower().startswith(wanted.encode() + b":")]
        return b"\r\n".join(kept) + b"\r\n\r\n" + self.body


class Relay:
    """A port that passes bytes on to another one and keeps everything that was sent through it."""

    def __init__(self, target_url: str) -> None:
        parts = urlsplit(target_url)
        self._target = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._streams: list[bytearray] = []
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._run(self._accept)

    def _run(self, function: Any, *args: Any) -> None:
        thread = threading.Thread(target=function, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            if select.select([self._listener], [], [], 0.1)[0]:
                client, _ = self._listener.accept()
                stream = bytearray()
                self._streams.append(stream)
                self._run(self._pump, client, stream)

    def _pump(self, client: socket.socket, stream: bytearray) -> None:
        with client, socket.create_connection(self._target) as upstream, contextlib.suppress(OSError):
            while not self._stopping.is_set():
                for readable in select.select([client, upstream], [], [], 0.1)[0]:
                    data = readable.recv(65536)
                    if not data:
                        return
                    if readable is client:
                        stream += data
                        upstream.sendall(data)
                    else:
                        client.sendall(data)

    @property
    def sent(self) -> list[Sent]:
        """Every request so far."""
        return [request for stream in tuple(self._streams) for request in _requests(bytes(stream))]

    def close(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(30)
        self._listener.close()


def _requests(stream: bytes) -> Iterator[Sent]:
    while stream:
        head, _, rest = stream.partition(b"\r\n\r\n")
        length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
        yield Sent(head, rest[:length])
        stream = rest[length:]


class Logs(logging.Handler):
    """Keeps all that every logger says, down to DEBUG, with exceptions, arguments and attributes."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.ours: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        of_ours = record.name.startswith("moesif_otel") or (record.threadName or "").startswith("moesif-otel")
        if record.name.startswith(_THE_APPLICATIONS_OWN) and not of_ours:
            return
        line = f"{self.format(record)}\n{record.__dict__!r}"
        self.lines.append(line)
        if record.name.startswith("moesif_otel"):
            self.ours.append(record.getMessage())

    @contextlib.contextmanager
    def listening(self) -> Iterator[Logs]:
        root = logging.getLogger()
        level, ours_level = root.level, logging.getLogger("moesif_otel").level
        root.addHandler(self)
        root.setLevel(logging.DEBUG)
        try:
            yield self
        finally:
            root.removeHandler(self)
            root.setLevel(level)
            logging.getLogger("moesif_otel").setLevel(ours_level)


class Others:
    """Another exporter on the same provider."""

    def __init__(self) -> None:
        self.memory = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.memory))

    def everything(self) -> str:
        return "\n".join(span.to_json() for span in self.memory.get_finished_spans())


def assert_absent(where: str, data: bytes | str | Iterable[bytes | str], secrets: Iterable[str]) -> None:
    """Fail with the place, and the surroundings of the first secret that is there."""
    secrets = list(secrets)
    for piece in [data] if isinstance(data, (bytes, str)) else list(data):
        found = [TAGS.get(secret, secret) for secret in found_in(piece, secrets)]
        assert not found, f"{where}: {found} in {piece[:20_000]!r}"
