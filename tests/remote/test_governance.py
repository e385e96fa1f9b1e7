"""Governance: what rules say about a request, and that nothing they hold can hurt it."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from moesif_otel._capture.exchange import Decision
from moesif_otel._guard import Guard
from moesif_otel._remote.config import DEFAULT_CONFIG, RemoteConfig
from moesif_otel._remote.facts import BodyNeededError, RequestFacts
from moesif_otel._remote.governance import NO_RULES, RuleSet
from moesif_otel._remote.rules import MalformedError

URI = "https://api.test/users/7?filter=open"
DOCUMENTED = {
    "_id": "649b64ea96d5e2384e3cece6",
    "type": "regex",
    "state": 2,
    "name": "…",
    "block": True,
    "applied_to": "matching",
    "applied_to_unidentified": False,
    "variables": [{"name": "0", "path": "user_id"}],
    "regex_config": [
        {"conditions": [{"path": "request.route", "value": ".*user.*"}, {"path": "request.verb", "value": "GET"}]}
    ],
    "response": {
        "status": 429,
        "headers": {"X-Rate-Limit-Month": "{{1}}"},
        "body": {"error_code": "too_many", "message": "quota {{1}} for {{0}}"},
    },
}


def rules_of(*rules: Any, guard: Guard | None = None) -> RuleSet:
    return RuleSet.from_json(json.dumps(rules).encode(), guard or Guard())


def config_of(**members: Any) -> RemoteConfig:
    return RemoteConfig.from_json(json.dumps(members).encode(), Guard())


def facts(verb: str = "GET", uri: str = URI, body: Any = None, **headers: str) -> RequestFacts:
    lower = {name.replace("_", "-").lower(): value for name, value in headers.items()}
    made = RequestFacts(verb=verb, uri=uri, ip_address="10.0.0.1", headers=lower)
    made.give_body(body)
    return made


def rule(rule_id: str = "r", *, kind: str = "regex", status: int | None = None, **more: Any) -> dict[str, Any]:
    """A rule that blocks with `status`, or only adds the header X-<id>."""
    response: dict[str, Any] = {"headers": {f"X-{rule_id}": rule_id}}
    if status is not None:
        response |= {"status": status, "body": {"by": rule_id}}
    return {"_id": rule_id, "type": kind, "block": status is not None, "response": response, **more}


def where(*groups: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"conditions": [{"path": path, "value": value} for path, value in group.items()]} for group in groups]


def ask(
    *rules: Any,
    about: RequestFacts | None = None,
    user: Any = None,
    company: Any = None,
    config: RemoteConfig = DEFAULT_CONFIG,
) -> Decision | None:
    return rules_of(*rules).evaluate(about or facts(), user, company, config)


def test_the_documented_rule_blocks_with_its_whole_answer() -> None:
    """Status with phrase, merged header, JSON body, type and length, and the id for the event."""
    verdict = ask(DOCUMENTED)
    assert verdict is not None
    assert verdict.blocked
    assert (verdict.status, verdict.phrase) == (429, "Too Many Requests")
    assert json.loads(verdict.body or b"") == {"error_code": "too_many", "message": "quota UNKNOWN for UNKNOWN"}
    assert verdict.headers == [
        ("X-Rate-Limit-Month", "UNKNOWN"),
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(verdict.body or b""))),
    ]
    assert verdict.blocked_by == DOCUMENTED["_id"]
    assert ask(DOCUMENTED, about=facts("POST")) is None


def test_no_rules_are_false_and_say_nothing() -> None:
    """`if rules:` is all that a request without rules pays."""
    assert not NO_RULES
    assert not rules_of()
    assert NO_RULES.evaluate(facts(), "u", "c", DEFAULT_CONFIG) is None
    assert not NO_RULES.needs_identity


def test_a_rule_that_does_not_block_only_adds_headers() -> None:
    """Its status and body mean nothing, even when they are wrong."""
    verdict = ask({**rule("a"), "response": {"headers": {"X-A": "1"}, "status": "no", "body": 5}})
    assert verdict == Decision(blocked=False, status=0, headers=[("X-A", "1")], body=None, blocked_by=None)
    assert ask({"_id": "b", "type": "regex"}) is None


def test_later_rules_override_earlier_ones() -> None:
    """Regex, then company, then user, whatever their order in the answer; headers merge in any case of their names."""
    config = config_of(user_rules={"u": [{"rules": "user"}]}, company_rules={"c": [{"rules": "company"}]})
    rules = [
        rule("user", kind="user", status=403),
        rule("company", kind="company", status=402),
        rule("regex", status=401),
    ]
    for each in rules:
        each["response"]["headers"]["x-same" if each["_id"] == "user" else "X-Same"] = each["_id"]
    verdict = ask(*rules, user="u", company="c", config=config)
    assert verdict is not None
    assert (verdict.status, verdict.blocked_by, json.loads(verdict.body or b"")) == (403, "user", {"by": "user"})
    assert ("x-same", "user") in verdict.headers
    assert [name for name, _ in verdict.headers] == [
        "X-regex",
        "x-same",
        "X-company",
        "X-user",
        "Content-Type",
        "Content-Length",
    ]


def test_a_later_rule_that_does_not_block_leaves_the_block() -> None:
    """It adds its headers to the blocked answer."""
    verdict = ask(rule("a", status=418), rule("b"))
    assert verdict is not None
    assert (verdict.blocked_by, verdict.status) == ("a", 418)
    assert ("X-b", "b") in verdict.headers


@pytest.mark.parametrize("kind", ["user", "company"])
@pytest.mark.parametrize(
    ("applied_to", "unidentified", "identity", "applies"),
    [
        ("matching", False, "in", True),
        ("matching", False, "out", False),
        ("matching", False, None, False),
        ("matching", True, None, True),
        ("matching", True, "out", False),
        ("not_matching", False, "in", False),
        ("not_matching", False, "out", True),
        ("not_matching", False, None, False),
        ("not_matching", True, None, True),
        ("not_matching", True, "in", False),
        (None, False, "in", True),
        (None, False, "out", False),
        ("matching", True, "", True),
    ],
)
def test_cohorts(kind: str, applied_to: str | None, unidentified: bool, identity: str | None, applies: bool) -> None:
    """Matching: those in the cohort. Not matching: every other identified one. No id: rules for unidentified alone."""
    one = rule("r", kind=kind, status=403, applied_to=applied_to, applied_to_unidentified=unidentified)
    config = config_of(**{f"{kind}_rules": {"in": [{"rules": "r"}]}})
    assert (ask(one, config=config, **{kind: identity}) is not None) is applies


def test_a_company_rule_does_not_look_at_the_user() -> None:
    """Cohorts of users and of companies are apart, also when their ids are the same text."""
    config = config_of(company_rules={"same": [{"rules": "r"}]})
    assert ask(rule("r", kind="company", status=403), user="same", config=config) is None


def test_identities_can_be_numbers() -> None:
    """A callback may give 7 where Moesif keys "7"."""
    config = config_of(user_rules={"7": [{"rules": "r"}]})
    assert ask(rule("r", kind="user", status=403), user=7, config=config) is not None


@pytest.mark.parametrize(
    ("path", "expression", "found"),
    [
        ("request.verb", "^GET$", True),
        ("request.verb", "^get$", False),
        ("request.ip_address", "^10\\.", True),
        ("request.ip", "^10\\.", True),
        ("request.route", "^https://api\\.test/users", True),
        ("request.route", "filter=open$", True),
        ("request.route", "^/users/\\d+$", True),
        ("request.route", "^users", False),
        ("request.headers.X-Plan", "^free$", True),
        ("request.headers.x-plan", "^free$", True),
        ("request.headers.x-other", ".*", False),
        ("request.body.operationName", "^GetUser$", True),
        ("request.body.count", "^5$", True),
        ("request.body.flag", "^true$", True),
        ("request.body.nothing", ".*", False),
        ("request.body.list", ".*", False),
        ("request.body.missing", ".*", False),
        ("request.nothing", ".*", False),
        ("", ".*", False),
    ],
)
def test_condition_paths(path: str, expression: str, found: bool) -> None:
    """Every documented path; a route matches as full URI or as path; what is missing never matches."""
    body = {"operationName": "GetUser", "count": 5, "flag": True, "nothing": None, "list": ["x"]}
    about = facts(body=body, X_Plan="free")
    assert (ask(rule(regex_config=where({path: expression})), about=about) is not None) is found


@pytest.mark.parametrize("body", [None, [], [{"a": "x"}], "a", 5, {}, {"b": "x"}])
def test_bodies_of_other_shapes_do_not_match(body: Any) -> None:
    """A body condition on a body that is no object, or lacks the key, does not hold."""
    assert ask(rule(regex_config=where({"request.body.a": ".*"})), about=facts(body=body)) is None


def test_groups_are_joined_by_or_and_conditions_by_and() -> None:
    """Any group, in it all conditions; an empty or absent regex_config matches everything, an empty group nothing."""
    both = where({"request.verb": "POST"}, {"request.verb": "GET", "request.route": "users"})
    assert ask(rule(regex_config=both)) is not None
    assert ask(rule(regex_config=where({"request.verb": "GET", "request.route": "orders"}))) is None
    assert ask(rule(regex_config=[])) is not None
    assert ask(rule()) is not None
    assert ask(rule(regex_config=[{"conditions": []}])) is None


def test_merge_tags_are_filled_from_the_cohort_entry() -> None:
    """In headers, keys, values and lists; a missing value is UNKNOWN; a rule without variables keeps its text."""
    response = {
        "status": 429,
        "headers": {"X-{{0}}": "{{1}}/{{2}}"},
        "body": {"{{0}}": [{"deep": ["{{1}}", 5]}], "none": "{{9}}"},
    }
    one = {"_id": "r", "type": "user", "block": True, "response": response, "variables": [{"name": "0"}]}
    config = config_of(user_rules={"u": [{"rules": "r", "values": {"0": "gold", "1": 5}}]})
    verdict = ask(one, user="u", config=config)
    assert verdict is not None
    assert verdict.headers[0] == ("X-gold", "5/UNKNOWN")
    assert json.loads(verdict.body or b"") == {"gold": [{"deep": ["5", 5]}], "none": "UNKNOWN"}
    plain = ask({**one, "variables": [], "response": {"status": 429, "body": "{{0}}"}}, user="u", config=config)
    assert plain is not None
    assert plain.body == b'"{{0}}"'


@pytest.mark.parametrize(
    ("body", "sent"),
    [({"a": 1}, b'{"a":1}'), ("text", b'"text"'), (["é"], '["é"]'.encode()), (None, b"null"), (5, b"5"), ("", b'""')],
)
def test_bodies_are_json_whatever_their_type(body: Any, sent: bytes) -> None:
    """A string is a JSON string; type and length are told."""
    verdict = ask({**rule(status=403), "response": {"status": 403, "body": body}})
    assert verdict is not None
    assert verdict.body == sent
    assert verdict.headers == [("Content-Type", "application/json"), ("Content-Length", str(len(sent)))]


def test_an_answer_without_a_body() -> None:
    """Length zero, and no type of what is not there."""
    verdict = ask({**rule(status=403), "response": {"status": 403}})
    assert verdict is not None
    assert (verdict.body, verdict.headers) == (b"", [("Content-Length", "0")])


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (200, "200 OK"),
        (402, "402 Payment Required"),
        (429, "429 Too Many Requests"),
        (499, "499 Client Error"),
        (520, "520 Server Error"),
        (299, "299 Success"),
        (399, "399 Redirection"),
        (799, "799 Unknown Status"),
        (999, "999 Unknown Status"),
    ],
)
def test_any_three_digit_status_has_a_phrase(status: int, line: str) -> None:
    """Its own, or that of its class."""
    verdict = ask(rule(status=status))
    assert verdict is not None
    assert (f"{verdict.status} {verdict.phrase}", verdict.status) == (line, status)


@pytest.mark.parametrize("status", [100, 204, 304])
def test_a_status_that_forbids_a_body_gets_none(status: int) -> None:
    """A body there would be read as the beginning of the next answer."""
    verdict = ask(rule("r", status=status))
    assert verdict is not None
    assert (verdict.body, verdict.headers) == (b"", [("X-r", "r")])


def test_a_rule_may_set_its_content_type() -> None:
    """Then it is not added a second time."""
    verdict = ask({**rule(status=403), "response": {"status": 403, "body": "x", "headers": {"content-type": "text/x"}}})
    assert verdict is not None
    assert verdict.headers == [("content-type", "text/x"), ("Content-Length", "3")]


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Bad": "a\r\nSet-Cookie: x"},
        {"X-Bad": "a\nb"},
        {"X-Bad": "a\0"},
        {"X Bad": "a"},
        {"X-Bad\r\n": "a"},
        {"": "a"},
        {"X-Bad": "日本"},
        {"X-Bäd": "a"},
        {"X-Bad": None},
        {"X-Bad": {"a": 1}},
        {"X-Bad": []},
        {"Content-Length": "5"},
        {"Transfer-Encoding": "chunked"},
        {"Connection": "close"},
        {"X-Bad": "{{evil}}"},
    ],
)
def test_a_header_that_cannot_be_sent_is_left_out_alone(headers: dict[str, Any]) -> None:
    """Line breaks (from a merge value too), framing and other alphabets: that header goes, the rest of the rule holds."""
    guard = Guard()
    one = rule("r", kind="user", status=403, variables=[{"name": "evil"}])
    one["response"]["headers"] = {**headers, "X-Good": "é", "X-Number": 5}
    config = config_of(user_rules={"u": [{"rules": "r", "values": {"evil": "a\r\nb"}}]})
    verdict = rules_of(one, guard=guard).evaluate(facts(), "u", None, config)
    assert verdict is not None
    assert verdict.headers[:2] == [("X-Good", "é"), ("X-Number", "5")]
    assert [name for name, _ in verdict.headers[2:]] == ["Content-Type", "Content-Length"]
    assert guard.counts() == {"governance header": 1}


HOSTILE_RULES: list[Any] = [
    None,
    5,
    "rule",
    [],
    {},
    {"type": "regex"},
    {**rule("x", status=403), "_id": 5},
    {**rule("x", status=403), "_id": ""},
    {**rule("x", status=403), "type": "other"},
    {**rule("x", status=403), "type": ["regex"]},
    {**rule("x", status=403), "block": "yes"},
    {**rule("x", status=403), "applied_to": "some"},
    {**rule("x", status=403), "applied_to": {}, "type": "user", "applied_to_unidentified": 5},
    {**rule("x", status=403), "regex_config": "x"},
    {**rule("x", status=403), "regex_config": {"conditions": []}},
    {**rule("x", status=403), "regex_config": [5]},
    {**rule("x", status=403), "regex_config": [{}]},
    {**rule("x", status=403), "regex_config": [{"conditions": [{"path": "request.verb", "value": "("}]}]},
    {**rule("x", status=403), "regex_config": [{"conditions": [{"path": "request.verb", "value": ["G"]}]}]},
    {**rule("x", status=403), "regex_config": [{"conditions": [{"path": None, "value": "G"}]}]},
    {**rule("x", status=403), "regex_config": [{"conditions": [{"value": "G"}]}]},
    {**rule("x", status=403), "response": None},
    {**rule("x", status=403), "response": []},
    {**rule("x", status=403), "response": {}},
    {**rule("x", status=403), "response": {"status": 42}},
    {**rule("x", status=403), "response": {"status": 1000}},
    {**rule("x", status=403), "response": {"status": "abc"}},
    {**rule("x", status=403), "response": {"status": True}},
    {**rule("x", status=403), "response": {"status": 403.5}},
    {**rule("x", status=403), "response": {"status": 403, "headers": ["X"]}},
    {**rule("x", status=403), "variables": "x"},
    {**rule("x", status=403), "variables": [5]},
]


@pytest.mark.parametrize("bad", HOSTILE_RULES)
def test_a_bad_rule_is_left_out_alone(bad: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It is counted and logged once; the rules around it work; the call is not blocked by it."""
    guard = Guard()
    with caplog.at_level(logging.WARNING):
        rules = rules_of(rule("a"), bad, bad, rule("b"), guard=guard)
        verdict = rules.evaluate(facts(), None, None, DEFAULT_CONFIG)
    assert verdict is not None
    assert verdict.headers == [("X-a", "a"), ("X-b", "b")]
    assert sum(guard.counts().values()) == 2
    assert len(caplog.records) == 1


