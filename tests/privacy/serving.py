"""The same planted calls through a real WSGI server and a real Tornado, and the client that makes them."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import threading
from typing import TYPE_CHECKING, Any

import tornado.httpserver
import tornado.netutil
import tornado.web
from cheroot.wsgi import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .planting import Case

_GIVE_UP_S = 30


def wsgi_app(cases: Sequence[Case]) -> Callable[..., Any]:
    """An application that answers as the case says that the request names."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        case = cases[int(environ["HTTP_X_CASE"])]
        environ["wsgi.input"].read()
        if case.raises is not None:
            raise RuntimeError(case.raises)
        body = case.response.body
        headers = list(case.response.headers)
        if not case.response.chunked:
            headers.append(("Content-Length", str(len(body))))
        start_response(f"{case.status} As Planned", headers)
        return (body[at : at + 700] for at in range(0, len(body), 700)) if case.response.chunked else [body]

    return app


@contextlib.contextmanager
def wsgi_server(app: Any) -> Iterator[int]:
    """Serve a WSGI application with cheroot on a free port."""
    server = Server(("127.0.0.1", 0), app, numthreads=2, shutdown_timeout=1)
    server.error_log = lambda *_, **__: None  # it prints the application's own exceptions
    server.expiration_interval = 0.02  # how soon its loop sees that it is to stop
    server.prepare()
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server.bind_addr[1]
    finally:
        server.stop()
        thread.join(_GIVE_UP_S)


def tornado_application(cases: Sequence[Case], **settings: Any) -> tornado.web.Application:
    """The same as a Tornado application."""

    class Handler(tornado.web.RequestHandler):
        async def serve(self) -> None:
            case = cases[int(self.request.headers["X-Case"])]
            if case.raises is not None:
                raise RuntimeError(case.raises)
            self.set_status(case.status, "As Planned")
            self.clear_header("Content-Type")
            for name, value in case.response.headers:
                self.add_header(name, value)
            body = case.response.body
            if not case.response.chunked:
                self.write(body)
                return
            for at in range(0, len(body), 700):
                self.write(body[at : at + 700])
                await self.flush()

        get = post = serve  # type: ignore[assignment]

    return tornado.web.Application([(r"/.*", Handler)], **settings)


@contextlib.contextmanager
def tornado_server(application: Any) -> Iterator[int]:
    """Serve a Tornado application on a free port, its event loop on a thread of its own."""
    started, port = threading.Event(), 0
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def main() -> None:
        nonlocal port
        server = tornado.httpserver.HTTPServer(application)
        sockets = tornado.netutil.bind_sockets(0, "127.0.0.1")
        port = sockets[0].getsockname()[1]
        server.add_sockets(sockets)
        started.set()
        await stop.wait()
        server.stop()
        await server.close_all_connections()

    def run() -> None:
        loop.run_until_complete(main())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(_GIVE_UP_S)
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(_GIVE_UP_S)


def send_all(port: int, cases: Sequence[Case]) -> None:
    """Make every call, and see that the client gets what the application sent."""
    for number, case in enumerate(cases):
        status, body = send(port, case, number)
        assert status == (500 if case.raises is not None else case.status), case.name
        if case.raises is None:
            assert body == case.response.body, case.name


def send(port: int, case: Case, number: int = 0) -> tuple[int, bytes]:
    """Make one call."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_GIVE_UP_S)
    with contextlib.closing(connection):
        connection.putrequest(case.method, case.target)
        connection.putheader("X-Case", str(number))
        for name, value in case.request.headers:
            connection.putheader(name, value)
        body = case.request.body
        if case.request.chunked:
            connection.putheader("Transfer-Encoding", "chunked")
            connection.endheaders((body[at : at + 9] for at in range(0, len(body), 9)), encode_chunked=True)
        else:
            if body or case.method == "POST":
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
        response = connection.getresponse()
        return response.status, response.read()
