"""Memory while nothing goes out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's size from /proc")
def test_hanging_server_and_60000_requests_of_8_kb() -> None:
    """With the server hanging and 60,000 requests of 8 KB the process grows by less than 100 MB."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.memory"], cwd=root, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100
