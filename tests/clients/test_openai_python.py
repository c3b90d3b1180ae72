"""OpenAI's library for Python."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.clients.conftest import ARGUMENTS, LONG, PERSON, QUESTION, THOUGHT, WEATHER

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")

TOOLS = [{"type": "function", "function": WEATHER}]


def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def ask(content: str, **more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": content}], "seed": 1, **more}


def test_the_demo_answers_whole_and_streamed(demo: str) -> None:
    chat = client(demo).chat.completions
    answer = chat.create(**ask("Sort 7 3 5"))
    assert answer.choices[0].message.content == "3 5 7" and answer.usage.completion_tokens > 0
    chunks = list(chat.create(**ask("Sort 7 3 5"), stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "3 5 7"
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens


@pytest.mark.parametrize("drafts", [False, True])
def test_a_stream_of_several_canvases_and_of_thinking(scripted: str, drafts: bool) -> None:
    asked = ask("Count", reasoning_effort="high", extra_body={"drafts": drafts})  # the library ignores drafts
    with client(scripted).chat.completions.stream(**asked) as stream:
        events = list(stream)
    final = stream.get_final_completion().choices[0]
    assert (final.message.content, final.finish_reason) == (LONG, "stop")
    assert sum(event.type == "content.delta" for event in events) > 2
    assert final.message.reasoning_content == THOUGHT


@pytest.mark.parametrize("streams", [False, True])
def test_a_tool_is_called_and_its_result_answered(scripted: str, streams: bool) -> None:
    chat = client(scripted).chat.completions
    if streams:
        with chat.stream(**ask("The weather?", tools=TOOLS)) as stream:
            choice = stream.get_final_completion().choices[0]
    else:
        choice = chat.create(**ask("The weather?", tools=TOOLS)).choices[0]
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and json.loads(call.function.arguments) == ARGUMENTS
    messages = [
        {"role": "user", "content": "The weather?"}, choice.message,
        {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"sky": "sunny"})},
    ]  # fmt: skip
    answer = chat.create(model="demo", messages=messages, tools=TOOLS)
    assert answer.choices[0].message.content == "It is sunny."


def test_an_answer_is_parsed_into_a_model(demo: str) -> None:
    record = pydantic.create_model("Record", name=(str, ...), age=(int, ...), city=(str, ...))
    answer = client(demo).chat.completions.parse(**ask(QUESTION, response_format=record, max_tokens=64))
    assert answer.choices[0].message.parsed.model_dump() == json.loads(PERSON)


def test_errors_are_the_librarys_own(demo: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client(demo).chat.completions.create(**ask("hi " * 20_000))
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "messages"
    with pytest.raises(openai.BadRequestError):
        client(demo).chat.completions.create(**ask("hi", logprobs=True), stream=True)
    with pytest.raises(openai.NotFoundError):
        client(demo).embeddings.create(model="demo", input="hi")


def test_a_gap_is_filled_and_the_model_listed(demo: str) -> None:
    end = ', "city": "Rome"}'
    answer = client(demo).completions.create(
        model="demo", prompt='{"name": "Simon", "age": ', suffix=end, max_tokens=2, seed=1
    )
    assert answer.choices[0].text and answer.choices[0].finish_reason == "stop"
    assert [model.id for model in client(demo).models.list()] == ["demo"]
    assert client(demo).models.retrieve("demo").id == "demo"


def test_many_at_once_and_one_that_goes_away(scripted: str) -> None:
    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{scripted}/v1", api_key="none", max_retries=0) as client:
            left = await client.chat.completions.create(**ask("Count"), stream=True)
            await anext(aiter(left))
            await left.close()
            answers = await asyncio.gather(*(client.chat.completions.create(**ask("Count")) for _ in range(4)))
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(all_at_once()) == [LONG] * 4
