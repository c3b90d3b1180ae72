"""OpenAI's chat completions, with a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from dgemma_mlx import generate, load
from tests.server.live import http, serving
from tests.server.scripted import scripted_model

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    },
}
CALLS = '<|tool_call>call:add{a:1,b:<|"|>ä "x"<|"|>}<tool_call|><|tool_call>call:add{a:2,b:<|"|><|"|>}<tool_call|>'
SHORT = "1 2 3 4 5 6"
NUMBERS = " ".join(str(number) for number in range(30))  # several canvases
SENTENCE = "Write a sentence about a cat."  # many are right, so seeds differ
PATH = "/v1/chat/completions"


def script(prompt: str) -> str:
    if "fail" in prompt:
        raise ValueError("a fault of this program")
    if "only a call" in prompt:
        return CALLS
    if "response:add" in prompt:
        return "It is 3."
    if "declaration:add" in prompt:
        return f"<|channel>thought\nI add.\n<channel|>Wait.{CALLS}"
    if "json" in prompt:
        return '{"n": 4}'
    if "emoji" in prompt:
        return "😀" * 12
    if "long" in prompt:
        return NUMBERS
    return f"<|channel>thought\nHm.\n<channel|>{SHORT}" if "<|think|>" in prompt else SHORT


@pytest.fixture(scope="module")
def log() -> list[str]:
    return []


@pytest.fixture(scope="module")
def address(log: list[str]) -> Iterator[str]:
    """A server whose model follows the script."""
    with serving(lambda: scripted_model(script), log=log.append, max_queue=8) as address:
        yield address


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    """A server with the demo model."""
    with serving() as address:
        yield address


def body(content: Any = "hi", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "seed": 1, **more}


def answered(address: str, **more: Any) -> dict[str, Any]:
    answer = http.post(address + PATH, json=body(**more))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    found: dict[str, Any] = answer.json()
    return found


def refused(address: str, status: int = 400, **more: Any) -> dict[str, Any]:
    answer = http.post(address + PATH, json=body(**more))
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def streamed(address: str, **more: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, each of whose lines must be whole JSON."""
    with http.stream("POST", address + PATH, json=body(**more, stream=True)) as stream:
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line for line in stream.iter_lines() if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    chunks: list[dict[str, Any]] = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    return chunks


def joined(chunks: list[dict[str, Any]], key: str = "content", index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get(key) or "" for choice in choices)


def reasons(chunks: list[dict[str, Any]]) -> list[str]:
    return [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]


def test_the_answer_is_that_of_generate_whole_and_streamed(demo: str) -> None:
    done = generate(load("demo"), "Sort 7 3 5", seed=1)
    answer, chunks = answered(demo, content="Sort 7 3 5"), streamed(demo, content="Sort 7 3 5")
    assert answer["choices"] == [{
        "index": 0, "message": {"role": "assistant", "content": done.text, "refusal": None}, "logprobs": None,
        "finish_reason": "stop",
    }]  # fmt: skip
    counts = done.statistics
    assert answer["usage"]["prompt_tokens"] == counts.prompt_tokens
    assert answer["usage"]["completion_tokens"] == counts.generated_tokens
    assert answer["usage"]["total_tokens"] == counts.prompt_tokens + counts.generated_tokens
    assert answer["model"] == "demo" and answer["object"] == "chat.completion" and answer["id"]
    assert joined(chunks) == done.text and reasons(chunks) == ["stop"]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_what_other_programs_add_is_ignored_and_null_is_absent(demo: str) -> None:
    names = (
        "tools", "tool_choice", "response_format", "stop", "n", "max_tokens", "max_completion_tokens", "temperature",
        "top_p", "stream_options", "reasoning_effort", "parallel_tool_calls", "logprobs", "user",
    )  # fmt: skip
    nothing = dict.fromkeys(names)
    answer = answered(demo, content="Sort 7 3 5", **nothing, stream=None, unknown={"a": 1}, store=True, metadata={})
    assert answer["choices"][0]["message"]["content"] == "3 5 7"
    answer = answered(demo, content="Sort 7 3 5", tools=[], tool_choice="auto", max_tokens=-1, model="gpt-4o")
    assert answer["choices"][0]["message"]["content"] == "3 5 7"


def test_choices_have_a_seed_each(demo: str, address: str) -> None:
    model = load("demo")
    texts = [generate(model, SENTENCE, seed=seed, max_tokens=16, speed="reference").text for seed in (1, 2)]
    assert texts[0] != texts[1]
    chunks = streamed(demo, content=SENTENCE, n=2, max_tokens=16, speed="reference")
    assert [joined(chunks, index=index) for index in (0, 1)] == texts
    assert len(reasons(chunks)) == 2
    choices = answered(address, n=3)["choices"]
    assert [(choice["index"], choice["message"]["content"]) for choice in choices] == [(n, SHORT) for n in range(3)]


