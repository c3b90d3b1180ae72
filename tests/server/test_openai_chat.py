"""OpenAI's chat completions, with a real server."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.server.live import serving


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving() as address:
        yield address


def test_a_question_gets_its_answer(address: str) -> None:
    body = {"messages": [{"role": "user", "content": "Sort 7 3 5"}], "seed": 1}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["message"]["content"] == "3 5 7"


def test_a_stream_has_the_same_text(address: str) -> None:
    body = {"messages": [{"role": "user", "content": "Sort 7 3 5"}], "seed": 1, "stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert '"content":"3 5 7"' in "".join(lines)
