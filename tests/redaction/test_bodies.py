"""`_redaction.bodies` and the forms below it: secrets in every form that a body has, and what must stay beside them."""

from __future__ import annotations

import base64
import gzip
import json
import re
import zlib
from typing import Any

import brotli
import orjson
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesif_otel._events.body import read_body
from moesif_otel._redaction.budget import Inspection
from moesif_otel._redaction.headers import redact_header
from moesif_otel._redaction.rules import Rules
from moesif_otel._redaction.text import inspect_text, redact_text, redact_url

AUTO = Rules(auto=True)
MASKED = Rules(["Social Security Number", "nickName"], auto=True)
SECRET = "hUnt3r7Zq9"
CARD = "4111111111111111"


def shown_header(name: str, value: str) -> str:
    """What leaves of a header in whose value nothing was found at a quick look."""
    return redact_header(Inspection(AUTO, inspect_text), name, value, concerned=False)


def left(
    data: bytes | str, content_type: str | None = None, coding: str | None = None, *, cut: bool = False, rules: Rules = MASKED
) -> str:
    """What leaves of a body, as text in UTF-8; `left out: <reason>` where nothing does."""
    raw = data.encode() if isinstance(data, str) else data
    body = read_body(raw, content_type, coding, truncated=cut, parse=False, rules=rules)
    if body.left_out is not None:
        return f"left out: {body.left_out.value}"
    shown = orjson.dumps(body.value) if body.transfer_encoding == "json" else base64.b64decode(body.value)
    for codec in ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"):
        try:
            text = shown.decode(codec)
        except UnicodeError:
            continue
        if "\0" not in text:
            return text
    return shown.decode("latin-1")


