"""Claims: a span that one pipeline took is known to every exporter of the same place, within a bound."""

from __future__ import annotations

from moesif_otel._pipeline.claims import ClaimSet, claims_of


def test_claims_belong_to_an_application_id_and_base_uri() -> None:
    """Two pipelines with two ids may both send a call; two with the same may not."""
    assert claims_of(("a", "u")) is claims_of(("a", "u"))
    assert claims_of(("a", "u")) is not claims_of(("b", "u"))
    claims_of(("a", "u")).add(1, 2)
    assert (1, 2) in claims_of(("a", "u"))
    assert (1, 2) not in claims_of(("b", "u"))


def test_the_oldest_claims_are_forgotten() -> None:
    """Memory stays bounded however many spans pass."""
    claims = ClaimSet()
    for number in range(20_490):
        claims.add(1, number)
        claims.add(1, number)
    assert (1, 9) not in claims
    assert (1, 10) in claims
    assert (1, 20_489) in claims
