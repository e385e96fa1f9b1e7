"""`events.caller`: who made a request, and from where."""

from __future__ import annotations

import base64
import ipaddress
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesif_otel._events.caller import client_address, settle, user_from_headers
from tests.calls import Calls


def encode(value: Any, *, padded: bool = False, url_safe: bool = True) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    text = (base64.urlsafe_b64encode if url_safe else base64.b64encode)(data).decode()
    return text if padded else text.rstrip("=")


def jwt(claims: Any, **how: bool) -> str:
    return f"{encode({'alg': 'HS256'})}.{encode(claims, **how)}.c2lnbmF0dXJl"


def user(value: str, *, field: str = "sub", names: tuple[str, ...] = ("authorization",)) -> str | None:
    return user_from_headers({"authorization": value}, names, field)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("url_safe", [True, False])
def test_bearer_token_names_its_subject(scheme: str, padded: bool, url_safe: bool) -> None:
    """Scheme in any case, base64 of either alphabet, padded or not (`~~~` and `???` need the two special letters)."""
    claims = {"sub": "jörg???~~~", "n": "x"}
    assert user(f"{scheme}  {jwt(claims, padded=padded, url_safe=url_safe)}") == "jörg???~~~"


@pytest.mark.parametrize(
    ("claims", "field", "expected"),
    [
        ({"SUB": "joe"}, "sub", "joe"),
        ({"userId": "joe"}, "USERID", "joe"),
        ({"sub": 42}, "sub", "42"),
        ({"sub": 123456789012345678901234567890}, "sub", "123456789012345678901234567890"),
        ({"sub": 1.5}, "sub", "1.5"),
        ({"sub": True}, "sub", None),
        ({"sub": False}, "sub", None),
        ({"sub": ["a", 1]}, "sub", None),
        ({"sub": {"id": 1}}, "sub", None),
        ({"sub": None}, "sub", None),
        ({"sub": ""}, "sub", None),
        ({"sub": None, "Sub": "joe"}, "sub", "joe"),
        ({"name": "joe"}, "sub", None),
        (["sub"], "sub", None),
        ("sub", "sub", None),
    ],
)
def test_claims_match_in_any_case_and_become_text(claims: Any, field: str, expected: str | None) -> None:
    """A claim that is no string becomes text with its digits kept; one that is absent or empty names nobody."""
    assert user(f"Bearer {jwt(claims)}", field=field) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (f"Basic {encode(b'joe:secret', padded=True)}", "joe"),
        (f"basic {encode(b'joe:se:cret')}", "joe"),
        (f"Basic {encode('jörg:x'.encode())}", "jörg"),
        (f"Basic {encode('jörg:x'.encode('latin-1'))}", "jörg"),
        (f"Basic {encode(b'joe')}", None),
        (f"Basic {encode(b'joe:')}", None),
        ("Basic c2stbGl2ZS1rZXk", None),
        (f"Basic {encode(b'sk_live_4eC39HqLyjWDarjtT1zdp7dc:')}", None),
        (f"Basic {encode(b'sk_live_4eC39HqLyjWDarjtT1zdp7dc:x')}", None),
        (f"Basic {encode(b'AC3f2504e04f8911d39a0c0305e82c33:token')}", None),
        (f"Basic {encode(b'3f2504e0-4f89-11d3-9a0c-0305e82c3301:x')}", None),
        (f"Basic {encode(b'Zx81kQ0pLm29Vt7sRb44:x')}", None),
        (f"Basic {encode(b'joe.smith.1985@a-long-company-name.example:pw')}", "joe.smith.1985@a-long-company-name.example"),
        (f"Basic {encode(b'firstname.lastname1985:pw')}", "firstname.lastname1985"),
        (f"Basic {encode(b'BillingServiceAccount2:pw')}", "BillingServiceAccount2"),
        (f"Basic {encode(b'service-account-billing-eu:pw')}", "service-account-billing-eu"),
        (f"Basic {encode(b':x')}", None),
        ("Basic", None),
        ("Basic !!!!", None),
        (f"{encode(b'joe:x')}", None),
    ],
)
def test_basic_credentials_name_the_user(value: str, expected: str | None) -> None:
    """The part before the first colon, in UTF-8 or else Latin-1; never the password."""
    assert user(value) == expected