@pytest.mark.parametrize(
    ("data", "content_type", "expected"),
    [
        ("a: b\nAPI Key: S\nc: d", "text/plain", "a: b\nAPI Key: (hidden)\nc: d"),
        ("a: b\nAPI Key: S\nc: d", "text/csv", "a: b\nAPI Key: (hidden)\nc: d"),
        ("<p>API Key: S</p><i>c</i>", "text/html", "<p>API Key: (hidden)</p><i>c</i>"),
        ("<p>API&nbsp;Key: S</p>", "text/html", "<p>API\u00a0Key: (hidden)</p>"),
        ("<p>pass&#119;ord: S</p>", "text/html", "<p>password: (hidden)</p>"),
        ("Social Security Number: S\nc: d", "text/plain", "Social Security Number: \nc: d"),
        ("a\npassword: x\nc", "text/plain", "a\npassword: (hidden)\nc"),
        ('a\npassword: """S"""\nc', "text/plain", "a\npassword: (hidden)"),
        ("a\npassword: 'S''S'\nc", "text/plain", "a\npassword: (hidden)"),
        ('a\npassword: "S" "S"\nc', "text/plain", "a\npassword: (hidden)"),
        ('a\npassword: "S" + \n"S"', "text/plain", "a\npassword: (hidden)"),
        ("a\npassword: S\\\nS\nc", "text/plain", "a\npassword: (hidden)"),
        ("a\npassword: |\n  S\n  S\nc: d", "application/yaml", "a\npassword: (hidden)"),
        ("a\npassword: >-\n  S\nc: d", "application/yaml", "a\npassword: (hidden)"),
        ("a:\n  password: S\n    S\n  c: d", "application/yaml", "a:\n  password: (hidden)\n  c: d"),
        ("a:\n  password:\n    - S\n    - S\n  c: d", "application/yaml", "a:\n  password:(hidden)\n  c: d"),
        ("a\npassword: [S,\nS]\nc", "application/yaml", "a\npassword: (hidden)"),
        ("Authorization: Basic\r\n S\r\nHost: x", "message/http", "Authorization: (hidden)\r\nHost: x"),
        ("password=\nuser=joe", "text/plain", "password=\nuser=joe"),
        ("DB_PASSWORD=S\nX=1", "text/plain", "DB_PASSWORD=(hidden)\nX=1"),
        ("user,password\njoe,S\n", "text/csv", "user,password(hidden)"),
        ('"user";"API Key"\n"joe";"S"\n', "text/csv", '"user";"API Key"(hidden)'),
        ("user[password];db.password\nS;S\n", "text/csv", "user[password];db.password(hidden)"),
        ("password\nS\n", "text/csv", "password(hidden)"),
        ('a:1:{s:8:"password";s:7:"S";}', "text/plain", 'a:1:{s:8:"password(hidden)'),
        ("d8:password10:S", "text/plain", "d8:password10:(hidden)"),
        ("x --password S -h y", "text/plain", "x --password (hidden) -h y"),
        ("x --password 'S S' -h y", "text/plain", "x --password '(hidden)' -h y"),
        ("see https://joe:it's@host/ ok", "text/plain", "see https://(hidden)@host/ ok"),
        ("see https://x/?token=S&a=b c", "text/plain", "see https://x/?token=(hidden)&a=b c"),
        ("<a><password>S</password><b>c</b></a>", "text/xml", "<a><password>(hidden)</password><b>c</b></a>"),
        ("<n:password>S</n:password><b>c</b>", "text/xml", "<n:password>(hidden)</n:password><b>c</b>"),
        ("<password>S<password>S</password>S</password><b>c</b>", "text/xml", "<password>(hidden)</password><b>c</b>"),
        ("<password><![CDATA[</password>S]]></password>c", "text/xml", "<password>(hidden)</password>c"),
        ("<b>c</b><password>S", "text/xml", "<b>c</b><password>(hidden)"),
        ("<b>c</b><password a='S", "text/xml", "<b>c</b>(hidden)"),
        ('<u password="S" b="c"/>', "text/xml", '<u password="(hidden)" b="c"/>'),
        ('<e key="password">S</e><b>c</b>', "text/xml", '<e key="password">(hidden)</e><b>c</b>'),
        ("<key>password</key><string>S</string><b>c</b>", "text/xml", "<key>password</key><string>(hidden)</string><b>c</b>"),
        ("<key>password</key><!-- c --><string>S<!-- -->S</string><b>c</b>", "text/xml",
         "<key>password</key><!--(hidden)--><string>(hidden)<!--(hidden)-->(hidden)</string><b>c</b>"),
        ("<th>User</th><th>Password</th><td>joe</td><td>S</td>", "text/html", "<th>User</th><th>Password(hidden)"),
        ("<td>API Key:</td><td>S</td>", "text/html", "<td>API Key:(hidden)"),
        ("<p>password: x<b>S</b></p>", "text/html", "<p>password: (hidden)"),
        ('<input name="password" value="S"><i>c</i>', "text/html", '<input name="password" value="(hidden)"><i>c</i>'),
        ('<script>c={"apiKey":"S",d:1}</script>', "text/html", '<script>c={"apiKey":"(hidden)",d:1}</script>'),
        ("<card><number>4111 1111 1111 1111</number></card>", "text/xml", "<card><number>(hidden)</number></card>"),
        ('query { a(password: "S", c: "d") }', "application/graphql", 'query { a(password: "(hidden)", c: "d") }'),
        ("grant_type=x&code=S&c=d", "application/x-www-form-urlencoded", "grant_type=x&code=(hidden)&c=d"),
        ("a\npassword,S\nc,d", "text/csv", "a\npassword(hidden)"),
        ("name\tjoe\npassword\tS\n", "text/plain", "name\tjoe\npassword(hidden)"),
        ("| a | b |\n| API Key | S |", "text/markdown", "| a | b |\n| API Key (hidden)"),
        ("Your password is: S", "text/plain", "Your password is: (hidden)"),
        ("Password?: S", "text/plain", "Password?: (hidden)"),
        ("password\uff1aS", "text/plain", "password\uff1a(hidden)"),
        ("see /x;jsessionid=S;b", "text/plain", "see /x;jsessionid=(hidden);b"),
        ("name,card_number\nJoe,4111111111111111\n", "text/csv", "name,card_number(hidden)"),
        ("card\n4111 1111 1111 1111\n", "text/csv", "card(hidden)"),
        ("<th>Card</th><td>joe</td><td>4111111111111111</td>", "text/html", "<th>Card</th><td>joe</td><td>(hidden)</td>"),
        ('data: {"password":\ndata: "S"}\n\n', "text/plain", 'data: {"password":\ndata: "(hidden)"}\n\n'),
        ("code=DE&c=d&password2=S", "application/x-www-form-urlencoded", "code=DE&c=d&password2=(hidden)"),
    ],
)
def test_texts(data: str, content_type: str, expected: str) -> None:
    """What stands behind a name is hidden; where a value's end is not certain, so is the rest."""
    assert left(re.sub(r"\bS\b", SECRET, data), content_type) == expected


