"""Random JSON schemas over few names, constants and numbers, and values that tell them apart."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

NAMES = ["a", "b", "ab"]
VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -1, 1.5, "", "a", "b", "ab", "abc", [], [0], [1], ["a"], [0, 1], [1, "a"], [1, 1],
    [[]], [None, "a", 1], {}, {"a": 1}, {"a": "a"}, {"b": 1}, {"a": 1, "b": 1}, {"a": 1, "b": "a"}, {"ab": []},
    {"a": {"a": 1}}, {"a": 1, "b": 2, "ab": 3}, {"c": 0}, {"a": None, "c": True}, [{"a": 1}], {"a": []},
]  # fmt: skip
_counts = st.integers(0, 3)
_names = st.lists(st.sampled_from(NAMES), max_size=2, unique=True)
_types = st.sampled_from(["null", "boolean", "number", "integer", "string", "array", "object"])


def _part(schemas: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return schemas of one to three keywords, whose parts are given."""
    lists = st.lists(schemas, min_size=1, max_size=3)
    named = st.dictionaries(st.sampled_from(NAMES), schemas, max_size=2)
    patterns = st.sampled_from(["^a", "b$", "^a?b*$", "."])
    keywords: dict[str, st.SearchStrategy[Any]] = {
        "type": _types | st.lists(_types, min_size=1, max_size=3, unique=True),
        "enum": st.lists(st.sampled_from(VALUES), min_size=1, max_size=4),
        "const": st.sampled_from(VALUES),
        "minimum": st.integers(-1, 2), "exclusiveMinimum": st.integers(-1, 2), "maximum": st.sampled_from([0, 1, 1.5]),
        "exclusiveMaximum": st.integers(0, 2), "multipleOf": st.sampled_from([1, 2, 0.5]),
        "minLength": _counts, "maxLength": _counts, "pattern": patterns,
        "items": schemas, "prefixItems": lists, "contains": schemas, "minContains": _counts, "maxContains": _counts,
        "minItems": _counts, "maxItems": _counts, "unevaluatedItems": schemas,
        "properties": named, "patternProperties": st.dictionaries(patterns, schemas, max_size=1),
        "additionalProperties": schemas, "required": _names, "minProperties": _counts, "maxProperties": _counts,
        "propertyNames": schemas, "dependentRequired": st.dictionaries(st.sampled_from(NAMES), _names, max_size=2),
        "dependentSchemas": named, "unevaluatedProperties": schemas,
        "allOf": lists, "anyOf": lists, "oneOf": lists, "not": schemas, "if": schemas, "then": schemas,
        "else": schemas, "$ref": st.sampled_from(["#/$defs/x", "#/$defs/y"]),
    }  # fmt: skip
    chosen = st.lists(st.sampled_from(sorted(keywords)), min_size=1, max_size=3, unique=True)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({name: keywords[name] for name in names}))


_nested = st.recursive(st.booleans(), _part, max_leaves=6)
schemas = st.builds(
    lambda root, x, y: {**root, "$defs": {"x": x, "y": y}},
    _part(_nested),
    _nested,
    st.sampled_from([{"type": "object", "properties": {"a": {"$ref": "#/$defs/y"}}}, {"items": {"$ref": "#/$defs/y"}}]),
)
