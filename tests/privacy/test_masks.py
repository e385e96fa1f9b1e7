"""MASK_EVENT_MODEL end to end: what it may do, and that nothing passes it by when it fails."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

import pytest
from moesifapi.models import EventModel, EventRequestModel, EventResponseModel
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanKind

from moesif_otel import MoesifMiddleware, MoesifSpanExporter
from moesif_otel.sandbox import Sandbox

from .planting import Case, Message, text_for
from .serving import send, wsgi_app, wsgi_server
from .watching import Logs, assert_absent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECRET = text_for("what only the mask knows of")


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


def _case() -> Case:
    body = json.dumps({"pet": SECRET, "note": "kept"}).encode()
    message = Message([("Content-Type", "application/json")], body)
    return Case("masked", request=message, response=message)


def _served(sandbox: Sandbox, mask: Any, **options: Any) -> MoesifMiddleware:
    cases = [_case()]
    settings = {"APPLICATION_ID": "masks", "BASE_URI": sandbox.url, "MASK_EVENT_MODEL": mask, **options}
    middleware = MoesifMiddleware(wsgi_app(cases), settings)
    with wsgi_server(middleware) as port:
        send(port, cases[0])
    return middleware


def test_the_documented_mask(sandbox: Sandbox) -> None:
    """Parsed bodies, an absent one as an empty dict, and whatever it changes is what is sent."""
    seen: list[Any] = []

    def mask(event: Any) -> Any:
        seen.append((type(event.request.body), type(event.response.body), threading.current_thread().name))
        if "pet" in event.request.body:
            event.request.body["pet"] = None
        event.response.body["pet"] = "cat"
        event.request.headers["User-Agent"] = "masked"
        event.user_id = "somebody"
        return event

    middleware = _served(sandbox, mask)
    environ: dict[str, Any] = {"HTTP_X_CASE": "0"}
    setup_testing_defaults(environ)
    middleware(environ, lambda *_: None)
    assert middleware.force_flush(30_000)
    middleware.shutdown()
    with_body, without = sorted(sandbox.wait_for_events(2), key=lambda event: "body" in event["request"], reverse=True)
    assert with_body["request"]["body"] == {"pet": None, "note": "kept"}
    assert with_body["response"]["body"] == {"pet": "cat", "note": "kept"}
    assert (with_body["request"]["headers"]["User-Agent"], with_body["user_id"]) == ("masked", "somebody")
    assert "body" not in without["request"]
    assert_absent("the events", json.dumps(sandbox.events()), [SECRET])
    assert seen[1][0] is dict
    assert all(thread.startswith("moesif-otel") for *_, thread in seen)


def test_a_model_of_its_own(sandbox: Sandbox) -> None:
    """A mask may build the event anew; nothing of the old one is added but its ids."""

    def mask(event: Any) -> Any:
        return EventModel(
            request=EventRequestModel(time=event.request.time, uri="https://masked.example/", verb="GET", headers={}),
            response=EventResponseModel(time=event.response.time, status=200, headers={}),
        )

    middleware = _served(sandbox, mask)
    assert middleware.force_flush(30_000)
    middleware.shutdown()
    (event,) = sandbox.wait_for_events(1)
    assert event["request"]["uri"] == "https://masked.example/"
    assert_absent("the event", json.dumps(event), [SECRET])


def _raises(event: Any) -> Any:
    raise RuntimeError(f"cannot mask {event.request.body}")


def _raises_a_type_of_its_own(event: Any) -> Any:
    class Odd(Exception):
        def __str__(self) -> str:
            return repr(event.request.body)

        __repr__ = __str__

    raise Odd(event.request.body) from ValueError(event.response.body)


def _gives_a_body(event: Any) -> Any:
    return event.request.body


def _says_none(event: Any) -> Any:
    return None


def _exits(event: Any) -> Any:
    raise SystemExit(repr(event.request.body))


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (_raises, "mask_failed"),
        (_raises_a_type_of_its_own, "mask_failed"),
        (_gives_a_body, "mask_failed"),
        (_says_none, "masked_away"),
    ],
)
def test_nothing_passes_a_failing_mask(sandbox: Sandbox, tmp_path: Path, mask: Any, reason: str) -> None:
    """Not to Moesif, not to the disk, not to the log."""
    with Logs().listening() as logs:
        middleware = _served(sandbox, mask, SPOOL_DIRECTORY=str(tmp_path / "spool"), DEBUG=True)
        assert middleware.force_flush(30_000)
        middleware.shutdown()
    assert sandbox.events() == []
    assert middleware.stats()["dropped"] == {reason: 1}
    assert not list((tmp_path / "spool").rglob("*"))
    assert_absent("logs", logs.lines, [SECRET])


def test_a_hanging_mask(sandbox: Sandbox) -> None:
    """The event of a mask that does not return is dropped; the next ones are masked and sent, its late answer is not."""
    release = threading.Event()
    answered = threading.Event()
    calls: list[Any] = []

    def mask(event: Any) -> Any:
        calls.append(event)
        if len(calls) == 1:
            release.wait(30)
            answered.set()
        event.request.body = event.response.body = "masked"
        return event

    cases = [_case()]
    settings = {"APPLICATION_ID": "masks", "BASE_URI": sandbox.url, "MASK_EVENT_MODEL": mask}
    middleware = MoesifMiddleware(wsgi_app(cases), settings)
    middleware._pipeline.sink._mask._timeout_s = 1.0  # type: ignore[union-attr] # five seconds otherwise
    with Logs().listening() as logs, wsgi_server(middleware) as port:
        send(port, cases[0])
        send(port, cases[0])
        assert middleware.force_flush(30_000)
        release.set()
        assert answered.wait(30)
    middleware.shutdown()
    assert middleware.stats()["dropped"] == {"mask_failed": 1}
    (event,) = sandbox.wait_for_events(1)
    assert event["request"]["body"] == "masked"
    assert_absent("the wire and the logs", [json.dumps(sandbox.events()), *logs.lines], [SECRET])


def test_a_mask_that_ends_its_thread(sandbox: Sandbox) -> None:
    """`sys.exit` in a mask ends neither the process nor the pipeline, and its event is not sent."""
    with Logs().listening() as logs:
        middleware = _served(sandbox, _exits)
        assert middleware.force_flush(30_000)
    middleware.shutdown()
    assert sandbox.events() == []
    assert middleware.stats()["dropped"] == {"mask_failed": 1}
    assert_absent("logs", logs.lines, [SECRET])


def test_spans_are_masked_too(sandbox: Sandbox) -> None:
    """The exporter alone asks the mask for every span."""

    def mask(event: Any) -> Any:
        event.request.body.pop("pet")
        return event

    provider = TracerProvider(shutdown_on_exit=False)
    exporter = MoesifSpanExporter("masks", base_uri=sandbox.url, mask_event_model=mask)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    body = json.dumps({"pet": SECRET, "note": "kept"})
    attributes = {"http.request.method": "POST", "url.full": "https://x/", "http.request.body.content": body}
    provider.get_tracer("test").start_span("POST", kind=SpanKind.SERVER, attributes=attributes).end()
    assert exporter.force_flush(30_000)
    provider.shutdown()
    (event,) = sandbox.wait_for_events(1)
    assert event["request"]["body"] == {"note": "kept"}


def test_only_masked_events_are_spooled(sandbox: Sandbox, tmp_path: Path) -> None:
    """With the server down: what lies on disk is what the mask left, and that is what a later process sends."""

    def mask(event: Any) -> Any:
        event.request.body["pet"] = event.response.body["pet"] = "masked"
        return event

    options = {"SPOOL_DIRECTORY": str(tmp_path / "spool"), "EXPORT_TIMEOUT": 1}
    sandbox.behave(status=503)
    middleware = _served(sandbox, mask, **options)
    middleware.shutdown(2_000)
    assert middleware.stats()["spooled"] == 1
    files = [path.read_bytes() for path in (tmp_path / "spool").rglob("*") if path.is_file()]
    assert files
    assert_absent("the spool", files, [SECRET])
    assert any(b'"masked"' in data for data in files)
    sandbox.behave()
    later = MoesifMiddleware(lambda *_: [], {"APPLICATION_ID": "masks", "BASE_URI": sandbox.url, **options})
    later._pipeline.sink.delivery.ensure_started()
    (event,) = sandbox.wait_for_events(1)
    later.shutdown()
    assert event["request"]["body"] == {"pet": "masked", "note": "kept"}
