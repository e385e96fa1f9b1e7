"""What is asked of every server: requests, one for each way an application can answer, and the event each must become."""

from __future__ import annotations

import base64
import gzip
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.servers.harness import (
    RunningServer,
    ServerKind,
    eventually,
    leave,
    lines_of,
    read_all,
    read_until,
    request,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FILE_BYTES = 300_000
ANY: Any = object()


@dataclass
class Run:
    """One case on one server in one variant: the files it may use and what became of it."""

    server: RunningServer
    kind: ServerKind
    variant: str
    folder: Path
    case: Case

    @property
    def marker(self) -> Path:
        return self.folder / f"{self.case.name}-{self.variant or 'bare'}-{self.server.port}.marker"

    @property
    def target(self) -> str:
        path = self.case.path or "/" + self.case.name
        if not self.case.names_files:
            return f"{path}?case={self.case.name}"
        joint = "&" if "?" in path else "?"
        return (
            f"{path}{joint}case={self.case.name}&marker={self.marker}&file={self.folder / 'file.bin'}&size={FILE_BYTES}"
        )


def plain(run: Run) -> bytes:
    """Send the case's request, take the answer."""
    case = run.case
    raw = request(
        case.method, run.target, *case.headers, body=case.body, variant=run.variant, version=case.http_version
    )
    return run.server.exchange(raw)


def marked(run: Run) -> bytes:
    """As `plain`; what the application noted on the side counts as part of the answer."""
    answer = plain(run)
    noted = eventually(lambda: lines_of(run.marker), 5)
    return answer + b"\r\nnoted: " + repr(noted).encode()


def chunked(run: Run) -> bytes:
    """Send the body in two chunks."""
    body = run.case.body
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (body[:7], body[7:])) + b"0\r\n\r\n"
    head = request("POST", run.target, "Transfer-Encoding: chunked", *run.case.headers, variant=run.variant)
    return run.server.exchange(head + pieces)


def withheld(run: Run) -> bytes:
    """Announce a body and send nothing of it: an application that does not read is answered all the same."""
    body = b"z" * 1_000 if run.kind.reads_whole_request else b""
    head = request("POST", run.target, "Content-Length: 1000", "Content-Type: text/plain", variant=run.variant)
    with run.server.connect() as client:
        client.sendall(head + body)
        return read_until(client, b"too large")


def in_order(run: Run) -> bytes:
    """Let the application go on to its second piece only when the first one is here."""
    signal = run.folder / f"signal-{run.variant or 'bare'}-{run.server.port}"
    with run.server.connect() as client:
        client.sendall(request("GET", f"{run.target}&signal={signal}", variant=run.variant))
        got = read_until(client, b"first-piece;")
        signal.touch()
        return got + read_all(client)


def leaving(run: Run) -> bytes:
    """Go away in the middle; what the application noted of its `close()` is the answer."""
    client = run.server.connect()
    client.sendall(request("GET", run.target, variant=run.variant))
    # Beyond the captured part, so that the event has something to say about the size.
    head = read_until(client, b"x" * 4, at_least_bytes=200_000).split(b"\r\n\r\n")[0]
    leave(client)
    eventually(lambda: lines_of(run.marker))
    return head + b"\r\nnoted: " + repr(lines_of(run.marker)).encode()


@dataclass
class Case:
    """One request and what its event says; `ANY` is not looked at."""

    name: str
    path: str = ""
    method: str = "GET"
    headers: tuple[str, ...] = ()
    body: bytes = b""
    http_version: str = "1.1"
    drive: Callable[[Run], bytes] = plain
    status: Any = 200
    response_body: Any = ANY
    request_body: Any = ANY
    outcome: str | None = None
    check: Callable[[dict[str, Any], Run], None] = field(default=lambda event, run: None)
    runs_on: Callable[[ServerKind], bool] = lambda kind: True
    names_files: bool = True  # in the query
    has_client_bytes: bytes | None = None  # must be in what the client got, to know that the case works at all


def _text(content: str | bytes) -> tuple[str, str]:
    raw = content.encode() if isinstance(content, str) else content
    return (base64.b64encode(raw).decode(), "base64")


def _json(value: Any) -> tuple[Any, str]:
    return (value, "json")


def _cookies(event: dict[str, Any], run: Run) -> None:
    headers = {name.lower(): value for name, value in event["response"]["headers"].items()}
    assert all(cookie in headers["set-cookie"] for cookie in ("a=1; Path=/", "b=2", "c=3"))


def _mounted_uri(event: dict[str, Any], run: Run) -> None:
    assert event["request"]["uri"].startswith("http://shop.example:8443/api/v2/inside%20it?case=")


def _without_host(event: dict[str, Any], run: Run) -> None:
    # Servers name themselves in many ways (SERVER_NAME); the port is this server's.
    assert f":{run.server.port}/one-piece?" in event["request"]["uri"]


def _odd_path(event: dict[str, Any], run: Run) -> None:
    path = event["request"]["uri"].partition("?")[0]
    # Werkzeug's server replaces what is no UTF-8 before anybody sees it.
    odd = "%EF%BF%BD" if run.kind.name == "werkzeug" else "%FF"
    assert path == f"http://shop.example:8443/odd/{odd}%00%C3%A9/~x;a=b"