def test_custom_header_with_bare_jwt_or_base64_json() -> None:
    """A header of the user's choice may be a bare token, or JSON in base64."""
    for value in (jwt({"sub": "joe"}), encode({"sub": "joe"}), encode({"sub": "joe"}, padded=True)):
        assert user_from_headers({"x-user": value}, ("X-User",), "sub") == "joe"


def test_the_first_listed_header_that_is_present_decides() -> None:
    """Also when it names nobody: a later header may belong to somebody else."""
    headers = {"x-a": "garbage", "authorization": f"Bearer {jwt({'sub': 'joe'})}"}
    assert user_from_headers(headers, ("X-Absent", "X-A", "Authorization"), "sub") is None
    assert user_from_headers(headers, ("X-Absent", "Authorization", "X-A"), "sub") == "joe"


def test_of_joined_credentials_the_first_counts() -> None:
    """Two Authorization headers arrive with a comma between them."""
    assert user(f"Bearer {jwt({'sub': 'a'})}, Bearer {jwt({'sub': 'b'})}") == "a"


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "Bearer",
        "Bearer opaque",
        "Bearer a.b.c",
        "Bearer ...",
        f"Bearer x.{encode(b'[' * 5_000)}.y",
        f"Bearer x.{encode(b'{' + b'%d' % 10**18 * 500)}.y",
        f"Bearer x.{encode({'sub': 'x' * 2_000})}.y",
        "\udcff\x00",
        "Bearer " + "." * 100_000,
        "A" * 200_000,
    ],
)
def test_malformed_credentials_name_nobody(value: str) -> None:
    """No user, no error, whatever was sent."""
    assert user(value) is None


@given(st.text(max_size=300))
def test_no_text_raises(value: str) -> None:
    """Any header value gives a user or none."""
    for prefix in ("", "Bearer ", "Basic ", "Bearer a."):
        found = user(prefix + value)
        assert found is None or isinstance(found, str)


@given(st.binary(max_size=200))
def test_no_payload_raises(data: bytes) -> None:
    """Any bytes in the places that are decoded give a user or none."""
    for value in (f"Basic {encode(data)}", f"Bearer h.{encode(data)}.s", encode(data)):
        found = user(value)
        assert found is None or isinstance(found, str)


class Account:
    """An object of the application's that has a name while its session is open."""

    def __init__(self) -> None:
        self.name: str | None = "mary"

    def __str__(self) -> str:
        if self.name is None:
            raise RuntimeError
        return self.name


def test_what_callbacks_said_is_taken_as_it_is() -> None:
    """Identities are text at once, and metadata is nobody's dict any more."""
    account, inner, metadata = Account(), [1], {"n": 1, "list": [1]}
    metadata["list"] = inner
    exchange = Calls().exchange(user_id=account, company_id=0, session_token=b"tok", metadata=metadata)
    settle(exchange)
    account.name = None
    metadata["n"] = 2
    inner.append(2)
    assert (exchange.user_id, exchange.company_id, exchange.session_token) == ("mary", None, "tok")
    assert exchange.metadata == {"n": 1, "list": [1]}
    exchange.metadata["list"].append(3)
    assert inner == [1, 2]


class Rude:
    def __bool__(self) -> bool:
        raise RuntimeError


def test_an_object_without_a_truth_is_nobody() -> None:
    """And costs no call."""
    exchange = Calls().exchange(user_id=Rude(), metadata={"odd": Rude()})
    settle(exchange)
    assert exchange.user_id is None
    assert isinstance(exchange.metadata["odd"], str)


