"""The page as it is served. tests/page/ has the tests in a browser."""

from __future__ import annotations

import base64
import hashlib
import re

from starlette.testclient import TestClient

from dgemma_mlx import load
from dgemma_mlx.server.app import make_app
from dgemma_mlx.server.page import read_page
from dgemma_mlx.server.settings import ServerSettings


def test_the_page_is_served_with_a_policy_that_lets_only_its_own_script_run() -> None:
    app = make_app(lambda: load("demo"), ServerSettings("demo"))
    page = TestClient(app, base_url="http://127.0.0.1:8080").get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        content = page.text.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["require-trusted-types-for"] == "'script'" and "unsafe" not in str(policy)


def test_what_is_allowed_at_the_page_is_all_that_it_answers() -> None:
    client = TestClient(make_app(lambda: load("demo"), ServerSettings("demo")), base_url="http://127.0.0.1:8080")
    assert set(client.request("OPTIONS", "/").headers["allow"].split(", ")) == {"GET", "HEAD"}
    assert client.head("/").status_code == 200  # Anthropic's clients ask so before their first message


def test_the_page_takes_nothing_from_outside_and_makes_no_html_of_texts() -> None:
    text, _ = read_page()
    assert set(re.findall(r"https?://[\w.]+", text)) == {"http://www.w3.org"}  # the name of SVG
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(|srcdoc", text)
    assert not re.findall(r"<[^>]*\s(?:style|on\w+)=", text), "the policy forbids attributes that are styles or scripts"
