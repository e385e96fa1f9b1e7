"""Profiles and actions: what is sent, what is refused before anything is sent, what a failure says."""

from __future__ import annotations

import json
import logging
from datetime import date, datetime, timedelta, timezone
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moesifapi.models import CampaignModel, CompanyModel, SubscriptionModel, UserModel

from moesif_otel import client as profiles_module
from moesif_otel._delivery.outcome import Answer, Outcome, outcome_of_status
from moesif_otel._delivery.profile_fields import USER, encode_one, pieces
from moesif_otel._guard import Guard
from moesif_otel.client import MoesifClient, ProfileCalls, ProfileSender
from moesif_otel.errors import MoesifConfigError, MoesifDeliveryError
from moesif_otel.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

UTC = timezone.utc
USER_PROFILE = {"user_id": "12345", "company_id": "67890", "metadata": {"email": "john@acme.com"}}
SUBSCRIPTION_PROFILE = {"subscription_id": "sub_1", "company_id": "67890", "status": "active"}
ACTION = {
    "action_name": "Clicked Sign Up",
    "request": {"time": "2024-10-30T04:45:42.914", "uri": "https://acme.com/up"},
}

CALLS = [
    ("update_user", "update_users_batch", "users", USER_PROFILE),
    ("update_company", "update_companies_batch", "companies", {"company_id": "67890", "company_domain": "acme.com"}),
    ("update_subscription", "update_subscriptions_batch", "subscriptions", SUBSCRIPTION_PROFILE),
    ("send_action", "send_actions_batch", "actions", ACTION),
]


class Server:
    """A transport whose answers follow a function of the items; it keeps what was posted."""

    def __init__(self, answer: Callable[[list[Any]], int | None] = lambda items: 201) -> None:
        self.posts: list[tuple[str, Any]] = []
        self.answer = answer

    def post_json(self, path: str, body: bytes, timeout_s: float) -> Answer:
        document = json.loads(body)
        self.posts.append((path, document))
        status = self.answer(document if isinstance(document, list) else [document])
        return Answer(Outcome.RETRY if status is None else outcome_of_status(status), status=status)

    def close(self) -> None:
        pass


class Middleware(ProfileCalls):
    """What a middleware is to the calls: a pipeline's sender, queue and guard."""

    def __init__(self, server: Server, *, room: int = 1_000_000) -> None:
        self.guard = Guard()
        self.queued: list[tuple[str, bytes]] = []
        self.room = room
        self._set_up_profiles(ProfileSender(server, 5.0), self._queue, self.guard)

    def _queue(self, path: str, payload: bytes) -> bool:
        if len(self.queued) >= self.room:
            return False
        self.queued.append((path, payload))
        return True


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def client(server: Server) -> MoesifClient:
    """A client whose POSTs the test answers."""
    made = MoesifClient("app")
    made._transport = server
    made._sender = ProfileSender(server, 5.0)
    return made


@pytest.mark.parametrize(("one", "batch", "kind", "profile"), CALLS)
def test_each_call_arrives(sandbox: Sandbox, one: str, batch: str, kind: str, profile: dict[str, Any]) -> None:
    """Over a real connection, single and batch, as a dict; all the sandbox's checks are passed."""
    with MoesifClient("app", base_uri=sandbox.url) as client:
        assert getattr(client, one)(profile) is None
        getattr(client, batch)([profile, profile])
    paths = [f"/v1/{kind}", f"/v1/{kind}/batch"]
    assert [(r["path"], r["status"], r["application_id"]) for r in sandbox.requests()] == [
        (path, 201, "app") for path in paths
    ]
    stored = sandbox.profiles(kind)[0]
    assert profile.items() <= stored.items()


