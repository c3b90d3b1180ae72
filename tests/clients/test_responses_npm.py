"""OpenAI's library for JavaScript, with responses."""

from __future__ import annotations

import json

from tests.clients.conftest import ARGUMENTS, LONG, RunNode


def test_the_demo_answers(demo: str, run_node: RunNode) -> None:
    assert run_node("responses.mjs", "answer", demo) == "3 5 7"


def test_a_stream(scripted: str, run_node: RunNode) -> None:
    found = run_node("responses.mjs", "stream", scripted)
    assert found["text"] == LONG and "response.content_part.added" in found["kinds"]


def test_a_call_and_its_result(scripted: str, run_node: RunNode) -> None:
    found = run_node("responses.mjs", "call", scripted)
    assert (found["call"]["name"], json.loads(found["call"]["arguments"])) == ("get_weather", ARGUMENTS)
    assert found["answer"] == "It is sunny."


def test_errors_are_the_library_s_own(demo: str, run_node: RunNode) -> None:
    found = run_node("responses.mjs", "refused", demo)
    assert found == {"name": "BadRequestError", "param": "previous_response_id"}
