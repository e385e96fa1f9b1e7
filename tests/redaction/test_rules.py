"""`events.redact`: what is hidden, what stays, and what is left out."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest

from moesif_otel._events.serialize import serialize
from moesif_otel._redaction.cards import has_card_number
from moesif_otel._redaction.names import CARD_NAMES, QUERY_NAMES, SENSITIVE_NAMES
from moesif_otel._redaction.rules import Rules, redaction_for
from moesif_otel._redaction.text import redact_text, redact_url
from tests.calls import build_event

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.calls import Calls

AUTO = Rules(auto=True)
CARD = "4111 1111 1111 1111"


def body_of(
    calls: Calls,
    data: bytes,
    content_type: str | None,
    *,
    kept: int | None = None,
    coding: str | None = None,
    **options: Any,
) -> Any:
    """The request body as it leaves: JSON, or the bytes behind base64, or what our metadata says of it."""
    headers = [("Content-Type", content_type)] if content_type else []
    headers += [("Content-Encoding", coding)] if coding else []
    exchange = calls.exchange(request=data, request_kept=kept, request_headers=headers)
    event = build_event(exchange, None, calls.options(**options), parse_bodies=False)
    assert event is not None
    found = json.loads(serialize(event))
    if "body" not in found["request"]:
        return found["metadata"]["moesif_otel"]["request_body"]["left_out"]
    body = found["request"]["body"]
    return base64.b64decode(body) if found["request"]["transfer_encoding"] == "base64" else body


@pytest.mark.parametrize("name", [*SENSITIVE_NAMES, *CARD_NAMES])
def test_the_quick_scan_sees_every_name(name: str) -> None:
    """In every spelling: were one missed, its value would pass unseen."""
    for spelling in (
        name,
        name.upper(),
        name.title(),
        name.replace("_", "-"),
        name.replace("_", ""),
        name.replace("_", " "),
    ):
        assert AUTO.may_concern(b'{"%s": 1}' % spelling.encode())
        assert AUTO.may_concern(f'{{"{spelling}": 1}}'.encode("utf-16"))
        assert AUTO.may_concern(b"a=b&%s=1" % spelling.encode())


@pytest.mark.parametrize("name", QUERY_NAMES)
@pytest.mark.parametrize("spelling", [str.lower, str.upper, str.title])
def test_the_quick_scan_sees_every_name_of_a_query(name: str, spelling: Callable[[str], str]) -> None:
    """Also in a URL within another one, where the equals sign is escaped."""
    for text in (spelling(name), spelling(name.replace("_", "-")), spelling(name.replace("_", ""))):
        assert AUTO.may_concern(b"https://x/?%s=1" % text.encode())
        assert AUTO.may_concern(b"next=https%%3A//x/%%3F%s%%3D1" % text.encode())


@pytest.mark.parametrize(
    "blank", ["", "_", "-", " ", "+", "%20", "%2B", "%5F", "%C2%A0", "\u00a0", "\\u00A0", "\\u0020", "\\t", "&nbsp;"]
)
def test_the_quick_scan_sees_a_mask_however_its_blanks_are_written(blank: str) -> None:
    """As URLs, JSON and HTML write them: case, `_`, `-` and spaces do not count."""
    rules = Rules(["tax number"], auto=False)
    assert rules.may_concern_text(f"a Tax{blank}Number=1")
    assert rules.may_concern_text(json.dumps({"a": f"Tax{blank}Number=1"}))


@pytest.mark.parametrize("text", [b'{"id": 1, "name": "x", "created_at": "y"}', b"<p>hello</p>", b"a=b&c=d", b""])
def test_the_quick_scan_lets_plain_texts_pass(text: bytes) -> None:
    """Nothing to look for, nothing to parse."""
    assert not AUTO.may_concern(text)


@pytest.mark.parametrize(
    "name",
    [
        "max_tokens",
        "token_count",
        "next_page_token",
        "tokens",
        "passenger",
        "secretary",
        "compass",
        "keyboard",
        "sessions",
    ],
)
def test_other_names_stay(calls: Calls, name: str) -> None:
    """The list is exact."""
    assert body_of(calls, json.dumps({name: "kept"}).encode(), "application/json") == {name: "kept"}


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "PassWord",
        "client-secret",
        "clientSecret",
        "API_KEY",
        "user.password",
        "user[password]",
        "@password",
    ],
)
@pytest.mark.parametrize("value", ["x", 5, 1.5, ""])
def test_values_of_any_type_are_hidden(calls: Calls, name: str, value: Any) -> None:
    """In any spelling, at any depth."""
    data = json.dumps({"a": [{"b": {name: value}}], "kept": 1}).encode()
    assert body_of(calls, data, "application/json") == {"a": [{"b": {name: "(hidden)"}}], "kept": 1}


def test_flags_and_nulls_are_no_secrets(calls: Calls) -> None:
    """`{"password": true}` says that there is one."""
    value = {"password": True, "token": None}
    assert body_of(calls, json.dumps(value).encode(), "application/json") == value


def test_masks_remove_values(calls: Calls) -> None:
    """Any case, any depth, any type, flags too; a mask goes before the list."""
    found = body_of(
        calls,
        b'{"SSN": 1, "a": {"ssn": [1]}, "list": [{"Ssn": true}], "password": "x", "other": 2}',
        "application/json",
        REQUEST_BODY_MASKS="ssn,password",
        RESPONSE_BODY_MASKS=["other"],
    )
    assert found == {"SSN": None, "a": {"ssn": None}, "list": [{"Ssn": None}], "password": None, "other": 2}


def test_off_sends_everything(calls: Calls) -> None:
    """`AUTO_HIDE_SENSITIVE: False` restores what moesifwsgi sends."""
    exchange = calls.exchange(
        url="https://u:p@x/?token=t",
        request_headers=[("Authorization", "Basic dTpw"), ("Cookie", "sessionid=1")],
        request=b'{"password":"x","card":"4111111111111111"}',
    )
    event = build_event(exchange, None, calls.options(AUTO_HIDE_SENSITIVE=False), parse_bodies=True)
    assert event is not None
    assert event["request"]["uri"] == "https://u:p@x/?token=t"
    assert event["request"]["headers"] == {"Authorization": "Basic dTpw", "Cookie": "sessionid=1"}
    assert event["request"]["body"] == {"password": "x", "card": "4111111111111111"}


def test_masks_outside_ascii(calls: Calls) -> None:
    """Names in any script, however JSON writes them."""
    for text in ('{"Contraseña": "x"}', '{"CONTRASE\\u00d1A": "x"}'):
        found = body_of(calls, text.encode(), "application/json", REQUEST_BODY_MASKS=["contraseña"])
        assert list(found.values()) == [None]
    assert (
        body_of(calls, "contraseña: x".encode(), "text/plain", REQUEST_BODY_MASKS=["contraseña"])
        == "contraseña: ".encode()
    )


@pytest.mark.parametrize(
    ("value", "hidden"),
    [
        ({"card_number": CARD}, True),
        ({"cardNumber": 4111111111111111}, True),
        ({"card": {"number": "4111-1111-1111-1111", "exp": "12/30"}}, True),
        ({"cards": [CARD]}, True),
        ({"payment_card": f"no. {CARD} exp 12/30"}, True),
        ({"card_number": "4111 1111 1111 1112"}, False),
        ({"card_id": "card_1NXWPnCo6bFb1KQto6C8OWvE"}, False),
        ({"number": CARD}, False),
        ({"order": 4111111111111111}, False),
        ({"cardigan": "blue"}, False),
    ],
)
def test_card_numbers_in_fields_named_like_cards(calls: Calls, value: Any, hidden: bool) -> None:
    """Only where the Luhn digit is right, and only below a name like a card's."""
    found = body_of(calls, json.dumps(value).encode(), "application/json")
    assert (found == value) is not hidden
    if hidden:
        assert "1111" not in json.dumps(found)


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("4111111111111111", True),
        ("5555-5555-5555-4444", True),
        ("378282246310005", True),
        ("12 4111 1111 1111 1111 99", True),
        ("4111111111111112", False),
        ("411111111111", False),
        ("41111111111111111111", False),
        ("٤١١١١١١١١١١١١١١١", False),
    ],
)
def test_what_a_card_number_is(text: str, card: bool) -> None:
    """12 to 19 ASCII digits, in groups or not, whose Luhn sum is right."""
    assert has_card_number(text) is card


