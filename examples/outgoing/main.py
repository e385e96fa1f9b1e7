"""A program that calls an API with `requests`, its calls recorded in Moesif.

    MOESIF_APPLICATION_ID=... python examples/outgoing/main.py https://httpbin.org/anything

With MOESIF_BASE_URI=http://127.0.0.1:8765 they go to `moesif-otel sandbox` instead.
"""

from __future__ import annotations

import io
import os
import sys

import requests

from moesif_otel.outgoing import start_capture_outgoing


def identify_user(request: requests.PreparedRequest, response: requests.Response | None) -> str | None:
    """Say on whose behalf the call was made; `response` is None when it failed."""
    return request.headers.get("X-On-Behalf-Of")


def get_metadata(request: requests.PreparedRequest, response: requests.Response | None) -> dict[str, object]:
    """Add what you want to search for."""
    return {"retryable": response is None or response.status_code >= 500}


SETTINGS = {
    "APPLICATION_ID": os.environ["MOESIF_APPLICATION_ID"],
    "BASE_URI": os.environ.get("MOESIF_BASE_URI", "https://api.moesif.net"),
    "IDENTIFY_USER_OUTGOING": identify_user,
    "GET_METADATA_OUTGOING": get_metadata,
    "REQUEST_BODY_MASKS": ["card_number"],
}


def main(url: str) -> None:
    """Make one call of each kind."""
    with requests.Session() as session:
        session.headers["X-On-Behalf-Of"] = "ann"
        answer = session.post(url, json={"order": 7, "card_number": "4111 1111 1111 1111"}, timeout=10)
        print("posted:", answer.status_code)
        # A file goes out piece by piece, and is recorded as it does.
        answer = session.put(url, data=io.BytesIO(b"line\n" * 1_000), timeout=10)
        print("uploaded:", answer.status_code)
        # A stream stays a stream; the event leaves when it has been read, closed or dropped.
        with session.get(url, stream=True, timeout=10) as stream:
            print("streamed:", sum(len(piece) for piece in stream.iter_content(8_192)), "bytes")
        try:
            session.get("http://nonexistent.invalid/", timeout=10)
        except requests.ConnectionError:
            print("failed: recorded without a response")


if __name__ == "__main__":
    capture = start_capture_outgoing(SETTINGS)
    main(sys.argv[1])
    # Not needed at the end of a program, which delivers what is pending by itself: `requests` is as it was now.
    capture.stop()
    print("delivered:", capture.stats()["delivered"])
