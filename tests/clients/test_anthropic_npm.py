"""Anthropic's library for JavaScript."""

from __future__ import annotations

from tests.clients.conftest import ARGUMENTS, LONG, RunNode


def test_the_demo_answers(demo: str, run_node: RunNode) -> None:
    found = run_node("anthropic.mjs", "answer", demo)
    assert found["answer"]["content"][0]["text"] == "3 5 7"
    usage = found["answer"]["usage"]  # other tests may have had this prompt encoded
    assert found["counted"] == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_a_stream(scripted: str, run_node: RunNode) -> None:
    found = run_node("anthropic.mjs", "stream", scripted)
    assert found["streamed"] == found["final"]["content"][-1]["text"] == LONG


def test_a_call_and_its_result(scripted: str, run_node: RunNode) -> None:
    found = run_node("anthropic.mjs", "call", scripted)
    assert (found["call"]["name"], found["call"]["input"]) == ("get_weather", ARGUMENTS)
    assert found["answer"]["content"][0]["text"] == "It is sunny."


def test_errors_are_the_library_s_own(demo: str, run_node: RunNode) -> None:
    found = run_node("anthropic.mjs", "refused", demo)
    assert (found["name"], found["type"]) == ("BadRequestError", "invalid_request_error")
