"""Copies what an event needs out of an ASGI scope, at the start of a call.

Mounts and routers change a scope in place, so the parts are taken when the call opens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from moesif_otel._capture.authority import PATH_SAFE, QUERY_SAFE, authority_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moesif_otel._capture.exchange import Headers

_RAW_SAFE: Final = PATH_SAFE + "%"
_SCHEMES: Final = {"ws": "http", "wss": "https"}  # a handshake is an HTTP request


def url_of(scope: Any, headers: Any) -> str:
    """Return the full URL of a scope whose headers can be read."""
    get = scope.get
    scheme = str(get("scheme") or "http")
    scheme = _SCHEMES.get(scheme, scheme)
    target = _path(get("root_path") or "", get("raw_path"), str(get("path") or ""))
    query = get("query_string")
    url = f"{scheme}://{_authority(scheme, headers, get('server'))}{target}"
    return f"{url}?{quote(_bytes(query), safe=QUERY_SAFE)}" if query else url


def _authority(scheme: str, headers: Any, server: Any) -> str:
    host: Any = b""
    for name, value in headers:
        if value and (name == b"host" or _text(name).lower() == "host"):
            host = value
            break
    server_name, port = (*repeatable(server), None, None)[:2]
    return authority_of(scheme, _text(host), server_name, port)


def _path(root_path: str, raw_path: Any, path: str) -> str:
    # `raw_path` are the bytes as they came; some servers leave the query in it.
    found = (
        quote(_bytes(raw_path).partition(b"?")[0], safe=_RAW_SAFE) if raw_path else quote(_bytes(path), safe=PATH_SAFE)
    )
    root_path = root_path.rstrip("/")
    # The specification has `root_path` inside `path`; hypercorn, and uvicorn before 0.26, leave it out.
    if root_path and not f"{path}/".startswith(f"{root_path}/"):
        found = quote(_bytes(root_path), safe=PATH_SAFE) + found
    return found if found.startswith("/") else f"/{found}"


def text_headers(headers: Any) -> Headers:
    """Return headers, a list or tuple of (name, value) bytes, as text."""
    try:
        return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
    except AttributeError:  # text, or a memoryview: no server's, but some tool's
        return [(_text(name), _text(value)) for name, value in headers]


def repeatable(given: Iterable[Any] | None) -> Any:
    """Copy headers, or an address, that can be read twice; empty where reading would take them from the application."""
    if isinstance(given, (list, tuple)):
        return tuple(given)
    # The specification allows any iterable, also one that can be gone through once (Falcon's test client).
    return () if given is None or iter(given) is given else tuple(given)


def peer_address(scope: Any) -> str | None:
    """Return the address of the connection's other end; a Unix domain socket has none."""
    client = scope.get("client")
    # What can be gone through once is left to the application (`repeatable`).
    return str(client[0]) if isinstance(client, (list, tuple)) and client and client[0] else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value, "latin-1")


def _bytes(value: Any) -> bytes:
    if not isinstance(value, str):
        return bytes(value)
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a pair of surrogates, from JSON: an AWS event that an adapter takes apart
        return value.encode("utf-8", "surrogatepass")
