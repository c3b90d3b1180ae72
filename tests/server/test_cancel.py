"""Clients that go away, at any moment: their work stops within a step, and the next request runs."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import mlx.core as mx
import pytest

from dgemma_mlx import Model
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.soft_tokens import SoftTokens
from tests.server.live import serving
from tests.server.scripted import ScriptedNetwork, scripted_model
from tests.waiting import wait_until


class Gate:
    """Stops the network in a chosen call, until it is opened.

    Attributes:
        calls: The calls of the network so far: "extend" encodes, and "project" ends a denoising step.
    """

    def __init__(self) -> None:
        self.close("", 0)

    def close(self, kind: str, number: int) -> None:
        """Stop the network at the call with this number of this kind."""
        self.calls: list[str] = []
        self.closed_at, self.reached, self.opened = (kind, number), threading.Event(), threading.Event()

    def passes(self, kind: str) -> None:
        self.calls.append(kind)
        if (kind, self.calls.count(kind)) == self.closed_at:
            self.reached.set()
            assert self.opened.wait(60)


GATE = Gate()
LINES: list[str] = []


class GatedNetwork(ScriptedNetwork):
    def extend(self, ids: mx.array, cache: PrefixCache, soft: SoftTokens | None = None) -> None:
        GATE.passes("extend")
        super().extend(ids, cache, soft)

    def project(self, hidden: mx.array) -> mx.array:
        if hidden.ndim == 3:
            GATE.passes("project")
        return super().project(hidden)


def load() -> Model:
    model = scripted_model(lambda prompt: " ".join(map(str, range(100))) if "long" in prompt else "short")
    network: Any = model.network
    network.__class__ = GatedNetwork
    return model


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(load, log=LINES.append) as address:
        yield address


def ask(address: str, text: str, stream: bool) -> socket.socket:
    """Send a question, and return the connection, of which nothing is read."""
    body = json.dumps({"messages": [{"role": "user", "content": text}], "stream": stream, "seed": 1}).encode()
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def received(connection: socket.socket, until: str) -> str:
    """Read a response up to a text, and close the connection."""
    found = b""
    while until.encode() not in found and (piece := connection.recv(1 << 16)):
        found += piece
    connection.close()
    return found.decode()


def leave(connection: socket.socket) -> None:
    """Go away, and wait until the server has noticed it."""
    LINES.clear()
    connection.close()
    wait_until(lambda: any(" 499 " in line for line in LINES))


def running(address: str) -> int:
    return int(httpx.get(f"{address}/health").json()["running"])


def answered(address: str, text: str) -> str:
    body = {"messages": [{"role": "user", "content": text}], "seed": 1}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
    return str(answer["choices"][0]["message"]["content"])


@pytest.mark.parametrize(
    ("kind", "number", "stream"),
    [
        pytest.param("extend", 1, True, id="prefill of a stream"),
        pytest.param("project", 1, False, id="first step"),
        pytest.param("project", 5, True, id="later canvas of a stream"),
        pytest.param("extend", 1, False, id="prefill", marks=pytest.mark.slow),
        pytest.param("project", 1, True, id="first step of a stream", marks=pytest.mark.slow),
        pytest.param("project", 5, False, id="later canvas", marks=pytest.mark.slow),
    ],
)
def test_work_stops_within_a_step_of_the_client_leaving(address: str, kind: str, number: int, stream: bool) -> None:
    GATE.close(kind, number)
    padding = "word " * 280 if kind == "extend" else ""  # so that the prompt has several parts
    connection = ask(address, f"long {kind} {number} {stream} {padding}", stream)
    assert GATE.reached.wait(60)
    leave(connection)
    before = len(GATE.calls)
    GATE.opened.set()
    wait_until(lambda: running(address) == 0)
    assert len(GATE.calls) <= before + 1
    assert answered(address, "hi") == "short"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_request_that_is_left_in_the_queue_never_runs(address: str, stream: bool) -> None:
    GATE.close("", 0)
    answered(address, f"queue {stream} 1")
    alone = len(GATE.calls)
    GATE.close("project", 1)
    other = ask(address, f"queue {stream} 2", stream=False)
    assert GATE.reached.wait(60)
    connection = ask(address, "long", stream)
    wait_until(lambda: running(address) == 2)
    leave(connection)
    GATE.opened.set()
    assert "short" in received(other, until='"short"')
    wait_until(lambda: running(address) == 0)
    assert len(GATE.calls) == alone


def test_a_client_that_does_not_read_holds_up_nobody_and_gets_everything_later(address: str) -> None:
    GATE.close("", 0)
    connection = ask(address, "long and unread", stream=True)
    wait_until(lambda: len(GATE.calls) > 2)
    assert answered(address, "hi") == "short"
    wait_until(lambda: running(address) == 0)
    lines = received(connection, until="[DONE]").splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == " ".join(map(str, range(100)))
