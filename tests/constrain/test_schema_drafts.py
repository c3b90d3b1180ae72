"""The drafts of JSON Schema: what differs between them, beside ``jsonschema``, and the warnings about keywords."""

from __future__ import annotations

import json
import warnings
from typing import Any

import jsonschema
import pytest

from dgemma_mlx import Constraint, DgemmaError

URIS = {
    4: "http://json-schema.org/draft-04/schema#", 6: "http://json-schema.org/draft-06/schema#",
    7: "http://json-schema.org/draft-07/schema#", 2019: "https://json-schema.org/draft/2019-09/schema",
    2020: "https://json-schema.org/draft/2020-12/schema",
}  # fmt: skip
VALUES = [None, 1, 1.0, 3, 5, 5.5, 7, "a", "abc", [], [1], ["a", 1], ["a", "b"], [1, 1], {}, {"a": 1}, {"a": 1, "b": 1}]

# Schemas that mean something else in different drafts. A keyword of a later draft gives a warning.
DIFFERENT: list[dict[str, Any]] = [
    {"type": "integer"},
    {"type": "number", "minimum": 5, "exclusiveMinimum": True},
    {"type": "number", "maximum": 5, "exclusiveMaximum": False},
    {"items": [{"type": "string"}, {"type": "integer"}], "additionalItems": False, "minItems": 1},
    {"items": [{"type": "string"}], "minItems": 2},
    {"items": {"type": "integer"}, "additionalItems": False},
    {"dependencies": {"a": ["b"]}},
    {"dependencies": {"a": {"required": ["b"]}}},
    {"definitions": {"x": {"type": "string"}}, "$ref": "#/definitions/x", "maxLength": 1},
    {"definitions": {"x": {"id": "#x", "type": "string"}}, "allOf": [{"$ref": "#x"}]},
    {"definitions": {"x": {"$id": "#x", "type": "string"}}, "allOf": [{"$ref": "#x"}]},
    {"const": 1},
    {"type": "array", "contains": {"const": 1}, "maxContains": 1},
    {"type": "integer", "if": {"minimum": 4}, "then": {"minimum": 6}},
    {"type": "array", "prefixItems": [{"type": "string"}], "items": {"type": "integer"}},
    {"type": "object", "properties": {"a": True}, "unevaluatedProperties": False},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
]


@pytest.mark.filterwarnings("ignore:the JSON schema at")
@pytest.mark.parametrize("draft", URIS)
@pytest.mark.parametrize("schema", DIFFERENT, ids=lambda schema: json.dumps(schema)[:50])
def test_a_schema_is_read_by_its_draft(schema: dict[str, Any], draft: int) -> None:
    """Exactly the valid values match, but no 1.0 as an integer.

    Where the old spelling is an error in the draft, the constraint is narrower.
    """
    declared = {"$schema": URIS[draft], **schema}
    validator = jsonschema.validators.validator_for(declared)
    try:
        validator.check_schema(declared)
        valid = [value for value in VALUES if validator(declared).is_valid(value)]
    except Exception:  # malformed in this draft, or a reference that it does not know
        return
    try:
        constraint = Constraint.json_schema(declared)
    except DgemmaError as error:
        pytest.fail(str(error))
    matching = [value for value in VALUES if constraint.matches(json.dumps(value))]
    assert [value for value in matching if value not in valid] == []
    if "dependencies" not in schema or draft < 2019:  # later drafts ignore it, but people still mean it
        written = [value for value in valid if schema.get("type") != "integer" or not isinstance(value, float)]
        assert [repr(value) for value in matching] == [repr(value) for value in written]


def test_old_spellings_are_understood_where_no_draft_is_declared() -> None:
    bounded = Constraint.json_schema({"type": "integer", "minimum": 5, "exclusiveMinimum": True, "maximum": 7})
    assert [n for n in range(10) if bounded.matches(str(n))] == [6, 7]
    row = Constraint.json_schema({"items": [{"const": 1}, {"const": 2}], "additionalItems": False, "type": "array"})
    assert row.matches("[1, 2]")
    assert not row.matches("[1, 2, 3]")
    assert not row.matches("[2]")


def test_dependencies_narrow_in_late_drafts_but_their_complement_is_empty() -> None:
    assert not Constraint.json_schema({"dependencies": {"a": ["b"]}}).matches('{"a": 1}')
    with pytest.raises(DgemmaError, match="matches no text"):
        Constraint.json_schema({"not": {"dependencies": {"a": ["b"]}}})


@pytest.mark.parametrize("outer_anchor", [True, False])
def test_the_outermost_recursive_anchor_is_meant(outer_anchor: bool) -> None:
    """``$recursiveRef``, as in the test suite of draft 2019-09: extended trees are trees of extended nodes."""
    inner = {"$id": "tree", "$recursiveAnchor": True, "type": "object", "properties": {
        "data": True, "children": {"type": "array", "items": {"$recursiveRef": "#"}}}}
    schema = {"$schema": URIS[2019], "$id": "https://example.com/extended", "$recursiveAnchor": outer_anchor,
              "$ref": "tree", "required": ["data"], "$defs": {"tree": inner}}  # fmt: skip
    constraint = Constraint.json_schema(schema)
    assert constraint.matches('{"data": 1, "children": [{"data": 2}]}')
    assert constraint.matches('{"data": 1, "children": [{}]}') is not outer_anchor


def test_embedded_schemas_may_declare_another_draft() -> None:
    inner = {"$id": "https://example.com/old", "$schema": URIS[7], "items": [{"type": "null"}]}
    schema = {"$schema": URIS[2020], "$ref": "https://example.com/old", "type": "array", "$defs": {"old": inner}}
    constraint = Constraint.json_schema(schema)
    assert constraint.matches("[null]")
    assert not constraint.matches("[1]")


@pytest.mark.parametrize("uri", ["http://json-schema.org/draft-03/schema#", "https://json-schema.org/draft/next/schema"])
def test_other_drafts_are_refused(uri: str) -> None:
    with pytest.raises(DgemmaError, match="is not supported"):
        Constraint.json_schema({"$schema": uri, "type": "null"})


@pytest.mark.parametrize(("schema", "message"), [
    ({"type": "object", "additionalPropeties": False}, "at #: 'additionalPropeties' .* you mean additionalProperties"),
    ({"properties": {"a": {"type": "string", "minlength": 2}}}, "at #/properties/a: 'minlength' .* you mean minLength"),
    ({"anyOf": [{"type": "null", "requierd": [], "paterns": 1}]}, r"did you mean required\? \(and 1 more like this\)"),
    ({"properties": {"a": {"type": "null", "required": True}}}, "at #/properties/a: required has no effect"),
    ({"$schema": URIS[4], "type": "integer", "const": 3}, "const has no effect; it is not in draft 4"),
])  # fmt: skip
def test_a_likely_mistake_gives_one_warning_line(schema: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        Constraint.json_schema(schema)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert caught[0].filename == __file__


def test_annotations_and_names_of_properties_give_no_warning() -> None:
    schema = {
        "$comment": "c", "title": "t", "examples": [1], "x-format": 1, "_format": "y", "javaType": "z", "self": {},
        "properties": {"additionalPropeties": {"type": "null"}, "requierd": True}, "default": {"minlength": 1},
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Constraint.json_schema(schema)
