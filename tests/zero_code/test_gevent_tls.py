"""gunicorn's gevent workers, whose patch of `ssl` comes after instrumentors have imported urllib3: delivery over TLS."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from typing import TYPE_CHECKING

import pytest

from moesif_otel.sandbox.server import Sandbox
from tests.ports import free_port
from tests.zero_code.kit import ROOT, Program, command, environment, running, script

if TYPE_CHECKING:
    from collections.abc import Iterator

CERTIFICATE = ROOT / "tests" / "faults" / "localhost.pem"


def pump(source: socket.socket, target: socket.socket) -> None:
    """Pass bytes on until an end."""
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def tls_in_front_of(port: int) -> Iterator[int]:
    """A port that speaks TLS, in front of one that does not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    ends: list[socket.socket] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                client: socket.socket = context.wrap_socket(plain, server_side=True)
            except OSError:
                plain.close()
                continue
            behind = socket.create_connection(("127.0.0.1", port))
            ends.extend((client, behind))
            for source, target in ((client, behind), (behind, client)):
                threading.Thread(target=pump, args=(source, target), daemon=True).start()

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        serving.join(30)
        for end in ends:
            end.close()


def test_events_arrive_over_tls() -> None:
    """Without and with `--preload`; without and with outgoing calls, for which urllib3 is imported at the start."""
    pytest.importorskip("gevent")
    pytest.importorskip("opentelemetry.instrumentation.urllib3")
    variants = {"plain": ([], "false"), "preload": (["--preload"], "true")}
    with Sandbox() as sandbox, tls_in_front_of(sandbox.port) as port:
        programs = {}
        for name, (words, outgoing) in variants.items():
            at = free_port()
            env = environment(
                f"https://localhost:{port}",
                name,
                DJANGO_SETTINGS_MODULE="django_settings",
                MOESIF_CAPTURE_OUTGOING_REQUESTS=outgoing,
                REQUESTS_CA_BUNDLE=str(CERTIFICATE),
            )
            gunicorn = (script("gunicorn"), "--worker-class", "gevent", "--bind", f"127.0.0.1:{at}", *words)
            programs[name] = Program(command(*gunicorn, "composite:application"), env, at)
        with running(programs):
            for program in programs.values():
                for _ in range(3):
                    assert program.call("POST", "/flask/echo", b'{"n": 1}', Content_Type="application/json")[0] == 201
            for name in variants:
                assert len(sandbox.wait_for_events(3, application_id=name)) == 3, programs[name].output
