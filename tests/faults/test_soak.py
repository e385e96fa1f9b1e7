"""The soak, shortened; `python -m tests.faults.soak 300` runs it for minutes."""

from __future__ import annotations

import pytest

from tests.faults.soak import soak


@pytest.mark.parametrize("with_spool", [False, True])
def test_books_agree_after_random_faults(with_spool) -> None:
    """Under random faults the law holds at every look, and what the server has is what was accepted minus what was dropped."""
    assert "delivered" in soak(1.5 if with_spool else 3.0, 20261121, with_spool=with_spool)
