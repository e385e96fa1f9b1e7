"""Content that is no use is recorded by its size and type, through every way in; LOG_BINARY_BODY brings it back."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest
import requests

from moesif_otel import MoesifMiddleware
from moesif_otel._redaction.media import LEFT_OUT_TYPES
from moesif_otel.outgoing import start_capture_outgoing
from moesif_otel.sandbox import Sandbox
from moesif_otel.tornado import MoesifMiddleware as TornadoMiddleware

from .planting import Case, Message, text_for
from .serving import send_all, tornado_application, tornado_server, wsgi_app, wsgi_server
from .watching import assert_absent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECRET = text_for("hidden in a picture")
CONTENT = b"\x89PNG\r\n\x1a\n\xff\xfe" + SECRET.encode() + b"\0" * 10
TYPES = [name.replace("*", "x-any") for name in LEFT_OUT_TYPES] + ["Image/PNG; q=1"]


def _cases() -> list[Case]:
    return [
        Case(name, request=Message([("Content-Type", name)], CONTENT), response=Message([("Content-Type", name)], CONTENT))
        for name in TYPES
    ]


def _through_wsgi(options: dict[str, Any]) -> None:
    cases = _cases()
    middleware = MoesifMiddleware(wsgi_app(cases), options)
    with wsgi_server(middleware) as port:
        send_all(port, cases)
    assert middleware.force_flush(30_000)
    middleware.shutdown()


def _through_tornado(options: dict[str, Any]) -> None:
    cases = _cases()
    middleware = TornadoMiddleware(options)
    with tornado_server(tornado_application(cases, log_function=middleware.log_event)) as port:
        send_all(port, cases)
    assert middleware.force_flush(30_000)
    middleware.shutdown()


def _through_requests(options: dict[str, Any]) -> None:
    cases = _cases()
    with wsgi_server(wsgi_app(cases)) as port, start_capture_outgoing(options) as capture, requests.Session() as session:
        for number, case in enumerate(cases):
            headers = {**dict(case.request.headers), "X-Case": str(number)}
            assert session.post(f"http://127.0.0.1:{port}/", data=CONTENT, headers=headers).content == CONTENT
        assert capture.force_flush(30_000)


WAYS_IN = pytest.mark.parametrize("way_in", [_through_wsgi, _through_tornado, _through_requests])


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


@WAYS_IN
def test_size_and_type_instead(way_in: Callable[[dict[str, Any]], None], sandbox: Sandbox) -> None:
    """Every documented type: no body, but how much of what there was, and why."""
    way_in({"APPLICATION_ID": "left out", "BASE_URI": sandbox.url})
    events = sandbox.wait_for_events(len(TYPES))
    assert_absent("the events", json.dumps(events), [SECRET])
    told = set()
    for event in events:
        ours = event["metadata"]["moesif_otel"]
        for side in ("request", "response"):
            assert "body" not in event[side]
            facts = ours[f"{side}_body"]
            assert (facts["left_out"], facts["size_bytes"]) == ("content_type", len(CONTENT))
            told.add(facts["content_type"])
    assert told == {name.partition(";")[0].lower() for name in TYPES}


@WAYS_IN
def test_log_binary_body(way_in: Callable[[dict[str, Any]], None], sandbox: Sandbox) -> None:
    """With the option the bytes are there, as base64."""
    way_in({"APPLICATION_ID": "left out", "BASE_URI": sandbox.url, "LOG_BINARY_BODY": True})
    for event in sandbox.wait_for_events(len(TYPES)):
        for side in ("request", "response"):
            assert event[side]["transfer_encoding"] == "base64"
            assert base64.b64decode(event[side]["body"]) == CONTENT