@pytest.mark.parametrize("data", [b"", b"{}", b"null", b"5", b"[", b"\xff", b'["busy"]', b"[null, []]"])
def test_an_answer_that_is_no_array_is_malformed_as_a_whole(data: bytes) -> None:
    """Such an answer raises, so that the poller keeps the last good rules."""
    with pytest.raises(MalformedError):
        RuleSet.from_json(data, Guard())


def test_stale_ids_do_not_matter() -> None:
    """A cohort entry that names an unknown rule is passed over; the others apply; it can be noticed."""
    config = config_of(user_rules={"u": [{"rules": "gone"}, {"rules": "r"}]})
    rules = rules_of(rule("r", kind="user", status=403))
    assert rules.evaluate(facts(), "u", None, config) is not None
    assert rules.has_unknown_ids(config)
    assert not rules.has_unknown_ids(config_of(user_rules={"u": [{"rules": "r"}]}))


def test_a_rule_named_twice_takes_the_last_values() -> None:
    """As the Python SDK does."""
    one = {"_id": "r", "type": "user", "response": {"headers": {"X": "{{0}}"}}, "variables": [{"name": "0"}]}
    config = config_of(user_rules={"u": [{"rules": "r", "values": {"0": "a"}}, {"rules": "r", "values": {"0": "b"}}]})
    verdict = ask(one, user="u", config=config)
    assert verdict is not None
    assert verdict.headers == [("X", "b")]


