"""`events.client_ip`: whose address a request came from."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesif_otel._events.client_ip import client_address

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
