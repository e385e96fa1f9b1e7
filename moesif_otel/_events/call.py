"""What an event is built from, whether an Exchange or a bare span told it.

Owns: `Call` and `Content`, the one shape that both sources are brought to before anything is hidden.
Threads: a Call lives within one `build_event`.
Never: leaves the process: it holds what nobody has looked through yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from moesif_otel._capture.exchange import Headers

__all__ = ["Call", "Content"]


@dataclass(slots=True, repr=False)  # a `repr` would show what nobody has looked through
class Content:
    """A body as it was captured.

    Attributes:
        data: The captured bytes, Content-Encoding and all.
        total_bytes: True size of the body.
        left_out: Why nothing was captured, if something was not.
        decoded: Whether the Content-Encoding was undone before (`requests` does so for its callers).
    """

    data: bytes
    total_bytes: int
    left_out: str | None = None
    decoded: bool = False


@dataclass(slots=True, repr=False)
class Call:
    """One request and its response, unmasked.

    Attributes:
        status: None: no answer came, or none was sent.
        peer_address: Other end of an incoming call's connection.
        client_address: Who made an incoming call, found in headers or connection.
        server_address: Address that answered an outgoing call.
        user_id, company_id, session_token, metadata: As the application gave them, of any type.
        ours: What `metadata.moesif_otel` says.
        attributes: The application's own attributes of the span.
        exceptions: `{"type": …, "message": …}` of the span's exception events.
    """

    direction: Literal["Incoming", "Outgoing"]
    method: str
    url: str
    started_ns: int
    ended_ns: int
    status: int | None = None
    request_headers: Headers = field(default_factory=list)
    response_headers: Headers = field(default_factory=list)
    request_body: Content | None = None
    response_body: Content | None = None
    peer_address: str | None = None
    client_address: str | None = None
    server_address: str | None = None
    user_id: Any = None
    company_id: Any = None
    session_token: Any = None
    metadata: Any = None
    blocked_by: str | None = None
    transaction_id: str | None = None
    weight: int = 1
    trace_id: int = 0
    span_id: int = 0
    parent_span_id: int | None = None
    links: list[dict[str, str]] = field(default_factory=list)
    span_status: str | None = None
    ours: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    exceptions: list[dict[str, str]] = field(default_factory=list)