def test_the_documented_examples_with_models(sandbox: Sandbox) -> None:
    """The models of moesifapi are taken, campaign and metadata included; their empty fields are not sent."""
    campaign = CampaignModel(utm_source="google", utm_medium="cpc")
    user = UserModel(
        user_id="12345", modified_time=datetime(2024, 1, 2, 3, 4, 5), campaign=campaign, metadata={"title": "Dev"}
    )
    company = CompanyModel(company_id="67890", company_domain="acme.com", metadata={"plan": "gold"})
    subscription = SubscriptionModel(
        "sub", "67890", current_period_end=datetime(2025, 1, 1, tzinfo=UTC), status="active"
    )
    with MoesifClient("app", base_uri=sandbox.url) as client:
        client.update_user(user)
        client.update_users_batch([user, UserModel(user_id="2")])
        client.update_company(company)
        client.update_subscription(subscription)
    first = sandbox.profiles("users")[0]
    assert first["campaign"] == {"utm_source": "google", "utm_medium": "cpc"}
    assert first["modified_time"].startswith("2024-01-02T03:04:05")
    assert "session_token" not in first
    assert sandbox.profiles("companies")[0]["metadata"] == {"plan": "gold"}
    assert sandbox.profiles("subscriptions")[0]["status"] == "active"


def test_json_text_is_taken(client: MoesifClient, server: Server) -> None:
    """One as an object, several as an array, or a list of texts; bytes too."""
    client.update_user(json.dumps(USER_PROFILE))
    client.update_user(json.dumps(USER_PROFILE).encode())
    client.update_users_batch(json.dumps([USER_PROFILE, USER_PROFILE]))
    client.update_users_batch([json.dumps(USER_PROFILE), USER_PROFILE])
    assert server.posts == [
        ("/v1/users", USER_PROFILE),
        ("/v1/users", USER_PROFILE),
        ("/v1/users/batch", [USER_PROFILE, USER_PROFILE]),
        ("/v1/users/batch", [USER_PROFILE, USER_PROFILE]),
    ]


class Colour(str, Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (datetime(2024, 10, 30, 4, 45, 42, 914_567), "2024-10-30T04:45:42.914"),
        (datetime(2024, 10, 30, 6, 45, 42, tzinfo=timezone(timedelta(hours=2))), "2024-10-30T04:45:42.000"),
        ("2024-10-30T04:45:42Z", "2024-10-30T04:45:42Z"),
        (date(2024, 10, 30), "2024-10-30"),
    ],
)
def test_times_are_iso_8601_in_utc(client: MoesifClient, server: Server, value: Any, written: str) -> None:
    """Datetimes are brought to UTC with milliseconds, at the top and inside metadata; text is passed on."""
    client.update_user({"user_id": "u", "modified_time": value, "metadata": {"at": value}})
    assert server.posts[0][1] == {"user_id": "u", "modified_time": written, "metadata": {"at": written}}


def test_an_action_without_a_time_is_now(client: MoesifClient, server: Server) -> None:
    """The one required fact that we know ourselves."""
    client.send_action({"action_name": "a", "request": {"uri": "https://acme.com"}})
    sent = datetime.fromisoformat(server.posts[0][1]["request"]["time"]).replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - sent) < timedelta(minutes=1)


def test_odd_but_writable_values(client: MoesifClient, server: Server) -> None:
    """Tuples, other mappings, enums, UUIDs, whole-number keys; None inside metadata stays, at the top it is absent."""
    client.update_user(
        MappingProxyType(
            {
                "user_id": "u",
                "company_id": None,
                "unknown_field": (1, 2.5),
                "metadata": {"e": Colour.RED, "id": UUID(int=1), 5: None, "deep": [{"a": ({"b": True},)}]},
            }
        )
    )
    assert server.posts[0][1] == {
        "user_id": "u",
        "unknown_field": [1, 2.5],
        "metadata": {"e": "red", "id": str(UUID(int=1)), "5": None, "deep": [{"a": [{"b": True}]}]},
    }


class Unwritable:
    def to_dictionary(self) -> Any:
        raise RuntimeError("no")


NESTED_IN_ITSELF: dict[str, Any] = {}
NESTED_IN_ITSELF["again"] = NESTED_IN_ITSELF

