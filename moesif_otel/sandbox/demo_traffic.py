"""The calls that the demo makes: several users of several companies, each identified in another way.

Owns: the list of calls, and the governance rule that blocks one of them.
Threads: any; values.
Never: holds a real credential; what looks like one is made up here.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CALLS", "COMPANY_RULES", "GOVERNED_CALL", "RULE", "USER_HEADERS", "DemoCall"]

USER_HEADERS: Final = "authorization,x-user-token"
"""The option AUTHORIZATION_HEADER_NAME that finds every user below."""


@dataclass(frozen=True, slots=True)
class DemoCall:
    """One call; `body` is JSON unless it is bytes."""

    verb: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: object = None


def _part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def _bearer(user: str) -> str:
    return f"Bearer {_part({'alg': 'HS256', 'typ': 'JWT'})}.{_part({'sub': user})}.bm90LWEtc2lnbmF0dXJl"


_ANN: Final = {"Authorization": _bearer("ann"), "X-Company": "acme"}
_BOB: Final = {"Authorization": _bearer("bob"), "X-Company": "acme", "X-Region": "us-east"}
_CLI: Final = {"Authorization": "Basic " + base64.b64encode(b"carol:secret").decode(), "X-Company": "globex"}
_BOT: Final = {"X-User-Token": base64.b64encode(b'{"sub": "dave-bot"}').decode(), "X-Company": "initech"}

_CUP: Final = {"product": "cup", "quantity": 1}

CALLS: Final = (
    DemoCall("GET", "/users", _ANN),
    DemoCall("GET", "/users/ann", _ANN),
    DemoCall("POST", "/login", {"X-Company": "acme"}, {"user": "bob", "password": "hunter2"}),
    DemoCall("GET", "/orders?status=open", _BOB),
    DemoCall(
        "POST", "/orders", _BOB, {"items": [{"product": "tea", "quantity": 2}, {"product": "cup", "quantity": 1}]}
    ),
    DemoCall("GET", "/orders/export", _CLI),
    DemoCall("POST", "/users", _CLI, {"id": "erin", "name": "Erin Ellis", "plan": "gold"}),
    DemoCall("POST", "/users", _CLI, {"name": "Nobody"}),
    DemoCall("GET", "/users/erin", _BOT),
    DemoCall("GET", "/users/nobody", _BOT),
    DemoCall("POST", "/uploads", {**_BOT, "Content-Type": "application/octet-stream"}, bytes(range(256)) * 1_200),
    DemoCall("GET", "/reports/daily", _ANN),
    DemoCall("DELETE", "/orders/7", _BOB),
    DemoCall("GET", "/orders", {}),
    DemoCall("GET", "/nowhere?q=%C3%A9t%C3%A9", {}),
)

GOVERNED_CALL: Final = DemoCall("GET", "/orders?status=paid", _BOT)
"""A call that the rule below blocks, once its company is over the quota."""

RULE: Final[Mapping[str, object]] = {
    "_id": "demo-quota-rule",
    "type": "company",
    "state": 2,
    "name": "Companies over their quota",
    "block": True,
    "applied_to": "matching",
    "variables": [{"name": "0", "path": "company_id"}, {"name": "1", "path": "quota"}],
    "regex_config": [{"conditions": [{"path": "request.verb", "value": "GET"}]}],
    "response": {
        "status": 429,
        "headers": {"Retry-After": "60", "X-Quota": "{{1}}"},
        "body": {"error": "too_many", "message": "{{0}} has used its {{1}} calls of this month"},
    },
}
COMPANY_RULES: Final = {"initech": [{"rules": "demo-quota-rule", "values": {"0": "initech", "1": "1000"}}]}
"""The configuration's `company_rules`: who is over the quota, and what the rule's tags say to them."""