@pytest.mark.parametrize("note", ["my API Key: S", "<password>S</password>", "x --password S", "password=S", "https://u:S@x/",
                                  "https://x/?sig=S", '{"token":"S"}', "password%3DS", '{"a":"{\\"token\\":\\"S\\"}"}'])
def test_texts_in_json(note: str) -> None:
    """The same in a JSON string, beside what stays."""
    shown = left(json.dumps({"note": note.replace("S", SECRET), "kept": "yes"}), "application/json")
    assert SECRET not in shown
    assert json.loads(shown)["kept"] == "yes"


def test_arguments_in_json() -> None:
    """A command line as a list."""
    assert left('{"argv":["--password","S","-h","x"]}') == '{"argv":["--password","(hidden)","-h","x"]}'


@pytest.mark.parametrize(
    "text",
    [
        "http://credentials:8080/x", "/v1/token:exchange", "POST /v1/token:exchange HTTP/1.1", "sort=token:desc",
        "Invalid token", "a token, a password and a secret", "The password is wrong", "Is your password right?",
        "<h1>Invalid token</h1><p>The token has expired</p>", "max_tokens: 5", "next_page_token=abc", "scorecard: 4111111111111111",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    """In a text, in a JSON string, and in HTML."""
    assert left(text, "text/plain") == text
    assert left(json.dumps({"note": text}), "application/json") == json.dumps({"note": text})
    assert left(f"<p>{text}</p>", "text/html") == f"<p>{text}</p>"
    assert redact_text(AUTO, text) == text


def test_containers_keep_their_shape() -> None:
    """Below a secret's name texts are hidden; numbers, flags and the shape stay. Below a mask nothing does."""
    value = {"token": {"id": 5, "text": SECRET, "ok": True}, "authorization": {"status": SECRET, "amount": 12.5},
             "credentials": [{"id": 7, "password": 5, "more": [SECRET, {"x": SECRET}]}], "kept": ["a", {"b": "c"}]}  # fmt: skip
    assert json.loads(left(json.dumps(value))) == {
        "token": {"id": 5, "text": "(hidden)", "ok": True},
        "authorization": {"status": "(hidden)", "amount": 12.5},
        "credentials": [{"id": 7, "password": "(hidden)", "more": ["(hidden)", {"x": "(hidden)"}]}],
        "kept": ["a", {"b": "c"}],
    }
    assert left('{"nickname": {"a": [1, "]}"]}, "b": 1}') == '{"nickname": null, "b": 1}'


def test_what_is_not_hidden_leaves_byte_for_byte() -> None:
    """Numbers keep their digits, texts their spelling, objects their order and their names that stand twice."""
    text = '{ "n": 123456789012345678901234567890, "f": 1.10, "e": 1E5,\n "u": "\\u00e4\\/", "k": 1, "k": 2, "password": %s }'
    assert left(text % '"x"') == text % '"(hidden)"'
    assert left(text.replace("password", "other") % '"x"') == text.replace("password", "other") % '"x"'


def test_whole_numbers_are_exact_for_a_mask() -> None:
    """Beyond 64 bits, too."""
    body = read_body(b'{"n": 123456789012345678901234567890}', None, None, truncated=False, parse=True, rules=AUTO)
    assert body.value == {"n": 123456789012345678901234567890}


@pytest.mark.parametrize("depth", [190, 200, 201, 260, 1_000, 1_023, 5_000, 100_000])
@pytest.mark.parametrize("shape", ["[@]", '{"a":@}', '["]]]]",@,"[[[[\\""]', '{"a":[{}],"b":@,"c":[]}'])
def test_deep_json_is_text(depth: int, shape: str) -> None:
    """What other JSON cannot embed safely goes as text, and is hidden in all the same."""
    before, _, after = shape.partition("@")
    text = before * depth + '{"password":"hUnt3r7Zq9"}' + after * depth
    body = read_body(text.encode(), None, None, truncated=False, parse=False, rules=AUTO)
    assert SECRET not in left(text)
    assert (body.transfer_encoding == "json") is (depth + 1 <= 200)


@pytest.mark.parametrize(
    ("data", "content_type"),
    [
        (b"\xa1hpasswordghunter2", "application/cbor"), (b"\xa1hpasswordghunter2", None), (b"\xa1hpasswordghunter2", "text/plain"),
        (b"\xbfhpasswordghunter2\xff", "application/json"), (b":)\n\x01\xfa\x87passwordFhunter2\xfb", None),
        (b"d8:password7:hunter2e", "application/x-bittorrent"), (b"d8:password7:hunter2e", None),
        (b"{i\x08passwordSi\x07hunter2}", "application/ubjson"), (b"{i\x08passwordSi\x07hunter2}", None),
        (b"\x1f\0\0\0\x02password\0\x08\0\0\0hunter2\0\0", "application/bson"), (b"joe\0password\0hunter2\0", "text/plain"),
        (b"\x81\xa8password\xa7hunter2", "application/msgpack"), (b"\n\x08password\x12\x07hunter2", "application/x-protobuf"),
        (gzip.compress(b'{"password":"hunter2"}', mtime=0), "application/json"), (zlib.compress(b'{"password":"hunter2"}'), None),
    ],
)  # fmt: skip
def test_binary_formats_are_left_out(data: bytes, content_type: str | None) -> None:
    """Their size and type are recorded instead, unless `LOG_BINARY_BODY` says otherwise."""
    assert left(data, content_type) in {"left out: binary", "left out: not_maskable"}
    if b"\0" in data or not data.isascii():
        body = read_body(data, content_type, None, truncated=False, parse=False, rules=Rules(auto=True, opaque_allowed=True))
        assert base64.b64decode(body.value) == data


@pytest.mark.parametrize("declared", ["gzip", "deflate", "br", "zstd", "x-gzip"])
@pytest.mark.parametrize("encode", [gzip.compress, zlib.compress, brotli.compress, zstandard.compress, bytes])
def test_codings_under_wrong_names(declared: str, encode: Any) -> None:
    """The bytes show what they are, or the body is left out."""
    assert "hunter2" not in left(encode(b'{"password":"hunter2","a":"%s"}' % (b"x" * 50)), "application/json", declared)


@pytest.mark.parametrize("charset", ["utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize(
    ("text", "content_type"),
    [
        ("data: password: S\n\ndata: ok\n\n", "text/event-stream"), ('data: {"token":"S"}\n\n', "text/event-stream"),
        ("<a><u>https://joe:S@host/</u></a>", "application/xml"), ('{"a":1}\n{"token":"S"}\n', "application/x-ndjson"),
        ("a=b&password=S", "application/x-www-form-urlencoded"), ("password: S", "text/plain"),
        ('{"a":"https://joe:S@host/","password":"S"}', "application/json"),
    ],
)  # fmt: skip
def test_charsets(charset: str, text: str, content_type: str) -> None:
    """Whole, and cut anywhere."""
    data = text.replace("S", SECRET).encode(charset)
    for kind in (content_type, f"{content_type}; charset={charset}"):
        shown = left(data, kind)
        assert SECRET not in shown
        assert "left out" not in shown or charset.endswith(("le", "be")) or charset == "utf-8-sig"
        for kept in range(1, len(data)):
            body = read_body(data[:kept], kind, None, truncated=True, parse=False, rules=AUTO)
            if body.value is not None:
                assert SECRET[:5].encode() not in base64.b64decode(body.value).replace(b"\0", b"")


@pytest.mark.parametrize("number", [CARD, "4111 1111 1111 1111", "4111  1111  1111  1111", "4111-1111-1111-1111", "4111+1111+1111+1111",
                                    "4111.1111.1111.1111", f" {CARD} exp 12/30", f"{CARD}.0"])  # fmt: skip
def test_card_numbers_in_every_writing(number: str) -> None:
    """In JSON, forms, texts and XML."""
    for data, content_type in (
        (json.dumps({"card": number}), "application/json"),
        (json.dumps({"card": {"x": [number]}}), "application/json"),
        (f"card={number.replace('+', '%2B')}&a=b", "application/x-www-form-urlencoded"),
        (f"card={number}&a=b", "application/x-www-form-urlencoded"),
        (f"card: {number}", "text/plain"),
        (f"<card>{number}</card>", "text/xml"),
        (f'--b\r\nContent-Disposition: form-data; name="card"\r\n\r\n{number}\r\n--b--', "multipart/form-data; boundary=b"),
    ):
        assert "1111" not in left(data, content_type)


@pytest.mark.parametrize("number", ["4111111111111111", "4111111111111111.0", "4.111111111111111e15", "4.111111111111111E+15", "41111111111111110e-1"])
def test_card_numbers_as_numbers(number: str) -> None:
    """A float holds a card number as well."""
    assert left(f'{{"card":{number}}}') == '{"card":"(hidden)"}'


@pytest.mark.parametrize("number", ["4111111111111111", "411111111111111.1e1", "4.111111111111111e15"])
def test_card_numbers_as_numbers_that_were_cut(number: str) -> None:
    """As soon as its digits tell of a card, also where the exponent is missing."""
    for kept in range(number.index("1") + 8, len(number) + 1):
        assert "111111" not in left(f'{{"card":{number[:kept]}', cut=True)


@pytest.mark.parametrize("number", ["5.960464477539063e-08", "411111111111111.1", "4.111111111111111e14", "0.4111111111111111"])
def test_numbers_that_are_no_cards(number: str) -> None:
    """A number with digits behind the point is no card's, however long and whatever its check digit."""
    assert left(f'{{"card":{number}}}') == f'{{"card":{number}}}'


@pytest.mark.parametrize(
    ("data", "content_type"),
    [
        (f'{{"a":1,"card":{CARD}', "application/json"), (f'{{"a":1,"card":"{CARD}', "application/json"),
        (f'{{"a":1,"card":[{CARD}', "application/json"), (f"a=b&card={CARD}", "application/x-www-form-urlencoded"),
        (f"card: {CARD}", "text/plain"), (f"<card>{CARD}", "text/xml"),
        (f'--b\r\nContent-Disposition: form-data; name="card"\r\n\r\n{CARD}', "multipart/form-data; boundary=b"),
    ],
)  # fmt: skip
def test_card_numbers_that_were_cut(data: str, content_type: str) -> None:
    """Fifteen of sixteen digits have no check digit, and are hidden."""
    for kept in range(len(data) - 9, len(data) + 1):
        assert "411111" not in left(data[:kept], content_type, cut=True)


@pytest.mark.parametrize("name", ["scorecard", "wildcard", "postcard", "score_card", "discard", "cardigan", "cardinality"])
def test_names_that_are_no_cards(name: str) -> None:
    """`card` is a word of its own in a card's name."""
    assert left(json.dumps({name: int(CARD)})) == json.dumps({name: int(CARD)})


@pytest.mark.parametrize("name", ["card", "cardNumber", "CARD_NUMBER", "card-no", "creditCard", "creditcard", "paymentCardNumber",
                                  "ccnumber", "cc_number", "user.card", "cards[0]", "CardNumber"])  # fmt: skip
def test_names_that_are_cards(name: str) -> None:
    """In every spelling."""
    assert CARD not in left(json.dumps({name: CARD}))


@pytest.mark.parametrize(
    "disposition",
    ['filename="a;name=b"; name="password"', "name*=UTF-8''pass%77ord", 'name="pa\\ssword"', "NAME=password",
     'name*0="pass"; name*1="word"', 'name="user[password]"', 'filename="x"; name="password"'],
)  # fmt: skip
def test_names_of_parts(disposition: str) -> None:
    """However a part's name is written."""
    data = f"--b\r\nContent-Disposition: form-data; {disposition}\r\n\r\nhunter2\r\n--b--\r\n"
    assert "hunter2" not in left(data, "multipart/form-data; boundary=b")


@pytest.mark.parametrize("name", ["__Host-session", "__Secure-session", "_app_session", "ASPSESSIONIDABCD", "connect.sid", "__Host-token"])
def test_cookies(name: str) -> None:
    """Sessions under the names of frameworks and browsers."""
    assert shown_header("cookie", f"{name}=S; theme=dark") == f"{name}=(hidden); theme=dark"
    assert shown_header("set-cookie", f"{name}=S; Path=/") == f"{name}=(hidden); Path=/"


@pytest.mark.parametrize("name", ["X-Forwarded-Access-Token", "X-Vault-Token", "X-Original-Authorization", "X-Amz-Security-Token", "Private-Token"])
def test_headers_of_secrets(name: str) -> None:
    """Behind a vendor's name, too."""
    assert shown_header(name.lower(), "S") == "(hidden)"


@pytest.mark.parametrize("name", ["X-Next-Page-Token", "X-Token-Count", "X-Continuation-Token", "X-Request-Id"])
def test_headers_that_stay(name: str) -> None:
    """Pages and counts are no secrets."""
    assert shown_header(name.lower(), "S") == "S"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://x/?sig=S&a=b", "https://x/?sig=(hidden)&a=b"),
        ("https://x/?code=S", "https://x/?code=(hidden)"),
        ("https://x/#assertion=S", "https://x/#assertion=(hidden)"),
        ("https://x/?wifi_password=S", "https://x/?wifi_password=(hidden)"),
        ("https://x/a;jsessionid=S?b=c", "https://x/a;jsessionid=(hidden)?b=c"),
        ("/a;JSESSIONID=S/b", "/a;JSESSIONID=(hidden)/b"),
        ("https://joe:it's@x/", "https://(hidden)@x/"),
        ("http://credentials:8080/x?a=b", "http://credentials:8080/x?a=b"),
        ("https://x/v1/token:exchange?a=b", "https://x/v1/token:exchange?a=b"),
        ("https://x/?sort=token:desc", "https://x/?sort=token:desc"),
    ],
)
def test_urls(url: str, expected: str) -> None:
    """Credentials in a URL are hidden, paths and hosts stay."""
    assert redact_url(AUTO, url) == expected


_TEMPLATES = (
    '{{"a":1,"{name}":"{value}","z":2}}', '{{"a":[{{"{name}":["{value}"]}}]}}', '{{"t":"{name}={value}"}}', "a=b&{name}={value}&c=d",
    "a: b\n{name}: {value}\nc: d", "<a><{name}>{value}</{name}></a>", '<a {name}="{value}"/>', "data: {name}: {value}\n\n",
    'data: {{"{name}":"{value}"}}\n\n', "https://x/?{name}={value}", '{{"a":1}}\n{{"{name}":"{value}"}}\n', "run --{name} {value}",
    "x,{name}\n1,{value}\n", "{name} => '{value}',", "[{name}={value}]", '("{name}", "{value}")',
)  # fmt: skip
_TYPES = ("application/json", "text/plain", "text/html", "text/xml", "application/x-www-form-urlencoded", "text/event-stream", None,
          "application/x-ndjson", "multipart/form-data; boundary=b", "application/octet-stream", "text/csv", "application/yaml")  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(_TEMPLATES), st.sampled_from(_TYPES),
    st.sampled_from(["password", "API_KEY", "client-secret", "access_token", "nickName", "card_pin", "my_password", "token2"]),
    st.sampled_from(["utf-8", "utf-16", "utf-32"]), st.sampled_from([None, "gzip", "deflate", "br", "zstd"]),
    st.sampled_from([None, "gzip", "deflate", "br", "zstd"]), st.floats(0, 1), st.booleans(), st.booleans(),
)  # fmt: skip
def test_planted_in_any_form_under_any_label(
    template: str, content_type: str | None, name: str, charset: str, coding: str | None, label: str | None,
    part: float, cut: bool, in_json: bool,
) -> None:  # fmt: skip
    """Any form under any Content-Type, any coding under any name, cut anywhere, and inside JSON."""
    text = template.format(name=name, value=SECRET)
    if in_json:
        text = json.dumps({"x": text})
    codings = {None: bytes, "gzip": gzip.compress, "deflate": zlib.compress, "br": brotli.compress, "zstd": zstandard.compress}
    data = codings[coding](text.encode(charset))  # type: ignore[operator]
    if cut:
        data = data[: max(1, int(len(data) * part))]
    body = read_body(data, content_type, label, truncated=cut, parse=False, rules=MASKED)
    if body.value is None:
        return
    shown = orjson.dumps(body.value) if body.transfer_encoding == "json" else base64.b64decode(body.value)
    assert SECRET[:5].encode() not in shown.replace(b"\0", b"")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e6, 1e6)
    | st.sampled_from(["x", "a: b", "records", "password", "password=" + SECRET, "token: x", "https://u:p@x/", 'say "x"', "é", "--password", "a\\b"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["a", "records", "max_tokens", "password", "nick_name", "card", "b c", "user.token", 'q"', "é", "tokens"]), inner, max_size=4),
    max_leaves=15,
)  # fmt: skip