def test_a_catastrophic_expression_does_not_block_and_does_not_hang() -> None:
    """The rule is skipped and counted; the others apply."""
    guard = Guard()
    slow = rule("slow", status=403, regex_config=where({"request.headers.x-input": "^(a+)+$"}))
    rules = rules_of(*([slow] * 50), rule("good"), guard=guard)
    verdict = rules.evaluate(facts(X_Input="a" * 8_000 + "!"), None, None, DEFAULT_CONFIG)
    assert verdict is not None
    assert not verdict.blocked
    assert verdict.headers == [("X-good", "good")]
    assert guard.counts() == {"slow governance rule": 50}


def test_padding_hides_nothing() -> None:
    """However long a URI, a header or a body value is, an ordinary expression looks through all of it."""
    about = facts(
        X="a" * 60_000 + "end", uri="https://h/x?" + "a" * 60_000 + "&op=delete", body={"a": "b" * 90_000 + "c"}
    )
    for path, expression in (
        ("request.headers.x", "end$"),
        ("request.route", "op=delete"),
        ("request.route", "^/x$"),
        ("request.body.a", "b+c"),
    ):
        assert ask(rule(regex_config=where({path: expression})), about=about) is not None, path


def test_slow_input_for_one_rule_switches_no_other_rule_off() -> None:
    """Texts on which twenty rules run out of time leave the others in force, for this request and for the next ones."""
    slow = [rule(f"slow{n}", status=403, regex_config=where({"request.headers.x": f"^(a+)+{n}$"})) for n in range(20)]
    rules = rules_of(*slow, rule("guard", status=401, regex_config=where({"request.route": "^/(users|admin)/"})))
    for _ in range(25):
        verdict = rules.evaluate(facts(X="a" * 8_000 + "!"), None, None, DEFAULT_CONFIG)
        assert verdict is not None
        assert verdict.blocked_by == "guard"
    hit = rules.evaluate(facts(X="aaa3"), None, None, DEFAULT_CONFIG)
    assert hit is not None
    assert hit.blocked_by == "guard"
    alone = rules_of(*slow)
    with_slow_input = alone.evaluate(facts(X="a" * 8_000 + "!"), None, None, DEFAULT_CONFIG)
    ordinary = alone.evaluate(facts(X="aaa3"), None, None, DEFAULT_CONFIG)
    assert with_slow_input is None
    assert ordinary is not None
    assert ordinary.blocked_by == "slow3"


