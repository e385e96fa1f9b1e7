"""Who may talk to the sandbox: names that nobody else can own, and pages of the sandbox itself."""

from __future__ import annotations

import pytest
import requests

from moesif_otel.sandbox import Sandbox
from tests.sandbox.events import make_event

PATHS = ["/", "/v1/config", "/v1/rules", "/api/stats", "/api/stream", "/export.har", "/static/app.js", "/health/probe"]


@pytest.fixture(scope="module")
def sandbox():
    """Give one sandbox for the module."""
    with Sandbox(allowed_hosts=["moesif.example.com"]) as running:
        yield running


def get(sandbox, path, **headers):
    """Ask, and give the answer's status."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    headers.setdefault("X-Moesif-Application-Id", "a")
    with requests.get(sandbox.url + path, headers=headers, timeout=10, stream=True) as answer:
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        return answer.status_code


@pytest.mark.parametrize("path", PATHS)
def test_a_name_of_another_site_is_refused_everywhere(sandbox, path):
    """DNS can be made to lie to a browser: Moesif's own paths, the page and the API take this machine's names only."""
    for host in ("evil.test", "evil.test:8765", "sandbox", "127.0.0.1.evil.test", "localhost.evil.test", "[", "x y"):
        assert get(sandbox, path, Host=host) in {400, 421}, host
    for host in ("localhost:1", "127.0.0.1", "[::1]:5", "host.docker.internal", "LOCALHOST", "moesif.example.com"):
        assert get(sandbox, path, Host=host) == 200, host


def test_a_container_is_asked_by_its_name():
    """Listening beyond this machine, names without a dot are taken; a name that can be bought still is not."""
    with Sandbox(host="0.0.0.0") as sandbox:
        assert get(sandbox, "/v1/config", Host="sandbox:8765") == 200
        assert get(sandbox, "/v1/config", Host="evil.test") == 421


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/events"), ("PUT", "/v1/rules"), ("PUT", "/v1/config"), ("POST", "/v1/events"), ("DELETE", "/api/events"), ("PUT", "/api/behaviour"), ("PUT", "/api/documents/rules")])  # fmt: skip
def test_a_page_of_another_site_can_do_nothing(sandbox, method, path):
    """A request with a foreign Origin, or with none where a browser says that the site is another, is refused."""
    sandbox.clear()
    for headers in (
        {"Origin": "http://evil.test"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": f"https://127.0.0.1:{sandbox.port}"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
    ):
        answer = requests.request(
            method, sandbox.url + path, json=[], headers={"X-Moesif-Application-Id": "a", **headers}, timeout=10
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_origin"), headers
    assert not sandbox.stats()["requests"]


def test_the_sandboxs_own_page_and_programs_can(sandbox):
    """The page's own Origin, a link that a person follows, and a client without any of it are answered."""
    own = {"Origin": sandbox.url, "X-Moesif-Application-Id": "a"}
    assert requests.put(sandbox.url + "/api/documents/rules", json=[], headers=own, timeout=10).status_code == 200
    assert requests.post(sandbox.url + "/v1/events", json=make_event(), headers=own, timeout=10).status_code == 201
    visit = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert get(sandbox, "/", **visit) == 200
    assert requests.delete(sandbox.url + "/api/events", timeout=10).status_code == 204


def test_bodies_of_the_own_api_are_bounded(sandbox):
    """Editing takes a body of a bounded size; a longer one is refused without being read to its end."""
    for path, size in [("/api/behaviour", 70_000), ("/api/documents/rules", 1_200_000), ("/v1/rules", 1_200_000)]:
        answer = requests.put(sandbox.url + path, data=b'["' + b"x" * size + b'"]', timeout=10)
        assert answer.status_code == 413, path
