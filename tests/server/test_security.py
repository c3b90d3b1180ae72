"""Who may use a server: hosts, origins, keys; and how much a request may take."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.server import connection
from dgemma_mlx.server.security import check_settings
from dgemma_mlx.server.settings import ServerSettings
from tests.server.live import serving

KEY = "s3cret-key"
QUESTION = {"messages": [{"role": "user", "content": "Sort 7 3 5"}], "seed": 1}
ALLOWED = ("https://example.org", "app://obsidian.md", "vscode-webview://")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(allowed_origins=ALLOWED, allowed_hosts=("mac.local",), max_body=100_000, body_seconds=1.0) as address:
        yield address


@pytest.fixture(scope="module")
def locked() -> Iterator[str]:
    with serving(api_key=KEY, allowed_origins=ALLOWED) as address:
        yield address


def post(address: str, headers: dict[str, str], body: Any = QUESTION) -> httpx.Response:
    return httpx.post(f"{address}/v1/chat/completions", json=body, headers=headers, timeout=60)


def raw(address: str, text: bytes, seconds: float = 10) -> bytes:
    """Send bytes, and return everything that comes back until the server closes or stays silent."""
    with socket.create_connection(("127.0.0.1", urlsplit(address).port or 0), timeout=seconds) as connected:
        connected.sendall(text)
        answer = b""
        try:
            while piece := connected.recv(65536):
                answer += piece
        except (TimeoutError, ConnectionResetError):
            pass
        return answer


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "evil-localhost", "",
    "127.0.0.1@evil.example", "[evil]", "[::1].evil.example", "[::1]evil", "xn--mac.local", "a b",
])  # fmt: skip
def test_another_hosts_name_is_refused(address: str, host: str) -> None:
    answer = post(address, {"host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["type"] == "permission_error"


@pytest.mark.parametrize("host", [
    "localhost", "LocalHost:1", "127.0.0.1", "[::1]:80", "192.168.1.7:8080", "a.localhost", "mac.local:8080",
])  # fmt: skip
def test_this_machine_has_several_names(address: str, host: str) -> None:
    assert httpx.get(f"{address}/health", headers={"host": host}).status_code == 200


def test_a_request_with_two_hosts_is_refused(address: str) -> None:
    for hosts in (b"Host: localhost\r\nHost: evil.example\r\n", b""):
        answer = raw(address, b"GET /health HTTP/1.1\r\n" + hosts + b"Connection: close\r\n\r\n")
        assert answer.split()[1] in (b"400", b"403")
    answer = raw(address, b"GET http://evil.example/health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    assert answer.split()[1] == b"403"


@pytest.mark.parametrize("origin", [
    "https://evil.example", "null", "http://localhost:3000", "https://example.org.evil.example", "https://example.org:444",
    "http://example.org", "app://obsidian.md.evil", "vscode-webview:evil", "evil://vscode-webview://",
])  # fmt: skip
def test_a_page_of_another_site_is_refused_before_any_work(address: str, origin: str) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        answer = httpx.request(
            method, f"{address}/v1/chat/completions",
            headers={"origin": origin, "access-control-request-method": "POST", "content-type": "text/plain"},
        )
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origin", ["https://example.org", "app://obsidian.md", "vscode-webview://0f3a9b"])
def test_an_allowed_page_gets_its_answer(address: str, origin: str) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type, x-stainless-os"}
    before = httpx.options(f"{address}/v1/chat/completions", headers={"origin": origin, **asked})
    assert before.status_code == 204 and before.content == b""
    assert before.headers["access-control-allow-origin"] == origin
    assert before.headers["access-control-allow-headers"] == "content-type, x-stainless-os"
    assert "POST" in before.headers["access-control-allow-methods"]
    answer = post(address, {"origin": origin})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
    assert "origin" in answer.headers["vary"].lower()
    wrong = post(address, {"origin": origin}, {"messages": 3})
    assert wrong.status_code == 400 and wrong.headers["access-control-allow-origin"] == origin


def test_the_servers_own_page_needs_no_permission(address: str) -> None:
    answer = post(address, {"origin": address})
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


def test_answers_say_that_browsers_must_not_guess(address: str) -> None:
    for answer in (httpx.get(f"{address}/health"), httpx.get(f"{address}/nothing")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize("headers", [
    {"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {KEY}"}, {"x-api-key": KEY},
    {"authorization": "Bearer dummy", "x-api-key": KEY},
])  # fmt: skip
def test_the_key_opens_the_server(locked: str, headers: dict[str, str]) -> None:
    assert post(locked, headers).status_code == 200


@pytest.mark.parametrize("headers", [
    {}, {"authorization": "Bearer"}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"}, {"x-api-key": ""},
    {"x-api-key": KEY[:-1]}, {"x-api-key": KEY + "x"}, {"authorization": f"Bearer {KEY.upper()}"}, {"x-api-key": "ö"},
    {"cookie": f"x-api-key={KEY}"},
])  # fmt: skip
def test_without_the_key_there_is_no_answer(locked: str, headers: dict[str, str]) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    for path in ("/v1/chat/completions", "/v1/nothing", "//health", "/health/../v1/chat/completions"):
        request = httpx.Request("POST", f"{locked}{path}", json=QUESTION, headers=encoded)
        with httpx.Client(timeout=60) as client:
            answer = client.send(request)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert KEY not in answer.text


def test_what_says_that_the_server_is_alive_needs_no_key(locked: str) -> None:
    assert httpx.get(f"{locked}/health").status_code == 200


def test_anthropics_clients_get_their_own_form_of_the_error(locked: str) -> None:
    answer = httpx.post(f"{locked}/v1/messages", json={}).json()
    assert answer["type"] == "error" and answer["error"]["type"] == "authentication_error"


def test_a_preflight_has_no_key(locked: str) -> None:
    headers = {"origin": "app://obsidian.md", "access-control-request-method": "POST"}
    assert httpx.options(f"{locked}/v1/chat/completions", headers=headers).status_code == 204


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.7", "mac.local"])
def test_other_machines_need_a_key(host: str) -> None:
    with pytest.raises(DgemmaError, match="needs an API key") as raised:
        check_settings(ServerSettings("demo", host=host))
    assert raised.value.exit_code == 2
    check_settings(ServerSettings("demo", host=host, api_key=KEY))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_this_machine_needs_none(host: str) -> None:
    check_settings(ServerSettings("demo", host=host))


@pytest.mark.parametrize("key", ["", " ", "two words", "schlüssel", "line\n"])
def test_a_key_that_no_header_can_hold_is_refused(key: str) -> None:
    with pytest.raises(DgemmaError, match="API key is empty, or holds"):
        check_settings(ServerSettings("demo", api_key=key))


@pytest.mark.parametrize("origin", ["*", "null", "https://", "http://", "example.org", "https://a.org/path", "https://*.a.org"])
def test_what_would_let_everybody_in_is_no_origin(origin: str) -> None:
    with pytest.raises(DgemmaError, match="not an origin that can be allowed"):
        check_settings(replace(ServerSettings("demo"), allowed_origins=(origin,)))


def test_a_large_body_is_refused_whether_it_says_so_or_not(address: str) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 10_000

    for content in (b" " * 100_001, b" " * 5_000_000, pieces()):
        answer = httpx.post(f"{address}/v1/chat/completions", content=content)
        assert answer.status_code == 413
        message = answer.json()["error"]["message"]
        assert message == "the body is larger than 100,000 bytes, the limit that --max-body sets"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n" % 10**19
    assert raw(address, head + b"Expect: 100-continue\r\nConnection: close\r\n\r\n").split()[1] == b"413"
    assert raw(address, head + b"\r\n").split()[1] == b"408"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_what_a_form_can_send_is_no_request(address: str, kind: str) -> None:
    answer = httpx.post(f"{address}/v1/chat/completions", content=json.dumps(QUESTION), headers={"content-type": kind})
    assert answer.status_code == 415


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", None])
def test_json_may_have_a_charset_or_no_type(address: str, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = httpx.post(f"{address}/v1/chat/completions", content=json.dumps(QUESTION), headers=headers, timeout=60)
    assert answer.status_code == 200


def test_a_body_that_does_not_arrive_is_given_up(address: str) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    answer = raw(address, head)
    assert answer.split()[1] == b"408" and b"the body did not arrive within 1 s" in answer


def test_headers_that_do_not_arrive_are_given_up(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.2)
    for begun in (b"", b"GET /health HTTP/1.1\r\nHost: loc"):
        assert raw(address, begun) == b""  # closed, and not by the client's own limit
    answer = raw(address, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")  # the second one does not arrive
    assert answer.count(b"HTTP/1.1 200") == 1


def test_headers_are_bounded(address: str) -> None:
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"y" * 2_000_000
    assert raw(address, head).split()[1:2] in ([b"400"], [b"431"], [])
    assert httpx.get(f"{address}/health").status_code == 200


def test_a_client_that_is_slow_to_write_holds_up_nobody(address: str) -> None:
    with socket.create_connection(("127.0.0.1", urlsplit(address).port or 0)) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n\r\n")
        for _ in range(3):
            slow.sendall(b"{")
            began = time.monotonic()
            assert post(address, {}).status_code == 200
            assert time.monotonic() - began < 30
