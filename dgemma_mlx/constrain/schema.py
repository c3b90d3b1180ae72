"""A JSON schema (draft 2020-12) -> a regular expression of texts that validate against it.

What is written is narrower than what the schema allows: properties come in the schema's order and no others are
added, numbers have at most 18 digits before the point, strings no ``\\u`` escapes; a space may stand behind ``,`` and
``:``. Every keyword is translated, or is an annotation, or is refused by name and path: nothing is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn
from urllib.parse import unquote

from dgemma_mlx.constrain.numbers import BOUNDS, SHORT_NUMBER, integer_within, number_within
from dgemma_mlx.constrain.overlap import TYPES, Overlap, types_of
from dgemma_mlx.constrain.regex import any_of, quoted, repeated
from dgemma_mlx.constrain.strings import FORMATS, STRING, string_of_lengths, string_of_pattern
from dgemma_mlx.errors import DgemmaError

_ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id",
    "$defs", "definitions", "contentEncoding", "contentMediaType", "contentSchema",
})  # fmt: skip
_KEYWORDS = {
    "object": {"properties", "required", "additionalProperties", "unevaluatedProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems", "uniqueItems", "unevaluatedItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {*BOUNDS, "multipleOf"},
}
_KEYWORDS["integer"] = _KEYWORDS["number"]
_WHOLE = ("enum", "const", "anyOf", "oneOf", "allOf", "$ref")  # each says everything, but for a type beside values
_COMMA, _COLON = ", ?", ": ?"
ANY_DEPTH = 2
"""of arrays and objects in a value of which the schema says nothing"""
_MOST = 1_000_000  # characters of a regular expression


def regex_of_schema(schema: Any) -> str:
    """Texts that validate; ``DgemmaError`` (exit code 2) with a path for what is malformed, or not supported."""
    try:
        return _Translator(schema).regex(schema, "#")
    except RecursionError:
        raise DgemmaError("the JSON schema is nested too deeply", exit_code=2) from None


def regex_of_any_object() -> str:
    """JSON objects whose values hold arrays and objects to ``ANY_DEPTH``."""
    return _map(_any_value(ANY_DEPTH))


class _Translator:
    """Walks a schema; paths are JSON pointers."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._open: list[Any] = []  # references that are being followed

    def regex(self, schema: Any, path: str) -> str:
        if schema is True or schema == {}:
            return _any_value(ANY_DEPTH)
        if schema is False:
            _refuse(path, "false allows nothing")
        if not isinstance(schema, Mapping):
            _refuse(path, f"a schema is an object, not {json.dumps(schema, default=repr)[:40]}")
        if "$id" in schema and path != "#":
            _refuse(path, "$id is not supported here")
        says = {name: value for name, value in schema.items() if name not in _ANNOTATIONS and name[:2] != "x-"}
        known = {"type", *_WHOLE}.union(*_KEYWORDS.values())
        for name in says:
            if name not in known:
                _refuse(path, f"{name} is not supported")
        whole = [name for name in _WHOLE if name in says]
        if whole:
            return self._whole(whole[0], says, path)
        found = any_of(*(self._typed(kind, says, path) for kind in self._types(says, path)))
        if len(found) > _MOST:
            _refuse(path, "it is too large")
        return found

    def _whole(self, name: str, says: Mapping[str, Any], path: str) -> str:
        """A schema that is given by one keyword."""
        beside = says.keys() - {name} - ({"type"} if name in ("enum", "const") else set())
        if beside:
            _refuse(path, f"{name} together with {', '.join(sorted(beside))} is not supported")
        value, here = says[name], f"{path}/{name}"
        if name in ("enum", "const"):
            values = value if name == "enum" else [value]
            return self._values(values, says.get("type"), here)
        if name == "$ref":
            return self._follow(value, here)
        if not isinstance(value, list) or not value:
            _refuse(here, "a list of schemas that is not empty is wanted")
        if name == "allOf" and len(value) > 1:
            _refuse(here, "more than one schema is not supported")
        if name == "oneOf":
            self._check_one_of(value, here)
        alternatives = [(part, f"{here}/{place}") for place, part in enumerate(value) if part is not False]
        if not alternatives:
            _refuse(here, "it allows nothing")
        return any_of(*(self.regex(part, where) for part, where in alternatives))

    def _values(self, values: Any, types: Any, path: str) -> str:
        """The values of an enum, as far as they are of the type that stands beside it."""
        if not isinstance(values, list):
            _refuse(path, "a list of values is wanted")
        if types is not None:
            wanted = set(self._types({"type": types}, path))
            values = [value for value in values if types_of(value) & wanted]
        if not values:
            _refuse(path, "no value is left")
        try:
            return any_of(*(quoted(json.dumps(value, ensure_ascii=False, allow_nan=False)) for value in values))
        except ValueError:
            _refuse(path, "NaN and infinity are no JSON")

    def _check_one_of(self, schemas: list[Any], path: str) -> None:
        """Exactly one may hold: what is written under one must not validate under another."""
        for second in range(len(schemas)):
            for first in range(second):
                if Overlap(lambda reference: self._at(reference, path)).possible(schemas[first], schemas[second]):
                    _refuse(
                        path, f"schemas {first} and {second} may both hold",
                        "Use anyOf, or give both a required property with a const of its own.",
                    )

    def _types(self, says: Mapping[str, Any], path: str) -> list[str]:
        """The types that a schema names, or else those that its keywords are about."""
        named = says.get("type")
        if named is None:
            about = [kind for kind in ("object", "array", "string", "number") if says.keys() & _KEYWORDS[kind]]
            return about or list(TYPES)
        types = named if isinstance(named, list) else [named]
        for kind in types:
            if kind not in TYPES:
                _refuse(f"{path}/type", f"there is no type {json.dumps(kind)}")
        if not types:
            _refuse(f"{path}/type", "it allows nothing")
        return [kind for kind in types if kind != "integer" or "number" not in types]

    def _typed(self, kind: str, says: Mapping[str, Any], path: str) -> str:
        writers: dict[str, Callable[[Mapping[str, Any], str], str]] = {
            "object": self._object, "array": self._array, "string": self._string, "integer": self._number,
            "number": partial(self._number, whole=False), "boolean": lambda *_: "(?:true|false)",
            "null": lambda *_: "null",
        }  # fmt: skip
        return writers[kind](says, path)

    def _object(self, says: Mapping[str, Any], path: str) -> str:
        properties, required = says.get("properties", {}), says.get("required", [])
        if not isinstance(properties, Mapping):
            _refuse(f"{path}/properties", "an object is wanted")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            _refuse(f"{path}/required", "a list of names is wanted")
        for name in required:
            if name not in properties:
                _refuse(f"{path}/required", f"{json.dumps(name)} is not among the properties")
        if says.get("unevaluatedProperties", False) not in (True, False):
            _refuse(path, "unevaluatedProperties with a schema is not supported")
        more = says.get("additionalProperties", says.get("unevaluatedProperties", True))
        if not properties:
            value = None if more is False else self.regex(more, f"{path}/additionalProperties")
            return r"\{\}" if value is None else _map(value)
        members = [
            (f"{_key(name)}{_COLON}{self.regex(schema, _inside(path, name))}", name in required)
            for name, schema in properties.items()
            if schema is not False or name in required
        ]
        return rf"\{{{_members(members)}\}}"

    def _array(self, says: Mapping[str, Any], path: str) -> str:
        least = _count(says, "minItems", path) or 0
        most = _count(says, "maxItems", path)
        prefix, items = says.get("prefixItems", []), says.get("items", says.get("unevaluatedItems", True))
        if not isinstance(prefix, list):
            _refuse(f"{path}/prefixItems", "a list of schemas is wanted")
        if most is not None and most < least:
            _refuse(f"{path}/maxItems", "it is below minItems")
        if says.get("uniqueItems", False) is not False and (most is None or most > 1):
            _refuse(path, "uniqueItems is not supported")
        if prefix:
            if not least <= len(prefix) <= (len(prefix) if most is None else most):
                _refuse(path, f"prefixItems with a length other than theirs ({len(prefix)}) is not supported")
            parts = [self.regex(part, f"{path}/prefixItems/{place}") for place, part in enumerate(prefix)]
            return rf"\[{_COMMA.join(parts)}\]"
        if most == 0 or (items is False and least == 0):
            return r"\[\]"
        return _list(self.regex(items, f"{path}/items"), least, most)

    def _string(self, says: Mapping[str, Any], path: str) -> str:
        given = says.keys() & _KEYWORDS["string"]
        if not given:
            return STRING
        if given - {"minLength", "maxLength"} and len(given) > 1:
            _refuse(path, f"{' with '.join(sorted(given))} is not supported", "Put the length into the pattern.")
        if "format" in says:
            if says["format"] not in FORMATS:
                name = json.dumps(says["format"])
                _refuse(f"{path}/format", f"{name} is not supported", f"There are {', '.join(FORMATS)}.")
            return f'"{FORMATS[says["format"]]}"'
        if "pattern" in says:
            if not isinstance(says["pattern"], str):
                _refuse(f"{path}/pattern", "a text is wanted")
            try:
                return string_of_pattern(says["pattern"])
            except ValueError as error:
                _refuse(f"{path}/pattern", f"{error} is not supported")
        least, most = _count(says, "minLength", path) or 0, _count(says, "maxLength", path)
        if most is not None and most < least:
            _refuse(f"{path}/maxLength", "it is below minLength")
        return string_of_lengths(least, most)

    def _number(self, says: Mapping[str, Any], path: str, whole: bool = True) -> str:
        if says.get("multipleOf", 1) != 1 or ("multipleOf" in says and not whole):
            _refuse(path, "multipleOf is not supported")
        for name in BOUNDS:
            if not isinstance(says.get(name, 0), (int, float)) or isinstance(says.get(name), bool):
                _refuse(f"{path}/{name}", "a number is wanted")
        found = integer_within(says) if whole else number_within(says)
        if found is None:
            _refuse(path, "no number is left within the bounds")
        return found

    def _follow(self, reference: Any, path: str) -> str:
        if reference in self._open:
            _refuse(path, f"{reference} is recursive, which is not supported", "Write the levels that you need out.")
        self._open.append(reference)
        found = self.regex(self._at(reference, path), reference)
        self._open.pop()
        return found

    def _at(self, reference: Any, path: str) -> Any:
        """The schema that a reference names."""
        if not isinstance(reference, str) or reference[:1] != "#" or reference[1:2] not in ("", "/"):
            _refuse(path, f"{json.dumps(reference)} is not supported", 'References are like "#/$defs/name".')
        found = self._root
        for part in unquote(reference).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, Mapping) and name in found:
                found = found[name]
            else:
                _refuse(path, f"there is no {reference}")
        return found


