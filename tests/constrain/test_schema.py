"""Tests of JSON schemas, keyword by keyword: texts that match validate by ``jsonschema``; errors name the place."""

from __future__ import annotations

import json
import re
from itertools import chain
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from dgemma_mlx import Constraint, DgemmaError
from dgemma_mlx.constrain.machine import Machine
from dgemma_mlx.constrain.texts import FORMATS
from tests.constrain.small import text_of
from tests.constrain.test_schema_meaning import CASES

NAMED = {"$defs": {"name": {"type": "string", "maxLength": 4}}}
ANIMALS = [
    {"type": "object", "properties": {"kind": {"const": kind}, "n": {"type": "integer"}}, "required": ["kind"]}
    for kind in ("cat", "dog")
]

SUPPORTED: dict[str, list[Any]] = {
    "type": [{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}, {"type": ["number", "integer"]},
             {"type": "object"}, {"type": "array"}, {"type": "number"}, {"type": "integer"}, {"type": "string"}],
    "enum": [{"enum": ["a", 'q"\\', 1, 2.5, None, True, [1, "x"], {"k": "é"}]}, {"enum": [1, "a"], "type": "integer"}],
    "const": [{"const": "x"}, {"const": {"a": [1, {"b": None}]}}, {"const": "\u0007\n"}],
    "properties": [{"properties": {"a": {"type": "integer"}}}, {"type": "object", "properties": {"a\"/~é": True}},
                   {"type": "object", "properties": {"a": False, "b": {"type": "null"}}}],
    "required": [{"type": "object", "properties": {n: {"type": "boolean"} for n in "abcd"}, "required": ["b", "c"]},
                 {"type": "object", "properties": {n: {"type": "boolean"} for n in "abc"}, "required": ["c"]}],
    "additionalProperties": [{"type": "object", "additionalProperties": {"type": "integer"}},
                             {"type": "object", "additionalProperties": False},
                             {"properties": {"a": {"type": "null"}}, "additionalProperties": False}],
    "unevaluatedProperties": [{"properties": {"a": {"type": "null"}}, "unevaluatedProperties": False}],
    "items": [{"type": "array", "items": {"type": "integer"}}, {"type": "array", "items": False},
              {"items": {"type": "array", "items": {"enum": ["x"]}}}],
    "prefixItems": [{"type": "array", "prefixItems": [{"type": "integer"}, {"const": "x"}]},
                    {"prefixItems": [{"type": "null"}], "minItems": 1, "maxItems": 3, "items": {"type": "string"}}],
    "unevaluatedItems": [{"type": "array", "unevaluatedItems": False}],
    "minItems": [{"type": "array", "items": {"type": "null"}, "minItems": 2},
                 {"items": {"const": 1}, "minItems": 1}],
    "maxItems": [{"type": "array", "items": {"type": "null"}, "maxItems": 3},
                 {"items": {"const": 1}, "maxItems": 1}, {"type": "array", "maxItems": 0},
                 {"items": {"const": 1}, "minItems": 2, "maxItems": 2}],
    "uniqueItems": [{"items": {"const": 1}, "uniqueItems": False},
                    {"items": {"const": 1}, "maxItems": 1, "uniqueItems": True}],
    "minLength": [{"type": "string", "minLength": 3}, {"minLength": 2, "maxLength": 2}],
    "maxLength": [{"type": "string", "maxLength": 2}, {"type": "string", "maxLength": 0}],
    "pattern": [{"type": "string", "pattern": p} for p in (
        "^[A-Z]{2}[0-9]+$", "a", "^a", "b$", "^(?:ab|c)d?$", "x|y", r"^\d{3}-\w+\.$", r"^[^a-z]+$",
        "^.{2,4}$", r'^"q"\\$', r"^[\d\s_-]+$", r"^\u00e9\x41$", r"^a\nb$", r"^(a|b)*c+?$",
        r"^[\]x~y]+$", r"^[^\D]\D[^\W5]$", r"^[^\S]\s[\Sa]$", r"^\/\-$",
    )],
    "format": [{"type": "string", "format": name} for name in FORMATS],
    "minimum": [{"type": "integer", "minimum": 0}, {"type": "number", "minimum": -3},
                {"minimum": 2.5, "type": "number"},
                {"type": "integer", "minimum": -12.5, "maximum": 13}],
    "maximum": [{"type": "integer", "maximum": 7}, {"type": "number", "minimum": 0, "maximum": 1}, {"maximum": -1.5}],
    "exclusiveMinimum": [{"type": "number", "exclusiveMinimum": 0}, {"type": "integer", "exclusiveMinimum": 5.0}],
    "exclusiveMaximum": [{"type": "number", "exclusiveMaximum": 3, "exclusiveMinimum": 0.5},
                         {"type": "integer", "exclusiveMaximum": 0, "minimum": -10}],
    "multipleOf": [{"type": "integer", "multipleOf": 1}, {"type": "number", "multipleOf": 0.5},
                   {"multipleOf": 5, "minimum": -1000, "maximum": 1000}],
    "anyOf": [{"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}], "default": None, "title": "T"}],
    "oneOf": [{"oneOf": [{"type": "string"}, {"type": "integer"}]}, {"oneOf": ANIMALS},
              {"oneOf": [{"const": 1}, {"const": 2}, {"enum": ["1", True]}]},
              {"oneOf": [{"$ref": "#/$defs/name"}, {"type": "null"}], **NAMED}],
    "allOf": [{"allOf": [{"type": "integer"}]}],
    "minProperties": [{"type": "object", "minProperties": 1, "properties": {"a": {"const": 1}, "b": {"const": 2}}}],
    "maxProperties": [{"type": "object", "maxProperties": 1, "properties": {"a": {"const": 1}, "b": {"const": 2}}}],
    "$ref": [{"type": "object", "properties": {"x": {"$ref": "#/$defs/name"}, "y": {"$ref": "#/$defs/name"}}, **NAMED},
             {"definitions": {"a/b": {"type": "null"}}, "$ref": "#/definitions/a~1b"}],
}  # fmt: skip

MALFORMED: dict[str, list[Any]] = {
    "type": [{"type": "text"}, {"type": []}, {"type": 3}, {"type": [["null"]]}],
    "enum": [{"enum": "a"}],
    "properties": [{"properties": []}, {"properties": {"a": "string"}}],
    "patternProperties": [{"patternProperties": {"(": True}}, {"patternProperties": {"a": 1}}],
    "required": [{"required": "a"}, {"required": [1]}],
    "dependentRequired": [{"dependentRequired": {"a": "b"}}, {"dependentRequired": []}],
    "dependencies": [{"dependencies": {"a": "b"}}, {"dependencies": {"a": [1]}}],
    "items": [{"items": 3}],
    "prefixItems": [{"prefixItems": {}}, {"prefixItems": [3]}],
    "uniqueItems": [{"uniqueItems": "true"}],
    "minItems": [{"minItems": -1}, {"minItems": 1.5}, {"minItems": 1e400}],
    "minLength": [{"minLength": "3"}, {"minLength": True}],
    "pattern": [{"pattern": p} for p in ("[", "(", r"(a)\1", 3)],
    "format": [{"format": ["date"]}],
    "minimum": [{"minimum": "3"}, {"minimum": 1e400}, {"minimum": float("nan")}],
    "multipleOf": [{"multipleOf": 0}, {"multipleOf": -1}],
    "anyOf": [{"anyOf": {}}, {"anyOf": []}, {"anyOf": [None]}],
    "not": [{"not": []}],
    "$ref": [{"$ref": "https://example.com/x"}, {"$ref": "#/$defs/none"}, {"$ref": 3}, {"$ref": "#"}, {"$ref": "#a"},
             {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
             {"allOf": [{"$ref": "#"}]}, {"$ref": "http://[x"}, {"$ref": "#/enum/0", "enum": [3]}],
    "$dynamicRef": [{"$dynamicRef": "#x"}],
    "": [3, None, "no json", '{"type": '],
}  # fmt: skip

EMPTY: list[Any] = [
    False, {"enum": []}, {"enum": ["a"], "type": "integer"}, {"anyOf": [False]}, {"not": {}},
    {"type": "string", "minLength": 3, "maxLength": 2}, {"type": "array", "minItems": 2, "maxItems": 1},
    {"type": "integer", "minimum": 3, "maximum": 2}, {"type": "integer", "exclusiveMinimum": 2, "exclusiveMaximum": 3},
    {"type": "object", "properties": {"a": False}, "required": ["a"]}, {"allOf": [{"type": "null"}, {"const": 1}]},
    {"oneOf": [{"type": "null"}, {"type": "null"}]}, {"type": "object", "minProperties": 2, "maxProperties": 1},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
]  # fmt: skip


@pytest.mark.parametrize("pattern", [r"^\S\D\W$", r"^[^\d\w]+$"])
def test_negated_classes_of_characters(pattern: str) -> None:
    test_texts_that_match_validate({"type": "string", "pattern": pattern})


def _has_one_text(machine: Machine) -> bool:
    state = machine.start
    while not state.nullable:
        row = machine.row(state)
        if (row.place >= 0).sum() != 1:
            return False
        (state,) = row.states
    return not machine.row(state).states


@pytest.mark.parametrize(
    "schema", [*chain(*SUPPORTED.values()), {}, True], ids=lambda schema: json.dumps(schema)[:60]
)
def test_texts_that_match_validate(schema: Any) -> None:
    machine = Constraint.json_schema(schema).machine
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    rng = np.random.default_rng(0)
    texts = {text_of(machine, rng) for _ in range(25)}
    for text in texts:
        validator.validate(json.loads(text))
    assert len(texts) > 1 or _has_one_text(machine)


@pytest.mark.parametrize(
    ("keyword", "schema"), [(name, schema) for name, found in MALFORMED.items() for schema in found], ids=str
)
def test_malformed_schemas_are_refused(keyword: str, schema: Any) -> None:
    with pytest.raises(DgemmaError) as caught:
        Constraint.json_schema(schema)
    assert caught.value.exit_code == 2
    assert "JSON schema" in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("schema", EMPTY, ids=str)
def test_schemas_without_a_value_are_refused(schema: Any) -> None:
    with pytest.raises(DgemmaError, match="matches no text") as caught:
        Constraint.json_schema(schema)
    assert caught.value.exit_code == 2


def test_every_keyword_of_the_draft_is_tested() -> None:
    meaning = {word for schema, *_ in CASES for word in schema}
    assert {*SUPPORTED, *MALFORMED, *meaning, "contains"} >= set(Draft202012Validator.VALIDATORS)


@pytest.mark.parametrize(("schema", "message"), [
    ({"properties": {"a/b": {"items": {"minItems": -1}}}},
     "#/properties/a~1b/items/minItems: minItems must be a whole number of at least 0, not -1"),
    ({"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"not": "x"}}}, "#/$defs/a/not: a schema must be an object,"),
    ({"allOf": [{"$ref": "other.json"}]}, "#/allOf/0/$ref: 'other.json' is not within the schema"),
    ({"properties": {"x": {"pattern": "["}}}, "#/properties/x/pattern: "),
])  # fmt: skip
def test_an_error_gives_the_path(schema: Any, message: str) -> None:
    with pytest.raises(DgemmaError, match=re.escape(message)):
        Constraint.json_schema(schema)


def test_combinations_may_be_deep_but_not_endless() -> None:
    schema: Any = {"type": "null"}
    for _ in range(50):
        schema = {"allOf": [schema]}
    assert Constraint.json_schema(schema).matches("null")
    for _ in range(20):
        schema = {"not": {"not": schema}}
    with pytest.raises(DgemmaError, match="schemas are combined for one value"):
        Constraint.json_schema(schema)


def test_typical_json_is_accepted() -> None:
    """The automaton accepts valid JSON in the usual notations and rejects invalid JSON."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "n": {"type": "number"}, "tags": {"type": "array", "items": {}}},
        "required": ["name"],
    }
    accepted = Constraint.json_schema(schema).matches
    for value in ({"name": 'Zoë "Z" 北京 🙂\n'}, {"name": "", "n": -0.5, "tags": [1, "a", None, {"b": [True]}]},
                  {"name": "x", "tags": []}, {"name": "x", "n": 1e-07}):  # fmt: skip
        assert accepted(json.dumps(value, ensure_ascii=False))
        assert accepted(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    for value in ({"n": 1}, {"name": 1}, {"n": 1, "name": "x"}, []):
        assert not accepted(json.dumps(value))


def test_json_text_and_a_dict_are_equivalent() -> None:
    schema = {"type": "array", "items": {"enum": ["a", "b"]}}
    for constraint in (Constraint.json_schema(schema), Constraint.json_schema(json.dumps(schema))):
        assert [text for text in ("[]", '["a"]', '["c"]', '"a"') if constraint.matches(text)] == ["[]", '["a"]']


def test_response_format() -> None:
    outer = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "integer"}}}
    same = Constraint.response_format(outer)
    assert same is not None and same.matches("12") and not same.matches("1.5")
    flat = Constraint.response_format({"type": "json_schema", "name": "n", "schema": {"type": "integer"}})
    assert flat is not None and flat.machine is same.machine
    assert Constraint.response_format({"type": "text"}) is None
    anything = Constraint.response_format({"type": "json_object"})
    assert anything is not None
    rng = np.random.default_rng(0)
    assert all(isinstance(json.loads(text_of(anything.machine, rng)), dict) for _ in range(50))
    incomplete = {"type": "json_schema", "json_schema": {}}
    for bad in ({}, {"type": "xml"}, {"type": "json_schema"}, incomplete, "json_object"):
        with pytest.raises(DgemmaError, match="response_format"):
            Constraint.response_format(bad)  # type: ignore[arg-type]
