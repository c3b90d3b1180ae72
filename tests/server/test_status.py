"""What the server says about itself: its log, its metrics, and its health."""

from __future__ import annotations

import json
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.live import serving

LINES: list[str] = []
Faults = Callable[[], list[str]]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(log=LINES.append, max_queue=3, model_name='de"mo\n') as address:
        yield address


@pytest.fixture
def faults(address: str, caplog: pytest.LogCaptureFixture) -> Iterator[Faults]:
    """Returns what uvicorn has reported, which is nothing when clients do as they like."""
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(caplog.handler)

    def found() -> list[str]:
        httpx.get(f"{address}/health")  # on the same thread, after what was reported before
        return [record.getMessage() for record in caplog.records]

    yield found
    logger.removeHandler(caplog.handler)


@pytest.fixture(autouse=True)
def empty_log() -> None:
    LINES.clear()


def ask(address: str, text: str = "Sort 7 3 5", **more: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], "seed": 1, **more}
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)


def values(address: str) -> dict[str, float]:
    """Every series of the metrics with its value."""
    response = httpx.get(f"{address}/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = [line for line in response.text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'[a-z_]+(\{([a-z_]+="([^"\\\n]|\\.)*",?)+\})? [0-9.e+-]+', line) for line in lines), lines
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def log(count: int) -> list[str]:
    """The lines of the log, once there are so many: a line is written after its response."""
    until = time.monotonic() + 20
    while len(LINES) < count and time.monotonic() < until:
        time.sleep(0.01)
    return LINES


def test_a_request_is_a_line_with_its_counts_and_without_its_prompt(address: str) -> None:
    assert ask(address, "Sort 9 8 7").status_code == 200
    assert ask(address, "Sort 9 8 7", stream=True).status_code == 200
    httpx.get(f"{address}/health")
    httpx.get(f"{address}/nothing/%1b[31m?key=secret")
    line, again, unknown = log(3)
    start = r"\d\d:\d\d:\d\d POST /v1/chat/completions 200 \d+\.\d\d s, 4 tokens, \d+ steps?, "
    assert re.fullmatch(start + r"0 of \d+ prompt tokens cached", line)
    assert re.fullmatch(start + r"(\d+) of \1 prompt tokens cached", again)
    assert re.fullmatch(r"\d\d:\d\d:\d\d GET /nothing/%1b\[31m 404 \d+\.\d\d s", unknown)


def test_the_metrics_count_what_was_done(address: str) -> None:
    before = values(address)
    ask(address, "Sort 4 6 2")
    ask(address, "Sort 4 6 2")
    httpx.get(f"{address}/some/path")
    httpx.get(f"{address}/another/path")
    log(4)
    after = values(address)
    gained = {name: value - before.get(name, 0) for name, value in after.items()}
    assert gained['dgemma_requests_total{path="/v1/chat/completions",status="200"}'] == 2
    assert gained['dgemma_requests_total{path="other",status="404"}'] == 2
    assert gained['dgemma_answers_total{finish_reason="stop"}'] == 2
    assert gained["dgemma_generated_tokens_total"] == 8
    assert 2 * gained["dgemma_cached_tokens_total"] == gained["dgemma_prompt_tokens_total"] > 0
    assert gained["dgemma_denoising_steps_total"] >= gained["dgemma_canvases_total"] == 2
    assert after["dgemma_model_loaded"] == 1 and after["dgemma_prompt_caches"] >= 1
    assert after["dgemma_memory_active_bytes"] > after["dgemma_prompt_cache_bytes"] > 0
    assert after["dgemma_requests_running"] == after["dgemma_requests_waiting"] == 0
    assert 'dgemma_info{model="de\\"mo\\n",version="' in httpx.get(f"{address}/metrics").text


def test_health_tells_what_is_going_on(address: str) -> None:
    health = httpx.get(f"{address}/health").json()
    assert health["status"] == "ok" and health["loaded"] is True
    assert (health["running"], health["waiting"]) == (0, 0)
    assert 0 < health["uptime"] < 600


def slow(address: str) -> socket.socket:
    """Begin a long answer, and return the connection on which it comes."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    messages = [{"role": "user", "content": "Tell me a story. " * 60}]
    body = json.dumps({"messages": messages, "stream": True})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall((head + body).encode())
    return connection


def test_a_full_queue_turns_clients_away_and_one_that_goes_makes_room(address: str, faults: Faults) -> None:
    connections = [slow(address) for _ in range(3)]
    while httpx.get(f"{address}/health").json()["running"] < 3:
        time.sleep(0.01)
    refused = ask(address)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "overloaded"
    for connection in connections:
        connection.close()
    while httpx.get(f"{address}/health").json()["running"]:
        time.sleep(0.01)
    assert ask(address).status_code == 200
    many = httpx.post(f"{address}/v1/chat/completions", json={"n": 4, "messages": [{"role": "user", "content": "a"}]})
    assert many.status_code == 400 and many.json()["error"]["param"] == "n"  # waiting would not help
    assert sorted(line.split()[3] for line in log(6)) == ["200", "400", "499", "499", "499", "503"]
    assert not faults()


def test_a_client_that_leaves_within_its_body_is_no_fault_of_the_server(address: str, faults: Faults) -> None:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b'{"messages": ')
    (line,) = log(1)
    assert line.split()[3] == "499"
    assert not faults()


def test_prompts_are_logged_only_when_that_is_wanted_and_then_in_one_line() -> None:
    lines: list[str] = []
    with serving(log=lines.append, log_prompts=True) as address:
        ask(address, "Sort 1 2\n3\x1b[31m")
    (line,) = lines
    assert r"Sort 1 2\n3\u001b[31m" in line


def test_within_a_memory_limit_a_prompt_that_never_fits_is_refused_and_others_wait_for_each_other() -> None:
    with serving(memory_limit=11_500_000) as address:
        refused = ask(address, "Sort 7 3 5 " * 700, stream=True)
        assert refused.status_code == 400 and "memory limit" in refused.json()["error"]["message"]
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: ask(address), range(8)))
        assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {"3 5 7"}
        found = values(address)
        assert found['dgemma_answers_total{finish_reason="stop"}'] == 8
        assert 0 < found["dgemma_prompt_cache_bytes"] < 11_500_000 - 7_800_000  # beside the weights
