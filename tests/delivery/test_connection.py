"""Connections: deadlines, interim answers, proxies, age; and that nobody's patches of `requests` see them."""

from __future__ import annotations

import contextlib
import gc
import http.client
import io
import socket
import ssl
import struct
import sys
import threading
import time
import types
import weakref

import pytest
import requests

from moesif_otel._delivery import connection
from moesif_otel._delivery.connection import Connections
from tests.faults.fault_server import CERTIFICATE, FaultServer, Hang, Status


@pytest.fixture(autouse=True)
def _nothing_in_the_environment(monkeypatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)


def post(connections, timeout_s=5.0, path="/v1/events"):
    return connections.request("POST", path, {}, b"{}", timeout_s=timeout_s, max_body_bytes=1000, body_timeout_s=1.0)


class Raw:
    """Accepts connections and does with each what it is told."""

    def __init__(self, serve) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.accepted = 0
        self._serve = serve
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._one, args=(sock,), daemon=True).start()

    def _one(self, sock) -> None:
        with contextlib.suppress(OSError), sock:
            self._serve(sock)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._listener.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def request_head(sock) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65_536)
        if not piece:
            raise OSError("gone")
        data += piece
    return data


def pump(source, target) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def join(one, other) -> None:
    thread = threading.Thread(target=pump, args=(one, other), daemon=True)
    thread.start()
    pump(other, one)
    thread.join(30)


def test_interim_answers_are_no_answers() -> None:
    """100, 102 and 103 Early Hints, several of them with headers, come before the answer and are read past."""

    def serve(sock) -> None:
        request_head(sock)
        sock.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n")
        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\nok")

    with Raw(serve) as server:
        answer = post(Connections(server.url, 1))
        assert (answer.status, answer.body) == (201, b"ok")


@pytest.mark.parametrize(
    "endless",
    [b"HTTP/1.1 103 Early Hints\r\n\r\n", b"X-A: b\r\n", b"x" * 1000],
    ids=["interim answers", "headers", "a line"],
)
def test_endless_answers_end(endless) -> None:
    """Interim answers, headers or a line without end cost the connection, and neither time nor memory."""

    def serve(sock) -> None:
        request_head(sock)
        if not endless.startswith(b"HTTP"):
            sock.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            sock.sendall(endless)

    with Raw(serve) as server, pytest.raises((http.client.HTTPException, OSError)):
        post(Connections(server.url, 1), timeout_s=20)


