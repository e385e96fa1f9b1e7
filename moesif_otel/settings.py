"""Every option of moesif_otel, as one frozen and validated value.

Every way in reads its options here: `Settings.of` takes a dict, keywords or nothing, and reads each option that is
absent from its environment variable. No message shows the application id, or the credentials or query of an address.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final
from urllib.parse import urlsplit

from moesif_otel._guard import get_logger
from moesif_otel.errors import MoesifConfigError

__all__ = [
    "OPTIONS",
    "TORNADO_BATCH_SIZE",
    "ImportedCallback",
    "Option",
    "Settings",
    "nearest",
    "show_debug_log",
    "unknown_variables",
    "variable_of",
    "warn_of_unknown",
]

_logger: Final = get_logger(__name__)

TORNADO_BATCH_SIZE: Final = 25  # the default that moesiftornado documents

_MIB: Final = 1024 * 1024
_SERVER_BODY_LIMIT_BYTES: Final = 450_000  # Moesif truncates a body there (API documentation, "limits")
_SECRET: Final = frozenset({"APPLICATION_ID"})
# The longer prefix first: `opentelemetry-instrument --moesif_…` sets it, and what is on the command line counts.
_PREFIXES: Final = ("OTEL_MOESIF_", "MOESIF_")
_OLD_NAMES: Final = {"LOCAL_MOESIF_BASEURL": "BASE_URI", "DISABLE_TRANSACTION_ID": "DISABLED_TRANSACTION_ID"}
# Options of the packages we replace that have no meaning here, taken without a word.
_FORGOTTEN: Final = frozenset({"LOCAL_DEBUG"})
# Options that hide data and are carried out where an event is made, by the exporter.
_HIDING_FIELDS: Final = (
    *("mask_event_model", "auto_hide_sensitive", "log_binary_body", "authorization_header_name"),
    *("request_body_masks", "response_body_masks", "request_header_masks", "response_header_masks"),
)

# Converters: each takes a value and returns it as the option has it, or raises ValueError or TypeError.


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    if not value.strip():
        raise ValueError
    return value.strip()


# It is sent as a header field: visible ASCII and blanks are what RFC 9110, section 5.5, takes everywhere.
_VISIBLE_ASCII: Final = re.compile(r"[\x20-\x7e]+")


def _application_id(value: Any) -> str:
    text = _text(value)
    if not _VISIBLE_ASCII.fullmatch(text):
        raise ValueError
    return text


def _flag(value: Any) -> bool:
    # 0 and 1 are refused: a typing error is likelier there than intent.
    if not isinstance(value, bool):
        raise TypeError
    return value


def _flag_of_text(text: str) -> bool:
    word = text.strip().lower()
    if word not in _FLAGS:
        raise ValueError
    return _FLAGS[word]


_FLAGS: Final = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError
        if not low <= value <= high:
            raise ValueError
        return value

    return convert


def _seconds(low: float, high: float) -> Callable[[Any], float]:
    def convert(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError
        if not math.isfinite(value) or not low <= value <= high:
            raise ValueError
        return float(value)

    return convert


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in value):
        raise TypeError
    return tuple(name.strip() for name in value if name.strip())


def _some_names(value: Any) -> tuple[str, ...]:
    names = _names(value)
    if not names:
        raise ValueError
    return names


# A mask that matches nothing hides nothing, in silence: signs of a pattern or of another separator are refused.
_NO_NAME: Final = re.compile(r"[;|*,\r\n]")


def _masks(value: Any) -> tuple[str, ...]:
    names = _names(value)
    if any(map(_NO_NAME.search, names)):
        raise ValueError
    return names


_BLANK_OR_CONTROL: Final = re.compile(r"[\x00-\x20\x7f]")


def _uri(value: Any) -> str:
    text = _text(value)
    parts = urlsplit(text)
    if parts.scheme.lower() not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise ValueError
    if _BLANK_OR_CONTROL.search(text):
        raise ValueError
    _ = parts.port  # raises ValueError when it is no number
    return text.rstrip("/")


def _directory(value: Any) -> str:
    text = os.fspath(value)
    if not isinstance(text, str):
        raise TypeError
    if not text.strip() or "\0" in text:
        raise ValueError
    # Absolute, so that a later chdir of the application changes nothing.
    return os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111 - a string is what callers need


def _callback(value: Any) -> Callable[..., Any]:
    if isinstance(value, str):
        # Its module is imported when the callback is first needed, not before the application.
        return ImportedCallback(value.strip())
    if not callable(value):
        raise TypeError
    found: Callable[..., Any] = value
    return found


class ImportedCallback:
    """A callback named by its import path, imported at its first call.

    Args:
        path: `package.module:attribute`, absolute; the attribute may be dotted.

    Raises:
        ValueError: The path is relative or has another form.

    Thread-safe: importing twice gives the same function.
    """

    __slots__ = ("_function", "path")

    def __init__(self, path: str) -> None:
        module, colon, attribute = path.partition(":")
        words = [*module.split("."), *attribute.split(".")]
        if not colon or not all(word.isidentifier() for word in words):
            raise ValueError
        self.path = path
        self._function: Callable[..., Any] | None = None

    def resolve(self) -> Callable[..., Any]:
        """Import the callback.

        Raises:
            ImportError: The module or the attribute is not there; the message names the path.
            TypeError: What is there cannot be called; the message names the path.
        """
        function = self._function
        if function is None:
            module, _, attribute = self.path.partition(":")
            found: Any = importlib.import_module(module)
            for name in attribute.split("."):
                try:
                    found = getattr(found, name)
                except AttributeError:
                    raise ImportError(f"callback {self.path!r}: {name!r} is not in it") from None
            if not callable(found):
                raise TypeError(f"callback {self.path!r} is not callable")
            function = self._function = found
        return function

    def __call__(self, *arguments: Any) -> Any:
        """Call the callback, importing it at the first call."""
        return self.resolve()(*arguments)

    def __repr__(self) -> str:
        return f"ImportedCallback({self.path!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImportedCallback) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)


@dataclass(frozen=True)
class Option:
    """One option: how its value is read, and what the documentation says of it.

    Attributes:
        name: Its name in upper case.
        takes: What it takes, in words for an error message.
        meaning: One sentence for the documentation.
        convert: Checks a Python value.
        of_text: Reads the text of an environment variable, before `convert`.
        protects: Whether a wrong value could send data that the user meant to keep, or send it elsewhere.
        default: Its default value; None where there is none.
    """

    name: str
    takes: str
    meaning: str
    convert: Callable[[Any], Any]
    of_text: Callable[[str], Any]
    protects: bool
    default: Any

    @property
    def field_name(self) -> str:
        """The field of `Settings`, and the keyword of `MoesifSpanExporter`."""
        return self.name.lower()

    def read(self, value: Any) -> Any:
        """Check a Python value; raises `MoesifConfigError`."""
        try:
            return self.convert(value)
        except (TypeError, ValueError, OverflowError):
            raise self._error(value) from None

    def read_text(self, variable: str, text: str) -> Any:
        """Read an environment variable's text; raises `MoesifConfigError`."""
        try:
            return self.convert(self.of_text(text))
        except (TypeError, ValueError, OverflowError):
            raise self._error(text, variable) from None

    def _error(self, value: Any, variable: str = "") -> MoesifConfigError:
        got = type(value).__name__
        if self.name not in _SECRET and isinstance(value, (str, int, float, bool)):
            got = f"{_shown(value):.100}" if isinstance(value, str) else f"{value!r:.100} ({got})"
        elif value == "":
            got = "an empty string"
        source = f" from {variable}" if variable else ""
        return MoesifConfigError(f"{self.name}: got {got}{source}, takes {self.takes}", option=self.name)


