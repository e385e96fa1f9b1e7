"""The README and every page: their code runs, their links lead somewhere, the README stays short."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from moesif_otel.sandbox import Sandbox
from moesif_otel.settings import OPTIONS
from tests.docs.run_page import blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if blocks(page.read_text())]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_code_on_a_page_runs(page: Path, sandbox: Sandbox, tmp_path: Path) -> None:
    """Block after block, as a reader would paste it, against a sandbox."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "MOESIF_"))}
    environ |= {
        "MOESIF_APPLICATION_ID": page.name,
        "MOESIF_BASE_URI": sandbox.url,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    ended = subprocess.run(
        [sys.executable, "-m", "tests.docs.run_page", str(page)],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3_000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """Files and folders that a page names by a link are there."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_a_page_names_exist(page: Path) -> None:
    """A page that names an option by its environment variable names one that is read."""
    named = set(re.findall(r"\b(?:OTEL_)?MOESIF_([A-Z][A-Z_]*[A-Z])\b", page.read_text())) - {"LOCAL_MOESIF_BASEURL", "MIDDLEWARE"}
    wrong = {name for name in named if name not in OPTIONS}
    assert not {name for name in wrong if f"MOESIF_{name}" != "MOESIF_OTEL"}, wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_code(page: Path) -> None:
    """Options, lists and bounds on a page are the ones in force; `python docs/_tables.py` writes them."""
    with_tables = runpy.run_path(str(ROOT / "docs" / "_tables.py"))["with_tables"]
    assert with_tables(page.read_text()) == page.read_text(), "run `python docs/_tables.py`"


def test_the_readme_is_short() -> None:
    """At most 250 lines that a screen can show; the rest is in `docs/`."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 250
    assert max(map(len, lines)) <= 200
