"""Tools that a model may call: their declarations in the form that chat templates read, and the choice among them.

A tool is declared in OpenAI's form, as the inner object alone, in Anthropic's form, or by a Python function. Gemma's
template shows the name, the description and, of each parameter, the description, type, string enum, items, properties,
required names and nullable. It needs a type that is one word. ``declarations`` brings other schemas into this form, and
adds to a parameter's description what the template would lose. Schemas that have this form already stay the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.text.functions import declare_function
from dgemma_mlx.text.messages import json_data
from dgemma_mlx.text.parameters import closed_schema, object_schema

# A declaration, or a function with type hints.
Tool = Mapping[str, Any] | Callable[..., Any]

# "none", "auto", "required", the name of a tool, or {"type": "function", "function": {"name": ...}}.
ToolChoice = str | Mapping[str, Any]

_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # a template writes it bare
_OUTER = ("type", "function")
_INNER = ("name", "description", "parameters", "input_schema", "response", "return", "strict")
_EXAMPLE = 'Declare a tool as {"name": "...", "description": "...", "parameters": {"type": "object", ...}}.'
_CHOICES = "Use auto, none, required, or the name of a tool."
OPEN_CALL, CLOSE_CALL = "<|tool_call>", "<tool_call|>"


class Signature(NamedTuple):
    """What the calls of one tool must look like.

    Attributes:
        name: Name of the tool.
        schema: JSON schema of the arguments, an object.
        is_strict: Whether the arguments are held to the tool's parameters. Otherwise ``schema`` allows any object.
    """

    name: str
    schema: dict[str, Any]
    is_strict: bool


class Chosen(NamedTuple):
    """What a choice among tools means.

    Attributes:
        names: Names of the tools that may be called.
        must_call: Whether one of them must be called.
    """

    names: tuple[str, ...]
    must_call: bool


def declarations(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """Return the tools as plain JSON: ``{"type": "function", "function": {"name", "description", "parameters"}}``.

    A tool is such an object, its inner object (Anthropic calls the parameters ``input_schema``), or a Python function
    (see ``declare_function``). ``response``, an object schema, and ``return`` are kept; a missing description is "".

    Raises ``DgemmaError`` (exit code 2), which names the tool, for other keys, a name with characters that the template
    cannot write, two tools of one name, parameters that are not an object schema, and functions that cannot be
    described.
    """
    if tools is None:
        return []
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        hint = "Put it into a list: [tool]." if callable(tools) or _is_declaration(tools) else _EXAMPLE
        raise DgemmaError(f"tools must be a list of tools, not {shown(tools)}", hint, exit_code=2)
    try:
        found = [_declaration(tool, f"tool {number}") for number, tool in enumerate(tools, 1)]
    except RecursionError:
        raise DgemmaError("a tool's schema is nested too deeply", "Make it simpler.", exit_code=2) from None
    names = [tool["function"]["name"] for tool in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DgemmaError(f"two tools have the name {shown(twice)}", "Rename one of them.", exit_code=2)
    return found


def _is_declaration(value: Any) -> bool:
    """Return whether the value looks like the declaration of one tool."""
    return isinstance(value, Mapping) and ("name" in value or "function" in value)


def _declaration(tool: Any, place: str) -> dict[str, Any]:
    """Return one tool in the form of ``declarations``."""
    if callable(tool):
        tool = declare_function(tool)
    if not isinstance(tool, Mapping):
        raise _wrong(place, f"{shown(tool)} is neither a declaration nor a function", _EXAMPLE)
    inner, keys = (tool["function"], _INNER) if "function" in tool else (tool, ("type", *_INNER))
    for mapping, known in ((tool, _OUTER if "function" in tool else keys), (inner, keys)):
        if not isinstance(mapping, Mapping):
            raise _wrong(place, f"function must be an object, not {shown(mapping)}", _EXAMPLE)
        if unread := [name for name, value in mapping.items() if name not in known and value is not None]:
            raise _wrong(place, f"{shown(unread[0])} is not read", f"The keys are {', '.join(known)}.")
    if tool.get("type", "function") not in ("function", "custom"):
        raise _wrong(place, f"the type {shown(tool['type'])} is not known", "Only functions can be called.")
    given = {name: value for name, value in inner.items() if value is not None and name not in ("type", "strict")}
    name, description = given.get("name"), given.get("description", "")
    if name is None:
        raise _wrong(place, "it has no name", _EXAMPLE)
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise _wrong(place, f"{shown(name)} cannot be its name", "A name has letters, digits, and the characters _.-")
    place = f"tool {name}"
    if not isinstance(description, str):
        raise _wrong(place, f"description must be a text, not {shown(description)}", _EXAMPLE)
    if not isinstance(inner.get("strict"), (bool, type(None))):
        raise _wrong(place, f"strict must be true or false, not {shown(inner['strict'])}", "Leave it out for true.")
    if "parameters" in given and "input_schema" in given:
        raise _wrong(place, "it has parameters and input_schema", "Give one of them.")
    function = {"name": name, "description": json_data(description, place)}
    parameters = given.get("parameters", given.get("input_schema"))
    if parameters is not None:
        function["parameters"] = object_schema(json_data(parameters, place), place)
    if "response" in given:
        function["response"] = object_schema(json_data(given["response"], place), f"{place}, response")
    if "return" in given:
        function["return"] = json_data(given["return"], place)
    return {"type": "function", "function": function}


def signatures(tools: Sequence[Tool] | None) -> list[Signature]:
    """Return what the calls of the tools must look like.

    ``tools`` are those of ``declarations``, which must have accepted them: the declarations say what a template can
    show, and these schemas are the whole ones.
    """
    found = []
    for tool in tools or ():
        given: Any = declare_function(tool) if callable(tool) else tool
        inner = given.get("function", given)
        is_strict = inner.get("strict") is not False
        parameters = inner.get("parameters") or inner.get("input_schema") or {}
        schema = closed_schema(json_data(parameters, f"tool {inner['name']}")) if is_strict else {"type": "object"}
        found.append(Signature(inner["name"], schema, is_strict))
    return found


def chosen(tools: Sequence[Mapping[str, Any]], choice: ToolChoice | None) -> Chosen:
    """Return which of the ``declarations`` a choice offers.

    Raises ``DgemmaError`` (exit code 2) for a choice that is malformed, or that names a tool that does not exist.
    """
    names = [tool["function"]["name"] for tool in tools]
    name = choice
    if isinstance(choice, Mapping):
        function = choice.get("function")
        is_known = choice.keys() == {"type", "function"} and choice["type"] == "function"
        if not is_known or not isinstance(function, Mapping) or function.keys() != {"name"}:
            raise DgemmaError(f"not a tool_choice: {shown(choice)}", _CHOICES, exit_code=2)
        name = function["name"]
    elif choice in (None, "auto", "none"):
        return Chosen((), False) if choice == "none" else Chosen(tuple(names), False)
    if not isinstance(name, str):
        raise DgemmaError(f"not a tool_choice: {shown(choice)}", _CHOICES, exit_code=2)
    if not tools:
        raise DgemmaError(f"tool_choice is {shown(name)}, but there are no tools", "Declare them in tools.", 2)
    if name == "required" and not isinstance(choice, Mapping):
        return Chosen(tuple(names), True)
    if name not in names:
        hint = f"Use auto, none, required, or the name of a tool: {', '.join(names)}."
        raise DgemmaError(f"tool_choice names {shown(name)}, which no tool has", hint, 2)
    return Chosen((name,), True)


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """Return a call as Gemma writes it: ``<|tool_call>call:name{key:<|"|>text<|"|>,n:3}<tool_call|>``."""
    return f"{OPEN_CALL}call:{name}{_written(arguments)}{CLOSE_CALL}"


def _written(value: Any) -> str:
    """Return an argument as Gemma writes it."""
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, Mapping):
        items = sorted(value.items(), key=lambda item: item[0].lower())  # as a template sorts them
        return "{" + ",".join(f"{key}:{_written(item)}" for key, item in items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wrong(place: str, problem: str, hint: str) -> DgemmaError:
    return DgemmaError(f"{place}: {problem}", hint, exit_code=2)