@pytest.mark.parametrize(
    ("data", "content_type", "expected"),
    [
        (b'{"token":"x"}\n\n{"a":1}\n', "application/x-ndjson", b'{"token":"(hidden)"}\n\n{"a":1}\n'),
        (b'\x1e{"token":"x"}\n\x1e{"a":1}\n', "application/json-seq", b'\x1e{"token":"(hidden)"}\n\x1e{"a":1}\n'),
        (b'{"token":"x"}\n{"a":1}', "application/json", b'{"token":"(hidden)"}\n{"a":1}'),
        (
            b'id: 1\ndata: {"token":"x"}\n\ndata: [DONE]\n\n',
            "text/event-stream",
            b'id: 1\ndata: {"token":"(hidden)"}\n\ndata: [DONE]\n\n',
        ),
        (
            b'data: {"token":\r\ndata: "x"}\r\n\r\n',
            "text/event-stream",
            b'data: {"token":\r\ndata: "(hidden)"}\r\n\r\n',
        ),
        (b"data: password: x\n\ndata: ok\n\n", "text/event-stream", b"data: password: (hidden)\n\ndata: ok\n\n"),
        (
            b"user=a&password=x&empty=&token",
            "application/x-www-form-urlencoded",
            b"user=a&password=(hidden)&empty=&token",
        ),
        (b"p%61ssword=x&b=1", "application/x-www-form-urlencoded", b"p%61ssword=(hidden)&b=1"),
        (b"user%5Bpassword%5D=x", "application/x-www-form-urlencoded", b"user%5Bpassword%5D=(hidden)"),
        (
            b"payload=%7B%22token%22%3A%22x%22%7D",
            "application/x-www-form-urlencoded",
            b"payload=%7B%22token%22:%22(hidden)%22%7D",
        ),
        (
            b"card=4111111111111111&n=4111111111111111",
            "application/x-www-form-urlencoded",
            b"card=(hidden)&n=4111111111111111",
        ),
        (b"<a><password>x</password></a>", "application/xml", b"<a><password>(hidden)</password></a>"),
        (b"<a><name>x</name></a>", "application/xml", b"<a><name>x</name></a>"),
        (b"the tokens of max_tokens", "text/plain", b"the tokens of max_tokens"),
        (b'{"password": "x"', "application/json", b'{"password": "(hidden)"'),
        (b'{"a": 1, "password": "x', "application/json", b'{"a": 1, "password": '),
        (b'{"max_tokens": 5, "x"', "application/json", b'{"max_tokens": 5, "x"'),
        (b'{"pa\\u0073sword": "x"', "application/json", b'{"pa\\u0073sword": "(hidden)"'),
        (b"+AHAAYQ-", "text/plain; charset=utf-7", "binary"),
        (b"PK\x03\x04....", "application/octet-stream", "binary"),
        (b"see https://u:p@host/", "text/plain", b"see https://(hidden)@host/"),
        (b"card: 4111111111111111", "text/plain", b"card: (hidden)"),
        (b'["--\\u0074oken", "x"]', "application/json", ["--token", "(hidden)"]),
        (b"tax%20number=x&b=1", "application/x-www-form-urlencoded", b"tax%20number=&b=1"),
    ],
)
def test_each_format(calls: Calls, data: bytes, content_type: str, expected: Any) -> None:
    """What can be read is masked in its own form; what cannot be is left out with the reason, never sent raw."""
    assert body_of(calls, data, content_type, REQUEST_BODY_MASKS=["tax_number"]) == expected