def _option(
    convert: Callable[[Any], Any],
    takes: str,
    meaning: str,
    *,
    default: Any = None,
    of_text: Callable[[str], Any] = str,
    protects: bool = False,
    required: bool = False,
) -> Any:
    metadata = {"convert": convert, "takes": takes, "meaning": meaning, "of_text": of_text, "protects": protects}
    return field(metadata=metadata) if required else field(default=default, metadata=metadata)


def _flag_option(meaning: str, *, default: bool, protects: bool = False) -> Any:
    return _option(_flag, "True or False", meaning, default=default, of_text=_flag_of_text, protects=protects)


def _integer_option(meaning: str, default: int, unit: str, low: int, high: int) -> Any:
    takes = f"a whole number of {unit} from {low} to {high}"
    return _option(_integer(low, high), takes, meaning, default=default, of_text=int)


def _seconds_option(meaning: str, default: float, low: float, high: float) -> Any:
    takes = f"a number of seconds from {low:g} to {high:g}"
    return _option(_seconds(low, high), takes, meaning, default=default, of_text=float)


def _masks_option(meaning: str) -> Any:
    takes = "a list of names, or a string of names with commas between them (names in full: no patterns)"
    return _option(_masks, takes, meaning, default=(), protects=True)


def _callback_option(meaning: str, *, protects: bool = False) -> Any:
    takes = "a callable, or as text an import path such as myapp.hooks:function"
    return _option(_callback, takes, meaning, protects=protects)


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """The options of one pipeline; each field is the option of the same name in upper case.

    Sizes are bytes, times are seconds. Made with `of`, which validates; the constructor itself does not. Thread-safe:
    a value.
    """

    application_id: str = _option(
        _application_id,
        "a string that is not empty and has visible ASCII characters only",
        "Your Moesif application id.",
        required=True,
    )
    base_uri: str = _option(
        _uri,
        "an address that begins with http:// or https://, such as https://api.moesif.net",
        "Where events go: Moesif, a secure proxy of your own, or a sandbox. `LOCAL_MOESIF_BASEURL` is its old name.",
        default="https://api.moesif.net",
        protects=True,
    )

    skip: Callable[..., Any] | None = _callback_option("Returns true for calls that are not recorded.", protects=True)
    identify_user: Callable[..., Any] | None = _callback_option("Returns the id of the user who makes the call.")
    identify_company: Callable[..., Any] | None = _callback_option("Returns the id of the user's company.")
    get_metadata: Callable[..., Any] | None = _callback_option("Returns a dict of metadata for the event.")
    get_session_token: Callable[..., Any] | None = _callback_option("Returns the session or API token of the call.")
    mask_event_model: Callable[..., Any] | None = _callback_option(
        "Takes the `EventModel` and returns it, changed as you like; `None` leaves the event out. If it raises or "
        "returns anything else, the event is dropped.",
        protects=True,
    )

    log_body: bool = _flag_option("Record request and response bodies.", default=True, protects=True)
    request_max_body_size: int = _integer_option(
        "The part of a request body that is recorded at most.", 100_000, "bytes", 0, _SERVER_BODY_LIMIT_BYTES
    )
    response_max_body_size: int = _integer_option(
        "The part of a response body that is recorded at most.", 100_000, "bytes", 0, _SERVER_BODY_LIMIT_BYTES
    )
    request_body_masks: tuple[str, ...] = _masks_option("Names whose values are removed from request bodies and URLs.")
    response_body_masks: tuple[str, ...] = _masks_option("Names whose values are removed from response bodies.")
    request_header_masks: tuple[str, ...] = _masks_option("Request headers whose values are removed.")
    response_header_masks: tuple[str, ...] = _masks_option("Response headers whose values are removed.")
    auto_hide_sensitive: bool = _flag_option(
        "Hide credentials and well-known secret fields without being told.", default=True, protects=True
    )
    log_binary_body: bool = _flag_option(
        "Record bodies that cannot be inspected (images, archives, binary formats) instead of their size and type.",
        default=False,
        protects=True,
    )

    authorization_header_name: tuple[str, ...] = _option(
        _some_names,
        "a header name, or several with commas between them",
        "Header that names the user where `IDENTIFY_USER` does not; several in order, with commas between them.",
        default=("authorization",),
    )
    authorization_user_id_field: str = _option(
        _text, "a string that is not empty", "Claim of a token that names the user.", default="sub"
    )
    api_version: str | None = _option(_text, "a string that is not empty", "Version tag of the events.")
    accept_transaction_id: bool = _flag_option(
        "Take a UUID in the request's `X-Moesif-Transaction-Id` as the event's id. Only for services behind a gateway "
        "that sets it: a client that chooses ids can evade metering.",
        default=False,
    )
    disabled_transaction_id: bool = _flag_option(
        "Do not add `X-Moesif-Transaction-Id` to responses (middleware only; nothing else adds it).", default=False
    )

    event_queue_size: int = _integer_option("Events that wait at most.", 10_000, "events", 1, 10_000_000)
    event_queue_bytes: int = _integer_option(
        "Captured bytes held at most, from first seen to delivered. Beyond it bodies are left out first, events last.",
        64 * _MIB,
        "bytes",
        _MIB,
        1024 * 1024 * _MIB,
    )
    event_worker_count: int = _integer_option("Threads that send.", 2, "threads", 1, 64)
    batch_size: int = _integer_option("Events in one batch at most (Tornado: 25).", 100, "events", 1, 10_000)
    event_batch_timeout: float = _seconds_option("An event waits for its batch at most this long.", 2.0, 0.01, 3600)
    export_timeout: float = _seconds_option("Time for one POST to Moesif.", 10.0, 0.1, 600)
    shutdown_timeout: float = _seconds_option("Delivery at exit takes at most this long.", 5.0, 0, 600)
    spool_directory: str | None = _option(
        _directory, "the path of a folder", "Folder where undelivered batches survive the process."
    )
    spool_max_bytes: int = _integer_option(
        "Size of that folder's files at most.", 50 * _MIB, "bytes", _MIB // 1024, 1024 * 1024 * _MIB
    )

    capture_outgoing_requests: bool = _flag_option("Also record calls that the service makes.", default=False)
    skip_outgoing: Callable[..., Any] | None = _callback_option("`SKIP` for outgoing calls.", protects=True)
    identify_user_outgoing: Callable[..., Any] | None = _callback_option("`IDENTIFY_USER` for outgoing calls.")
    identify_company_outgoing: Callable[..., Any] | None = _callback_option("`IDENTIFY_COMPANY` for outgoing calls.")
    get_metadata_outgoing: Callable[..., Any] | None = _callback_option("`GET_METADATA` for outgoing calls.")
    get_session_token_outgoing: Callable[..., Any] | None = _callback_option("`GET_SESSION_TOKEN` for outgoing calls.")
    log_body_outgoing: bool = _flag_option("Record bodies of outgoing calls.", default=True, protects=True)

    debug: bool = _flag_option(
        "Log one line for each event and each batch, at DEBUG of the logger `moesif_otel`.", default=False
    )

    @classmethod
    def of(
        cls,
        given: Mapping[str, Any] | Settings | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
        async_callbacks: bool = False,
    ) -> Settings:
        """Make settings from a dict or keywords, each absent option from its environment variable.

        Args:
            given: Option names, in upper or lower case, to values; None as a value means absent. A `Settings` is
                returned as it is; None reads the environment alone.
            environ: The environment to read; `os.environ` by default.
            defaults: Field names to defaults that one way in documents differently.
            async_callbacks: Whether callbacks may be coroutine functions.

        Returns:
            The validated settings; nothing of `given` is kept but the values.

        Raises:
            MoesifConfigError: A value is wrong, there is no application id, or `given` is no mapping.
        """
        if isinstance(given, Settings):
            settings = given
        else:
            values, errors = _read(given, os.environ if environ is None else environ)
            if errors:
                raise errors[0]
            settings = cls._complete({**(defaults or {}), **values})
        if not async_callbacks:
            settings._refuse_coroutine_functions()
        return settings

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any] | None, *, batch_size_default: int | None = None) -> Settings:
        """Make settings from a dict; an older name of `of`."""
        return cls.of(settings, defaults=None if batch_size_default is None else {"batch_size": batch_size_default})

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any], *, environ: Mapping[str, str] | None = None) -> Settings:
        """Make settings from keywords; an older name of `of`."""
        return cls.of(keywords, environ=environ)

    @classmethod
    def of_any(
        cls, given: Mapping[str, Any] | None = None, *, environ: Mapping[str, str] | None = None
    ) -> tuple[Settings | None, list[MoesifConfigError]]:
        """Make settings for a process that must start whatever they are.

        A wrong harmless option keeps its default. A wrong destination, or a wrong option that protects data, means that
        nothing may be captured.

        Args:
            given: As `of` takes it.
            environ: As `of` takes it.

        Returns:
            The settings, and one error for each option that is wrong. Or None when nothing may be captured, and the
            errors that are the reason.
        """
        values, errors = _read(given, os.environ if environ is None else environ)
        decisive = [error for error in errors if error.option in _PROTECTIVE]
        if not decisive:
            try:
                settings = cls._complete(values)
                settings._refuse_coroutine_functions()
            except MoesifConfigError as error:
                # An id that is there and wrong is named as that.
                decisive = [known for known in errors if known.option == error.option] or [error]
            else:
                return settings, errors
        return None, decisive

    @classmethod
    def _complete(cls, values: dict[str, Any]) -> Settings:
        if "application_id" not in values:
            raise MoesifConfigError(
                "APPLICATION_ID: got nothing, takes your Moesif application id "
                "(Moesif portal, menu at the top right, Installation or API Keys); "
                "as an environment variable MOESIF_APPLICATION_ID",
                option="APPLICATION_ID",
            )
        return cls(**values)

    def _refuse_coroutine_functions(self) -> None:
        """Refuse callbacks that nobody would await: an identity or a skip would be lost in silence."""
        for option in OPTIONS.values():
            if option.convert is not _callback:
                continue
            function = getattr(self, option.field_name)
            call = getattr(type(function), "__call__", None)  # noqa: B004 - a class may have an `async def __call__`
            if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call):
                raise MoesifConfigError(
                    f"{option.name}: got the coroutine function {_shown(function)}, takes a plain function: nothing "
                    "awaits it here. Look up what you need in the handler and pass it to moesif_otel.identify(), or "
                    "use moesif_otel.asgi.MoesifMiddleware, which awaits callbacks",
                    option=option.name,
                )

    def __repr__(self) -> str:
        """Show what differs from the defaults; no application id, no credentials, callbacks by their names."""
        return f"Settings({', '.join(f'{name.lower()}={text}' for name, text in self.changed().items())})"

    def changed(self) -> dict[str, str]:
        """Return the options that differ from their defaults, as text that may be shown; not the application id."""
        return {
            option.name: _shown(value)
            for option in OPTIONS.values()
            if option.name not in _SECRET and (value := getattr(self, option.field_name)) != option.default
        }

    @property
    def shown_address(self) -> str:
        """The address that events go to, without credentials: for messages."""
        return _without_secrets(self.base_uri)

    def with_changes(self, **changes: Any) -> Settings:
        """Return a copy with some fields changed, unchecked."""
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
                    "it out; give both the same, or leave the exporter out",
                    option=name.upper(),
                )

    @property
    def pipeline_key(self) -> tuple[str, str]:
        """What makes two exporters deliver to the same place: application id and base URI."""
        return (self.application_id, self.base_uri)


