"""Tools in the Python API: what the prompt holds, how an answer begins, and the way from a call to the next prompt."""

from __future__ import annotations

import re
from copy import copy
from dataclasses import replace
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from dgemma_mlx import DgemmaError, Model, generate, generate_batch, load
from dgemma_mlx.constrain.constraint import Constraint
from dgemma_mlx.events import Done, Statistics
from dgemma_mlx.generation.options import GenerationOptions
from dgemma_mlx.text import parse_parts
from dgemma_mlx.text.tools import signatures

ADD = {"name": "add", "description": "Sum", "parameters": {"properties": {"a": {"type": "integer"}}}}
CLOCK = {"name": "clock"}
USER = {"role": "user", "content": "Sort 7 3 5"}
BY_NAME = {"type": "function", "function": {"name": "add"}}


@pytest.fixture(scope="module")
def demo() -> Model:
    return load("demo")


def clock(zone: str = "UTC") -> str:
    """The time."""
    return zone


def prompt(model: Model, messages: Any = "Sort 7 3 5", **options: Any) -> str:
    return model.tokenizer.decode(model.encode_prompt(messages, **options), keep_special=True)


def answered(model: Model, text: str) -> Done:
    """Return the answer that has these ids, as ``generate`` would."""
    ids = tuple(model.tokenizer.encode_control(text))
    parts = parse_parts(model.tokenizer, ids)
    statistics = Statistics(1, 0, len(ids), 1, 1, 1.0, 0.0, 1.0, 1.0, 0)
    return Done(parts.text, parts.thinking, parts.tool_calls, ids, "stop", 0, statistics)


def test_tools_are_declared_in_the_prompt_unless_none_may_be_called(demo: Model) -> None:
    plain, offered = prompt(demo), prompt(demo, tools=[ADD, clock])
    assert "<|tool>declaration:add{" in offered and "<|tool>declaration:clock{" in offered
    assert prompt(demo, tools=[ADD], tool_choice="none") == prompt(demo, tools=[]) == plain
    for choice in ("auto", "required", "add", BY_NAME):
        assert prompt(demo, tools=[ADD], tool_choice=choice) == prompt(demo, tools=[ADD])


def test_the_way_from_a_call_to_the_answer(demo: Model) -> None:
    """Calls, their results and the answer go into one turn of the model, which the next prompt continues."""
    call = '<|tool_call>call:add{a:2,b:[<|"|>x<|"|>]}<tool_call|>'
    first = answered(demo, f"<|channel>thought\nHm\n<channel|>Wait.{call}{call}<|tool_response>")
    assert not first.is_blank and not answered(demo, call).is_blank
    message = first.message()
    assert message["reasoning_content"] == "Hm" and [call["name"] for call in message["tool_calls"]] == ["add"] * 2
    ids = [str(call["id"]) for call in message["tool_calls"] if call.get("id")] or ["call_0", "call_1"]
    results = [{"role": "tool", "tool_call_id": ids[0], "content": {"sum": 7}},
               {"role": "tool", "tool_call_id": ids[1], "content": [1, True]}]  # fmt: skip
    conversation: list[Any] = [USER, message, *results]
    turn = (
        f"<|turn>model\nWait.{call}{call}<|tool_response>response:add{{sum:7}}<tool_response|>"
        "<|tool_response>response:add{value:[1,true]}<tool_response|>"
    )
    assert prompt(demo, conversation, tools=[ADD]).endswith(turn)
    last = answered(demo, "It is 7.<turn|>")
    assert last.message() == {"role": "assistant", "content": "It is 7."}
    assert prompt(demo, [*conversation, last.message(), USER], tools=[ADD]).endswith(
        f"{turn}It is 7.<turn|>\n<|turn>user\nSort 7 3 5<turn|>\n<|turn>model\n"
    )


def test_a_prompt_without_tools_is_what_it_was(demo: Model) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "3 5 7"}, USER]
    assert prompt(demo, messages) == (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nSort 7 3 5<turn|>\n<|turn>model\n3 5 7<turn|>\n"
        "<|turn>user\nSort 7 3 5<turn|>\n<|turn>model\n"
    )


def quick(model: Model) -> Any:
    """Parameters for canvases that nobody waits for."""
    return model.generation.override(max_denoising_steps=2)


def test_answers_with_tools_alone_and_in_a_batch(demo: Model) -> None:
    """Those that are held to different tools do not disturb each other."""
    settings: Any = {"max_tokens": 48, "generation": quick(demo)}
    cases: list[Any] = [([ADD], "none"), ([clock], None), ([ADD], "add"), ([ADD], "none"), ([ADD, clock], "add")]
    alone = [
        generate(demo, "Sort 7 3 5", seed=1, tools=tools, tool_choice=choice, **settings) for tools, choice in cases
    ]
    offers, choices = zip(*cases, strict=True)
    together = generate_batch(demo, ["Sort 7 3 5"] * 5, seeds=[1] * 5, tools=offers, tool_choice=choices, **settings)
    assert [done.tokens for done in alone] == [done.tokens for done in together]
    assert alone[0].text == "3 5 7"
    assert [call.name for call in alone[2].tool_calls] == ["add"] * len(alone[2].tool_calls) and alone[2].tool_calls


