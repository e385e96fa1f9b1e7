"""The way to Moesif: certificates are always verified; CA bundles and proxies come from the environment."""

from __future__ import annotations

import contextlib
import gzip
import select
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from moesif_otel import MoesifMiddleware, MoesifSpanExporter
from moesif_otel.errors import MoesifConfigError
from moesif_otel.settings import OPTIONS, Settings
from tests.faults import fault_server
from tests.faults.fault_server import FaultServer

from .planting import Case, Message, text_for
from .serving import send, wsgi_app, wsgi_server
from .watching import Logs, assert_absent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MARK = text_for("what an event is known by")
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*_PROXY_VARIABLES, *map(str.upper, _PROXY_VARIABLES), "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CA of our own; the server presents a certificate that it has signed. Gives the CA's file."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    ca.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    monkeypatch.setattr(fault_server, "CERTIFICATE", tmp_path / "server.pem")
    return tmp_path / "ca.pem"


def _deliver(base_uri: str, **options: Any) -> MoesifMiddleware:
    case = Case("call", request=Message([("Content-Type", "application/json")], f'{{"note": "{MARK}"}}'.encode()))
    settings = {"APPLICATION_ID": "transport", "BASE_URI": base_uri, "EXPORT_TIMEOUT": 3, "SHUTDOWN_TIMEOUT": 1, **options}
    middleware = MoesifMiddleware(wsgi_app([case]), settings)
    with wsgi_server(middleware) as port:
        send(port, case)
    middleware.force_flush(3_000)
    middleware.shutdown(500)
    return middleware


def _events(server: FaultServer) -> list[Any]:
    return [request for request in tuple(server.requests) if request.path.endswith("/v1/events/batch")]


@pytest.mark.parametrize(
    "options",
    [{}, {"VERIFY": False, "VERIFY_SSL": False, "SSL_VERIFY": False, "INSECURE": True, "DEBUG": True}],
    ids=["none", "all"],
)
@pytest.mark.usefixtures("authority")
def test_no_option_switches_verification_off(options: dict[str, Any]) -> None:
    """A server whose certificate nobody vouches for gets no byte; an option of such a name is unknown, and said so."""
    with Logs().listening() as logs, FaultServer(tls=True) as server:
        middleware = _deliver(server.url, **options)
        assert server.requests == []
        assert middleware.stats()["delivered"] == 0
        assert any("SSLCertVerificationError" in line for line in logs.ours)
        for name in options.keys() - OPTIONS.keys():
            assert any(name in line and "unknown option" in line for line in logs.ours)


def test_there_is_no_such_option() -> None:
    """Neither as an option nor as the exporter's keyword."""
    for name in OPTIONS:
        assert not any(word in name for word in ("VERIFY", "TLS", "SSL", "CERT", "INSECURE", "TRUST", "PROXY"))


