"""Every server, every way to answer: the client gets the same bytes with and without us, and the call is recorded.

For each server two processes run the application of `apps.py`: one that never imports moesif_otel, and one whose
`MoesifMiddleware` is chosen by a header. All traffic of a server is sent once; the tests look at what came of it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from moesif_otel.sandbox.server import Sandbox
from tests.servers.cases import ANY, CASES, Run
from tests.servers.harness import (
    KINDS,
    RunningServer,
    ServerKind,
    keep_alive_request,
    normal,
    request,
    running,
    without_transaction_id,
)

APP = "tests.servers.apps:application"


@dataclass
class Seen:
    """What came of all cases on one server."""

    kind: ServerKind
    server: RunningServer  # the one with us
    reference: RunningServer
    runs: dict[tuple[str, str], Run]
    answers: dict[tuple[str, str], bytes]
    events: dict[tuple[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as running_sandbox:
        yield running_sandbox


@pytest.fixture(scope="module", params=KINDS)
def seen(request: pytest.FixtureRequest, sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kind = KINDS[request.param]
    folder = tmp_path_factory.mktemp(kind.name)
    (folder / "file.bin").write_bytes(b"\xff\xfe\n" * 100_000)
    env = {"SERVERS_BASE_URI": sandbox.url, "SERVERS_NAME": kind.name}
    with ExitStack() as stack:
        with ThreadPoolExecutor(2) as both:
            starts = both.map(lambda more: stack.enter_context(running(kind, APP, env=more)), ({}, env))
            reference, server = starts
        found = Seen(kind, server, reference, {}, {}, {})
        with ThreadPoolExecutor(3) as three:
            list(three.map(lambda variant: _run_all(found, variant, folder), ("", "on", "off")))
        for variant in ("on", "off"):
            expected = sum(key[1] == variant and not _refused(answer) for key, answer in found.answers.items())
            with suppress(TimeoutError):  # the test of the case will say what is missing
                sandbox.wait_for_events(expected, application_id=f"{kind.name}-{variant}")
            for event in sandbox.events(application_id=f"{kind.name}-{variant}"):
                name = parse_qs(urlsplit(event["request"]["uri"]).query)["case"][0]
                found.events.setdefault((name, variant), []).append(event)
        yield found


def _run_all(seen: Seen, variant: str, folder: Any) -> None:
    for name, case in CASES.items():
        if case.runs_on(seen.kind):
            run = Run(seen.server if variant else seen.reference, seen.kind, variant, folder, case)
            seen.runs[name, variant] = run
            seen.answers[name, variant] = case.drive(run)


def _refused(answer: bytes) -> bool:
    """Whether the server itself said 400: the application was not called."""
    return b" 400 " in answer.split(b"\r\n")[0]


@pytest.mark.parametrize("name", CASES)
def test_the_client_sees_the_same_bytes(seen: Seen, name: str) -> None:
    """Status line, headers in their order, framing and body are those of the bare application, but for our header."""
    if (name, "on") not in seen.answers:
        pytest.skip(f"{seen.kind.name} cannot")
    bare = normal(seen.answers[name, ""])
    wanted = CASES[name].has_client_bytes
    assert wanted is None or wanted in seen.answers[name, ""]
    assert normal(seen.answers[name, "off"]) == bare
    on, ids = without_transaction_id(normal(seen.answers[name, "on"]))
    assert on == bare
    told = {event["transaction_id"] for event in seen.events.get((name, "on"), [])}
    # An answer of the server's own (the application failed) does not tell the id; gunicorn and cheroot send the headers
    # of both `start_response` calls of an error page.
    assert set(ids) == told or (not ids and CASES[name].outcome == "error")
    assert len(ids) <= (2 if name == "error-page" else 1)


@pytest.mark.parametrize("name", CASES)
def test_the_call_is_recorded_once(seen: Seen, name: str) -> None:
    """One event a call and application id, with the status, bodies and outcome that the client and application saw."""
    if (name, "on") not in seen.answers:
        pytest.skip(f"{seen.kind.name} cannot")
    case = CASES[name]
    for variant in ("on", "off"):
        if name == "raw-bytes" and _refused(seen.answers[name, variant]):
            continue
        (event,) = seen.events[name, variant]
        assert event["request"]["verb"] == case.method
        assert event["direction"] == "Incoming"
        assert event["request"]["ip_address"] == "127.0.0.1"
        assert case.status in (ANY, event["response"]["status"])
        for side, expected in (("request", case.request_body), ("response", case.response_body)):
            if expected is not ANY:
                assert (event[side].get("body"), event[side].get("transfer_encoding")) == expected
        assert event.get("metadata", {}).get("moesif_otel", {}).get("outcome") == case.outcome
        case.check(event, seen.runs[name, variant])


def test_pipelined_requests_on_one_connection(seen: Seen, sandbox: Sandbox) -> None:
    """Two requests in one packet and a third after them are answered in order, with the same bytes."""
    if not seen.kind.keeps_alive:
        pytest.skip(f"{seen.kind.name} closes after one answer")

    def raw(variant: str) -> bytes:
        body = b'{"n": 2}'
        return (
            keep_alive_request("GET", "/head?case=p1", variant=variant)
            + keep_alive_request("POST", "/echo?case=p2", "Content-Type: application/json", body=body, variant=variant)
            + request("GET", "/generator?case=p3", variant=variant)
        )

    bare = normal(seen.reference.exchange(raw("")))
    assert b'{"n": 2}' in b"".join(bare)
    assert normal(seen.server.exchange(raw("off"))) == bare
    on, ids = without_transaction_id(normal(seen.server.exchange(raw("on"))))
    assert on == bare
    before = len(seen.events) and sum(len(found) for key, found in seen.events.items() if key[1] == "on")
    events = sandbox.wait_for_events(before + 3, application_id=f"{seen.kind.name}-on")
    assert {event["transaction_id"] for event in events} >= set(ids)
    assert len(ids) == 3
