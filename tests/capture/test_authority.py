"""The Host header: whatever a client writes there, path and query of a recorded URL stay what they are."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesif_otel._capture.asgi.scope import url_of as asgi_url
from moesif_otel._capture.authority import is_authority
from moesif_otel._capture.tornado.capture import _full_url
from moesif_otel._capture.wsgi.environ import url_of as wsgi_url
from moesif_otel._guard import Guard
from moesif_otel._pipeline.governance import GovernedRequest
from moesif_otel._remote.config import DEFAULT_CONFIG
from moesif_otel._remote.governance import RuleSet

if TYPE_CHECKING:
    from collections.abc import Callable

HOSTILE = [
    "x?",
    "x/ok?",
    "[",
    "]",
    "x#",
    "x\\",
    "[::",
    "[::1",
    "a b",
    "user@x",
    "x:y",
    "[x]",
    "//x",
    "?",
    "x" * 300,
    "::1",
]


def wsgi(host: str, path: str) -> str:
    environ = {"wsgi.url_scheme": "http", "HTTP_HOST": host, "SERVER_NAME": "own", "SERVER_PORT": "80"}
    return wsgi_url({**environ, "SCRIPT_NAME": "/mount", "PATH_INFO": path, "QUERY_STRING": "a=1"})


def asgi(host: str, path: str) -> str:
    scope = {"scheme": "http", "server": ("own", 80), "root_path": "/mount", "path": path, "query_string": b"a=1"}
    return asgi_url(scope, [(b"host", host.encode("utf-8", "surrogateescape"))])


def tornado(host: str, path: str) -> str:
    return _full_url("http", host, f"/mount{quote(path)}?a=1")


@pytest.mark.parametrize("host", HOSTILE)
@pytest.mark.parametrize("url_of", [wsgi, asgi, tornado])
def test_a_rule_on_the_path_is_not_passed_by_the_host(host: str, url_of: Callable[[str, str], str]) -> None:
    """`GET /mount/admin` with a Host that is none: blocked by `^/mount/admin$`, and recorded as what it was."""
    url = url_of(host, "/admin")
    assert url in {"http://own/mount/admin?a=1", "http://localhost/mount/admin?a=1"}
    condition = {"conditions": [{"path": "request.route", "value": "^/mount/admin$"}]}
    rule = {"_id": "r", "type": "regex", "block": True, "regex_config": [condition], "response": {"status": 403}}
    exchange: Any = SimpleNamespace(
        method="GET",
        url=url,
        request_headers=[],
        peer_address=None,
        pipeline=SimpleNamespace(guard=Guard()),
        company_id=None,
    )
    assert GovernedRequest(RuleSet.from_json(json.dumps([rule]).encode(), Guard()), DEFAULT_CONFIG, exchange).verdict()


@pytest.mark.parametrize("name", ["Cheroot/11.1.2", "a b", "/tmp/socket", "unix:/run/x?", "[", ""])
def test_a_server_that_has_no_name_is_localhost(name: str) -> None:
    """What a server calls itself stands for the host only where it is one."""
    environ = {"wsgi.url_scheme": "http", "HTTP_HOST": "[", "SERVER_NAME": name, "SERVER_PORT": "8080"}
    assert wsgi_url({**environ, "SCRIPT_NAME": "", "PATH_INFO": "/admin"}) == "http://localhost:8080/admin"
    scope = {"scheme": "http", "server": (name, 8080), "path": "/admin", "query_string": b""}
    assert asgi_url(scope, [(b"host", b"x?")]) == "http://localhost:8080/admin"
    assert asgi_url({**scope, "server": (name, None)}, []) == "http://localhost/admin"
    assert asgi_url({**scope, "server": ("::1", 8080)}, []) == "http://[::1]:8080/admin"


@given(st.text(max_size=20), st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=10))
def test_whatever_the_host_says_the_path_stays(host: str, path: str) -> None:
    """For any Host and any path: the URL can be split, and its path and query are those of the request."""
    for url_of in (wsgi, asgi, tornado):
        if url_of is wsgi and not (host + path).isascii():
            continue  # WSGI strings are latin-1 of bytes
        parts = urlsplit(url_of(host, f"/{path}"))
        assert parts.path == "/mount" + quote(f"/{path}", safe="/:@!$&'()*+,;=~" if url_of is not tornado else "/")
        assert (parts.query, parts.fragment) == ("a=1", "")


@pytest.mark.parametrize(
    "host", ["h", "h:80", "h:", "a.b-c_d.example:8080", "127.0.0.1", "[::1]", "[::1]:80", "%C3%A9", "[::ffff:1.2.3.4]"]
)
def test_what_is_an_authority_stays(host: str) -> None:
    """Names, addresses, ports and encoded letters."""
    assert is_authority(host)
    assert urlsplit(wsgi(host.replace("%C3%A9", "é"), "/x")).path == "/mount/x"
    assert tornado(host, "/x").startswith(f"http://{host}/")


@pytest.mark.parametrize("target", ["http://[/admin", "http://x?/admin", "http:///admin", "https://u@h/admin"])
def test_an_absolute_target_with_no_host_is_a_path(target: str) -> None:
    """Tornado routes by the target as it came; its URL must not be read in another way."""
    assert _full_url("http", "h", target) == f"http://h/{target}"
    assert _full_url("http", "h", "http://other:80/admin") == "http://other:80/admin"


def test_a_fragment_is_part_of_a_tornado_path() -> None:
    """Tornado routes `/a#b` as it stands: nothing of it may be lost to a rule."""
    assert _full_url("http", "h", "/files/#/secret") == "http://h/files/%23/secret"
