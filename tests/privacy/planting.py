"""Secrets, and the calls that they are planted in."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote

import brotli
import zstandard

if TYPE_CHECKING:
    from collections.abc import Callable

BODY_MASK_REQUEST = "nickName"
BODY_MASK_RESPONSE = "SALARY"
HEADER_MASK_REQUEST = "X-Custom-Note"
HEADER_MASK_RESPONSE = "x_internal_note"
MAX_BODY_BYTES = 6_000

OPTIONS = {
    "REQUEST_BODY_MASKS": [BODY_MASK_REQUEST],
    "RESPONSE_BODY_MASKS": [BODY_MASK_RESPONSE],
    "REQUEST_HEADER_MASKS": [HEADER_MASK_REQUEST],
    "RESPONSE_HEADER_MASKS": [HEADER_MASK_RESPONSE],
    "REQUEST_MAX_BODY_SIZE": MAX_BODY_BYTES,
    "RESPONSE_MAX_BODY_SIZE": MAX_BODY_BYTES,
}

CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.compress,
}

TAGS: dict[str, str] = {}
"""Where each secret and each control was planted, for messages."""


def text_for(tag: str) -> str:
    """Give a text of twenty characters that occurs nowhere else; the same for the same tag."""
    return base64.b32encode(hashlib.sha256(tag.encode()).digest()).decode()[:20]


def card_for(tag: str) -> str:
    """Give a card number (ISO/IEC 7812, its check digit right) that occurs nowhere else."""
    digits = "4" + str(int(hashlib.sha256(tag.encode()).hexdigest(), 16))[:14]
    total = sum(int(d) if i % 2 else sum(divmod(int(d) * 2, 10)) for i, d in enumerate(digits))
    return digits + str(-total % 10)


@dataclass
class Message:
    """A request's or a response's headers and body."""

    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    chunked: bool = False


@dataclass
class Case:
    """One call with secrets in it."""

    name: str
    method: str = "POST"
    target: str = "/things"
    request: Message = field(default_factory=Message)
    response: Message = field(default_factory=Message)
    status: int = 200
    raises: str | None = None
    body_secrets: list[str] = field(default_factory=list)
    header_secrets: list[str] = field(default_factory=list)
    url_secrets: list[str] = field(default_factory=list)
    controls: list[str] = field(default_factory=list)

    @property
    def secrets(self) -> list[str]:
        return [*self.body_secrets, *self.header_secrets, *self.url_secrets]

    def body(self, tag: str) -> str:
        return self._plant(self.body_secrets, tag)

    def header(self, tag: str) -> str:
        return self._plant(self.header_secrets, tag)

    def url(self, tag: str) -> str:
        return self._plant(self.url_secrets, tag)

    def card(self, tag: str) -> str:
        number = card_for(f"{self.name} {tag}")
        TAGS[number] = f"{self.name}: card {tag}"
        if number not in self.body_secrets:
            self.body_secrets.append(number)
        return number

    def kept(self, tag: str) -> str:
        return self._plant(self.controls, f"control {tag}")

    def _plant(self, among: list[str], tag: str) -> str:
        secret = text_for(f"{self.name} {tag}")
        TAGS[secret] = f"{self.name}: {tag}"
        if secret not in among:
            among.append(secret)
        return secret


def _json(headers: dict[str, str] | None = None, **kinds: object) -> list[tuple[str, str]]:
    return [("Content-Type", "application/json"), *(headers or {}).items()]


def _typed(content_type: str, **more: str) -> list[tuple[str, str]]:
    return [("Content-Type", content_type), *((name.replace("_", "-"), value) for name, value in more.items())]


def _jwt(case: Case, tag: str, user: str) -> str:
    """A token whose every part is the secret's, and whose claim names the user."""

    def part(data: dict[str, str]) -> str:
        return base64.urlsafe_b64encode(json.dumps(data).encode()).decode().rstrip("=")

    return f"{part({'alg': 'none', 'kid': case.header(tag + ' kid')})}.{part({'sub': user})}.{case.header(tag)}"


