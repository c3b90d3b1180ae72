"""Tools, calls and results in the published chat template, and functions as tools, compared with transformers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest

from dgemma_mlx.text import ChatTemplate, Tokenizer, encode_chat
from dgemma_mlx.text.functions import declare_function

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": 'A "city" <b>'},
        "unit": {"type": "string", "enum": ["C", "F"], "nullable": True},
        "days": {"type": "array", "items": {"type": "integer"}, "description": "Days"},
        "at": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
        "legs": {
            "type": "array", "items": {"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]},
        },
    },
    "required": ["city"],
}  # fmt: skip
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time", "parameters": {}}}
TOOLS = [
    None,
    [{"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": WEATHER}}],
    [CLOCK, {"type": "function", "function": {"name": "f-1.x", "description": "", "parameters": {"type": "object"}}}],
]
USER = [{"role": "user", "content": " What is the weather? <b>\n"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "b\n\n"}]}]
OPENINGS = [
    USER, PARTS, [{"role": "system", "content": " Be brief. "}, *USER], [{"role": "developer", "content": "x"}, *PARTS],
    [{"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind"}]}, *USER],
    [*USER, {"role": "assistant", "content": "<|channel>thought\nHm.<channel|>Which city?"}, *PARTS],
]  # fmt: skip
ARGUMENTS = {"city": "Zürich", "days": [1, 2.5], "at": {"lat": None, "ok": True}, "x": "", "B": False}
ONE = [{"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}]
TWO = [*ONE, {"id": "b", "type": "function", "function": {"name": "clock", "arguments": {}}}]
RESULTS = {
    "none": (ONE, []),
    "text": (ONE, [{"role": "tool", "tool_call_id": "a", "content": " 21 °C\n"}]),
    "json": (ONE, [{"role": "tool", "tool_call_id": "a", "content": '{"celsius": 21}'}]),
    "number": (ONE, [{"role": "tool", "tool_call_id": "a", "content": 21}]),
    "true": (ONE, [{"role": "tool", "tool_call_id": "a", "content": True}]),
    "parts": (ONE, [{"role": "tool", "tool_call_id": "a", "content": PARTS[0]["content"]}]),
    "named": (ONE, [{"role": "tool", "tool_call_id": "a", "name": "get_weather", "content": "x"}]),
    "two": (TWO, [{"role": "tool", "tool_call_id": id, "content": id} for id in "ba"]),
}
SAID = [{}, {"reasoning": "I need\nit."}, {"reasoning_content": "Hm", "content": "Let me see."}, {"content": ""}]
ENDINGS = [[], [{"role": "assistant", "content": "It is <b>warm</b>."}],
           [{"role": "assistant", "content": "Warm."}, *USER]]  # fmt: skip


@pytest.fixture(scope="module")
def reference(gemma4_folder: Path) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(gemma4_folder / "tokenizer.json"), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        chat_template=(gemma4_folder / "chat_template.jinja").read_text(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def template(gemma4_folder: Path) -> ChatTemplate:
    return ChatTemplate.load(gemma4_folder)


def conversations() -> Iterator[list[dict[str, Any]]]:
    """Yield conversations without calls, then with every kind of call, result and ending."""
    yield from OPENINGS
    for opening, (calls, results), said, ending in itertools.product(OPENINGS, RESULTS.values(), SAID, ENDINGS):
        if results or not ending:
            yield [*opening, {"role": "assistant", "content": None, **said, "tool_calls": calls}, *results, *ending]


def test_text_and_ids_with_the_published_template(gemma4: Tokenizer, template: ChatTemplate, reference: Any) -> None:
    compared = 0
    for number, messages in enumerate(conversations()):
        for tools, thinking in itertools.product(TOOLS, [False, True]):
            if (number + thinking + TOOLS.index(tools)) % 2 and number >= len(OPENINGS):
                continue  # half of the combinations are enough
            options: dict[str, Any] = {"tools": tools, "enable_thinking": thinking}
            text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
            assert template.render(messages, **options) == text
            if number % 7 == 0 or number < len(OPENINGS):
                ids = reference.apply_chat_template(messages, return_dict=False, add_generation_prompt=True, **options)
                assert encode_chat(gemma4, template, messages, **options) == ids
            compared += 1
    assert compared > 1000


def test_other_spellings_are_rendered_as_openais_objects_are(template: ChatTemplate, reference: Any) -> None:
    result = {"role": "tool", "tool_call_id": "a", "content": "x"}
    text = reference.apply_chat_template(
        [*USER, {"role": "assistant", "tool_calls": ONE}, result], tools=TOOLS[1], tokenize=False
    )
    flat = {"name": "get_weather", "arguments": ARGUMENTS, "id": "a"}
    as_text = {"id": "a", "function": {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)}}
    bare = {"name": "get_weather", "description": "Weather", "input_schema": WEATHER}
    for call in (flat, as_text, {**flat, "id": None}):
        said = {"role": "model", "tool_calls": [call]}
        unnamed = {"role": "tool", "content": "x"}
        for answer in (result, unnamed, {**unnamed, "name": "get_weather"}):
            if "tool_call_id" in answer and call.get("id") is None:
                continue
            assert template.render([*USER, said, answer], tools=[bare], add_generation_prompt=False) == text


def test_objects_as_results_are_rendered_as_tool_responses_are(template: ChatTemplate, reference: Any) -> None:
    values: list[Any] = [{"b": 1, "a": [{"x": "<b>"}, None, True]}, {}, {"value": [1, "two"]}]
    for value in values:
        said = {"role": "assistant", "tool_calls": ONE}
        response = {"name": "get_weather", "response": value}
        text = reference.apply_chat_template(
            [*USER, {**said, "tool_responses": [response]}], tokenize=False, add_generation_prompt=True
        )
        results = [value, [1, "two"]] if "value" in value else [value]
        for content in results:
            answer = {"role": "tool", "tool_call_id": "a", "content": content}
            assert template.render([*USER, said, answer]) == text


class Unit(Enum):
    CELSIUS = "C"
    KELVIN = "K"


class Level(Enum):
    LOW = 1
    HIGH = 2.5


def basic(city: str, days: int, share: float, dry: bool = False, note: str = "a") -> str:
    """Weather of a city.

    It takes several
    lines.

    Args:
        city: The city,
            with its country
        days (int): How many days: at most 7
        share: A share
        dry: Whether it is dry
        note: A note (choices: ["a", "b "])

    Returns:
        What it is like.

    Raises:
        ValueError: Never.
    """
    return city


def nested(
    names: list[str], table: dict[str, int], pair: tuple[int, str], rows: list[dict[str, list[float]]], any: Any,
    plain: list, bare: dict, other: tuple, nothing: None,
) -> dict[str, int]:  # fmt: skip
    """Nested types.

    Args:
        names: Names
        table: Table
        pair: Pair
        rows: Rows
        any: Anything
        plain: List
        bare: Dict
        other: Tuple
        nothing: None
    """
    return table


def unions(
    a: int | None, b: Optional[str], c: Union[int, str], d: int | str | None, e: Literal["x", "y"],  # noqa: UP007, UP045
    f: Literal[1, "a", None], g: Unit, h: Unit | None = None, i: list[int] | str = "",
    j: Optional[list[Unit]] = None, k: Level = Level.LOW,  # noqa: UP045
) -> None:  # fmt: skip
    """Unions.

    Args:
        a: A
        b: B
        c: C
        d: D
        e: E
        f: F
        g: G
        h: H
        i: I
        j: J
        k: K
    """


def no_parameters() -> object:
    """Do it.  """
    return None


class Holder:
    def method(self, city: str) -> int:
        """Weather.

        Args:
            city: The city
        """
        return 1


@pytest.mark.parametrize("function", [basic, nested, unions, no_parameters, Holder().method, Holder.method])
def test_functions_are_declared_as_in_transformers(
    function: Callable[..., Any], template: ChatTemplate, reference: Any
) -> None:
    expected = transformers.utils.get_json_schema(function)
    assert json.dumps(declare_function(function)) == json.dumps(expected)
    if function in (basic, no_parameters, Holder.method):
        text = reference.apply_chat_template(USER, tools=[function], tokenize=False, add_generation_prompt=True)
        assert template.render(USER, tools=[function]) == text
