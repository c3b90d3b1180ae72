"""Anthropic's library for Python."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import ARGUMENTS, LONG, PERSON, QUESTION, SCHEMA, WEATHER

anthropic = pytest.importorskip("anthropic")
TOOL = {"name": WEATHER["name"], "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}


def connected(address: str) -> Any:
    return anthropic.Anthropic(base_url=address, api_key="none", max_retries=0)


def ask(content: str, **more: Any) -> dict[str, Any]:
    return {"model": "demo", "max_tokens": 1000, "messages": [{"role": "user", "content": content}], **more}


def test_the_demo_answers(demo: str) -> None:
    client = connected(demo)
    question = ask("Sort 7 3 5", extra_body={"seed": 1})
    answer = client.messages.create(**question)
    assert answer.content[0].text == "3 5 7" and answer.stop_reason == "end_turn"
    count = client.messages.count_tokens(model="demo", messages=question["messages"])
    usage = answer.usage  # other tests may have had this prompt encoded
    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    beta = client.beta.messages.create(**question, betas=["context-management-2025-06-27"])
    assert beta.content[0].text == "3 5 7"


def test_an_answer_that_must_match(demo: str) -> None:
    format = {"type": "json_schema", "schema": SCHEMA}
    question = ask(QUESTION, output_config={"format": format}, extra_body={"seed": 1})
    assert connected(demo).messages.create(**question).content[0].text.replace(" ", "") == PERSON


def test_a_stream(scripted: str) -> None:
    with connected(scripted).messages.stream(**ask("Count", thinking={"type": "adaptive"})) as stream:
        kinds = [event.type for event in stream]
        assert "".join(block.text for block in stream.get_final_message().content if block.type == "text") == LONG
    assert {"thinking", "text"} <= set(kinds)
    assert stream.get_final_message().content[0].thinking == "Hm, 😀."
    assert stream.get_final_message().usage.output_tokens > 0


@pytest.mark.parametrize("streams", [False, True])
def test_a_call_and_its_result(scripted: str, streams: bool) -> None:
    client = connected(scripted)
    question = ask("The weather?", tools=[TOOL])
    if streams:
        with client.messages.stream(**question) as stream:
            answer = stream.get_final_message()
    else:
        answer = client.messages.create(**question)
    call = answer.content[-1]
    assert answer.stop_reason == "tool_use"
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", ARGUMENTS)
    question["messages"] += [
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}]},
    ]
    assert client.messages.create(**question).content[0].text == "It is sunny."


def test_errors_are_the_library_s_own(demo: str) -> None:
    client = connected(demo)
    with pytest.raises(anthropic.BadRequestError) as error:
        client.messages.create(**ask("hi " * 5000))
    assert error.value.type == "invalid_request_error" and "prompt is too long" in error.value.message
    assert error.value.request_id
    with pytest.raises(anthropic.NotFoundError):
        client.messages.batches.list()
