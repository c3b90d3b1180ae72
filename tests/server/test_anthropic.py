"""Anthropic's messages, with a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.live import serving
from tests.server.playing import NUMBERS, WEATHER, Play, events
from tests.server.quick import quick_model

PLAY = Play()
LOG: list[str] = []


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with (
        serving(lambda: quick_model(PLAY), ping_seconds=0.005, log=LOG.append) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def asked(client: httpx.Client, *messages: Any, **more: Any) -> Any:
    """Return the answer to a conversation, after comparing the count of its tokens with another request's."""
    body = {"model": "claude", "max_tokens": 1000, "messages": messages, **more}
    response = client.post("/v1/messages?beta=true", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    count = client.post("/v1/messages/count_tokens?beta=true", json=body).json()
    assert answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"] == count["input_tokens"]
    return answer


def refused(client: httpx.Client, status: int, kind: str, **body: Any) -> str:
    """Return the message of a request that is refused, by both paths, before the model is asked."""
    before = len(PLAY.prompts)
    response = client.post("/v1/messages", json=body)
    error = response.json()
    assert response.status_code == status and error["type"] == "error" and error["error"]["type"] == kind
    assert len(PLAY.prompts) == before
    return str(error["error"]["message"])


def without_pings(client: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the events of a stream, except for pings."""
    return [each for each in events(client.post("/v1/messages", json=body)) if each["type"] != "ping"]


def test_the_demo_answers() -> None:
    with serving() as address:
        body = {"messages": [user("Sort 7 3 5")], "seed": 1, "max_tokens": 100}
        answer = httpx.post(f"{address}/v1/messages", json=body, timeout=60).json()
        assert answer["content"] == [{"type": "text", "text": "3 5 7"}]
        assert (answer["type"], answer["role"], answer["stop_reason"]) == ("message", "assistant", "end_turn")
        properties = {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        question = "Make a JSON object: Simon is 59 years old and lives in Rome."
        body |= {"messages": [user(question)], "output_config": {"format": {"type": "json_schema", "schema": schema}}}
        answer = httpx.post(f"{address}/v1/messages", json=body, timeout=60).json()
        assert json.loads(answer["content"][0]["text"]) == {"name": "Simon", "age": 59, "city": "Rome"}


def test_a_stream_tells_of_thinking_text_and_calls_in_order(client: httpx.Client) -> None:
    body = {"messages": [user("hi")], "tools": [WEATHER], "stream": True}
    found = without_pings(client, body)
    kinds = [(each["type"], each.get("index")) for each in found]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    thinking = [block[0], block[1], block[1], block[2]]  # with its signature
    assert kinds == [
        ("message_start", None), *((kind, 0) for kind in thinking), *((kind, 1) for kind in block),
        *((kind, 2) for kind in block), ("message_delta", None), ("message_stop", None),
    ]  # fmt: skip
    assert found[0]["message"]["type"] == "message" and found[0]["message"]["content"] == []
    starts = [each["content_block"]["type"] for each in found if "content_block" in each]
    assert starts == ["thinking", "text", "tool_use"]
    deltas = [each["delta"] for each in found if each["type"] == "content_block_delta"]
    assert deltas[0] == {"type": "thinking_delta", "thinking": "Hm, 😀."}
    assert deltas[2:] == [
        {"type": "text_delta", "text": "I look."}, {"type": "input_json_delta", "partial_json": '{"city": "Rome"}'},
    ]  # fmt: skip
    assert found[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] > 0


def test_a_stream_and_a_whole_answer_have_the_same_blocks(client: httpx.Client) -> None:
    body = {"messages": [user("hi")], "tools": [WEATHER], "seed": 3}
    whole = asked(client, user("hi"), tools=[WEATHER], seed=3)
    found = events(client.post("/v1/messages", json={**body, "stream": True}))
    assert whole["content"][2]["input"] == {"city": "Rome"}
    starts = [each["content_block"] for each in found if each["type"] == "content_block_start"]
    assert [start["type"] for start in starts] == [block["type"] for block in whole["content"]]
    assert starts[2]["id"] == whole["content"][2]["id"]


def test_silence_is_broken_by_pings(client: httpx.Client) -> None:
    body = {"messages": [user("wait")], "stream": True}
    PLAY.wait(0.1)
    assert {"type": "ping"} in events(client.post("/v1/messages", json=body))


def test_results_go_back_to_the_model(client: httpx.Client) -> None:
    answer = asked(client, user("hi"), tools=[WEATHER])
    call = answer["content"][2]
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "20 degrees"}]}
    told = [user("hi"), {"role": "assistant", "content": answer["content"]}, user([result])]
    answer = asked(client, *told, tools=[WEATHER])
    assert answer["content"] == [{"type": "text", "text": "It is sunny."}] and answer["stop_reason"] == "end_turn"
    assert '<|tool_response>response:get_weather{value:<|"|>20 degrees<|"|>}' in PLAY.last()
    told[2] = user([{"type": "text", "text": "Well?"}, {**result, "is_error": True, "content": "no network"}])
    asked(client, *told, tools=[WEATHER])
    assert 'response:get_weather{error:<|"|>no network<|"|>}' in PLAY.last()
    assert PLAY.last().index("no network") < PLAY.last().index("Well?")


def test_system_prompts_are_read_without_the_billing_line(client: httpx.Client) -> None:
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1.2; cch=abc;"},
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be kind."},
    ]  # fmt: skip
    asked(client, user("hi"), {"role": "system", "content": [{"type": "text", "text": "It is late."}]}, system=system)
    assert "<|turn>system\nBe brief.\n\nBe kind.<turn|>" in PLAY.last() and "billing" not in PLAY.last()
    assert "<|turn>system\nIt is late.<turn|>" in PLAY.last()
    asked(client, user("hi"), system="Be brief.")
    assert "<|turn>system\nBe brief.<turn|>" in PLAY.last()


def test_why_an_answer_ends(client: httpx.Client) -> None:
    assert asked(client, user("count"))["content"][0]["text"] == NUMBERS
    cut = asked(client, user("count"), max_tokens=5)
    assert cut["stop_reason"] == "max_tokens" and cut["usage"]["output_tokens"] == 5
    stop = asked(client, user("count"), stop_sequences=["nothing", "16 17"])  # over two canvases
    assert (stop["stop_reason"], stop["stop_sequence"]) == ("stop_sequence", "16 17")
    assert stop["content"][0]["text"] == NUMBERS[: NUMBERS.index("16 17")]
    for limit in ({}, {"max_tokens": None}):
        answer = client.post("/v1/messages", json={"messages": [user("count")], **limit}).json()
        assert answer["content"][0]["text"] == NUMBERS


def test_the_choice_among_tools(client: httpx.Client) -> None:
    def kinds(text: str, **choice: Any) -> list[str]:
        tools = [WEATHER, {"type": "web_search_20250305", "name": "web_search"}]
        answer = asked(client, user(text), tools=tools, tool_choice=choice)
        return [block["type"] for block in answer["content"]]

    assert kinds("hi", type="auto") == ["thinking", "text", "tool_use"]
    assert kinds("twice", type="any") == ["tool_use", "tool_use"]
    assert kinds("twice", type="tool", name="get_weather") == ["tool_use", "tool_use"]
    assert kinds("hi", type="none") == ["text"] and "get_weather" not in PLAY.last()
    assert len([line for line in LOG if "web_search" in line]) == 1
    assert asked(client, user("hi"), tools=[], tool_choice={"type": "auto"})["stop_reason"] == "end_turn"
    assert "no tool has" in refused(
        client, 400, "invalid_request_error", messages=[user("hi")], tools=[WEATHER],
        tool_choice={"type": "tool", "name": "other"},
    )  # fmt: skip


def test_one_call_where_only_one_may_be_made(client: httpx.Client) -> None:
    assert len(asked(client, user("twice"), tools=[WEATHER])["content"]) == 2
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    answer = asked(client, user("twice"), tools=[WEATHER], tool_choice=choice)
    assert len(answer["content"]) == 1 and answer["stop_reason"] == "tool_use"


def test_deferred_tools_are_offered_once_they_are_referred_to(client: httpx.Client) -> None:
    search = {"name": "search_tools", "input_schema": {"type": "object"}}
    tools = [search, {**WEATHER, "defer_loading": True}]
    asked(client, user("hi"), tools=tools)
    assert "declaration:search_tools" in PLAY.last() and "declaration:get_weather" not in PLAY.last()
    call = {"type": "tool_use", "id": "a", "name": "search_tools", "input": {}}
    reference = {"type": "tool_reference", "tool_name": "get_weather"}
    found = {"type": "tool_result", "tool_use_id": "a", "content": [reference]}
    asked(client, user("hi"), {"role": "assistant", "content": [call]}, user([found]), tools=tools)
    assert "declaration:get_weather" in PLAY.last()
    added = {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": WEATHER}}
    removed = {"type": "tool_removal", "tool": {"type": "tool_reference", "name": "search_tools"}}
    asked(client, user("hi"), {"role": "system", "content": [added, removed]}, tools=[search])
    assert "declaration:get_weather" in PLAY.last() and "search_tools" not in PLAY.last()


@pytest.mark.parametrize("empty", [None, "", []])
def test_contents_may_be_empty(client: httpx.Client, empty: Any) -> None:
    asked(client, user("hi"), {"role": "assistant", "content": empty}, user(empty), system=empty)
    assert PLAY.last() == "<bos><|turn>user\nhi<turn|>\n<|turn>model\n<turn|>\n<|turn>user\n<turn|>\n<|turn>model\n"


def test_another_model_s_name_is_refused_where_the_owner_wants_that() -> None:
    with serving(strict_model=True) as address:
        body = {"model": "claude", "messages": [user("hi")], "input": "hi"}
        error = httpx.post(f"{address}/v1/messages", json=body).json()["error"]
        assert error["type"] == "not_found_error" and "'claude'" in error["message"]
        assert httpx.post(f"{address}/v1/responses", json=body).json()["error"]["code"] == "model_not_found"


def test_thinking_is_asked_for(client: httpx.Client) -> None:
    for kind, thinks in (("enabled", True), ("adaptive", True), ("disabled", False)):
        asked(client, user("hi"), thinking={"type": kind, "budget_tokens": 2000})
        assert ("<|think|>" in PLAY.last()) is thinks


def test_fields_without_effect_are_noted_once_and_others_ignored(client: httpx.Client) -> None:
    for _ in range(2):
        asked(client, user("hi"), top_k=5, temperature=0.7, metadata={"user_id": "me"}, context_management={}, new=[1])
    for name in ("top_k", "temperature (other than 0)"):
        assert [line for line in LOG if name in line] == [f"/v1/messages: {name} has no effect"]


def test_tokens_are_counted_while_the_model_works(client: httpx.Client) -> None:
    PLAY.waits.clear()
    PLAY.goes_on.clear()
    with client.stream("POST", "/v1/messages", json={"messages": [user("wait")], "stream": True}) as stream:
        assert PLAY.waits.wait(30)
        counted = client.post("/v1/messages/count_tokens", json={"messages": [user("hi")]}).json()
        PLAY.goes_on.set()
        assert counted == {"input_tokens": 10}
        assert "message_stop" in stream.read().decode()


@pytest.mark.parametrize(("body", "said"), [
    ({}, "messages"),
    ({"messages": []}, "must end with a message of the user"),
    ({"messages": [user("hi"), {"role": "assistant", "content": "I"}]}, "must end with a message of the user"),
    ({"messages": [user([{"type": "image", "source": {"type": "base64"}}])]}, "image"),
    ({"messages": [user([{"type": "hologram"}])]}, "hologram"),
    ({"messages": [user(5)]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "tool"),
    ({"messages": [user([{"type": "tool_result", "tool_use_id": "b", "content": "c"}])]}, "no earlier call"),
    ({"messages": [user("hi")], "max_tokens": 0}, "max_tokens"),
    ({"messages": [user("hi")], "stop_sequences": ["a"] * 65}, "at most 64"),
    ({"messages": [user("hi")], "output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "type"),
    ({"messages": [user("hi")], "tools": [{"input_schema": {}}]}, "name"),
    ({"messages": [user("hi " * 5000)]}, "prompt is too long: "),
])  # fmt: skip
def test_what_is_wrong_is_refused_before_any_work(client: httpx.Client, body: dict[str, Any], said: str) -> None:
    assert said in refused(client, 400, "invalid_request_error", **body)


def test_errors_have_this_protocol_s_form(client: httpx.Client) -> None:
    for method, path, status, kind in (
        ("POST", "/v1/messages/batches", 404, "not_found_error"), ("GET", "/v1/messages", 405, "invalid_request_error"),
        ("POST", "/v1/messages", 400, "invalid_request_error"),
    ):  # fmt: skip
        response = client.request(method, path, content="[")
        assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
        assert response.headers["request-id"] == response.json()["request_id"]
    unknown = client.get("/v1/nothing", headers={"anthropic-version": "2023-06-01"})
    assert unknown.json()["error"]["type"] == "not_found_error"


def test_a_failure_of_the_model_is_an_error_and_the_next_request_runs(client: httpx.Client) -> None:
    body = {"messages": [user("boom")]}
    response = client.post("/v1/messages", json=body)
    assert response.status_code == 500 and response.json()["error"]["type"] == "api_error"
    found = without_pings(client, {**body, "stream": True})
    assert [each["type"] for each in found] == ["message_start", "error"]
    assert found[1]["error"]["type"] == "api_error"
    assert asked(client, user("hi"))["stop_reason"] == "end_turn"


def test_there_is_a_server(client: httpx.Client) -> None:
    assert client.head("/").status_code == 200
