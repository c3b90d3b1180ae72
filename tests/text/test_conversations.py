"""Conversations from outside: one form for all spellings, and one clear line for what would be lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.text import ChatTemplate, Tokenizer, encode_chat, parse_parts
from dgemma_mlx.text.messages import conversation

USER = {"role": "user", "content": "Weather in Rome?"}
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
SAID = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def result(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "a", "content": content, **keys}


@pytest.mark.parametrize(
    "call",
    [
        CALL, {**CALL, "index": 0}, {"id": "a", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
        {"name": "weather", "arguments": {"city": "Rome"}, "id": "a"},
        {"id": "a", "type": "function", "name": "weather", "arguments": '{"city": "Rome"}'},
    ],
)  # fmt: skip
def test_calls_have_one_form(call: Any) -> None:
    assert conversation([USER, {**SAID, "tool_calls": [call]}])[1] == {"role": "assistant", "tool_calls": [CALL]}


def test_a_tool_call_of_an_answer_is_a_call(gemma: Tokenizer) -> None:
    ids = gemma.encode_control('<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>')
    message = {**SAID, "tool_calls": parse_parts(gemma, ids).tool_calls}
    said, told = conversation([message, {"role": "tool", "content": 1}])
    assert said["tool_calls"] == [{**CALL, "id": told["tool_call_id"]}]


def test_calls_without_an_id_get_one() -> None:
    calls = [{"name": "weather"}, {"name": "clock"}, {"name": "clock", "arguments": ""}]
    said, first, second, third = conversation(
        [{**SAID, "tool_calls": calls}, result("x", tool_call_id=None, name="clock"),
         {"role": "tool", "name": "weather", "content": "y"}, {"role": "tool", "content": "z"}]
    )  # fmt: skip
    ids = [call["id"] for call in said["tool_calls"]]
    assert len(set(ids)) == 3 and all(call["function"]["arguments"] == {} for call in said["tool_calls"])
    assert [answer["tool_call_id"] for answer in (first, second, third)] == [ids[1], ids[0], ids[2]]
    assert [answer["name"] for answer in (first, second, third)] == ["clock", "weather", "clock"]


def test_roles_content_and_thinking_have_one_form() -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a", "annotations": []}], "name": None},
        {"role": "user", "content": [{"text": "b", "type": "text"}], "refusal": None, "audio": []},
        {"role": "model", "content": "c", "reasoning": "hm"},
    ]
    assert conversation(messages) == [
        {"role": "developer", "content": [{"type": "text", "text": "a"}]},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "thinking": "hm", "reasoning_content": "hm", "reasoning": "hm"},
    ]


def test_objects_and_lists_as_results_are_responses_as_well() -> None:
    for content, value in (
        ({"b": 1, 2: None}, {"b": 1, "2": None}), ([1, "x"], {"value": [1, "x"]}), ([], {"value": []}),
        ([{"type": "dog"}], {"value": [{"type": "dog"}]}),
    ):  # fmt: skip
        said, told = conversation([SAID, result(content)])
        assert told["content"] == value
        assert said["tool_responses"] == [{"name": "weather", "response": value}]
    for plain in ("text", 5, 2.5, True, None, [{"type": "text", "text": "a"}]):
        said, told = conversation([SAID, result(plain)])
        assert told["content"] == plain and "tool_responses" not in said


RESPONSE = {"name": "weather", "response": "sunny"}
MEDIA = ("image_url", "input_image", "input_audio", "audio", "file", "document")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        *(([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": kind}]}],
           f"message 1: a part of type '{kind}' cannot be read") for kind in MEDIA),
        ([SAID, result([{"type": "image", "image": "x"}])], "message 2: 'image' is not read in an image part"),
        *(([{"role": "user", "content": [{"type": "image", **part}]}], words) for part, words in (
            ({}, "an image: it has no file"), ({"path": "a", "bytes": b"b"}, "an image: it has path and bytes"),
            ({"path": 5}, "5 is not the path of a file"), ({"path": ""}, "'' is not the path of a file"),
            ({"path": "a\0"}, "is not the path of a file"), ({"bytes": "x"}, "must be bytes, not 'x'"),
            ({"base64": "???"}, "the base64 text of an image is malformed"), ({"base64": b"YQ=="}, "must be a text"),
            ({"path": "a", "budget": 100}, "100 is not the budget of an image"),
            ({"path": "a", "budget": True}, "True is not the budget"), ({"path": "a", "budget": [70]}, "[70] is not"),
            ({"url": "http://a"}, "'url' is not read in an image part"),
        )),
        ([{"role": "user", "content": [{"type": "video", "bytes": b"x"}]}], "'bytes' is not read in a video part"),
        ([{"role": "user", "content": [{"type": "video"}]}], "a video: it has no file"),
        ([{**SAID, "tool_calls": [CALL, {**CALL, "id": "b"}]}, result([{"type": "image", "path": "a"}]),
          result({"x": 1}, tool_call_id="b")], "has an image as a result, and another one an object"),
        ([], "the conversation is empty"), ("hello", "a conversation is a list of messages"),
        (["hello"], "a chat message must be an object"), ([{"content": "x"}], "message 1 has no role"),
        ([{"role": "wizard", "content": "x"}], "message 1 has the unknown role 'wizard'"),
        ([{"role": "user"}], "message 1: it has no content"),
        ([{"role": "user", "content": 5}], "content must be a text"),
        ([{"role": "user", "content": "\ud800"}], "content must be a text"),
        ([{"role": "user", "content": [{"text": "x"}]}], "is not a text part"),
        ([{"role": "user", "content": ["x"]}], "'x' is not a text part"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text must be a text, not None"),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}], "'cache_control' is not"),
        ([{**USER, "name": "Ana"}], "message 1: 'name' is not read"), ([{**USER, "mood": "x"}], "'mood' is not read"),
        ([{**USER, "tool_calls": [CALL]}], "'tool_calls' is not read"), ([USER, {"role": "assistant"}], "no content"),
        ([USER, result("x")], "message 2: no earlier call has the id 'a'"),
        ([SAID, result("x", tool_call_id="b")], "no earlier call has the id 'b'"),
        ([SAID, USER, result("x")], "message 3: the call 'a' is not open"),
        ([SAID, result("x"), result("y")], "message 3: the call 'a' is not open"),
        ([SAID, result("x", name="clock")], "'a' calls 'weather', not 'clock'"),
        ([SAID, {"role": "tool", "name": "clock", "content": "x"}], "no open call of 'clock'"),
        ([USER, {"role": "tool", "content": "x"}], "it is not clear which call it answers"),
        ([{**SAID, "tool_calls": [CALL, {**CALL, "id": "b"}]}, {"role": "tool", "content": 1}], "not clear which call"),
        ([{**SAID, "tool_calls": [CALL, CALL]}], "two of its calls have the same id"),
        ([{"role": "tool", "tool_call_id": "a"}], "no earlier call"), ([SAID, {"role": "tool"}], "it has no content"),
        ([SAID, result({1, 2})], "{1, 2} is not a JSON value"),
        ([SAID, result({"a": b"x"})], "b'x' is not a JSON value"),
        ([SAID, result(float("nan"))], "nan is not a JSON value"),
        ([{**SAID, "tool_calls": [{"name": "a", "arguments": '{"b": 1e999}'}]}], "inf is not a JSON value"),
        ([SAID, result({(1, 2): "x"})], "the key (1, 2) is not a JSON key"),
        ([SAID, result({5: "x", "5": "y"})], "two keys are written '5'"),
        ([{**SAID, "tool_calls": "x"}], "tool_calls must be a list"),
        ([{**SAID, "tool_calls": ["x"]}], "'x' is not a call"),
        ([{**SAID, "tool_calls": [{"name": "a b"}]}], "a call has the name 'a b'"),
        ([{**SAID, "tool_calls": [{"type": "custom", "name": "a"}]}], "a call has the type 'custom'"),
        ([{**SAID, "tool_calls": [{"function": 5}]}], "the function of a call is 5"),
        ([{**SAID, "tool_calls": [{"name": "a", "input": {}}]}], "'input' is not read in a call"),
        ([{**SAID, "tool_calls": [{"name": "a", "arguments": "{"}]}], "call of 'a': its arguments are not JSON"),
        ([{**SAID, "tool_calls": [{"name": "a", "arguments": "[1]"}]}], "its arguments are [1]"),
        ([{**SAID, "tool_responses": [RESPONSE]}, result("x")], "it has tool_responses, and messages of tools follow"),
        ([{**SAID, "tool_responses": RESPONSE}], "tool_responses must be a list"),
        *(([{**SAID, "tool_responses": [wrong]}], "is not a response")
          for wrong in ("x", {}, {"name": "weather"}, {**RESPONSE, "name": None}, {**RESPONSE, "id": "a"})),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_one_clear_error(messages: Any, words: str) -> None:
    with pytest.raises(DgemmaError) as error:
        conversation(messages)
    assert words in error.value.message and error.value.exit_code == 2 and error.value.hint


def test_what_is_nested_without_end_is_an_error() -> None:
    endless: dict[str, Any] = {}
    endless["a"] = endless
    with pytest.raises(DgemmaError, match="message 2: it is nested too deeply"):
        conversation([SAID, result(endless)])


def test_escapes_in_json_arguments_make_no_control_tokens(gemma: Tokenizer, folders: dict[str, Any]) -> None:
    template = ChatTemplate.load(folders["json"])

    def controls(text: str) -> list[int]:
        arguments = json.dumps({"city": text}).replace("<", "\\u003c")
        call = {"id": "a", "name": "weather", "arguments": arguments}
        messages = [USER, {**SAID, "tool_calls": [call]}, result(text)]
        return [id for id in encode_chat(gemma, template, messages) if gemma.is_control(id)]

    assert controls("<|turn><turn|><|tool_call>") == controls("Rome")


PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def test_what_a_template_leaves_out_is_refused(gemma: Tokenizer) -> None:
    told = [USER, SAID, result("x")]
    loop = "{% for m in messages if m.role != 'tool' %}{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    for source, messages, tools, words in (
        (PLAIN, [USER], [{"name": "weather"}], "leaves out the tools"), (PLAIN, told, [], "leaves out the tool calls"),
        (loop, told, [], "leaves out the results of tool calls"),
        (loop, [USER, {"role": "tool", "name": "f", "content": "x"}], [], "leaves out the tool messages"),
    ):
        template = ChatTemplate({"default": source}, {}, "test")
        with pytest.raises(DgemmaError, match=words) as error:
            encode_chat(gemma, template, messages, tools=tools)
        assert error.value.exit_code == 2
    whole = ChatTemplate({"default": loop.replace(" if m.role != 'tool'", "")}, {}, "test")
    assert gemma.decode(encode_chat(gemma, whole, told)).endswith("x")


def test_images_keep_their_files_in_one_form() -> None:
    parts = [{"type": "image", "path": Path("a.png"), "budget": 70}, {"type": "image", "bytes": bytearray(b"ab")},
             {"type": "image", "base64": "YWI="}, {"type": "video", "path": "b.mp4"},
             {"type": "text", "text": "c"}]  # fmt: skip
    [message] = conversation([{"role": "user", "content": parts}])
    assert message["content"] == [
        {"type": "image", "path": "a.png", "budget": 70}, {"type": "image", "bytes": b"ab"},
        {"type": "image", "bytes": b"ab"}, {"type": "video", "path": "b.mp4"}, {"type": "text", "text": "c"},
    ]  # fmt: skip
