"""The sandbox as a server: what a client is answered, what is stored, how it starts and ends."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time

import pytest
import requests

from moesif_otel.sandbox import Sandbox
from tests.sandbox.events import make_event


@pytest.fixture(scope="module")
def running():
    """Give one sandbox for the module."""
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(running):
    """Give that sandbox, emptied."""
    running.clear()
    return running


@pytest.fixture
def client():
    """Give a keep-alive client with an application id."""
    with requests.Session() as session:
        session.headers["X-Moesif-Application-Id"] = "app-1"
        yield session


def post(client, sandbox, path, value, **keywords):
    """Post JSON."""
    return client.post(sandbox.url + path, json=value, timeout=10, **keywords)


def test_an_event_is_stored_as_it_was_sent(sandbox, client):
    """A single event is answered 201 with both tags and is given back unchanged."""
    sent = make_event(user_id="u1", metadata={"a": [1, None, "é"]})
    answer = post(client, sandbox, "/v1/events", sent)
    assert answer.status_code == 201
    assert answer.headers["X-Moesif-Config-ETag"]
    assert answer.headers["X-Moesif-Rules-Tag"]
    assert sandbox.wait_for_events(1) == [sent]


def test_the_event_as_json_is_exact(sandbox, client):
    """The page's link to an event shows it in lines, and whole numbers of any size as they were sent."""
    sent = make_event(metadata={"ids": [2**64 - 1, 2**64, 10**40 + 1, 1.5]})
    post(client, sandbox, "/v1/events", sent)
    answer = client.get(f"{sandbox.url}/api/events/{sandbox.last_sequence()}", timeout=10)
    assert answer.json() == sent
    assert f"\n      {10**40 + 1},\n" in answer.text


def test_a_gzip_batch_is_stored_in_order(sandbox, client):
    """A gzip batch is decoded; its events are given back in order, and the log tells both sizes."""
    sent = [make_event() for _ in range(100)]
    plain = json.dumps(sent).encode()
    packed = gzip.compress(plain)
    answer = client.post(
        sandbox.url + "/v1/events/batch", data=packed, headers={"Content-Encoding": "gzip"}, timeout=10
    )
    assert answer.status_code == 201
    assert sandbox.events() == sent
    (entry,) = sandbox.requests("/v1/events/batch")
    assert (entry["body_bytes"], entry["decoded_bytes"], entry["status"]) == (len(packed), len(plain), 201)
    assert entry["headers"]["content-encoding"] == "gzip"
    assert entry["application_id"] == "app-1"


def test_a_transaction_id_is_stored_once(sandbox, client):
    """The same transaction id again, in another batch too, is answered 201 and counted as a duplicate."""
    one, other = make_event(), make_event()
    post(client, sandbox, "/v1/events/batch", [one, other])
    assert post(client, sandbox, "/v1/events/batch", [other, one]).status_code == 201
    assert post(client, sandbox, "/v1/events", one).status_code == 201
    assert sandbox.events() == [one, other]
    stats = sandbox.stats()
    assert (stats["received"], stats["duplicates"], stats["stored"], stats["batches"]) == (5, 3, 2, 3)


def test_application_ids_are_kept_apart(sandbox, client):
    """Events, profiles and duplicates of one application id do not show under another."""
    same = make_event()
    post(client, sandbox, "/v1/events", same)
    post(client, sandbox, "/v1/events", same, headers={"X-Moesif-Application-Id": "app-2"})
    post(client, sandbox, "/v1/users", {"user_id": "u"}, headers={"X-Moesif-Application-Id": "app-2"})
    assert len(sandbox.events()) == 2
    assert sandbox.events(application_id="app-2") == [same]
    assert sandbox.profiles("users", application_id="app-1") == []
    listed = requests.get(sandbox.url + "/api/events?application_id=app-1", timeout=10).json()
    assert listed == [same]


