"""The exporter behind a batch processor: spans of every HTTP instrumentation become events, in every convention."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from moesif_otel.sandbox.server import Sandbox
from tests.zero_code.kit import Program, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

CONVENTIONS = {"old": "", "stable": "http", "both": "http/dup"}
HEADERS = {
    "OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SERVER_REQUEST": "X-Mine,Authorization",
    "OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SERVER_RESPONSE": "X-Answer,Content-Type",
}
# Path to status, as both ends of the call saw it.
SERVED = {
    "by/requests?q=1": 202,
    "by/urllib3": 202,
    "by/httpx": 202,
    "by/aiohttp": 202,
    "by/nobody": 500,
    "django/echo": 201,
    "asgi/fastapi": 200,
    "tornado": 200,
}


@pytest.fixture(scope="module")
def pipelines() -> Iterator[dict[str, list[dict[str, Any]]]]:
    """The same program under each convention."""
    for module in ("aiohttp", "fastapi", "httpx", "opentelemetry.instrumentation.aiohttp_client"):
        pytest.importorskip(module)
    with Sandbox() as sandbox:
        programs = {
            name: Program(
                [sys.executable, "existing_pipeline.py"],
                environment(
                    sandbox.url,
                    name,
                    DJANGO_SETTINGS_MODULE="django_settings",
                    OTEL_SEMCONV_STABILITY_OPT_IN=opt_in,
                    **HEADERS,
                ),
            )
            for name, opt_in in CONVENTIONS.items()
        }
        found = {}
        for name, program in programs.items():
            assert program.wait() == 0, program.output
            assert "done True" in program.output
            assert "moesif_otel" not in program.output.replace("moesif_otel/", ""), program.output
            found[name] = sandbox.events(application_id=name)
            program.stop()
        yield found


def by_call(events: list[dict[str, Any]], direction: str) -> dict[str, dict[str, Any]]:
    """Events of one direction by path and query."""
    chosen = [event for event in events if event["direction"] == direction]
    found = {event["request"]["uri"].split("/", 3)[3]: event for event in chosen}
    assert len(found) == len(chosen)
    return found


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_each_http_span_is_one_event_and_no_other_span_is(convention: str, pipelines: Any) -> None:
    """Both ends of each call, with its status, linked; a span that is no call is ignored."""
    incoming = by_call(pipelines[convention], "Incoming")
    outgoing = by_call(pipelines[convention], "Outgoing")
    assert {path: event["response"]["status"] for path, event in incoming.items()} == SERVED
    refused = outgoing.pop("refused")
    assert refused.get("response") is None
    assert {path: event["response"]["status"] for path, event in outgoing.items()} == SERVED
    for path, event in incoming.items():
        assert event["trace_id"] == outgoing[path]["trace_id"]
        assert event["span"]["parent_id"] == outgoing[path]["span"]["id"]
        assert event["request"]["ip_address"] == "127.0.0.1"
        assert event["weight"] == 1


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_attributes_become_fields(convention: str, pipelines: Any) -> None:
    """Captured headers, a captured body, user, company and session, an exception; credentials are hidden."""
    incoming = by_call(pipelines[convention], "Incoming")
    event = incoming["by/urllib3"]
    assert event["request"]["verb"] == "POST"
    assert event["request"]["headers"]["X-Mine"] == "captured"
    assert "very-secret" not in str(event)
    assert event["request"]["body"] == {"from": "an instrumentation that captures bodies"}
    assert event["response"]["headers"] == {"Content-Type": "application/json", "X-Answer": "yes"}
    assert (event["user_id"], event["company_id"], event["session_token"]) == ("user of urllib3", "company 7", "session 9")
    assert incoming["by/nobody"]["metadata"]["moesif_otel"]["exceptions"] == [{"type": "LookupError", "message": "nobody"}]
    for path in SERVED.keys() - {"by/nobody"}:
        assert incoming[path]["request"]["headers"]["X-Mine"] == "captured", path


def test_the_conventions_agree(pipelines: Any) -> None:
    """Old names, stable names or both give the same events."""

    def comparable(events: list[dict[str, Any]]) -> list[Any]:
        return sorted(
            (
                event["direction"],
                event["request"]["uri"].split("/", 3)[3],
                sorted(event["request"]["headers"].items()),
                str(event.get("response", {}).get("headers")),
                event.get("user_id") or "",
            )
            for event in events
        )

    assert comparable(pipelines["old"]) == comparable(pipelines["stable"]) == comparable(pipelines["both"])
