"""A real Chromium for the sandbox's tests: the machine's own, driven by Playwright.

Where there is none the tests are skipped with the reason, unless REQUIRE_BROWSER says that they must run
(`.ci/run` does).
"""

from __future__ import annotations

import os
import shutil

import pytest

FLAGS = [
    "--no-sandbox",  # as root, Chromium starts with no other
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def absent(reason):
    """Skip for a reason, or fail where a browser is required."""
    if os.environ.get("REQUIRE_BROWSER") == "1":
        pytest.fail(f"REQUIRE_BROWSER=1, but {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def launch(playwright):
    """Start the machine's Chromium."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        absent("no Chromium is installed (apt-get install chromium)")
    return playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