OPTIONS: Final[Mapping[str, Option]] = {
    f.name.upper(): Option(f.name.upper(), default=None if f.name == "application_id" else f.default, **f.metadata)
    for f in fields(Settings)
}
"""Every option by its name, in the order of the documentation."""

_PROTECTIVE: Final = frozenset(name for name, option in OPTIONS.items() if option.protects)


def _read(
    given: Mapping[str, Any] | None, environ: Mapping[str, str]
) -> tuple[dict[str, Any], list[MoesifConfigError]]:
    """Read options by name, and each absent one from the environment; nothing is raised but for a wrong `given`."""
    if given is not None and not isinstance(given, Mapping):
        raise MoesifConfigError(
            f"settings: got {type(given).__name__}, takes a dict of options such as {{'APPLICATION_ID': '…'}}"
        )
    values: dict[str, Any] = {}
    errors: list[MoesifConfigError] = []
    wrong: set[str] = set()
    for old in (False, True):  # a name of today counts before its old name
        for name, value in (given or {}).items():
            upper = name.upper() if isinstance(name, str) else ""
            if (upper in _OLD_NAMES) is not old:
                continue
            option = OPTIONS.get(_OLD_NAMES.get(upper, upper))
            if option is None:
                warn_of_unknown(str(name))
            elif value is not None and option.field_name not in values:
                try:
                    values[option.field_name] = option.read(value)
                except MoesifConfigError as error:
                    errors.append(error)
                    wrong.add(option.field_name)
    for option in OPTIONS.values():
        found = None if option.field_name in values or option.field_name in wrong else variable_of(option.name, environ)
        if found is not None:
            try:
                values[option.field_name] = option.read_text(*found)
            except MoesifConfigError as error:
                errors.append(error)
    for prefix, name in unknown_variables(environ):
        if prefix + name not in _told_variables:
            _told_variables.add(prefix + name)
            warn_of_unknown(name, prefix)
    return values, errors


