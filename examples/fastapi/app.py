"""A FastAPI service whose calls reach Moesif.

    MOESIF_APPLICATION_ID=... python examples/fastapi/app.py

Needs fastapi and uvicorn beside moesif-otel.
With MOESIF_BASE_URI=http://127.0.0.1:8765 they go to `moesif-otel sandbox` instead. PORT defaults to 8000.
"""

import os
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, Header, HTTPException
from fastapi.responses import StreamingResponse

from moesif_otel import identify
from moesif_otel.asgi import MoesifMiddleware

BOOKS = {1: {"id": 1, "title": "The Left Hand of Darkness"}}


async def known_user(x_user_id: Annotated[str | None, Header()] = None):
    # Where you know who calls: in a dependency, a thread pool, a task. Or give IDENTIFY_USER.
    identify(user_id=x_user_id)


async def get_metadata(request, response):
    # Callbacks may be `async def`: no answer waits for one.
    return {"datacenter": "westus", "status": response.status_code}


def skip(request, response):
    return request.url.path == "/health"


app = FastAPI(dependencies=[Depends(known_user)])
# APPLICATION_ID, BASE_URI and every other option may also come from the environment, as MOESIF_<NAME>.
app.add_middleware(MoesifMiddleware, settings={"GET_METADATA": get_metadata, "SKIP": skip})


@app.get("/books/{book_id}")
async def get_book(book_id: int):
    if book_id not in BOOKS:
        raise HTTPException(404, "no such book")
    return BOOKS[book_id]


@app.post("/books", status_code=201)
def add_book(book: dict):
    BOOKS[len(BOOKS) + 1] = {"id": len(BOOKS) + 1, "title": book["title"]}
    return BOOKS[len(BOOKS)]


@app.get("/feed")
async def feed():
    # A stream stays a stream: each line leaves when it is yielded.
    return StreamingResponse((f'{{"line": {number}}}\n' for number in range(3)), media_type="application/x-ndjson")


@app.get("/health")
async def health():
    return "ok"


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
