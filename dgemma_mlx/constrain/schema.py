"""Translation of a JSON schema (draft 2020-12) into a regular expression for JSON texts that validate against it.

The expression is narrower than the schema and never wider:

* properties appear in the order of the schema, and no others are added;
* numbers have at most 18 digits before the point;
* strings have no ``\\u`` escapes;
* the only whitespace outside strings is one optional space after each ``,`` and ``:``.

Every keyword is translated, is an annotation without effect, or is rejected with its name and path. No keyword is
silently ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn
from urllib.parse import unquote

from dgemma_mlx.checks import shown
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
# Each of these keywords must be the only one of its schema; a type may accompany enum and const.
_EXCLUSIVE = ("enum", "const", "anyOf", "oneOf", "allOf", "$ref")
_COMMA, _COLON = ", ?", ": ?"
ANY_DEPTH = 2  # nesting depth of arrays and objects in a value that the schema does not describe
_MAX_REGEX_LENGTH = 1_000_000  # characters
_MAX_MEMBERS = 10_000  # parts that properties become: one each, or with none required, one for each pair
_MAX_ONE_OF = 200  # schemas of a oneOf, which are compared in pairs
_NOTHING_HINT = "Change the schema so that it allows at least one value."


def regex_of_schema(schema: Any) -> str:
    """Return a regular expression for JSON texts that validate against a schema.

    ``schema`` is the schema as parsed JSON. Raises ``DgemmaError`` (exit code 2), which gives the path within the
    schema, when the schema is malformed, allows nothing, or uses a keyword that is not supported.
    """
    try:
        return _Translator(schema).regex(schema, "#")
    except RecursionError:
        raise DgemmaError("the JSON schema is nested too deeply", "Use fewer levels.", exit_code=2) from None


def regex_of_any_object() -> str:
    """Return a regular expression for JSON objects with any names and values.

    Arrays and objects in the values are nested up to ``ANY_DEPTH`` levels deep.
    """
    return _map(_any_value(ANY_DEPTH))


class _Translator:
    """Translator of one schema document, by recursion over its subschemas.

    Each method takes the JSON pointer of its subschema as ``path``, for error messages. ``keywords`` are the keywords
    of a subschema without its annotations.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._open_references: list[Any] = []  # references that are being followed, to detect recursion
        self._followed: dict[str, str] = {}  # translations, so that references within references stay few

    def regex(self, schema: Any, path: str) -> str:
        """Translate any subschema: an object, true or false."""
        if schema is True or schema == {}:
            return _any_value(ANY_DEPTH)
        if schema is False:
            _reject(path, "false allows nothing", _NOTHING_HINT)
        if not isinstance(schema, Mapping):
            _reject(path, f"a schema must be an object, true or false, not {shown(schema)}")
        if "$id" in schema and path != "#":
            _reject(path, "$id is supported only at the root of the schema")
        keywords = {name: value for name, value in schema.items() if name not in _ANNOTATIONS and name[:2] != "x-"}
        known = {"type", *_EXCLUSIVE}.union(*_KEYWORDS.values())
        for name in keywords:
            if name not in known:
                _reject(path, f"{name[:80]} is not supported")
        exclusive = [name for name in _EXCLUSIVE if name in keywords]
        if exclusive:
            return self._exclusive(exclusive[0], keywords, path)
        found = any_of(*(self._regex_of_type(kind, keywords, path) for kind in self._types(keywords, path)))
        if len(found) > _MAX_REGEX_LENGTH:
            _reject(path, "the schema is too large", "Use smaller repetitions and shorter lengths.")
        return found

    def _exclusive(self, name: str, keywords: Mapping[str, Any], path: str) -> str:
        """Translate a subschema with the keyword ``name``, which is one of ``_EXCLUSIVE``."""
        others = keywords.keys() - {name} - ({"type"} if name in ("enum", "const") else set())
        if others:
            _reject(path, f"{name} together with {', '.join(sorted(others))} is not supported")
        value, here = keywords[name], f"{path}/{name}"
        if name in ("enum", "const"):
            values = value if name == "enum" else [value]
            return self._values(values, keywords.get("type"), here)
        if name == "$ref":
            return self._follow(value, here)
        if not isinstance(value, list) or not value:
            _reject(here, f"{name} must be a list of at least one schema")
        if name == "allOf" and len(value) > 1:
            _reject(here, "more than one schema is not supported")
        if name == "oneOf":
            self._check_one_of(value, here)
        alternatives = [(part, f"{here}/{index}") for index, part in enumerate(value) if part is not False]
        if not alternatives:
            _reject(here, f"all schemas of {name} are false", _NOTHING_HINT)
        return any_of(*(self.regex(part, part_path) for part, part_path in alternatives))

    def _values(self, values: Any, types: Any, path: str) -> str:
        """Translate the values of an enum or const. ``types`` is the schema's ``type`` keyword, or None.

        Values of other types are left out.
        """
        if not isinstance(values, list):
            _reject(path, "enum must be a list of values")
        if types is not None:
            allowed = set(self._types({"type": types}, path))
            values = [value for value in values if types_of(value) & allowed]
        if not values:
            _reject(path, "no value is allowed", _NOTHING_HINT)
        try:
            return any_of(*(quoted(json.dumps(value, ensure_ascii=False, allow_nan=False)) for value in values))
        except ValueError:
            _reject(path, "NaN and infinity are not valid JSON", "Use finite numbers.")

    def _check_one_of(self, schemas: list[Any], path: str) -> None:
        """Reject a ``oneOf`` unless its schemas are known to exclude each other.

        Exactly one schema of a ``oneOf`` may hold, so a text for one schema must not validate against another one.
        """
        if len(schemas) > _MAX_ONE_OF:
            _reject(path, f"{len(schemas):,} schemas are too many; the limit is {_MAX_ONE_OF}", "Use enum or anyOf.")
        for second in range(len(schemas)):
            for first in range(second):
                if Overlap(lambda reference: self._resolve(reference, path)).possible(schemas[first], schemas[second]):
                    _reject(
                        path, f"a value may validate against both schema {first} and schema {second}",
                        "Use anyOf, or give each schema the same required property with a different const.",
                    )

    def _types(self, keywords: Mapping[str, Any], path: str) -> list[str]:
        """Return the types of a subschema: those of ``type``, or else those that its keywords describe, or else all.

        The type integer is left out next to number, which includes it.
        """
        named = keywords.get("type")
        if named is None:
            described = [kind for kind in ("object", "array", "string", "number") if keywords.keys() & _KEYWORDS[kind]]
            return described or list(TYPES)
        types = named if isinstance(named, list) else [named]
        for kind in types:
            if not isinstance(kind, str) or kind not in TYPES:
                _reject(f"{path}/type", f"{shown(kind)} is not a type", f"The types are {', '.join(TYPES)}.")
        if not types:
            _reject(f"{path}/type", "type is an empty list", _NOTHING_HINT)
        return [kind for kind in types if kind != "integer" or "number" not in types]

    def _regex_of_type(self, kind: str, keywords: Mapping[str, Any], path: str) -> str:
        """Translate a subschema for values of one type."""
        translators: dict[str, Callable[[Mapping[str, Any], str], str]] = {
            "object": self._object, "array": self._array, "string": self._string, "integer": self._number,
            "number": partial(self._number, whole=False), "boolean": lambda *_: "(?:true|false)",
            "null": lambda *_: "null",
        }  # fmt: skip
        return translators[kind](keywords, path)

    def _object(self, keywords: Mapping[str, Any], path: str) -> str:
        """Translate a subschema for objects."""
        properties, required = keywords.get("properties", {}), keywords.get("required", [])
        if not isinstance(properties, Mapping):
            _reject(f"{path}/properties", "properties must be an object")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            _reject(f"{path}/required", "required must be a list of names")
        for name in required:
            if name not in properties:
                _reject(f"{path}/required", f"{shown(name)} is not one of the properties", "Add it to properties.")
        if not isinstance(keywords.get("unevaluatedProperties", False), bool):
            _reject(path, "unevaluatedProperties with a schema is not supported")
        additional = keywords.get("additionalProperties", keywords.get("unevaluatedProperties", True))
        if not properties:
            value = None if additional is False else self.regex(additional, f"{path}/additionalProperties")
            return r"\{\}" if value is None else _map(value)
        some = any(name in required for name in properties)
        if len(properties) ** (1 if some else 2) > _MAX_MEMBERS:
            _reject(f"{path}/properties", f"{len(properties):,} properties are too many", "Require at least one.")
        members = [
            (f"{_key(name)}{_COLON}{self.regex(schema, _property_path(path, name))}", name in required)
            for name, schema in properties.items()
            if schema is not False or name in required
        ]
        return rf"\{{{_members(members)}\}}"

    def _array(self, keywords: Mapping[str, Any], path: str) -> str:
        """Translate a subschema for arrays."""
        least = _count(keywords, "minItems", path) or 0
        most = _count(keywords, "maxItems", path)
        prefix, items = keywords.get("prefixItems", []), keywords.get("items", keywords.get("unevaluatedItems", True))
        if not isinstance(prefix, list):
            _reject(f"{path}/prefixItems", "prefixItems must be a list of schemas")
        if most is not None and most < least:
            _reject(f"{path}/maxItems", "maxItems is less than minItems")
        if keywords.get("uniqueItems", False) is not False and (most is None or most > 1):
            _reject(path, "uniqueItems is not supported")
        if prefix:
            if not least <= len(prefix) <= (len(prefix) if most is None else most):
                _reject(path, f"prefixItems is supported only for arrays of exactly its length, {len(prefix)}")
            parts = [self.regex(part, f"{path}/prefixItems/{index}") for index, part in enumerate(prefix)]
            return rf"\[{_COMMA.join(parts)}\]"
        if most == 0 or (items is False and least == 0):
            return r"\[\]"
        return _list(self.regex(items, f"{path}/items"), least, most)

    def _string(self, keywords: Mapping[str, Any], path: str) -> str:
        """Translate a subschema for strings."""
        given = keywords.keys() & _KEYWORDS["string"]
        if not given:
            return STRING
        if given - {"minLength", "maxLength"} and len(given) > 1:
            names = " and ".join(sorted(given))
            _reject(path, f"{names} together are not supported", "Use one of them; a pattern can express a length.")
        if "format" in keywords:
            if not isinstance(keywords["format"], str) or keywords["format"] not in FORMATS:
                name, supported = shown(keywords["format"]), ", ".join(FORMATS)
                _reject(f"{path}/format", f"{name} is not supported", f"The supported formats are {supported}.")
            return f'"{FORMATS[keywords["format"]]}"'
        if "pattern" in keywords:
            if not isinstance(keywords["pattern"], str):
                _reject(f"{path}/pattern", "pattern must be text")
            try:
                return string_of_pattern(keywords["pattern"])
            except ValueError as error:
                _reject(f"{path}/pattern", f"{error} is not supported")
        least, most = _count(keywords, "minLength", path) or 0, _count(keywords, "maxLength", path)
        if most is not None and most < least:
            _reject(f"{path}/maxLength", "maxLength is less than minLength")
        return string_of_lengths(least, most)

    def _number(self, keywords: Mapping[str, Any], path: str, whole: bool = True) -> str:
        """Translate a subschema for integers (``whole``) or for all numbers."""
        if keywords.get("multipleOf", 1) != 1 or ("multipleOf" in keywords and not whole):
            _reject(path, "multipleOf is not supported")
        for name in BOUNDS:
            value = keywords.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                _reject(f"{path}/{name}", f"{name} must be a finite number")
        found = integer_within(keywords) if whole else number_within(keywords)
        if found is None:
            _reject(path, "no number that can be written is within the bounds", "Use wider bounds.")
        return found

    def _follow(self, reference: Any, path: str) -> str:
        """Translate the subschema that a reference (``$ref``) names."""
        if reference in self._open_references:
            hint = "Write out each level that you need."
            _reject(path, f"{shown(reference)} is recursive, which is not supported", hint)
        schema = self._resolve(reference, path)
        if reference not in self._followed:
            self._open_references.append(reference)
            self._followed[reference] = self.regex(schema, reference)
            self._open_references.pop()
        return self._followed[reference]

    def _resolve(self, reference: Any, path: str) -> Any:
        """Return the subschema that a reference names, a JSON pointer such as "#/$defs/name"."""
        if not isinstance(reference, str) or reference[:1] != "#" or reference[1:2] not in ("", "/"):
            hint = 'Use references within the schema, like "#/$defs/name".'
            _reject(path, f"{shown(reference)} is not supported", hint)
        found = self._root
        for part in unquote(reference).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and len(name) < 10 and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, Mapping) and name in found:
                found = found[name]
            else:
                _reject(path, f"{shown(reference)} does not exist", "Define it, or correct the reference.")
        return found