def _hidden(value: Any, *, mode: str = "") -> Any:
    """The same rules on values, told plainly: what `redact_json` must come to, numbers in card fields aside."""
    if isinstance(value, dict):
        out = {}
        for name, inner in value.items():
            verdict = MASKED.verdict(name).value
            if verdict == "remove":
                out[name] = None
            elif verdict == "hide" and not isinstance(inner, (dict, list)):
                out[name] = inner if inner is None or isinstance(inner, bool) else "(hidden)"
            else:
                out[name] = _hidden(inner, mode="hide" if mode == "hide" or verdict == "hide" else mode)
        return out
    if isinstance(value, list):
        return [_hidden(inner, mode=mode) for inner in value]
    if isinstance(value, str):
        return "(hidden)" if mode == "hide" and value else redact_text(MASKED, value)
    return value


@settings(max_examples=300, deadline=None)
@given(_JSON.filter(lambda value: isinstance(value, (dict, list))), st.sampled_from([None, 1]), st.booleans())
def test_json_as_text_is_json_as_values(value: Any, indent: int | None, ascii_only: bool) -> None:
    """Hiding in the text gives what hiding in the values gives, and leaves a text alone in which nothing is hidden."""
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    shown = left(text)
    expected = _hidden(json.loads(text))
    found = json.loads(shown)
    if '"--password", "' not in text and '"--password",\n' not in text:  # a list of arguments
        assert found == expected
    if found == json.loads(text) and "\\ud" not in text:
        assert shown == text


