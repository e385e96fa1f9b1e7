"""A small notes service on Tornado, its calls recorded in Moesif.

    MOESIF_APPLICATION_ID=... python examples/tornado/app.py

Needs tornado beside moesif-otel.
With MOESIF_BASE_URI=http://127.0.0.1:8765 they go to `moesif-otel sandbox` instead. PORT defaults to 8000.

    curl localhost:8000/notes -d '{"text": "buy tea"}' -H 'X-User: ann'
    curl localhost:8000/notes/1
    curl -N localhost:8000/notes/stream
    curl -T big.file localhost:8000/upload
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal

from tornado import web

from moesif_otel import identify
from moesif_otel.tornado import MoesifMiddleware

NOTES: dict[int, str] = {}


class NotesHandler(web.RequestHandler):
    """The list of notes."""

    def get(self) -> None:
        """Give all notes."""
        self.write({"notes": NOTES})

    async def post(self) -> None:
        """Add a note."""
        try:
            text = json.loads(self.request.body)["text"]
        except (ValueError, KeyError, TypeError):
            raise web.HTTPError(400, reason="a note is an object with a text") from None
        await asyncio.sleep(0)  # where a database would be asked
        number = len(NOTES) + 1
        NOTES[number] = text
        # What is known only inside a handler can be said there; `IDENTIFY_COMPANY` below is the other way.
        identify(metadata={"note": number})
        self.set_status(201)
        self.write({"id": number, "text": text})


class NoteHandler(web.RequestHandler):
    """One note."""

    def get(self, number: str) -> None:
        """Give the note, or 404."""
        if int(number) not in NOTES:
            raise web.HTTPError(404)
        self.write({"id": int(number), "text": NOTES[int(number)]})


class StreamHandler(web.RequestHandler):
    """Server-sent events: the client gets each one when it is flushed, the recorded call has them all."""

    async def get(self) -> None:
        """Send the notes one by one."""
        self.set_header("Content-Type", "text/event-stream")
        for number, text in sorted(NOTES.items()):
            self.write(f"id: {number}\ndata: {json.dumps(text)}\n\n")
            await self.flush()
            await asyncio.sleep(0.05)


@web.stream_request_body
class UploadHandler(web.RequestHandler):
    """A file of any size, never held in memory."""

    def initialize(self) -> None:
        """Begin a checksum."""
        self.digest = hashlib.sha256()
        self.size_bytes = 0

    async def data_received(self, chunk: bytes) -> None:
        """Take the next part."""
        self.digest.update(chunk)
        self.size_bytes += len(chunk)

    def put(self) -> None:
        """Say what came."""
        self.write({"size_bytes": self.size_bytes, "sha256": self.digest.hexdigest()})


def identify_user(handler: web.RequestHandler) -> str | None:
    """Name the user of a call."""
    return handler.request.headers.get("X-User")


def identify_company(handler: web.RequestHandler) -> str | None:
    """Name the company of a call."""
    return handler.request.headers.get("X-Company")


def make_application(middleware: MoesifMiddleware) -> web.Application:
    """Make the service; the last argument is all that Moesif needs."""
    return web.Application(
        [
            (r"/notes", NotesHandler),
            (r"/notes/stream", StreamHandler),
            (r"/notes/(\d+)", NoteHandler),
            (r"/upload", UploadHandler),
        ],
        log_function=middleware.log_event,
    )


async def main(port: int) -> None:
    """Serve until Ctrl-C or SIGTERM, then deliver what is pending."""
    middleware = MoesifMiddleware(
        {
            "APPLICATION_ID": os.environ["MOESIF_APPLICATION_ID"],
            "BASE_URI": os.environ.get("MOESIF_BASE_URI", "https://api.moesif.net"),
            "IDENTIFY_USER": identify_user,
            "IDENTIFY_COMPANY": identify_company,
        }
    )
    server = make_application(middleware).listen(port, "127.0.0.1", max_body_size=10 * 1024**3)
    print(f"serving on http://127.0.0.1:{port}", flush=True)
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await stopping.wait()
    server.stop()
    await server.close_all_connections()
    # It waits for the network, so not on the event loop.
    await asyncio.to_thread(middleware.shutdown)


if __name__ == "__main__":
    asyncio.run(main(int(os.environ.get("PORT", "8000"))))
