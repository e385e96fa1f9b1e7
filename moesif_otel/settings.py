"""Every option of moesif_otel, as one frozen and validated value.

Every public entry point reads its options here: `Settings.of` takes a dict, keywords or nothing, and reads each absent
option from its environment variable. No message shows the application id, or the credentials or query of an address.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

from moesif_otel._guard import get_logger
from moesif_otel.errors import MoesifConfigError

__all__ = [
    "OPTIONS",
    "ImportedCallback",
    "Option",
    "Settings",
    "nearest",
    "unknown_variables",
    "variable_of",
    "warn_of_unknown",
]

_logger: Final = get_logger(__name__)

_MIB: Final = 1024 * 1024
_TIB: Final = _MIB * _MIB
_SERVER_BODY_LIMIT_BYTES: Final = 450_000  # Moesif truncates a body there (API documentation, "limits")
_SECRET: Final = frozenset({"APPLICATION_ID"})
# The longer prefix first: `opentelemetry-instrument --moesif_…` sets it, and the command line takes precedence.
_PREFIXES: Final = ("OTEL_MOESIF_", "MOESIF_")
_OLD_NAMES: Final = {
    "LOCAL_MOESIF_BASEURL": "BASE_URI",
    "DISABLE_TRANSACTION_ID": "DISABLED_TRANSACTION_ID",
    "LOCAL_DEBUG": "DEBUG",  # moesifdjango's and moesifpythonrequest's
}

# Converters: each takes a value and returns it in the option's type, or raises ValueError or TypeError.


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    if not value.strip():
        raise ValueError
    return value.strip()


def _application_id(value: Any) -> str:
    text = _text(value)
    # It is sent as a header field: visible ASCII and spaces are what RFC 9110, section 5.5, allows everywhere.
    if not (text.isascii() and text.isprintable()):
        raise ValueError
    return text


def _flag(value: Any) -> bool:
    # 0 and 1 are refused: a mistake is likelier than intent.
    if not isinstance(value, bool):
        raise TypeError
    return value


_FLAGS: Final = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}


def _number(kind: type[float], low: float, high: float) -> Callable[[Any], float]:
    def convert(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise TypeError
        if not low <= value <= high:  # NaN is not, either
            raise ValueError
        return kind(value)

    return convert


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError
    for name in value:
        if not isinstance(name, str):
            raise _WrongNameError(name)
    return tuple(name.strip() for name in value if name.strip())


def _header_names(value: Any) -> tuple[str, ...]:
    names = _names(value)
    if not names:
        raise ValueError
    for name in names:
        if _HEADER_NAME.fullmatch(name) is None:  # "X-Api-Key Authorization" would find no header at all
            raise _WrongNameError(name)
    return names


def _masks(value: Any) -> tuple[str, ...]:
    names = _names(value)
    # A mask that matches nothing hides nothing, and nobody notices.
    for name in names:
        if _NO_NAME.search(name):
            raise _WrongNameError(name)
    return names


class _WrongNameError(ValueError):
    """One of several names is wrong: its argument."""


_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2: a token

# Patterns, other separators, JSONPath and JSON pointers, a list that was not parsed, and names of no letter or digit.
_NO_NAME: Final = re.compile(r"""[;|*,\r\n] | ^["'\[{/] | ^\$[.\[] | ^[\W_]+$""", re.VERBOSE)


def _uri(value: Any) -> str:
    text = _text(value)
    parts = urlsplit(text)
    if parts.scheme.lower() not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise ValueError
    if re.search(r"[\x00-\x20\x7f]", text):  # a blank or control character
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


def _callback(value: Any) -> Any:
    if isinstance(value, str):
        # Its module is imported when the callback is first needed, not before the application.
        return ImportedCallback(value.strip())
    if not callable(value):
        raise TypeError
    return value