def test_who_follows_gets_each_call_once(sandbox, client, monkeypatch):
    """The number to go on from is that of the newest call of the answer, also where it came during the answer."""
    post(client, sandbox, "/v1/events", make_event())
    last_sequence = sandbox._store.last_sequence

    def before_another_arrives():
        last = last_sequence()
        monkeypatch.undo()
        post(client, sandbox, "/v1/events", make_event())
        return last

    monkeypatch.setattr(sandbox._store, "last_sequence", before_another_arrives)
    answer = requests.get(sandbox.url + "/api/calls", timeout=10).json()
    assert len(answer["calls"]) == 2
    assert requests.get(sandbox.url + f"/api/calls?after={answer['last']}", timeout=10).json()["calls"] == []


def test_one_bad_event_refuses_its_batch(sandbox, client):
    """A batch with a bad event stores nothing; the error names the index and the field."""
    bad = make_event()
    del bad["request"]["time"]
    answer = post(client, sandbox, "/v1/events/batch", [make_event(), bad])
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["index"], error["field"]) == ("missing_field", 1, "request.time")
    assert sandbox.events() == []
    assert sandbox.stats()["rejected"] == 1


def test_the_application_id_is_asked_for(sandbox):
    """Without the header the answer is 401 and says so."""
    answer = requests.post(sandbox.url + "/v1/events", json=make_event(), timeout=10)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "no_application_id")


def test_only_the_allowed_application_ids_are_taken(client):
    """A sandbox made for some ids answers 401 to any other."""
    with Sandbox(application_ids=["app-1"]) as sandbox:
        assert post(client, sandbox, "/v1/events", make_event()).status_code == 201
        refused = post(client, sandbox, "/v1/events", make_event(), headers={"X-Moesif-Application-Id": "other"})
        assert refused.status_code == 401
        assert len(sandbox.events()) == 1


def test_an_event_over_its_limit_is_413(sandbox, client):
    """An event over 1 MB is answered 413, alone and in a batch."""
    large = make_event(metadata={"text": "x" * (1024 * 1024)})
    assert post(client, sandbox, "/v1/events", large).status_code == 413
    answer = post(client, sandbox, "/v1/events/batch", [make_event(), large])
    assert (answer.status_code, answer.json()["error"]["index"]) == (413, 1)
    assert sandbox.events() == []


def test_a_gzip_bomb_is_413(sandbox, client):
    """A small body that decodes to over 50 MB is refused without being decoded whole."""
    packed = gzip.compress(bytes(60 * 1024 * 1024), compresslevel=1)
    answer = client.post(
        sandbox.url + "/v1/events/batch", data=packed, headers={"Content-Encoding": "gzip"}, timeout=30
    )
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("body", "encoding", "status"),
    [
        (b"not json", None, 400),
        (b"{}", None, 400),
        (b"[]", None, 400),
        (b'[{"request": NaN}]', None, 400),
        (b"not gzip", "gzip", 400),
        (gzip.compress(b"[" + b" " * 500, mtime=0)[:-9], "gzip", 400),
        (b"[]", "br", 415),
    ],
)
def test_bad_bodies_are_named(sandbox, client, body, encoding, status):
    """Whatever is wrong with a body, the answer has a status of its own and a JSON error."""
    headers = {"Content-Encoding": encoding} if encoding else {}
    answer = client.post(sandbox.url + "/v1/events/batch", data=body, headers=headers, timeout=10)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_unknown_paths_and_methods(sandbox, client):
    """Another path is 404, another method 405; the health probe needs no application id."""
    assert post(client, sandbox, "/v1/nothing", {}).status_code == 404
    assert post(client, sandbox, "/v1/events/batch/more", {}).status_code == 404
    assert client.get(sandbox.url + "/v1/events", timeout=10).status_code == 405
    assert requests.get(sandbox.url + "/health/probe", timeout=10).status_code == 200


def test_profiles_merge_as_upserts_do(sandbox, client):
    """A later user adds to an earlier one with the same id, inside metadata and campaign too."""
    post(client, sandbox, "/v1/users", {"user_id": "u1", "company_id": "c1", "metadata": {"a": 1, "b": 1}})
    post(client, sandbox, "/v1/users/batch", [{"user_id": "u1", "metadata": {"b": 2}}, {"user_id": "u2"}])
    assert sandbox.profiles("users") == [
        {"user_id": "u1", "company_id": "c1", "metadata": {"a": 1, "b": 2}},
        {"user_id": "u2"},
    ]


