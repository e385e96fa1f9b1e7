"""Options: what they take, what they refuse and in which words, and where they are read from."""

from __future__ import annotations

import logging
import os
import re

import pytest

from moesif_otel._guard import show_debug_log
from moesif_otel.errors import MoesifConfigError
from moesif_otel.settings import OPTIONS, ImportedCallback, Settings

REQUIRED = {"APPLICATION_ID": "the-secret-id"}


def callback(*arguments: object) -> None:
    return None


async def coroutine_callback(handler: object) -> None:
    return None


class AsyncCallable:
    async def __call__(self, app: object, environ: object) -> bool:
        return True


def test_every_option_of_the_design_has_its_default() -> None:
    """The table of options is a contract: names and defaults."""
    settings = Settings.of(REQUIRED)
    assert {name: getattr(settings, name.lower()) for name in OPTIONS if name != "APPLICATION_ID"} == {
        "ACCEPT_TRANSACTION_ID": False,
        "API_VERSION": None,
        "AUTHORIZATION_HEADER_NAME": ("authorization",),
        "AUTHORIZATION_USER_ID_FIELD": "sub",
        "AUTO_HIDE_SENSITIVE": True,
        "BASE_URI": "https://api.moesif.net",
        "BATCH_SIZE": 100,
        "CAPTURE_OUTGOING_REQUESTS": False,
        "DEBUG": False,
        "DISABLED_TRANSACTION_ID": False,
        "EVENT_BATCH_TIMEOUT": 2.0,
        "EVENT_QUEUE_BYTES": 64 * 1024 * 1024,
        "EVENT_QUEUE_SIZE": 10_000,
        "EVENT_WORKER_COUNT": 2,
        "EXPORT_TIMEOUT": 10.0,
        "GET_METADATA": None,
        "GET_METADATA_OUTGOING": None,
        "GET_SESSION_TOKEN": None,
        "GET_SESSION_TOKEN_OUTGOING": None,
        "IDENTIFY_COMPANY": None,
        "IDENTIFY_COMPANY_OUTGOING": None,
        "IDENTIFY_USER": None,
        "IDENTIFY_USER_OUTGOING": None,
        "LOG_BINARY_BODY": False,
        "LOG_BODY": True,
        "LOG_BODY_OUTGOING": True,
        "MASK_EVENT_MODEL": None,
        "REQUEST_BODY_MASKS": (),
        "REQUEST_HEADER_MASKS": (),
        "REQUEST_MAX_BODY_SIZE": 100_000,
        "RESPONSE_BODY_MASKS": (),
        "RESPONSE_HEADER_MASKS": (),
        "RESPONSE_MAX_BODY_SIZE": 100_000,
        "SHUTDOWN_TIMEOUT": 5.0,
        "SKIP": None,
        "SKIP_OUTGOING": None,
        "SPOOL_DIRECTORY": None,
        "SPOOL_MAX_BYTES": 50 * 1024 * 1024,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "APPLICATION_ID: got nothing"),
        ({"APPLICATION_ID": ""}, "APPLICATION_ID: got an empty string, takes a string that is not empty"),
        ({"APPLICATION_ID": None}, "APPLICATION_ID: got nothing"),
        ({"APPLICATION_ID": 17}, "APPLICATION_ID: got int, takes"),
        ({**REQUIRED, "LOG_BODY": "yes"}, "LOG_BODY: got 'yes', takes True or False"),
        ({**REQUIRED, "LOG_BODY": 1}, r"LOG_BODY: got 1 \(int\), takes True or False"),
        ({**REQUIRED, "BATCH_SIZE": 0}, r"BATCH_SIZE: got 0 \(int\), takes a whole number of events from 1 to"),
        ({**REQUIRED, "BATCH_SIZE": True}, "BATCH_SIZE: got True"),
        ({**REQUIRED, "EVENT_BATCH_TIMEOUT": float("nan")}, "EVENT_BATCH_TIMEOUT: got nan"),
        ({**REQUIRED, "REQUEST_MAX_BODY_SIZE": 450_001}, "REQUEST_MAX_BODY_SIZE: got 450001 .* from 0 to 450000"),
        ({**REQUIRED, "SKIP": 3}, "SKIP: got 3 .* takes a callable"),
        ({**REQUIRED, "IDENTIFY_USER": coroutine_callback}, "IDENTIFY_USER: got the coroutine function <coroutine_callback>"),
        ({**REQUIRED, "SKIP": AsyncCallable()}, "SKIP: got the coroutine function <AsyncCallable>.*moesif_otel.identify"),
        ({"APPLICATION_ID": "the-secret-id\nX-Other: 1"}, "APPLICATION_ID: got str, takes .* visible ASCII"),
        ({"APPLICATION_ID": "the-secret-id \u2014"}, "APPLICATION_ID: got str, takes .* visible ASCII"),
        ({**REQUIRED, "REQUEST_BODY_MASKS": "ssn;dob"}, "REQUEST_BODY_MASKS: got 'ssn;dob', takes .*commas.*no patterns"),
        ({**REQUIRED, "RESPONSE_BODY_MASKS": "*"}, "RESPONSE_BODY_MASKS: got '.', takes"),
        *(
            ({**REQUIRED, "REQUEST_BODY_MASKS": ["dob", mask]}, f"REQUEST_BODY_MASKS: got {re.escape(repr(mask))}, takes .*no patterns or paths")
            for mask in ("$.ssn", "$['ssn']", "/user/ssn", "'ssn'", '"ssn"', '["ssn"', '{"ssn"', "_", "-", "...")
        ),
        ({**REQUIRED, "REQUEST_HEADER_MASKS": ["a,b"]}, "REQUEST_HEADER_MASKS: got 'a,b', takes"),
        ({**REQUIRED, "BASE_URI": "http://x y"}, "BASE_URI: got 'http://x y'"),
        ({**REQUIRED, "BASE_URI": "https://proxy.example/?key=the-secret-id"}, r"BASE_URI: got 'https://proxy.example/\?\(hidden\)'"),
        ({**REQUIRED, "MASK_EVENT_MODEL": ".relative:f"}, "MASK_EVENT_MODEL: got '.relative:f', takes"),
        ({**REQUIRED, "BASE_URI": "localhost:9500"}, "BASE_URI: got 'localhost:9500', takes an http:// or https:// address"),
        ({**REQUIRED, "BASE_URI": "http://host:port"}, "BASE_URI: got 'http://host:port'"),
        ({**REQUIRED, "REQUEST_BODY_MASKS": ["a", 1]}, r"REQUEST_BODY_MASKS: got 1 \(int\), takes a list of names"),
        ({**REQUIRED, "REQUEST_BODY_MASKS": [["a"]]}, "REQUEST_BODY_MASKS: got list, takes a list of names"),
        ({**REQUIRED, "AUTHORIZATION_HEADER_NAME": ","}, "AUTHORIZATION_HEADER_NAME: got ','"),
        *(
            ({**REQUIRED, "AUTHORIZATION_HEADER_NAME": f"X-Id,{name}"}, f"AUTHORIZATION_HEADER_NAME: got '{name}', takes a header name")
            for name in ("X-Api-Key Authorization", "X-Api-Key;Authorization", "Authorization:", "Clé")
        ),
        ({**REQUIRED, "SPOOL_DIRECTORY": 3}, "SPOOL_DIRECTORY: got 3"),
        ("APPLICATION_ID", "settings: got str, takes a dict"),
    ],
)
def test_a_wrong_option_is_named_with_what_it_got_and_takes(options: object, message: str) -> None:
    """The error says which option, what it got, what it takes; it never quotes the application id."""
    with pytest.raises(MoesifConfigError, match=message) as caught:
        Settings.of(options)  # type: ignore[arg-type]
    assert "the-secret-id" not in str(caught.value)


