"""Whether a text may validate against two schemas at once, as ``oneOf`` forbids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_DEEPEST = 20  # references may be recursive


def types_of(value: Any) -> set[str]:
    """The types of a JSON value: 1 and 1.0 are integers, and numbers."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, (int, float)):
        return {"number", "integer"} if value == value // 1 else {"number"}
    names = {str: "string", list: "array", tuple: "array", dict: "object", type(None): "null"}
    return {names.get(type(value), "object")}


class Overlap:
    """Says "possible" unless it is sure: types, constants, or a required property keep the schemas apart."""

    def __init__(self, at: Callable[[Any], Any]) -> None:
        """``at`` follows a reference."""
        self._at = at

    def possible(self, one: Any, other: Any, depth: int = 0) -> bool:
        """Of two schemas."""
        if depth > _DEEPEST:
            return True
        for schema, rest in ((one, other), (other, one)):
            if schema is False:
                return False
            if isinstance(schema, Mapping) and "$ref" in schema:
                return self.possible(self._at(schema["$ref"]), rest, depth + 1)
            for name in ("anyOf", "oneOf"):
                if isinstance(schema, Mapping) and isinstance(schema.get(name), list):
                    return any(self.possible(part, rest, depth + 1) for part in schema[name])
        if not isinstance(one, Mapping) or not isinstance(other, Mapping):
            return True
        both = _types(one) & _types(other)
        if not both:
            return False
        values, others = _values(one), _values(other)
        if values is not None and others is not None:
            return any(_same(value, wanted) for value in values for wanted in others)
        return both != {"object"} or self._objects(one, other, depth)

    def _objects(self, one: Mapping[str, Any], other: Mapping[str, Any], depth: int) -> bool:
        """Of two schemas of objects."""
        if not all(isinstance(schema.get("properties"), Mapping) for schema in (one, other)):
            return True
        shared = set(one.get("required") or ()) & set(other.get("required") or ())
        return all(
            self.possible(one["properties"].get(name, True), other["properties"].get(name, True), depth + 1)
            for name in shared
        )


def _types(schema: Mapping[str, Any]) -> set[str]:
    values = _values(schema)
    if values is not None:
        return set().union(*(types_of(value) for value in values))
    named = schema.get("type", list(TYPES))
    types = {kind for kind in (named if isinstance(named, list) else [named]) if isinstance(kind, str)}
    return types | {"number", "integer"} if types & {"number", "integer"} else types


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _same(one: Any, other: Any) -> bool:
    """As JSON has it, in which true is not 1; containers that hold both may count as the same."""
    return bool(types_of(one) & types_of(other)) and one == other
