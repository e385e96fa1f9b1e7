"""The page at `/`: it lists what arrived, and nothing that arrived can act in the reader's browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import orjson
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from moesif_otel.sandbox import Sandbox
from moesif_otel.sandbox.page import render_page
from moesif_otel.sandbox.rows import Row, size_in_words
from moesif_otel.sandbox.store import StoredEvent
from tests.sandbox.events import make_event

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


class Elements(HTMLParser):
    """Collects what elements and attributes a page has, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def sandbox():
    """Give a sandbox."""
    with Sandbox() as running:
        yield running


def post(sandbox, *events):
    """Send events."""
    answer = requests.post(
        sandbox.url + "/v1/events/batch", json=events, headers={"X-Moesif-Application-Id": "app-1"}, timeout=10
    )
    assert answer.status_code == 201


def test_an_empty_sandbox_says_how_to_send(sandbox):
    """Before anything arrived the page tells the address to send to."""
    answer = requests.get(sandbox.url + "/", timeout=10)
    assert answer.headers["content-type"].startswith("text/html")
    assert "Nothing has arrived yet" in answer.text
    assert f"MOESIF_BASE_URI={sandbox.url}" in answer.text


def test_a_call_is_one_row(sandbox):
    """Verb, path, status, milliseconds, user, company and body sizes are shown, and a link to the whole event."""
    event = make_event(user_id="ann", company_id="acme", took_ms=12)
    event["request"].update(verb="PATCH", body={"a": 1})
    event["response"].update(status=418, body="AAAA", transfer_encoding="base64")
    post(sandbox, event)
    page = requests.get(sandbox.url + "/", timeout=10).text
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert cells[1:9] == ["PATCH", "/orders?page=1", "418", "12", "ann", "acme", "7 B", "3 B"]
    link = re.search(r'href="(/api/events/\d+)"', page).group(1)
    assert requests.get(sandbox.url + link, timeout=10).json() == event
    assert requests.get(sandbox.url + "/api/events/999999", timeout=10).status_code == 404


def test_the_page_filters_and_pauses(sandbox):
    """One application's calls can be shown alone; the page refreshes itself unless told not to."""
    post(sandbox, make_event(user_id="ann"))
    assert ">ann</td>" in requests.get(sandbox.url + "/?application_id=app-1", timeout=10).text
    assert ">ann</td>" not in requests.get(sandbox.url + "/?application_id=app-2", timeout=10).text
    assert 'http-equiv="refresh" content="2"' in requests.get(sandbox.url + "/", timeout=10).text
    assert "http-equiv" not in requests.get(sandbox.url + "/?refresh=0", timeout=10).text


def test_what_arrived_cannot_act(sandbox):
    """Markup in any shown value stays text, and a browser is told to run and load nothing."""
    event = make_event(user_id=EVIL, company_id=EVIL)
    event["request"].update(verb=EVIL, uri=f"http://a.test/{EVIL}?{EVIL}")
    post(sandbox, event)
    answer = requests.get(sandbox.url + "/", params={"application_id": "app-1"}, timeout=10)
    found = Elements(answer.text)
    assert not found.tags & {"script", "img", "iframe", "link"}
    assert EVIL in found.text
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert EVIL not in requests.get(sandbox.url + "/", params={"application_id": EVIL}, timeout=10).text


@given(st.text(), st.text(min_size=1), st.text())
def test_any_text_is_escaped(user, verb, path):
    """Whatever an event's values are, the page has only the elements and attributes that it has anyway."""
    plain = Elements(_render(make_event()))
    event = make_event(user_id=user)
    event["request"].update(verb=verb, uri=f"http://a.test/{path}")
    found = Elements(_render(event))
    assert (found.tags, found.attributes) == (plain.tags, plain.attributes)


def _render(event):
    stats = {"stored": 1, "duplicates": 0, "rejected": 0, "profiles": 0}
    # What is not text in JSON (a lone surrogate) does not come through the server's checks either.
    try:
        stored = StoredEvent(1, "a", 0.0, "events", orjson.dumps(event))
    except TypeError:
        stored = StoredEvent(1, "a", 0.0, "events", orjson.dumps(make_event()))
    return render_page([stored], stats, url="http://a", application_id=None, refresh_s=2).decode()


def test_rows_of_unusual_events():
    """A call without response, an outgoing one, a body cut short, an address that cannot be split are rows too."""
    event = make_event(direction="Outgoing", blocked_by="r1")
    del event["response"]
    row = Row.of_event(event)
    assert (row.status, row.took_ms, row.response_bytes, row.blocked) == (None, None, None, True)
    assert row.path == event["request"]["uri"]
    event = make_event(metadata={"moesif_otel": {"request_body": {"size_bytes": 5_000}, "response_body": 1}})
    assert (Row.of_event(event).request_bytes, Row.of_event(event).response_bytes) == (5_000, None)
    event = make_event()
    event["request"]["uri"] = "http://[bad"
    assert Row.of_event(event).path == "http://[bad"


@pytest.mark.parametrize(
    ("size", "words"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (4_100, "4.1 KB"), (2_500_000, "2.5 MB"), (3e9, "3.0 GB")],
)
def test_sizes_in_words(size, words):
    """Sizes are shown as a person reads them."""
    assert size_in_words(size) == words
