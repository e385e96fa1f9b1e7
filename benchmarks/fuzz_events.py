"""Feed the parsers of events/ with hostile bytes: no exception, no time beyond linear.

Run by hand: `python benchmarks/fuzz_events.py [seconds] [seed]`. Prints, for each parser, how many inputs it was given
and the longest time it took for a byte, over inputs of at least 1 KB (below that the clock's own cost counts). A run
ends with a growth test: inputs built to hurt, at 12 and 50 KB, whose time for a byte must not grow.
"""

from __future__ import annotations

import base64
import gzip
import json
import random
import sys
import time
import zlib
from typing import TYPE_CHECKING, Any

import orjson

from moesif_otel._events.body import read_body
from moesif_otel._events.caller import client_address, user_from_headers
from moesif_otel._redaction.headers import redact_headers
from moesif_otel._redaction.rules import Rules
from moesif_otel._redaction.text import redact_text, redact_url

if TYPE_CHECKING:
    from collections.abc import Callable

RULES = Rules(["ssn", "straße"], ["x-secret"], auto=True)
PLAIN = Rules(auto=True)
TYPES = (
    *(None, "application/json", "application/json; charset=utf-16", "application/x-ndjson", "text/event-stream"),
    *(
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=b",
        'multipart/mixed; boundary="b"',
        "text/html",
    ),
    *(
        "text/plain; charset=utf-7",
        "application/octet-stream",
        "multipart/mixed",
        "text/plain; charset=gb18030",
        ';=;"',
    ),
)
CODINGS = (None, "gzip", "deflate", "br", "zstd", "gzip, gzip", "br, zstd", "nonsense")
WORDS = (
    *(
        b'{"',
        b'"password"',
        b":",
        b'"x"',
        b"}",
        b"[",
        b"]",
        b",",
        b"\\u0070assword",
        b"\\",
        b'\\"',
        b"=",
        b"&",
        b";",
        b"?",
        b"#",
    ),
    *(
        b"%",
        b"%25",
        b"%70",
        b"+",
        b"@",
        b"://",
        b"token",
        b"card",
        b"4111111111111111",
        b" 4111 1111",
        b"--b",
        b"\r\n",
        b"\n\n",
    ),
    *(
        b"data: ",
        b"Content-Disposition: form-data; name=",
        b"content-transfer-encoding: base64\r\n\r\n",
        b"\x00",
        b"\xff\xfe",
    ),
    *(
        b"\x1f\x8b\x08\x00",
        b"x\x9c",
        b"\x28\xb5\x2f\xfd",
        b"\xed\xa0\x80",
        b"null",
        b"1e999",
        b"-",
        b".",
        b"Bearer ",
        b"for=",
        b"a",
    ),
)


def body(data: bytes, random_: random.Random) -> None:
    rules = random_.choice([None, RULES, PLAIN])
    found = read_body(
        data,
        random_.choice(TYPES),
        random_.choice(CODINGS),
        truncated=random_.random() < 0.3,
        parse=random_.random() < 0.5,
        max_decoded_bytes=450_000,
        rules=rules,
    )
    if found.transfer_encoding == "json" and random_.random() < 0.1 and not isinstance(found.value, (dict, list)):
        orjson.loads(orjson.dumps(found.value))


def identity(data: bytes, random_: random.Random) -> None:
    text = data.decode("latin-1")
    coded = base64.b64encode(data).decode()
    for value in (text, f"Bearer {text}", f"Basic {coded}", f"Bearer a.{coded}.b"):
        user_from_headers({"authorization": value}, ("authorization",), "sub")


def client_ip(data: bytes, random_: random.Random) -> None:
    text = data.decode("latin-1")
    for name in ("x-forwarded-for", "forwarded", "x-client-ip"):
        client_address({name: text}, "1.1.1.1")


def redact(data: bytes, random_: random.Random) -> None:
    text = data.decode("utf-8", "surrogateescape")
    redact_text(RULES, text)
    redact_url(PLAIN, text)
    redact_headers(PLAIN, [("Cookie", text), ("Set-Cookie", text), ("Authorization", text), ("Referer", text)])


PARSERS: dict[str, Callable[[bytes, random.Random], None]] = {
    "body": body,
    "identity": identity,
    "client_ip": client_ip,
    "redact": redact,
}


def make(random_: random.Random) -> bytes:
    """One hostile input: words in any order, repeated, nested, compressed, or broken."""
    kind = random_.randrange(7)
    size = random_.choice([3, 30, 300, 3_000])
    if kind == 0:
        return random_.randbytes(size)
    if kind == 1:
        return b"".join(random_.choice(WORDS) for _ in range(size))
    if kind == 2:
        return b"".join(random_.choice(WORDS) for _ in range(random_.randint(1, 4))) * size
    value: Any = {"password": "x", "a": [1, None], "u": "https://u:p@h/?token=1", "card": {"n": 4111111111111111}}
    for _ in range(random_.randrange(6)):
        value = random_.choice([[value, value], {"t": json.dumps(value)}, {"k": value, "ssn": [value]}])
    data = bytearray(json.dumps(value).encode(random_.choice(["utf-8", "utf-16", "latin-1"])))
    if kind == 3:
        return bytes(data)
    for _ in range(random_.randint(1, 10)):
        at = random_.randrange(len(data))
        data[at : at + random_.randrange(3)] = random_.choice(WORDS)
    return (
        bytes(data)
        if kind == 4
        else random_.choice([gzip.compress, zlib.compress])(bytes(data)) + random_.randbytes(kind - 5)
    )


def run(seconds: float, seed: int) -> None:
    random_ = random.Random(seed)
    count = dict.fromkeys(PARSERS, 0)
    worst_ns = dict.fromkeys(PARSERS, 0.0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = make(random_)
        for name, parse in PARSERS.items():
            start = time.thread_time_ns()
            parse(data, random_)
            took = time.thread_time_ns() - start
            count[name] += 1
            if len(data) >= 1_024:
                worst_ns[name] = max(worst_ns[name], took / len(data))
    for name in PARSERS:
        print(f"{name:10} {count[name]:>9,} inputs, no exception; at most {worst_ns[name]:,.0f} ns a byte")


def grow() -> None:
    """Inputs built to hurt: the time for a byte at 50 KB beside that at 12 KB."""
    random_ = random.Random(1)
    patterns = [b"".join(random_.choice(WORDS) for _ in range(random_.randint(1, 3))) for _ in range(120)]
    patterns += [
        b"a=",
        b'a="',
        b"password=",
        b'"password":"',
        b"--b\r\n\r\n",
        b"password:'\\\\\\",
        b"a" * 50,
        b"://",
        b"4111 ",
        b"%2525",
    ]
    ratio, where = 0.0, b""
    for pattern in patterns:
        for name, parse in PARSERS.items():
            times = []
            for size in (12_500, 50_000):
                data = (pattern * (size // len(pattern) + 1))[:size]
                best = min(timed(parse, data) for _ in range(3))
                times.append(best / size)
            if times[1] > 200 and times[1] / max(times[0], 1) > ratio:
                ratio, where = times[1] / max(times[0], 1), name.encode() + b" " + pattern
    print(f"growth     time for a byte at 50 KB is at most {ratio:.1f} times that at 12 KB ({where!r})")


def timed(parse: Callable[[bytes, random.Random], None], data: bytes) -> int:
    start = time.thread_time_ns()
    parse(data, random.Random(7))
    return time.thread_time_ns() - start


if __name__ == "__main__":
    run(float(sys.argv[1]) if len(sys.argv) > 1 else 120.0, int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    grow()
