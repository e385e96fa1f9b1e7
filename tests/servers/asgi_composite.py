"""One ASGI application that passes each call on to an application of one framework, or answers itself.

`/bare/<framework>/…` is answered by one that knows nothing of us, `/ours/<framework>/…` by one with our middleware, put
there in the way that the documentation of the framework names.
"""

from __future__ import annotations

import asyncio
import json
import os

import anyio
import anyio.lowlevel
import falcon.asgi
from django.conf import settings
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from litestar import Litestar, get, post
from litestar.response import Stream
from quart import Quart
from quart import request as quart_request
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.responses import StreamingResponse as StarletteStream
from starlette.routing import Mount, Route

from moesif_otel.asgi import MoesifMiddleware
from tests.servers import django_project

SETTINGS = {
    "APPLICATION_ID": os.environ["SERVERS_APPLICATION_ID"],
    "BASE_URI": os.environ["SERVERS_BASE_URI"],
    "EVENT_BATCH_TIMEOUT": 0.1,
}
PIECES = (b"one ", b"two ", b"three")


async def pieces():
    for piece in PIECES:
        yield piece
        await anyio.lowlevel.checkpoint()


def make_fastapi():
    fastapi_app = FastAPI()

    @fastapi_app.post("/fastapi/echo", status_code=201)
    async def fastapi_echo(item: dict):
        return {"by": "fastapi", "got": item}

    @fastapi_app.get("/fastapi/stream")
    async def fastapi_stream():
        return StreamingResponse(pieces(), media_type="text/plain")

    @fastapi_app.get("/fastapi/fail")
    def fastapi_fail():
        raise LookupError

    @fastapi_app.post("/fastapi/upload")
    async def fastapi_upload(request: Request):
        return {"size": sum([len(piece) async for piece in request.stream()])}

    return fastapi_app


def make_starlette():
    async def starlette_echo(request):
        return JSONResponse({"by": "starlette", "got": await request.json()}, 201)

    async def starlette_stream(request):
        return StarletteStream(pieces(), media_type="text/plain")

    async def starlette_fail(request):
        raise LookupError

    return Starlette(
        routes=[
            Route("/starlette/echo", starlette_echo, methods=["POST"]),
            Route("/starlette/stream", starlette_stream),
            Route("/starlette/fail", starlette_fail),
        ]
    )


def make_quart():
    quart_app = Quart(__name__)

    @quart_app.post("/quart/echo")
    async def quart_echo():
        return {"by": "quart", "got": await quart_request.get_json()}, 201

    @quart_app.get("/quart/stream")
    async def quart_stream():
        return pieces(), {"Content-Type": "text/plain"}

    @quart_app.get("/quart/fail")
    async def quart_fail():
        raise LookupError

    return quart_app


def make_litestar():
    @post("/litestar/echo")
    async def litestar_echo(data: dict) -> dict:
        return {"by": "litestar", "got": data}

    @get("/litestar/stream")
    async def litestar_stream() -> Stream:
        return Stream(pieces(), media_type="text/plain")

    @get("/litestar/fail")
    async def litestar_fail() -> None:
        raise LookupError

    return Litestar([litestar_echo, litestar_stream, litestar_fail])


def make_falcon():
    class Echo:
        async def on_post(self, request, response):
            response.media = {"by": "falcon", "got": await request.get_media()}
            response.status = 201

    class Stream:
        async def on_get(self, request, response):
            response.content_type = "text/plain"
            response.stream = pieces()

    class Fail:
        async def on_get(self, request, response):
            raise LookupError

    falcon_app = falcon.asgi.App()
    falcon_app.add_route("/falcon/echo", Echo())
    falcon_app.add_route("/falcon/stream", Stream())
    falcon_app.add_route("/falcon/fail", Fail())
    return falcon_app


def make_mounted(*, with_us):
    """An application in an application; with us both have our middleware."""
    inner = FastAPI()

    @inner.post("/echo", status_code=201)
    async def mounted_echo(item: dict):
        return {"by": "mounted", "got": item}

    @inner.get("/stream")
    async def mounted_stream():
        return StreamingResponse(pieces(), media_type="text/plain")

    @inner.get("/fail")
    def mounted_fail():
        raise LookupError

    outer = Starlette(routes=[Mount("/mounted", app=inner)])
    if with_us:
        for one in (inner, outer):
            one.add_middleware(MoesifMiddleware, settings=SETTINGS)
    return outer


async def plain_app(scope, receive, send):
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    if scope["path"] == "/plain/fail":
        raise LookupError
    if scope["path"] == "/plain/echo":
        answer = json.dumps({"by": "plain", "got": json.loads(body)}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer)), (b"set-cookie", b"a=1")]
        await send({"type": "http.response.start", "status": 201, "headers": [*headers, (b"set-cookie", b"b=2")]})
        await send({"type": "http.response.body", "body": answer})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    if scope["path"] == "/plain/forever":
        gone = asyncio.ensure_future(receive())  # most servers swallow what is sent to a client that has left
        while not gone.done():
            await send({"type": "http.response.body", "body": bytes(65_536), "more_body": True})
            await asyncio.sleep(0.001)
        return
    for piece in PIECES:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body"})


def make_django(*, with_us):
    settings.MIDDLEWARE = [*django_project.BEFORE, *([django_project.OURS] if with_us else [])]
    settings.MOESIF_MIDDLEWARE = {**SETTINGS, "DISABLED_TRANSACTION_ID": True}
    return django_project.asgi


BARE = {
    "fastapi": make_fastapi(),
    "starlette": make_starlette(),
    "quart": make_quart(),
    "litestar": make_litestar(),
    "falcon": make_falcon(),
    "mounted": make_mounted(with_us=False),
    "django": make_django(with_us=False),
    "plain": plain_app,
}
OURS = {
    "fastapi": make_fastapi(),
    "starlette": make_starlette(),
    "quart": make_quart(),
    "litestar": MoesifMiddleware(make_litestar(), SETTINGS),
    "falcon": MoesifMiddleware(make_falcon(), SETTINGS),
    "mounted": make_mounted(with_us=True),
    "django": make_django(with_us=True),
    "plain": MoesifMiddleware(plain_app, SETTINGS),
}
OURS["fastapi"].add_middleware(MoesifMiddleware, settings=SETTINGS)
OURS["starlette"].add_middleware(MoesifMiddleware, settings=SETTINGS)
OURS["quart"].asgi_app = MoesifMiddleware(OURS["quart"].asgi_app, SETTINGS)


async def application(scope, receive, send):
    if scope["type"] == "lifespan":
        raise NotImplementedError  # the composite takes no part: a delivery at the end must not depend on it
    _, side, framework, _ = scope["path"].split("/", 3)
    scope = {**scope, "path": scope["path"][5:], "raw_path": scope["raw_path"][5:]}
    await (OURS if side == "ours" else BARE)[framework](scope, receive, send)