WRONG = [
    ("update_user", {}, "user.user_id: missing"),
    ("update_user", {"user_id": None}, "user.user_id: missing"),
    ("update_user", {"user_id": ""}, "user.user_id"),
    ("update_user", {"user_id": 5}, "user.user_id: got int, takes a string"),
    ("update_user", UserModel(), "user.user_id: missing"),
    ("update_user", None, "user: got None"),
    ("update_user", 5, "user: got int"),
    ("update_user", [USER_PROFILE], "user: got list"),
    ("update_user", UserModel, "user: got type"),
    ("update_user", Unwritable(), "user: got Unwritable"),
    ("update_user", "{", "user: text that is not JSON"),
    ("update_user", "[]", "user: got list"),
    ("update_user", {**USER_PROFILE, "metadata": "x"}, "user.metadata: got str"),
    ("update_user", {**USER_PROFILE, "metadata": {"a": [{"b": {1, 2}}]}}, "user.metadata.a[0].b: set"),
    ("update_user", {**USER_PROFILE, "metadata": {"a": b"x"}}, "user.metadata.a: bytes"),
    ("update_user", {**USER_PROFILE, "metadata": {"a": object()}}, "user.metadata.a: object"),
    ("update_user", {**USER_PROFILE, "metadata": {"a": float("nan")}}, "user.metadata.a: NaN"),
    ("update_user", {**USER_PROFILE, "metadata": {"a": 2**70}}, "user.metadata.a: a whole number"),
    ("update_user", {**USER_PROFILE, "metadata": {"a": "\ud800"}}, "user.metadata.a: text"),
    ("update_user", {**USER_PROFILE, "metadata": {("x",): 1}}, "user.metadata: a key of type tuple"),
    ("update_user", {**USER_PROFILE, "metadata": NESTED_IN_ITSELF}, "user.metadata.again"),
    ("update_user", {**USER_PROFILE, "modified_time": 5}, "user.modified_time: got int"),
    ("update_user", {**USER_PROFILE, "campaign": "x"}, "user.campaign: got str"),
    ("update_user", {**USER_PROFILE, "campaign": {"utm_source": 5}}, "user.campaign.utm_source: got int"),
    ("update_user", {**USER_PROFILE, "ip_address": 5}, "user.ip_address: got int"),
    ("update_users_batch", [USER_PROFILE, {}], "users[1].user_id: missing"),
    ("update_users_batch", USER_PROFILE, "users: got dict"),
    ("update_users_batch", 5, "users: got int"),
    ("update_users_batch", "{}", "users: got dict"),
    ("update_users_batch", [USER_PROFILE, "x"], "users[1]: text that is not JSON"),
    ("update_company", {"company_domain": "acme.com"}, "company.company_id: missing"),
    ("update_companies_batch", [{}], "companies[0].company_id: missing"),
    ("update_subscription", {"subscription_id": "s", "status": "active"}, "subscription.company_id: missing"),
    ("update_subscription", {"subscription_id": "s", "company_id": "c"}, "subscription.status: missing"),
    ("update_subscription", {**SUBSCRIPTION_PROFILE, "status": "canceled"}, "subscription.status: takes one of active"),
    ("update_subscription", {**SUBSCRIPTION_PROFILE, "items": {}}, "subscription.items: got dict"),
    ("update_subscription", {**SUBSCRIPTION_PROFILE, "items": [5]}, "subscription.items[0]: got int"),
    ("send_action", {"action_name": "a"}, "action.request: missing"),
    ("send_action", {"request": {}}, "action.action_name: missing"),
    ("send_action", {**ACTION, "request": {"time": 5}}, "action.request.time: got int"),
    ("send_actions_batch", [ACTION, {**ACTION, "request": []}], "actions[1].request: got list"),
]


@pytest.mark.parametrize(("call", "argument", "message"), WRONG)
def test_a_wrong_argument_is_named_before_anything_is_sent(
    client: MoesifClient, server: Server, call: str, argument: Any, message: str
) -> None:
    """ValueError with the place and what is wrong there, on the client and on the middlewares alike."""
    middleware = Middleware(server)
    for make in (getattr(client, call), getattr(middleware, call)):
        with pytest.raises(ValueError) as caught:
            make(argument)
        assert str(caught.value).startswith(message)
    with pytest.raises(ValueError):
        getattr(middleware, call)(argument, wait=False)
    assert (server.posts, middleware.queued) == ([], [])


def test_an_item_of_subscription(client: MoesifClient, server: Server) -> None:
    """`items` with datetimes inside are written."""
    client.update_subscription({**SUBSCRIPTION_PROFILE, "items": [{"item_price_id": "p", "since": date(2024, 1, 1)}]})
    assert server.posts[0][1]["items"] == [{"item_price_id": "p", "since": "2024-01-01"}]