def test_a_ca_bundle_of_the_environment(authority: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`REQUESTS_CA_BUNDLE` is trusted, and from then on the same server gets the event."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority))
    with FaultServer(tls=True) as server:
        assert _deliver(server.url).stats()["delivered"] == 1
        (request,) = _events(server)
        assert MARK.encode() in request.body


def test_another_host_s_certificate_is_refused(authority: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also a trusted authority's certificate must name the host."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    ca.issue_cert("elsewhere.example").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority))
    with FaultServer(tls=True) as server:
        assert _deliver(server.url).stats()["delivered"] == 0
        assert server.requests == []


class _Tunnel:
    """A proxy that opens tunnels (`CONNECT`) and keeps what passes through them."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.heads: list[bytes] = []
        self.passed = bytearray()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._tunnel, args=(client,), daemon=True).start()

    def _tunnel(self, client: socket.socket) -> None:
        head = b""
        with client, contextlib.suppress(OSError):
            while b"\r\n\r\n" not in head:
                head += client.recv(4096)
            self.heads.append(head)
            host, _, port = head.split()[1].decode().partition(":")
            with socket.create_connection((host, int(port))) as upstream:
                client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
                while True:
                    for readable in select.select([client, upstream], [], [], 20)[0]:
                        data = readable.recv(65536)
                        if not data:
                            return
                        self.passed += data
                        (upstream if readable is client else client).sendall(data)


@pytest.fixture
def tunnel() -> Iterator[_Tunnel]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = _Tunnel(listener)
        threading.Thread(target=running.serve, daemon=True).start()
        yield running


def test_https_through_a_proxy_is_a_tunnel(authority: Path, monkeypatch: pytest.MonkeyPatch, tunnel: _Tunnel) -> None:
    """`HTTPS_PROXY` sees the host's name and TLS: no application id, no event."""
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{tunnel.listener.getsockname()[1]}")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority))
    application_id = text_for("application id behind a proxy")
    with FaultServer(tls=True) as server:
        assert _deliver(server.url, APPLICATION_ID=application_id).stats()["delivered"] == 1
        assert len(_events(server)) == 1
        assert tunnel.heads
        assert all(head.startswith(b"CONNECT localhost:%d " % server.port) for head in tunnel.heads)
        assert tunnel.passed
        seen = [*tunnel.heads, bytes(tunnel.passed)]
        assert_absent("what the proxy sees", seen, [application_id, MARK])


@pytest.mark.usefixtures("authority")
def test_https_through_a_proxy_is_verified(monkeypatch: pytest.MonkeyPatch, tunnel: _Tunnel) -> None:
    """A proxy is no reason to trust whoever answers."""
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{tunnel.listener.getsockname()[1]}")
    with FaultServer(tls=True) as server:
        assert _deliver(server.url).stats()["delivered"] == 0
        assert server.requests == []
        assert tunnel.heads


def test_http_proxy_and_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """`HTTP_PROXY` gets what is for an http address; `NO_PROXY` goes around it."""
    with FaultServer() as proxy, FaultServer() as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert _deliver(server.url).stats()["delivered"] == 1
        (request,) = [one for one in tuple(proxy.requests) if one.method == "POST"]
        assert request.path == f"{server.url}/v1/events/batch"
        assert MARK.encode() in gzip.decompress(request.raw_body)
        assert server.requests == []
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert _deliver(server.url).stats()["delivered"] == 1
        assert len(_events(server)) == 1


@pytest.mark.parametrize(
    "address", ["https://ann:{}@moesif.example/?q", "htp://ann:{}@moesif.example", "ann:{}@moesif.example", "http:/ann:{}/x@y"]
)
def test_an_address_with_a_password_is_not_quoted(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the error of a wrong one, from code or from the environment, nor in a right one's settings."""
    password = text_for("password of a proxy")
    written = address.format(password)
    with pytest.raises(MoesifConfigError) as told:
        Settings.of({"APPLICATION_ID": "transport", "BASE_URI": written})
    assert_absent("the error", [str(told.value), repr(told.value)], [password])
    monkeypatch.setenv("MOESIF_BASE_URI", written)
    with pytest.raises(MoesifConfigError) as told_again:
        MoesifSpanExporter("transport")
    assert_absent("the error", str(told_again.value), [password])
    right = Settings.of({"APPLICATION_ID": "transport", "BASE_URI": f"https://ann:{password}@moesif.example"})
    assert_absent("the settings", repr(right), [password])
    assert password in right.base_uri


def test_a_password_of_the_address_goes_to_the_server_alone() -> None:
    """As its credentials; a server that is down leaves none of it in the log."""
    password = text_for("password of a server")
    with Logs().listening() as logs, FaultServer() as server:
        with_password = server.url.replace("//", f"//ann:{password}@")
        assert _deliver(with_password).stats()["delivered"] == 1
        server.refuse()
        middleware = _deliver(with_password, DEBUG=True)
        assert middleware.stats()["delivered"] == 0
        assert_absent("logs and stats", [*logs.lines, repr(middleware.stats()), repr(middleware.settings)], [password])