@pytest.mark.parametrize(
    "disposition",
    ['form-data;\r\n name="password"', "form-data; name='password'", 'form-data; name="=?utf-8?q?pass=77ord?="'],
)
def test_names_of_parts_however_written(disposition: str) -> None:
    """The name of a part counts on a line of its own (RFC 5322), in single quotes, and encoded (RFC 2047)."""
    body = f"--B\r\nContent-Disposition: {disposition}\r\n\r\n{SECRET}\r\n--B--\r\n"
    assert left(body, "multipart/form-data; boundary=B") == body.replace(SECRET, "(hidden)")


@pytest.mark.parametrize("name", ["my.session.id", "sessionid2", "access_token_cookie"])
def test_more_session_cookies(name: str) -> None:
    """Session cookies with dots, numbers and `_cookie` in their names are hidden, their neighbours are not."""
    assert shown_header("cookie", f"{name}={SECRET}; a=b") == f"{name}=(hidden); a=b"


@pytest.mark.parametrize(
    "name", ["X-Goog-Iap-Jwt-Assertion", "Cf-Access-Jwt-Assertion", "X-Amzn-Oidc-Data", "X-Amzn-Oidc-Accesstoken"]
)
def test_tokens_of_gateways(name: str) -> None:
    """The token with which a gateway vouches for a user is a credential."""
    assert shown_header(name.lower(), SECRET) == "(hidden)"


