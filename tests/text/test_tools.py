"""Declarations of tools: every usual form becomes one, and what a template would lose is said or refused."""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal

import pytest

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.text import PartsParser, Tokenizer
from dgemma_mlx.text.functions import declare_function
from dgemma_mlx.text.parameters import object_schema
from dgemma_mlx.text.tools import call_text, chosen, declarations, signatures

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": SCHEMA}}
NODE = {"type": "object", "description": "A node", "properties": {"next": {"$ref": "#/$defs/Node"}}}


class Unit(Enum):
    CELSIUS = "C"
    KELVIN = "K"


def weather(city: str, unit: Unit = Unit.CELSIUS, *, days: int | None = None, sky: Literal["blue"] = "blue") -> str:
    return city


@pytest.mark.parametrize(
    "tool",
    [
        WEATHER, WEATHER["function"], {**WEATHER["function"], "type": "function", "strict": False},
        {"name": "weather", "description": "Weather", "input_schema": SCHEMA, "type": "custom"},
    ],
)  # fmt: skip
def test_a_declaration_has_one_form(tool: Any) -> None:
    assert declarations([tool]) == [WEATHER]
    assert declarations(declarations([tool])) == [WEATHER]


def test_a_function_without_a_docstring_is_declared() -> None:
    properties = {
        "city": {"type": "string"}, "unit": {"type": "string", "enum": ["C", "K"]},
        "days": {"type": "integer", "nullable": True}, "sky": {"type": "string", "enum": ["blue"]},
    }  # fmt: skip
    assert declare_function(weather)["function"] == {
        "name": "weather", "description": "", "return": {"type": "string"},
        "parameters": {"type": "object", "properties": properties, "required": ["city"]},
    }  # fmt: skip
    assert declarations([weather, {"name": "f"}])[1]["function"] == {"name": "f", "description": ""}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({}, {"type": "any"}), (True, {"type": "any"}),
        ({"type": ["string", "null"]}, {"type": "string", "nullable": True}),
        ({"anyOf": [{"type": "null"}]}, {"anyOf": [{"type": "null"}], "type": "null", "nullable": True}),
        ({"type": ["string", "integer"]}, {"type": "string or integer"}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}], "description": "d"},
         {"type": "string", "description": "d", "nullable": True}),
        ({"enum": ["a", None]}, {"enum": ["a"], "nullable": True, "type": "string"}),
        ({"enum": [1, 2], "description": "N."}, {"enum": [1, 2], "description": "N. One of: 1, 2.", "type": "integer"}),
        ({"properties": {"b": {}}}, {"properties": {"b": {"type": "any"}}, "type": "object"}),
        ({"type": "object", "additionalProperties": {"type": "string"}},
         {"type": "object", "additionalProperties": {"type": "string"}, "properties": {},
          "description": 'Each value: {"type": "string"}'}),
        ({"items": {"properties": {"b": {}}}},
         {"items": {"properties": {"b": {"type": "any"}}, "type": "object"}, "type": "array"}),
        ({"type": "array", "prefixItems": [{"type": "string"}]},
         {"type": "array", "prefixItems": [{"type": "string"}],
          "description": 'Items in this order: [{"type": "string"}]'}),
        ({"$ref": "#/$defs/Node", "description": "Mine"},
         {**NODE, "description": "Mine",
          "properties": {"next": {"type": "object", "description": "The same form as Node."}}}),
    ],
)  # fmt: skip
def test_parameters_get_one_type_and_lose_nothing(schema: Any, expected: Any) -> None:
    found = object_schema({"type": "object", "properties": {"a": schema}, "$defs": {"Node": NODE}}, "t")
    assert found["properties"]["a"] == expected
    assert object_schema(found, "t") == found


def test_alternatives_are_told_in_the_description() -> None:
    options = [{"$ref": "#/$defs/names"}, {"type": "integer"}]
    names = {"type": "array", "items": {"type": "string"}}
    schema = object_schema({"properties": {"a": {"anyOf": options}}, "$defs": {"names": names}}, "t")
    assert object_schema(schema, "t") == schema
    (found,) = schema["properties"].values()
    assert found["type"] == "array or integer"
    assert found["description"] == 'One of: {"type": "array", "items": {"type": "string"}}; {"type": "integer"}.'


