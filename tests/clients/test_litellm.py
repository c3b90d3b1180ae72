"""litellm."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.clients.conftest import ARGUMENTS, LONG, PERSON, QUESTION, SCHEMA, THOUGHT, WEATHER

litellm = pytest.importorskip("litellm")

TOOLS = [{"type": "function", "function": WEATHER}]


def complete(address: str, messages: Any, **more: Any) -> Any:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return litellm.completion(
        model="openai/demo", api_base=f"{address}/v1", api_key="none", messages=messages, max_retries=0, **more
    )


def test_the_demo_answers(demo: str) -> None:
    answer = complete(demo, "Sort 7 3 5", seed=1)
    assert answer.choices[0].message.content == "3 5 7" and answer.usage.completion_tokens > 0


@pytest.mark.parametrize("drafts", [False, True])
def test_a_stream_has_thinking_and_text(scripted: str, drafts: bool) -> None:
    more = {"chat_template_kwargs": {"enable_thinking": True}, "drafts": drafts}  # litellm ignores drafts
    chunks = list(complete(scripted, "Count", stream=True, **more))
    message = litellm.stream_chunk_builder(chunks).choices[0].message
    assert (message.content, message.reasoning_content) == (LONG, THOUGHT)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]


@pytest.mark.parametrize("streams", [False, True])
def test_a_tool_is_called_and_its_result_answered(scripted: str, streams: bool) -> None:
    answer = complete(scripted, "The weather?", tools=TOOLS, stream=streams)
    if streams:
        answer = litellm.stream_chunk_builder(list(answer))
    message = answer.choices[0].message
    [call] = message.tool_calls
    assert json.loads(call.function.arguments) == ARGUMENTS
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages = [{"role": "user", "content": "The weather?"}, message, result]
    assert complete(scripted, messages, tools=TOOLS).choices[0].message.content == "It is sunny."


def test_a_schema_holds(demo: str) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
    answer = complete(demo, QUESTION, response_format=format, seed=1, max_tokens=64)
    assert json.loads(answer.choices[0].message.content) == json.loads(PERSON)


def test_a_prompt_that_is_too_long_is_known_as_such(demo: str) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        complete(demo, "hi " * 20_000)
    with pytest.raises(litellm.BadRequestError):
        complete(demo, "hi", response_format={"type": "xml"})
