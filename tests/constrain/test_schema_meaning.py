"""What JSON schemas mean: cases with their verdicts, and random schemas, which are never wider than ``jsonschema``."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from jsonschema import Draft202012Validator

from dgemma_mlx import Constraint, DgemmaError
from tests.constrain.schemas import VALUES, schemas
from tests.constrain.small import text_of

TREE = {
    "$ref": "#/$defs/tree",
    "$defs": {"tree": {
        "type": "object", "required": ["name"], "additionalProperties": False,
        "properties": {"name": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
    }},
}  # fmt: skip
PET = [
    {"type": "object", "properties": {"kind": {"const": kind}, sound: {"type": "string"}}, "required": ["kind", sound]}
    for kind, sound in (("cat", "meow"), ("dog", "woof"))
]

# A schema, values that it allows, and values that it does not.
CASES: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    (TREE, [{"name": "a", "children": [{"name": "b", "children": []}]}], [{"name": "a", "children": [{}]}]),
    ({"allOf": [{"type": "string"}, {"minLength": 2}], "maxLength": 3}, ["ab", "abc"], ["a", "abcd", 12]),
    ({"anyOf": [{"type": "string", "maxLength": 1}, {"type": "integer"}], "minimum": 3}, ["a", 3], ["ab", 2]),
    ({"oneOf": [{"type": "number", "minimum": 2}, {"type": "integer"}]}, [1, 2.5], [2, 1.5, "a"]),
    ({"oneOf": PET, "discriminator": {"propertyName": "kind"}}, [{"kind": "cat", "meow": "x"}],
     [{"kind": "cat"}, {"kind": "cow", "meow": "x"}]),
    ({"type": "object", "properties": {n: {"type": "null"} for n in "ab"},
      "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, [{"a": None}, {"b": None}], [{}, {"a": None, "b": None}]),
    ({"not": {"type": ["string", "null"]}}, [1, [], {}, True], ["a", None]),
    ({"type": "string", "not": {"pattern": "^a", "maxLength": 2}}, ["b", "abc"], ["a", "ab"]),
    ({"type": "number", "not": {"const": 1}}, [2, 1.5], [1, 1.0]),
    ({"type": "object", "not": {"required": ["a"]}}, [{}, {"b": 1}], [{"a": 1}]),
    ({"enum": [1, "a", [1], {"k": 1}], "not": {"enum": ["a", [1], {"k": 2}]}}, [1, {"k": 1}], ["a", [1]]),
    ({"not": {"not": {"type": "integer"}}}, [1], ["a", 1.5]),
    ({"type": "integer", "if": {"minimum": 10}, "then": {"multipleOf": 10}, "else": {"maximum": 5}}, [20, 5], [11, 7]),
    ({"properties": {"a": True, "b": True}, "if": {"properties": {"a": {"const": 1}}, "required": ["a"]},
      "then": {"required": ["b"]}}, [{"a": 2}, {"a": 1, "b": 1}, "x"], [{"a": 1}]),
    ({"dependentRequired": {"a": ["b"]}}, [{}, {"b": 1}, {"a": 1, "b": 1}, 3], [{"a": 1}]),
    ({"dependentSchemas": {"a": {"properties": {"b": {"type": "integer"}}}}},
     [{"b": "x"}, {"a": 1, "b": 1}, "s"], [{"a": 1, "b": "x"}]),
    ({"dependentSchemas": {"a": {"properties": {"b": {"type": "integer"}, "a": True}}}},
     [{"b": 1, "a": 1}], [{"b": "x", "a": 1}]),
    ({"properties": {"a": True}, "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False},
     [{"a": "s"}, {"x1": 1}, {"a": 1, "xy": 2}], [{"x1": "s"}, {"b": 1}]),
    ({"propertyNames": {"pattern": "^[ab]$"}}, [{"a": 1}, {}], [{"c": 1}, {"ab": 1}]),
    ({"$ref": "#/$defs/a", "properties": {"y": {"type": "null"}}, "unevaluatedProperties": False,
      "$defs": {"a": {"properties": {"x": {"type": "null"}}}}}, [{"x": None}, {"y": None}], [{"z": None}, {"x": 1}]),
    ({"prefixItems": [{"type": "null"}], "anyOf": [{"prefixItems": [True, {"const": 1}]}, {"const": [None]}],
      "unevaluatedItems": False}, [[None], [None, 1]], [[None, 1, 2], [1]]),
    ({"enum": [{"a": 1}], "unevaluatedProperties": {"type": "string"}, "type": ["object", "null"], "not": False}, [],
     [{"a": 1}, None]),
    ({"not": {"not": {"properties": {"a": True}}}, "unevaluatedProperties": False}, [{}], [{"a": 1}]),
    ({"$id": "https://example.com/root", "$ref": "item", "$defs": {"i": {"$id": "item", "type": "null"}}}, [None], [1]),
    ({"$ref": "#here", "$defs": {"i": {"$anchor": "here", "type": "null"}}}, [None], [1]),
    ({"properties": {"a/b": {"type": "null"}, "c": {"$ref": "#/properties/a~1b"}}}, [{"c": None}], [{"c": 1}]),
    ({"$ref": "#/$defs/list", "$defs": {
        "list": {"$id": "list", "type": "array", "items": {"$dynamicRef": "#item"}, "$defs": {
            "any": {"$dynamicAnchor": "item"}}},
        "texts": {"$id": "texts", "$dynamicAnchor": "item", "type": "string"}}}, [[1, "a"]], [1]),
    ({"$id": "https://example.com/strings", "$ref": "list", "$defs": {
        "item": {"$dynamicAnchor": "item", "type": "string"},
        "list": {"$id": "list", "type": "array", "items": {"$dynamicRef": "#item"}, "$defs": {
            "any": {"$dynamicAnchor": "item"}}}}}, [["a"], []], [[1], 1]),
    ({"enum": [{"$ref": "#/x"}], "x-note": {"$id": "unread", "type": 3}}, [{"$ref": "#/x"}], [1]),
    ({"const": 10**30}, [10**30], [10**30 + 1]),
    ({"type": "integer", "minimum": 10**40, "default": 10**99}, [2 * 10**40], [10**40 - 1]),
    ({"type": ["number", "null"], "minimum": 10**19}, [10**19, None], [10**19 - 1]),
    ({"type": "integer", "enum": [10**20, 2.5]}, [10**20], [2.5, 10**20 + 1]),
    ({"javaType": "x", "links": [3], "type": "null", "_format": "y"}, [None], [1]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "right", "wrong"), CASES, ids=lambda part: json.dumps(part)[:50])
def test_cases(schema: dict[str, Any], right: list[Any], wrong: list[Any]) -> None:
    validator = Draft202012Validator(schema)
    assert all(validator.is_valid(value) for value in right)
    assert not any(validator.is_valid(value) for value in wrong)
    if not right:
        with pytest.raises(DgemmaError, match="matches no text"):
            Constraint.json_schema(schema)
        return
    constraint = Constraint.json_schema(schema)
    assert [value for value in right if not constraint.matches(json.dumps(value))] == []
    assert [value for value in wrong if constraint.matches(json.dumps(value))] == []


def test_openapi_nullable_allows_null_where_no_draft_is_declared() -> None:
    schema = {"type": "string", "nullable": True}
    assert Constraint.json_schema(schema).matches("null")
    declared = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    assert not Constraint.json_schema(declared).matches("null")
    assert not Constraint.json_schema({"not": schema}).matches("null")


def test_a_format_is_never_what_a_complement_is_made_of() -> None:
    """Validators need not check formats, so a value may not be allowed because it lacks one."""
    with pytest.raises(DgemmaError, match="matches no text"):
        Constraint.json_schema({"type": "string", "not": {"format": "date"}})


def test_references_may_be_chained_and_definitions_unused() -> None:
    chain: dict[str, Any] = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(2000)}
    chain |= {"d2000": {"type": "null"}, "unused": {"$ref": "gone", "type": 3}}
    assert Constraint.json_schema({"$ref": "#/$defs/d0", "$defs": chain}).matches("null")


# A schema, and a value that is valid for one of ECMAScript and Python alone.
READINGS: list[tuple[dict[str, Any], Any]] = [
    ({"type": "string", "not": {"pattern": r"^\w$"}}, "é"),
    ({"type": "string", "not": {"pattern": "."}}, "\u2028"),
    ({"type": "string", "not": {"pattern": "^a$"}}, "a\n"),
    ({"type": "object", "patternProperties": {r"^\w+$": {"type": "integer"}}}, {"é": None}),
    ({"properties": {"é": True}, "patternProperties": {r"^\w+$": {"type": "integer"}}}, {"é": None}),
    ({"patternProperties": {r"^\w+$": True}, "additionalProperties": {"type": "integer"}}, {"é": None}),
    ({"patternProperties": {r"^\w+$": True}, "unevaluatedProperties": {"type": "integer"}}, {"é": None}),
    ({"not": {"patternProperties": {r"^\w+$": {"type": "integer"}}}}, {"é": None}),
    ({"not": {"patternProperties": {r"^\w+$": True}, "additionalProperties": {"type": "integer"}}}, {"é": None}),
    ({"propertyNames": {"pattern": r"^\w+$"}}, {"é": None}),
    ({"propertyNames": {"not": {"pattern": r"^\w+$"}}}, {"é": None}),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "value"), READINGS, ids=lambda part: json.dumps(part)[:60])
def test_what_validators_read_in_different_ways_is_left_out(schema: dict[str, Any], value: Any) -> None:
    assert not Constraint.json_schema(schema).matches(json.dumps(value, ensure_ascii=False))


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(schemas)
def test_random_schemas_are_never_wider(schema: dict[str, Any]) -> None:
    """What matches is valid by ``jsonschema``: fixed values, and texts that the machine itself makes up."""
    try:
        constraint = Constraint.json_schema(schema)
    except DgemmaError as error:
        assert error.exit_code == 2
        return
    validator, rng = Draft202012Validator(schema), np.random.default_rng(0)
    made = [json.loads(text_of(constraint.machine, rng, steps=20)) for _ in range(3)]
    matching = [value for value in VALUES if constraint.matches(json.dumps(value))]
    try:
        assert [value for value in [*matching, *made] if not validator.is_valid(value)] == []
    except RecursionError:  # the schema refers to itself where it makes no difference here
        assume(False)
