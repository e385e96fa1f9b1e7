"""HTTP/1.1 connections to one server, where a request ends by its deadline as a whole, not read by read.

An HTTP library bounds each single read: a server that drips a byte now and then holds its caller for ever. It is also
what applications and their tests patch (caches, mocks, instrumentations, `gevent`), often after a connection was made.
So a request is written here, by hand, and `http.client` parses the answer; each read and write gets what is left of the
time. Proxies and the CA bundle are those of the environment, as `requests` reads them. What cannot be bounded is the
system's name resolution; no flush or shutdown waits for a thread that is in it.

Nothing is retried, no redirect followed, no cookie stored, no `.netrc` read.
"""

from __future__ import annotations

import _socket
import base64
import contextlib

# Looked up by each first connection; a thread that imports it while another one forks would leave its lock held.
import encodings.idna  # noqa: F401
import http.client
import io
import os
import socket
import ssl
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from requests.structures import CaseInsensitiveDict
from requests.utils import DEFAULT_CA_BUNDLE_PATH, get_environ_proxies, select_proxy
from urllib3.util.ssltransport import SSLTransport
from urllib3.util.wait import wait_for_read

from moesif_otel._guard import LATE_IMPORTS

if TYPE_CHECKING:
    from collections.abc import Mapping

_CONNECT_TIMEOUT_S: Final = 3.0
# A connection that was idle for longer may be dead without a word: a firewall forgot it, a Lambda was frozen.
_MAX_IDLE_S: Final = 15.0
_MAX_INTERIM_ANSWERS: Final = 10
_SAFE_IN_PATH: Final = "/%:@!$&'()*+,;=~-._"
_GZIP: Final = 31  # `wbits` of zlib for a gzip container (RFC 1952)
_PORTS: Final = {"http": 80, "https": 443, "socks4": 1080, "socks5": 1080}


