"""OpenAI's library for JavaScript."""

from __future__ import annotations

from tests.clients.conftest import RunNode


def test_the_demo_answers(demo: str, run_node: RunNode) -> None:
    answer = run_node("openai.mjs", "answer", demo)
    assert answer["choices"][0]["message"]["content"] == "3 5 7"
