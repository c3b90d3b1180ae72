"""Tests of the bounds on constraints: what explodes is one error, and what is large but usual still works."""

from __future__ import annotations

from typing import Any

import pytest

from dgemma_mlx import Constraint, DgemmaError
from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.text import load_tokenizer

_MANY = "9" * 5000
_ALONE = {"type": "integer"}


def _nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}}
    return schema


def _references(levels: int) -> dict[str, Any]:
    doubled = {f"d{n}": {"prefixItems": [{"$ref": f"#/$defs/d{n + 1}"}] * 2, "type": "array"} for n in range(levels)}
    return {"$defs": {**doubled, f"d{levels}": _ALONE}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    "regex", [f"a{{{_MANY}}}", "(" * 5000 + "x" + ")" * 5000, "a|" * 600_000,
              "[", "a{2", "(?<a", "(?i", "\\", "[[:alpha:]", "a{2,1}", "*", r"\p{Nothing}", "(?P<1>a)", r"\x{110000}"],
)  # fmt: skip
def test_a_regular_expression_that_explodes_or_is_malformed_is_one_error(regex: str) -> None:
    _refused(lambda: Constraint.regex(regex))


@pytest.mark.parametrize(
    "grammar", ["a ::= " + "(" * 5000 + '"x"', f'a ::= "x"{{{_MANY}}}', f'a ::= ({"x" * 5000}',
                "a ::= " + '"x" ' * 1_000_000, "\n".join(f"r{n} ::= r{n + 1}" for n in range(3000))],
)  # fmt: skip
def test_a_grammar_that_explodes_is_one_error(grammar: str) -> None:
    _refused(lambda: Constraint.grammar(grammar))


@pytest.mark.parametrize(
    "schema", [{"oneOf": [{"const": n} for n in range(3000)]}, f'{{"type": "string", "maxLength": {_MANY}}}',
               '{"items":' * 900 + "{}" + "}" * 900, {"type": "string", "pattern": f"a{{{_MANY}}}"},
               {"$ref": f"#/allOf/{_MANY}", "allOf": []}, {"$ref": "#/" + "a" * 100_000}],
)  # fmt: skip
def test_a_schema_that_explodes_is_one_error(schema: Any) -> None:
    _refused(lambda: Constraint.json_schema(schema))


@pytest.mark.parametrize(
    "schema", [_nested(10), _references(30), {"properties": {f"p{n}": _ALONE for n in range(10_000)}},
               {"type": "string", "maxLength": 10**9}, {"type": "array", "items": _ALONE, "minItems": 10**6},
               {"a" * 100_000: 1}],
)  # fmt: skip
def test_a_schema_of_many_states_costs_what_is_visited_of_it(schema: Any) -> None:
    machine = Constraint.json_schema(schema).machine
    state = machine.start
    for _ in range(50):
        if not state.nullable:
            state = machine.step(state)[1]
    assert len(machine.terms) < 100_000


_KEYWORDS = [
    "type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "properties", "required", "additionalProperties",
    "unevaluatedProperties", "items", "prefixItems", "minItems", "maxItems", "uniqueItems", "minLength", "maxLength",
    "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "$defs", "title",
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, -1, 0, 2**63, 10**19, 1e300, 5e-324, float("nan"), float("inf"), "", "\ud800", "\x1b]0;x", "x" * 9999,
    [], [[]], [{}], [1], ["a"], {}, {"a": 1}, {"": []}, {"a": {"type": []}}, [None, [1], {"a": [2]}],
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:the JSON schema at")
@pytest.mark.parametrize("keyword", _KEYWORDS)
def test_a_keyword_with_a_value_of_any_kind_is_a_constraint_or_one_error(keyword: str) -> None:
    for value in _VALUES:
        for beside in ({}, {"type": "object", "properties": {"a": {}}}, {"type": "string"}, {"type": "array"}, _ALONE):
            try:
                Constraint.json_schema({**beside, keyword: value})
            except DgemmaError as error:
                assert error.exit_code == 2 and len(error.message) < 450, error.message


@pytest.mark.parametrize(
    ("regex", "text"),
    [(".{1,300}", "é" * 300), (r"\w{1,30}", "日" * 30), (r"(?i:[a-zé]{1,40})K", "É" * 40 + "K"), ("(?x) a b # c", "ab"),
     (r"[]a]\]+[^]]", "a]]x"), (r"(?s:.)\p{Greek}\x41\u{42}", "\nαAB"), (r"[\w&&[^a]]", "b"), ("a{2}{2}", "aaaa"),
     ("a{ 1 , 2 }", "aa"), ("(?P<n>a)(?<m>b)", "ab"), ("(?i)é(?-i)K", "ÉK")],
)  # fmt: skip
def test_a_large_or_unusual_expression_matches(regex: str, text: str) -> None:
    assert Constraint.regex(regex).matches(text)


def _refused(compile: Any) -> None:
    with pytest.raises(DgemmaError) as caught:
        compile()
    assert caught.value.exit_code == 2 and len(caught.value.message) < 450 and "\n" not in caught.value.message


def test_what_only_very_long_texts_match_is_one_error() -> None:
    """References that multiply make a text of 9^9 items."""
    array = {"type": "array", "items": False, "minItems": 9}
    levels = {f"a{level}": {**array, "prefixItems": [{"$ref": f"#/$defs/a{level + 1}"}] * 9} for level in range(9)}
    schema = {"$ref": "#/$defs/a0", "$defs": {**levels, "a9": {"const": 1}}}
    constraint = Constraint.json_schema(schema)
    with pytest.raises(DgemmaError, match=r"the shortest text that matches has [0-9,]{11,} characters"):
        constraint.over(load_tokenizer(DEMO_FOLDER), GenerationConfig(eos_token_ids=(1, 106), pad_token_id=0), 768)
