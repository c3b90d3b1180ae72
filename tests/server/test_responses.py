"""OpenAI's responses, with a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.live import serving
from tests.server.playing import FUNCTION, NUMBERS, Play, events
from tests.server.quick import quick_model

PLAY = Play()
LOG: list[str] = []
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": "start: /a/"}
CUSTOM = {"type": "custom", "name": "patch", "format": GRAMMAR}
BOX = {"type": "namespace", "name": "box", "tools": [{"type": "custom", "name": "open"}]}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with (
        serving(lambda: quick_model(PLAY), ping_seconds=0.005, log=LOG.append) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


def asked(client: httpx.Client, input: Any, **more: Any) -> Any:
    """Return the response to an input."""
    response = client.post("/v1/responses", json={"model": "gpt", "input": input, **more})
    assert response.status_code == 200, response.text
    return response.json()


def streamed(client: httpx.Client, input: Any, **more: Any) -> list[dict[str, Any]]:
    """Return the events of a stream, after checking their numbers, without the signs of life."""
    found = events(client.post("/v1/responses", json={"input": input, "stream": True, **more}))
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    return [each for at, each in enumerate(found) if at < 2 or each["type"] != "response.in_progress"]


def test_the_demo_answers() -> None:
    with serving() as address:
        body: dict[str, Any] = {"input": "Sort 7 3 5", "seed": 1}
        answer = httpx.post(f"{address}/v1/responses", json=body, timeout=60).json()
        assert answer["output"][0]["content"][0] | {"logprobs": []} == {
            "type": "output_text", "text": "3 5 7", "annotations": [], "logprobs": [],
        }  # fmt: skip
        assert (answer["object"], answer["status"], answer["store"]) == ("response", "completed", False)
        properties = {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        body["input"] = "Make a JSON object: Simon is 59 years old and lives in Rome."
        body["text"] = {"format": {"type": "json_schema", "name": "person", "schema": schema, "strict": True}}
        answer = httpx.post(f"{address}/v1/responses", json=body, timeout=60).json()
        found = json.loads(answer["output"][0]["content"][0]["text"])
        assert found == {"name": "Simon", "age": 59, "city": "Rome"}


def test_a_stream_tells_of_reasoning_text_and_calls_in_order(client: httpx.Client) -> None:
    found = streamed(client, "hi", tools=[FUNCTION])
    text = ["content_part.added", "{}.delta", "{}.done", "content_part.done"]
    assert [each["type"].removeprefix("response.") for each in found] == [
        "created", "in_progress",
        "output_item.added", *(each.format("reasoning_text") for each in text), "output_item.done",
        "output_item.added", *(each.format("output_text") for each in text), "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    assert [each["output_index"] for each in found if each["type"] == "response.output_item.done"] == [0, 1, 2]
    items = [each["item"] for each in found if each["type"] == "response.output_item.done"]
    response = found[-1]["response"]
    assert response["output"] == items and response["usage"]["total_tokens"] > response["usage"]["input_tokens"] > 0
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == 14  # with two marks
    assert items[0]["content"] == [{"type": "reasoning_text", "text": "Hm, 😀."}]
    assert items[1]["content"][0]["text"] == "I look."
    assert (items[2]["name"], json.loads(items[2]["arguments"])) == ("get_weather", {"city": "Rome"})
    added = [each["item"] for each in found if each["type"] == "response.output_item.added"]
    assert [item["id"] for item in added] == [item["id"] for item in items]
    assert (added[1]["content"], added[2]["arguments"]) == ([], "")


def test_silence_is_broken_by_the_response_as_it_is(client: httpx.Client) -> None:
    PLAY.wait(0.1)
    found = events(client.post("/v1/responses", json={"input": "wait", "stream": True}))
    assert len([each for each in found if each["type"] == "response.in_progress"]) > 1


def test_results_go_back_to_the_model(client: httpx.Client) -> None:
    output = asked(client, "hi", tools=[FUNCTION])["output"]
    result = {"type": "function_call_output", "call_id": output[2]["call_id"], "output": "20 degrees"}
    answer = asked(client, [{"role": "user", "content": "hi"}, *output, result], tools=[FUNCTION])
    assert answer["output"][0]["content"][0]["text"] == "It is sunny."
    assert PLAY.last().count("<|turn>model") == 1
    assert 'I look.<|tool_call>call:get_weather{city:<|"|>Rome<|"|>}<tool_call|>' in PLAY.last()
    assert 'response:get_weather{value:<|"|>20 degrees<|"|>}' in PLAY.last()
    parts = [{"type": "input_text", "text": "20"}, {"type": "input_text", "text": "degrees"}]
    asked(client, [{"role": "user", "content": "hi"}, *output, {**result, "output": parts}], tools=[FUNCTION])
    assert 'value:<|"|>20\ndegrees<|"|>' in PLAY.last()


def test_tools_of_namespaces_and_tools_that_take_a_text(client: httpx.Client) -> None:
    call = asked(client, "hi", tools=[BOX, {"type": "web_search"}, {"type": "web_search"}])["output"][0]
    assert call["type"] == "custom_tool_call" and call["input"] == 'a "b"'
    assert (call["namespace"], call["name"]) == ("box", "open")
    result = {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "opened"}
    asked(client, [{"role": "user", "content": "hi"}, call, result], tools=[BOX])
    assert "call:box__open{" in PLAY.last() and "response:box__open{" in PLAY.last()
    assert len([line for line in LOG if "web_search" in line]) == 1
    found = streamed(client, "hi", tools=[CUSTOM])
    assert "start: /a/" in PLAY.last()
    assert [each["type"] for each in found if "custom" in each["type"]] == [
        "response.custom_tool_call_input.delta", "response.custom_tool_call_input.done",
    ]  # fmt: skip


def test_the_choice_among_tools(client: httpx.Client) -> None:
    def kinds(text: str, choice: Any) -> list[str]:
        return [item["type"] for item in asked(client, text, tools=[FUNCTION, CUSTOM], tool_choice=choice)["output"]]

    function = {"type": "function", "name": "get_weather"}
    assert kinds("hi", "auto") == ["reasoning", "message", "function_call"]
    assert kinds("twice", "required") == ["function_call", "function_call"]
    assert kinds("twice", function) == ["function_call", "function_call"]
    assert kinds("hi", "none") == ["message"] and "declaration" not in PLAY.last()
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "custom", "name": "patch"}]}
    assert kinds("hi", allowed) == ["custom_tool_call"] and "get_weather" not in PLAY.last()
    assert len(asked(client, "twice", tools=[FUNCTION], parallel_tool_calls=False)["output"]) == 1


def test_every_kind_of_item_reaches_the_model(client: httpx.Client) -> None:
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": "one"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"role": "user", "content": [{"type": "input_text", "text": "three"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": []},
    ]  # fmt: skip
    asked(client, items, instructions="Be kind.")
    assert PLAY.last() == (
        "<bos><|turn>system\nBe kind.\n\nBe brief.<turn|>\n<|turn>user\none<turn|>\n<|turn>model\ntwo<turn|>\n"
        "<|turn>user\nthree<turn|>\n<|turn>model\n<turn|>\n<|turn>user\n<turn|>\n<|turn>model\n"
    )


def test_an_answer_that_is_cut_off_is_incomplete(client: httpx.Client) -> None:
    answer = asked(client, "count", max_output_tokens=5)
    assert answer["status"] == answer["output"][0]["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert streamed(client, "count", max_output_tokens=5)[-1]["type"] == "response.incomplete"
    for limit in ({}, {"max_output_tokens": None}):
        assert asked(client, "count", **limit)["output"][0]["content"][0]["text"] == NUMBERS


def test_effort_asks_for_thinking(client: httpx.Client) -> None:
    for effort, thinks in (("none", False), ("minimal", False), (None, False), ("low", True), ("high", True)):
        asked(client, "hi", reasoning={"effort": effort, "summary": "auto"}, include=["reasoning.encrypted_content"])
        assert ("<|think|>" in PLAY.last()) is thinks


def test_fields_without_effect_are_noted_once_and_others_ignored(client: httpx.Client) -> None:
    for _ in range(2):
        asked(client, "hi", top_p=0.5, store=True, metadata={"a": "b"}, prompt_cache_key="c", client_metadata={})
    assert [line for line in LOG if "top_p" in line] == ["/v1/responses: top_p has no effect"]


@pytest.mark.parametrize(("body", "param"), [
    ({}, None),
    ({"input": []}, None),
    ({"input": "hi", "previous_response_id": "resp_1"}, "previous_response_id"),
    ({"input": "hi", "conversation": {"id": "conv_1"}}, "conversation"),
    ({"input": "hi", "prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"input": "hi", "background": True}, "background"),
    ({"input": "hi", "top_logprobs": 3}, "top_logprobs"),
    ({"input": "hi", "include": ["message.output_text.logprobs"]}, "include"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]}, "input[0]"),
    ({"input": [{"type": "hologram"}]}, "input[0].type"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
    ({"input": "hi", "text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, None),
    ({"input": "hi", "tools": [{"type": "function"}]}, "tools"),
    ({"input": "hi", "tool_choice": "required"}, None),
    ({"input": "hi", "tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
    ({"input": "hi", "max_output_tokens": 0}, "max_output_tokens"),
])  # fmt: skip
def test_what_is_wrong_is_refused_before_any_work(
    client: httpx.Client, body: dict[str, Any], param: str | None
) -> None:
    before = len(PLAY.prompts)
    response = client.post("/v1/responses", json=body)
    error = response.json()["error"]
    assert response.status_code == 400 and (error["type"], error["param"]) == ("invalid_request_error", param)
    assert len(PLAY.prompts) == before


def test_a_prompt_that_is_too_long_has_a_code(client: httpx.Client) -> None:
    error = client.post("/v1/responses", json={"input": "hi " * 5000}).json()["error"]
    assert error["code"] == "context_length_exceeded"


def test_a_failure_of_the_model_ends_the_stream(client: httpx.Client) -> None:
    found = streamed(client, "boom")
    assert found[-1]["type"] == "response.failed" and found[-1]["response"]["status"] == "failed"
    assert found[-1]["response"]["error"]["code"] == "server_error"
    assert client.post("/v1/responses", json={"input": "boom"}).status_code == 500
    assert asked(client, "hi")["status"] == "completed"
