"""The page: what it shows of what arrived, and that nothing that arrived can act in the reader's browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from moesif_otel.sandbox import Sandbox
from moesif_otel.sandbox.rows import Row, route_of, size_in_words
from tests.sandbox.events import make_event

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{7*7}}</textarea>"
VIEWS = ["/", "/users", "/companies", "/subscriptions", "/actions", "/wire", "/wire?refused=1", "/rules"]


class Elements(HTMLParser):
    """Collects what elements and attributes a page has, its text, and the text of its table rows."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.rows = set(), set(), "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "tr":
            self.rows.append([])
        if tag == "td" and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


@pytest.fixture(scope="module")
def running():
    """Give one sandbox for the module."""
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(running):
    """Give that sandbox, emptied."""
    running.clear()
    running.put_rules([])
    running.put_config({})
    return running


def post(sandbox, *events, path="/v1/events/batch", application_id="app-1"):
    """Send events or profiles."""
    answer = requests.post(
        sandbox.url + path, json=events, headers={"X-Moesif-Application-Id": application_id}, timeout=10
    )
    assert answer.status_code == 201, answer.text


def page(sandbox, path="/", **params):
    """Give a page's HTML."""
    answer = requests.get(sandbox.url + path, params=params, timeout=10)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/html")
    return answer.text


def paths(text):
    """Give the paths that a page lists."""
    return [row[4] for row in Elements(text).rows if len(row) > 9]


def test_an_empty_sandbox_says_how_to_send(sandbox):
    """Before anything arrived the page says how to send the first call; every other view says what it is for."""
    text = page(sandbox)
    assert "Nothing has arrived yet" in text
    assert "MOESIF_BASE_URI=" in text
    assert "MOESIF_APPLICATION_ID=" in text
    for path, words in [("/users", "No users yet"), ("/wire", "No requests yet"), ("/rules", "No rules")]:
        assert words in page(sandbox, path)


def test_a_call_is_one_row(sandbox):
    """Status, direction, verb, path, milliseconds, user, company and sizes on the wire are shown, with a link."""
    event = make_event(user_id="ann", company_id="acme", took_ms=12, direction="Incoming")
    event["request"].update(verb="PATCH", body={"a": 1})
    event["request"]["headers"]["Content-Length"] = "17"  # blanks that JSON lost on the way
    event["response"].update(status=418, body="AAAA", transfer_encoding="base64")
    post(sandbox, event)
    text = page(sandbox)
    cells = next(row for row in Elements(text).rows if len(row) > 9)
    assert cells[1:10] == ["418", "incoming", "PATCH", "/orders?page=1", "12 ms", "ann", "acme", "17 B", "3 B"]
    sequence = re.search(r'data-sequence="(\d+)"', text).group(1)
    assert requests.get(f"{sandbox.url}/api/events/{sequence}", timeout=10).json() == event
    assert requests.get(f"{sandbox.url}/api/events/999999", timeout=10).status_code == 404
    assert "curl --globoff" in page(sandbox, f"/fragments/call/{sequence}")
    assert requests.get(f"{sandbox.url}/fragments/call/999999", timeout=10).status_code == 404


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ({"q": "HUNTER"}, ["/b"]),
        ({"verb": "post"}, ["/b"]),
        ({"status": "5xx"}, ["/c"]),
        ({"status": "none"}, ["http://out.test/d"]),
        ({"status": "4xx,503"}, ["/c", "/b"]),
        ({"user": "ann"}, ["/b", "/a"]),
        ({"company": "acme"}, ["/a"]),
        ({"direction": "outgoing"}, ["http://out.test/d"]),
        ({"application_id": "app-2"}, ["/e"]),
        ({"errors": "1"}, ["http://out.test/d", "/c", "/b"]),
        ({"route": "/a"}, ["/a"]),
        ({"trace": "ab" * 16}, ["/a"]),
        ({"marks": "blocked"}, ["/b"]),
        ({"user": "ann", "errors": "1"}, ["/b"]),
        ({"q": "nothing like it"}, []),
    ],
)
def test_filters(sandbox, filters, wanted):
    """Every filter finds what fits, alone and with others; the list, the API and the exports agree."""
    events = []
    for path, changes in [
        ("/a", {"user_id": "ann", "company_id": "acme", "trace_id": "ab" * 16}),
        ("/b", {"user_id": "ann", "blocked_by": "r1"}),
        ("/c", {}),
        ("http://out.test/d", {"direction": "Outgoing"}),
    ]:
        event = make_event(**{"direction": "Incoming", **changes})
        event["request"]["uri"] = path if path.startswith("http") else f"http://shop.test{path}"
        events.append(event)
    events[1]["request"].update(verb="POST", body="eyJ1c2VyIjogImh1bnRlcjIifQ==", transfer_encoding="base64")
    events[1]["response"]["status"] = 403
    events[2]["response"]["status"] = 503
    del events[3]["response"]
    post(sandbox, *events)
    other = make_event()
    other["request"]["uri"] = "http://shop.test/e"
    post(sandbox, other, application_id="app-2")
    shown = [path if "out" not in path else f"http://{path}" for path in paths(page(sandbox, **filters))]
    assert shown == wanted
    listed = requests.get(sandbox.url + "/api/calls", params=filters, timeout=10).json()["calls"]
    assert [row["path"] for row in listed] == wanted
    lines = requests.get(sandbox.url + "/export.ndjson", params=filters, timeout=10).text.splitlines()
    entries = requests.get(sandbox.url + "/export.har", params=filters, timeout=10).json()["log"]["entries"]
    assert len(lines) == len(entries) == len(wanted)