@pytest.mark.parametrize(
    "text",
    ["name,scorecard\njoe,4111111111111111\n", "The user, password, and token are wrong,\nplease try again", "wrong token;\nb"],
)
def test_rows_that_stay(text: str) -> None:
    """A list in prose is no row, and a score card is no card."""
    assert left(text, "text/plain") == text


@pytest.mark.parametrize(
    ("data", "content_type", "expected"),
    [
        # Sign-ins, whose names count in forms as they do in queries.
        ("SAMLResponse=§&RelayState=x", "application/x-www-form-urlencoded", "SAMLResponse=(hidden)&RelayState=x"),
        ("code=§&state=x&session_state=y", "application/x-www-form-urlencoded", "code=(hidden)&state=x&session_state=y"),
        ("code=DE&state=x", "application/x-www-form-urlencoded", "code=DE&state=x"),
        # Markup inside of markup inside of markup.
        ("<a>&amp;lt;password&amp;gt;§&amp;lt;/password&amp;gt;</a>", "text/xml", "<a>&lt;password&gt;(hidden)&lt;/password&gt;</a>"),
        # Events under another type, which do not begin with their data.
        (': hi\ndata: {"password":\ndata: "§"}\n\n', "text/plain", ': hi\ndata: {"password":\ndata: "(hidden)"}\n\n'),
        # Private keys, whatever they stand in.
        ("-----BEGIN RSA PRIVATE KEY-----\n§\n-----END RSA PRIVATE KEY-----\n", "application/x-pem-file",
         "left out: not_maskable"),
        ("a\n-----BEGIN PRIVATE KEY-----\n§\n-----END PRIVATE KEY-----\nb", "text/plain",
         "a\n-----BEGIN PRIVATE KEY-----(hidden)-----END PRIVATE KEY-----\nb"),
        ('{"a":"-----BEGIN EC PRIVATE KEY-----\\n§"}', "application/json", '{"a":"-----BEGIN EC PRIVATE KEY-----(hidden)"}'),
        ("-----BEGIN PUBLIC KEY-----\nx\n-----END PUBLIC KEY-----", "text/plain",
         "-----BEGIN PUBLIC KEY-----\nx\n-----END PUBLIC KEY-----"),
        # Names that are texts.
        ('{"https://joe:§@x/":{"token=§":1},"a-b":1}', "application/json",
         '{"https://(hidden)@x/":{"token=(hidden)":1},"a-b":1}'),
        ('{"token":{"https://joe:§@x/":1}}', "application/json", '{"token":{"https://(hidden)@x/":1}}'),
    ],
)  # fmt: skip
def test_more_texts(data: str, content_type: str, expected: str) -> None:
    """Secrets in places where they are not looked for at first."""
    assert left(data.replace("§", SECRET), content_type) == expected