def _key(name: str) -> str:
    """Match the name of a property, in quotes."""
    return quoted(json.dumps(name, ensure_ascii=False))


def _property_path(path: str, name: str) -> str:
    """Return the JSON pointer of a property's schema. ``path`` is the pointer of the object's schema."""
    return f"{path}/properties/{name.replace('~', '~0').replace('/', '~1')}"


def _any_value(depth: int) -> str:
    """Match any value. Arrays and objects are nested up to ``depth`` levels deep."""
    scalars = (STRING, SHORT_NUMBER, "true", "false", "null")
    if depth == 0:
        return any_of(*scalars)
    inner = _any_value(depth - 1)
    return any_of(*scalars, _list(inner, 0, None), _map(inner))


def _map(value: str) -> str:
    """Match an object with any names, and values that match ``value``."""
    member = f"{STRING}{_COLON}{value}"
    return rf"\{{(?:{member}(?:{_COMMA}{member})*)?\}}"


def _list(item: str, least: int, most: int | None) -> str:
    """Match an array of ``least`` to ``most`` items that match ``item``. A ``most`` of None means any number."""
    items = f"{item}{repeated(f'(?:{_COMMA}{item})', max(least, 1) - 1, None if most is None else most - 1)}"
    return rf"\[{items}\]" if least else rf"\[(?:{items})?\]"


