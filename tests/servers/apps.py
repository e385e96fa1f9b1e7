"""The application that every server of these tests runs: one path for each way a WSGI application can answer.

`application` is bare unless `SERVERS_BASE_URI` is set; then the header `X-Variant` chooses what stands around it:
`on` (MoesifMiddleware as it comes), `off` (`DISABLED_TRANSACTION_ID`, another application id), else nothing.
"""

from __future__ import annotations

import gzip
import json
import os
import time
from urllib.parse import parse_qs

_PATIENCE_S = 20
_PIECE = b"x" * 65_536


class Wait:
    """Waits for a file that the client makes when it has seen what was sent before."""

    @staticmethod
    def for_file(path):
        deadline = time.monotonic() + _PATIENCE_S
        while not os.path.exists(path):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True


def mark(path, text):
    """Leave a line where the test looks for it; one write, so that it is whole."""
    handle = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    try:
        os.write(handle, text.encode() + b"\n")
    finally:
        os.close(handle)


def say(start_response, body, status="200 OK", headers=()):
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body))), *headers])
    return [body]


def a_list(environ, start_response, query):
    start_response("200 OK", [("Content-Type", "application/json"), ("X-Order", "1"), ("x-order", "2")])
    return [b'{"pieces": ', b"[1, 2, 3]", b"}"]


def one_piece(environ, start_response, query):
    # No Content-Length: servers may take it from the length of the result.
    start_response("200 OK", [("Content-Type", "application/json")])
    return [b'{"pieces": 1}']


def a_tuple(environ, start_response, query):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return (b"a", b"b")


class Closing(list):
    """A list with a `close`, as frameworks return them."""

    def __init__(self, pieces, path):
        super().__init__(pieces)
        self.path = path

    def close(self):
        mark(self.path, "closed")


def a_closing_list(environ, start_response, query):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return Closing([b"one piece with a close"], query["marker"])


def a_generator(environ, start_response, query):
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"one "
    yield b""
    yield b"two"


def late(environ, start_response, query):
    yield from ()
    start_response("202 Accepted", [("Content-Type", "text/plain"), ("X-Late", "yes")])
    yield b"late"


def lazy_iterable(environ, start_response, query):
    class Body:
        def __iter__(self):
            start_response("200 OK", [("Content-Type", "text/plain")])
            return iter([b"from ", b"iter"])

    return Body()


def writing(environ, start_response, query):
    write = start_response("200 OK", [("Content-Type", "text/plain")])
    write(b"written ")
    write(b"twice ")
    return [b"returned"]


class WatchedFile:
    """A file that tells how the server took it: by reads, or by its descriptor (sendfile)."""

    def __init__(self, path, marker):
        self._file = open(path, "rb")
        self._marker = marker
        self.reads = 0

    def read(self, *size):
        self.reads += 1
        return self._file.read(*size)

    def fileno(self):
        return self._file.fileno()

    def tell(self):
        return self._file.tell()

    def seek(self, *place):
        return self._file.seek(*place)

    def seekable(self):
        return True

    def __iter__(self):
        # Only a server that was handed something else than its own file wrapper comes here.
        mark(self._marker, "iterated")
        return iter(lambda: self._file.read(8192), b"")

    def close(self):
        self._file.close()
        mark(self._marker, "read" if self.reads else "by descriptor")


def a_file(environ, start_response, query):
    wrapper = environ.get("wsgi.file_wrapper")
    start_response("200 OK", [("Content-Type", "application/octet-stream"), ("Content-Length", query["size"])])
    if wrapper is None:
        with open(query["file"], "rb") as file:
            return [file.read()]
    file = WatchedFile(query["file"], query["marker"]) if query.get("watched") else open(query["file"], "rb")
    return wrapper(file)


def head(environ, start_response, query):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "5"), ("X-Head", "yes")])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [b"hello"]


def head_with_body(environ, start_response, query):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "5")])
    return [b"hello"]


def no_content(environ, start_response, query):
    start_response("204 No Content", [("X-Empty", "yes")])
    return []


def not_modified(environ, start_response, query):
    start_response("304 Not Modified", [("ETag", '"e"')])
    return [b""]


def redirect(environ, start_response, query):
    return say(start_response, b"", "302 Found", [("Location", "/elsewhere?a=b")])


def cookies(environ, start_response, query):
    return say(
        start_response,
        b"cookies",
        headers=[("Set-Cookie", "a=1; Path=/"), ("X-Between", "x"), ("Set-Cookie", "b=2"), ("set-cookie", "c=3")],
    )


def echo(environ, start_response, query):
    if environ.get("wsgi.input_terminated"):
        body = environ["wsgi.input"].read()
    else:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response(
        "200 OK",
        [("Content-Type", environ.get("CONTENT_TYPE") or "text/plain"), ("Content-Length", str(len(body)))],
    )
    return [body]


def lines(environ, start_response, query):
    stream, left, found = environ["wsgi.input"], int(environ.get("CONTENT_LENGTH") or 0), []
    while left > 0:
        line = stream.readline(left)
        if not line:
            break
        left -= len(line)
        found.append(str(len(line)))
    return say(start_response, " ".join(found).encode())


def refuse(environ, start_response, query):
    return say(start_response, b"too large", "413 Content Too Large")


def gzipped(environ, start_response, query):
    body = gzip.compress(json.dumps({"text": "g" * 500}).encode(), mtime=0)
    return say(start_response, body, headers=[("Content-Encoding", "gzip"), ("Content-Type", "application/json")])


