"""Messages and tools as clients write them."""

from __future__ import annotations

from typing import Any

import pytest

from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.server.messages import chat_messages, offered, text_of
from dgemma_mlx.text.messages import conversation
from dgemma_mlx.text.tools import declarations

USER = {"role": "user", "content": "hi"}
ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
# A look-behind is not supported.
ODD = {"name": "odd", "parameters": {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?<=b)a"}}}}


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""), ("", ""), ([], ""), ("a", "a"),
        ([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "input_text", "text": "b"}],
         "a\nb"),
    ],
)  # fmt: skip
def test_the_content_of_every_role_may_be_null_empty_or_parts(role: str, content: Any, text: str) -> None:
    [_, message] = chat_messages([USER, {"role": role, "content": content, "name": "x", "unknown": 1}])
    assert message["content"] == text
    assert message["role"] == ("system" if role == "developer" else role)
    conversation([USER, message])


@pytest.mark.parametrize(
    "part", [{"type": "input_audio"}, {"type": "image", "path": "/etc/hostname"}, {"type": "video", "path": "a.mp4"}]
)
def test_a_part_that_cannot_be_read_is_refused_with_its_place(part: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as error:
        chat_messages([USER, {"role": "user", "content": [{"type": "text", "text": "a"}, part]}])
    assert (error.value.status, error.value.param) == (400, "messages[1].content[1]")
    assert part["type"] in error.value.message


@pytest.mark.parametrize("content", [3, {"type": "text"}, [None], [{"type": []}], [{"type": "text", "text": 1}]])
def test_a_content_of_another_kind_is_refused(content: Any) -> None:
    with pytest.raises(ApiError):
        text_of(content, "content")


def test_system_messages_at_the_beginning_become_one_without_the_billing_line() -> None:
    billing = "x-anthropic-billing-header: cc_version=2.1.7; cch=3f2a1;"
    messages = [{"role": "system", "content": text} for text in (f"{billing}\nBe brief.", billing, "Be kind.")]
    assert chat_messages([*messages, USER]) == [{"role": "system", "content": "Be brief.\n\nBe kind."}, USER]
    assert chat_messages([messages[1], USER]) == [USER]


def test_a_system_message_in_the_middle_stays_there() -> None:
    later = {"role": "system", "content": "b"}
    assert chat_messages([{"role": "developer", "content": "a"}, USER, later])[1:] == [USER, later]


def test_a_round_with_a_tool_keeps_what_the_template_reads() -> None:
    call = {"id": "c", "type": "function", "index": 0, "function": {"name": "add", "arguments": '{"a": 1}'}, "x": 1}
    messages = chat_messages([
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "Hm", "refusal": None, "audio": None},
        {"role": "tool", "tool_call_id": "c", "name": "another", "content": [{"type": "text", "text": "3"}]},
        {"role": "assistant", "content": "3", "tool_calls": None},
    ])  # fmt: skip
    found = conversation(messages)
    assert found[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert found[1]["reasoning_content"] == "Hm"
    assert (found[2]["name"], found[2]["content"]) == ("add", "3")


@pytest.mark.parametrize(
    "message",
    [
        3, {"role": "assistant", "tool_calls": 3}, {"role": "assistant", "tool_calls": [3]},
        {"role": "assistant", "function_call": {"name": "add", "arguments": "{}"}},
    ],
)  # fmt: skip
def test_a_message_that_cannot_be_read_is_refused(message: Any) -> None:
    with pytest.raises(ApiError) as error:
        chat_messages([message])
    assert error.value.param is not None and error.value.param.startswith("messages[0]")


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": {**ADD, "description": None, "unknown": 1}, "unknown": 1},
        {"type": "function", **ADD, "strict": None},
        {"name": "add", "input_schema": ADD["parameters"], "cache_control": {"type": "ephemeral"}},
        {"type": "custom", "name": "add", "input_schema": ADD["parameters"]},
    ],
)
def test_the_forms_of_all_protocols_are_one_tool(tool: dict[str, Any]) -> None:
    offer = offered([tool])
    assert declarations(offer.tools)[0]["function"]["name"] == "add"
    assert offer.remarks() == []


def test_namespaces_are_flattened_and_what_only_others_can_run_is_left_out() -> None:
    space = {"type": "namespace", "name": "files", "tools": [{"type": "function", **ADD}]}
    offer = offered([{"type": "function", **ADD}, space, {"type": "web_search"}, {"type": "web_search"}])
    assert [tool["function"]["name"] for tool in declarations(offer.tools)] == ["add", "files__add"]
    assert offer.namespaces == {"files__add": ("files", "add")}
    assert offer.skipped == ("web_search",) and len(offer.remarks()) == 1


@pytest.mark.parametrize("tools", [None, [], [{"type": "web_search"}]])
def test_without_a_tool_there_is_nothing_to_choose(tools: Any) -> None:
    offer = offered(tools, "auto")
    assert (offer.tools, offer.choice) == (None, None)


def test_arguments_are_held_to_parameters_where_these_are_supported() -> None:
    offer = offered([ADD, {**ADD, "name": "b", "strict": False}, ODD])
    assert offer.tools is not None
    assert [tool["strict"] for tool in offer.tools if isinstance(tool, dict)] == [True, True, False]
    assert "'odd'" in offer.remarks()[0]
    assert "strict" not in ODD  # the request is left alone
    assert offered([{**ODD, "strict": True}]).free == {}  # an error when it is compiled


NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, None), ("auto", "auto"), ("none", "none"), ("required", "required"), ("any", "required"),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto"), ({"type": "any"}, "required"),
        (NAMED, NAMED), ({"type": "function", "name": "add"}, NAMED), ({"type": "tool", "name": "add"}, NAMED),
    ],
)  # fmt: skip
def test_choices_of_all_protocols(choice: Any, expected: Any) -> None:
    assert offered([ADD], choice).choice == expected


@pytest.mark.parametrize("nested", [True, False])
def test_a_choice_may_allow_some_of_the_tools(nested: bool) -> None:
    inner = {"mode": "required", "tools": [NAMED if nested else {"type": "function", "name": "add"}]}
    choice = {"type": "allowed_tools", **({"allowed_tools": inner} if nested else inner)}
    offer = offered([ADD, {**ADD, "name": "b"}], choice)
    assert offer.tools is not None and len(offer.tools) == 1 and offer.choice == "required"


@pytest.mark.parametrize("choice", [{"type": "grammar"}, {}, {"type": []}])
def test_another_choice_is_refused(choice: Any) -> None:
    with pytest.raises(ApiError):
        offered([ADD], choice)


@pytest.mark.parametrize("tool", [3, {"type": "function"}, {"name": 3}, {"type": "namespace", "name": "a", "tools": 3}])
def test_a_tool_that_cannot_be_read_is_refused(tool: Any) -> None:
    with pytest.raises(ApiError) as error:
        offered([tool])
    assert error.value.param == "tools"
