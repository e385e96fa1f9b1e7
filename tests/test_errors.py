"""The exception tree's module: what it says to people who lack a package."""

from __future__ import annotations

from moesif_otel.errors import install_command


def test_the_install_command_names_packages_and_no_index() -> None:
    """It works wherever moesif-otel came from: the packages of the extra, with their bounds."""
    command = install_command("tornado")
    assert command.startswith("pip install '")
    assert "'tornado>=6.0.4'" in command
    assert "moesif-otel" not in command


def test_an_unknown_extra_is_named_as_it_is() -> None:
    """From a source tree nothing is known of extras."""
    assert install_command("no-such-extra") == "pip install 'moesif-otel[no-such-extra]'"