class HttpAnswer(NamedTuple):
    """Status, headers and the first part of the body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class _Address(NamedTuple):
    """A server to connect to, or a proxy to connect through."""

    scheme: str
    host: str
    port: int
    user: str | None
    password: str

    @classmethod
    def of(cls, url: str) -> _Address:
        parts = urlsplit(url)
        host = parts.hostname or ""
        if not host.isascii():
            host = host.encode("idna").decode()
        scheme = parts.scheme.lower()
        user = None if parts.username is None else unquote(parts.username)
        return cls(scheme, host, parts.port or _PORTS.get(scheme.rstrip("ah"), 80), user, unquote(parts.password or ""))

    def authority(self, *, port: bool = False) -> str:
        """Return host and port; the scheme's own port only if asked for."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" if port or self.port != _PORTS.get(self.scheme) else host

    def credentials(self, name: str) -> dict[str, str]:
        """Return the header of that name with user and password, if there are any."""
        if self.user is None:
            return {}
        return {name: "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()}


class _SocketReader(io.RawIOBase):
    """Reads a connection, each time with what is left of its deadline."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.arm()
        return int(self._connection.sock.recv_into(buffer))


class _Response(http.client.HTTPResponse):
    """The parser of `http.client`, which takes 103 Early Hints for the answer, and "-1" for the size of a chunk."""

    def _read_status(self) -> Any:
        for _ in range(_MAX_INTERIM_ANSWERS):
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 <= status < 200:
                return version, status, reason
            http.client.parse_headers(self.fp)
        raise http.client.HTTPException("interim answers without end")

    def _read_next_chunk_size(self) -> int:
        size: int = super()._read_next_chunk_size()  # type: ignore[misc]
        if size < 0:  # it would read to the end of the connection, however much that is
            raise ValueError("a chunk of less than nothing")
        return size


class _Connection:
    """One socket, used by one request at a time."""

    def __init__(self, sock: Any, deadline_s: float) -> None:
        self.sock = sock
        self.deadline_s = deadline_s
        self.through_proxy = False  # requests name the whole address
        self._idle_since = (0.0, 0.0)

    def arm(self) -> None:
        """Set the socket's timeout for the next step to the time that is left until the deadline."""
        self.sock.settimeout(_left_s(self.deadline_s))

    def makefile(self, *_: object) -> io.BufferedReader:
        """Return what `http.client` reads from."""
        return io.BufferedReader(_SocketReader(self))

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self.arm()
            view = view[self.sock.send(view) :]

    def answer(self, method: str) -> _Response:
        found = _Response(self, method=method)  # type: ignore[arg-type]  # it needs no more than `makefile`
        found.begin()
        return found

    def mark_idle(self) -> None:
        self._idle_since = (time.monotonic(), time.time())

    @property
    def is_fresh(self) -> bool:
        """Tell whether it can be expected to be alive; the wall clock goes on while a machine is frozen."""
        for now, since in zip((time.monotonic(), time.time()), self._idle_since, strict=True):
            if abs(now - since) > _MAX_IDLE_S:
                return False
        try:
            return not wait_for_read(self.sock, 0)  # data without a request is an end, or no HTTP
        except Exception:
            return False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()

    __del__ = close


class Connections:
    """The connections to one server, of which at most `most_idle` are kept open.

    Thread-safe: each request has a connection, and a deadline, of its own. `base_uri` has user and password where a
    proxy in front of the server wants them.
    """

    def __init__(self, base_uri: str, most_idle: int) -> None:
        self._server = _Address.of(base_uri)
        self._path = quote(urlsplit(base_uri).path.rstrip("/"), safe=_SAFE_IN_PATH)
        self._most_idle = most_idle
        self._idle: list[_Connection] = []  # its steps are atomic: no lock that a fork could leave held
        self._abandoned: list[_Connection] = []
        self._context: ssl.SSLContext | None = None

    def request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        timeout_s: float,
        max_body_bytes: int,
        body_timeout_s: float | None = None,
    ) -> HttpAnswer:
        """Make one request (GET or POST) to `path` below the base URI; any status is an answer.

        Args:
            method, path, headers, body: The request, without `Host` and what belongs to the connection.
            timeout_s: Most seconds for everything.
            max_body_bytes: Most bytes of the answer's body.
            body_timeout_s: Most seconds for the body, where only the status counts: what of it is late or fails is
                left out.

        Raises:
            OSError: No answer, or not a whole one, came in time.
            http.client.HTTPException: What came is no HTTP.
            ValueError: A header or the address cannot be sent.
        """
        deadline_s = time.monotonic() + timeout_s
        connection = self._take(deadline_s)
        reusable = False
        try:
            whole = self._head(connection, method, path, headers, len(body)) + body
            with contextlib.suppress(ConnectionError):  # a server that refuses a long body may answer before its end
                connection.send(whole)
            answer = connection.answer(method)
            found = CaseInsensitiveDict(answer.headers.items())
            try:
                if body_timeout_s is not None:
                    connection.deadline_s = min(deadline_s, time.monotonic() + body_timeout_s)
                data = answer.read(max_body_bytes + 1)
                reusable = answer.isclosed() and not answer.will_close
            except (OSError, http.client.HTTPException):
                if body_timeout_s is None:
                    raise
                data = b""
            finally:
                answer.close()
        finally:
            self._give_back(connection, reusable=reusable)
        if body_timeout_s is None:
            if not reusable and answer.length:
                raise ConnectionError("the answer ended early")
            data = _decoded(data, found.get("Content-Encoding", ""), max_body_bytes)
        return HttpAnswer(answer.status, found, data)

    def close(self) -> None:
        """Close idle connections; a later request opens new ones."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def after_fork(self) -> None:
        """Leave the parent's connections alone in a forked child."""
        # Not released either: collecting them would close them.
        self._abandoned += self._idle
        self._idle = []
        self._context = None

    def _take(self, deadline_s: float) -> _Connection:
        while True:
            connection = None
            with contextlib.suppress(IndexError):
                connection = self._idle.pop()
            if connection is None:  # apart from the pop: what fails here has one cause
                return self._connect(deadline_s)
            if connection.is_fresh:
                connection.deadline_s = deadline_s
                return connection
            connection.close()

    def _give_back(self, connection: _Connection, *, reusable: bool) -> None:
        if reusable and len(self._idle) < self._most_idle:
            connection.mark_idle()
            self._idle.append(connection)
        else:
            connection.close()

    def _head(
        self, connection: _Connection, method: str, path: str, headers: Mapping[str, str], body_bytes: int
    ) -> bytes:
        server = self._server
        target = self._path + path
        lines = {"Host": server.authority(), "Accept-Encoding": "gzip", **headers}
        if method == "POST":
            lines["Content-Length"] = str(body_bytes)
        lines.update(server.credentials("Authorization"))
        if connection.through_proxy:
            target = f"http://{server.authority()}{target}"
            proxy = self._proxy()
            if proxy is not None:
                lines.update(proxy.credentials("Proxy-Authorization"))
        return _encoded(f"{method} {target} HTTP/1.1", lines)

    # Connecting.

    def _connect(self, deadline_s: float) -> _Connection:
        server, proxy = self._server, self._proxy()
        if proxy is not None and proxy.scheme.startswith("socks"):
            sock = _socks_connection(proxy, server, min(_CONNECT_TIMEOUT_S, _left_s(deadline_s)))
        else:
            sock = _socket_to(proxy or server, deadline_s)
        connection = _Connection(sock, deadline_s)
        try:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if proxy is not None and proxy.scheme == "https":
                self._secure(connection, proxy.host)
            if proxy is not None and proxy.scheme in {"http", "https"}:
                if server.scheme == "https":
                    _tunnel(connection, proxy, server)
                else:
                    connection.through_proxy = True
            if server.scheme == "https":
                self._secure(connection, server.host)
        except BaseException:
            connection.close()
            raise
        return connection

    def _proxy(self) -> _Address | None:
        url = f"{self._server.scheme}://{self._server.authority()}"
        found = select_proxy(url, get_environ_proxies(url))
        return _Address.of(found if "://" in found else f"http://{found}") if found else None

    def _secure(self, connection: _Connection, host: str) -> None:
        if self._context is None:
            self._context = _new_context()
        connection.arm()
        if isinstance(connection.sock, ssl.SSLSocket):  # TLS to the proxy, and in it TLS to the server
            connection.sock = SSLTransport(connection.sock, self._context, server_hostname=host)
        else:
            connection.sock = self._context.wrap_socket(connection.sock, server_hostname=host)


