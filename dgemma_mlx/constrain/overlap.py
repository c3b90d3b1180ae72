"""Check whether one JSON value may validate against two schemas, which ``oneOf`` forbids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_MAX_DEPTH = 20  # references may be recursive


def types_of(value: Any) -> set[str]:
    """Return the JSON schema types of a JSON value. The values 1 and 1.0 have the types integer and number."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, (int, float)):
        return {"number", "integer"} if value == value // 1 else {"number"}
    names = {str: "string", list: "array", tuple: "array", dict: "object", type(None): "null"}
    return {names.get(type(value), "object")}


class Overlap:
    """A conservative test whether two schemas overlap.

    Two schemas are known to exclude each other when they allow different types, different constants, or objects that
    share a required property with schemas that exclude each other. In all other cases an overlap counts as possible.
    """

    def __init__(self, resolve: Callable[[Any], Any]) -> None:
        """Create a test. ``resolve`` returns the schema that a reference (``$ref``) names."""
        self._resolve = resolve

    def possible(self, one: Any, other: Any, depth: int = 0) -> bool:
        """Return False when no value validates against both schemas, and True when a value may.

        ``depth`` counts the nested calls. Beyond a depth of 20 the result is True.
        """
        if depth > _MAX_DEPTH:
            return True
        for schema, rest in ((one, other), (other, one)):
            if schema is False:
                return False
            if isinstance(schema, Mapping) and "$ref" in schema:
                return self.possible(self._resolve(schema["$ref"]), rest, depth + 1)
            for name in ("anyOf", "oneOf"):
                if isinstance(schema, Mapping) and isinstance(schema.get(name), list):
                    return any(self.possible(part, rest, depth + 1) for part in schema[name])
        if not isinstance(one, Mapping) or not isinstance(other, Mapping):
            return True
        shared_types = _types(one) & _types(other)
        if not shared_types:
            return False
        values, other_values = _values(one), _values(other)
        if values is not None and other_values is not None:
            return any(_same(value, other_value) for value in values for other_value in other_values)
        return shared_types != {"object"} or self._objects_possible(one, other, depth)

    def _objects_possible(self, one: Mapping[str, Any], other: Mapping[str, Any], depth: int) -> bool:
        """Return the same for two schemas that share only objects: compare their required properties."""
        if not all(isinstance(schema.get("properties"), Mapping) for schema in (one, other)):
            return True
        shared = set(one.get("required") or ()) & set(other.get("required") or ())
        return all(
            self.possible(one["properties"].get(name, True), other["properties"].get(name, True), depth + 1)
            for name in shared
        )


def _types(schema: Mapping[str, Any]) -> set[str]:
    """Return the types that a schema allows. Number and integer are treated as one type."""
    values = _values(schema)
    if values is not None:
        return set().union(*(types_of(value) for value in values))
    named = schema.get("type", list(TYPES))
    types = {kind for kind in (named if isinstance(named, list) else [named]) if isinstance(kind, str)}
    return types | {"number", "integer"} if types & {"number", "integer"} else types


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    """Return the values that ``const`` or ``enum`` lists, or None when the schema has neither."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _same(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal. true is not 1, but containers of true and of 1 count as equal."""
    return bool(types_of(one) & types_of(other)) and one == other