def test_a_relative_folder_where_the_working_directory_is_gone_is_a_wrong_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no other error, which the run without code changes would not expect."""

    def gone() -> str:
        raise FileNotFoundError

    monkeypatch.setattr(os, "getcwd", gone)
    _, errors = Settings.of_any({**REQUIRED, "SPOOL_DIRECTORY": "spool"})
    assert [str(error) for error in errors] == ["SPOOL_DIRECTORY: got 'spool', takes the path of a directory"]


def test_an_unknown_option_is_a_warning_with_the_nearest_name(caplog: pytest.LogCaptureFixture) -> None:
    """A typing error does not stop the application, and is told."""
    with caplog.at_level(logging.WARNING):
        Settings.of({**REQUIRED, "LOG_BDY": True, "LOCAL_DEBUG": False})
    assert [record.getMessage() for record in caplog.records] == [
        "moesif_otel: unknown option 'LOG_BDY' is ignored; did you mean LOG_BODY?"
    ]


def test_none_means_the_default_and_the_old_name_of_the_base_uri_works() -> None:
    """`None` is what users give for «not set»; LOCAL_MOESIF_BASEURL yields to BASE_URI."""
    assert Settings.of({**REQUIRED, "BATCH_SIZE": None}).batch_size == 100
    old = {**REQUIRED, "LOCAL_MOESIF_BASEURL": "http://localhost:9500/prefix/"}
    assert Settings.of(old).base_uri == "http://localhost:9500/prefix"
    assert Settings.of({**old, "BASE_URI": "http://other"}).base_uri == "http://other"
    assert Settings.of({"BASE_URI": "http://other", **old}).base_uri == "http://other"


def test_the_application_id_is_in_no_repr() -> None:
    """Settings end up in logs and tracebacks."""
    assert "the-secret-id" not in repr(Settings.of(REQUIRED))


def test_keywords_fall_back_to_the_environment() -> None:
    """A declarative configuration gives some, the environment the rest; keywords win; empty variables are unset."""
    environ = {
        "MOESIF_APPLICATION_ID": "from-environment",
        "MOESIF_BATCH_SIZE": "7",
        "OTEL_MOESIF_LOG_BODY": "off",
        "MOESIF_API_VERSION": "",
        "MOESIF_REQUEST_BODY_MASKS": "password, token",
        "MOESIF_IDENTIFY_USER": "tests.test_settings:callback",
    }
    settings = Settings.of({"batch_size": 9, "application_id": None}, environ=environ)
    assert (settings.application_id, settings.batch_size, settings.log_body) == ("from-environment", 9, False)
    assert (settings.api_version, settings.request_body_masks) == (None, ("password", "token"))
    assert isinstance(settings.identify_user, ImportedCallback)
    assert settings.identify_user.resolve() is callback


def test_the_dict_wins_over_the_environment_in_every_way_in() -> None:
    """`MoesifMiddleware` with half of its options in the environment: what the dict has counts, None is absent."""
    environ = {"MOESIF_BASE_URI": "http://localhost:8765", "MOESIF_LOG_BODY": "no", "MOESIF_APPLICATION_ID": "an-id"}
    settings = Settings.of({"LOG_BODY": True, "APPLICATION_ID": None}, environ=environ)
    assert (settings.application_id, settings.base_uri, settings.log_body) == ("an-id", "http://localhost:8765", True)


def test_a_wrong_variable_names_itself() -> None:
    """Outside the zero-code run a wrong variable is an error, and the reader knows where to look."""
    with pytest.raises(MoesifConfigError, match="BATCH_SIZE: got 'many' from OTEL_MOESIF_BATCH_SIZE, takes") as caught:
        Settings.of(REQUIRED, environ={"OTEL_MOESIF_BATCH_SIZE": "many"})
    assert caught.value.option == "BATCH_SIZE"


def test_old_names_work_and_yield_to_those_of_today() -> None:
    """Of moesifwsgi, moesifdjango and their environment variables."""
    assert Settings.of({**REQUIRED, "DISABLE_TRANSACTION_ID": True}).disabled_transaction_id is True
    both = {"DISABLE_TRANSACTION_ID": True, "DISABLED_TRANSACTION_ID": False}
    assert Settings.of({**REQUIRED, **both}).disabled_transaction_id is False
    assert Settings.of(REQUIRED, environ={"MOESIF_LOCAL_MOESIF_BASEURL": "http://a/b"}).base_uri == "http://a/b"
    assert Settings.of({**REQUIRED, "LOCAL_DEBUG": True}).debug is True
    assert Settings.of({**REQUIRED, "LOCAL_DEBUG": True, "DEBUG": False}).debug is False


def test_the_environment_alone_keeps_defaults_of_harmless_wrong_options() -> None:
    """Zero code: the application starts whatever is set; every wrong option is named."""
    settings, errors = Settings.of_any(environ={"MOESIF_APPLICATION_ID": "a", "MOESIF_BATCH_SIZE": "many"})
    assert settings is not None
    assert settings.batch_size == 100
    assert [error.option for error in errors] == ["BATCH_SIZE"]
    settings, errors = Settings.of_any(environ={})
    assert settings is None
    assert "MOESIF_APPLICATION_ID" in str(errors[0])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("BASE_URI", "localhost:9500"),
        ("LOG_BODY", "nope"),
        ("LOG_BODY_OUTGOING", "2"),
        ("REQUEST_BODY_MASKS", "ssn;dob"),
        ("RESPONSE_HEADER_MASKS", "x-*"),
        ("REQUEST_BODY_MASKS", '["ssn", "dob"]'),
        ("RESPONSE_BODY_MASKS", "'ssn'"),
        ("AUTO_HIDE_SENSITIVE", "maybe"),
        ("LOG_BINARY_BODY", "maybe"),
        ("SKIP", "no path"),
        ("SKIP_OUTGOING", "no path"),
        ("MASK_EVENT_MODEL", ".relative:f"),
    ],
)
def test_a_wrong_destination_or_protective_option_captures_nothing(name: str, text: str) -> None:
    """Data that was meant for a proxy, or to be kept, must not go to the public address by a typing error."""
    settings, errors = Settings.of_any(
        environ={"MOESIF_APPLICATION_ID": "a", "MOESIF_BATCH_SIZE": "many", f"MOESIF_{name}": text}
    )
    assert settings is None
    assert [error.option for error in errors] == [name]


def test_an_unknown_variable_is_a_warning_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt protective option must not be silent."""
    monkeypatch.setattr("moesif_otel.settings._told_variables", set())
    environ = {"MOESIF_REQUEST_BODY_MASK": "ssn", "OTEL_MOESIF_LOG_BDY": "no", "MOESIF_LOG_BODY": "no"}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            Settings.of(REQUIRED, environ=environ)
    assert [record.getMessage() for record in caplog.records] == [
        "moesif_otel: unknown option 'MOESIF_REQUEST_BODY_MASK' is ignored; did you mean MOESIF_REQUEST_BODY_MASKS?",
        "moesif_otel: unknown option 'OTEL_MOESIF_LOG_BDY' is ignored; did you mean OTEL_MOESIF_LOG_BODY?",
    ]