def planted_cases() -> list[Case]:
    """Give one call for each place that a secret can be in."""
    return [make() for make in _MAKERS]


def _nested_json() -> Case:
    case = Case("nested JSON")
    request = {
        "user": {"Password": case.body("a"), "list": [{"api-key": case.body("b")}, [{"NICKNAME": [case.body("c"), {"x": case.body("d")}]}]]},
        "card": {"holder": "Ann", "number": case.card("e")},
        "cardNumber": " ".join(case.card("f")[i : i + 4] for i in (0, 4, 8, 12)),
        "credentials": {"login": case.body("g"), "pin": [case.body("h"), {"deep": case.body("i")}]},
        "link": f"https://x.example/?access_token={case.body('j')}&page=2",
        "text": json.dumps({"inner": json.dumps({"client_secret": case.body("k")})}),
        "max_tokens": 770_177,
        "token_count": 880_288,
        "note": case.kept("note"),
    }
    response = {
        "access_token": case.body("l"),
        "data": [{"salary": {"amount": case.body("m"), "currency": case.body("n")}}],
        "name": case.kept("name"),
        "next_page_token": case.kept("page"),
    }
    case.request = Message(_json(), json.dumps(request).encode())
    case.response = Message(_json(), json.dumps(response, indent=1).encode())
    case.controls += ["770177", "880288"]
    return case


def _escaped_json() -> Case:
    case = Case("escaped JSON")
    request = '{"pa\\u0073sword":"%s","\\u0070asswd":["%s"],"ni\\u0063kname":{"a":"%s"},"note":"%s"}'
    case.request = Message(_json(), (request % (case.body("a"), case.body("b"), case.body("c"), case.kept("note"))).encode())
    duplicate = '{"name":"%s","password":"x","password":"%s","secret" :\t"%s"}'
    case.response = Message(_json(), (duplicate % (case.kept("name"), case.body("d"), case.body("e"))).encode())
    return case


def _json_of_another_name() -> Case:
    case = Case("JSON under other types")
    case.request = Message(_typed("text/plain"), json.dumps({"password": case.body("a"), "note": case.kept("a")}).encode())
    wide = json.dumps({"password": case.body("b"), "note": case.kept("b")}).encode("utf-16")
    case.response = Message(_typed("application/problem+json; charset=utf-16"), wide)
    return case


def _ndjson() -> Case:
    case = Case("NDJSON")
    lines = [{"note": case.kept("a")}, {"token": case.body("a"), "nickname": 5}, {"x": [{"secret": {"y": case.body("b")}}]}]
    case.request = Message(_typed("application/x-ndjson"), b"\n".join(json.dumps(line).encode() for line in lines) + b"\n")
    sequence = b"".join(b"\x1e" + json.dumps(line).encode() + b"\n" for line in [{"salary": case.body("c")}, {"note": case.kept("b")}])
    case.response = Message(_typed("application/json-seq"), sequence)
    return case


def _sse() -> Case:
    case = Case("server-sent events")
    events = [
        f"event: delta\ndata: {json.dumps({'access_token': case.body('a'), 'text': case.kept('a')})}\n",
        f'data: {{"id_token":\ndata: "{case.body("b")}"}}\n',
        f"data: password={case.body('c')}\n",
        "data: [DONE]\n",
    ]
    case.response = Message(_typed("text/event-stream; charset=utf-8"), "\n".join(events).encode(), chunked=True)
    return case


def _form() -> Case:
    case = Case("form")
    pairs = (
        f"name={case.kept('a')}&p%61ssword={case.body('a')}&user%5Bpassword%5D={case.body('b')}&nick_name={case.body('c')}"
        f";{case.body('h')};x={case.body('i')}&card_no={case.card('d')}&payload={quote(json.dumps({'secret': case.body('e')}))}&next={quote('https://x/?token=' + case.body('f'))}"
    )
    case.request = Message(_typed("application/x-www-form-urlencoded"), pairs.encode())
    case.response = Message(_typed("application/x-www-form-urlencoded"), f"access_token={case.body('g')}&scope={case.kept('b')}".encode())
    return case