GROWING = {f"d{n}": {"properties": {key: {"$ref": f"#/$defs/d{n + 1}"} for key in "xy"}} for n in range(30)}


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ({"name": "f"}, "tools must be a list"), ("f", "tools must be a list"),
        (["f"], "neither a declaration nor a function"),
        ([{"name": "a b"}], "tool 1: 'a b' cannot be its name"), ([{"description": "x"}], "it has no name"),
        ([{"name": "f", "shape": 1}], "tool 1: 'shape' is not read"), ([{"function": 5}], "function must be an object"),
        ([{"type": "web_search", "name": "f"}], "the type 'web_search' is not known"),
        ([{"type": "function", "function": {"name": "f"}, "extra": 1}], "'extra' is not read"),
        ([WEATHER, WEATHER], "two tools have the name 'weather'"),
        ([{"name": "f", "strict": "yes"}], "tool f: strict must be true or false, not 'yes'"),
        ([{"name": "f", "description": 5}], "tool f: description must be a text"),
        ([{"name": "f", "parameters": {}, "input_schema": {}}], "it has parameters and input_schema"),
        ([{"name": "f", "parameters": [1]}], "parameters must be an object"),
        ([{"name": "f", "parameters": {"type": "string"}}], "the type of its parameters is 'string', not object"),
        ([{"name": "f", "parameters": {"anyOf": [{}]}}], "its parameters have anyOf"),
        ([{"name": "f", "parameters": {"properties": {"a": 5}}}], "a schema is 5"),
        ([{"name": "f", "parameters": {"properties": {"a": {"type": 5}}}}], "a type is 5"),
        ([{"name": "f", "parameters": {"properties": {"a": {"type": "array", "items": {"type": 5}}}}}], "a type is 5"),
        ([{"name": "f", "parameters": {"properties": {"a": {"$ref": "http://x"}}}}], "leaves the parameters"),
        ([{"name": "f", "parameters": {"properties": {"a": {"$ref": "#/b"}}}}], "'#/b' leads nowhere"),
        ([{"name": "f", "parameters": {"required": "a"}}], "required must be a list of names"),
        ([{"name": "f", "parameters": {"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": {**GROWING, "d30": {}}}}],
         "more than 10,000 schemas"),
        ([{"name": "f", "response": {"type": "string"}}], "tool f, response: the type"),
        ([{"name": "f", "return": {1, 2}}], "is not a JSON value"),
    ],
)  # fmt: skip
def test_bad_declarations_are_one_clear_error(tools: Any, words: str) -> None:
    with pytest.raises(DgemmaError) as error:
        declarations(tools)
    assert words in error.value.message and error.value.exit_code == 2 and error.value.hint


def test_one_tool_that_is_not_in_a_list() -> None:
    for tool in (WEATHER, {"type": "function", "function": WEATHER}, of_any_length):
        with pytest.raises(DgemmaError, match="tools must be a list of tools") as error:
            declarations(tool)  # type: ignore[arg-type]
        assert error.value.hint == "Put it into a list: [tool]."


def no_hint(city) -> str: ...  # type: ignore[no-untyped-def, empty-body]
def many(*cities: str) -> None: ...
def named(**cities: str) -> None: ...
def in_place(city: str, /) -> None: ...
def own_class(city: WeatherStation) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def of_any_length(cities: tuple[str, ...]) -> None: ...
def of_a_set(cities: set[str]) -> None: ...


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (no_hint, "no_hint: the parameter city has no type hint"), (many, "the parameter *cities has no fixed name"),
        (named, "**cities has no fixed name"), (in_place, "the parameter city cannot be passed by name"),
        (own_class, "its type hints cannot be read"), (of_any_length, "tuple[str, ...] cannot be described"),
        (of_a_set, "set[str] cannot be described"), (lambda: None, "'<lambda>' cannot be its name"),
    ],
)  # fmt: skip
def test_functions_that_cannot_be_described(function: Any, words: str) -> None:
    with pytest.raises(DgemmaError) as error:
        declarations([function])
    assert words in error.value.message
    assert error.value.exit_code == 2 and error.value.hint