@pytest.mark.parametrize(
    ("kind", "good", "missing"),
    [
        ("users", {"user_id": "u"}, "user_id"),
        ("companies", {"company_id": "c"}, "company_id"),
        ("subscriptions", {"subscription_id": "s", "company_id": "c", "status": "active"}, "status"),
        (
            "actions",
            {"action_name": "Bought", "request": {"time": "2026-01-02T03:04:05.678", "uri": "http://a.test/"}},
            "action_name",
        ),
    ],
)
def test_each_kind_of_profile(sandbox, client, kind, good, missing):
    """Each kind is taken alone and in a batch, and refused with the name of the field that is missing."""
    assert post(client, sandbox, f"/v1/{kind}", good).status_code == 201
    assert post(client, sandbox, f"/v1/{kind}/batch", [good]).status_code == 201
    assert sandbox.profiles(kind)[-1] == good
    assert len(sandbox.profiles(kind)) == (2 if kind == "actions" else 1)
    bad = {name: value for name, value in good.items() if name != missing}
    answer = post(client, sandbox, f"/v1/{kind}/batch", [good, bad])
    assert answer.status_code == 400
    assert (answer.json()["error"]["index"], answer.json()["error"]["field"]) == (1, missing)


@pytest.mark.parametrize(("name", "value"), [("config", {"sample_rate": 7}), ("rules", [{"_id": "r1"}])])
def test_config_and_rules_are_edited_live(sandbox, client, name, value):
    """PUT changes what GET answers and both tags; `If-None-Match` with the tag is 304."""
    header = {"config": "X-Moesif-Config-ETag", "rules": "X-Moesif-Rules-Tag"}[name]
    url = f"{sandbox.url}/v1/{name}"
    before = client.get(url, timeout=10)
    assert before.status_code == 200
    assert post(client, sandbox, "/v1/events", make_event()).headers[header] == before.headers[header]
    assert client.get(url, headers={"If-None-Match": before.headers["ETag"]}, timeout=10).status_code == 304
    assert client.get(url, headers={"If-None-Match": before.headers[header]}, timeout=10).status_code == 304
    tags = {before.headers[header]}
    for _ in range(2):  # the same content again is an edit too
        assert requests.put(url, json=value, timeout=10).status_code == 200
        after = client.get(url, headers={"If-None-Match": before.headers["ETag"]}, timeout=10)
        assert (after.status_code, after.json()) == (200, value)
        tags.add(after.headers[header])
    assert len(tags) == 3
    assert post(client, sandbox, "/v1/events", make_event()).headers[header] == after.headers[header]
    assert requests.put(url, json="text", timeout=10).status_code == 400


def test_config_of_one_application(client):
    """A configuration put with an application id is for that one alone."""
    with Sandbox() as sandbox:
        sandbox.put_config({"sample_rate": 1}, application_id="app-1")
        sandbox.put_rules([{"_id": "r"}])
        other = {"X-Moesif-Application-Id": "app-2"}
        assert client.get(sandbox.url + "/v1/config", timeout=10).json() == {"sample_rate": 1}
        assert client.get(sandbox.url + "/v1/config", headers=other, timeout=10).json()["sample_rate"] == 100
        assert client.get(sandbox.url + "/v1/rules", headers=other, timeout=10).json() == [{"_id": "r"}]


def test_told_to_fail_a_few_times(sandbox, client):
    """A status, its headers and a number of times, on the paths named; then all is well again."""
    body = {"status": 503, "times": 2, "headers": {"Retry-After": "1"}, "paths": ["/v1/events/batch"]}
    assert requests.put(sandbox.url + "/api/behaviour", json=body, timeout=10).json() == [body]
    assert post(client, sandbox, "/v1/events", make_event()).status_code == 201
    answers = [post(client, sandbox, "/v1/events/batch", [make_event()]) for _ in range(3)]
    assert [a.status_code for a in answers] == [503, 503, 201]
    assert answers[0].headers["Retry-After"] == "1"
    assert [e["misbehaved"] for e in sandbox.requests("/v1/events/batch")] == [True, True, False]
    assert sandbox.stats()["misbehaved"] == 2
    assert len(sandbox.events()) == 2


