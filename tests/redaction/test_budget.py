"""`_redaction.budget`: whatever a client sends costs a small bounded amount of work and memory."""

from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest

from moesif_otel._capture.body import LeftOut
from moesif_otel._events.body import read_body
from moesif_otel._redaction import budget
from moesif_otel._redaction.budget import MAX_DECODED_BYTES, MAX_HEADER_BYTES, MAX_NODES, Inspection
from moesif_otel._redaction.headers import bounded_headers, redact_header
from moesif_otel._redaction.rules import Rules
from moesif_otel._redaction.text import inspect_text, redact_text, redact_url

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.calls import Calls

AUTO = Rules(auto=True)
MAX_CALLS = 20 * MAX_NODES
"""Most Python and C calls for one body: some twenty a step, whatever the steps are."""

HOSTILE: dict[str, tuple[bytes, bytes, bytes, str]] = {
    # name: before, repeated, after, type
    "digits": (b'{"card":"', b"1 ", b'"}', "application/json"),
    "pairs of digits": (b'{"card":"', b"11 ", b'"}', "application/json"),
    "runs of digits": (b'{"card":"', b"1 2 3 4 5 6 7 8 9 0,", b'"}', "application/json"),
    "cards": (b'{"card":[', b"4111111111111112,", b"1]}", "application/json"),
    "lines": (b"", b'{"token":1}\n', b"", "application/x-ndjson"),
    "small lines": (b'{"token":1}\n', b"{}\n", b"", "application/x-ndjson"),
    "strings": (b'{"token":1,"a":[', b'"",', b"1]}", "application/json"),
    "marked strings": (b'{"token":1,"a":[', b'"a:b=token",', b"1]}", "application/json"),
    "hidden brackets": (b'{"token":[', b"[],", b"1]}", "application/json"),
    "form": (b"token=x", b"&a=a", b"", "application/x-www-form-urlencoded"),
    "secrets in a form": (b"a=b", b"&password=a", b"", "application/x-www-form-urlencoded"),
    "escapes in a form": (b"a=b", b"&%61=%61", b"", "application/x-www-form-urlencoded"),
    "escaped escapes": (b"a=", b"%2525252561", b"", "application/x-www-form-urlencoded"),
    "pairs": (b"token=x ", b"a:a=", b"", "text/plain"),
    "keys": (b"token=x ", b"a key=", b"", "text/plain"),
    "values": (b"", b"password:a\n", b"", "text/plain"),
    "no values": (b"", b"password:\n\n", b"", "text/plain"),
    "quoted values": (b"", b'password="a",', b"", "text/plain"),
    "passwords of URLs": (b"", b"://a@", b"", "text/plain"),
    "URLs": (b"password=x ", b"http://a?b=c&d=e ", b"", "text/plain"),
    "short texts": (b"token x ", b"%25{api http://a/&lt;", b"", "application/octet-stream"),
    "names in paths": (b"", b"/token:a\n", b"", "text/plain"),
    "flags": (b"", b"--password x ", b"", "text/plain"),
    "line ends": (b"password: x", b"\n", b"", "text/plain"),
    "backslashes": (b"password: x\n", b"\\", b"", "text/plain"),
    "spelled": (b"", b"\\u0070", b"", "text/plain"),
    "tags": (b"<password/>", b"<a>b</a>", b"", "text/xml"),
    "secret tags": (b"", b"<password>x</password>", b"", "text/xml"),
    "open tags": (b"", b"<password>", b"", "text/xml"),
    "unclosed tags": (b"<password/>", b"<a ", b"", "text/xml"),
    "quotes in tags": (b"<password/>", b"<a \"'", b"", "text/xml"),
    "attributes": (b"<password/><a ", b"a=b ", b">", "text/xml"),
    "one attribute": (b"<password/><a ", b"a", b">", "text/xml"),
    "comments": (b"<password/>", b"<!--", b"", "text/xml"),
    "entities": (b"<password/>", b"&lt;a=b", b"", "text/xml"),
    "events": (b"", b"data: a=password\n\n", b"", "text/event-stream"),
    "lines of one event": (b"data: password:x\n", b"data:\n", b"", "text/event-stream"),
    "parts": (b"", b"--b\r\n\r\n", b"", "multipart/form-data; boundary=b"),
    "names of a part": (
        b"--b\r\ncontent-disposition: x",
        b";name*=a",
        b"\r\n\r\nx\r\n--b--",
        "multipart/form-data; boundary=b",
    ),
    "words": (b"password ", b"ab ", b"", "application/octet-stream"),
    "cells": (b"a,", b"b,", b"\n1,2\ntoken=a\n", "text/csv"),
    "depth": (b'{"token":1,"a":', b"[", b"", "application/json"),
    "escaped quotes of a cut string": (b'{"token":1,"a":"', b'\\"', b"", "application/json"),
    "escaped quotes of no string": (b'{"token":1,', b'\\"', b"\x01", "application/json"),
    "quotes and backslashes": (b'[token "a', b'"a\\', b"", "text/plain"),
    "names with marks": (b'{"token":1', b',"a-b":1', b"}", "application/json"),
    "texts as names": (b'{"token":1', b',"a=token":1', b"}", "application/json"),
    "lines of no stream": (b"data: token=x", b"\r\ndata: token=x", b"\r\nno stream", "text/event-stream"),
    "extended name of a part": (
        b"--b\r\ncontent-disposition: x; name*=",
        b"a",
        b"\r\n\r\nx\r\n--b--",
        "multipart/form-data; boundary=b",
    ),
    "encoded name of a part": (
        b'--b\r\ncontent-disposition: x; name="',
        b"=?a?q?",
        b'"\r\n\r\nx\r\n--b--',
        "multipart/form-data; boundary=b",
    ),
    "headers of a part": (b"--b\r\n", b"token: x\r\n", b"\r\nx\r\n--b--", "multipart/form-data; boundary=b"),
    "private keys": (b"", b"-----BEGIN PRIVATE KEY-----", b"", "text/plain"),
}