def _multipart() -> Case:
    case = Case("multipart")
    parts = [
        f'Content-Disposition: form-data; name="note"\r\n\r\n{case.kept("a")}',
        f'Content-Disposition: form-data; name="Pass-Word"\r\n\r\n{case.body("a")}',
        f'Content-Disposition: form-data; name=nickname\r\n\r\n{case.body("b")}',
        'Content-Disposition: form-data; name="doc"; filename="a.json"\r\nContent-Type: application/json\r\n\r\n'
        + json.dumps({"api_key": case.body("c")}),
        'Content-Disposition: form-data; name="log"\r\nContent-Transfer-Encoding: base64\r\n\r\n'
        + base64.b64encode(b'{"secret": "%s"}' % case.body("d").encode()).decode(),
        'Content-Disposition: form-data; name="zip"; filename="a.gz"\r\nContent-Type: application/gzip\r\n\r\n'
        + gzip.compress(b'{"secret": "%s"}' % case.body("e").encode()).decode("latin-1"),
    ]
    body = "".join(f"--frontier\r\n{part}\r\n" for part in parts).encode("latin-1") + b"--frontier--\r\n"
    case.request = Message(_typed('multipart/form-data; boundary="frontier"'), body)
    return case


def _urls() -> Case:
    case = Case("URLs", method="GET")
    case.target = (
        f"/search?q={case.kept('a')}&access_token={case.url('a')}&user%5Bpassword%5D={case.url('b')}&max_tokens=661166"
        f"&nickname={case.url('c')}&next={quote('https://x.example/cb#id_token=' + case.url('d'), safe='')}&p%61sswd={case.url('e')};{case.url('k')}&p={case.kept('d')}"
    )
    case.request.headers = [
        ("Referer", f"https://ann:{case.header('f')}@x.example/a?api_key={case.header('g')}&page={case.kept('b')}"),
        ("Origin", "https://x.example"),
    ]
    case.status = 302
    case.response.headers = [
        ("Location", f"/cb?state={case.kept('c')}#access_token={case.header('h')}&token_type=bearer"),
        ("Link", f'<https://x.example/?page=2&token={case.header("i")}>; rel="next"'),
        ("Refresh", f"5; url=https://x.example/?SALARY={case.header('j')}"),
    ]
    case.controls.append("661166")
    return case


def _headers() -> Case:
    case = Case("headers", method="GET")
    case.request.headers = [
        ("Authorization", f"Bearer {_jwt(case, 'a', 'user-of-the-token')}"),
        ("Proxy-Authorization", f"Basic {base64.b64encode(('ann:' + case.header('b')).encode()).decode()}"),
        ("Cookie", f"theme={case.kept('a')}; SessionID={case.header('c')}; access_token={case.header('d')}; X-custom-NOTE={case.header('e')}"),
        ("X-Api-Key", case.header("f")),
        ("x-AUTH-token", case.header("g")),
        ("x-cusTOM-note", case.header("h")),
        ("X-Request-Id", case.kept("b")),
        ("X-Odd", f"password={case.header('i')}"),
    ]
    case.response.headers = [
        ("Set-Cookie", f"session={case.header('j')}; Path=/; HttpOnly"),
        ("Set-Cookie", f"theme={case.kept('c')}; Max-Age=5"),
        ("X-Internal-Note", case.header("k")),
        ("X-Csrf-Token", case.header("l")),
        ("X-Kept", case.kept("d")),
    ]
    return case


def _schemes() -> Case:
    case = Case("authorization of no known scheme", method="GET")
    case.request.headers = [
        ("Authorization", case.header("a")),
        ("Proxy-Authorization", f'Digest username="ann", response="{case.header("b")}"'),
    ]
    return case


def _coded(coding: str) -> Callable[[], Case]:
    def make() -> Case:
        case = Case(f"coded {coding}")
        request = json.dumps({"password": case.body("a"), "note": case.kept("a")}).encode()
        response = json.dumps({"x": {"salary": [case.body("b")]}, "note": case.kept("b")}).encode()
        undo = CODINGS[coding]
        case.request = Message(_json({"Content-Encoding": coding}), undo(request))
        case.response = Message(_typed("text/html", Content_Encoding=coding), undo(response))
        return case

    return make