@pytest.mark.parametrize("name", ["password", "tax_number"])
def test_a_tag_that_was_cut_is_dropped(calls: Calls, name: str) -> None:
    """The attribute that names the value may come behind it."""
    data = f"<p>kept</p><input type='text' value='hunter2' name='{name}'> and more".encode()
    for kept in range(1, len(data)):
        found = body_of(calls, data, "text/html", kept=kept, REQUEST_BODY_MASKS=["tax number"])
        assert b"hunt" not in found
        assert found.startswith(data[: min(kept, 11)])


@pytest.mark.parametrize("text", [b"if a <b and c == d: kept", b"5 < 6 = kept", b"<p>kept", b"<p class=a>kept"])
def test_a_cut_text_without_a_cut_tag_stays(calls: Calls, text: bytes) -> None:
    """Not each `<` begins a tag."""
    assert body_of(calls, text + b" more", "text/html", kept=len(text)) == text


def test_multipart_fields(calls: Calls) -> None:
    """By the field's name, and by what JSON in a part holds; other fields stay, binary files do not."""
    data = (
        b'--b\r\nContent-Disposition: form-data; name="password"\r\n\r\nhunter2\r\n'
        b'--b\r\nContent-Disposition: form-data; name="doc"\r\nContent-Type: application/json\r\n\r\n{"token":"hunter2","a":1}\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n\r\n\x00\x01\xff\r\n'
        b'--b\r\nContent-Disposition: form-data; name="note"\r\n\r\nmy password: hunter2\r\n'
        b"--b--\r\n"
    )
    found = body_of(calls, data, "multipart/form-data; boundary=b")
    assert found == (
        data.replace(b"hunter2\r\n", b"(hidden)\r\n")
        .replace(b'{"token":"hunter2","a":1}', b'{"token":"(hidden)","a":1}')
        .replace(b"\x00\x01\xff", b"(left out)")
    )