def calls_of(work: Callable[[], Any]) -> int:
    """How many Python and C functions are called: the same on every machine."""
    count = 0

    def counted(_frame: Any, event: str, _arg: Any) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def hostile(name: str, size: int) -> tuple[bytes, str]:
    before, repeated, after, content_type = HOSTILE[name]
    return before + repeated * ((size - len(before) - len(after)) // len(repeated)) + after, content_type


@pytest.mark.parametrize("name", list(HOSTILE))
def test_the_work_of_a_body_is_bounded(name: str) -> None:
    """The largest body that is decoded costs no more calls than its steps allow.

    The work inside of one search is not counted; where that is not linear, this test takes minutes, or does not end.
    """
    data, content_type = hostile(name, MAX_DECODED_BYTES)
    read: Callable[[], Any] = lambda: read_body(data, content_type, None, truncated=False, parse=False, rules=AUTO)  # noqa: E731
    assert calls_of(read) <= MAX_CALLS


@pytest.mark.parametrize("name", list(HOSTILE))
def test_the_work_of_a_body_is_linear(name: str) -> None:
    """Twice the bytes, at most some twice the work."""
    calls = []
    for size in (10_000, 20_000):
        data, content_type = hostile(name, size)
        calls.append(
            calls_of(lambda d=data, c=content_type: read_body(d, c, None, truncated=False, parse=False, rules=AUTO))
        )
    assert calls[1] <= 2.2 * calls[0] + 500


def test_what_is_over_the_budget_is_left_out_whole() -> None:
    """With its reason, never half-inspected and sent."""
    data, content_type = hostile("strings", MAX_DECODED_BYTES)
    assert (
        read_body(data, content_type, None, truncated=False, parse=False, rules=AUTO).left_out
        == LeftOut.TOO_COMPLEX.value
    )
    assert redact_text(AUTO, "a=b " * MAX_NODES + "token=x") == "(hidden)"
    shown = redact_url(AUTO, "https://joe:pw@x/path?" + "token=x&" * (MAX_NODES + 1))
    assert shown == "https://(hidden)@x/path?(hidden)"


def test_what_needs_no_look_costs_nothing() -> None:
    """However large: the quick scan is all."""
    data = json.dumps([{"id": n, "name": "x"} for n in range(20_000)]).encode()
    assert calls_of(lambda: read_body(data, "application/json", None, truncated=False, parse=False, rules=AUTO)) < 150


@pytest.mark.parametrize("line", [b'{"token":1}\n', b"{}\n", b"[]\n", b"1\n"])
def test_lines_take_no_memory(line: bytes) -> None:
    """489 bytes of gzip once made the process grow by 899 MB."""
    bomb = gzip.compress(b'{"token":1}\n' + line * 200_000)
    tracemalloc.start()
    try:
        read_body(bomb, "application/x-ndjson", "gzip", truncated=False, parse=False, rules=AUTO)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 30_000_000


def test_headers_are_bounded() -> None:
    """What is over the bound is left out, one too long by itself alone; the rest stays in its order."""
    few = [("A", "b"), ("C", "d")]
    assert bounded_headers(few) is few
    many = [("A", "b"), ("Long", "x" * MAX_HEADER_BYTES), ("C", "d"), *((f"X-{n}", "y" * 100) for n in range(1_000))]
    kept = bounded_headers(many)
    assert kept[:3] == [("A", "b"), ("C", "d"), ("X-0", "y" * 100)]
    assert MAX_HEADER_BYTES - 200 < sum(len(name) + len(value) for name, value in kept) <= MAX_HEADER_BYTES


@pytest.mark.parametrize(
    "headers",
    [
        [("Cookie", "token=b; " * 5_000)], [("Set-Cookie", ",a=" * 12_000)], [("Set-Cookie", "," + " " * 32_000)],
        [("X-A", "token: a=b " * 3_000)], [("Referer", "https://x/?" + "a=token&" * 4_000)], [("X", "%2561" * 6_500)],
        [("Cookie", ";" * 32_000)], [("Cookie", "a=b;" * 8_000)], [("X-A", "https:\\/\\/token:a " * 1_600)],
        [("X-A", '[<a:"token":|<b>' * 2_000)], [("X-A", "a key==" * 4_500)],
        [("X-A", '{"card":"' + "1 " * 16_000 + '"}')], [(f"X-{n}", "a=b:token") for n in range(2_000)],
    ],
)  # fmt: skip
def test_the_work_of_headers_is_bounded(headers: list[tuple[str, str]]) -> None:
    """Some calls a byte, of 32 KB."""

    def redact() -> None:
        look = Inspection(AUTO, inspect_text)
        for name, value in bounded_headers(headers):
            redact_header(look, name.lower(), value, concerned=True)

    assert calls_of(redact) < 250_000


def test_as_many_cookies_as_a_browser_sends_are_shown() -> None:
    """Browsers keep some hundred of a site; the bound is far above."""
    value = "; ".join(f"c{n}=v{n}" for n in range(1_000))
    look = Inspection(AUTO, inspect_text)
    assert redact_header(look, "cookie", f"{value}; token=x", concerned=True) == f"{value}; token=(hidden)"


def test_an_event_says_what_was_left_out(calls: Calls) -> None:
    """Of headers and of a body; the event itself is never lost."""
    from tests.calls import build_event

    exchange = calls.exchange(
        request_headers=[("Content-Type", "application/json"), ("X-Large", "x" * MAX_HEADER_BYTES)],
        request=hostile("strings", 400_000)[0],
        response=b"[" * 1_000 + b"]" * 1_000,
    )
    event = build_event(exchange, None, calls.settings, parse_bodies=False)
    assert event is not None
    ours = event["metadata"]["moesif_otel"]
    assert ours["request_headers"] == {"left_out": "too_large", "count": 1}
    assert ours["request_body"]["left_out"] == "too_complex"
    assert event["response"]["transfer_encoding"] == "base64"


def test_an_inspection_ends() -> None:
    """After its bytes, and after its steps."""
    for spend in ((budget.MAX_INSPECTED_BYTES + 1, 1), (0, MAX_NODES + 1)):
        with pytest.raises(budget.OverBudget):
            Inspection(AUTO, inspect_text).spend(*spend)