def _members(members: Sequence[tuple[str, bool]]) -> str:
    """Match the members of an object in this order, separated by commas.

    Each member is an expression for its name and value, and whether it is required.
    """
    first = next((index for index, (_, required) in enumerate(members) if required), None)
    if first is not None:
        before = "".join(f"(?:{text}{_COMMA})?" for text, _ in members[:first])
        return before + members[first][0] + _following(members[first + 1 :])
    ways = [text + _following(members[index + 1 :]) for index, (text, _) in enumerate(members)]
    return f"{any_of(*ways)}?" if ways else ""


def _following(members: Sequence[tuple[str, bool]]) -> str:
    """Match members that follow another one, each with a comma before it."""
    return "".join(_COMMA + text if required else f"(?:{_COMMA}{text})?" for text, required in members)


def _count(keywords: Mapping[str, Any], name: str, path: str) -> int | None:
    """Return the value of a keyword that must be a non-negative integer, or None when the schema lacks the keyword."""
    value = keywords.get(name)
    if value is None and name not in keywords:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf or value % 1:
        _reject(f"{path}/{name}", f"{name} must be an integer of at least 0")
    return int(value)


def _reject(path: str, problem: str, hint: str = "docs/constrained.md lists what is supported.") -> NoReturn:
    """Raise ``DgemmaError`` (exit code 2) for the subschema at ``path``."""
    place = path if len(path) <= 120 else f"{path[:60]}…{path[-59:]}"
    raise DgemmaError(f"the JSON schema at {place}: {problem}", hint, exit_code=2)