@pytest.mark.parametrize(
    "wrong", [{"status": "bad"}, {"direction": "up"}, {"marks": "x"}, {"before": "-1"}, {"before": "x"}]
)
def test_wrong_filters_are_named(sandbox, wrong):
    """A filter that is none is answered 400 with its name."""
    answer = requests.get(sandbox.url + "/", params=wrong, timeout=10)
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, next(iter(wrong)))


def test_pages_go_back_and_forth(sandbox):
    """A hundred calls are on a page; older and newer lead through all of them, each once."""
    events = [make_event() for _ in range(250)]
    for place, event in enumerate(events):
        event["request"]["uri"] = f"http://a.test/p{place}"
    post(sandbox, *events)
    seen, address = [], "/"
    while address:
        text = page(sandbox, address)
        seen += paths(text)
        found = re.search(r'href="(/\?[^"]*)" rel="next"', text)
        address = found and found.group(1)
    assert seen == [f"/p{place}" for place in reversed(range(250))]
    assert "250</span>" in text or "250 calls" in text
    newer = re.search(r'href="(/\?[^"]*)" rel="prev"', text).group(1)
    assert paths(page(sandbox, newer)) == [f"/p{place}" for place in reversed(range(50, 150))]


def test_what_arrived_cannot_act(sandbox):
    """Markup in bodies, headers, paths, ids, profiles, rules and refused requests stays text on every view."""
    plain = {path: Elements(page(sandbox, path)) for path in VIEWS}
    event = make_event(
        user_id=EVIL, company_id=EVIL, session_token=EVIL, blocked_by=EVIL, tags=EVIL, trace_id=EVIL, direction="Incoming",
        metadata={EVIL: EVIL, "moesif_otel": {"route": EVIL, "outcome": EVIL, EVIL: EVIL, "request_body": {"left_out": EVIL}}},
    )  # fmt: skip
    event["span"] = {"id": EVIL, "parent_id": EVIL}
    event["request"].update(verb=EVIL, uri=f"http://a.test/{EVIL}?{EVIL}", ip_address=EVIL)
    event["request"]["headers"] = {EVIL: EVIL, "Content-Type": EVIL}
    event["response"].update(body={EVIL: [EVIL, {EVIL: EVIL}]}, headers={EVIL: EVIL})
    post(sandbox, event, {**event, "transaction_id": None}, application_id="<b>app</b>")
    post(sandbox, {"user_id": EVIL, "metadata": {"name": EVIL}}, path="/v1/users/batch")
    post(sandbox, {"company_id": EVIL, "company_domain": EVIL}, path="/v1/companies/batch")
    post(sandbox, {"subscription_id": EVIL, "company_id": EVIL, "status": "active"}, path="/v1/subscriptions/batch")
    action = {"action_name": EVIL, "user_id": EVIL, "request": {"time": "2026-01-01T00:00:00", "uri": EVIL}}
    post(sandbox, action, path="/v1/actions/batch")
    requests.post(f"{sandbox.url}/v1/{EVIL}", headers={"X-Evil": "<script>alert(1)</script>"}, timeout=10)
    sandbox.put_rules(
        [
            {
                "_id": EVIL,
                "name": EVIL,
                "type": EVIL,
                "block": True,
                "regex_config": [{"conditions": [{"path": EVIL, "value": EVIL}]}],
            }
        ]
    )
    sequence = sandbox.stored_events()[-1].sequence
    for path in [
        *VIEWS,
        "/fragments/calls",
        "/fragments/overview",
        f"/fragments/call/{sequence}",
        f"/?call={sequence}",
    ]:
        answer = requests.get(sandbox.url + path, timeout=10)
        found = Elements(answer.text)
        scripts = re.findall(r"<script[^>]*>", answer.text)
        ours = r'<script (type="module" )?src="/static/(theme|app|calls|rules)\.js">'
        assert all(re.fullmatch(ours, script) for script in scripts), path
        assert not found.tags & {"img", "iframe", "object", "embed", "style"}, path
        assert not {name for name in found.attributes if name.startswith("on")}, path
        assert "style" not in found.attributes, path
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        if path in plain and path != "/":
            assert found.tags - plain[path].tags <= {
                "ul",
                "li",
                "details",
                "summary",
                "time",
                "div",
                "span",
                "em",
                "a",
                "table",
                "tbody",
                "tr",
                "th",
                "td",
                "dl",
                "dt",
                "dd",
                "b",
            }
    assert EVIL in Elements(page(sandbox, q="SCRIPT")).text
    assert EVIL not in page(sandbox, q=EVIL)


