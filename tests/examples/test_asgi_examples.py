"""The FastAPI, Starlette and Django examples, run as their first lines say, called, their events read from the sandbox."""

from __future__ import annotations

import base64
import socket

import pytest

from tests.examples.test_examples import run

__all__ = ["run"]  # the fixture


def test_fastapi(run):
    """Identity from a dependency, an async callback, a stream, and a call that is left out."""
    service = run("fastapi")
    assert service.call("GET", "/books/1").json()["title"] == "The Left Hand of Darkness"
    answer = service.call("POST", "/books", json={"title": "Kindred"}, headers={"X-User-Id": "mary"})
    assert (answer.status_code, answer.json()) == (201, {"id": 2, "title": "Kindred"})
    assert service.call("GET", "/books/9").status_code == 404
    assert service.call("GET", "/feed").text == '{"line": 0}\n{"line": 1}\n{"line": 2}\n'
    assert service.call("GET", "/health").json() == "ok"
    events = {event["request"]["uri"].rpartition("/")[2]: event for event in service.events(4)}
    assert len(events) == len(service.sandbox.events()) == 4
    assert events["1"]["response"]["body"]["id"] == 1
    added = events["books"]
    assert (added["user_id"], added["request"]["body"]) == ("mary", {"title": "Kindred"})
    assert added["metadata"] == {"datacenter": "westus", "status": 201}
    assert events["9"]["response"]["status"] == 404
    assert base64.b64decode(events["feed"]["response"]["body"]).count(b"\n") == 3
    assert "moesif_otel" not in service.errors


def test_starlette(run):
    """A middleware around the whole application; a WebSocket's handshake is one event."""
    service = run("starlette")
    answer = service.call("POST", "/books", json={"title": "Kindred"}, headers={"X-User-Id": "mary"})
    assert answer.status_code == 201
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as client:
        client.sendall(
            b"GET /news HTTP/1.1\r\nHost: books.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        received = b""
        while piece := client.recv(4096):
            received += piece
            if b"a new book" in received:
                break
    assert received.startswith(b"HTTP/1.1 101")
    added, news = sorted(service.events(2), key=lambda event: event["request"]["uri"])
    assert (added["user_id"], added["response"]["body"]) == ("mary", {"id": 2, "title": "Kindred"})
    assert news["response"]["status"] == 101
    assert news["metadata"]["moesif_otel"]["outcome"] == "upgraded"


@pytest.mark.parametrize("arguments", [(), ("asgi",)], ids=["wsgi", "asgi"])
def test_django(run, arguments):
    """Both protocols; the header with the event's id is the drop-in's."""
    service = run("django", *arguments)
    found = service.call("GET", "/books/1", headers={"X-User-Id": "mary"})
    assert found.json()["id"] == 1
    assert service.call("POST", "/books", json={"title": "Kindred"}).status_code == 201
    second, first = sorted(service.events(2), key=lambda event: event["request"]["verb"], reverse=True)
    assert first["user_id"] == "mary"
    assert found.headers["X-Moesif-Transaction-Id"] == first["transaction_id"]
    assert first["metadata"]["moesif_otel"]["route"] == "books/<int:book_id>"
    assert first["metadata"]["datacenter"] == "westus"
    assert second["request"]["body"] == {"title": "Kindred"}
