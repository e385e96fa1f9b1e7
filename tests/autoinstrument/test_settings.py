"""Options of the zero-code run: what is wrong is named, its default used, and nothing is raised."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SpanExportResult

from moesif_otel._autoinstrument import instrument as auto
from moesif_otel._autoinstrument.exporter import AutoSpanExporter
from moesif_otel._autoinstrument.instrument import is_switched_off, read_settings
from moesif_otel._autoinstrument.instrumentor import MoesifInstrumentor, MoesifOptions
from moesif_otel.settings import OPTIONS, ImportedCallback

ID = {"MOESIF_APPLICATION_ID": "from the environment"}


@pytest.fixture(autouse=True)
def _untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_told", set())
    for name in OPTIONS:
        monkeypatch.delenv(f"MOESIF_{name}", raising=False)
        monkeypatch.delenv(f"OTEL_MOESIF_{name}", raising=False)


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("moesif_otel")]


def test_what_a_file_says_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option from the file if it is there, else from its variable, else its default."""
    set_variables(monkeypatch, {**ID, "MOESIF_BATCH_SIZE": "9", "OTEL_MOESIF_LOG_BODY": "false"})
    found = read_settings(
        {"application_id": "from the file", "batch_size": 7, "identify_user": "hooks:user", "log_body": None},
    )
    assert found is not None
    assert (found.application_id, found.batch_size, found.log_body) == ("from the file", 7, False)
    assert found.identify_user == ImportedCallback("hooks:user")
    assert found.event_queue_size == 10_000


def test_a_wrong_variable_that_a_file_overrides_is_no_mistake(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody will use it."""
    set_variables(monkeypatch, {**ID, "MOESIF_BATCH_SIZE": "many"})
    assert read_settings({"batch_size": 7}) is not None
    assert messages(caplog) == []


def test_a_wrong_value_is_named_once_and_its_default_used(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter and the instrumentor read the same environment: one line."""
    set_variables(monkeypatch, ID)
    for _ in range(2):
        found = read_settings({"batch_timeout": 1, "batch_size": "many"})
        assert found is not None
        assert found.batch_size == 100
    (message,) = [message for message in messages(caplog) if "unknown option" not in message]
    assert "BATCH_SIZE: got 'many'" in message


@pytest.mark.parametrize("options", [{}, {"application_id": ""}, {"application_id": 7}, {"batch_size": "many"}])
def test_without_an_application_id_one_line_says_what_to_set(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever else is wrong; and the id's value is never quoted."""
    assert read_settings(options) is None
    (message,) = messages(caplog)
    assert "APPLICATION_ID" in message


@pytest.mark.parametrize(("value", "off"), [("true", True), (" TRUE ", True), ("1", False), ("", False), ("no", False)])
def test_otel_sdk_disabled_means_true_and_nothing_else(
    value: str, off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The OTel specification's booleans."""
    monkeypatch.delenv("OTEL_SDK_DISABLED", raising=False)
    assert not is_switched_off()
    monkeypatch.setenv("OTEL_SDK_DISABLED", value)
    assert is_switched_off() is off


def test_options_of_a_configuration_file_are_typed() -> None:
    """A dataclass with every option, as the package opentelemetry-configuration wants it; all may be absent."""
    assert {field.name for field in dataclasses.fields(MoesifOptions)} == {option.field_name for option in OPTIONS.values()}
    made = MoesifOptions(batch_size=7)
    assert made.batch_size == 7
    assert made.log_body is None


def test_an_unknown_option_keeps_no_other_from_working(caplog: pytest.LogCaptureFixture) -> None:
    """A warning with the nearest name."""
    made = MoesifOptions(batch_sizes=7, log_body=False)
    assert made.log_body is False
    (message,) = messages(caplog)
    assert "did you mean batch_size?" in message


def test_the_instrumentor_never_raises(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An instrumentor that raises would end all later ones."""

    def broken(_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("moesif_otel._autoinstrument.instrumentor.read_settings", broken)
    instrumentor = MoesifInstrumentor()
    instrumentor.instrument(skip_dep_check=True)
    instrumentor.uninstrument()
    assert "starting the capture" in caplog.text


def test_the_exporter_without_an_application_id_takes_spans_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """`OTEL_TRACES_EXPORTER=moesif` alone does not end the set-up of OpenTelemetry."""
    caplog.set_level(logging.ERROR)
    exporter = AutoSpanExporter()
    assert exporter.export([]) is SpanExportResult.SUCCESS
    assert exporter.force_flush(30)
    exporter.shutdown()
    assert len(messages(caplog)) == 1