def test_multipart_masks_and_cut_parts(calls: Calls) -> None:
    """A part that the capture cut keeps its name, and so its secret."""
    data = b'--b\r\nContent-Disposition: form-data; name="ssn"\r\n\r\n123-45-6789'
    for kept in range(1, len(data) + 1):
        found = body_of(calls, data + b"more", "multipart/form-data; boundary=b", kept=kept, REQUEST_BODY_MASKS=["ssn"])
        assert b"123" not in (found if isinstance(found, bytes) else found.encode())


def test_an_unreadable_coding_is_left_out(calls: Calls) -> None:
    """Nobody could look into it; with LOG_BINARY_BODY it is sent as it is."""
    assert body_of(calls, b"\x1f\x8b\xff\xff", "application/json", coding="gzip") == "unreadable"
    assert (
        body_of(calls, b"\x00\x01\x02", "application/json", coding="unheard-of", LOG_BINARY_BODY=True)
        == b"\x00\x01\x02"
    )


def test_a_key_that_stands_twice_is_not_sent_raw(calls: Calls) -> None:
    """Parsers keep the last of two; the text holds both."""
    for text in (b'{"password":"x","password":null}', b'{"a":{"password":"x"},"a":1}'):
        exchange = calls.exchange(request=text)
        event = build_event(exchange, None, calls.settings, parse_bodies=False)
        assert event is not None
        assert b'"x"' not in serialize(event)


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        (b'{"link": "https://joe:hunter2@x/", "a": 1}', 26),
        (b"u=https%3A%2F%2Fjoe%3Ahunter2%40x", 24),
        ('{"link": "https://joe:hunter2@x/"}'.encode("utf-16"), 56),
        (b'{"a": "https:', 12),
    ],
)
def test_user_information_cut_before_its_end(calls: Calls, data: bytes, kept: int) -> None:
    """A cut URL may have been about to show an `@`: its end is dropped."""
    found = body_of(calls, data, "application/x-www-form-urlencoded", kept=kept)
    assert b"hun" not in (found if isinstance(found, bytes) else found.encode()).replace(b"\0", b"")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://x/a?b=c", "https://x/a?b=c"),
        ("https://x/reset-password/token", "https://x/reset-password/token"),
        ("https://x/a?token=t&b=c#access_token=t&d", "https://x/a?token=(hidden)&b=c#access_token=(hidden)&d"),
        ("https://x/#!token=t&b=c", "https://x/#!token=(hidden)&b=c"),
        ("https://x/#/token=t", "https://x/#/token=(hidden)"),
        ("https://u:p@x/a", "https://(hidden)@x/a"),
        ("https://ghp_abc@x/a", "https://(hidden)@x/a"),
        ("/a;token=t?b", "/a;token=(hidden)?b"),
        ("?to%6ben=t", "?to%6ben=(hidden)"),
        ("https://x/?next=https%3A%2F%2Fy%2F%3Ftoken%3Dt", "https://x/?next=https://y/%3Ftoken%3D(hidden)"),
        ("https://x/?q=%7B%22token%22%3A%22t%22%7D", "https://x/?q=%7B%22token%22:%22(hidden)%22%7D"),
        ("https://x/?password", "https://x/?password"),
        ("https://x/?password=", "https://x/?password="),
        (
            'https://x/?query=mutation{login(password:"t")}',
            "https://x/?query=mutation%7Blogin(password:%22(hidden)%22)%7D",
        ),
        ("", ""),
    ],
)
def test_urls(url: str, expected: str) -> None:
    """Query, fragment, path parameters, user information, and URLs in URLs."""
    found = redact_url(AUTO, url)
    assert found == expected or found.replace("{", "%7B").replace("}", "%7D").replace('"', "%22") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Is your password right?", "Is your password right?"),
        ("password=x&b=1", "password=(hidden)&b=1"),
        ('{"password": "x", "b": 1}', '{"password": "(hidden)", "b": 1}'),
        ('say {"password": "x\\"y", "b": 1}', 'say {"password": "(hidden)", "b": 1}'),
        ('{\\"password\\": \\"x\\"} tail', '{\\"password\\": \\"(hidden)\\"} tail'),
        ("a=password=x", "a=password=(hidden)"),
        ('"password": "never closed', '"password": (hidden)'),
        ("Authorization: Bearer abc\nAccept: x", "Authorization: (hidden)\nAccept: x"),
        ('say {"password": ["x", "y"], "b": 1}', 'say {"password": (hidden)'),
        ('{"password": {"a": "x', '{"password": {"a": '),
        ('{password: {"a": "x', "{password: (hidden)"),
        ("password=<x>&b=1", "password=(hidden)"),
        ('password=a"b<c&d=1', "password=(hidden)&d=1"),
        ("password: a&b;c", "password: (hidden)"),
        ("100% token of a % b", "100% token of a % b"),
        ("[see a <b for tokens: none]", "[see a <b for tokens: none]"),
        ("<p>{if x <y then password: x} </p>", "<p>{if x <y then password: (hidden)</p>"),
    ],
)
def test_texts_inside_values(text: str, expected: str) -> None:
    """JSON in a string, pairs in prose; prose itself stays."""
    assert redact_text(AUTO, text) == expected


