"""What is logged about delivery."""

from __future__ import annotations

import logging
import socket
import ssl

from moesif_otel._delivery.outcome import BatchOutcome, PostAnswer
from moesif_otel._delivery.report import DeliveryLog, describe
from moesif_otel._delivery.stats import Stats
from tests.delivery.delivery_kit import FakeClock


def test_one_line_a_minute_of_a_kind(caplog) -> None:
    """The first of a kind at once, then one a minute with the number left out; another kind has its own minute."""
    clock = FakeClock()
    log = DeliveryLog(clock, "Moesif")
    for _ in range(150):
        log.failure("a", "it failed")
        clock.now_s += 1
    log.failure("b", "something else")
    assert [r.message for r in caplog.records] == [
        "moesif_otel: it failed",
        "moesif_otel: it failed (59 more since the last line)",
        "moesif_otel: it failed (59 more since the last line)",
        "moesif_otel: something else",
    ]


def test_descriptions_have_types_and_system_words_only() -> None:
    """A chain of exceptions is told by its types and the system's words; messages of libraries are not quoted."""
    try:
        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except OSError as inner:
            raise ValueError("planted https://user:pw@host/path") from inner
    except ValueError as exc:
        text = describe(exc)
    assert text == "ValueError < ConnectionRefusedError (Connection refused)"
    assert describe(socket.gaierror(-2, "Name or service not known")) == "gaierror (Name or service not known)"
    assert describe(ssl.SSLError("planted")) == "SSLError"
    assert describe(TimeoutError()) == "TimeoutError"


def test_endless_chain_of_causes_ends() -> None:
    """An exception that is its own cause is described."""
    exc = ValueError()
    exc.__context__ = other = KeyError()
    other.__context__ = exc
    assert describe(exc).count("<") <= 6


def ended(caplog, **stats) -> list[tuple[int, str]]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        DeliveryLog(FakeClock(), "Moesif").ended(Stats({"accepted": 9, "delivered": 1, "pending": 0, "dropped": {}, **stats}))
    return [(r.levelno, r.message) for r in caplog.records]


def test_shutdown_says_what_was_lost(caplog) -> None:
    """A line when anything was lost, none when all went well or was left out on purpose, a quiet one for the disk."""
    assert ended(caplog) == []
    assert ended(caplog, dropped={"sampled_out": 3, "masked_away": 1}) == []
    ((level, line),) = ended(caplog, dropped={"shutdown": 2, "queue_full": 5, "spooled": 1})
    assert level == logging.WARNING
    assert "queue_full 5, shutdown 2" in line
    assert "1 of 9 events were delivered to Moesif;" in line
    assert "kept on disk: 1" in line
    ((level, line),) = ended(caplog, dropped={"spooled": 4})
    assert level == logging.INFO
    assert "4 events are kept on disk" in line


def test_a_redirect_is_told_with_what_to_do(caplog) -> None:
    """An address that has moved (to https, as a rule) is the user's to change: nothing is sent to another place."""
    log = DeliveryLog(FakeClock(), "http://api.example")
    log.not_taken(PostAnswer(BatchOutcome.RETRY, 301), 5)
    (line,) = caplog.messages
    assert "http://api.example answered with status 301" in line
    assert line.endswith("5 events wait and are sent again; redirects are not followed: check BASE_URI")


def test_another_exporter_is_not_told_by_our_options(caplog) -> None:
    """What a Collector answers says nothing of APPLICATION_ID or BASE_URI."""
    log = DeliveryLog(FakeClock(), "the exporter X", "its endpoint")
    log.not_taken(PostAnswer(BatchOutcome.SUSPENDED, 401), 5)
    log.not_taken(PostAnswer(BatchOutcome.RETRY, detail="OSError"), 5)
    log.refused(5, 404)
    assert caplog.messages[0].startswith("moesif_otel: the exporter X does not accept events (status 401); until then")
    assert caplog.messages[1].startswith("moesif_otel: the exporter X did not answer (OSError): ")
    assert not any(option in line for line in caplog.messages for option in ("APPLICATION_ID", "BASE_URI"))