class ImportedCallback:
    """A callback named by its import path, imported at its first call. Thread-safe.

    Args:
        path: `package.module:attribute`, absolute; the attribute may be dotted. Another form is a ValueError.
    """

    def __init__(self, path: str) -> None:
        module, colon, attribute = path.partition(":")
        words = [*module.split("."), *attribute.split(".")]
        if not colon or not all(word.isidentifier() for word in words):
            raise ValueError
        self.path = path
        self._function: Callable[..., Any] | None = None

    def resolve(self) -> Callable[..., Any]:
        """Import the callback; raises ImportError or TypeError, which name the path."""
        function = self._function
        if function is None:
            module, _, attribute = self.path.partition(":")
            # Not under `LATE_IMPORTS`: it is the application's, and may wait for calls that we capture meanwhile.
            imported = importlib.import_module(module)
            try:
                found = operator.attrgetter(attribute)(imported)
            except AttributeError:
                raise ImportError(f"callback {self.path!r}: the module has no {attribute!r}") from None
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
    """One option: how its value is read, and what the documentation says about it.

    Attributes:
        name: Its name in upper case.
        takes: Words for an error message.
        meaning: A sentence or two for the documentation.
        convert: Checks and converts a Python value.
        of_text: Parses the text of an environment variable, before `convert`.
        protects: Ignoring a wrong value could send data that the user meant to keep, or send it elsewhere.
        default: None where there is none.
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
        """Its field in `Settings`, and its keyword for `MoesifSpanExporter`."""
        return self.name.lower()

    def read(self, value: Any, variable: str = "") -> Any:
        """Check and convert a Python value, or the text of an environment variable. Raises `MoesifConfigError`."""
        try:
            return self.convert(self.of_text(value) if variable else value)
        except _WrongNameError as wrong:
            raise self._error(wrong.args[0], variable) from None
        except (TypeError, ValueError, KeyError, OSError):  # OSError: a relative path in a folder that is gone
            raise self._error(value, variable) from None

    def _error(self, value: Any, variable: str) -> MoesifConfigError:
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
    default: Any = None,
    *,
    of_text: Callable[[str], Any] = str,
    protects: bool = False,
) -> Any:
    metadata = {"convert": convert, "takes": takes, "meaning": meaning, "of_text": of_text, "protects": protects}
    return field(default=default, metadata=metadata)


_text_option: Final = partial(_option, _text, "a string that is not empty")
_flag_option: Final = partial(_option, _flag, "True or False", of_text=lambda text: _FLAGS[text.strip().lower()])
_masks_option: Final = partial(
    _option,
    _masks,
    "a list of names, or a string of names separated by commas (names in full: no patterns or paths)",
    default=(),
    protects=True,
)
_callback_option: Final = partial(
    _option, _callback, "a callable, or an import path as a string, such as 'myapp.hooks:function'"
)
_Callback: TypeAlias = Callable[..., Any] | None


def _whole_option(meaning: str, default: int, unit: str, high: int, low: int = 1) -> Any:
    takes = f"a whole number of {unit} from {low} to {high}"
    return _option(_number(int, low, high), takes, meaning, default, of_text=int)


def _bytes_option(meaning: str, default: int, low: int = 0, high: int = _SERVER_BODY_LIMIT_BYTES) -> Any:
    return _whole_option(meaning, default, "bytes", high, low)


def _seconds_option(meaning: str, default: float, low: float, high: float) -> Any:
    takes = f"a number of seconds from {low:g} to {high:g}"
    return _option(_number(float, low, high), takes, meaning, default, of_text=float)


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """The options of one pipeline; each field is the option of the same name in upper case.

    Sizes are in bytes, times in seconds. Use `of`, which validates; the constructor itself does not. Immutable, and so
    thread-safe.
    """

    application_id: str = _option(
        _application_id,
        "a string that is not empty and has only visible ASCII characters",
        "Your Moesif application id.",
        MISSING,
    )
    base_uri: str = _option(
        _uri,
        "an http:// or https:// address without a query, such as https://api.moesif.net",
        "The address that events are sent to: Moesif, a secure proxy, or a sandbox. `LOCAL_MOESIF_BASEURL` is its old "
        "name.",
        "https://api.moesif.net",
        protects=True,
    )

    skip: _Callback = _callback_option("Returns true for calls that are not recorded.", protects=True)
    identify_user: _Callback = _callback_option("Returns the id of the user who makes the call.")
    identify_company: _Callback = _callback_option("Returns the id of the user's company.")
    get_metadata: _Callback = _callback_option("Returns a dict of metadata for the event.")
    get_session_token: _Callback = _callback_option("Returns the session or API token of the call.")
    mask_event_model: _Callback = _callback_option(
        "Takes the `EventModel` and returns it, changed or not. If it returns `None`, the event is not sent. If it "
        "raises, takes longer than five seconds, or returns anything else, the event is dropped and counted as "
        "`mask_failed`.",
        protects=True,
    )

    log_body: bool = _flag_option("Record request and response bodies.", True, protects=True)
    request_max_body_size: int = _bytes_option("Record at most this many bytes of a request body.", 100_000)
    response_max_body_size: int = _bytes_option("Record at most this many bytes of a response body.", 100_000)
    request_body_masks: tuple[str, ...] = _masks_option(
        "Remove the values under these names from request bodies, query strings and cookies."
    )
    response_body_masks: tuple[str, ...] = _masks_option(
        "Remove the values under these names from response bodies and cookies."
    )
    request_header_masks: tuple[str, ...] = _masks_option("Remove the values of these request headers and cookies.")
    response_header_masks: tuple[str, ...] = _masks_option("Remove the values of these response headers and cookies.")
    auto_hide_sensitive: bool = _flag_option(
        "Hide credentials, well-known secret fields, session cookies and card numbers.", True, protects=True
    )
    log_binary_body: bool = _flag_option(
        "Also send bodies that cannot be inspected (images, archives, binary formats). Otherwise only their size and "
        "type are recorded.",
        False,
        protects=True,
    )

    authorization_header_name: tuple[str, ...] = _option(
        _header_names,
        "a header name, or several separated by commas",
        "The headers that identify the user if `IDENTIFY_USER` does not. The first one that is present is used.",
        ("authorization",),
    )
    authorization_user_id_field: str = _text_option("The JWT claim that holds the user id.", "sub")
    api_version: str | None = _text_option("The version of your API, sent with events.")
    accept_transaction_id: bool = _flag_option(
        "Use a UUID in the request's `X-Moesif-Transaction-Id` as the event's id. Only for services behind a gateway "
        "that sets it: a client that can choose ids can evade metering.",
        False,
    )
    disabled_transaction_id: bool = _flag_option(
        "Do not add `X-Moesif-Transaction-Id` to responses (only the WSGI and Django middleware add it). "
        "`DISABLE_TRANSACTION_ID` is its old name.",
        False,
    )

    event_queue_size: int = _whole_option(
        "Hold at most this many events that are not delivered yet.", 10_000, "events", 10_000_000
    )
    event_queue_bytes: int = _bytes_option(
        "Hold at most this much memory for captured data, from the first byte captured until the event is delivered. "
        "Above it, bodies are left out first, then events are dropped.",
        *(64 * _MIB, _MIB, _TIB),
    )
    event_worker_count: int = _whole_option("Number of threads that send batches.", 2, "threads", 64)
    batch_size: int = _whole_option(
        "Send at most this many events in one batch. The Tornado middleware's default is 25.", 100, "events", 10_000
    )
    event_batch_timeout: float = _seconds_option("Send a batch after at most this time.", 2.0, 0.01, 3600)
    export_timeout: float = _seconds_option("Time limit for one POST to Moesif.", 10.0, 0.1, 600)
    shutdown_timeout: float = _seconds_option("Time limit for delivery when the process exits.", 5.0, 0, 600)
    spool_directory: str | None = _option(
        _directory, "the path of a directory", "Directory that keeps undelivered events when the process ends."
    )
    spool_max_bytes: int = _bytes_option(
        "Total size of the files in `SPOOL_DIRECTORY`. Above it, the oldest are deleted.", 50 * _MIB, 1024, _TIB
    )

    capture_outgoing_requests: bool = _flag_option(
        "Also record calls that the service makes with `requests`, `httpx` and `aiohttp`.", False
    )
    skip_outgoing: _Callback = _callback_option("`SKIP` for outgoing calls.", protects=True)
    identify_user_outgoing: _Callback = _callback_option("`IDENTIFY_USER` for outgoing calls.")
    identify_company_outgoing: _Callback = _callback_option("`IDENTIFY_COMPANY` for outgoing calls.")
    get_metadata_outgoing: _Callback = _callback_option("`GET_METADATA` for outgoing calls.")
    get_session_token_outgoing: _Callback = _callback_option("`GET_SESSION_TOKEN` for outgoing calls.")
    log_body_outgoing: bool = _flag_option("Record bodies of outgoing calls.", True, protects=True)

    debug: bool = _flag_option(
        "Log a line for each event and each batch, on the logger `moesif_otel` at level DEBUG, and say in "
        "`metadata.moesif_otel` of each event where user, company and session token came from, and which masks it has. "
        "`LOCAL_DEBUG` is its old name.",
        False,
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
        """Make settings from a dict or keywords; each absent option is read from its environment variable.

        Args:
            given: Option names, in upper or lower case, to values; None as a value means absent. A `Settings` is
                returned as it is; None reads the environment alone.
            environ: The environment to read; `os.environ` by default.
            defaults: Field names to defaults that differ for one entry point.
            async_callbacks: Callbacks may be coroutine functions.

        Returns:
            The validated settings; only the values of `given` are kept.

        Raises:
            MoesifConfigError: A value is wrong, there is no application id, or `given` is not a mapping.
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
    def of_any(
        cls, given: Mapping[str, Any] | None = None, *, environ: Mapping[str, str] | None = None
    ) -> tuple[Settings | None, list[MoesifConfigError]]:
        """Make settings for a process that must start even if they are wrong; takes what `of` takes.

        A harmless option with a wrong value keeps its default. If the destination, or an option that protects data, is
        wrong, nothing may be captured.

        Returns:
            The settings, and one error for each option that is wrong. Or None if nothing may be captured, and the
            errors that cause it.
        """
        values, errors = _read(given, os.environ if environ is None else environ)
        decisive = [error for error in errors if error.option in _PROTECTIVE]
        if not decisive:
            try:
                settings = cls._complete(values)
                settings._refuse_coroutine_functions()
            except MoesifConfigError as error:
                # An application id that is set but wrong is reported as wrong, not as missing.
                decisive = [known for known in errors if known.option == error.option] or [error]
            else:
                return settings, errors
        return None, decisive

    @classmethod
    def _complete(cls, values: dict[str, Any]) -> Settings:
        if "application_id" not in values:
            raise MoesifConfigError(
                "APPLICATION_ID: got nothing, takes your Moesif application id "
                "(find it in the Moesif portal: menu at the top right, Installation or API Keys); "
                "set it in the dict of options (in Django: settings.MOESIF_MIDDLEWARE), or as the environment variable "
                "MOESIF_APPLICATION_ID",
                option="APPLICATION_ID",
            )
        return cls(**values)

    def _refuse_coroutine_functions(self) -> None:
        """Refuse callbacks that nobody would await: an identity or a skip would be lost silently."""
        for option in OPTIONS.values():
            if option.convert is not _callback:
                continue
            function = getattr(self, option.field_name)
            call = getattr(type(function), "__call__", None)  # noqa: B004 - a class may have an `async def __call__`
            if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call):
                raise MoesifConfigError(
                    f"{option.name}: got the coroutine function {_shown(function)}, takes a plain function, since "
                    "nothing can await it here. Await what you need in the handler and pass it to "
                    "moesif_otel.identify(), or use moesif_otel.asgi.MoesifMiddleware, which awaits callbacks",
                    option=option.name,
                )

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{name.lower()}={text}' for name, text in self.changed().items())})"

    def changed(self) -> dict[str, str]:
        """Return the options that differ from their defaults, as text safe to log; never the application id."""
        return {
            option.name: _shown(value)
            for option in OPTIONS.values()
            if option.name not in _SECRET and (value := getattr(self, option.field_name)) != option.default
        }

    @property
    def shown_address(self) -> str:
        """The address that events are sent to, without credentials, for messages."""
        return _without_secrets(self.base_uri)

    def with_changes(self, **changes: Any) -> Settings:
        """Return a copy with some fields changed; they are not validated."""
        return replace(self, **changes)

    @property
    def pipeline_key(self) -> tuple[str, str]:
        """The destination, application id and base URI: equal for two exporters that deliver to the same place."""
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
    """Read options by name, and each absent one from the environment. Raises only if `given` is not a mapping."""
    if given is not None and not isinstance(given, Mapping):
        raise MoesifConfigError(
            f"settings: got {type(given).__name__}, takes a dict of options such as {{'APPLICATION_ID': '…'}}"
        )
    found: dict[str, tuple[Any, str]] = {}
    for old in (False, True):  # a current name takes precedence over its old name
        for name, value in (given or {}).items():
            upper = name.upper() if isinstance(name, str) else ""
            current = _OLD_NAMES.get(upper, upper)
            if current not in OPTIONS:
                if not old:
                    warn_of_unknown(str(name))
            elif (upper != current) is old and value is not None:
                found.setdefault(current, (value, ""))
    for name in OPTIONS:
        if name not in found and (set_by := variable_of(name, environ)) is not None:
            found[name] = set_by
    values: dict[str, Any] = {}
    errors: list[MoesifConfigError] = []
    for name, (value, variable) in found.items():
        try:
            values[OPTIONS[name].field_name] = OPTIONS[name].read(value, variable)
        except MoesifConfigError as error:
            errors.append(error)
    for prefix, name in unknown_variables(environ):
        if prefix + name not in _told_variables:
            _told_variables.add(prefix + name)
            warn_of_unknown(name, prefix)
    return values, errors