@pytest.mark.parametrize("scheme", ["https://", "https:\\/\\/"])
@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
def test_a_long_token_of_a_url_that_was_cut(scheme: str, content_type: str) -> None:
    """A token in the place of a password may be longer than any password."""
    for data in (f'{{"a":"{scheme}x:{SECRET * 300}', f"see {scheme}{SECRET * 300}"):
        assert SECRET not in left(data, content_type, cut=True)


@pytest.mark.parametrize(
    ("head", "shown"),
    [
        (f"Authorization: Bearer {SECRET}\r\nX-A: b", "Authorization: Bearer (hidden)\r\nX-A: b"),
        (f"X-A: b\r\nX-Api-Key:\r\n {SECRET}", "X-A: b\r\nX-Api-Key:(hidden)"),
        (f"Content-Location: /x?token={SECRET}", "Content-Location: /x?token=(hidden)"),
        ("Content-Type: text/plain\r\nX-Ä: é", "Content-Type: text/plain\r\nX-Ä: é"),
    ],
)
def test_headers_of_parts(head: str, shown: str) -> None:
    """A part of a batch may be a request of its own, with credentials."""
    body = "--b\r\n{}\r\n\r\nx\r\n--b--\r\n"
    assert left(body.format(head), "multipart/mixed; boundary=b") == body.format(shown)