def test_a_negative_seed_is_a_seed(demo: str) -> None:
    assert answered(demo, content="Sort 7 3 5", seed=-5)["choices"][0]["message"]["content"] == "3 5 7"


def test_a_schema_holds_whole_and_streamed(address: str) -> None:
    assert answered(address, content="json")["choices"][0]["message"]["content"] == '{"n": 4}'
    schema = {"type": "object", "properties": {"n": {"const": 3}}, "required": ["n"], "additionalProperties": False}
    format = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}
    more = {"content": "json", "response_format": format, "max_tokens": 16, "speed": "fast"}
    assert json.loads(answered(address, **more)["choices"][0]["message"]["content"]) == {"n": 3}
    assert json.loads(joined(streamed(address, **more))) == {"n": 3}


@pytest.mark.parametrize(
    "format",
    [
        {"type": "xml"}, {"type": "json_schema"}, {},
        {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "(?<=a)b"}}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "string", "minLength": 500}}},
        {"type": "json_schema", "json_schema": {"schema": False}},
    ],
)  # fmt: skip
def test_a_format_that_cannot_hold_is_refused_before_the_stream_begins(address: str, format: Any) -> None:
    error = refused(address, response_format=format, stream=True, max_tokens=100)
    assert error["type"] == "invalid_request_error"


def test_thinking_comes_apart_from_the_answer(address: str) -> None:
    message = answered(address, reasoning_effort="high")["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", SHORT)
    chunks = streamed(address, chat_template_kwargs={"enable_thinking": True})
    assert (joined(chunks, "reasoning_content"), joined(chunks)) == ("Hm.", SHORT)
    for effort in (None, "none", "minimal"):
        assert "reasoning_content" not in answered(address, reasoning_effort=effort)["choices"][0]["message"]


def test_calls_are_answered_whole(address: str) -> None:
    [choice] = answered(address, tools=[TOOL])["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Wait." and choice["message"]["reasoning_content"] == "I add."
    calls = choice["message"]["tool_calls"]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"a": 1, "b": 'ä "x"'}, {"a": 2, "b": ""}]
    assert len({call["id"] for call in calls}) == 2


def test_calls_are_streamed_with_their_name_first(address: str) -> None:
    chunks = streamed(address, tools=[TOOL])
    deltas = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    names = [delta["function"]["name"] for delta in deltas if "id" in delta]
    assert names == ["add", "add"]
    for index, arguments in enumerate(({"a": 1, "b": 'ä "x"'}, {"a": 2, "b": ""})):
        own = [delta for delta in deltas if delta["index"] == index]
        assert own[0]["type"] == "function" and own[0]["function"]["arguments"] == ""
        assert json.loads("".join(delta["function"]["arguments"] for delta in own)) == arguments
    assert reasons(chunks) == ["tool_calls"] and chunks[-1]["choices"][0]["delta"] == {}
    assert "<|" not in json.dumps(chunks)


def test_one_call_at_a_time(address: str) -> None:
    [choice] = answered(address, tools=[TOOL], parallel_tool_calls=False)["choices"]
    assert len(choice["message"]["tool_calls"]) == 1 and choice["finish_reason"] == "tool_calls"
    assert reasons(streamed(address, tools=[TOOL], parallel_tool_calls=False)) == ["tool_calls"]


def test_the_result_of_a_call_leads_to_the_answer(address: str) -> None:
    message = answered(address, tools=[TOOL])["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "3"} for call in message["tool_calls"]]
    messages = [{"role": "user", "content": "1 + 2?"}, message, *results]
    answer = answered(address, messages=messages, tools=[TOOL])
    assert answer["choices"][0]["message"]["content"] == "It is 3."


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_can_be_required(address: str, choice: Any) -> None:
    [found] = answered(address, content="only a call", tools=[TOOL], tool_choice=choice)["choices"]
    assert found["finish_reason"] == "tool_calls" and found["message"]["content"] is None
    assert {call["function"]["name"] for call in found["message"]["tool_calls"]} == {"add"}


def test_a_choice_of_none_leaves_the_tools_out(address: str) -> None:
    [choice] = answered(address, tools=[TOOL], tool_choice="none")["choices"]
    assert choice["message"]["content"] == SHORT and choice["finish_reason"] == "stop"


def test_an_answer_that_is_cut_off_says_so(address: str) -> None:
    [choice] = answered(address, max_tokens=3)["choices"]
    assert choice["finish_reason"] == "length" and SHORT.startswith(choice["message"]["content"])
    assert reasons(streamed(address, max_completion_tokens=3)) == ["length"]
    [choice] = answered(address, tools=[TOOL], max_tokens=24)["choices"]  # within the call
    assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]
    assert "<|" not in choice["message"]["content"]