def _new_context() -> ssl.SSLContext:
    # Made at the first use, of the `ssl` module as it is then: gevent may patch it late.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    names = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
    bundle = next((path for path in map(os.environ.get, names) if path), None) or DEFAULT_CA_BUNDLE_PATH
    if Path(bundle).is_dir():
        context.load_verify_locations(capath=bundle)
    else:
        context.load_verify_locations(cafile=bundle)
    return context


def _encoded(first_line: str, headers: Mapping[str, str]) -> bytes:
    lines = [first_line, *(f"{name}: {value}" for name, value in headers.items())]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a line break in a header")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the deadline of this request has passed")
    return left_s


def _socket_to(address: _Address, deadline_s: float) -> socket.socket:
    """Connect to the first address of a host that takes it; the deadline is that of all of them together."""
    *others, last = _places_of(address)
    for place in others:
        # The error gets no name: it refers to this frame, which would then refer to it, and keep the socket open.
        with contextlib.suppress(OSError):
            return _socket_at(place, deadline_s)
    return _socket_at(last, deadline_s)


def _socket_at(place: Any, deadline_s: float) -> socket.socket:
    # Not `create_connection`, which would look the address up once more.
    sock = socket.socket(*place[:3])
    try:
        sock.settimeout(min(_CONNECT_TIMEOUT_S, _left_s(deadline_s)))
        sock.connect(place[4])
    except BaseException:
        sock.close()
        raise
    return sock


def _places_of(address: _Address) -> list[Any]:
    try:
        return socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except RuntimeError:
        # gevent resolves names in a thread, and Python 3.12 starts none while a process ends. Nobody else is served any
        # more, so the system's own function may block.
        return _socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)


def _tunnel(connection: _Connection, proxy: _Address, server: _Address) -> None:
    target = server.authority(port=True)
    headers = {"Host": target, **proxy.credentials("Proxy-Authorization")}
    connection.send(_encoded(f"CONNECT {target} HTTP/1.1", headers))
    answer = connection.answer("CONNECT")
    if answer.status != http.client.OK:
        raise ConnectionError(0, f"the proxy answered CONNECT with status {answer.status}")


def _socks_connection(proxy: _Address, server: _Address, timeout_s: float) -> Any:
    try:
        with LATE_IMPORTS:
            import socks  # type: ignore[import-untyped]  # an extra of `requests`
    except ImportError:
        raise ConnectionError(0, "a SOCKS proxy needs PySocks: pip install PySocks") from None
    return socks.create_connection(
        (server.host, server.port),
        timeout=timeout_s,
        proxy_type=socks.SOCKS4 if proxy.scheme.startswith("socks4") else socks.SOCKS5,
        proxy_addr=proxy.host,
        proxy_port=proxy.port,
        proxy_rdns=proxy.scheme in {"socks5h", "socks4a"},
        proxy_username=proxy.user or None,
        proxy_password=proxy.password or None,
    )


def _decoded(data: bytes, coding: str, max_bytes: int) -> bytes:
    if coding.strip().lower() not in {"gzip", "x-gzip"}:
        return data
    try:
        return zlib.decompressobj(_GZIP).decompress(data, max_bytes + 1)
    except zlib.error as exc:
        raise ConnectionError("the answer cannot be decompressed") from exc
