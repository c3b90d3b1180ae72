"""OpenAI's library for JavaScript."""

from __future__ import annotations

import json

from tests.clients.conftest import ARGUMENTS, LONG, PERSON, RunNode


def test_the_demo_answers_whole_and_streamed(demo: str, run_node: RunNode) -> None:
    whole, streamed = (run_node("openai.mjs", scenario, demo) for scenario in ("whole", "streamed"))
    assert whole["choices"][0]["message"]["content"] == streamed["choices"][0]["message"]["content"] == "3 5 7"
    assert streamed["choices"][0]["finish_reason"] == "stop"
    assert streamed["usage"]["total_tokens"] == whole["usage"]["total_tokens"]


def test_a_tool_is_called_and_its_result_answered(scripted: str, run_node: RunNode) -> None:
    found = run_node("openai.mjs", "tools", scripted)
    assert json.loads(found["call"]["arguments"]) == ARGUMENTS and found["reason"] == "tool_calls"
    assert found["text"] == "It is sunny."


def test_a_schema_holds(demo: str, run_node: RunNode) -> None:
    assert json.loads(run_node("openai.mjs", "schema", demo)) == json.loads(PERSON)


def test_an_error_is_the_librarys_own(demo: str, run_node: RunNode) -> None:
    error = run_node("openai.mjs", "error", demo)
    assert error == {"is": True, "code": "context_length_exceeded", "param": "messages"}


def test_a_stream_that_is_left_stops_its_work(scripted: str, run_node: RunNode) -> None:
    assert run_node("openai.mjs", "leave", scripted) == LONG