def test_told_to_refuse_large_bodies(sandbox, client):
    """With `max_bytes` alone, a body over it is 413 and a smaller one is taken."""
    sandbox.behave(max_bytes=1_000)
    assert post(client, sandbox, "/v1/events/batch", [make_event() for _ in range(20)]).status_code == 413
    assert post(client, sandbox, "/v1/events/batch", [make_event()]).status_code == 201


def test_told_to_take_events_and_fail_all_the_same(sandbox, client):
    """`process_first` stores the events although the client is told, or shown, a failure."""
    sandbox.behave({"status": 500, "process_first": True, "times": 1}, {"disconnect": True, "process_first": True})
    assert post(client, sandbox, "/v1/events", make_event()).status_code == 500
    with pytest.raises(requests.ConnectionError):
        post(client, sandbox, "/v1/events", make_event())
    assert len(sandbox.wait_for_events(2)) == 2
    assert sandbox.requests()[-1]["status"] is None


def test_told_to_be_slow(sandbox, client):
    """A delay comes before the real answer."""
    sandbox.behave(delay_s=0.2)
    began = time.monotonic()
    assert post(client, sandbox, "/v1/events", make_event()).status_code == 201
    assert time.monotonic() - began >= 0.2


def test_told_to_hang_until_told_otherwise(sandbox, client):
    """A request that hangs is answered when the behaviours change."""
    sandbox.behave(hang=True)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(post(client, sandbox, "/v1/events", make_event())))
    thread.start()
    while not sandbox.stats()["misbehaved"]:
        time.sleep(0.01)
    assert sandbox.events() == []
    sandbox.behave()
    thread.join(30)
    assert answers[0].status_code == 201


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": "503"},
        {"status": 99},
        {"times": 0},
        {"hang": "yes"},
        {"delay": 1},
        {"paths": "/v1"},
        {"max_bytes": -1},
        {"headers": {"a": 1}},
    ],
)
def test_a_wrong_behaviour_is_named(sandbox, wrong):
    """A behaviour with an unknown field or a wrong value is refused with the field's name, both ways in."""
    (field,) = wrong
    answer = requests.put(sandbox.url + "/api/behaviour", json=wrong, timeout=10)
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, field)
    with pytest.raises(ValueError, match=field):
        sandbox.behave(**wrong)


def test_listing_with_since_and_limit(sandbox, client):
    """`limit` gives the newest, `since` those after the sequence number that an answer carried."""
    sent = [make_event() for _ in range(5)]
    post(client, sandbox, "/v1/events/batch", sent[:4])
    first = requests.get(sandbox.url + "/api/events?limit=2", timeout=10)
    assert first.json() == sent[2:4]
    post(client, sandbox, "/v1/events", sent[4])
    since = first.headers["X-Sandbox-Sequence"]
    assert requests.get(f"{sandbox.url}/api/events?since={since}", timeout=10).json() == sent[4:]
    assert requests.get(f"{sandbox.url}/api/events?limit=x", timeout=10).status_code == 400


def test_delete_forgets(sandbox, client):
    """DELETE /api/events empties events, profiles, log and counters."""
    post(client, sandbox, "/v1/events", make_event())
    post(client, sandbox, "/v1/users", {"user_id": "u"})
    assert requests.delete(sandbox.url + "/api/events", timeout=10).status_code == 204
    assert (sandbox.events(), sandbox.profiles("users"), sandbox.requests()) == ([], [], [])
    assert not any(sandbox.stats().values())
    assert requests.get(sandbox.url + "/api/profiles?kind=users", timeout=10).json() == []
    assert requests.get(sandbox.url + "/api/profiles?kind=x", timeout=10).status_code == 400
    assert requests.get(sandbox.url + "/api/requests", timeout=10).json() == []


