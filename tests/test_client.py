"""Profiles and actions: what is sent, what is refused before anything is sent, what a failure says."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tracemalloc
from collections.abc import Mapping
from datetime import date, datetime, timedelta, timezone
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moesifapi.models import CampaignModel, CompanyModel, SubscriptionModel, UserModel

from moesif_otel._delivery import profiles as profiles_module
from moesif_otel._delivery.outcome import BatchOutcome, PostAnswer, outcome_of_status
from moesif_otel._delivery.profiles import USER, Profiles, encode, posts_of
from moesif_otel._guard import Guard
from moesif_otel.client import MoesifClient, ProfileCalls
from moesif_otel.errors import MoesifConfigError, MoesifDeliveryError
from moesif_otel.sandbox import Sandbox
from moesif_otel.settings import Settings

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

    address = "https://api.moesif.net"
    setting = "BASE_URI"

    def __init__(self, answer: Callable[[list[Any]], int | None] = lambda items: 201) -> None:
        self.posts: list[tuple[str, Any]] = []
        self.forks = 0
        self.answer = answer

    def post_json(self, path: str, body: bytes, timeout_s: float) -> PostAnswer:
        document = json.loads(body)
        self.posts.append((path, document))
        status = self.answer(document if isinstance(document, list) else [document])
        return PostAnswer(BatchOutcome.RETRY if status is None else outcome_of_status(status), status=status)

    def close(self) -> None:
        pass

    def after_fork(self) -> None:
        self.forks += 1


def settings_of(**options: Any) -> Settings:
    return Settings.of({"APPLICATION_ID": "app", "EVENT_BATCH_TIMEOUT": 0.05, **options})


class Middleware(ProfileCalls):
    """What a middleware is to the calls: a pipeline's way for profiles, and its guard."""

    def __init__(self, server: Server, **options: Any) -> None:
        self._profile_guard = self.guard = Guard()
        self._profiles = self.profiles = Profiles(settings_of(**options), server, self.guard)  # type: ignore[arg-type]

    def ended(self) -> Any:
        """Wait for what was queued; return its counters."""
        assert self.profiles.force_flush(30)
        stats = self.profiles.stats()
        self.profiles.shutdown(1)
        return stats


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
    made._profiles._transport = server  # type: ignore[assignment]
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


class Unreadable(Mapping[str, Any]):
    """A mapping, and in a way a model, that raises when it is read."""

    def __getitem__(self, key: str) -> Any:
        raise RuntimeError("no")

    def __iter__(self) -> Iterator[str]:
        return iter(["user_id"])

    def __len__(self) -> int:
        return 1


class Detached:
    """A model whose method cannot even be looked up."""

    @property
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
    ("update_user", Unreadable(), "user: got Unreadable"),
    ("update_user", Detached(), "user: got Detached"),
    ("update_user", {**USER_PROFILE, "metadata": {"a": Unreadable()}}, "user.metadata.a: Unreadable"),
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
    assert (server.posts, middleware.profiles.stats()) == ([], None)


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
    client.update_users_batch(users(12, 990_000))
    assert [len(ids(post)) for post in server.posts] == [5, 5, 2]