def test_a_part_with_two_names() -> None:
    """Receivers differ in which one they take: both count."""
    for names in (("password", "x"), ("x", "password")):
        head = "\r\n".join(f'Content-Disposition: form-data; name="{name}"' for name in names)
        assert SECRET not in left(f"--b\r\n{head}\r\n\r\n{SECRET}\r\n--b--\r\n", "multipart/form-data; boundary=b")


@pytest.mark.parametrize(
    "name",
    [
        *(".AspNetCore.CookiesC1", "AWSELBAuthSessionCookie-0", "sb-access-token", "remember_user_token", "_oauth2_proxy_1"),
        *("CF_Authorization", "KEYCLOAK_IDENTITY", "wordpress_logged_in_5bd7a9c6", "authjs.session-token"),
    ],
)
def test_cookies_that_log_in(name: str) -> None:
    """Of load balancers, proxies and frameworks, whole or in numbered chunks."""
    assert shown_header("cookie", f"theme=dark; {name}={SECRET}") == f"theme=dark; {name}=(hidden)"


@pytest.mark.parametrize("name", ["X-RapidAPI-Key", "X-Auth-Key", "X-Functions-Key", "X-Parse-Master-Key", "X-User-JWT"])
def test_keys_of_gateways(name: str) -> None:
    """API keys under the names of those who check them."""
    assert shown_header(name.lower(), SECRET) == "(hidden)"


@pytest.mark.parametrize("name", ["Idempotency-Key", "Surrogate-Key", "X-Cache-Key", "Sec-WebSocket-Key"])
def test_keys_that_open_nothing(name: str) -> None:
    """They stay."""
    assert shown_header(name.lower(), "abc") == "abc"