def _coded_twice() -> Case:
    case = Case("coded twice and unknown")
    data = json.dumps({"password": case.body("a")}).encode()
    case.request = Message(_json({"Content-Encoding": "gzip, br"}), brotli.compress(gzip.compress(data)))
    # A coding that nobody knows, and one that is not what it says.
    case.response = Message(_json({"Content-Encoding": "compress"}), b'{"secret": "%s"}' % case.body("b").encode())
    return case


def _chunked() -> Case:
    case = Case("chunked")
    case.request = Message(_json(), json.dumps({"password": case.body("a"), "note": case.kept("a")}).encode(), chunked=True)
    case.response = Message(_json(), json.dumps({"token": case.body("b"), "note": case.kept("b")}).encode(), chunked=True)
    return case


def _over_the_cap() -> Case:
    case = Case("JSON over the cap")
    filler = ["x" * 50] * (MAX_BODY_BYTES // 50 + 40)
    case.request = Message(_json(), json.dumps({"password": case.body("a"), "filler": filler, "secret": case.body("b")}).encode())
    lines = b"\n".join(json.dumps({"n": n, "token": case.body("c"), "text": "y" * 90}).encode() for n in range(80))
    case.response = Message(_typed("application/x-ndjson"), lines, chunked=True)
    return case


def _cut_values() -> Case:
    case = Case("cut in the middle of a value")
    padding = "z" * (MAX_BODY_BYTES - 40)
    secret = case.body("a")
    case.request = Message(_typed("application/x-www-form-urlencoded"), f"note={case.kept('a')}{padding}&password={secret}{secret}".encode()[: MAX_BODY_BYTES + 40])
    text = gzip.compress(json.dumps({"password": case.body("b"), "x": [hashlib.sha256(str(n).encode()).hexdigest() for n in range(400)]}).encode())
    case.response = Message(_json({"Content-Encoding": "gzip"}), text)
    return case


def _broken() -> Case:
    case = Case("broken JSON")
    case.request = Message(_json(), b'{"user": {"password": "%s"' % case.body("a").encode())
    case.response = Message(_json(), b'{"token": %s}' % case.body("b").encode())
    return case


def _error_pages() -> Case:
    case = Case("error pages", status=500)
    case.request = Message(_typed("text/xml"), f"<login><password>{case.body('a')}</password></login>".encode())
    page = f"<h1>Oops</h1><pre>connect(password='{case.body('b')}', api_key={case.body('c')})</pre>"
    case.response = Message(_typed("text/html"), page.encode())
    return case


def _unreadable() -> Case:
    case = Case("unknown types and charsets")
    case.request = Message([], f"secret: {case.body('a')}".encode())
    case.response = Message(_typed("text/plain; charset=utf-7"), f"p+AGE-ssword: {case.body('b')}".encode())
    return case


def _binary() -> Case:
    case = Case("content that is left out")
    case.request = Message(_typed("image/png"), b"\x89PNG\r\n\x1a\n" + case.body("a").encode())
    case.response = Message(_typed("application/zip"), b"PK\x03\x04" + case.body("b").encode() * 20)
    return case


def _raising() -> Case:
    case = Case("an application that raises")
    case.request = Message(_json(), json.dumps({"password": case.body("a"), "note": case.kept("a")}).encode())
    case.raises = f"no login with password={case.url('b')}"  # its own exporters may show it, as without us
    return case


_MAKERS: list[Callable[[], Case]] = [
    _nested_json,
    _escaped_json,
    _json_of_another_name,
    _ndjson,
    _sse,
    _form,
    _multipart,
    _urls,
    _headers,
    _schemes,
    *map(_coded, CODINGS),
    _coded_twice,
    _chunked,
    _over_the_cap,
    _cut_values,
    _broken,
    _error_pages,
    _unreadable,
    _binary,
    _raising,
]
