"""`moesif-otel demo`: what a person sees on a machine without a Moesif account."""

from __future__ import annotations

import re
import signal
import threading
from collections import Counter

import pytest
import requests

pytest.importorskip("moesif_otel.wsgi")

from moesif_otel.sandbox.demo import run_demo
from moesif_otel.sandbox.demo_traffic import CALLS, GOVERNED_CALL
from tests.sandbox.commands import complaints, start


def path_of(text):
    """Give a path as far as the table shows it for certain."""
    return text.partition("?")[0].partition("..")[0]


def test_once_shows_every_call_and_ends_with_0():
    """`--once` prints a row for each call that it sent, totals, no noise, and ends with status 0."""
    with start("demo", "--once", "--port", "0") as process:
        out, err = process.communicate(timeout=200)
    assert (process.returncode, complaints(err)) == (0, "")
    every = [line.split() for line in out.splitlines() if re.match(r"\d\d:\d\d:\d\d ", line)]
    rows = [(row[3], row[4], row[1], row) for row in every if row[2] == "in"]
    # Two senders deliver: what was called first need not arrive first.
    governed = [row for row in rows if row[1] == GOVERNED_CALL.path]
    calls = Counter((verb, path_of(shown)) for verb, shown, *_ in rows if shown != GOVERNED_CALL.path)
    assert calls == Counter((call.verb, path_of(call.path)) for call in CALLS)
    assert {status for _, _, status, _ in governed} == {"200", "429"}
    blocked = next(row for _, _, status, row in governed if status == "429")
    assert blocked[-2:] == ["blocked", "hidden"]
    upload = next(row for verb, shown, _, row in rows if shown == "/uploads")
    assert upload[1:5] == ["201", "in", "POST", "/uploads"]
    assert upload[7:] == ["dave-bot", "initech", "307.2", "KB", "68", "B", "cut", "hidden"]
    users = {shown: row[7] for _, shown, _, row in rows}
    assert (users["/orders/export"], users["/reports/daily"], users["/orders?status=open"]) == (
        "carol@gl..",
        "ann",
        "bob",
    )
    statuses = {status for _, _, status, _ in rows}
    assert statuses >= {"200", "201", "204", "301", "303", "400", "404", "429", "500", "502"}
    outgoing = [row[1] for row in every if row[2] == "out"]
    assert sorted(outgoing) == ["200", "200", "201", "402", "none"]
    assert f"{len(rows)} calls sent, {len(rows)} captured" in out
    assert "1 blocked by a rule" in out
    assert "5 users of 4 companies" in out


def test_once_shows_one_event_whole():
    """After the table one event is shown readably, with what was hidden and by what, and how to look further."""
    with start("demo", "--once", "--port", "0") as process:
        out, _ = process.communicate(timeout=200)
    table, _, whole = out.partition("One of these events, whole")
    assert "/orders/1001/pay" in table
    for words in (
        "Authorization: Bearer (hidden)",
        '"amount_cents": 2150',
        "request header Authorization",
        "AUTO_HIDE_SENSITIVE",
        "moesif-otel tail",
    ):
        assert words in whole, words
    # The digits of a card with what stands beside them: a port, a time or an id may hold them by chance.
    for secret in ("hunter2", "4111 1111", '"737"', "a-token-that-nobody", "a-session-that", "sk_live", "Y2Fyb2w"):
        assert secret not in out, secret


def test_live_until_it_is_ended():
    """Without `--once` captured calls appear as they arrive, on the page too; Ctrl-C ends it with totals."""
    with start("demo", "--port", "0") as process:
        url = re.search(r"http://[\d.]+:\d+", process.stdout.readline()).group(0)
        for line in process.stdout:
            if " POST " in line:
                break
        assert "/users" in requests.get(url + "/", timeout=10).text
        process.send_signal(signal.SIGINT)
        rest, err = process.stdout.read(), process.stderr.read()
        process.wait(60)
    assert (process.returncode, complaints(err)) == (0, "")
    assert re.search(r"(\d+) calls sent, \1 captured", rest)


def test_the_first_free_port_is_taken_and_nothing_stays_behind():
    """With the usual port in use the demo takes another; afterwards no thread of it is left."""
    from moesif_otel.sandbox import Sandbox

    before = set(threading.enumerate())
    lines = []
    with Sandbox() as taken:
        assert run_demo(ports=(taken.port, 0), once=True, ended=threading.Event(), say=lines.append) == 0
        assert not taken.events()
        with pytest.raises(OSError):
            run_demo(ports=(taken.port,), once=True, ended=threading.Event(), say=lines.append)
    assert set(threading.enumerate()) <= before


def test_calls_that_do_not_arrive_are_named(monkeypatch):
    """When a sent call is not among the captured ones, the demo says which and ends with status 1."""
    import moesif_otel.sandbox.demo as demo

    monkeypatch.setattr(demo, "_ARRIVAL_TIMEOUT_S", 0.1)
    monkeypatch.setattr(demo, "_RULE_TIMEOUT_S", 0.1)
    # A real loss: the application id of the demo is not one that its sandbox takes.
    real = demo.Sandbox
    monkeypatch.setattr(demo, "Sandbox", lambda port: real(port, application_ids=["another"]))
    lines = []
    assert run_demo(ports=(0,), once=True, ended=threading.Event(), say=lines.append) == 1
    assert "did not arrive: GET /users" in lines
    assert "the rule blocked nothing within 0.1 s" in lines
    assert any(" calls sent, 0 captured" in line for line in lines)
