"""Planted secrets: whatever the format, encoding, chunking and truncation, none of them leaves."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesif_otel._capture.body import CapturedBody
from moesif_otel._events.serialize import serialize
from moesif_otel._otlp.span_copy import Hide, redacted_attributes
from tests.calls import Calls, build_event
from tests.secrets import CODINGS, MASK, SECRET, bodies, holds, json_texts, names, urls

CALLS = Calls()
OPTIONS = Calls.options(
    REQUEST_BODY_MASKS=[MASK], RESPONSE_BODY_MASKS=[MASK], REQUEST_HEADER_MASKS=[MASK], RESPONSE_HEADER_MASKS=[MASK]
)
SOME = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def leaves(exchange: Any, span: Any = None) -> bytes:
    """Everything that would leave for one call: both kinds of payload, and the OTLP copy, which a bare span has not."""
    out = b""
    for parse in (False, True):
        event = build_event(exchange, span, OPTIONS, parse_bodies=parse)
        assert event is not None
        payload = serialize(event)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # our look for escapes meets invalid ones
            assert not holds(payload), payload
        out += payload
    if exchange is not None:
        attributes = redacted_attributes(exchange, Hide(OPTIONS))
        assert not holds(json.dumps(attributes).encode()), attributes
    return out


@SOME
@given(bodies(), st.sampled_from(list(CODINGS)), st.booleans())
def test_in_bodies(planted: tuple[bytes, str | None], coding: str | None, of_request: bool) -> None:
    """Every format under every content coding, on both sides."""
    data, content_type = planted
    headers = [("Content-Type", content_type)] if content_type else []
    headers += [("Content-Encoding", coding)] if coding else []
    side = "request" if of_request else "response"
    leaves(CALLS.exchange(**{side: CODINGS[coding](data), f"{side}_headers": headers}))


@SOME
@given(bodies(), st.sampled_from(list(CODINGS)), st.data())
def test_in_truncated_bodies(planted: tuple[bytes, str | None], coding: str | None, data: st.DataObject) -> None:
    """Cut anywhere, whether a value is left half or whole."""
    body, content_type = planted
    encoded = CODINGS[coding](body)
    kept = data.draw(st.integers(1, len(encoded)))
    headers = [("Content-Type", content_type)] if content_type else []
    headers += [("Content-Encoding", coding)] if coding else []
    leaves(CALLS.exchange(response=encoded, response_kept=kept, response_headers=headers))


@SOME
@given(bodies(), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_in_chunked_bodies(planted: tuple[bytes, str | None], sizes: list[int]) -> None:
    """However the pieces of a body passed by."""
    data, content_type = planted
    exchange = CALLS.exchange(response_headers=[("Content-Type", content_type)] if content_type else [])
    exchange.response_body = body = CapturedBody(1_000_000, CALLS.budget)
    at = 0
    while at < len(data):
        size = sizes[at % len(sizes)]
        body.add(data[at : at + size])
        at += size
    leaves(exchange)


@SOME
@given(urls(), st.sampled_from(["Referer", "Location", "X-Original-Url", "Link"]))
def test_in_urls(url: str, header: str) -> None:
    """The call's own URL, and URLs in headers of either side, also as attributes of a bare span."""
    value = f"<{url}>; rel=next" if header == "Link" else url
    leaves(CALLS.exchange(url=url, request_headers=[(header, value)], response_headers=[(header, value)]))
    span = CALLS.span(
        {"http.method": "GET", "http.url": url, f"http.request.header.{header.lower()}": [value], "other.link": url},
        name=f"GET {url}",
    )
    leaves(None, span)
    leaves(None, CALLS.span({"http.method": "GET", "http.target": url, "http.host": "x"}))


@SOME
@given(names(), st.sampled_from(["{}={}", "a=b; {}={}", "{}={}; c=d", 'a="x,y"; {}="{}"', "x=1, {}={}"]))
def test_in_cookies(name: str, form: str) -> None:
    """Cookie and Set-Cookie."""
    text = form.format(name, SECRET)
    leaves(
        CALLS.exchange(
            request_headers=[("Cookie", text)], response_headers=[("Set-Cookie", f"{text}; Path=/; HttpOnly")]
        )
    )


@SOME
@given(names(), st.sampled_from(["", "x-", "X-"]))
def test_in_headers(name: str, prefix: str) -> None:
    """Headers whose names count, on both sides."""
    if name.lower() == MASK.lower():
        prefix = ""
    headers = [("Accept", "*/*"), (prefix + name.replace("_", "-"), SECRET)]
    leaves(CALLS.exchange(request_headers=headers, response_headers=headers))


@pytest.mark.parametrize(
    "value",
    [
        f"Bearer {SECRET}",
        f"bearer  {SECRET}",
        f"Basic {SECRET}",
        SECRET,
        f"{SECRET} x",
        f'Digest username="a", response="{SECRET}"',
        f"Bearer a, Basic {SECRET}",
    ],
)
@pytest.mark.parametrize("name", ["Authorization", "PROXY-AUTHORIZATION"])
def test_in_credentials(name: str, value: str) -> None:
    """Only a scheme that is known is shown."""
    leaves(CALLS.exchange(request_headers=[(name, value)], response_headers=[(name, value)]))


@SOME
@given(json_texts())
def test_in_span_bodies_and_attributes(text: str) -> None:
    """A bare span's body attributes, the application's own attributes, and its exceptions."""
    from opentelemetry.sdk.trace import Event

    events = (Event("exception", {"exception.type": "E", "exception.message": text}),)
    leaves(
        None,
        CALLS.span(
            {
                "http.method": "GET",
                "http.status_code": 200,
                "http.request.body.content": text,
                "http.response.body.content": text,
                "mine": text,
            },
            events=events,
        ),
    )
