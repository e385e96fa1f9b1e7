"""Tornado's own server under load: large bodies in bounded memory, and every call of a burst delivered."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tornado import web

from moesif_otel.sandbox.server import Sandbox
from moesif_otel.tornado import MoesifMiddleware
from tests.capture.tornado.serving import GIVE_UP_S, get, run, serving, talk

_ROOT = Path(__file__).parents[2]
_MIB = 1024 * 1024

_TRANSFER = """
    import asyncio, json, sys
    from tornado import web
    from moesif_otel.tornado import MoesifMiddleware
    from tests.capture.tornado.serving import serving

    SIZE, PART = 256 * 1024 * 1024, b"x" * 65536
    way, base_uri = sys.argv[1:]

    def memory_mib(name):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1024

    class Download(web.RequestHandler):
        async def get(self):
            for _ in range(SIZE // len(PART)):
                self.write(PART)
                await self.flush()

    @web.stream_request_body
    class Upload(web.RequestHandler):
        def initialize(self):
            self.size = 0

        async def data_received(self, chunk):
            self.size += len(chunk)

        def put(self):
            self.write(str(self.size))

    async def download(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /d HTTP/1.0\\r\\nHost: h\\r\\n\\r\\n")
        await reader.readuntil(b"\\r\\n\\r\\n")
        size = 0
        while part := await reader.read(1 << 18):
            size += len(part)
        writer.close()
        return size

    async def upload(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"PUT /u HTTP/1.1\\r\\nHost: h\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n" % SIZE)
        for _ in range(SIZE // len(PART)):
            writer.write(PART)
            await writer.drain()
        answer = await reader.read()
        writer.close()
        return int(answer.rpartition(b"\\r\\n")[2])

    async def main():
        middleware = MoesifMiddleware({"APPLICATION_ID": "load", "BASE_URI": base_uri})
        application = web.Application([("/d", Download), ("/u", Upload)], log_function=middleware.log_event)
        async with serving(application, max_body_size=SIZE) as port:
            before = memory_mib("VmRSS")
            size = await (download if way == "download" else upload)(port)
            grown = memory_mib("VmHWM") - before
        flushed = await asyncio.to_thread(middleware.force_flush)
        print(json.dumps({"size": size, "grown_mib": grown, "flushed": flushed}))

    asyncio.run(main())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("way", ["download", "upload"])
def test_a_large_transfer_grows_the_process_by_little(way):
    """256 MB through a stream: under 48 MiB more, and the event says the true size."""
    with Sandbox() as sandbox:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(_TRANSFER), way, sandbox.url],
            capture_output=True,
            text=True,
            timeout=200,
            check=True,
            cwd=_ROOT,
        )
        told = json.loads(done.stdout.splitlines()[-1])
        (event,) = sandbox.wait_for_events(1)
    assert told["size"] == 256 * _MIB
    assert told["grown_mib"] < 48
    assert told["flushed"]
    assert str(256 * _MIB) in json.dumps(event["metadata"])


class Hello(web.RequestHandler):
    async def post(self) -> None:
        self.write({"number": json.loads(self.request.body)["number"]})


async def burst(port: int, first: int, count: int) -> None:
    """Send requests one after the other on one connection, as fast as they are answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for number in range(first, first + count):
        body = b'{"number": %d}' % number
        writer.write(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        assert json.loads(await reader.readexactly(length)) == {"number": number}
    writer.close()


def test_three_thousand_calls_at_full_speed_are_all_delivered():
    """Every one of them, once, with its own body; nothing is dropped and nothing waits."""
    with Sandbox() as sandbox:
        middleware = MoesifMiddleware({"APPLICATION_ID": "load", "BASE_URI": sandbox.url})
        application = web.Application([("/", Hello)], log_function=middleware.log_event)

        async def serve() -> None:
            async with serving(application) as port:
                await asyncio.gather(*(burst(port, n * 300, 300) for n in range(10)))

        run(serve())
        assert middleware.force_flush(30_000)
        stats = middleware.stats()
        assert (stats["accepted"], stats["delivered"], stats["dropped"]) == (3000, 3000, {})
        events = sandbox.wait_for_events(3000)
        assert sorted(event["response"]["body"]["number"] for event in events) == list(range(3000))
        middleware.shutdown()


_PREFORK = """
    import asyncio, os, sys
    import tornado.netutil, tornado.process
    from tornado import httpserver, web
    from moesif_otel.tornado import MoesifMiddleware

    class Pid(web.RequestHandler):
        def get(self):
            self.write(str(os.getpid()))

    middleware = MoesifMiddleware({"APPLICATION_ID": "prefork", "BASE_URI": sys.argv[1], "EVENT_BATCH_TIMEOUT": 0.05})
    application = web.Application([("/", Pid)], log_function=middleware.log_event)
    sockets = tornado.netutil.bind_sockets(0, "127.0.0.1")
    print(sockets[0].getsockname()[1], flush=True)
    tornado.process.fork_processes(2)

    async def main():
        server = httpserver.HTTPServer(application)
        server.add_sockets(sockets)
        await asyncio.Event().wait()

    asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forking_server_delivers_from_every_child():
    """The middleware is made before the fork, as Tornado's documentation shows it; each child has its own threads."""
    with Sandbox() as sandbox:
        server = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_PREFORK), sandbox.url],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=_ROOT,
            start_new_session=True,
        )
        try:
            port = int(server.stdout.readline())

            async def until_both_answered() -> tuple[int, set[bytes]]:
                pids: set[bytes] = set()
                asked = 0
                while len(pids) < 2 and asked < 2000:
                    answers = await asyncio.gather(*(talk(port, get("/")) for _ in range(10)))
                    asked += 10
                    pids |= {raw.rpartition(b"\r\n")[2] for raw in answers}
                return asked, pids

            asked, pids = run(until_both_answered())
            events = sandbox.wait_for_events(asked, timeout_s=GIVE_UP_S)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
            server.stdout.close()
    assert len(pids) == 2
    assert len({event["transaction_id"] for event in events}) == asked
    bodies: set[Any] = {str(event["response"]["body"]) for event in events}
    assert len(bodies) == 2