def test_the_choice_among_tools() -> None:
    tools, both = declarations([WEATHER, {"name": "required"}]), ("weather", "required")
    assert [chosen(tools, choice) for choice in (None, "auto", "none", "required")] == [
        (both, False), (both, False), ((), False), (both, True)
    ]  # fmt: skip
    by_name = {"type": "function", "function": {"name": "weather"}}
    assert chosen(tools, "weather") == chosen(tools, by_name) == (("weather",), True)
    assert chosen(tools, {"type": "function", "function": {"name": "required"}}) == (("required",), True)
    assert chosen([], "none") == chosen([], "auto") == ((), False)
    for choice, offered, words in (
        ("required", [], "there are no tools"), ("clock", tools, "names 'clock', which no tool has"),
        (5, tools, "not a tool"),
        ({"type": "function"}, tools, "not a tool_choice"), ({**by_name, "x": 1}, tools, "not a tool_choice"),
        ({"type": "function", "function": {"name": 5}}, tools, "not a tool_choice"),
    ):  # fmt: skip
        with pytest.raises(DgemmaError, match=words) as error:
            chosen(offered, choice)  # type: ignore[arg-type]
        assert error.value.exit_code == 2 and error.value.hint


def test_a_parser_that_reads_no_calls(gemma: Tokenizer) -> None:
    parser = PartsParser(gemma, reads_calls=False)
    parts = parser.feed(gemma.encode_control(call_text("weather", {"city": "Rome"}))) + parser.finish()
    assert (parts.tool_calls, parts.text) == ((), 'call:weather{city:"Rome"}')


def test_signatures_close_the_parameters_unless_they_speak_of_other_names() -> None:
    def schema(parameters: Any, **keys: Any) -> dict[str, Any]:
        [(name, found, is_strict)] = signatures([{"name": "f", "parameters": parameters, **keys}])
        assert name == "f" and is_strict == (keys.get("strict") is not False)
        return found

    closed = {"type": "object", "additionalProperties": False}
    assert schema(None) == schema({}) == schema({"type": "object"}) == schema({"type": ["object", "null"]}) == closed
    one = {"properties": {"a": {"type": "string"}}}
    assert schema(one) == schema(one, strict=True) == {**closed, **one}
    assert schema({"allOf": [one]}) == {"type": "object", "allOf": [one], "unevaluatedProperties": False}
    open_ones = ({**one, "additionalProperties": True}, {"patternProperties": {}}, {**one, "required": ["a", "b"]})
    for parameters in open_ones:
        assert schema(parameters) == {"type": "object", **parameters}
    assert schema(one, strict=False) == {"type": "object"}
    loud = {"type": "OBJECT", "properties": {"type": {"type": "STRING", "enum": ["A"], "default": {"type": "X"}}}}
    quiet = {"properties": {"type": {"type": "string", "enum": ["A"], "default": {"type": "X"}}}}
    assert schema(loud) == {**closed, **quiet}


def test_signatures_have_the_whole_schema_and_not_what_a_template_shows() -> None:
    limits = {"type": "integer", "minimum": 1, "maximum": 7}
    tools: list[Any] = [
        {"type": "function", "function": {"name": "a", "parameters": {"properties": {"days": limits}}}},
        {"name": "b", "input_schema": {"properties": {"x": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"const": 5}}}},
        has_a_default,
    ]
    first, second, third = (each.schema for each in signatures(tools))
    assert first["properties"]["days"] == limits
    assert second["properties"]["x"] == {"$ref": "#/$defs/x"} and second["$defs"]["x"] == {"const": 5}
    assert third["properties"] == {"city": {"type": "string"}, "days": {"type": "integer"}}
    assert third["required"] == ["city"] and third["additionalProperties"] is False
    assert signatures(None) == signatures([]) == []


def has_a_default(city: str, days: int = 1) -> None: ...


def test_calls_are_written_as_they_are_read(gemma: Tokenizer) -> None:
    arguments = {"city": 'Zürich "x"', "b": [1, 2.5, True, None, {"c": {}}], "A": False, "e": ""}
    parser = PartsParser(gemma)
    parts = parser.feed(gemma.encode_control(call_text("f", arguments))) + parser.finish()
    assert [(call.name, call.arguments) for call in parts.tool_calls] == [("f", arguments)]
