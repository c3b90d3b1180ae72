"""Tests of the texts of objects and arrays: what is written validates, and what may be written is accepted."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from dgemma_mlx import Constraint, DgemmaError
from dgemma_mlx.constrain.machine import Machine
from dgemma_mlx.constrain.terms import Terms
from tests.constrain.small import text_of

INTEGER, STRING = {"type": "integer"}, {"type": "string"}
ABC = {"properties": {"a": INTEGER, "b": INTEGER, "c": INTEGER}}
CLOSED = {"type": "object", **ABC, "additionalProperties": False}
ARRAY, OBJECT = {"type": "array"}, {"type": "object"}

# Each schema with values whose texts it accepts, and values whose texts it must refuse.
CASES: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    # names
    (CLOSED, [{}, {"a": 1}, {"b": 1, "c": 2}], [{"d": 1}, {"a": "x"}]),
    ({**CLOSED, "required": ["b"]}, [{"b": 1}, {"a": 1, "b": 2, "c": 3}], [{}, {"a": 1, "c": 3}]),
    ({**OBJECT, **ABC}, [{"a": 1, "z": [None], "y": "x"}, {"z": 1}], [{"a": "x", "z": 1}]),
    ({**OBJECT, **ABC, "additionalProperties": STRING}, [{"a": 1, "z": "x"}], [{"z": 1}, {"a": 1, "z": None}]),
    ({**OBJECT, "required": ["y", "x"], "additionalProperties": INTEGER}, [{"x": 1, "y": 2, "z": 3}], [{"x": 1}, {}]),
    ({**OBJECT, "patternProperties": {"^a": INTEGER}, "additionalProperties": STRING},
     [{"ab": 1, "b": "x"}, {}], [{"ab": "x"}, {"b": 1}]),
    ({**OBJECT, "properties": {"ab": {"minimum": 3}}, "patternProperties": {"^a": INTEGER}},
     [{"ab": 3, "ac": 1}], [{"ab": 2}, {"ab": 3.5}, {"ac": "x"}]),
    ({**OBJECT, "propertyNames": {"maxLength": 2}, "required": ["a"]}, [{"a": 1, "bc": 2}], [{"a": 1, "bcd": 2}, {}]),
    ({**OBJECT, "properties": {"a": False, 'é"\\\n': True}}, [{'é"\\\n': 1}, {"b": 1}], [{"a": 1}]),
    # numbers of properties
    ({**OBJECT, "minProperties": 1}, [{"a": 1}, {"a": 1, "b": 2}], [{}]),
    ({**OBJECT, "minProperties": 3, "maxProperties": 4},
     [{"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2, "c": 3, "d": 4}], [{}, {"a": 1, "b": 1}, dict.fromkeys("abcde", 1)]),
    ({**CLOSED, "minProperties": 2}, [{"a": 1, "b": 2}, {"a": 1, "c": 2}, dict.fromkeys("abc", 1)], [{}, {"c": 1}]),
    ({**CLOSED, "maxProperties": 1, "minProperties": 1}, [{"a": 1}, {"c": 1}], [{}, {"a": 1, "c": 1}]),
    ({**OBJECT, "maxProperties": 0}, [{}], [{"a": 1}]),
    # what some property must be
    ({**OBJECT, "not": {"patternProperties": {"^a": INTEGER}}}, [{"ab": "x"}, {"b": 1, "ab": None}], [{}, {"ab": 1}]),
    ({**OBJECT, "properties": {"ab": True}, "not": {"patternProperties": {"^a": INTEGER}}},
     [{"ab": "x"}, {"ab": 1, "ac": "x"}], [{}, {"ab": 1}, {"b": "x"}]),
    ({**OBJECT, "not": {"propertyNames": {"minLength": 2}}}, [{"a": 1}, {"xx": 1, "b": 2}], [{}, {"xx": 1}]),
    ({**OBJECT, "not": {**ABC, "additionalProperties": False}}, [{"a": 1, "d": 2}, {"d": 2}], [{}, {"a": 1}]),
    ({**OBJECT, "allOf": [{"not": {"propertyNames": {"not": {"const": name}}}} for name in ("b4", "b4d")]},
     [{"b4": 1, "b4d": 2}, {"x": 1, "b4d": 2, "b4": 1}], [{"b4": 1}, {"b4d": 2}, {}]),
    # items
    ({**ARRAY, "prefixItems": [INTEGER, STRING], "items": False}, [[], [1], [1, "x"]], [["x"], [1, "x", None]]),
    ({**ARRAY, "prefixItems": [INTEGER], "items": STRING, "minItems": 2}, [[1, "x"], [1, "x", "y"]], [[1], [1, 2]]),
    ({**ARRAY, "items": INTEGER, "minItems": 2, "maxItems": 3}, [[1, 1], [1, 1, 1]], [[], [1], [1] * 4]),
    ({**ARRAY, "maxItems": 0}, [[]], [[1]]),
    ({**ARRAY, "minItems": 10**9}, [], [[], [1]]),
    # contains
    ({**ARRAY, "contains": {"const": 5}, "items": INTEGER}, [[5], [1, 5, 2]], [[], [1], [5, "x"]]),
    ({**ARRAY, "contains": INTEGER, "minContains": 2, "maxContains": 3},
     [[1, 2], ["a", 1, None, 2, 3]], [[1], ["a"], [1, 2, 3, 4]]),
    ({**ARRAY, "contains": INTEGER, "minContains": 0, "maxContains": 1}, [[], ["a", 1], ["a"]], [[1, 2]]),
    ({**ARRAY, "allOf": [{"contains": {"const": n}} for n in (1, 2)]}, [[1, 2], [None, 2, 1]], [[1], [2], []]),
    ({**ARRAY, "allOf": [{"contains": {"const": n}} for n in range(9)]}, [[*range(9)]], [[*range(8)]]),
    ({**ARRAY, "contains": False, "minContains": 0, "maxContains": 0}, [[], [1]], []),
    # different items
    ({**ARRAY, "uniqueItems": True, "items": {"enum": ["b", "a", "ab", 1, None, True]}},
     [[], ["a", "b"], ["ab", "b", "a"], [None, 1, True]], [["a", "a"], [1, 1], ["ab", "b", "ab"]]),
    ({**ARRAY, "uniqueItems": True},
     [["red", "green", "blue"], [1, 2, 12, -1, 0.5], [{"x": 1}, [1], None, True, False, "x"]],
     [["red", "red"], [1, 1.0], [0, -0.0], [[1], [1]], [{"x": 1}, {"x": 1}], [None, None], [10, 1e1]]),
    ({**ARRAY, "uniqueItems": True, "items": {**OBJECT, "properties": {"id": STRING}, "required": ["id"]}},
     [[{"id": "a"}, {"id": "b", "n": 1}, {"id": ""}]], [[{"id": "a"}, {"id": "a"}]]),
    ({**ARRAY, "uniqueItems": True, "prefixItems": [STRING], "items": {"enum": ["a", "b"]}, "minItems": 2},
     [["x", "a"], ["c", "a", "b"], ["a", "b"]], [["a"], ["a", "a"], ["a", "b", "b"], ["x"]]),
    ({**ARRAY, "uniqueItems": True, "contains": {"const": 1}}, [[1, "a"], [1, 2]], [["a"], [1, 1]]),
    ({**ARRAY, "uniqueItems": True, "items": {"enum": [f"v{n}" for n in range(20)]}, "minItems": 9}, [], [[]]),
]  # fmt: skip


def shortest(machine: Machine) -> bytes:
    """Return the shortest text of a machine."""
    text, state = [], machine.start
    while not state.nullable:
        symbol, state = machine.step(state)
        text.append(symbol)
    return bytes(text)


@pytest.mark.parametrize("case", CASES, ids=lambda case: json.dumps(case[0])[:70])
def test_what_is_accepted_is_what_validates(case: tuple[dict[str, Any], list[Any], list[Any]]) -> None:
    schema, accepted, refused = case
    validator = Draft202012Validator(schema)
    constraint = Constraint.json_schema(schema)
    assert all(validator.is_valid(value) for value in accepted)
    assert not any(validator.is_valid(value) for value in refused)
    for separators in ((", ", ": "), (",", ":")):
        for value in accepted:
            assert constraint.matches(json.dumps(value, ensure_ascii=False, separators=separators)), value
        for value in refused:
            assert not constraint.matches(json.dumps(value, ensure_ascii=False, separators=separators)), value


@pytest.mark.parametrize("schema", [case[0] for case in CASES if case[0].get("minItems", 0) < 10**6], ids=str)
def test_random_texts_validate(schema: dict[str, Any]) -> None:
    machine, validator = Constraint.json_schema(schema).machine, Draft202012Validator(schema)
    rng = np.random.default_rng(0)
    for steps in (1, 4, 20):
        text = text_of(machine, rng, steps)
        assert machine.matches(text)
        validator.validate(json.loads(text))


names = st.sampled_from(["a", "b", "ab", "c"])
small = st.sampled_from([0, 1, "a", "b", None])
parts = st.sampled_from([True, False, INTEGER, STRING, {"const": 1}, {"enum": [0, "a", None]}, {"not": STRING}])
objects = st.fixed_dictionaries(
    {"type": st.just("object")},
    optional={
        "properties": st.dictionaries(names, parts, max_size=3),
        "patternProperties": st.dictionaries(st.sampled_from(["^a", "b$", "c"]), parts, max_size=2),
        "additionalProperties": parts,
        "required": st.lists(names, unique=True, max_size=2),
        "minProperties": st.integers(0, 3),
        "maxProperties": st.integers(0, 3),
        "propertyNames": st.sampled_from([{"maxLength": 1}, {"pattern": "a"}, {"enum": ["a", "b", "c"]}]),
    },
)
arrays = st.fixed_dictionaries(
    {"type": st.just("array")},
    optional={
        "prefixItems": st.lists(parts, min_size=1, max_size=2),
        "items": parts,
        "contains": parts,
        "minContains": st.integers(0, 2),
        "maxContains": st.integers(1, 2),
        "minItems": st.integers(0, 3),
        "maxItems": st.integers(0, 3),
        "uniqueItems": st.booleans(),
    },
)
schemas = st.one_of(objects, arrays)
values = st.one_of(st.dictionaries(names, small, max_size=4), st.lists(small, max_size=4))


@settings(max_examples=40)
@given(
    st.one_of(schemas, st.builds(lambda a, b: {"allOf": [a, {"not": b}]}, schemas, schemas)),
    st.lists(values, min_size=6, max_size=12),
    st.integers(0, 2**32 - 1),
)
def test_no_schema_allows_what_does_not_validate(schema: dict[str, Any], instances: list[Any], seed: int) -> None:
    validator = Draft202012Validator(schema)
    try:
        constraint = Constraint.json_schema(schema)
    except DgemmaError as error:
        assert "matches no text" in error.message or "too large" in error.message  # a bound, and not a meaning
        return
    for value in instances:
        assert validator.is_valid(value) or not constraint.matches(json.dumps(value)), value
    rng = np.random.default_rng(seed)
    for steps in (1, 5, 20):
        validator.validate(json.loads(text_of(constraint.machine, rng, steps)))


@settings(max_examples=30)
@given(objects, st.lists(st.dictionaries(names, small, max_size=4), min_size=6, max_size=12))
def test_objects_in_the_order_of_the_schema_are_accepted(schema: dict[str, Any], instances: list[Any]) -> None:
    """Only where several names that are not named count, an object may be refused."""
    if schema.get("minProperties", 0) > 1:
        del schema["minProperties"]
    validator = Draft202012Validator(schema)
    order = [*schema.get("properties", {}), *sorted({"a", "b", "ab", "c"} - set(schema.get("properties", {})))]
    required = [name for name in order if name in schema.get("required", [])]
    order.sort(key=lambda name: (name not in schema.get("properties", {}), name not in required))
    valid = [{name: value[name] for name in order if name in value} for value in instances if validator.is_valid(value)]
    for value in valid:
        assert Constraint.json_schema(schema).matches(json.dumps(value)), value


@pytest.mark.parametrize(
    "schema",
    [
        {
            "$ref": "#/$defs/a",
            "$defs": {"a": {**OBJECT, "properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["x"]}},
        },
        {**ARRAY, "items": {"$ref": "#"}, "minItems": 1},
        {**ARRAY, "items": {"$ref": "#"}, "minItems": 2, "uniqueItems": True},
        {**ARRAY, "uniqueItems": True, "items": {"type": "boolean"}, "minItems": 3},
        {**CLOSED, "minProperties": 4},
        {**OBJECT, "required": ["a", "b"], "maxProperties": 1},
        {**OBJECT, "required": ["ab"], "propertyNames": {"maxLength": 1}},
        {**OBJECT, "not": {"propertyNames": {"maxLength": 3}}, "additionalProperties": False},
    ],
    ids=str,
)
def test_a_schema_that_allows_nothing_is_an_error(schema: dict[str, Any]) -> None:
    with pytest.raises(DgemmaError, match="the JSON schema matches no text at all") as caught:
        Constraint.json_schema(schema)
    assert caught.value.exit_code == 2


def test_recursive_values_are_accepted_at_any_depth() -> None:
    node = {**OBJECT, "properties": {"v": INTEGER, "next": {"$ref": "#/$defs/n"}}, "required": ["v"]}
    constraint = Constraint.json_schema({"$ref": "#/$defs/n", "$defs": {"n": {**node, "additionalProperties": False}}})
    text = '{"v": 1, "next": ' * 200 + '{"v": 1}' + "}" * 200
    assert constraint.matches(text)
    assert not constraint.matches(text[:-1])
    assert shortest(constraint.machine) == b'{"v":0}'


def test_what_no_shortest_text_needs_is_not_translated() -> None:
    """A schema of 2,000 definitions is compiled before any of them is looked at."""
    definitions = {f"d{n}": {**OBJECT, "properties": {"x": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(2000)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**definitions, "d2000": INTEGER}}
    machine = Constraint.json_schema(schema).machine
    rules = len([term for term in machine.terms._known.values() if term.kind == "rule"])
    assert rules < 50
    assert machine.matches(b'{"x":' * 150 + b"{}" + b"}" * 150)


def test_many_required_properties_are_weighed_at_once() -> None:
    properties = {f"p{n}": {**OBJECT, "properties": {"x": INTEGER}, "required": ["x"]} for n in range(150)}
    schema = {**OBJECT, "properties": properties, "required": list(properties)}
    machine = Constraint.json_schema(schema).machine
    text = json.dumps({name: {"x": 0} for name in properties}, separators=(",", ":")).encode()
    assert shortest(machine) == text


def test_a_constant_with_a_prose_keyword_in_it_is_written_whole() -> None:
    value = {"title": "é", "pattern": "ß", "format": "ø", "description": "å", "$ref": "#/ñ"}
    assert Constraint.json_schema({"const": value}).matches(json.dumps(value, ensure_ascii=False))


def test_alternatives_of_which_one_is_the_rest_of_another_are_joined() -> None:
    terms = Terms(4)
    x, y, z, w = (terms.symbols(1 << n) for n in range(4))
    rest = terms.sequence(y, z)
    both = terms.either([terms.sequence(x, rest), rest, terms.sequence(w, z)])  # xyz|yz|wz
    assert terms.least(both) == 2
