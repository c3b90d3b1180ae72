"""Whether two schemas exclude each other, as far as that is plain to see."""

from __future__ import annotations

from typing import Any

from dgemma_mlx.constrain.values import NOTHING, Node

_DEPTH = 6


class Apart:
    def __init__(self, document: Any) -> None:
        self._document = document

    def apart(self, one: Node, other: Node) -> bool:
        if NOTHING in (one, other):
            return True
        return self._apart(self._schemas(one), self._schemas(other), 0)

    def _schemas(self, node: Node) -> list[Any]:
        return [self._document.schemas[n // 2] for n in node if n >= 0 and n % 2 == 0]

    def _all(self, schemas: list[Any], depth: int = 0) -> list[dict[str, Any]]:
        """Return all schemas that hold together with these."""
        found = []
        for schema in schemas:
            if isinstance(schema, dict) and depth < _DEPTH:
                found.append(schema)
                more = list(schema.get("allOf") or ()) if isinstance(schema.get("allOf"), list) else []
                if "$ref" in schema:
                    try:
                        more.append(self._document.resolve(schema["$ref"], schema, "#"))
                    except Exception:
                        pass
                found += self._all(more, depth + 1)
        return found

    def _apart(self, one: list[Any], other: list[Any], depth: int) -> bool:
        if depth > _DEPTH:
            return False
        if any(schema is False for schema in [*one, *other]):
            return True
        ones, others = self._all(one), self._all(other)
        types = _types(ones) & _types(others)
        if not types:
            return True
        values, more = _constants(ones), _constants(others)
        if values is not None and more is not None and not any(_same(a, b) for a in values for b in more):
            return True
        if values is not None and more is None and not any(_of_type(v) & types for v in values):
            return True
        if more is not None and values is None and not any(_of_type(v) & types for v in more):
            return True
        if types == {"object"}:
            required = _required(ones) | _required(others)
            both = [*ones, *others]
            for name in required:
                a = [s["properties"][name] for s in ones if name in (s.get("properties") or {})]
                b = [s["properties"][name] for s in others if name in (s.get("properties") or {})]
                if a and b and self._apart(a, b, depth + 1):
                    return True
                if any(s.get("additionalProperties") is False and name not in (s.get("properties") or {}) and not s.get("patternProperties") for s in both):
                    return True
                for s in both:
                    other_side = s.get("not")
                    if isinstance(other_side, dict) and set(other_side) == {"required"} and other_side["required"] == [name]:
                        return True
        return False


def _types(schemas: list[dict[str, Any]]) -> set[str]:
    found = {"null", "boolean", "number", "string", "array", "object"}
    for schema in schemas:
        named = schema.get("type")
        if named is not None:
            names = {("number" if kind == "integer" else kind) for kind in (named if isinstance(named, list) else [named]) if isinstance(kind, str)}
            if schema.get("nullable") is True:
                names.add("null")
            found &= names
    values = _constants(schemas)
    if values is not None:
        found &= set().union(*(_of_type(value) for value in values)) if values else set()
    return found


def _constants(schemas: list[dict[str, Any]]) -> list[Any] | None:
    found = None
    for schema in schemas:
        for name in ("const", "enum"):
            if name in schema:
                values = [schema["const"]] if name == "const" else schema["enum"]
                if isinstance(values, list):
                    found = values if found is None else [v for v in found if any(_same(v, w) for w in values)]
    return found


def _required(schemas: list[dict[str, Any]]) -> set[str]:
    return {name for schema in schemas for name in (schema.get("required") if isinstance(schema.get("required"), list) else ()) if isinstance(name, str)}


def _of_type(value: Any) -> set[str]:
    if value is None:
        return {"null"}
    if isinstance(value, bool):
        return {"boolean"}
    return {{int: "number", float: "number", str: "string", list: "array", dict: "object"}[type(value)]}


def _same(one: Any, other: Any) -> bool:
    return bool(_of_type(one) & _of_type(other)) and one == other
