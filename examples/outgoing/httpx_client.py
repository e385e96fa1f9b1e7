"""A program that calls an API with `httpx`, its calls recorded in Moesif.

    MOESIF_APPLICATION_ID=... python examples/outgoing/httpx_client.py https://httpbin.org/anything

With MOESIF_BASE_URI=http://127.0.0.1:8765 they go to `moesif-otel sandbox` instead.
"""

from __future__ import annotations

import asyncio
import os
import sys

import httpx

from moesif_otel.outgoing import start_capture_outgoing


def identify_user(request: httpx.Request, response: httpx.Response | None) -> str | None:
    """Say on whose behalf the call was made; `response` is None when it failed."""
    return request.headers.get("X-On-Behalf-Of")


def skip(request: httpx.Request, response: httpx.Response | None) -> bool:
    """Leave health checks out."""
    return request.url.path == "/health"


SETTINGS = {
    "APPLICATION_ID": os.environ["MOESIF_APPLICATION_ID"],
    "BASE_URI": os.environ.get("MOESIF_BASE_URI", "https://api.moesif.net"),
    "IDENTIFY_USER_OUTGOING": identify_user,
    "SKIP_OUTGOING": skip,
    "REQUEST_BODY_MASKS": ["card_number"],
}


async def main(url: str) -> None:
    """Make one call of each kind."""
    async with httpx.AsyncClient(headers={"X-On-Behalf-Of": "ann"}, timeout=10) as client:
        answers = await asyncio.gather(
            client.post(url, json={"order": 7, "card_number": "4111 1111 1111 1111"}),
            client.get(httpx.URL(url).join("/health")),
        )
        print("posted:", answers[0].status_code)
        # A stream stays a stream; the event leaves when it has been read, closed or dropped.
        async with client.stream("GET", url) as stream:
            print("streamed:", sum([len(piece) async for piece in stream.aiter_bytes()]), "bytes")
        try:
            await client.get("http://nonexistent.invalid/")
        except httpx.ConnectError:
            print("failed: recorded without a response")


if __name__ == "__main__":
    # Of the clients that are known only this one; "requests" and "aiohttp" are captured too where nothing is said.
    with start_capture_outgoing(SETTINGS, clients=["httpx"]) as capture:
        asyncio.run(main(sys.argv[1]))
    print("delivered:", capture.stats()["delivered"])
