"""Images that are fetched from addresses: from public ones only, however they are written or reached."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address, ip_network

import pytest

from dgemma_mlx.server.image_fetch import FetchError, FetchRules, fetch_image, is_public

DATA = b"\x89PNG the bytes of a picture"
LOCAL = FetchRules(networks=(ip_network("127.0.0.0/8"), ip_network("::1")), most_bytes=1000, seconds=10)


class Pictures(BaseHTTPRequestHandler):
    """Answers with a picture, with redirects, and with what no client should take."""

    def do_GET(self) -> None:
        name, _, rest = self.path[1:].partition("?")
        asked.append((self.path, self.headers["host"], self.headers["authorization"]))
        if name == "to":
            return self.answer(302, {"location": rest})
        if name.startswith("hop"):
            return self.answer(307, {"location": f"/hop{int(name[3:]) - 1}" if name != "hop1" else "/a.png"})
        if name == "page":
            return self.answer(200, {"content-type": "text/html"})
        if name == "packed":
            return self.answer(200, {"content-type": "image/png", "content-encoding": "gzip"})
        if name == "large":
            return self.answer(200, {"content-type": "image/png"}, b"x" * 1001)
        if name == "cut":
            return self.answer(200, {"content-type": "image/png", "content-length": "900"}, DATA)
        if name == "slow":
            self.answer(200, {"content-type": "image/png"})
            while not has_ended.wait(0.05):
                try:
                    self.wfile.write(b"x")  # never silent for long
                except OSError:
                    return None
            return None
        return self.answer(200 if name.startswith("a") else 404, {"content-type": "image/png; a=b"}, DATA)

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Write nothing."""


asked: list[tuple[str, str | None, str | None]] = []
has_ended = threading.Event()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    has_ended.set()
    server.shutdown()
    server.server_close()


def refusal(url: str, rules: FetchRules = LOCAL) -> str:
    with pytest.raises(FetchError) as error:
        fetch_image(url, rules)
    return str(error.value)


def test_a_picture_is_fetched(address: str) -> None:
    assert fetch_image(f"{address}/a b.png?x=é", LOCAL) == DATA
    assert asked[-1] == ("/a%20b.png?x=%C3%A9", address.removeprefix("http://"), None)
    assert fetch_image(address.replace("127.0.0.1", "localhost") + "/a", LOCAL) == DATA


def test_three_redirects_are_followed(address: str) -> None:
    assert fetch_image(f"{address}/hop3", LOCAL) == DATA
    assert "more than 3" in refusal(f"{address}/hop4")


@pytest.mark.parametrize("host", [
    "127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]",
    "[64:ff9b::7f00:1]", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "[fe80::1]",
    "[fd00::1]",
])  # fmt: skip
def test_an_address_of_this_network_is_refused_before_a_connection(address: str, host: str) -> None:
    before = len(asked)
    assert refusal(f"http://{host}:{address.rpartition(':')[2]}/a", FetchRules()).endswith("is not a public address")
    assert len(asked) == before


def test_a_redirect_is_checked_like_the_first_address(address: str) -> None:
    assert refusal(f"{address}/to?http://10.0.0.1/a").endswith("is not a public address")
    assert "only http" in refusal(f"{address}/to?file:///etc/hostname")
    assert "password" in refusal(f"{address}/to?http://me:secret@127.0.0.1/a")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/page", "not an image"), ("/packed", "not an image"), ("/large", "larger than 1,000 bytes"),
        ("/cut", "the connection failed"), ("/nothing", "the status is 404"), ("/to?http://[", "not an address"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused(address: str, path: str, problem: str) -> None:
    assert problem in refusal(address + path)


@pytest.mark.parametrize("url", [
    "file:///etc/hostname", "ftp://example.org/a.png", "/etc/hostname", "http://", "http://[::1", "http://a:b/",
    "http:", "http://me@127.0.0.1/", "http://" + "a" * 70 + "/",
])  # fmt: skip
def test_other_addresses_are_refused(url: str) -> None:
    assert "\n" not in refusal(url)


def test_a_server_that_sends_a_byte_now_and_then_is_not_waited_for(address: str) -> None:
    began = time.monotonic()
    assert refusal(f"{address}/slow", FetchRules(LOCAL.networks, seconds=0.3)) == "it takes too long"
    assert time.monotonic() - began < 5


def test_the_time_holds_before_there_is_an_encrypted_connection(address: str) -> None:
    # The server waits for the end of what it takes for a request.
    rules = FetchRules(LOCAL.networks, seconds=0.3)
    assert refusal(address.replace("http:", "https:") + "/a", rules) in ("it takes too long", "the connection failed")


@pytest.mark.parametrize("text", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are_known(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize("text", ["2002:7f00:1::", "fec0::1", "ff02::1", "::", "240.0.0.1", "255.255.255.255"])
def test_other_addresses_are_known(text: str) -> None:
    assert not is_public(ip_address(text))
