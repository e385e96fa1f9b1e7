"""A WebSocket and a stream behind the middleware, for governance on real servers; the stream waits for `/go`."""

import asyncio
import os

from moesif_otel.asgi import MoesifMiddleware

going = None


async def respond(send, *pieces):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body"})


async def application(scope, receive, send):
    global going
    if scope["type"] == "lifespan":
        raise NotImplementedError
    going = going or asyncio.Event()
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept", "headers": [(b"x-own", b"1")]})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"].upper()})
    elif scope["path"] == "/go":
        going.set()
        await respond(send, b"gone")
    elif scope["path"] == "/stream/headers":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"first;", "more_body": True})
        await going.wait()
        await send({"type": "http.response.body", "body": b"second"})
    else:
        await respond(send, b"served")


application = MoesifMiddleware(
    application,
    {
        "APPLICATION_ID": os.environ["SERVERS_APPLICATION_ID"],
        "BASE_URI": os.environ["SERVERS_BASE_URI"],
        "EVENT_BATCH_TIMEOUT": 0.1,
    },
)
