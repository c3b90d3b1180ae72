"""Python functions as tools: a declaration from the signature, the type hints and the docstring.

The declaration equals that of ``transformers.utils.get_json_schema``, which needs a docstring with every parameter.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dgemma_mlx.checks import reason, shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import parse_json

_TYPES: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"}, float: {"type": "number"}, str: {"type": "string"}, bool: {"type": "boolean"},
    type(None): {"type": "null"}, list: {"type": "array"}, tuple: {"type": "array"}, dict: {"type": "object"}, Any: {},
}  # fmt: skip
_SCALARS = (int, float, str, bool, type(None))
# The docstring: text before the first section, the lines of "Args:", and the text of "Returns:".
_DESCRIPTION = re.compile(r"^(.*?)[\n\s]*(Args:|Returns:|Raises:|\Z)", re.DOTALL)
_ARGUMENTS = re.compile(r"\n\s*Args:\n(.*?)[\n\s]*(Returns:|Raises:|\Z)", re.DOTALL)
_RETURNS = re.compile(r"\n\s*Returns:\n\s*(.*?)[\n\s]*(Raises:|\Z)", re.DOTALL)
_ARGUMENT = re.compile(  # "name: text" or "name (type): text", up to the next line that is not indented deeper
    r"(?:^|\n)([ \t]*)(\w+)(?:[ \t]*\([^()\n]*\))?:\s*(.*?)\s*"
    r"(?=\n(?!\1[ \t])[ \t]*\w+(?:[ \t]*\([^()\n]*\))?:|\Z)",
    re.DOTALL,
)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)
_BY_HAND = "Declare this tool by its JSON schema instead."


def declare_function(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the declaration of a function: ``{"type": "function", "function": {...}}``.

    Every parameter needs a type hint: str, int, float, bool, None, Any, list, dict, tuple, Literal, an Enum, and unions
    of these. The docstring, if there is one, is in Google's style; ``(choices: ["a", "b"])`` at the end of a
    parameter's text lists its values. The first parameter of a method needs no hint if it is ``self`` or ``cls``.

    Raises ``DgemmaError`` (exit code 2), which names the function, when it cannot be described.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        hints = get_type_hints(function)
        parameters = list(inspect.signature(function).parameters.values())
    except Exception as error:  # a hint in quotes is code, which may raise anything
        raise _wrong(name, f"its type hints cannot be read: {reason(error)}", _BY_HAND) from None
    if parameters and parameters[0].name in ("self", "cls") and parameters[0].name not in hints:
        parameters = parameters[1:]
    text = (inspect.getdoc(function) or "").strip() if function.__doc__ else ""
    description = _DESCRIPTION.search(text)
    described = _described(text)
    properties = {}
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            problem = "cannot be passed by name" if parameter.kind == parameter.POSITIONAL_ONLY else "has no fixed name"
            shown_name = str(parameter).partition(":")[0]  # with its stars
            raise _wrong(name, f"the parameter {shown_name} {problem}", "A model passes arguments by name. " + _BY_HAND)
        if parameter.name not in hints:
            raise _wrong(name, f"the parameter {parameter.name} has no type hint", f"Write {parameter.name}: str.")
        schema = _schema(hints[parameter.name], f"{name}, parameter {parameter.name}")
        properties[parameter.name] = schema | _words(described.get(parameter.name), f"{name}, {parameter.name}")
    found: dict[str, Any] = {"type": "object", "properties": properties}
    if required := [parameter.name for parameter in parameters if parameter.default is parameter.empty]:
        found["required"] = required
    declared = {"name": name, "description": description[1].strip() if description else "", "parameters": found}
    if "return" in hints and (returned := _returned(hints["return"], text)) is not None:
        declared["return"] = returned
    return {"type": "function", "function": declared}


def _described(text: str) -> dict[str, str]:
    """Return what a docstring says of each parameter."""
    section = _ARGUMENTS.search(text)
    if section is None:
        return {}
    lines = "\n".join(line for line in section[1].split("\n") if line.strip())
    return {name: re.sub(r"\s*\n+\s*", " ", words.strip()) for _, name, words in _ARGUMENT.findall(lines)}


def _words(text: str | None, place: str) -> dict[str, Any]:
    """Return the description of a parameter, and its values where the text lists them."""
    if text is None:
        return {}
    choices = _CHOICES.search(text)
    if choices is None:
        return {"description": text}
    try:
        values = parse_json(choices[1])
    except ValueError as error:
        raise _wrong(place, f"its choices are not JSON: {error}", 'Write (choices: ["a", "b"]).') from None
    if not isinstance(values, list):
        raise _wrong(place, f"its choices are {shown(values)}", 'Write (choices: ["a", "b"]).')
    enum = [value.strip() if isinstance(value, str) else value for value in values]
    return {"enum": enum, "description": text[: choices.start()].strip()}


def _returned(hint: Any, text: str) -> dict[str, Any] | None:
    """Return the schema of a result. None when it cannot be described: the model never writes it."""
    try:
        schema = _schema(hint, "")
    except DgemmaError:
        return None
    words = _RETURNS.search(text)
    return schema if words is None else {**schema, "description": words[1].strip()}


def _schema(hint: Any, place: str) -> dict[str, Any]:
    """Return the JSON schema of a type hint."""
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and origin is None and issubclass(hint, Enum):
        return _enum([member.value for member in hint], place)
    if origin is Literal:
        return _enum(list(arguments), place)
    if origin in (Union, types.UnionType):
        return _union(arguments, place)
    if origin is list:
        return {"type": "array", "items": _schema(arguments[0], place)}
    if origin is tuple and len(arguments) > 1 and ... not in arguments:
        return {"type": "array", "prefixItems": [_schema(part, place) for part in arguments]}
    if origin is tuple:
        raise _wrong(place, f"{_named(hint)} cannot be described", "Use list[...] for any number of values.")
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], place)}
    if origin is None and hint in list(_TYPES):
        return dict(_TYPES[hint])
    raise _wrong(place, f"{_named(hint)} cannot be described", "Use basic types, Literal or an Enum. " + _BY_HAND)


def _union(hints: tuple[Any, ...], place: str) -> dict[str, Any]:
    """Return the schema of ``A | B``. None in it makes it nullable."""
    schemas = [_schema(hint, place) for hint in hints if hint is not type(None)]
    if len(schemas) == 1:
        found = schemas[0]
    elif all(schema.keys() == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        names = sorted({schema["type"] for schema in schemas})
        found = {"type": names[0] if len(names) == 1 else names}
    else:
        found = {"anyOf": schemas}
    return {**found, "nullable": True} if type(None) in hints else found


def _enum(values: list[Any], place: str) -> dict[str, Any]:
    """Return the schema of a list of values."""
    if not values or any(type(value) not in _SCALARS for value in values):
        raise _wrong(place, f"the values {shown(values)} cannot be described", "Use texts, numbers, bools or None.")
    names = list(dict.fromkeys(_TYPES[type(value)]["type"] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}


def _named(hint: Any) -> str:
    return f"the type hint {hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else hint}"


def _wrong(place: str, problem: str, hint: str) -> DgemmaError:
    return DgemmaError(f"the function {place}: {problem}", hint, exit_code=2)
