"""One call, whole: its bodies, what was hidden, the command that repeats it, its trace."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesif_otel.sandbox.bodies import body_of, tree_of
from moesif_otel.sandbox.detail import curl_of, detail_of, hidden_in
from moesif_otel.sandbox.query import Filters
from moesif_otel.sandbox.store import Store
from tests.sandbox.events import make_event


def view(body, content_type="", encoding=None, facts=None, size_bytes=None):
    """Give a body as the page shows it; bytes are sent as base64."""
    message = {"headers": {"Content-Type": content_type} if content_type else {}}
    if isinstance(body, bytes):
        message.update(body=base64.b64encode(body).decode(), transfer_encoding="base64")
    elif body is not None:
        message.update(body=body, transfer_encoding=encoding or "json")
    return body_of(message, facts or {}, size_bytes, known=True)


MULTIPART = (
    b'--b\r\nContent-Disposition: form-data; name="title"\r\n\r\nA cup\r\n--b\r\nContent-Disposition: form-data; '
    b'name="photo"; filename="c.png"\r\nContent-Type: image/png\r\n\r\n\x89PNG\x00\r\n--b--\r\n'
)


@pytest.mark.parametrize(
    ("body", "content_type", "kind", "words"),
    [
        ({"a": [1, None]}, "application/json", "json", "null"),
        ('"just text"', "text/plain", "text", '"just text"'),
        (b'{"a": "deep"}', "text/plain", "json", "deep"),
        (b"a=1&b=two+words&b=%C3%A9", "application/x-www-form-urlencoded", "form", "two words"),
        (MULTIPART, "multipart/form-data; boundary=b", "parts", "file c.png, image/png, 5 B"),
        (MULTIPART, "multipart/form-data", "binary", "binary data"),
        ("grün".encode(), "text/plain", "text", "grün"),
        ("grün".encode("latin-1"), "text/plain; charset=iso-8859-1", "text", "grün"),
        ("grün".encode("utf-16"), "text/plain", "text", "grün"),
        ("grü".encode()[:-1], "text/plain", "text", "gr"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 8 + b"\0\0\0\x10\0\0\0\x20" + b"\0" * 9, "image/png", "binary", "PNG image, 33 B, 16 × 32 pixels"),
        (bytes(range(256)), "application/octet-stream", "binary", "binary data, 256 B"),
        (b"", "text/plain", "binary", "0 B"),
    ],
)  # fmt: skip
def test_bodies_are_shown_as_what_they_are(body, content_type, kind, words):
    """JSON is a tree, forms are tables, text is text in its charset, the rest is told by type and size."""
    found = view(body, content_type)
    shown = [node.text for node in found.tree] + [value for row in found.rows for value in row] + [found.text]
    assert found.kind == kind
    assert any(words in text for text in shown), shown


@given(st.binary(max_size=60), st.sampled_from(["base64", "zlib", "hex", "idna", "uu", "quopri", "../x", "utf-7", "utf-16", "cp1252", "gb18030", "é"]), st.sampled_from(["text/plain", "multipart/form-data; boundary=b", "application/x-www-form-urlencoded"]))  # fmt: skip
def test_any_charset_is_survived(body, charset, media):
    """A charset that is none, or that Python has something else under, makes no fault and decompresses nothing."""
    assert view(body, f"{media}; charset={charset}").kind in {"text", "binary", "json", "form", "parts"}


@pytest.mark.parametrize(
    ("facts", "size_bytes", "words"),
    [
        ({}, None, "no body"),
        ({}, 10, "LOG_BODY is off"),
        ({"left_out": "memory_limit"}, 10, "EVENT_QUEUE_BYTES"),
        ({"left_out": "binary"}, 10, "LOG_BINARY_BODY"),
        ({"left_out": "not_read"}, 10, "did not read it"),
        ({"left_out": "a_new_reason"}, 10, "left out: a new reason"),
        ({"left_out": {"odd": 1}}, None, "no body"),
    ],
)
def test_why_a_body_is_absent(facts, size_bytes, words):
    """Every reason is said in a sentence, one that is not known here too."""
    assert words in view(None, facts=facts, size_bytes=size_bytes).note


def test_every_reason_of_the_package_has_a_sentence():
    """No reason why a body was left out is shown by its code."""
    from moesif_otel._capture.body import LeftOut
    from moesif_otel.sandbox.bodies import _REASONS

    assert {reason.value for reason in LeftOut} <= set(_REASONS)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=2), inner, max_size=5)))  # fmt: skip
def test_trees_open_and_close(value):
    """Every container that is opened is closed, however a tree is cut."""
    for most in (1_500, 3):
        depth = 0
        for node in tree_of(value, max_nodes=most):
            depth += {"open": 1, "close": -1}.get(node.step, 0)
            assert depth >= 0
        assert depth == 0


def test_trees_are_bounded():
    """Many members, long texts and great depth are cut with a remark."""
    assert len(list(tree_of(list(range(100_000))))) < 1_600
    deep = []
    for _ in range(200):
        deep = [deep]
    assert len(list(tree_of(deep))) < 100
    (leaf,) = tree_of("x" * 10_000)
    assert len(leaf.text) < 2_100


def test_hidden_places_are_found_in_every_form():
    """Headers, addresses, JSON at any depth, and text of base64 bodies."""
    event = make_event()
    event["request"].update(
        uri="http://a.test/?key=(hidden)",
        headers={"Authorization": "Bearer (hidden)"},
        body={"items": [{"password": "(hidden)"}]},
    )
    event["response"].update(body=base64.b64encode(b"a=(hidden)&b=(hidden)").decode(), transfer_encoding="base64")
    assert [(found.place, found.rule) for found in hidden_in(event)] == [
        ("address", "AUTO_HIDE_SENSITIVE"),
        ("request header Authorization", "AUTO_HIDE_SENSITIVE"),
        ("request body items[0].password", "AUTO_HIDE_SENSITIVE"),
        ("response body, 2 places", "AUTO_HIDE_SENSITIVE"),
    ]


def test_what_masks_emptied_is_found_where_the_event_names_them():
    """With DEBUG the event says which masks there are: a null or an empty header of such a name is theirs."""
    event = make_event()
    event["request"].update(headers={"X-Pin": "", "X-Other": ""}, body={"users": [{"Social_Number": None, "age": None}]})
    event["response"].update(headers={"X-Pin": ""}, body={"social-number": None})
    masks = {"REQUEST_BODY_MASKS": ["social number"], "REQUEST_HEADER_MASKS": ["x_pin"]}
    event["metadata"] = {"moesif_otel": {"masks": masks}}
    assert [(found.place, found.rule) for found in hidden_in(event)] == [
        ("request header X-Pin", "REQUEST_HEADER_MASKS"),
        ("request body users[0].Social_Number", "REQUEST_BODY_MASKS"),
    ]
    for odd in (None, [], {"REQUEST_BODY_MASKS": "text", "REQUEST_HEADER_MASKS": [1]}):
        event["metadata"] = {"moesif_otel": {"masks": odd}}
        assert hidden_in(event) == []


def run_curl(command):
    """Give the arguments that a shell would pass to curl."""
    script = "curl() { printf '%s\\0' \"$@\"; }\n" + command
    done = subprocess.run(["bash", "-c", script], capture_output=True, timeout=200, check=True)
    assert done.stderr == b""
    return done.stdout.split(b"\0")[:-1]


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@settings(max_examples=60)
@given(texts, st.text("GETPOS';$(`\\\"x \n\x1b", min_size=1, max_size=8), texts, texts)
def test_the_command_is_one_call_of_curl(path, verb, value, body):
    """Whatever an event holds, the shell passes it on as it is, to curl alone; a terminal gets no control character."""
    event = make_event()
    event["request"].update(
        verb=verb, uri=f"http://a.test/{path}", body=body, headers={"X-One": value, "bad name": "x", "@file": "x"}
    )
    command = curl_of(event)
    assert not [one for one in command if not one.isprintable() and one not in "\n " and ord(one) < 0xA0]
    arguments = [argument.decode() for argument in run_curl(command)]
    assert arguments[0] == "--globoff"
    assert f"http://a.test/{path}" in arguments
    assert arguments[arguments.index("--header") + 1] == f"X-One: {value}"
    assert "@file: x" not in arguments
    assert arguments[-2:] == ["--data-raw", body]


def test_a_body_that_no_command_can_hold_is_a_file():
    """Binary and very long bodies are named, not quoted."""
    for body in (base64.b64encode(b"\0\xff").decode(), base64.b64encode(b"x" * 60_000).decode()):
        event = make_event()
        event["request"].update(verb="POST", body=body, transfer_encoding="base64")
        assert curl_of(event).endswith("--data-binary @body.bin")


def test_a_trace_whose_ids_lie_ends():
    """Parents in a circle, and a call that is its own parent, are drawn once each."""
    store = Store()
    try:
        events = []
        for span, parent in (("a", "b"), ("b", "a"), ("c", "c"), ("d", "zzz")):
            event = make_event(trace_id="t", span={"id": span, "parent_id": parent}, direction="Incoming")
            events.append((event, json.dumps(event).encode()))
        store.add_events("app", events, "events")
        found = detail_of(store, store.events()[0], Filters())
        assert sorted(span.sequence for span in found.trace.spans) == [1, 2, 3, 4]
    finally:
        store.close()
