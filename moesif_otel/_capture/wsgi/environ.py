"""What an event needs of a WSGI environ, copied out of it so that the environ itself is not kept.

Owns: URL and header facts of PEP 3333 environs, whether a request may have a body.
Threads: the copies are made in the request's thread, URL and header texts are built later on ours.
Never: reads `wsgi.input`, keeps the environ.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from moesif_otel._capture.authority import is_authority

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._capture.exchange import Headers

__all__ = ["header_source", "may_have_body", "url_source"]

# CGI variables that are headers without the HTTP_ prefix (PEP 3333, "environ Variables"), and the name that some
# Apache set-ups use for a header that mod_cgi withholds.
_HEADERS_WITHOUT_PREFIX: Final = {
    "CONTENT_TYPE": "Content-Type",
    "CONTENT_LENGTH": "Content-Length",
    "HTTP_CGI_AUTHORIZATION": "Authorization",
}
_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}
# RFC 3986: pchar and "/" stay as they are in a path; what else may stand in a query; "%" of a raw query is kept.
_PATH_SAFE: Final = "/:@!$&'()*+,;=~"
_QUERY_SAFE: Final = _PATH_SAFE + "?%[]"
_BODYLESS_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


def url_source(environ: dict[str, Any]) -> Callable[[], str]:
    """Note what the full URL is made of; the function that comes back builds it.

    The rules are those of PEP 3333, "URL Reconstruction", with bytes beyond ASCII percent-encoded.
    """
    get = environ.get
    return partial(
        _build_url,
        get("wsgi.url_scheme"),
        get("HTTP_HOST"),
        get("SERVER_NAME"),
        get("SERVER_PORT"),
        get("SCRIPT_NAME"),
        get("PATH_INFO"),
        get("QUERY_STRING"),
    )


def _build_url(  # noqa: PLR0917 - the variables of PEP 3333's reconstruction, in its order
    scheme: Any, host: Any, server_name: Any, server_port: Any, script_name: Any, path_info: Any, query: Any
) -> str:
    scheme = str(scheme or "http")
    authority = str(host or "").strip()
    if not is_authority(authority):
        authority = str(server_name or "localhost")
        if ":" in authority and not authority.startswith("["):
            authority = f"[{authority}]"
        port = str(server_port or "")
        if port and port != _DEFAULT_PORTS.get(scheme):
            authority = f"{authority}:{port}"
    path = _quoted(script_name, _PATH_SAFE) + _quoted(path_info, _PATH_SAFE)
    if not path.startswith("/"):
        path = "/" + path
    url = f"{scheme}://{_quoted(authority, _QUERY_SAFE)}{path}"
    return f"{url}?{_quoted(query, _QUERY_SAFE)}" if query else url


def _quoted(text: Any, safe: str) -> str:
    if not text:
        return ""
    text = str(text)
    try:
        # WSGI strings are bytes decoded as latin-1 (PEP 3333, "Unicode Issues").
        raw = text.encode("latin-1")
    except UnicodeEncodeError:
        raw = text.encode("utf-8", "surrogatepass")
    return quote(raw, safe=safe)


def header_source(environ: dict[str, Any]) -> Callable[[], Headers]:
    """Note the request's headers; the function that comes back names them (`HTTP_USER_AGENT` → `User-Agent`)."""
    # This pass over the environ is one of the larger costs of a request: nothing is decided here that can wait.
    headers = [item for item in environ.items() if item[0][:5] == "HTTP_"]
    content_type, content_length = environ.get("CONTENT_TYPE"), environ.get("CONTENT_LENGTH")
    if content_type:
        headers.append(("CONTENT_TYPE", content_type))
    if content_length:
        headers.append(("CONTENT_LENGTH", content_length))
    return partial(_name_headers, headers)


def _name_headers(items: list[tuple[str, Any]]) -> Headers:
    return [(_HEADERS_WITHOUT_PREFIX.get(key) or key[5:].replace("_", "-").title(), str(value)) for key, value in items]


def may_have_body(environ: dict[str, Any]) -> bool:
    """Whether a request body can come: a length above 0, a chunked request, or a method that has one without either.

    A server that decodes chunks itself may hide the `Transfer-Encoding` and give no length (`wsgi.input_terminated`).
    """
    length = environ.get("CONTENT_LENGTH")
    if length:
        return bool(length != "0")
    return bool(environ.get("HTTP_TRANSFER_ENCODING")) or environ.get("REQUEST_METHOD") not in _BODYLESS_METHODS