def variable_of(name: str, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the text that sets an option in the environment, and its variable."""
    for one in (name, *(old for old, new in _OLD_NAMES.items() if new == name)):
        for prefix in _PREFIXES:
            text = environ.get(prefix + one)
            # The OTel specification treats an empty variable as unset.
            if text is not None and text.strip():
                return text, prefix + one
    return None


# Warned about once per process: every pipeline reads the same environment.
_told_variables: Final[set[str]] = set()


def unknown_variables(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the prefix and name of each variable that looks like an option of ours but is not one."""
    known = {*OPTIONS, *_OLD_NAMES}
    return [
        (prefix, name)
        for variable in tuple(environ)
        for prefix in _PREFIXES
        if variable.startswith(prefix) and (name := variable.removeprefix(prefix)) not in known
    ]


def nearest(name: str) -> str | None:
    """Return the known option with the most similar name, in the same case; None if none is similar."""
    import difflib  # late: only for wrong names

    near = difflib.get_close_matches(name.upper(), OPTIONS, n=1)
    return None if not near else near[0].lower() if name.islower() else near[0]


def warn_of_unknown(name: str, prefix: str = "") -> None:
    """Log that an option is unknown, with the most similar known name."""
    near = nearest(name)
    hint = f"; did you mean {prefix}{near}?" if near else ""
    _logger.warning("moesif_otel: unknown option %.100r is ignored%s", prefix + name, hint)


# User and password of an address, even a malformed one; and everything after its path.
_USER_INFO: Final = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*:/+)?.*@", re.DOTALL)
_QUERY: Final = re.compile(r"[?#].*", re.DOTALL)


def _without_secrets(text: str) -> str:
    return _QUERY.sub("?(hidden)", _USER_INFO.sub(r"\1(hidden)@", text))


def _shown(value: Any) -> str:
    """Return a value as text that is safe to show; a callback may be a `partial` that holds secrets."""
    if isinstance(value, str):
        return repr(_without_secrets(value))
    if isinstance(value, ImportedCallback):
        return repr(value.path)
    if callable(value):
        name = str(getattr(value, "__qualname__", type(value).__qualname__))
        return name if name.startswith("<") else f"<{name}>"  # `<lambda>` is in brackets already
    return repr(value)