def test_a_route_that_is_slow_as_uri_is_still_asked_as_path() -> None:
    """A long query cannot keep the path from being looked at."""
    about = facts(uri="https://h/aaa?" + "a" * 8_000 + "!")
    assert ask(rule(regex_config=where({"request.route": "^(/?a+)+$"})), about=about) is not None


@pytest.mark.parametrize(
    "uri",
    ["https://h/%61dmin", "https://h/adm%69n?x=1", "https://h//admin", "https://h///admin?x=1", "https://h/%2F/%61dmin"],
)
def test_a_path_is_seen_as_frameworks_route_it(uri: str) -> None:
    """They decode it, and Flask and Falcon drop slashes: a client cannot write it so that a rule does not know it."""
    assert ask(rule(regex_config=where({"request.route": "^/admin"})), about=facts(uri=uri)) is not None


def test_the_body_is_asked_for_only_when_needed() -> None:
    """A rule whose verb does not fit asks for no body; one that has come so far does, and then knows the rest already."""
    about = RequestFacts(verb="GET", uri=URI, headers={}, ip_address=None)
    assert ask(rule(regex_config=where({"request.verb": "POST", "request.body.a": "x"})), about=about) is None
    one = rule(regex_config=where({"request.verb": "GET", "request.body.a": "x"}))
    with pytest.raises(BodyNeededError):
        ask(one, about=about)
    about.give_body({"a": "x"})
    assert ask(one, about=about) is not None


