"""Copies what an event needs out of a WSGI environ: the environ itself is not kept after the request."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from moesif_otel._capture.authority import PATH_SAFE, QUERY_SAFE, authority_of, percent_encoded

if TYPE_CHECKING:
    from moesif_otel._capture.exchange import Headers

_UNPREFIXED: Final = (("Content-Type", "CONTENT_TYPE"), ("Content-Length", "CONTENT_LENGTH"))
# What is quoted nowhere. Most of what comes is that; `quote` goes over it byte by byte.
_PLAIN: Final = re.compile(r"[A-Za-z0-9_.~/:@!$&'()*+,;=-]*")
_BODYLESS_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


def url_of(environ: dict[str, Any]) -> str:
    """Return the full URL (PEP 3333, "URL Reconstruction"), with bytes beyond ASCII percent-encoded."""
    get = environ.get
    scheme = str(get("wsgi.url_scheme") or "http")
    host = authority_of(scheme, str(get("HTTP_HOST") or ""), get("SERVER_NAME"), get("SERVER_PORT"))
    path = f"{get('SCRIPT_NAME') or ''}{get('PATH_INFO') or ''}"
    query = get("QUERY_STRING")
    if _PLAIN.fullmatch(path) is None:
        path = percent_encoded(path, PATH_SAFE)
    if not path.startswith("/"):
        path = "/" + path
    if not query:
        return f"{scheme}://{host}{path}"
    return f"{scheme}://{host}{path}?{percent_encoded(str(query), QUERY_SAFE)}"


_MOST_KEY_SETS: Final = 256
_MAX_KEYS_CHARACTERS: Final = 4_096


def headers_of(environ: dict[str, Any]) -> Headers:
    """Return the request's headers, named as clients write them (`HTTP_USER_AGENT` is `User-Agent`)."""
    try:
        keys = tuple(environ)
        # What the keys say is worked out once for all requests with the same; clients choose names, so it is bounded.
        names_of = _remembered if len("".join(keys)) <= _MAX_KEYS_CHARACTERS else _header_names
        names, header_keys = names_of(keys)
    except TypeError:  # some key is no text
        names, header_keys = _header_names(tuple(key for key in environ if isinstance(key, str)))
    headers = list(zip(names, map(environ.__getitem__, header_keys), strict=True))
    # Headers without the prefix (PEP 3333, "environ Variables"); servers set them empty for those that are absent.
    for name, key in _UNPREFIXED:
        value = environ.get(key)
        if value:
            headers.append((name, value))
    for _, value in headers:
        if type(value) is not str:
            return [(name, str(value)) for name, value in headers]
    return headers


def _header_names(keys: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return the names of the headers among the keys of an environ, and those keys."""
    names = {key: key[5:].replace("_", "-").title() for key in keys if key.startswith("HTTP_") and len(key) > 5}
    if "HTTP_CGI_AUTHORIZATION" in names:
        # The name that some Apache set-ups use for a header that mod_cgi withholds.
        names["HTTP_CGI_AUTHORIZATION"] = "Authorization"
    return list(names.values()), list(names)


_remembered: Final = lru_cache(maxsize=_MOST_KEY_SETS)(_header_names)


def asks_for_upgrade(environ: dict[str, Any]) -> bool:
    """Tell whether the client asks for another protocol on this connection, as for a WebSocket (RFC 9110, 7.8)."""
    return bool(environ.get("HTTP_UPGRADE")) and "upgrade" in str(environ.get("HTTP_CONNECTION", "")).lower()


def may_have_body(environ: dict[str, Any], method: str) -> bool:
    """Tell whether a request body can come: a length above 0, a chunked request, or a method that has one anyway.

    A server that decodes chunks itself may hide the `Transfer-Encoding` and give no length (`wsgi.input_terminated`).
    """
    length = environ.get("CONTENT_LENGTH")
    if length:
        return bool(length != "0")
    return method not in _BODYLESS_METHODS or "HTTP_TRANSFER_ENCODING" in environ
