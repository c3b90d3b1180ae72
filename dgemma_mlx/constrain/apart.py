"""Whether two schemas exclude each other, as far as that is plain to see: for ``oneOf``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dgemma_mlx.constrain.document import Document, Place
from dgemma_mlx.constrain.keywords import required_names
from dgemma_mlx.constrain.values import NOTHING, Node, meet

_DEPTH = 6  # of nested schemas
_TYPES = frozenset(("null", "boolean", "number", "string", "array", "object"))
_NAMES = {
    type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object",
}  # fmt: skip


class Apart:
    """Comparison of the schemas of a document."""

    def __init__(self, document: Document) -> None:
        self._document = document

    def apart(self, one: Node, other: Node, depth: int = 0) -> bool:
        """Return True when no value belongs to both nodes, False where that is not plain to see."""
        both = meet(one, other)
        if both == NOTHING:
            return True
        if depth > _DEPTH or one == other:
            return False
        ones, others = self._all(one, depth), self._all(other, depth)
        types = _types(ones) & _types(others)
        if not types:
            return True
        constants = _constants([*ones, *others])
        if constants is not None and not any(_type(value) in types for value in constants):
            return True
        return types == {"object"} and self._objects_apart(ones, others, depth)

    def _all(self, node: Node, depth: int) -> list[Place]:
        """Return the schemas that all hold for the values of a node, as far as ``allOf`` and references show them."""
        found: dict[Place, None] = {}
        waiting = [(literal, depth) for literal in node]
        while waiting:
            literal, level = waiting.pop()
            if literal < 0 or literal % 2 or level > _DEPTH:
                continue
            place = self._document.places[literal // 2]
            if place in found:
                continue
            found[place] = None
            parts = enumerate(place.keywords.get("allOf", ()))
            nodes = [self._document.node(place, part, "allOf", n) for n, part in parts]
            if "$ref" in place.keywords:
                nodes.append(self._document.node(place, self._document.target(place, "$ref"), "$ref"))
            waiting += [(each, level + 1) for node in nodes for each in node]
        return list(found)

    def _objects_apart(self, ones: list[Place], others: list[Place], depth: int) -> bool:
        """Return whether a property that both need must be of schemas that exclude each other, or must be absent."""
        places = [*ones, *others]
        for name in dict.fromkeys(name for place in places for name in required_names(place)):
            if any(_refuses(place, name) for place in places):
                return True
            one, other = self._property(ones, name), self._property(others, name)
            if self.apart(one, other, depth + 1):
                return True
        return False

    def _property(self, places: list[Place], name: str) -> Node:
        """Return what schemas say of a property under ``properties``."""
        node: Node = frozenset()
        for place in places:
            properties = place.keywords.get("properties", {})
            if name in properties:
                node = meet(node, self._document.node(place, properties[name], "properties", name))
        return node


def _refuses(place: Place, name: str) -> bool:
    """Return whether objects with a property of this name are plainly refused."""
    words, other = place.keywords, place.keywords.get("not")
    if isinstance(other, dict) and set(other) == {"required"} and other["required"] == [name]:
        return True
    closed = words.get("additionalProperties") is False and not words.get("patternProperties")
    return closed and name not in words.get("properties", {})


def _types(places: Iterable[Place]) -> set[str]:
    """Return the types that values of all the schemas may have."""
    found = set(_TYPES)
    for place in places:
        named = place.keywords.get("type", list(_TYPES))
        kinds = [*(named if isinstance(named, list) else [named]), *(["null"] if "nullable" in place.keywords else [])]
        found &= {"number" if kind == "integer" else kind for kind in kinds}
    return found


def _constants(places: Iterable[Place]) -> list[Any] | None:
    """Return the values that belong to all ``enum`` and ``const`` of the schemas; None when there are none of these."""
    found: dict[Any, Any] | None = None
    for place in places:
        words = place.keywords
        for listed in ([words["const"]] if "const" in words else None, words.get("enum")):
            if listed is not None:
                known = {_key(value): value for value in listed}
                found = known if found is None else {key: value for key, value in found.items() if key in known}
    return None if found is None else list(found.values())


def _type(value: Any) -> str:
    return _NAMES[type(value)]


def _key(value: Any) -> Any:
    """Return something hashable that is equal for equal JSON values: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, list):
        return ("array", tuple(map(_key, value)))
    if isinstance(value, dict):
        return ("object", frozenset((name, _key(part)) for name, part in value.items()))
    return (_type(value), value)