def test_a_body_that_cannot_be_read_is_a_fact_of_its_own() -> None:
    """Rules on its keys do not hold, one on `request.body.$unreadable` does; for a readable body it is the reverse."""
    keys = rule("keys", status=403, regex_config=where({"request.body.amount": ".*"}))
    unreadable = rule("unreadable", status=415, regex_config=where({"request.body.$unreadable": "not_json|too_large"}))
    about = RequestFacts(verb="POST", uri=URI, headers={}, ip_address=None)
    about.give_body(None, "not_json")
    verdict = ask(keys, unreadable, about=about)
    assert verdict is not None
    assert verdict.blocked_by == "unreadable"
    verdict = ask(keys, unreadable, about=facts(body={"amount": 5}))
    assert verdict is not None
    assert verdict.blocked_by == "keys"
    assert ask(unreadable, about=facts(body=None)) is None


def test_what_a_set_of_rules_needs_is_told() -> None:
    """Captures identify early for such rules only."""
    assert rules_of(rule(kind="user")).needs_identity
    assert rules_of(rule(kind="company")).needs_identity
    assert not rules_of(rule()).needs_identity


def test_an_identity_whose_text_fails_lets_the_call_pass() -> None:
    """Not even a hostile callback value raises out of the evaluation."""

    class Hostile:
        def __str__(self) -> str:
            raise RuntimeError

    guard = Guard()
    rules = rules_of(rule("r", kind="user", status=403, applied_to_unidentified=True), guard=guard)
    assert rules.evaluate(facts(), Hostile(), None, DEFAULT_CONFIG) is None
    assert guard.counts() == {"governance rules": 1}