@settings(max_examples=25)
@given(st.text(), st.text(min_size=1), st.text(), st.dictionaries(st.text(), st.text(), max_size=3))
def test_any_text_is_escaped(running, user, verb, path, headers):
    """Whatever an event's values are, list and detail have only elements and attributes of the page itself."""
    running.clear()
    event = make_event(user_id=user)
    event["request"].update(verb=verb, uri=f"http://a.test/{path}", headers=headers, body=headers)
    try:
        post(running, event)
    except (AssertionError, ValueError):
        return  # a verb or an address that the API does not take, or no text at all
    sequence = running.stored_events()[-1].sequence
    found = Elements(page(running, f"/?call={sequence}"))
    assert "script" in found.tags
    assert not found.tags & {"img", "iframe", "style"}
    assert not {name for name in found.attributes if name.startswith("on")}


def test_rows_of_unusual_events():
    """A call without response, an outgoing one, a body cut short, an address that cannot be split are rows too."""
    event = make_event(direction="Outgoing", blocked_by="r1")
    del event["response"]
    row = Row.of_event(event)
    assert (row.status, row.took_ms, row.response_bytes, row.blocked, row.failed) == (None, None, None, True, True)
    assert row.path == event["request"]["uri"]
    event = make_event(metadata={"moesif_otel": {"request_body": {"size_bytes": 5_000}, "response_body": 1}})
    assert (Row.of_event(event).request_bytes, Row.of_event(event).response_bytes) == (5_000, None)
    event = make_event()
    event["request"]["uri"] = "http://[bad"
    assert Row.of_event(event).path == "http://[bad"


def test_sizes_are_those_on_the_wire():
    """The event's own word comes first, then Content-Length, then what is in the event, which is said to be a guess."""
    event = make_event()
    event["request"].update(body={"a": 1}, headers={"content-length": "12"})
    event["response"].update(body={"b": [1]}, headers={})
    row = Row.of_event(event)
    assert (row.request_bytes, row.response_bytes, row.sizes_known) == (12, 9, False)
    event["response"].update(body="AAAA", transfer_encoding="base64")
    assert (Row.of_event(event).response_bytes, Row.of_event(event).sizes_known) == (3, True)
    event = make_event()
    event["request"]["verb"] = "HEAD"
    event["response"]["headers"] = {"Content-Length": "5000"}  # of a body that is not sent
    assert Row.of_event(event).response_bytes is None


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/users/17?x=1", "/users/{id}"),
        ("/v1/users/ann", "/v1/users/ann"),
        ("/o/123e4567-e89b-12d3-a456-426614174000/items", "/o/{id}/items"),
        ("/s/4f3c2b1a9d8e7f6a5b4c", "/s/{id}"),
        ("/", "/"),
        ("", ""),
    ],
)
def test_routes_leave_ids_out(path, route):
    """Calls of one kind count as one route, where the framework did not say its own."""
    assert route_of(path) == route


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (4_100, "4.1 KB"),
        (999_970, "1.0 MB"),
        (2_500_000, "2.5 MB"),
        (3e9, "3.0 GB"),
    ],
)
def test_sizes_in_words(size, words):
    """Sizes are shown as a person reads them."""
    assert size_in_words(size) == words
    assert size is None or size_in_words(size, known=False) == f"≈{words}"
