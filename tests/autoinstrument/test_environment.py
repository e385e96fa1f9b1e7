"""Before the program starts: what OpenTelemetry's distro would choose, and is not installed, is left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from moesif_otel._autoinstrument import environment
from moesif_otel.settings import OPTIONS

ID = {"MOESIF_APPLICATION_ID": "a"}
OTEL = ["opentelemetry.distro"]


def after(environ: dict[str, str], distros: list[str] = OTEL, present: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the variables that `prepare` adds where these distros, and these signals' default exporters, are installed."""

    def entry_points(*, group: str, name: str | None = None) -> list[Any]:
        if group == "opentelemetry_distro":
            return [SimpleNamespace(value=f"{distro}:Distro") for distro in distros]
        assert name == "otlp_proto_grpc"
        return [name] if group in {f"opentelemetry_{signal}_exporter" for signal in present} else []

    left = dict(environ)
    with mock.patch.object(environment, "entry_points", entry_points):
        environment.prepare(left)
    return {name: value for name, value in left.items() if name not in environ}


def test_every_option_is_a_flag() -> None:
    """The command finds one name for each."""
    assert {f"OTEL_MOESIF_{name}" for name in OPTIONS} <= set(dir(environment))


def test_only_what_is_missing_and_not_chosen_is_left_out() -> None:
    """A signal with its exporter, or with a choice, stays as it is."""
    assert after(ID) == {f"OTEL_{name}_EXPORTER": "none" for name in ("TRACES", "METRICS", "LOGS")}
    assert after({**ID, "OTEL_TRACES_EXPORTER": "console"}, present=("logs",)) == {"OTEL_METRICS_EXPORTER": "none"}
    assert after({}, present=("logs", "metrics")) == {"OTEL_TRACES_EXPORTER": "none"}
    assert after({}, present=("logs", "metrics", "traces")) == {}


@pytest.mark.parametrize(
    ("environ", "distros"),
    [
        (ID, []),
        (ID, ["vendor.distro"]),
        (ID, [*OTEL, "vendor.distro"]),
        ({**ID, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, OTEL),
        ({**ID, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}, OTEL),
        ({**ID, "OTEL_CONFIG_FILE": "file.yaml"}, OTEL),
    ],
)
def test_whoever_has_said_something_is_left_alone(environ: dict[str, str], distros: list[str]) -> None:
    """Another distro, a protocol or a configuration file: nothing is touched."""
    assert after(environ, distros=distros) == {}


def run_command(**values: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "MOESIF_"))}
    command = Path(sys.executable).with_name("opentelemetry-instrument")
    program = "import sys; print('moesif_otel._autoinstrument.instrumentor' in sys.modules)"
    return subprocess.run(
        [str(command), sys.executable, "-c", program],
        env=environ | {"PYTHONWARNINGS": "ignore"} | values,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )


def test_the_command_with_nothing_but_an_application_id_instruments() -> None:
    """`MOESIF_APPLICATION_ID=… opentelemetry-instrument python …` starts its instrumentation whatever is installed."""
    ended = run_command(MOESIF_APPLICATION_ID="a", MOESIF_BASE_URI="http://127.0.0.1:9")
    assert "Failed to auto initialize" not in ended.stderr
    assert ended.stdout.strip() == "True"


def test_without_an_application_id_the_command_says_one_line() -> None:
    """Not fifty lines of OpenTelemetry's about an exporter that nobody asked for."""
    ended = run_command()
    (line,) = [line for line in ended.stderr.splitlines() if line.strip()]
    assert "MOESIF_APPLICATION_ID" in line
    assert ended.stdout.strip() == "True"