@pytest.mark.parametrize("thinking", [False, True])
def test_a_required_call_is_made_and_its_arguments_validate(demo: Model, thinking: bool) -> None:
    """The demo has learned no calls: without the constraint it makes none."""
    name = {"type": "object", "properties": {"first": {"type": "string", "maxLength": 6}}, "required": ["first"]}
    greet = {"name": "greet", "parameters": {
        "properties": {"who": name, "times": {"type": "integer", "minimum": 3, "maximum": 12},
                       "how": {"type": "array", "items": {"enum": ["loud", "slow"]}, "minItems": 1}},
        "required": ["who", "times", "how"],
    }}  # fmt: skip
    done = generate(
        demo, "Sort 7 3 5", tools=[ADD, greet], tool_choice="greet", seed=0, thinking=thinking, max_tokens=64,
        generation=quick(demo),
    )  # fmt: skip
    assert done.finish_reason == "tool_calls" and done.tool_calls and done.text == ""
    for call in done.tool_calls:
        assert call.name == "greet"
        Draft202012Validator(signatures([greet])[0].schema).validate(call.arguments)


def test_an_answer_that_may_call_is_blank_or_cut_off_as_one_without_tools(demo: Model) -> None:
    """With strict false nothing is held; otherwise the answer alone is as free as that."""
    options: Any = {"seed": 1, "max_tokens": 4, "generation": quick(demo)}
    messages: Any = [{"role": "user", "content": "Count from 13 to 40."}]
    free, held = GenerationOptions(), GenerationOptions().held(demo, [ADD], "auto", False)
    assert free.held(demo, [{**ADD, "strict": False}], "auto", False) is None
    assert free.held(demo, [ADD], "none", False) is None and free.held(demo, None, None, True) is None
    assert held is not None and held.is_free
    assert not free.held(demo, [{**ADD, "strict": False}], "required", False).is_free  # type: ignore[union-attr]
    assert generate(demo, messages, tools=[ADD], **options).finish_reason in ("length", "stop")


def test_a_constraint_and_tools_go_together(demo: Model) -> None:
    options: Any = {"constraint": Constraint.regex("[0-9]( [0-9]){2}"), "max_tokens": 40, "generation": quick(demo)}
    for seed in range(2):
        done = generate(demo, "Sort 7 3 5", tools=[clock], seed=seed, **options)
        if done.tool_calls:
            assert done.text == "" and {call.name for call in done.tool_calls} == {"clock"}
        else:
            assert re.fullmatch("[0-9]( [0-9]){2}", done.text)


def test_a_call_cannot_be_required_of_a_tokenizer_without_calls(demo: Model) -> None:
    special = {name: id for name, id in demo.tokenizer.special_ids.items() if name != "<|tool_call>"}
    tokenizer = copy(demo.tokenizer)
    tokenizer.special_ids = special
    model = replace(demo, tokenizer=tokenizer)
    assert GenerationOptions().held(model, [ADD], "auto", False) is None
    with pytest.raises(DgemmaError, match=r"has no <\|tool_call>") as error:
        GenerationOptions().held(model, [ADD], "required", False)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"constraint": "[a-z]+"}, r"not a constraint: '\[a-z\]\+'"),
        ({"tools": [ADD], "raw": True}, "a raw prompt is one text"),
        ({"tool_choice": "auto", "raw": True}, "a raw prompt is one text"),
        ({"tools": [{"name": "f", "parameters": {"properties": {"a": {"pattern": "(?<=b)a"}}}}]}, "tool f: the JSON s"),
        ({"tools": [ADD], "tool_choice": "clock"}, "tool_choice names 'clock', which no tool has"),
        ({"tools": [ADD], "tool_choice": "required", "constraint": Constraint.choice(["a"])}, "excludes a constraint"),
        ({"tool_choice": "required"}, "there are no tools"), ({"tools": ADD}, "tools must be a list"),
        ({"tools": [ADD, ADD]}, "two tools have the name 'add'"),
    ],
)  # fmt: skip
def test_what_excludes_each_other_is_refused_at_once(demo: Model, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DgemmaError, match=words) as error:
        generate(demo, "Sort 7 3 5", **options)
    assert error.value.exit_code == 2 and error.value.hint
    batched = {**options, "tools": [options["tools"]]} if isinstance(options.get("tools"), list) else options
    with pytest.raises(DgemmaError, match=words):
        generate_batch(demo, ["Sort 7 3 5"], **batched)


def test_a_response_format_of_text_excludes_neither_tools_nor_thinking(demo: Model) -> None:
    text = {"type": "text"}
    options: dict[str, Any] = {"tools": [ADD], "seed": 1, "max_tokens": 32}
    done = generate(demo, "Sort 7 3 5", response_format=text, **options)
    assert done.tokens == generate(demo, "Sort 7 3 5", **options).tokens
    generate(demo, "Sort 7 3 5", response_format=text, thinking=True, seed=1, max_tokens=32)


def test_an_error_names_the_prompt_of_a_batch(demo: Model) -> None:
    with pytest.raises(DgemmaError, match=r"prompt 2: message 1: no earlier call has the id 'x'"):
        generate_batch(demo, ["Sort 7 3 5", [{"role": "tool", "tool_call_id": "x", "content": 1}]])
    with pytest.raises(DgemmaError, match=r"prompt 2: tool_choice names 'sub', which no tool has") as error:
        generate_batch(demo, ["Sort 7 3 5"] * 2, tools=[ADD], tool_choice=[None, "sub"])
    assert error.value.exit_code == 2 and "add" in error.value.hint


def test_lists_of_tools_are_one_for_each_prompt(demo: Model) -> None:
    for options in ({"tools": [[ADD], None]}, {"tool_choice": ["auto", "none"]}):
        with pytest.raises(DgemmaError, match="must be one for each of 1 prompts, not 2"):
            generate_batch(demo, ["Sort 7 3 5"], **options)  # type: ignore[arg-type]
