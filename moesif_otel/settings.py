"""Every option of moesif_otel, as one frozen and validated value.

Owns: the table of options, and making a `Settings` from a mapping, from keywords or from the environment.
Threads: any; a `Settings` never changes.
Never: quotes the application id or the credentials of an address; reads the environment after construction.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from moesif_otel.errors import MoesifConfigError
from moesif_otel.options import Callback, Directory, Flag, ImportedCallback, Integer, Kind, Names, Seconds, Text, Uri

__all__ = ["OPTIONS", "TORNADO_BATCH_SIZE", "Option", "Settings"]

_logger: Final = logging.getLogger(__name__)

_MIB: Final = 1024 * 1024
_SERVER_BODY_LIMIT_BYTES: Final = 450_000  # Moesif truncates a body there (API documentation, "limits")
_BODY_BYTES: Final = Integer(0, _SERVER_BODY_LIMIT_BYTES, "bytes")
_CALLBACK: Final = Callback()
_NAMES: Final = Names()
_SECRET: Final = frozenset({"APPLICATION_ID"})
# The longer name first: `opentelemetry-instrument --moesif_…` sets it, and what is on the command line counts.
_ENVIRONMENT_PREFIXES: Final = ("OTEL_MOESIF_", "MOESIF_")
_OLD_NAMES: Final = {"LOCAL_MOESIF_BASEURL": "BASE_URI"}
# Options of the packages we replace that have no meaning here, taken without a word.
_FORGOTTEN: Final = frozenset({"LOCAL_DEBUG"})
# Fields of the options that hide data and are carried out where an event is made, by the exporter.
_HIDING_FIELDS: Final = (
    *("mask_event_model", "auto_hide_sensitive", "log_binary_body", "authorization_header_name"),
    *("request_body_masks", "response_body_masks", "request_header_masks", "response_header_masks"),
)
# User and password of a secure proxy's address, also of one that is written wrongly.
_USER_INFO: Final = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*:/+)?.*@", re.DOTALL)

TORNADO_BATCH_SIZE: Final = 25  # the default that moesiftornado documents


def _option(kind: Kind, default: Any = None) -> Any:
    return field(default=default, metadata={"kind": kind})


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """The options of one pipeline; each field is the option of the same name in upper case.

    Sizes are bytes, times are seconds. Read with `from_mapping`, `from_keywords` or `from_environment`, which
    validate; the constructor itself does not. Thread-safe: a value.
    """

    application_id: str = field(metadata={"kind": Text()})
    base_uri: str = _option(Uri(), "https://api.moesif.net")

    skip: Callable[..., Any] | None = _option(_CALLBACK)
    identify_user: Callable[..., Any] | None = _option(_CALLBACK)
    identify_company: Callable[..., Any] | None = _option(_CALLBACK)
    get_metadata: Callable[..., Any] | None = _option(_CALLBACK)
    get_session_token: Callable[..., Any] | None = _option(_CALLBACK)
    mask_event_model: Callable[..., Any] | None = _option(_CALLBACK)

    log_body: bool = _option(Flag(), default=True)
    request_max_body_size: int = _option(_BODY_BYTES, 100_000)
    response_max_body_size: int = _option(_BODY_BYTES, 100_000)
    request_body_masks: tuple[str, ...] = _option(_NAMES, ())
    response_body_masks: tuple[str, ...] = _option(_NAMES, ())
    request_header_masks: tuple[str, ...] = _option(_NAMES, ())
    response_header_masks: tuple[str, ...] = _option(_NAMES, ())
    auto_hide_sensitive: bool = _option(Flag(), default=True)
    log_binary_body: bool = _option(Flag(), default=False)

    authorization_header_name: tuple[str, ...] = _option(Names(required=True), ("authorization",))
    authorization_user_id_field: str = _option(Text(), "sub")
    api_version: str | None = _option(Text())
    disabled_transaction_id: bool = _option(Flag(), default=False)

    event_queue_size: int = _option(Integer(1, 10_000_000, "events"), 10_000)
    event_queue_bytes: int = _option(Integer(_MIB, 1024 * 1024 * _MIB, "bytes"), 64 * _MIB)
    event_worker_count: int = _option(Integer(1, 64, "threads"), 2)
    batch_size: int = _option(Integer(1, 10_000, "events"), 100)
    event_batch_timeout: float = _option(Seconds(0.01, 3600), 2.0)
    export_timeout: float = _option(Seconds(0.1, 600), 10.0)
    shutdown_timeout: float = _option(Seconds(0, 600), 5.0)
    spool_directory: str | None = _option(Directory())
    spool_max_bytes: int = _option(Integer(_MIB // 1024, 1024 * 1024 * _MIB, "bytes"), 50 * _MIB)

    capture_outgoing_requests: bool = _option(Flag(), default=False)
    skip_outgoing: Callable[..., Any] | None = _option(_CALLBACK)
    identify_user_outgoing: Callable[..., Any] | None = _option(_CALLBACK)
    identify_company_outgoing: Callable[..., Any] | None = _option(_CALLBACK)
    get_metadata_outgoing: Callable[..., Any] | None = _option(_CALLBACK)
    get_session_token_outgoing: Callable[..., Any] | None = _option(_CALLBACK)
    log_body_outgoing: bool = _option(Flag(), default=True)

    debug: bool = _option(Flag(), default=False)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], *, batch_size_default: int | None = None) -> Settings:
        """Make settings from the dict that Moesif users know.

        Args:
            settings: Option names in upper case to values; None means the default.
            batch_size_default: Default of `BATCH_SIZE` where a door documents another one.

        Returns:
            The validated settings; nothing of `settings` is kept but the values.

        Raises:
            MoesifConfigError: A value is wrong, `APPLICATION_ID` is missing or empty, or `settings` is no mapping.
        """
        if not isinstance(settings, Mapping):
            raise MoesifConfigError(
                f"settings: got {type(settings).__name__}, takes a dict of options such as {{'APPLICATION_ID': '…'}}"
            )
        values: dict[str, Any] = {}
        if batch_size_default is not None:
            values["batch_size"] = batch_size_default
        for name, value in settings.items():
            option = OPTIONS.get(_OLD_NAMES.get(name, name)) if isinstance(name, str) else None
            if option is None:
                _warn_of_unknown(name)
            elif value is not None and not (name in _OLD_NAMES and settings.get(option.name) is not None):
                values[option.field_name] = option.read(value)
        return cls._complete(values)

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any], *, environ: Mapping[str, str] | None = None) -> Settings:
        """Make settings from snake_case keywords, each absent one from its environment variable.

        Args:
            keywords: Option names in lower case to values; None means absent.
            environ: The environment to read; `os.environ` by default.

        Returns:
            The validated settings.

        Raises:
            MoesifConfigError: A value is wrong, or there is no application id.
        """
        values: dict[str, Any] = {}
        for option in OPTIONS.values():
            text = _environment_text(option.name, os.environ if environ is None else environ)
            if keywords.get(option.field_name) is None and text is not None:
                values[option.field_name] = option.read_text(text)
        for name, value in keywords.items():
            found = OPTIONS.get(name.upper())
            if found is None:
                _warn_of_unknown(name)
            elif value is not None:
                values[found.field_name] = found.read(value)
        return cls._complete(values)

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str] | None = None
    ) -> tuple[Settings | None, list[MoesifConfigError]]:
        """Make settings from the environment alone, keeping the default of each option that is wrong.

        Args:
            environ: The environment to read; `os.environ` by default.

        Returns:
            The settings (None without an application id) and one error for each option that is wrong.
        """
        source = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        errors: list[MoesifConfigError] = []
        for option in OPTIONS.values():
            text = _environment_text(option.name, source)
            if text is None:
                continue
            try:
                values[option.field_name] = option.read_text(text)
            except MoesifConfigError as error:
                errors.append(error)
        try:
            return cls._complete(values), errors
        except MoesifConfigError as error:
            if "APPLICATION_ID" not in {str(e).partition(":")[0] for e in errors}:
                errors.append(error)
            return None, errors

    @classmethod
    def _complete(cls, values: dict[str, Any]) -> Settings:
        if "application_id" not in values:
            raise MoesifConfigError(
                "APPLICATION_ID: got nothing, takes your Moesif application id "
                "(Moesif portal, menu at the top right, Installation or API Keys); "
                "as an environment variable MOESIF_APPLICATION_ID"
            )
        if values.get("debug"):
            _show_our_debug_log()
        return cls(**values)

    def __repr__(self) -> str:
        """Show what differs from the defaults; no application id, no credentials, callbacks by their names."""
        shown = [
            f"{each.name}={_shown(value)}"
            for each in fields(self)
            if each.name.upper() not in _SECRET and (value := getattr(self, each.name)) != each.default
        ]
        return f"Settings({', '.join(shown)})"

    def with_changes(self, **changes: Any) -> Settings:
        """Give a copy with some fields changed, unchecked."""
        return replace(self, **changes)

    def check_protects_as(self, exporters: Settings) -> None:
        """Refuse, for a processor, options that an exporter with settings of its own would not carry out.

        Raises:
            MoesifConfigError: An option that hides data differs.
        """
        for name in _HIDING_FIELDS:
            if getattr(self, name) != getattr(exporters, name):
                raise MoesifConfigError(
                    f"{name.upper()}: differs between the settings of the processor and of its exporter, which carries "
                    "it out; give both the same, or leave the exporter out"
                )

    @property
    def pipeline_key(self) -> tuple[str, str]:
        """What makes two exporters deliver to the same place: application id and base URI."""
        return (self.application_id, self.base_uri)


@dataclass(frozen=True)
class Option:
    """One row of the table: an option's name and kind, and reading its value with a clear error."""

    name: str
    kind: Kind

    @property
    def field_name(self) -> str:
        """The field of `Settings`, and the exporter's keyword."""
        return self.name.lower()

    def read(self, value: Any) -> Any:
        """Check a Python value; raises `MoesifConfigError`."""
        try:
            return self.kind.read(value)
        except (TypeError, ValueError, OverflowError):
            raise self._error(value) from None

    def read_text(self, text: str) -> Any:
        """Read an environment variable's text; raises `MoesifConfigError`."""
        try:
            return self.kind.read_text(text)
        except (TypeError, ValueError, OverflowError):
            raise self._error(text) from None

    def _error(self, value: Any) -> MoesifConfigError:
        got = type(value).__name__
        if self.name not in _SECRET and isinstance(value, (str, int, float, bool)):
            got = f"{_shown(value):.100}" if isinstance(value, str) else f"{value!r:.100} ({got})"
        elif value == "":
            got = "an empty string"
        return MoesifConfigError(f"{self.name}: got {got}, takes {self.kind.takes}")


