"""The examples without a change, with a pipeline that exists, and with a Collector: run, called, read from a sandbox."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from moesif_otel.sandbox.server import Sandbox
from tests.ports import free_port
from tests.zero_code.kit import ROOT, Program, command, environment, running, script

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = ROOT / "examples"
CALLBACK = {"MOESIF_IDENTIFY_USER": "hooks:identify_user"}


def engine_runs() -> bool:
    """Whether the package with the engine is here, and its binary finds the Python library that it is linked to."""
    try:
        import rotel
    except ImportError:
        return False
    words = [str(Path(rotel.__file__).with_name("rotel-agent")), "--help"]
    return subprocess.run(words, capture_output=True, check=False, timeout=200).returncode == 0


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Sandbox, dict[str, Any]]]:
    """Every example, as its first lines say, side by side."""
    with Sandbox() as sandbox:
        programs: dict[str, Program] = {}

        def start(name: str, folder: str, *words: str, **values: str) -> None:
            port = free_port()
            env = environment(sandbox.url, name, PORT=str(port), OTEL_BSP_SCHEDULE_DELAY="300", **values)
            programs[name] = Program([word.format(port=port) for word in words], env, port, EXAMPLES / folder)

        python = sys.executable
        start("zero-code", "zero-code", *command(python, "app.py"), **CALLBACK)
        gunicorn = command(script("gunicorn"), "--bind", "127.0.0.1:{port}", "app:app")
        start("zero-code gunicorn", "zero-code", *gunicorn, **CALLBACK)
        start("pipeline", "existing-pipeline", python, "app.py")
        start("pipeline bodies", "existing-pipeline", python, "app.py", "bodies")
        direct = ["zero-code", "zero-code gunicorn"]
        if engine_runs():
            direct.append("collector")
            port = free_port()
            env = environment(sandbox.url, "collector")
            programs["engine"] = Program(
                [python, "try_with_rotel.py", str(port)], env, port, EXAMPLES / "collector"
            )
            start("collector", "collector", python, "app.py", COLLECTOR=f"http://127.0.0.1:{port}")
        answers = {}
        with running(programs):
            for name in direct:
                answers[name] = [
                    programs[name].call(
                        "POST", "/orders", b'{"item": 7, "card": "plum 4711"}', Content_Type="application/json", X_User="mary"
                    ),
                    programs[name].call("GET", "/orders/9"),
                ]
            for name in ("pipeline", "pipeline bodies"):
                answers[name] = [programs[name].call("GET", "/items/spoon")]
            for name in direct:
                sandbox.wait_for_events(2, application_id=name)
            for name in ("pipeline", "pipeline bodies"):
                sandbox.wait_for_events(3, application_id=name)
        yield sandbox, answers


@pytest.mark.parametrize("name", ["zero-code", "zero-code gunicorn"])
def test_a_service_that_knows_nothing_of_moesif(name: str, served: Any) -> None:
    """Under its own server and under gunicorn: each call with bodies and its user."""
    sandbox, answers = served
    assert [answer[0] for answer in answers[name]] == [201, 404]
    order, missing = sorted(sandbox.events(application_id=name), key=lambda event: event["response"]["status"])
    assert order["user_id"] == "mary"
    assert order["request"]["body"] == {"item": 7, "card": "plum 4711"}
    assert order["response"]["body"] == {"number": 1}
    assert missing["response"]["body"] == {"error": "no such order"}


def test_a_pipeline_with_moesif_as_one_more_exporter(served: Any) -> None:
    """ASGI, outgoing and WSGI spans, one event each, in one trace."""
    sandbox, answers = served
    assert answers["pipeline"][0][1] == b'{"item":"spoon","left":3}'
    events = sandbox.events(application_id="pipeline")
    assert sorted((event["direction"], event["request"]["uri"].rsplit("/", 2)[1]) for event in events) == [
        ("Incoming", "items"),
        ("Incoming", "stock"),
        ("Outgoing", "stock"),
    ]
    assert len({event["trace_id"] for event in events}) == 1
    assert {event.get("user_id") for event in events} == {None, "mary"}
    assert all("body" not in event["request"] for event in events)


def test_the_same_pipeline_with_bodies(served: Any) -> None:
    """What our captures see has its body, what they do not see is an event all the same, and nothing is sent twice."""
    sandbox, _ = served
    events = sandbox.events(application_id="pipeline bodies")
    by_call = {(event["direction"], event["request"]["uri"].rsplit("/", 2)[1]): event for event in events}
    assert len(by_call) == len(events) == 3
    for call in (("Incoming", "stock"), ("Outgoing", "stock")):
        assert by_call[call]["response"]["body"] == {"item": "spoon", "left": 3}
    assert by_call["Incoming", "items"]["user_id"] == "mary"
    assert by_call["Incoming", "stock"]["company_id"] == "warehouse"


def test_a_collector_between(served: Any) -> None:
    """Through a real engine: bodies, user and masks as directly."""
    sandbox, answers = served
    if "collector" not in answers:
        pytest.skip("the engine does not run here")
    assert answers["collector"][0][0] == 201
    events = sandbox.events(application_id="collector")
    (order,) = [event for event in events if event["request"]["verb"] == "POST"]
    assert order["user_id"] == "mary"
    assert order["request"]["body"]["item"] == 7
    assert "plum" not in str(events)
    assert order["response"]["body"] == {"taken": 7}


def test_the_collector_configuration_is_yaml_that_names_every_part_it_uses() -> None:
    """No Collector runs here; what its configuration refers to is at least defined in it."""
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((EXAMPLES / "collector" / "collector.yaml").read_text())
    for pipeline in config["service"]["pipelines"].values():
        for kind, names in pipeline.items():
            assert set(names) <= set(config[kind])
    (storage,) = config["service"]["extensions"]
    assert config["exporters"]["otlphttp/moesif"]["sending_queue"]["storage"] == storage

