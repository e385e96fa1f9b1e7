"""Connections that keep a deadline as a whole, not byte by byte.

Owns: the `requests` session of one transport, with urllib3 pools whose connections obey the deadline of the POST they
serve, and whose idle list takes no lock.
Threads: senders, each with a deadline of its own; one session serves them all.
Never: retries, follows a redirect, stores a cookie, reads `.netrc`, stays inside a POST beyond its deadline.

`requests` bounds each single read: a server that drips a byte now and then holds its caller for ever. Here every read
and write gets what is left of the whole. What cannot be bounded is the system's name resolution; no flush or shutdown
waits for a thread that is in it.
"""

from __future__ import annotations

import http.client
import io
import queue
import ssl
import threading
import time
from contextlib import contextmanager
from http.cookiejar import DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, Final, cast

import requests
from requests.adapters import HTTPAdapter
from requests.auth import HTTPBasicAuth
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util import ssl_ as urllib3_ssl

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CONNECT_TIMEOUT_S", "deadline", "new_session"]

CONNECT_TIMEOUT_S: Final = 3.0

_limit: Final = threading.local()


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Bound everything that this thread does on connections of ours inside the block, as a whole; blocks nest."""
    before: float | None = getattr(_limit, "at_s", None)
    at_s = time.monotonic() + seconds
    _limit.at_s = at_s if before is None else min(at_s, before)
    try:
        yield
    finally:
        _limit.at_s = before


def _left_s() -> float | None:
    at_s: float | None = getattr(_limit, "at_s", None)
    if at_s is None:
        return None
    left_s = at_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the deadline of this request is over")
    return left_s


class _DeadlineReader(io.RawIOBase):
    """Reads a socket, each time with what is left of the deadline."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = _left_s()
        if left_s is not None:
            self._sock.settimeout(left_s)
        return cast("int | None", self._raw.readinto(buffer))

    def close(self) -> None:
        self._raw.close()
        super().close()


class _DeadlineResponse(http.client.HTTPResponse):
    """`http.client` reads status line, headers and body through `fp`: the one place to put a deadline."""

    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_DeadlineReader(sock))


class _DeadlineSending:
    """The sending half, for both kinds of connection."""

    # What `http.client` makes of what comes back.
    response_class: Any = _DeadlineResponse

    def send(self, data: Any) -> None:
        """Send with what is left of the deadline; urllib3 would allow the time for connecting only."""
        connection: Any = self
        if connection.sock is None and connection.auto_open:
            connection.connect()
        left_s = _left_s()
        if left_s is not None and connection.sock is not None:
            connection.sock.settimeout(left_s)
        super().send(data)  # type: ignore[misc]


class _Connection(_DeadlineSending, HTTPConnection):
    pass


class _TlsConnection(_DeadlineSending, HTTPSConnection):
    def connect(self) -> None:
        """Connect, with a context of the `ssl` module as it is now."""
        # gevent may patch `ssl` after an instrumentor has imported urllib3 (the zero-code run under gunicorn's gevent
        # workers): the class that urllib3 took then recurses without end when it is configured.
        if self.ssl_context is None and ssl.SSLContext is not getattr(urllib3_ssl, "SSLContext", None):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            self.ssl_context = context
        super().connect()


class _IdleConnections:
    """The list of idle connections of a pool, as urllib3 uses `queue.LifoQueue`, without a lock.

    urllib3 empties a pool's queue when the pool is collected and when the process ends. In a forked child the parent's
    queue may be locked for ever: a list whose steps are atomic has nothing to lock.
    """

    def __init__(self, maxsize: int) -> None:
        self._maxsize = maxsize
        self._items: list[Any] = []

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        del block, timeout
        if len(self._items) >= self._maxsize:
            raise queue.Full
        self._items.append(item)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        del block, timeout
        try:
            return self._items.pop()
        except IndexError:
            raise queue.Empty from None

    def qsize(self) -> int:
        return len(self._items)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection
    QueueCls = _IdleConnections  # type: ignore[assignment]


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection
    QueueCls = _IdleConnections  # type: ignore[assignment]


_POOLS: Final = {"http": _Pool, "https": _TlsPool}


class _Adapter(HTTPAdapter):
    """Has urllib3 make our pools, behind a proxy too."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **proxy_kwargs: Any) -> Any:
        made = super().proxy_manager_for(proxy, **proxy_kwargs)
        made.pool_classes_by_scheme = _POOLS
        return made


class _NoNetrc(requests.auth.AuthBase):
    """Stands where `requests` would otherwise look into `.netrc` (a machine's credentials are not for Moesif)."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return request


def new_session(connections: int, credentials: tuple[str, str] | None) -> requests.Session:
    """Make a session: proxies and CA bundle from the environment as `requests` reads them, and nothing else of it.

    Args:
        connections: How many are kept open.
        credentials: User and password of `BASE_URI` (a secure proxy may want them); None without.
    """
    session = requests.Session()
    adapter = _Adapter(pool_connections=2, pool_maxsize=connections, max_retries=0)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    session.auth = HTTPBasicAuth(*credentials) if credentials else _NoNetrc()
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    return session