@pytest.mark.parametrize("status", [400, 401, 402, 404, 413, 429, 500, 503, None])
def test_a_failure_raises_with_its_status(client: MoesifClient, server: Server, status: int | None) -> None:
    """`MoesifDeliveryError` says what was not taken and why; nothing is tried a second time."""
    server.answer = lambda items: status
    with pytest.raises(MoesifDeliveryError) as caught:
        client.update_user(USER_PROFILE)
    assert caught.value.status == status
    assert caught.value.undelivered == (0,)
    assert "12345" not in str(caught.value)
    assert len(server.posts) == 1


def test_a_server_that_is_not_there() -> None:
    """Nobody listening: the error has no status, and comes within the timeout."""
    with (
        MoesifClient("app", base_uri="http://127.0.0.1:9", export_timeout=2) as client,
        pytest.raises(MoesifDeliveryError) as caught,
    ):
        client.update_user(USER_PROFILE)
    assert caught.value.status is None


def test_the_sandbox_refuses(sandbox: Sandbox) -> None:
    """A real 401 is told as such, and the client can go on."""
    with MoesifClient("app", base_uri=sandbox.url) as client:
        sandbox.behave(status=401)
        with pytest.raises(MoesifDeliveryError) as caught:
            client.update_user(USER_PROFILE)
        assert caught.value.status == 401
        sandbox.behave()
        client.update_user(USER_PROFILE)


