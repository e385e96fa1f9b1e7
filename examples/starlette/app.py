"""A Starlette service whose calls reach Moesif; the same line wraps any other ASGI application.

    MOESIF_APPLICATION_ID=... python examples/starlette/app.py

Needs starlette and uvicorn beside moesif-otel.
With MOESIF_BASE_URI=http://127.0.0.1:8765 they go to `moesif-otel sandbox` instead. PORT defaults to 8000.
"""

import os

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute

from moesif_otel.asgi import MoesifMiddleware

BOOKS = {1: {"id": 1, "title": "The Left Hand of Darkness"}}


async def get_book(request):
    book = BOOKS.get(request.path_params["book_id"])
    return JSONResponse(book) if book else JSONResponse({"error": "no such book"}, 404)


async def add_book(request):
    book = {"id": len(BOOKS) + 1, "title": (await request.json())["title"]}
    BOOKS[book["id"]] = book
    return JSONResponse(book, 201)


async def news(websocket):
    # The handshake is one call; what passes over the socket is not looked at.
    await websocket.accept()
    await websocket.send_text("a new book")
    await websocket.close()


def identify_user(request, response):
    return request.headers.get("x-user-id")  # without it, the user is the `sub` of a Bearer token


app = Starlette(
    routes=[
        Route("/books/{book_id:int}", get_book),
        Route("/books", add_book, methods=["POST"]),
        WebSocketRoute("/news", news),
    ]
)
app = MoesifMiddleware(app, {"IDENTIFY_USER": identify_user})  # the application id: MOESIF_APPLICATION_ID

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
