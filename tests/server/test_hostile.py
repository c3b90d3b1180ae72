"""Bodies that are damaged or huge, and clients that do not read: every endpoint stays alive and answers others."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.routing import Route

from dgemma_mlx.server.app import ROUTES
from dgemma_mlx.server.openapi import BODIES, describe
from tests.server.live import serving

QUESTION = {"messages": [{"role": "user", "content": "Sort 7 3 5"}], "seed": 1}
POSTED = sorted({route.path for route in ROUTES if isinstance(route, Route) and "POST" in (route.methods or ())})
DAMAGED = {
    "empty": b"", "null": b"null", "a list": b"[]", "a number": b"1", "a text": b'"x"', "cut": b'{"messages": [',
    "not UTF-8": b'{"content": "\xff\xfe"}', "UTF-16": '{"a": 1}'.encode("utf-16"), "twice": b"{}{}",
    "deep": b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "a huge integer": b'{"seed": ' + b"9" * 100_000 + b"}", "a lone surrogate": b'{"content": "\\ud800"}',
    "a wrong type": b'{"messages": 3, "text": 3, "question": 3, "instruction": 3, "content": 3, "tokens": 3, '
                    b'"input_prefix": 3, "prompt": 3, "input": 3, "model": 3, "max_tokens": "x"}',
}  # fmt: skip


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving() as address:
        yield address


def post(address: str, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{address}{path}", json=body, timeout=60)


@pytest.mark.parametrize("path", [path for path in POSTED if path in BODIES])
def test_a_damaged_body_is_an_error_in_the_protocols_form(address: str, path: str) -> None:
    with httpx.Client() as client:
        for name, content in DAMAGED.items():
            answer = client.post(f"{address}{path}", content=content, timeout=60)
            assert answer.status_code == 400, (name, answer.text)
            message = answer.json()["error"]["message"]
            assert message and len(message) < 1000 and message.isprintable(), name


def test_the_description_names_every_endpoint_and_every_body(address: str) -> None:
    found = httpx.get(f"{address}/openapi.json").json()
    assert found == json.loads(json.dumps(describe(ROUTES, needs_key=False)))
    assert found["security"] == [] != describe(ROUTES, needs_key=True)["security"]
    assert set(POSTED) - set(BODIES) == {"/props"}
    for path in BODIES:
        body = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body["$ref"].removeprefix("#/components/schemas/") in found["components"]["schemas"]
        assert found["paths"][path]["post"]["summary"]
    fill = found["components"]["schemas"]["FillRequest"]
    assert fill["required"] == ["text"] and fill["properties"]["candidates"]["maximum"] == 64
    assert fill["properties"]["seed"]["description"] == "Seed of the random numbers; null draws one."
    assert fill["properties"]["mark"]["description"] == "How a gap is written."


@pytest.mark.parametrize("size", [100_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_a_huge_prompt_is_refused_while_others_are_answered(address: str, size: int) -> None:
    text = "word " * (size // 5)
    bodies = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
        "/v1/fill": {"text": f"{text}___"}, "/infill": {"input_prefix": text},
    }  # fmt: skip
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(httpx.post, f"{address}{path}", json=body, timeout=200) for path, body in bodies.items()]
        assert httpx.get(f"{address}/health", timeout=60).status_code == 200
        for answer in (each.result() for each in asked):
            assert answer.status_code == 400
            assert re.search("the model's limit|maximum context length", answer.text) and len(answer.text) < 1000


def test_a_client_that_does_not_read_holds_up_nobody(address: str) -> None:
    body = json.dumps({**QUESTION, "stream": True, "drafts": True, "max_tokens": 2000}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    idle = []
    for _ in range(3):
        connected = socket.socket()
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connected.connect(("127.0.0.1", urlsplit(address).port))
        connected.sendall(head + body)
        idle.append(connected)
    time.sleep(0.2)
    assert post(address, "/v1/chat/completions", QUESTION).json()["choices"][0]["message"]["content"] == "3 5 7"
    for connected in idle:
        connected.close()
    assert post(address, "/v1/chat/completions", QUESTION).status_code == 200