# The verdict's headers.


def verdict_of(*headers: tuple[str, str]) -> Decision:
    return Decision(blocked=False, status=0, headers=list(headers), body=None, blocked_by=None)


def test_order_and_repetition_of_the_applications_headers_stay() -> None:
    """Cookies keep their order and number; the list that the application sent is not changed."""
    own = [("Set-Cookie", "a=1"), ("X-A", "own"), ("Set-Cookie", "b=2")]
    sent = list(own)
    assert verdict_of(("X-New", "n"), ("x-a", "rule")).added_to(sent) == [*own, ("X-New", "n"), ("x-a", "rule")]
    assert sent == own


def test_a_content_type_is_not_repeated() -> None:
    """Two of them would be read differently by different clients; without one, the rule's is added."""
    typed = verdict_of(("Content-Type", "x"))
    assert typed.added_to([("content-type", "text/plain")]) == [("content-type", "text/plain")]
    assert typed.added_to([]) == [("Content-Type", "x")]


@pytest.mark.parametrize("odd", [[("X",)], [5], None, [(b"X", b"y")], [(5, "y")], "abc"])
def test_headers_that_are_none_are_given_back(odd: Any) -> None:
    """What the application does wrong reaches the server as it is; nothing raises here."""
    assert verdict_of(("Content-Type", "x")).added_to(odd) is odd or odd == [(b"X", b"y")]