@pytest.mark.parametrize(
    "url",
    [
        "https://x/odata/People(ID=1)/Records",
        "https://x:8080/dt=2024-01-01/tokens/a?x=1",
        "s3://bucket/dt=2024/tokens/part",
        "https://token.example.com/secrets/dt=2024/records",
        "/v1/users:find=1/tokens",
        "https://api.example.com/repos/a/tokenizers/labels{/name}",
        "https://x/users/{token}/reset",
        "https://x/%7Btoken%7D?a=b",
        "https://x/?next=https://y/{token}/b=c",
        "https:\\/\\/token.example.com\\/x",
    ],
)
def test_urls_without_secrets_stay(calls: Calls, url: str) -> None:
    """As the call's own and inside of texts, whatever words and marks their paths have."""
    assert redact_url(AUTO, url) == url
    for text in (url, f"see {url} please", f"<a href='{url}'>x</a>"):
        assert redact_text(AUTO, text) == text
        assert body_of(calls, json.dumps({"a": text}).encode(), "application/json") == {"a": text}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://x/dt=1/tokens?token=t", "https://x/dt=1/tokens?token=(hidden)"),
        ("https://u:p@x/a=tokenizer", "https://(hidden)@x/a=tokenizer"),
        ("https://x/users/{id}?password=t&a=b", "https://x/users/{id}?password=(hidden)&a=b"),
        ("https://x/a=https://u:p@h/tokens", "https://x/a=https://(hidden)@h/tokens"),
        ("https://x/password=t/a?b=c", "https://x/password=(hidden)?b=c"),
        ("https://x/a/b=c/password=t", "https://x/a/b=c/password=(hidden)"),
        ("https:\\/\\/x\\/?api+key=t&a=b", "https:\\/\\/x\\/?api+key=(hidden)&a=b"),
    ],
)
def test_urls_with_odd_paths_and_secrets(url: str, expected: str) -> None:
    """What is hidden is the secret, not the URL."""
    assert redact_url(AUTO, url) == expected
    assert redact_text(AUTO, f"see {url} please") == f"see {expected} please"


