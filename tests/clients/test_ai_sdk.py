"""The AI SDK of Vercel, with its provider for servers that are compatible with OpenAI's."""

from __future__ import annotations

import json

from tests.clients.conftest import ARGUMENTS, LONG, PERSON, THOUGHT, RunNode


def test_the_demo_answers(demo: str, run_node: RunNode) -> None:
    found = run_node("ai_sdk.mjs", "whole", demo)
    assert (found["text"], found["finishReason"]) == ("3 5 7", "stop") and found["tokens"] > 0


def test_a_stream_has_thinking_and_text(scripted: str, run_node: RunNode) -> None:
    found = run_node("ai_sdk.mjs", "streamed", scripted)
    assert (found["text"], found["reasoning"], found["finishReason"]) == (LONG, THOUGHT, "stop")
    assert {"reasoning-delta", "text-delta", "finish"} <= set(found["kinds"]) and "error" not in found["kinds"]
    assert found["tokens"] > 60


def test_a_tool_is_called_and_its_result_answered(scripted: str, run_node: RunNode) -> None:
    assert run_node("ai_sdk.mjs", "tools", scripted) == {"calls": [ARGUMENTS], "text": "It is sunny."}


def test_a_schema_holds(demo: str, run_node: RunNode) -> None:
    assert run_node("ai_sdk.mjs", "schema", demo) == json.loads(PERSON)


def test_an_error_has_its_status_and_message(demo: str, run_node: RunNode) -> None:
    error = run_node("ai_sdk.mjs", "error", demo)
    assert error["is"] and error["status"] == 400 and "maximum context length" in error["message"]