def test_a_stop_text_may_lie_across_canvases(address: str) -> None:
    text = NUMBERS[: NUMBERS.index("23 24")]
    stops = ["23 24", "nowhere"]
    answer = answered(address, content="long", stop=stops)
    assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == (text, "stop")
    chunks = streamed(address, content="long", stop=stops)
    assert joined(chunks) == text and reasons(chunks) == ["stop"]
    assert answered(address, content="long", stop=NUMBERS[:5])["choices"][0]["message"]["content"] == ""


def test_a_stop_text_cuts_off_the_calls_after_it(address: str) -> None:
    [choice] = answered(address, tools=[TOOL], stop="it")["choices"]
    assert choice["message"]["content"] == "Wa" and choice["finish_reason"] == "stop"
    assert "tool_calls" not in choice["message"]


def test_characters_are_never_split(address: str) -> None:
    assert joined(streamed(address, content="emoji")) == "😀" * 12


def test_a_stream_ends_with_the_counts_where_these_are_wanted(address: str) -> None:
    *chunks, last = streamed(address, stream_options={"include_usage": True})
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 6
    assert all(chunk["usage"] is None for chunk in chunks)
    assert "usage" not in json.dumps(streamed(address, stream_options={"include_usage": False}))


def test_drafts_come_only_where_they_are_wanted(address: str) -> None:
    assert "dgemma" not in json.dumps(streamed(address))
    chunks = streamed(address, drafts=True)
    drafts = [chunk for chunk in chunks if "tokens" in chunk.get("dgemma", {})]
    assert drafts and all(chunk["choices"][0]["delta"] == {} for chunk in drafts)
    assert joined(chunks) == SHORT and reasons(chunks) == ["stop"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"logprobs": True}, "logprobs"), ({"top_logprobs": 3}, "logprobs"),
        ({"functions": [{"name": "f"}]}, "functions"), ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "3"}, "max_tokens"), ({"n": 0}, "n"), ({"n": 99}, "n"), ({"stop": ["a"] * 65}, "stop"),
        ({"temperature": -1}, "temperature"), ({"drafts": True, "n": 2}, "drafts"), ({"tools": [3]}, "tools"),
        ({"content": [{"type": "image_url", "image_url": {"url": "data:"}}]}, "messages[0].content[0]"),
        ({"tool_choice": "required"}, None), ({"speed": "warp"}, None), ({"messages": [{"role": "boss"}]}, None),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(address: str, more: dict[str, Any], param: str | None) -> None:
    assert refused(address, **more)["param"] == param


def test_a_prompt_that_is_too_long_has_the_code_that_clients_know(address: str) -> None:
    error = refused(address, content="Sort " * 20_000, stream=True)
    assert error["code"] == "context_length_exceeded" and "maximum context length" in error["message"]


def test_a_body_that_is_not_json_is_refused(address: str) -> None:
    for content in (b"", b"{", b"[]", b'{"messages": [], "messages": "\xff"}', b'{"messages": ["\\ud800"]}'):
        answer = http.post(address + PATH, content=content)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_fault_is_an_error_whole_and_in_a_stream_and_the_next_answer_comes(address: str) -> None:
    assert refused(address, 500, content="fail")["type"] == "server_error"
    with http.stream("POST", address + PATH, json=body("fail", stream=True)) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert answered(address)["choices"][0]["message"]["content"] == SHORT


def test_fields_without_effect_are_logged_once(address: str, log: list[str]) -> None:
    for _ in range(2):
        answered(address, max_tokens=3, top_p=0.9, frequency_penalty=0.5, temperature=0.7, presence_penalty=0)
        answered(address, max_tokens=3, tools=[{"type": "web_search"}])
    for name in ("top_p", "frequency_penalty", "temperature", "web_search"):
        assert sum(name in line for line in log) == 1
    assert not any("presence_penalty" in line for line in log)


def test_what_is_not_there_is_answered_in_the_same_form(address: str) -> None:
    for path in ("/v1/embeddings", "/v1/audio/speech", "/v1/nothing"):
        answer = http.post(address + path, json={"input": "hi"})
        assert answer.status_code == 404 and answer.json()["error"]["message"]
    assert http.get(address + PATH).status_code == 405
