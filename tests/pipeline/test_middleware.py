"""What both middlewares have: profile calls that raise for wrong arguments only, and outgoing capture by option."""

from __future__ import annotations

from typing import Any

import pytest
import requests

from moesif_otel.sandbox.server import Sandbox
from moesif_otel.tornado import MoesifMiddleware as TornadoMiddleware
from moesif_otel.wsgi import MoesifMiddleware as WsgiMiddleware

KINDS = ("user", "company", "subscription")


def make(kind: str, **settings: Any) -> Any:
    settings = {"APPLICATION_ID": "middleware", **settings}
    if kind == "tornado":
        return TornadoMiddleware(settings)
    return WsgiMiddleware(lambda environ, start_response: [], settings)


@pytest.mark.parametrize("kind", ["wsgi", "tornado"])
def test_profiles_reach_moesif_waiting_or_not(kind: str) -> None:
    """The documented calls, single and batch; `wait=False` is flushed with the events and counted on its own."""
    with Sandbox() as sandbox:
        middleware = make(kind, BASE_URI=sandbox.url)
        assert middleware.update_user({"user_id": "u1", "metadata": {"email": "a@b"}})
        assert middleware.update_users_batch([{"user_id": "u2"}, {"user_id": "u3"}])
        assert middleware.update_company({"company_id": "c1"}, wait=False)
        assert middleware.update_companies_batch([{"company_id": "c2"}], wait=False)
        assert middleware.update_subscription({"subscription_id": "s", "company_id": "c1", "status": "active"})
        assert middleware.send_action({"action_name": "Signed up", "request": {"uri": "http://a/b"}}, wait=False)
        assert middleware.force_flush(30_000)
        assert {one["user_id"] for one in sandbox.profiles("users")} == {"u1", "u2", "u3"}
        assert {one["company_id"] for one in sandbox.profiles("companies")} == {"c1", "c2"}
        assert len(sandbox.profiles("subscriptions")) == len(sandbox.profiles("actions")) == 1
        stats = middleware.stats()
        assert (stats["accepted"], stats["profiles"]["accepted"], stats["profiles"]["delivered"]) == (0, 3, 3)
        middleware.shutdown()


DOCUMENTED_USER = {
    "user_id": "12345",
    "company_id": "67890",
    "session_token": "XXXXXXXXXX",
    "ip_address": "61.48.220.123",
    "user_agent_string": "Mozilla/5.0",
    "modified_time": "2026-01-02T03:04:05.000Z",
    "campaign": {
        "utm_source": "google",
        "utm_medium": "cpc",
        "utm_campaign": "adwords",
        "utm_term": "api+tooling",
        "utm_content": "landing",
        "referrer": "https://google.com",
        "referring_domain": "google.com",
        "gclid": "abc",
    },
    "metadata": {
        "email": "john@acme.com",
        "sales_info": {"stage": "Customer", "lifetime_value": 24000, "account_owner": "mary@contoso.com"},
        "tags": ["a", "b"],
        "trial": False,
    },
}
DOCUMENTED_COMPANY = {
    "company_id": "67890",
    "company_domain": "acmeinc.com",
    "campaign": DOCUMENTED_USER["campaign"],
    "metadata": {"org_name": "Acme, Inc", "deal_stage": "Lead", "demographics": {"alexa_ranking": 500000}},
}


@pytest.mark.parametrize("kind", ["wsgi", "tornado"])
@pytest.mark.parametrize("wait", [True, False])
def test_the_documented_examples(kind: str, wait: bool) -> None:
    """As the packages that we replace document them, campaign and metadata whole, single and as batches."""
    with Sandbox() as sandbox:
        middleware = make(kind, BASE_URI=sandbox.url)
        assert middleware.update_user(DOCUMENTED_USER, wait=wait)
        assert middleware.update_users_batch([{**DOCUMENTED_USER, "user_id": "54321"}, {"user_id": "1"}], wait=wait)
        assert middleware.update_company(DOCUMENTED_COMPANY, wait=wait)
        assert middleware.update_companies_batch([{**DOCUMENTED_COMPANY, "company_id": "09876"}], wait=wait)
        assert middleware.force_flush(30_000)
        users = {one["user_id"]: one for one in sandbox.profiles("users")}
        companies = {one["company_id"]: one for one in sandbox.profiles("companies")}
        middleware.shutdown()
    assert set(users) == {"12345", "54321", "1"}
    assert DOCUMENTED_USER.items() <= users["12345"].items()
    assert ({**DOCUMENTED_USER, "user_id": "54321"}).items() <= users["54321"].items()
    assert DOCUMENTED_COMPANY.items() <= companies["67890"].items()
    assert ({**DOCUMENTED_COMPANY, "company_id": "09876"}).items() <= companies["09876"].items()


@pytest.mark.parametrize("kind", ["wsgi", "tornado"])
def test_a_failing_delivery_is_counted_and_a_wrong_argument_raises(kind: str) -> None:
    """The application is not troubled by Moesif; it is told of its own mistakes before anything is sent."""
    middleware = make(kind, BASE_URI="http://127.0.0.1:9", EXPORT_TIMEOUT=1)
    assert not middleware.update_user({"user_id": "u1"})
    assert middleware.stats()["errors"] == {"sending users": 1}
    with pytest.raises(ValueError, match="user_id"):
        middleware.update_user({"metadata": {}})
    middleware.shutdown(100)


def test_outgoing_calls_are_captured_by_option_until_shutdown() -> None:
    """CAPTURE_OUTGOING_REQUESTS records calls of `requests` on the middleware's pipeline; the wire stays as it was."""
    with Sandbox() as sandbox, Sandbox() as upstream:
        middleware = make("wsgi", BASE_URI=sandbox.url, CAPTURE_OUTGOING_REQUESTS=True)
        answer = requests.get(upstream.url + "/health/probe", timeout=5)
        assert answer.status_code == 200
        assert middleware.force_flush(30_000)
        (event,) = sandbox.wait_for_events(1, 30)
        assert (event["direction"], event["request"]["uri"]) == ("Outgoing", upstream.url + "/health/probe")
        (seen,) = upstream.requests("/health/probe")
        assert not {"traceparent", "baggage"} & {name.lower() for name in dict(seen["headers"])}
        middleware.shutdown()
        requests.get(upstream.url + "/health/probe", timeout=5)
        assert middleware.stats()["accepted"] == 1