def test_a_client_needs_an_application_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the argument or from its environment variable; options are validated as everywhere."""
    monkeypatch.delenv("MOESIF_APPLICATION_ID", raising=False)
    with pytest.raises(MoesifConfigError, match="APPLICATION_ID"):
        MoesifClient()
    monkeypatch.setenv("MOESIF_APPLICATION_ID", "from-environment")
    MoesifClient().close()
    with pytest.raises(MoesifConfigError, match="BASE_URI"):
        MoesifClient("app", base_uri="localhost")


def users(count: int, size: int = 0) -> list[dict[str, Any]]:
    return [{"user_id": str(n), "metadata": {"filler": "x" * size}} for n in range(count)]


def ids(post: tuple[str, Any]) -> list[int]:
    return [int(item["user_id"]) for item in post[1]]


def test_batches_are_split_by_count(client: MoesifClient, server: Server) -> None:
    """1,000 at most in one POST, in order, each once; an empty batch sends nothing."""
    client.update_users_batch(users(2_500))
    assert [len(ids(post)) for post in server.posts] == [1_000, 1_000, 500]
    assert [n for post in server.posts for n in ids(post)] == list(range(2_500))
    server.posts.clear()
    client.update_users_batch([])
    client.update_users_batch(iter(users(2)))
    assert [len(ids(post)) for post in server.posts] == [2]


def test_batches_are_split_by_size(client: MoesifClient, server: Server) -> None:
    """5 MB at most in one POST."""
    client.update_users_batch(users(12, 1_000_000))
    assert [len(ids(post)) for post in server.posts] == [5, 5, 2]


def test_one_that_is_larger_than_a_batch_is_refused(
    client: MoesifClient, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could never be taken: ValueError with its index, nothing sent."""
    monkeypatch.setattr(profiles_module, "_MAX_BATCH_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"^users\[1\]: .* bytes of JSON"):
        client.update_users_batch([*users(1), *users(1, 20_000)])
    assert server.posts == []


def test_a_batch_that_the_server_finds_too_large_is_halved(client: MoesifClient, server: Server) -> None:
    """413: halves, in order, until they are taken; one alone that is too large fails with its index."""
    server.answer = lambda items: 413 if len(items) > 3 else 201
    client.update_users_batch(users(10))
    taken = [ids(post) for post in server.posts if len(post[1]) <= 3]
    assert [n for part in taken for n in part] == list(range(10))
    server.answer = lambda items: 413 if any(item["user_id"] == "7" for item in items) else 201
    with pytest.raises(MoesifDeliveryError) as caught:
        client.update_users_batch(users(10))
    assert caught.value.undelivered == (7,)
    assert str(caught.value).startswith("1 of 10 users were not taken (indexes 7)")


def test_a_piece_that_is_refused_does_not_keep_the_others_back(client: MoesifClient, server: Server) -> None:
    """A partial failure names the indexes that were not taken; everything else was."""
    server.answer = lambda items: 400 if items[0]["user_id"] == "1000" else 201
    with pytest.raises(MoesifDeliveryError) as caught:
        client.update_users_batch(users(2_500))
    assert len(server.posts) == 3
    assert caught.value.undelivered == tuple(range(1_000, 2_000))
    assert caught.value.status == 400
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("status", [None, 401, 402])
def test_when_nothing_can_be_taken_the_rest_is_not_tried(
    client: MoesifClient, server: Server, status: int | None
) -> None:
    """No connection or a refused application id: the next pieces would only wait for the same."""
    server.answer = lambda items: status if items[0]["user_id"] == "1000" else 201
    with pytest.raises(MoesifDeliveryError) as caught:
        client.update_users_batch(users(3_500))
    assert len(server.posts) == 2
    assert caught.value.undelivered == tuple(range(1_000, 3_500))


@pytest.mark.parametrize(("one", "batch", "kind", "profile"), CALLS)
def test_on_a_middleware_a_failure_is_logged_and_counted(
    server: Server, caplog: pytest.LogCaptureFixture, one: str, batch: str, kind: str, profile: dict[str, Any]
) -> None:
    """False, a line in the log without data, a counter; never an exception."""
    middleware = Middleware(server)
    assert getattr(middleware, one)(profile) is True
    assert getattr(middleware, batch)([profile, profile]) is True
    server.answer = lambda items: 500
    with caplog.at_level(logging.WARNING):
        assert getattr(middleware, one)(profile) is False
        assert getattr(middleware, batch)([profile, profile]) is False
    assert middleware.guard.counts() == {f"sending {kind}": 2}
    assert "Moesif answered 500" in caplog.text
    assert not any(secret in caplog.text for secret in ("12345", "67890", "acme"))


def test_a_transport_that_breaks_does_not_reach_the_middlewares_user(server: Server) -> None:
    """Even an error nobody thought of is counted instead."""

    def breaks(*_: object) -> Answer:
        raise RuntimeError

    middleware = Middleware(server)
    server.post_json = breaks  # type: ignore[method-assign]
    assert middleware.update_user(USER_PROFILE) is False
    assert middleware.guard.counts() == {"sending users": 1}


@pytest.mark.parametrize(("one", "batch", "kind", "profile"), CALLS)
def test_without_waiting_they_are_queued(
    server: Server, one: str, batch: str, kind: str, profile: dict[str, Any]
) -> None:
    """wait=False sends nothing now: path and JSON go to the pipeline's queue; no room gives False."""
    middleware = Middleware(server, room=2)
    assert getattr(middleware, one)(profile, wait=False) is True
    assert getattr(middleware, batch)([profile, profile], wait=False) is True
    assert getattr(middleware, one)(profile, wait=False) is False
    assert server.posts == []
    assert [(path, json.loads(body)) for path, body in middleware.queued] == [
        (f"/v1/{kind}", profile),
        (f"/v1/{kind}/batch", [profile, profile]),
    ]


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 8), st.integers(50, 120))
def test_splitting_keeps_order_and_bounds(sizes: list[int], most_items: int, most_bytes: int) -> None:
    """Every index once and in order; no piece over a bound unless it is one item; no piece is empty."""
    payloads = [b"x" * size for size in sizes]
    found = pieces(payloads, most_items, most_bytes)
    assert [index for piece in found for index in piece] == list(range(len(payloads)))
    for piece in found:
        assert 1 <= len(piece) <= most_items
        written = b"[" + b",".join(payloads[i] for i in piece) + b"]"
        assert len(piece) == 1 or len(written) <= most_bytes


_ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | st.datetimes(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.sets(st.integers(), max_size=2)
    ),
    max_leaves=8,
)


@given(_ANYTHING)
@settings(max_examples=300, deadline=None)
def test_any_metadata_is_written_or_named(value: Any) -> None:
    """Whatever lies in metadata: JSON that reads back, or a ValueError that begins with its place."""
    try:
        written = encode_one(USER, {"user_id": "u", "metadata": {"value": value}})
    except ValueError as error:
        assert str(error).startswith("user.metadata.value")  # noqa: PT017 - either outcome is right
    else:
        assert json.loads(written)["user_id"] == "u"
