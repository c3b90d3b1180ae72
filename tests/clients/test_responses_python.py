"""OpenAI's library for Python, with responses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.clients.conftest import ARGUMENTS, LONG, PERSON, QUESTION, SCHEMA, WEATHER

openai = pytest.importorskip("openai")
TOOL = {"type": "function", **WEATHER}


def connected(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_the_demo_answers(demo: str) -> None:
    answer = connected(demo).responses.create(model="demo", input="Sort 7 3 5", extra_body={"seed": 1})
    assert answer.output_text == "3 5 7" and answer.status == "completed"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_an_answer_that_must_match(demo: str) -> None:
    format = {"type": "json_schema", "name": "person", "schema": SCHEMA, "strict": True}
    answer = connected(demo).responses.create(
        model="demo", input=QUESTION, text={"format": format}, extra_body={"seed": 1}
    )
    assert answer.output_text.replace(" ", "") == PERSON


def test_a_stream(scripted: str) -> None:
    with connected(scripted).responses.stream(model="demo", input="Count") as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_response()
    assert answer.output_text == LONG and answer.output[0].content[0].text == "Hm, 😀."
    assert {"response.content_part.added", "response.output_text.delta", "response.completed"} <= kinds


@pytest.mark.parametrize("streams", [False, True])
def test_a_call_and_its_result(scripted: str, streams: bool) -> None:
    responses = connected(scripted).responses
    question: dict[str, Any] = {"model": "demo", "input": [{"role": "user", "content": "Weather?"}], "tools": [TOOL]}
    if streams:
        with responses.stream(**question) as stream:
            answer = stream.get_final_response()
    else:
        answer = responses.create(**question)
    call = answer.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", ARGUMENTS)
    question["input"] += answer.output
    question["input"].append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    assert responses.create(**question).output_text == "It is sunny."


def test_errors_are_the_library_s_own(demo: str) -> None:
    responses = connected(demo).responses
    with pytest.raises(openai.BadRequestError) as error:
        responses.create(model="demo", input="hi", previous_response_id="resp_1")
    assert error.value.param == "previous_response_id"
    with pytest.raises(openai.BadRequestError) as error:
        responses.create(model="demo", input="hi " * 5000)
    assert error.value.code == "context_length_exceeded"