def _key(name: str) -> str:
    return quoted(json.dumps(name, ensure_ascii=False))


def _inside(path: str, name: str) -> str:
    """The path of a property."""
    return f"{path}/properties/{name.replace('~', '~0').replace('/', '~1')}"


def _any_value(depth: int) -> str:
    scalars = (STRING, SHORT_NUMBER, "true", "false", "null")
    if depth == 0:
        return any_of(*scalars)
    inner = _any_value(depth - 1)
    return any_of(*scalars, _list(inner, 0, None), _map(inner))


def _map(value: str) -> str:
    member = f"{STRING}{_COLON}{value}"
    return rf"\{{(?:{member}(?:{_COMMA}{member})*)?\}}"


def _list(item: str, least: int, most: int | None) -> str:
    some = f"{item}{repeated(f'(?:{_COMMA}{item})', max(least, 1) - 1, None if most is None else most - 1)}"
    return rf"\[{some}\]" if least else rf"\[(?:{some})?\]"


def _members(members: Sequence[tuple[str, bool]]) -> str:
    """Members and whether each has to be there, in this order, with commas between those that are."""
    first = next((place for place, (_, required) in enumerate(members) if required), None)
    if first is not None:
        before = "".join(f"(?:{text}{_COMMA})?" for text, _ in members[:first])
        return before + members[first][0] + _following(members[first + 1 :])
    ways = [text + _following(members[place + 1 :]) for place, (text, _) in enumerate(members)]
    return f"{any_of(*ways)}?" if ways else ""


def _following(members: Sequence[tuple[str, bool]]) -> str:
    return "".join(_COMMA + text if required else f"(?:{_COMMA}{text})?" for text, required in members)


def _count(says: Mapping[str, Any], name: str, path: str) -> int | None:
    value = says.get(name)
    if value is None and name not in says:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or value != int(value):
        _refuse(f"{path}/{name}", "a number of at least 0 is wanted")
    return int(value)


def _refuse(path: str, problem: str, hint: str = "docs/constrained.md says what is supported.") -> NoReturn:
    raise DgemmaError(f"the JSON schema at {path}: {problem}", hint, exit_code=2)