def _file_size(event: dict[str, Any], run: Run) -> None:
    ours = event.get("metadata", {}).get("moesif_otel", {})
    assert "outcome" not in ours
    if run.kind.sends_files:
        assert "body" not in event["response"]
        assert ours["response_body"]["size_bytes"] == FILE_BYTES


def _aborted_size(event: dict[str, Any], run: Run) -> None:
    assert event["metadata"]["moesif_otel"]["response_body"]["truncated"] is True


def _kept_id(event: dict[str, Any], run: Run) -> None:
    if run.variant == "on":
        assert event["transaction_id"] == "0F8FAD5B-D9CB-469F-A165-70867728950E"


_GZIP = gzip.compress(json.dumps({"in": "q" * 300}).encode(), mtime=0)

CASES = {
    case.name: case
    for case in (
        Case("list", response_body=_json({"pieces": [1, 2, 3]}), has_client_bytes=b"[1, 2, 3]"),
        Case("one-piece", response_body=_json({"pieces": 1}), has_client_bytes=b'{"pieces": 1}'),
        Case("tuple", response_body=_text("ab")),
        Case("closing-list", drive=marked, response_body=_text("one piece with a close"), has_client_bytes=b"'closed'"),
        Case("generator", response_body=_text("one two"), has_client_bytes=b"two"),
        Case("late", status=202, response_body=_text("late"), has_client_bytes=b"X-Late: yes"),
        Case("lazy-iterable", response_body=_text("from iter")),
        Case("write", response_body=_text("written twice returned"), has_client_bytes=b"returned"),
        Case("file", check=_file_size, has_client_bytes=b"\xff\xfe\n" * 100),
        Case("watched-file", "/file?watched=1", drive=marked, check=_file_size, runs_on=lambda kind: kind.sends_files),
        Case("head", method="HEAD", has_client_bytes=b"X-Head: yes"),
        Case("head-with-body", method="HEAD"),
        Case("no-content", status=204, has_client_bytes=b"X-Empty"),
        Case("not-modified", status=304),
        Case("redirect", status=302, has_client_bytes=b"/elsewhere?a=b"),
        Case("cookies", check=_cookies, has_client_bytes=b"c=3"),
        Case(
            "json-echo",
            "/echo",
            "POST",
            ("Content-Type: application/json",),
            b'{"a": [1, null]}',
            request_body=_json({"a": [1, None]}),
            response_body=_json({"a": [1, None]}),
            has_client_bytes=b'{"a": [1, null]}',
        ),
        Case("gzipped", response_body=_json({"text": "g" * 500})),
        Case(
            "gzip-request",
            "/echo",
            "POST",
            ("Content-Type: application/json", "Content-Encoding: gzip"),
            _GZIP,
            request_body=_json({"in": "q" * 300}),
        ),
        Case("lines", method="POST", body=b"a\nbb\nccc", request_body=_text("a\nbb\nccc"), has_client_bytes=b"2 3 3"),
        Case(
            "chunked-request",
            "/echo",
            "POST",
            body=b"chunked request body",
            drive=chunked,
            request_body=_text("chunked request body"),
            has_client_bytes=b"chunked request body",
            runs_on=lambda kind: kind.decodes_chunks,
        ),
        Case(
            "expect-continue",
            "/echo",
            "POST",
            ("Expect: 100-continue",),
            b"continued",
            request_body=_text("continued"),
            has_client_bytes=b"continued",
        ),
        Case("unread-upload", "/refuse", "POST", drive=withheld, status=413, has_client_bytes=b"too large"),
        Case("raises", status=500, outcome="error"),
        Case("raises-after-start", status=500, outcome="error"),
        Case("raises-midway", response_body=_text("first piece"), outcome="error", has_client_bytes=b"first piece"),
        # uWSGI's own start_response takes `exc_info` as an error, and no keywords: there both calls fail, as without us.
        Case(
            "error-page",
            status=500,
            response_body=_text("error page"),
            has_client_bytes=b"500 Oops",
            runs_on=lambda kind: kind.name != "uwsgi",
        ),
        Case("keyword-exc-info", response_body=_text("keyword"), runs_on=lambda kind: kind.name != "uwsgi"),
        Case("two-pieces", drive=in_order, response_body=_text("first-piece;second"), has_client_bytes=b"second"),
        Case(
            "endless",
            drive=leaving,
            outcome="client_aborted",
            check=_aborted_size,
            has_client_bytes=b"['closed early']",
        ),
        Case("mounted", "/api/v2/inside%20it", check=_mounted_uri, has_client_bytes=b"/api/v2|/inside it"),
        Case("no-host", "/one-piece", http_version="1.0", check=_without_host),
        Case("odd-path", "/odd/%ff%00%c3%a9/~x;a=b", check=_odd_path),
        Case("raw-bytes", "/raw/\xff\xe9%zz\xfc", status=ANY, names_files=False),
        Case("long-query", "/one-piece?" + "&".join(f"q{n}={n}" for n in range(200))),
        Case("not-there", "/nothing/here", response_body=_text("|/nothing/here")),
        Case(
            "known-id",
            "/one-piece",
            headers=("X-Moesif-Transaction-Id: 0F8FAD5B-D9CB-469F-A165-70867728950E",),
            check=_kept_id,
        ),
    )
}