def test_one_that_is_larger_than_a_batch_is_refused(
    client: MoesifClient, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could never be taken: ValueError with its index, nothing sent."""
    monkeypatch.setattr(profiles_module, "MAX_BATCH_BYTES", 10_000)
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
    assert str(caught.value).startswith(
        "update_users_batch: 1 of 10 users were not accepted (indexes 7): Moesif answered 413"
    )


def test_a_piece_that_is_refused_does_not_keep_the_others_back(client: MoesifClient, server: Server) -> None:
    """A partial failure names the indexes that were not taken; everything else was."""
    server.answer = lambda items: 400 if items[0]["user_id"] == "1000" else 201
    with pytest.raises(MoesifDeliveryError) as caught:
        client.update_users_batch(users(2_500))
    assert len(server.posts) == 3
    assert caught.value.undelivered == tuple(range(1_000, 2_000))
    assert caught.value.status == 400
    assert len(str(caught.value)) < 300


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
        assert getattr(middleware, one)(profile) is False
    assert middleware.guard.counts() == {f"sending {kind}": 3}
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"moesif_otel: {one}: ")
    assert second.startswith(f"moesif_otel: {batch}: 2 of 2 {kind} were not accepted")
    assert f"Moesif answered 500 at https://api.moesif.net/v1/{kind}; try again later" in first
    assert not any(secret in caplog.text for secret in ("12345", "67890", "acme"))
    server.answer = lambda items: 201
    assert getattr(middleware, one)(profile) is True
    server.answer = lambda items: 500
    with caplog.at_level(logging.WARNING):
        assert getattr(middleware, one)(profile) is False
    assert len(caplog.records) == 3


def test_a_transport_that_breaks_does_not_reach_the_middlewares_user(server: Server) -> None:
    """Even an error nobody thought of is counted instead."""

    def breaks(*_: object) -> PostAnswer:
        raise RuntimeError

    middleware = Middleware(server)
    server.post_json = breaks  # type: ignore[method-assign]
    assert middleware.update_user(USER_PROFILE) is False
    assert middleware.guard.counts() == {"sending users": 1}


@pytest.mark.parametrize(("one", "batch", "kind", "profile"), CALLS)
def test_without_waiting_they_are_queued(
    server: Server, one: str, batch: str, kind: str, profile: dict[str, Any]
) -> None:
    """wait=False sends nothing now: what was queued goes as one batch, each profile counted."""
    middleware = Middleware(server, EVENT_BATCH_TIMEOUT=60)
    assert getattr(middleware, one)(profile, wait=False) is True
    assert getattr(middleware, batch)([profile, profile], wait=False) is True
    assert server.posts == []
    stats = middleware.ended()
    assert (stats["accepted"], stats["delivered"], stats["held_bytes"]) == (3, 3, 0)
    assert server.posts == [(f"/v1/{kind}/batch", [profile, profile, profile])]


@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_on_an_event_loop_nothing_waits(server: Server, library: str) -> None:
    """A call that would block the loop is queued, whatever `wait` says; beside the loop it waits again."""
    middleware = Middleware(server, EVENT_BATCH_TIMEOUT=60)

    async def on_the_loop() -> bool:
        return middleware.update_user(USER_PROFILE)

    if library == "asyncio":
        assert asyncio.run(on_the_loop())
    else:
        assert pytest.importorskip("trio").run(on_the_loop)
    assert server.posts == []
    assert middleware.update_user(USER_PROFILE)
    assert server.posts == [("/v1/users", USER_PROFILE)]
    assert middleware.ended()["delivered"] == 1


def test_queued_profiles_of_several_kinds_go_to_their_own_paths(server: Server) -> None:
    """Each kind in POSTs of its own, in order, each profile once; a mixed batch costs no POST."""
    middleware = Middleware(server, EVENT_BATCH_TIMEOUT=60)
    for n in range(30):
        assert middleware.update_user({"user_id": str(n)}, wait=False)
        if n % 10 == 5:
            assert middleware.update_company({"company_id": str(n)}, wait=False)
    stats = middleware.ended()
    assert (stats["delivered"], stats["dropped"]) == (33, {})
    assert {path for path, _ in server.posts} == {"/v1/users/batch", "/v1/companies/batch"}
    sent = [item["user_id"] for path, items in server.posts if "users" in path for item in items]
    assert sent == [str(n) for n in range(30)]


@pytest.mark.parametrize("status", [413, 400])
def test_queued_profiles_are_halved_and_only_the_bad_one_is_given_up(server: Server, status: int) -> None:
    """413 and 400 as for events: halves until the others are taken; what is not is counted by its reason."""
    server.answer = lambda items: status if any(item["user_id"] == "7" for item in items) else 201
    middleware = Middleware(server, EVENT_BATCH_TIMEOUT=60)
    assert middleware.update_users_batch(users(300), wait=False)
    stats = middleware.ended()
    assert (stats["accepted"], stats["delivered"]) == (300, 299)
    assert stats["dropped"] == {"too_large" if status == 413 else "rejected": 1}


def test_queued_profiles_keep_to_a_bound_of_bytes() -> None:
    """Nothing answers: an eighth of EVENT_QUEUE_BYTES is held at most, the rest is refused and counted."""

    class Silent(Server):
        def post_json(self, path: str, body: bytes, timeout_s: float) -> PostAnswer:
            return PostAnswer(BatchOutcome.RETRY)

    middleware = Middleware(Silent(), EVENT_QUEUE_BYTES=4 * 1024 * 1024)
    taken = [middleware.update_users_batch(users(10, 10_000), wait=False) for _ in range(100)]
    assert taken[0] is True
    assert taken[-1] is False
    stats: Any = middleware.profiles.stats()
    assert 400_000 < stats["held_bytes"] <= 524_288
    assert stats["accepted"] == 1_000 == stats["pending"] + stats["dropped"]["queue_full"]
    middleware.profiles.shutdown(0.2)


def test_what_is_queued_can_be_sent(server: Server) -> None:
    """One bound for all ways: a batch of just over 5,000,000 bytes is not accepted and then dropped unsent."""
    middleware = Middleware(server)
    filler = (5_000_000 - 46) // 2 + 40
    assert middleware.update_users_batch(users(2, filler), wait=False)
    stats = middleware.ended()
    assert (stats["delivered"], stats["dropped"]) == (2, {})
    with pytest.raises(ValueError, match="takes at most 4,999,989"):
        middleware.update_user(users(1, 5_000_000)[0], wait=False)


def test_the_largest_profile_that_is_taken_is_sent(server: Server) -> None:
    """Of one byte more it is said at once that it is too large."""
    middleware = Middleware(server)
    room_bytes = 4_999_989 - len('{"user_id":"u","name":""}')
    assert middleware.update_user({"user_id": "u", "name": "x" * room_bytes}, wait=False)
    stats = middleware.ended()
    assert (stats["delivered"], stats["dropped"]) == (1, {})
    with pytest.raises(ValueError, match="takes at most"):
        middleware.update_user({"user_id": "u", "name": "x" * (room_bytes + 1)}, wait=False)


def test_large_batches_take_little_memory(server: Server) -> None:
    """20,000 users, 0.4 MB of JSON: as much memory as they have bytes, and an object each, besides what the caller made."""
    argument = [{"user_id": str(n)} for n in range(20_000)]
    tracemalloc.start()
    try:
        before_bytes = tracemalloc.get_traced_memory()[0]
        posts = posts_of(USER, argument, batch=True)
        held_bytes, peak_bytes = (now - before_bytes for now in tracemalloc.get_traced_memory())
    finally:
        tracemalloc.stop()
    size_bytes = sum(len(post.body) for post in posts)
    assert (len(posts), 300_000 < size_bytes < 500_000) == (20, True)
    assert held_bytes < size_bytes + 20_000 * 48
    assert peak_bytes < held_bytes + size_bytes


@given(st.lists(st.integers(0, 40), min_size=1, max_size=40), st.integers(1, 8), st.integers(90, 200), st.randoms())
def test_splitting_keeps_order_and_bounds(sizes: list[int], most_items: int, most_bytes: int, random: Any) -> None:
    """Every profile once and in order, each POST within its bounds and never empty; halves of halves too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles_module, "_MAX_BATCH_ITEMS", most_items)
        patch.setattr(profiles_module, "MAX_BATCH_BYTES", most_bytes)
        argument = [{"user_id": f"{n}", "f": "x" * size} for n, size in enumerate(sizes)]
        posts = posts_of(USER, argument, batch=True)
    for post in posts:
        assert 1 <= len(post.profiles) <= most_items
        assert len(post.body) <= most_bytes
    for _ in range(5):
        at = random.randrange(len(posts))
        if len(posts[at].profiles) > 1:
            posts[at : at + 1] = posts[at].halves()
    assert [item for post in posts for item in json.loads(post.body)] == argument
    assert [json.loads(item) for post in posts for item in post.profiles] == argument
    assert [index for post in posts for index in post.indexes] == list(range(len(argument)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_a_connection_of_its_own(sandbox: Sandbox) -> None:
    """Four children and their parent, over a connection that was open before: nothing is lost, nobody mixed."""
    with MoesifClient("app", base_uri=sandbox.url) as client:
        client.update_user({"user_id": "before"})
        children = []
        for child in range(4):
            pid = os.fork()
            if pid == 0:  # pragma: no cover - another process
                status = 1
                try:
                    for n in range(10):
                        client.update_user({"user_id": f"{child}-{n}"})
                    status = 0
                finally:
                    os._exit(status)
            children.append(pid)
        for n in range(10):
            client.update_user({"user_id": f"parent-{n}"})
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    names = {user["user_id"] for user in sandbox.profiles("users")}
    assert names == {"before", *(f"{who}-{n}" for who in (*range(4), "parent") for n in range(10))}


def test_a_failure_says_which_call_where_and_what_to_do() -> None:
    """Nobody listening, a password in the address: call, address and what to check, and no secret."""
    options = {"base_uri": "http://joe:hunter2@127.0.0.1:9/proxy/", "export_timeout": 2}
    with MoesifClient("app", **options) as client, pytest.raises(MoesifDeliveryError) as caught:
        client.update_user(USER_PROFILE)
    text = str(caught.value)
    assert text.startswith("update_user: the user was not accepted: no answer came from http://")
    assert "127.0.0.1:9/proxy/v1/users" in text
    assert "check BASE_URI" in text
    assert not any(secret in text for secret in ("hunter2", "12345", "joe"))
    with Sandbox() as sandbox, MoesifClient("app", base_uri=sandbox.url) as client:
        sandbox.behave(status=401)
        with pytest.raises(MoesifDeliveryError, match=r"answered 401 at http://.*/v1/users; check APPLICATION_ID"):
            client.update_user(USER_PROFILE)


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
        written = encode(USER, {"user_id": "u", "metadata": {"value": value}}, "user")
    except ValueError as error:
        assert str(error).startswith("user.metadata.value")  # noqa: PT017 - either outcome is right
    else:
        assert json.loads(written)["user_id"] == "u"