def test_connections_are_counted(sandbox, client):
    """Two requests of a keep-alive client take one connection."""
    post(client, sandbox, "/v1/events", make_event())
    post(client, sandbox, "/v1/events", make_event())
    assert requests.get(sandbox.url + "/api/stats", timeout=10).json()["connections"] == 2  # one is this call's
    assert len({entry["connection"] for entry in sandbox.requests()}) == 1


def test_a_name_of_another_site_is_refused(sandbox):
    """The API and the page answer to this machine's names only: DNS can be made to lie to a browser."""
    for host, status in [("evil.test", 421), ("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:5", 200)]:
        answer = requests.get(sandbox.url + "/api/stats", headers={"Host": host}, timeout=10)
        assert answer.status_code == status, host


def test_waiting_in_vain_tells_what_came(sandbox, client):
    """A wait that ends without enough events says how many came and what the last answers were."""
    post(client, sandbox, "/v1/events", make_event())
    post(client, sandbox, "/v1/events", {})
    with pytest.raises(TimeoutError, match=r"1 of 2 events.*\('/v1/events', 400\)"):
        sandbox.wait_for_events(2, timeout_s=0.05)


def test_stop_and_start_again_on_the_same_port(client):
    """After `stop` nobody listens; after `start` the same address works and what arrived before is still there."""
    with Sandbox() as sandbox:
        post(client, sandbox, "/v1/events", make_event())
        sandbox.stop()
        with pytest.raises(requests.ConnectionError):
            post(client, sandbox, "/v1/events", make_event())
        assert len(sandbox.events()) == 1
        url = sandbox.url
        sandbox.start()
        assert sandbox.url == url
        post(client, sandbox, "/v1/events", make_event())
        assert len(sandbox.events()) == 2


def test_ends_with_open_and_hanging_connections(client):
    """Leaving the block ends every thread, whatever clients are doing."""
    before = set(threading.enumerate())
    with Sandbox() as sandbox, socket.create_connection(("127.0.0.1", sandbox.port)) as half:
        listening = requests.get(sandbox.url + "/api/stream", stream=True, timeout=10)  # a page that is open
        half.sendall(b"POST /v1/events HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        sandbox.behave(hang=True)
        failed = []

        def call():
            try:
                post(client, sandbox, "/v1/events", make_event())
            except requests.ConnectionError as error:
                failed.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        while not sandbox.stats()["misbehaved"]:
            time.sleep(0.01)
        sandbox.close()
        thread.join(30)
        assert failed
        listening.close()
    assert set(threading.enumerate()) <= before


def test_a_file_outlives_the_sandbox(tmp_path, client):
    """With a database file, events, profiles and edited rules are there at the next start."""
    path = str(tmp_path / "calls.sqlite")
    with Sandbox(database=path) as sandbox:
        post(client, sandbox, "/v1/events", make_event(user_id="kept"))
        post(client, sandbox, "/v1/users", {"user_id": "u"})
        sandbox.put_rules([{"_id": "r"}])
    with Sandbox(database=path) as sandbox:
        assert [e["user_id"] for e in sandbox.events()] == ["kept"]
        assert sandbox.profiles("users") == [{"user_id": "u"}]
        assert client.get(sandbox.url + "/v1/rules", timeout=10).json() == [{"_id": "r"}]


def test_a_port_in_use_is_an_error():
    """Starting on a port that is taken raises, and leaves no thread behind."""
    before = set(threading.enumerate())
    with Sandbox() as first:
        second = Sandbox(port=first.port)
        with pytest.raises(OSError):
            second.start()
        second.close()
    assert set(threading.enumerate()) <= before


def test_the_oldest_events_go_first(client):
    """Over `max_events` the oldest are forgotten."""
    with Sandbox(max_events=3) as sandbox:
        sent = [make_event() for _ in range(5)]
        post(client, sandbox, "/v1/events/batch", sent)
        assert sandbox.events() == sent[2:]