OPTIONS: Final[Mapping[str, Option]] = {
    f.name.upper(): Option(f.name.upper(), f.metadata["kind"]) for f in fields(Settings)
}


def _shown(value: Any) -> str:
    """Give a value as a message or a `repr` may have it; a callback may be a `partial` with anything in it."""
    if isinstance(value, str):
        return repr(_USER_INFO.sub(r"\1(hidden)@", value))
    if callable(value) and not isinstance(value, ImportedCallback):
        return f"<{getattr(value, '__qualname__', type(value).__qualname__)}>"
    return repr(value)


def _environment_text(name: str, environ: Mapping[str, str]) -> str | None:
    for prefix in _ENVIRONMENT_PREFIXES:
        text = environ.get(prefix + name)
        # The OTel specification treats an empty variable as unset.
        if text is not None and text.strip():
            return text
    if name == "BASE_URI":
        return environ.get("MOESIF_LOCAL_MOESIF_BASEURL") or None
    return None


def _warn_of_unknown(name: object) -> None:
    if name in _FORGOTTEN:
        return
    near = difflib.get_close_matches(str(name).upper(), OPTIONS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    _logger.warning("moesif_otel: unknown option %.100r is ignored%s", name, hint)


def _show_our_debug_log() -> None:
    ours = logging.getLogger("moesif_otel")
    ours.setLevel(logging.DEBUG)
    # Asked for debug output and nowhere to show it: our own logger alone gets a handler, never the root logger.
    if not ours.hasHandlers():
        ours.addHandler(logging.StreamHandler())