def raises(environ, start_response, query):
    raise RuntimeError("before")


def raises_after_start(environ, start_response, query):
    start_response("200 OK", [("Content-Type", "text/plain")])
    raise RuntimeError("after start_response")


def raises_midway(environ, start_response, query):
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"first piece"
    raise RuntimeError("midway")


def error_page(environ, start_response, query):
    start_response("200 OK", [("Content-Type", "text/plain")])
    try:
        raise ValueError("page")
    except ValueError as error:
        start_response("500 Oops", [("Content-Type", "text/plain")], (ValueError, error, error.__traceback__))
    return [b"error page"]


def keyword_exc_info(environ, start_response, query):
    start_response("200 OK", [("Content-Type", "text/plain")], exc_info=None)
    return [b"keyword"]


def two_pieces(environ, start_response, query):
    """Yields the second piece only when the client says, by a file, that it has the first."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"first-piece;"
    yield b"second" if Wait.for_file(query["signal"]) else b"nobody saw the first piece"


class Endless:
    def __init__(self, marker):
        self.marker = marker
        self.left = 4_000

    def __iter__(self):
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        self.left -= 1
        return _PIECE

    def close(self):
        mark(self.marker, f"closed {'early' if self.left else 'at the end'}")


def endless(environ, start_response, query):
    start_response("200 OK", [("Content-Type", "application/octet-stream")])
    return Endless(query["marker"])


def download(environ, start_response, query):
    start_response("200 OK", [("Content-Type", "application/octet-stream"), ("Content-Length", query["size"])])
    for _ in range(int(query["size"]) // len(_PIECE)):
        # A new object each time: what we kept of it by reference would show.
        yield bytes(len(_PIECE))


def upload(environ, start_response, query):
    stream, total = environ["wsgi.input"], 0
    length = int(environ["CONTENT_LENGTH"])
    while total < length:
        piece = stream.read(min(65_536, length - total))
        if not piece:
            break
        total += len(piece)
    return say(start_response, str(total).encode())


def memory(environ, start_response, query):
    """Resident bytes of this worker, now and at most since the last question."""
    with open("/proc/self/status", encoding="ascii") as status:
        rows = dict(line.split(":", 1) for line in status)
    found = {name: int(rows[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}
    with open("/proc/self/clear_refs", "w", encoding="ascii") as reset:
        reset.write("5")
    return say(start_response, json.dumps(found).encode())


def pid(environ, start_response, query):
    return say(start_response, str(os.getpid()).encode())


def hang(environ, start_response, query):
    mark(query["marker"], "hanging")
    time.sleep(600)
    return say(start_response, b"late")


ROUTES = {
    "/" + name.replace("_", "-"): function
    for name, function in {
        "list": a_list,
        "one_piece": one_piece,
        "tuple": a_tuple,
        "closing_list": a_closing_list,
        "generator": a_generator,
        "late": late,
        "lazy_iterable": lazy_iterable,
        "write": writing,
        "file": a_file,
        "head": head,
        "head_with_body": head_with_body,
        "no_content": no_content,
        "not_modified": not_modified,
        "redirect": redirect,
        "cookies": cookies,
        "echo": echo,
        "lines": lines,
        "refuse": refuse,
        "gzipped": gzipped,
        "raises": raises,
        "raises_after_start": raises_after_start,
        "raises_midway": raises_midway,
        "error_page": error_page,
        "keyword_exc_info": keyword_exc_info,
        "two_pieces": two_pieces,
        "endless": endless,
        "download": download,
        "upload": upload,
        "memory": memory,
        "pid": pid,
        "hang": hang,
    }.items()
}


def bare(environ, start_response):
    query = {name: values[0] for name, values in parse_qs(environ.get("QUERY_STRING", "")).items()}
    route = ROUTES.get(environ.get("PATH_INFO", ""))
    if route is None:
        path = environ.get("SCRIPT_NAME", "") + "|" + environ.get("PATH_INFO", "")
        return say(start_response, path.encode("latin-1", "replace"))
    return route(environ, start_response, query)


def mounted(app):
    """Serve everything below /api/v2 as an application that is mounted there."""

    def serve(environ, start_response):
        path = environ.get("PATH_INFO", "")
        if path.startswith("/api/v2/"):
            environ["SCRIPT_NAME"] = environ.get("SCRIPT_NAME", "") + "/api/v2"
            environ["PATH_INFO"] = path[len("/api/v2") :]
        return app(environ, start_response)

    return serve


def observed(app):
    from moesif_otel.wsgi import MoesifMiddleware

    options = {
        "BASE_URI": os.environ["SERVERS_BASE_URI"],
        "EVENT_BATCH_TIMEOUT": 0.1,
        "ACCEPT_TRANSACTION_ID": True,
        **json.loads(os.environ.get("SERVERS_OPTIONS", "{}")),
    }
    name = os.environ.get("SERVERS_NAME", "servers")
    variants = {
        "on": MoesifMiddleware(app, {"APPLICATION_ID": f"{name}-on", **options}),
        "off": MoesifMiddleware(app, {"APPLICATION_ID": f"{name}-off", **options, "DISABLED_TRANSACTION_ID": True}),
    }

    def choose(environ, start_response):
        return variants.get(environ.get("HTTP_X_VARIANT"), app)(environ, start_response)

    return choose


application = mounted(observed(bare) if os.environ.get("SERVERS_BASE_URI") else bare)