def variable_of(name: str, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the environment variable that gives an option, and its text."""
    for one in (name, *(old for old, new in _OLD_NAMES.items() if new == name)):
        for prefix in _PREFIXES:
            text = environ.get(prefix + one)
            # The OTel specification treats an empty variable as unset.
            if text is not None and text.strip():
                return prefix + one, text
    return None


# Once a process: every pipeline reads the same environment.
_told_variables: Final[set[str]] = set()


def unknown_variables(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the prefix and name of each variable that is meant as an option of ours and is none."""
    found = []
    for variable in tuple(environ):
        prefix = next((prefix for prefix in _PREFIXES if variable.startswith(prefix)), None)
        name = variable.removeprefix(prefix or "")
        if prefix is not None and name not in OPTIONS and name not in _OLD_NAMES and name not in _FORGOTTEN:
            found.append((prefix, name))
    return found


def nearest(name: str) -> str | None:
    """Return the known option whose name is nearest, in the same case; None when none is near."""
    import difflib  # late: for wrong names only

    near = difflib.get_close_matches(name.upper(), OPTIONS, n=1)
    return None if not near else near[0].lower() if name.islower() else near[0]


def warn_of_unknown(name: str, prefix: str = "") -> None:
    """Log that an option is not known, with the nearest name that is."""
    if name.upper() in _FORGOTTEN:
        return
    near = nearest(name)
    hint = f"; did you mean {prefix}{near}?" if near else ""
    _logger.warning("moesif_otel: unknown option %.100r is ignored%s", prefix + name, hint)


# User and password of an address, also of one that is written wrongly; and all behind its path.
_USER_INFO: Final = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*:/+)?.*@", re.DOTALL)
_QUERY: Final = re.compile(r"[?#].*", re.DOTALL)


def _without_secrets(text: str) -> str:
    return _QUERY.sub("?(hidden)", _USER_INFO.sub(r"\1(hidden)@", text))


def _shown(value: Any) -> str:
    """Return a value as a message or a `repr` may have it; a callback may be a `partial` with anything in it."""
    if isinstance(value, str):
        return repr(_without_secrets(value))
    if callable(value) and not isinstance(value, ImportedCallback):
        return f"<{getattr(value, '__qualname__', type(value).__qualname__)}>"
    return repr(value)


def show_debug_log() -> None:
    """Let the debug lines of a pipeline with `DEBUG` be seen: for the moment that one starts.

    The level of our own logger is set; where no handler would show its lines, it gets one on stderr. The root logger
    is never touched.
    """
    ours = logging.getLogger("moesif_otel")
    ours.setLevel(logging.DEBUG)
    if not ours.hasHandlers():
        ours.addHandler(logging.StreamHandler())