PEER = "10.9.8.7"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("x-client-ip", "1.2.3.4", "1.2.3.4"),
        ("x-forwarded-for", "1.2.3.4, 5.6.7.8", "1.2.3.4"),
        ("x-forwarded-for", "1.2.3.4:5555, 5.6.7.8", "1.2.3.4"),
        ("x-forwarded-for", "unknown, 5.6.7.8", "5.6.7.8"),
        ("x-forwarded-for", ", ,5.6.7.8", "5.6.7.8"),
        ("x-forwarded-for", "2001:db8::1, 5.6.7.8", "2001:db8::1"),
        ("x-forwarded-for", "[2001:db8::1]:443", "2001:db8::1"),
        ("x-forwarded-for", "[2001:db8::1%25eth0]", "2001:db8::1"),
        ("x-forwarded-for", "fe80::1%eth0", "fe80::1"),
        ("x-forwarded-for", "[2001:db8::1", "2001:db8::1"),
        ("x-forwarded-for", "::ffff:1.2.3.4", str(ipaddress.ip_address("::ffff:1.2.3.4"))),
        ("cf-connecting-ip", "1.2.3.4", "1.2.3.4"),
        ("true-client-ip", "1.2.3.4", "1.2.3.4"),
        ("x-real-ip", "1.2.3.4", "1.2.3.4"),
        ("x-cluster-client-ip", "1.2.3.4", "1.2.3.4"),
        ("x-forwarded", "1.2.3.4", "1.2.3.4"),
        ("x-forwarded", "for=1.2.3.4;proto=https", "1.2.3.4"),
        ("forwarded-for", "1.2.3.4", "1.2.3.4"),
        ("forwarded", "for=192.0.2.60;proto=http;by=203.0.113.43", "192.0.2.60"),
        ("forwarded", 'For="[2001:db8:cafe::17]:4711"', "2001:db8:cafe::17"),
        ("forwarded", "for=unknown, for=198.51.100.17", "198.51.100.17"),
        ("forwarded", "for=_hidden, for=198.51.100.17:80", "198.51.100.17"),
        ("forwarded", "proto=http; for = 192.0.2.60", "192.0.2.60"),
        ("forwarded", "by=203.0.113.43", PEER),
        ("forwarded", "192.0.2.60", "192.0.2.60"),
    ],
)
def test_each_header_is_read(name: str, value: str, expected: str) -> None:
    """Ports, brackets, zones, `unknown` and RFC 7239's forms are understood in every header that proxies use."""
    assert client_address({name: value}, PEER) == expected


@pytest.mark.parametrize(
    "value", ["", "unknown", "host.example.com", "999.1.1.1", "1.2.3", "1" * 10_000, "[]", ":", "%"]
)
def test_an_invalid_address_is_passed_over(value: str) -> None:
    """What is no address never becomes one; the peer's stands."""
    assert client_address({"x-forwarded-for": value}, PEER) == PEER


def test_the_first_header_with_a_valid_address_decides() -> None:
    """The order is the one of the packages that we replace, and an invalid one does not end the search."""
    headers = {"x-real-ip": "3.3.3.3", "x-forwarded-for": "2.2.2.2", "x-client-ip": "nobody"}
    assert client_address(headers, PEER) == "2.2.2.2"


@pytest.mark.parametrize("peer", [None, ""])
def test_no_address_is_none(peer: str | None) -> None:
    """A Unix socket has no peer address: the event has none."""
    assert client_address({}, peer) is None


@given(st.text(max_size=200), st.sampled_from(["x-forwarded-for", "forwarded", "x-client-ip"]))
def test_any_text_gives_an_address_or_the_peer(value: str, name: str) -> None:
    """Whatever a client sends, the result is a valid address."""
    ipaddress.ip_address(client_address({name: value}, PEER) or "")
