"""The calls that the demo makes: several users of several companies, each identified in another way.

Nothing here is a real credential; what looks like one is made up, to be hidden.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ACTIONS",
    "CALLS",
    "COMPANIES",
    "COMPANY_RULES",
    "GOVERNED_CALL",
    "PNG",
    "RULES",
    "SUBSCRIPTIONS",
    "USERS",
    "USER_HEADERS",
    "DemoCall",
]

USER_HEADERS: Final = "authorization,x-user-token"
"""The option AUTHORIZATION_HEADER_NAME that finds every user below."""


@dataclass(frozen=True, slots=True)
class DemoCall:
    """One call; `body` is JSON unless it is bytes."""

    verb: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: object = None

    @property
    def data(self) -> bytes | None:
        """The body as it is sent."""
        if self.body is None or isinstance(self.body, bytes):
            return self.body
        return json.dumps(self.body).encode()

    @property
    def all_headers(self) -> dict[str, str]:
        """The headers as they are sent."""
        is_json = self.body is not None and not isinstance(self.body, bytes)
        return {
            "Accept": "application/json",
            **({"Content-Type": "application/json"} if is_json else {}),
            **self.headers,
        }


def _part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def _bearer(user: str) -> str:
    return f"Bearer {_part({'alg': 'HS256', 'typ': 'JWT'})}.{_part({'sub': user})}.bm90LWEtc2lnbmF0dXJl"


_ANN: Final = {"Authorization": _bearer("ann"), "X-Company": "acme", "User-Agent": "ShopApp/4.2 (iPhone; iOS 18.1)"}
_BOB: Final = {"Authorization": _bearer("bob"), "X-Company": "acme", "X-Region": "us-east", "User-Agent": "ShopApp/4.1"}
_CLI: Final = {
    "Authorization": "Basic " + base64.b64encode(b"carol@globex.example:secret").decode(),
    "X-Company": "globex",
    "User-Agent": "curl/8.9.1",
}
_BOT: Final = {
    "X-User-Token": base64.b64encode(b'{"sub": "dave-bot"}').decode(),
    "X-Company": "initech",
    "User-Agent": "initech-sync/0.9",
}
_EVE: Final = {
    "Authorization": _bearer("eve"),
    "X-Company": "umbrella",
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64)",
}
_FORM: Final = {"Content-Type": "application/x-www-form-urlencoded"}
_BOUNDARY: Final = "----demo"
PNG: Final = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAYAAAAf8/9hAAAAIElEQVR42mNkYPj/n4ECwMgwasCoAaMGjBowasCoAQwMAAZqD/HQ3rJ3AAAAAElFTkSuQmCC"
)


def _multipart() -> bytes:
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="title"\r\n\r\nA new cup\r\n'
    file = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="photo"; filename="cup.png"\r\n'
    file += "Content-Type: image/png\r\n\r\n"
    return head.encode() + file.encode() + PNG * 40 + f"\r\n--{_BOUNDARY}--\r\n".encode()


CALLS: Final = (
    DemoCall("GET", "/users", _ANN),
    DemoCall("POST", "/login", {"X-Company": "acme"}, {"user": "bob", "password": "hunter2", "remember": True}),
    DemoCall("GET", "/users/ann", _ANN),
    DemoCall("GET", "/orders?status=open", _BOB),
    DemoCall(
        "POST", "/orders", _BOB, {"items": [{"product": "tea", "quantity": 2}, {"product": "cup", "quantity": 1}]}
    ),
    DemoCall("GET", "/orders/export", _CLI),
    DemoCall(
        "POST",
        "/orders/1001/pay",
        _BOB,
        {"card": {"number": "4111 1111 1111 1111", "cvc": "737"}, "amount_cents": 2150},
    ),
    DemoCall("POST", "/users", _CLI, {"id": "erin", "name": "Erin Ellis", "plan": "gold"}),
    DemoCall("GET", "/events", _EVE),
    DemoCall("POST", "/users", _CLI, {"name": "Nobody"}),
    DemoCall("GET", "/users/erin", _BOT),
    DemoCall("GET", "/products/cup/picture", _EVE),
    DemoCall("GET", "/users/nobody", _BOT),
    DemoCall("POST", "/uploads", {**_BOT, "Content-Type": "application/octet-stream"}, bytes(range(256)) * 1_200),
    DemoCall(
        "POST", "/orders/1002/pay", _EVE, {"card": {"number": "5555 5555 5555 4444", "cvc": "123"}, "amount_cents": 900}
    ),
    DemoCall("POST", "/uploads", {**_EVE, "Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}, _multipart()),
    DemoCall("GET", "/reports/daily", _ANN),
    DemoCall("POST", "/sessions", _FORM, b"user=eve&password=hunter2&next=%2Forders"),
    DemoCall("DELETE", "/orders/7", _BOB),
    DemoCall("GET", "/orders/1001/shipping?api_key=sk_live_4f3c2b1a", _CLI),
    DemoCall("PATCH", "/users/ann", _ANN, {"plan": "platinum", "newsletter": False}),
    DemoCall("GET", "/orders", _ANN),
    DemoCall("GET", "/old/orders", _CLI),
    DemoCall("GET", "/nowhere?q=%C3%A9t%C3%A9"),
)

GOVERNED_CALL: Final = DemoCall("GET", "/orders?status=paid", _BOT)
"""A call that the first rule below blocks, once its company is over the quota."""

RULES: Final = (
    {
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
    },
)
COMPANY_RULES: Final = {"initech": [{"rules": "demo-quota-rule", "values": {"0": "initech", "1": "1000"}}]}
"""The configuration's `company_rules`: who is over the quota, and what the rule's tags say to them."""

USERS: Final = (
    {
        "user_id": "ann",
        "company_id": "acme",
        "metadata": {"name": "Ann Arbor", "email": "ann@acme.example", "plan": "gold"},
    },
    {
        "user_id": "bob",
        "company_id": "acme",
        "metadata": {"name": "Bob Bell", "email": "bob@acme.example", "plan": "free"},
    },
    {
        "user_id": "eve",
        "company_id": "umbrella",
        "metadata": {"name": "Eve Evans", "plan": "trial"},
        "campaign": {"utm_source": "newsletter"},
    },
)
COMPANIES: Final = (
    {"company_id": "acme", "company_domain": "acme.example", "metadata": {"plan": "enterprise", "employees": 4_200}},
    {"company_id": "initech", "company_domain": "initech.example", "metadata": {"plan": "free", "quota": 1_000}},
)
SUBSCRIPTIONS: Final = (
    {"subscription_id": "sub-acme-2026", "company_id": "acme", "status": "active", "metadata": {"seats": 250}},
    {"subscription_id": "sub-initech", "company_id": "initech", "status": "trialing"},
)
ACTIONS: Final = (("Signed up", "eve", "umbrella"), ("Viewed pricing", "bob", "acme"))
"""Name, user and company of actions in the shop's browser pages."""
