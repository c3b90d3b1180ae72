"""Tests of JSON schemas: accepted texts validate by ``jsonschema``, and unsupported keywords are rejected."""

from __future__ import annotations

import json
import re
from itertools import chain
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from dgemma_mlx import Constraint, DgemmaError
from dgemma_mlx.constrain.formats import FORMATS
from tests.constrain.small import text_of

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
        "^[A-Z]{2}[0-9]+$", "a", "^a", "b$", "^(?:ab|c)d?$", "x|y", r"^\d{3}-\w+\.$", r"^[^a-z]+$", r"^\S\D\W$",
        "^.{2,4}$", r'^"q"\\$', r"^[\d\s_-]+$", r"^[^\d\w]+$", r"^\u00e9\x41$", r"^a\nb$", r"^(a|b)*c+?$",
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
    "multipleOf": [{"type": "integer", "multipleOf": 1}],
    "anyOf": [{"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}], "default": None, "title": "T"}],
    "oneOf": [{"oneOf": [{"type": "string"}, {"type": "integer"}]}, {"oneOf": ANIMALS},
              {"oneOf": [{"const": 1}, {"const": 2}, {"enum": ["1", True]}]},
              {"oneOf": [{"$ref": "#/$defs/name"}, {"type": "null"}], **NAMED}],
    "allOf": [{"allOf": [{"type": "integer"}]}],
    "$ref": [{"type": "object", "properties": {"x": {"$ref": "#/$defs/name"}, "y": {"$ref": "#/$defs/name"}}, **NAMED},
             {"definitions": {"a/b": {"type": "null"}}, "$ref": "#/definitions/a~1b"}],
}  # fmt: skip

REJECTED: dict[str, list[Any]] = {
    "not": [{"not": {"type": "string"}}],
    "if": [{"if": {"type": "string"}, "then": {"maxLength": 2}}],
    "contains": [{"type": "array", "contains": {"const": 1}}],
    "dependentRequired": [{"type": "object", "dependentRequired": {"a": ["b"]}}],
    "dependentSchemas": [{"type": "object", "dependentSchemas": {"a": {}}}],
    "patternProperties": [{"type": "object", "patternProperties": {"^a": {}}}],
    "propertyNames": [{"type": "object", "propertyNames": {"maxLength": 2}}],
    "minProperties": [{"type": "object", "minProperties": 1}],
    "maxProperties": [{"type": "object", "maxProperties": 1}],
    "$dynamicRef": [{"$dynamicRef": "#x"}],
    "uniqueItems": [{"type": "array", "uniqueItems": True}],
    "multipleOf": [{"type": "number", "multipleOf": 1}, {"type": "integer", "multipleOf": 5}],
    "allOf": [{"allOf": [{"type": "string"}, {"maxLength": 2}]}],
    "oneOf": [{"oneOf": [{"type": "number"}, {"type": "integer"}]}, {"oneOf": [{"const": "a"}, {"type": "string"}]},
              {"oneOf": [{"type": "object", "properties": {n: {"const": n}}} for n in "ab"]}, {"oneOf": []}],
    "anyOf": [{"anyOf": [{"type": "string"}], "maxLength": 2}, {"anyOf": [False]}, {"anyOf": {}}],
    "$ref": [{"$ref": "#"}, {"$ref": "https://example.com/x"}, {"$ref": "#/$defs/none"}, {"$ref": 3},
             {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
             {"$ref": "#/$defs/name", "maxLength": 2, **NAMED}],
    "required": [{"type": "object", "required": ["a"]}, {"properties": {"a": False}, "required": ["a"]},
                 {"type": "object", "required": "a"}],
    "format": [{"type": "string", "format": "hostname"}, {"type": "string", "format": "date", "maxLength": 3}],
    "pattern": [{"type": "string", "pattern": p} for p in (
        "(?=a)b", r"\bx", r"(a)\1", "^a|b$", "a^b", "[", "(", "(?i)a", "[[:alpha:]]", "{", r"\k", r"\p{L}", "^a$b", 3,
    )] + [{"type": "string", "pattern": "a", "minLength": 2}],
    "minLength": [{"type": "string", "minLength": "3"}, {"type": "string", "minLength": 3, "maxLength": 2}],
    "minItems": [{"type": "array", "minItems": -1}, {"type": "array", "minItems": 2, "maxItems": 1},
                 {"prefixItems": [{}], "minItems": 2}],
    "items": [{"type": "array", "items": [{"type": "string"}]}, {"type": "array", "items": 3}],
    "minimum": [{"type": "integer", "minimum": 3, "maximum": 2}, {"type": "number", "minimum": "3"},
                {"type": "number", "exclusiveMinimum": 0.2, "exclusiveMaximum": 0.7}],
    "exclusiveMinimum": [{"type": "integer", "exclusiveMinimum": True}],
    "type": [{"type": "text"}, {"type": []}, {"type": 3}],
    "enum": [{"enum": []}, {"enum": "a"}, {"enum": ["a"], "type": "integer"}, {"enum": ["a"], "maxLength": 1}],
    "": [False, 3, "no json", '{"type": ', {"nullable": True, "type": "string"}, {"type": "string", "size": 3},
         {"enum": [float("nan")]}, {"properties": {"a": {"$id": "x"}}}, {"type": "string", "maxLength": 30000}],
}  # fmt: skip


@pytest.mark.parametrize(
    "schema", [*chain(*SUPPORTED.values()), {}, True], ids=lambda schema: json.dumps(schema)[:60]
)
def test_accepted_texts_validate(schema: Any) -> None:
    automaton = Constraint.json_schema(schema).automaton
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    rng = np.random.default_rng(0)
    texts = {text_of(automaton, rng) for _ in range(60)}
    for text in texts:
        validator.validate(json.loads(text))
    assert len(texts) > 1 or automaton.size == len(next(iter(texts))) + 1  # unless the schema allows a single text


@pytest.mark.parametrize("schema", [*chain(*REJECTED.values())], ids=lambda schema: str(schema)[:60])
def test_unsupported_and_malformed_schemas_are_rejected(schema: Any) -> None:
    with pytest.raises(DgemmaError) as caught:
        Constraint.json_schema(schema)
    assert caught.value.exit_code == 2
    assert "JSON schema" in caught.value.message


def test_every_keyword_of_the_draft_is_tested() -> None:
    assert {*SUPPORTED, *REJECTED} >= set(Draft202012Validator.VALIDATORS)


def test_an_error_gives_the_path() -> None:
    schema = {"type": "object", "properties": {"a/b": {"type": "array", "items": {"not": {}}}}}
    with pytest.raises(DgemmaError, match=re.escape("#/properties/a~1b/items: not is not supported")):
        Constraint.json_schema(schema)


def test_typical_json_is_accepted() -> None:
    """The automaton accepts valid JSON in the usual notations and rejects invalid JSON."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "n": {"type": "number"}, "tags": {"type": "array", "items": {}}},
        "required": ["name"],
    }
    accepted = Constraint.json_schema(schema).automaton.matches
    for value in ({"name": 'Zoë "Z" 北京 🙂\n'}, {"name": "", "n": -0.5, "tags": [1, "a", None, {"b": [True]}]},
                  {"name": "x", "tags": []}, {"name": "x", "n": 1e-07}):  # fmt: skip
        assert accepted(json.dumps(value, ensure_ascii=False).encode())
        assert accepted(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
    for value in ({"n": 1}, {"name": 1}, {"name": "x", "more": 1}, {"n": 1, "name": "x"}, []):
        assert not accepted(json.dumps(value).encode())


def test_json_text_and_a_dict_are_equivalent() -> None:
    schema = {"type": "array", "items": {"enum": ["a", "b"]}}
    assert Constraint.json_schema(json.dumps(schema)).pattern == Constraint.json_schema(schema).pattern


def test_response_format() -> None:
    outer = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "integer"}}}
    same = Constraint.response_format(outer)
    assert same is not None and same.pattern == Constraint.json_schema({"type": "integer"}).pattern
    assert Constraint.response_format({"type": "text"}) is None
    anything = Constraint.response_format({"type": "json_object"})
    assert anything is not None
    rng = np.random.default_rng(0)
    assert all(isinstance(json.loads(text_of(anything.automaton, rng)), dict) for _ in range(50))
    incomplete = {"type": "json_schema", "json_schema": {}}
    for bad in ({}, {"type": "xml"}, {"type": "json_schema"}, incomplete, "json_object"):
        with pytest.raises(DgemmaError, match="response_format"):
            Constraint.response_format(bad)  # type: ignore[arg-type]
