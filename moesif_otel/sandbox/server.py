"""The sandbox as a server in this process: for the command line, and for tests.

One thread runs the server's loop and up to four work for it; all are joined by `stop` and `close`. Methods of `Sandbox`
may be called from any thread but those. It configures no logging and touches neither signals nor the environment.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import orjson
import uvicorn
from typing_extensions import Self
from uvicorn.protocols.http.h11_impl import H11Protocol

from moesif_otel.sandbox.access import Access
from moesif_otel.sandbox.api import KINDS, read_behaviours
from moesif_otel.sandbox.behaviour import Behaviours
from moesif_otel.sandbox.check import MAX_EVENT_AGE_S
from moesif_otel.sandbox.front import Front
from moesif_otel.sandbox.ingest import Ingest
from moesif_otel.sandbox.jsontext import read_json
from moesif_otel.sandbox.query import Filters
from moesif_otel.sandbox.site import Site
from moesif_otel.sandbox.store import DEFAULT_MAX_BYTES, Store, StoredEvent, StoredRow
from moesif_otel.sandbox.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["Sandbox"]

_START_TIMEOUT_S: Final = 10.0
_GRACE_S: Final = 0.15  # for answers that are being sent when the sandbox stops
_WORKERS: Final = 4


class Sandbox:
    """A stand-in for Moesif in this process: assert in your tests what Moesif receives.

    ```python
    with Sandbox() as sandbox:
        app = MoesifMiddleware(app, {"APPLICATION_ID": "test", "BASE_URI": sandbox.url})
        ...
        (event,) = sandbox.wait_for_events(1)
        assert event["request"]["verb"] == "GET"
    ```

    Args:
        port: Where to listen; 0 takes a free port.
        host: Address to listen on. Beyond this machine only if you say so.
        database: Path of an SQLite file to keep what arrives; None keeps it in memory.
        application_ids: Ids to accept; empty accepts any.
        max_event_age_s: Events older than this are refused, as Moesif does (30 days); None takes any age.
        max_events: Events kept at most; the oldest go first.
        max_bytes: Bytes that they may take, about; the oldest go first. Profiles and actions may take a quarter of that
            beside them.
        request_log_size: Requests that `requests()` remembers.
        allowed_hosts: Names by which the sandbox may be asked, besides `localhost`, IP addresses and private names.

    Made running by `start` or `with`. Thread-safe.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        host: str = "127.0.0.1",
        database: str | None = None,
        application_ids: Collection[str] = (),
        max_event_age_s: float | None = MAX_EVENT_AGE_S,
        max_events: int = 200_000,
        max_bytes: int = DEFAULT_MAX_BYTES,
        request_log_size: int = 1_000,
        allowed_hosts: Collection[str] = (),
    ) -> None:
        self.host = host
        self.port = port
        self._store = Store(database, max_events=max_events, max_bytes=max_bytes)
        self._wire = Wire(request_log_size)
        self._behaviours = Behaviours()
        self._ingest = Ingest(self._store, self._wire, application_ids=application_ids, max_event_age_s=max_event_age_s)
        self._allowed_hosts = (host, *allowed_hosts)
        self._any_machine = host not in {"127.0.0.1", "::1", "localhost"}
        self._running: _Running | None = None

    @property
    def url(self) -> str:
        """The address to give as `BASE_URI`, without a slash at its end."""
        name = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)  # noqa: S104 - compared
        return f"http://[{name}]:{self.port}" if ":" in name else f"http://{name}:{self.port}"

    def start(self) -> Self:
        """Listen; after `stop`, on the same port and with everything that arrived before.

        Raises:
            OSError: The port is taken or not allowed.
        """
        if self._running is None:
            self._running = _Running(self)
            self.port = self._running.port
        return self

    def stop(self) -> None:
        """Stop listening and end the threads; connections are closed, what arrived stays readable."""
        running, self._running = self._running, None
        if running is not None:
            running.stop()

    def close(self) -> None:
        """Stop, and close the database."""
        self.stop()
        self._store.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def events(self, *, application_id: str | None = None) -> list[dict[str, Any]]:
        """Return the events that arrived, decoded, newest last; those with a transaction id once each.

        Args:
            application_id: Only those sent with this id; None gives all.
        """
        return [read_json(row.event) for row in self._store.events(application_id=application_id)]

    def stored_events(self, *, since: int = 0) -> list[StoredEvent]:
        """Return events as they were stored: with sequence number, application id, time of arrival and source.

        Args:
            since: Only events with a greater sequence number; for following what arrives.
        """
        return self._store.events(since=since)

    def recent_calls(self, *, after: int = 0, limit: int = 100) -> list[StoredRow]:
        """Return the newest calls, the oldest of them first, each at one look.

        Args:
            after: Only those with a greater sequence number; for following what arrives.
            limit: How many at most.
        """
        return self._store.rows(Filters(), after=after, limit=limit)[::-1]

    def count_calls(self, **filters: str) -> int:
        """Count stored calls that fit; the filters are those of the page's address bar, such as `status="5xx"`."""
        return self._store.count_rows(Filters.read(filters), at_most=1 << 40)

    def last_sequence(self) -> int:
        """Return the newest event's sequence number; 0 when there is none."""
        return self._store.last_sequence()

    def wait_for_events(
        self, count: int, timeout_s: float = 10.0, *, application_id: str | None = None
    ) -> list[dict[str, Any]]:
        """Wait until at least `count` events are there, and return all.

        Args:
            count: How many to wait for.
            timeout_s: Seconds to wait at most.
            application_id: Only those sent with this id; None counts all.

        Raises:
            TimeoutError: Fewer came; the message says what came instead.
        """
        if not self._store.wait_for_events(count, timeout_s, application_id):
            here = self._store.count_events(application_id)
            answers = [(entry["path"], entry["status"]) for entry in self._wire.requests(limit=5)]
            raise TimeoutError(
                f"{here} of {count} events arrived within {timeout_s:g} s; "
                f"counters: {self.stats()}; last requests and answers: {answers}"
            )
        return self.events(application_id=application_id)

    def profiles(self, kind: str = "users", *, application_id: str | None = None) -> list[dict[str, Any]]:
        """Return merged `users`, `companies` or `subscriptions`, or all `actions`, in order of first arrival."""
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        return [read_json(profile) for profile in self._store.profiles(kind, application_id)]

    def requests(self, path: str | None = None) -> list[dict[str, Any]]:
        """Return the last requests to Moesif's own paths, oldest first.

        Args:
            path: Only requests to exactly this path.

        Returns:
            Dicts with `method`, `path`, `query`, `http_version`, `headers` (lower-case names), `connection`
            (client address), `application_id`, `body_bytes`, `decoded_bytes`, `items` (events or profiles taken),
            `misbehaved`, `error` (what was refused and why), `status` (None: no answer was sent, or not yet),
            `took_ms`, `received_s` and `number`.
        """
        return [entry for entry in self._wire.requests() if path is None or entry["path"] == path]

    def stats(self) -> dict[str, int]:
        """Return the counters, and under `stored` the number of events there now."""
        return {**self._wire.stats(), "stored": self._store.count_events()}

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` after each change, in a thread of the sandbox, until the returned function is called."""
        return self._store.listen(listener)

    def behave(self, *behaviours: Mapping[str, Any], **behaviour: Any) -> None:
        """Tell the sandbox what to do wrong from now on; with no argument, to behave well.

        Args:
            behaviours: Several, in order; the first that fits a request is used.
            behaviour: Or one, as keywords: `status`, `headers`, `body`, `delay_s`, `hang`, `disconnect`,
                `process_first`, `times`, `paths`, `max_bytes` (see `Behaviour`).

        Raises:
            ValueError: A field is unknown or its value wrong; the message names it.
        """
        wanted = [*behaviours, *([behaviour] if behaviour else [])]
        try:
            read = read_behaviours([dict(item) for item in wanted])
        except Exception as error:
            raise ValueError(str(error)) from None
        self._behaviours.replace(read)

    def put_config(self, config: Mapping[str, Any], *, application_id: str = "") -> None:
        """Replace what `GET /v1/config` answers; its ETag changes. Without an id, for every application."""
        self._store.put_document(application_id, "config", orjson.dumps(dict(config)))

    def put_rules(self, rules: Collection[Mapping[str, Any]], *, application_id: str = "") -> None:
        """Replace what `GET /v1/rules` answers; its tag changes. Without an id, for every application."""
        self._store.put_document(application_id, "rules", orjson.dumps(list(rules)))

    def clear(self) -> None:
        """Forget events, profiles, actions, the request log, the counters and the behaviours."""
        self._behaviours.replace([])
        self._store.clear()
        self._wire.clear()


class _Running:
    """One run of the server, from listening to the last thread joined."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._socket = _listen(sandbox.host, sandbox.port)
        self.port: int = self._socket.getsockname()[1]
        self._stopping = threading.Event()
        self._executor = ThreadPoolExecutor(_WORKERS, thread_name_prefix="moesif-otel-sandbox-worker")
        front = Front(sandbox._ingest, sandbox._behaviours, sandbox._wire, self._executor, self._stopping.is_set)
        site = Site(sandbox._store, sandbox._wire, sandbox._behaviours, self._executor, self._stopping.is_set)
        access = Access(_split(front, site.app), any_machine=sandbox._any_machine, allowed_hosts=sandbox._allowed_hosts)
        self._server = _Server(_config(access, sandbox._wire), sandbox._wire)
        self._thread = threading.Thread(target=self._serve, name="moesif-otel-sandbox", daemon=True)
        self._thread.start()
        if not self._server.is_up.wait(_START_TIMEOUT_S) or not self._server.started:
            self.stop()
            raise OSError("moesif_otel: the sandbox's server did not start")

    def _serve(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._server.is_up.set()

    def stop(self) -> None:
        self._stopping.set()
        self._server.should_exit = True
        self._thread.join()
        self._executor.shutdown(wait=True)
        self._socket.close()


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it listens and does not wait for clients that send nothing more."""

    _moesif_otel_internal = True  # its end is not the end of what a process captures

    def __init__(self, config: uvicorn.Config, wire: Wire) -> None:
        super().__init__(config)
        self.is_up = threading.Event()
        self._wire = wire

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(_GRACE_S, self._wire.drop_all)
        await super().shutdown(sockets)


def _split(front: ASGIApp, site: ASGIApp) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        is_moesifs = scope["path"].startswith("/v1/") or scope["path"] == "/health/probe"
        await (front if is_moesifs else site)(scope, receive, send)

    return app


def _config(app: ASGIApp, wire: Wire) -> uvicorn.Config:
    class Protocol(H11Protocol):
        """uvicorn's HTTP/1.1, with its connections noted."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if self.client:
                wire.opened(self.client, transport)

        def connection_lost(self, exc: Exception | None) -> None:
            if self.client:
                wire.closed(self.client)
            super().connection_lost(exc)

    return uvicorn.Config(
        app,
        http=Protocol,
        loop="asyncio",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A port just left can be taken again at once; a port in use cannot.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except BaseException:
        listener.close()
        raise
    return listener