def test_texts_inside_texts_end(calls: Calls) -> None:
    """However often JSON is put into JSON; too deep is hidden as a whole."""
    text = '{"password":"hunter2"}'
    for _ in range(9):
        text = json.dumps({"t": text})
    assert "hunter2" not in json.dumps(body_of(calls, text.encode(), "application/json"))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("Authorization", "Bearer abc", "Bearer (hidden)"),
        ("authorization", "abc", "(hidden)"),
        ("Authorization", "abc def", "(hidden)"),
        ("Proxy-Authorization", "Digest a=b, c=d", "Digest (hidden)"),
        ("X-Api-Key", "abc", "(hidden)"),
        ("X-Auth-Token", "abc", "(hidden)"),
        ("X-Token-Count", "5", "5"),
        ("Cookie", "a=b; sessionid=x; token=y", "a=b; sessionid=(hidden); token=(hidden)"),
        (
            "Set-Cookie",
            "PHPSESSID=x; Path=/; Expires=Wed, 21 Oct 2026 07:28:00 GMT",
            "PHPSESSID=(hidden); Path=/; Expires=Wed, 21 Oct 2026 07:28:00 GMT",
        ),
        ("Referer", "https://x/?token=t", "https://x/?token=(hidden)"),
        ("Location", "/cb#access_token=t&x=1", "/cb#access_token=(hidden)&x=1"),
        ("Accept", "*/*", "*/*"),
        ("X-Empty", "", ""),
        ("WWW-Authenticate", 'Bearer realm="x"', 'Bearer realm="x"'),
    ],
)
def test_headers(calls: Calls, name: str, value: str, expected: str) -> None:
    """Credentials keep their scheme; secret names, cookies and URLs by the same list, on both sides."""
    exchange = calls.exchange(request_headers=[(name, value)], response_headers=[(name, value)])
    event = build_event(exchange, None, calls.settings, parse_bodies=False)
    assert event is not None
    assert event["request"]["headers"] == {name: expected}
    assert event["response"]["headers"] == {name: expected}


def test_header_masks(calls: Calls) -> None:
    """Any case; the name stays, the value goes; each list for its own side. Cookies follow both kinds of list."""
    exchange = calls.exchange(
        url="https://x/?ssn=1&keep=2",
        request_headers=[("X-Tenant", "a"), ("Cookie", "crumb=1; ssn=2; c=3"), ("Referer", "/?ssn=1")],
        response_headers=[("X-Tenant", "a")],
    )
    options = calls.options(
        REQUEST_HEADER_MASKS=["x_tenant", "crumb"], REQUEST_BODY_MASKS=["ssn"], AUTO_HIDE_SENSITIVE=False
    )
    event = build_event(exchange, None, options, parse_bodies=False)
    assert event is not None
    assert event["request"]["uri"] == "https://x/?ssn=&keep=2"
    assert event["request"]["headers"] == {"X-Tenant": "", "Cookie": "crumb=; ssn=; c=3", "Referer": "/?ssn="}
    assert event["response"]["headers"] == {"X-Tenant": "a"}


def test_a_custom_identity_header_is_a_credential(calls: Calls) -> None:
    """What AUTHORIZATION_HEADER_NAME names is read first and then hidden."""
    token = base64.b64encode(b'{"sub":"joe"}').decode()
    exchange = calls.exchange(request_headers=[("X-User", token)])
    event = build_event(exchange, None, calls.options(AUTHORIZATION_HEADER_NAME="x-user"), parse_bodies=False)
    assert event is not None
    assert (event["user_id"], event["request"]["headers"]) == ("joe", {"X-User": "(hidden)"})


def test_the_captured_bytes_and_the_users_metadata_are_not_changed(calls: Calls) -> None:
    """Hiding works on what was parsed for the event; an event can be built twice."""
    metadata = {"password": "mine"}
    exchange = calls.exchange(request=b'{"password":"x"}', metadata=metadata)
    first, second = (build_event(exchange, None, calls.settings, parse_bodies=True) for _ in range(2))
    assert first is not None
    assert second is not None
    assert serialize(first) == serialize(second)
    assert metadata == {"password": "mine"}


def test_names_without_end_take_no_memory(calls: Calls) -> None:
    """A client that invents names fills nothing."""
    rules = redaction_for(calls.settings).request
    for number in range(10_000):
        rules.verdict(f"name{number}")
        rules.header_verdict(f"x-name{number}")
        rules.header_stays(f"x-name{number}")
    for memory in (rules._judged, rules._judged_headers):
        assert memory.cache_info().currsize <= 4_096
    before = rules._judged.cache_info().hits
    rules.verdict("name9999")
    assert rules._judged.cache_info().hits == before + 1  # the newest are remembered, the oldest forgotten
    rules.verdict("x" * 129)
    assert rules._judged.cache_info().hits == before + 1