def test_reading_settings_changes_no_logger() -> None:
    """Options are read by every pipeline; only one with DEBUG that starts shows its lines."""
    ours = logging.getLogger("moesif_otel")
    level, handlers = ours.level, list(ours.handlers)
    Settings.of({**REQUIRED, "DEBUG": True})
    assert (ours.level, ours.handlers) == (level, handlers)


def test_debug_gives_our_logger_a_handler_only_where_none_would_show_it(capsys: pytest.CaptureFixture[str]) -> None:
    """The root logger is untouched; our own gets a handler on stderr once, which is silent when there is another."""
    ours, root = logging.getLogger("moesif_otel"), logging.getLogger()
    level, handlers, root_handlers = ours.level, list(ours.handlers), list(root.handlers)
    try:
        root.handlers.clear()
        for _ in range(2):
            show_debug_log()
        assert len(ours.handlers) == 1
        assert root.handlers == []
        ours.warning("before")
        root.addHandler(logging.NullHandler())  # the application configures its logging later, as waitress does
        ours.warning("after")
        assert capsys.readouterr().err == "before\n"
    finally:
        ours.setLevel(level)
        ours.handlers[:] = handlers
        root.handlers[:] = root_handlers


def test_an_imported_callback_says_what_is_missing() -> None:
    """The path is named whichever part of it does not resolve."""
    for path, error in (
        ("tests.test_settings:absent", ImportError),
        ("tests.no_such_module:f", ImportError),
        ("tests.test_settings:REQUIRED", TypeError),
    ):
        with pytest.raises(error, match=path.partition(":")[0] if "no_such" in path else path):
            ImportedCallback(path)()
    for path in ("no_colon", "a:b:c", "..up:f", "a: b", ":f", "m:"):
        with pytest.raises(ValueError):
            ImportedCallback(path)


def test_odd_names_of_fields_are_masks() -> None:
    """What may be the name of a field, a form's or an attribute's, is taken; blanks between commas are not looked at."""
    names = ["user.ssn", "user[ssn]", "@type", "#text", "$ssn", "x:y", "driver's license", "Größe", "7", ""]
    assert Settings.of({**REQUIRED, "REQUEST_BODY_MASKS": names}).request_body_masks == tuple(names[:-1])