@pytest.mark.parametrize("size", [b"-1", b"-5"])
def test_a_chunk_of_less_than_nothing_is_no_body(size) -> None:
    """`http.client` would read "-1" to the end of the connection, all of it into memory; the status counts all the same."""
    sent = 0

    def serve(sock) -> None:
        nonlocal sent
        request_head(sock)
        sock.sendall(b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n" + size + b"\r\n")
        while sent < 50_000_000:
            sent += sock.send(b"x" * 65_536)

    with Raw(serve) as server:
        answer = post(Connections(server.url, 1), timeout_s=20)
        assert (answer.status, answer.body) == (201, b"")
    assert sent < 50_000_000


def test_a_deadline_that_is_over_begins_nothing() -> None:
    """Without time nothing is connected."""
    with FaultServer() as server:
        with pytest.raises(TimeoutError):
            post(Connections(server.url, 1), timeout_s=0)
        assert server.connections == 0


def test_requests_at_the_same_time_have_deadlines_and_connections_of_their_own() -> None:
    """Also where threads share their `threading.local`, as greenlets of a late gevent patch do: nothing is kept there."""
    with FaultServer(then=lambda request: Hang() if b"slow" in request.path.encode() else Status(201)) as server:
        connections = Connections(server.url, 4)
        errors = []

        def slow() -> None:
            try:
                post(connections, 0.5, "/v1/slow")
            except TimeoutError as exc:
                errors.append(exc)

        threads = [threading.Thread(target=slow) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            assert post(connections, 30).status == 201
        for thread in threads:
            thread.join()
        assert len(errors) == 3
        assert post(connections).status == 201


def test_idle_connections_age(monkeypatch) -> None:
    """After 15 s of rest, by the wall clock too (a frozen Lambda), a new connection is made instead of trusting the old."""
    with FaultServer() as server:
        connections = Connections(server.url, 2)
        post(connections)
        post(connections)
        assert server.connections == 1
        now = time.time()
        monkeypatch.setattr(connection.time, "time", lambda: now + 16)
        post(connections)
        assert server.connections == 2


def test_a_connection_that_the_server_closed_is_not_used() -> None:
    """An end that has arrived is seen before anything is sent."""

    def serve(sock) -> None:
        request_head(sock)
        sock.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")

    with Raw(serve) as server:
        connections = Connections(server.url, 1)
        for _ in range(5):
            assert post(connections).status == 201
            time.sleep(0.05)
        assert server.accepted == 5


def test_no_patch_of_requests_sees_us(monkeypatch) -> None:
    """Mocks and caches that an application or its tests put on `requests` and urllib3 do not get our traffic."""
    import urllib3

    def refuse(*_, **__):
        raise AssertionError("our own traffic")

    monkeypatch.setattr(requests.Session, "request", refuse)
    monkeypatch.setattr(requests.Session, "send", refuse)
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", refuse)
    monkeypatch.setattr(urllib3.HTTPConnectionPool, "urlopen", refuse)
    monkeypatch.setattr(http.client.HTTPConnection, "request", refuse)
    monkeypatch.setattr(http.client.HTTPConnection, "putrequest", refuse)
    with FaultServer() as server:
        assert post(Connections(server.url, 1)).status == 201


# The stand-in proxies leave sockets of their own to garbage collection.
sockets_of_the_proxy = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@sockets_of_the_proxy
@pytest.mark.parametrize("ca", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"])
def test_tls_through_a_proxy_that_wants_a_password(monkeypatch, ca) -> None:
    """HTTPS through CONNECT, credentials for the proxy alone, the certificate checked against the environment's bundle."""
    monkeypatch.setenv(ca, str(CERTIFICATE))
    heads = []

    def serve(sock) -> None:
        heads.append(request_head(sock))
        host, _, port = heads[-1].split()[1].decode().rpartition(":")
        with socket.create_connection((host, int(port))) as behind:
            sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            join(sock, behind)

    with FaultServer(tls=True) as server, Raw(serve) as proxy:
        monkeypatch.setenv("https_proxy", f"http://joe:pass%20word@127.0.0.1:{proxy.port}")
        connections = Connections(server.url, 1)
        assert post(connections).status == 201
        connections.close()
        assert b"Proxy-Authorization: Basic am9lOnBhc3Mgd29yZA==" in heads[0]
        assert "proxy-authorization" not in server.requests[0].headers
        monkeypatch.setenv("no_proxy", "localhost")
        connections = Connections(server.url, 1)
        assert post(connections).status == 201
        connections.close()
        assert len(heads) == 1
    gc.collect()


def test_a_proxy_that_refuses_is_named() -> None:
    """The reason is in the error, for the log."""

    def serve(sock) -> None:
        request_head(sock)
        sock.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")

    with Raw(serve) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("https_proxy", proxy.url)
        with pytest.raises(ConnectionError, match="CONNECT with status 407"):
            post(Connections("https://moesif.example", 1))


@sockets_of_the_proxy
def test_tls_to_the_proxy_and_to_the_server(monkeypatch) -> None:
    """A proxy that is spoken to by TLS itself."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(CERTIFICATE))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)

    def serve(sock) -> None:
        with context.wrap_socket(sock, server_side=True) as secure:
            host, _, port = request_head(secure).split()[1].decode().rpartition(":")
            with socket.create_connection((host, int(port))) as behind:
                secure.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                join(secure, behind)

    with FaultServer(tls=True) as server, Raw(serve) as proxy:
        monkeypatch.setenv("https_proxy", f"https://localhost:{proxy.port}")
        connections = Connections(server.url, 1)
        assert post(connections).status == 201
        connections.close()
    gc.collect()


def test_a_socks_proxy_is_used_or_named(monkeypatch) -> None:
    """With PySocks the connection goes through it, with host name and credentials; without, the error says what to install."""
    asked = []

    def create_connection(address, **options):
        asked.append((address, options))
        return socket.create_connection(address, options["timeout"])

    monkeypatch.setitem(
        sys.modules, "socks", types.SimpleNamespace(SOCKS4=1, SOCKS5=2, create_connection=create_connection)
    )
    with FaultServer() as server:
        monkeypatch.setenv("all_proxy", "socks5h://joe:secret@127.0.0.1:1081")
        assert post(Connections(server.url, 1)).status == 201
        ((address, options),) = asked
        assert address == ("127.0.0.1", server.port)
        assert (options["proxy_addr"], options["proxy_port"], options["proxy_rdns"]) == ("127.0.0.1", 1081, True)
        assert (options["proxy_username"], options["proxy_password"], options["proxy_type"]) == ("joe", "secret", 2)
        monkeypatch.setenv("all_proxy", "socks5://127.0.0.1")
        post(Connections(server.url, 1))
        assert (asked[1][1]["proxy_port"], asked[1][1]["proxy_username"]) == (1080, None)
        monkeypatch.setitem(sys.modules, "socks", None)
        with pytest.raises(ConnectionError, match="pip install PySocks"):
            post(Connections(server.url, 1))


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\nb", "—"])
def test_a_header_that_is_none_is_refused(value) -> None:
    """Nothing that the settings hold can end a header line or be sent as something else."""
    with FaultServer() as server:
        with pytest.raises(ValueError, match=r"header|latin-1"):
            Connections(server.url, 1).request("GET", "/v1/x", {"X-Id": value}, b"", timeout_s=5, max_body_bytes=10)
        assert server.requests == []


def test_addresses() -> None:
    """IPv6, international names, default and other ports, and what stands before the host."""
    of = connection._Address.of
    assert of("https://api.moesif.net").authority() == "api.moesif.net"
    assert of("http://[::1]:9500/a").authority() == "[::1]:9500"
    assert of("http://bücher.example").authority() == "xn--bcher-kva.example"
    assert of("https://u%40x:p@h").credentials("Authorization") == {"Authorization": "Basic dUB4OnA="}
    assert (of("socks4a://h").port, of("http://h").port, of("https://h:1").port) == (1080, 80, 1)


def test_http_client_still_parses_what_has_a_makefile() -> None:
    """Canary: `HTTPResponse` takes its bytes from `makefile` and its status from `_read_status`."""
    assert callable(http.client.HTTPResponse._read_status)

    class Fake:
        def makefile(self, *_):
            import io

            return io.BytesIO(b"HTTP/1.1 103 x\r\nA: b\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nz")

    answer = connection._Response(Fake(), method="GET")
    answer.begin()
    assert (answer.status, answer.read()) == (200, b"z")


def test_a_reset_is_no_answer() -> None:
    """A connection that is reset in the middle of the head raises; the next request has a new one."""

    def serve(sock) -> None:
        request_head(sock)
        sock.sendall(b"HTTP/1.1 2")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with Raw(serve) as server, pytest.raises((OSError, http.client.HTTPException)):
        post(Connections(server.url, 1))


def test_an_answer_before_the_end_of_the_request_is_read(monkeypatch) -> None:
    """A server that refuses a long body, answers and hangs up before it has read it: 413, and not "no answer"."""
    answer = io.BytesIO(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    class Broken:
        def settimeout(self, timeout_s) -> None:
            pass

        def send(self, data):
            raise BrokenPipeError(32, "Broken pipe")

        def recv_into(self, buffer):
            return answer.readinto(buffer)

        def close(self) -> None:
            pass

    connections = Connections("http://127.0.0.1:1", 2)
    monkeypatch.setattr(connections, "_connect", lambda deadline_s: connection._Connection(Broken(), deadline_s))
    assert post(connections).status == 413
    with pytest.raises(ConnectionError):  # and no answer is none
        post(connections)


def test_all_addresses_of_a_host_share_one_deadline(monkeypatch) -> None:
    """3 s for each of them, but never more than the request has in all."""
    now = [100.0]
    timeouts = []

    class Silent:
        def __init__(self, *_) -> None:
            pass

        def settimeout(self, timeout_s) -> None:
            self.timeout_s = timeout_s

        def connect(self, place) -> None:
            timeouts.append((place, self.timeout_s))
            now[0] += self.timeout_s
            raise TimeoutError

        def close(self) -> None:
            pass

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"192.0.2.{n}", 80)) for n in range(4)]
    monkeypatch.setattr(connection, "time", types.SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket, "socket", Silent)
    with pytest.raises(TimeoutError):
        post(Connections("http://several.example", 2), timeout_s=5.0)
    assert timeouts == [(("192.0.2.0", 80), 3.0), (("192.0.2.1", 80), 2.0)]


def test_the_next_address_is_tried(monkeypatch) -> None:
    """`localhost` may be `::1`, where nobody listens, before it is 127.0.0.1."""
    with FaultServer() as server:
        port = int(server.url.rpartition(":")[2].strip("/"))
        ask = socket.getaddrinfo

        def getaddrinfo(host, *args, **kwargs):
            hosts = ["127.0.0.2", "127.0.0.1"] if host == "several.example" else [host]  # the server is at one of them
            return [found for one in hosts for found in ask(one, *args, **kwargs)]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        connections = Connections(f"http://several.example:{port}", 2)
        assert post(connections).status == 201
        gone = weakref.ref(connections._idle[0])
        gc.disable()
        try:
            connections.close()
            assert gone() is None  # the error of the first address keeps nothing alive
        finally:
            gc.enable()


def test_a_resolver_that_needs_a_thread_is_done_without_at_the_end_of_the_process(monkeypatch) -> None:
    """That of gevent does, and Python 3.12 starts none then: the last events of a worker would be lost."""

    def getaddrinfo(*_, **__):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with FaultServer() as server:
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        assert post(Connections(server.url, 2)).status == 201
