"""Constraints from pydantic models, dataclasses, TypedDicts, type hints and functions."""

from __future__ import annotations

import builtins
import sys
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Literal

import pytest

from dgemma_mlx import Constraint, DgemmaError
from dgemma_mlx.constrain.own_types import is_own_type, schema_of

pydantic = pytest.importorskip("pydantic")
from typing_extensions import TypedDict  # noqa: E402  # pydantic needs this one before Python 3.12


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Person(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    name: str = pydantic.Field(max_length=5)
    age: int = pydantic.Field(ge=0, lt=150)
    color: Color | None = None


@dataclass
class Tree:
    value: int
    children: list[Tree] = field(default_factory=list)


class Point(TypedDict):
    x: float
    kind: Literal["a", 1]


def move(to: Point, fast: bool = False) -> None: ...


@pytest.mark.parametrize(
    ("own", "allowed", "refused"),
    [
        (Person, [
            '{"name": "Ana", "age": 7}', '{"name":"","age":149,"color":"red"}', '{"name": "A","age": 0,"color":null}'],
         ['{"name": "Ana", "age": 150}', '{"name": "Ana", "age": "7"}', '{"age": 7}', '{"name": "toolong", "age": 7}']),
        (Tree, ['{"value": 1}', '{"value": 1, "children": [{"value": 2, "children": [{"value": 3}]}]}'],
         ['{"children": []}', '{"value": 1, "children": [2]}', '{"value": 1.5}']),
        (Point, ['{"x": 1.5, "kind": "a"}', '{"x": -2, "kind": 1}'], ['{"x": 1}', '{"x": 1, "kind": 2}']),
        (move, ['{"to": {"x": 1, "kind": 1}, "fast": true}', '{"to": {"x": 1, "kind": "a"}}'],
         ['{"to": {"x": 1, "kind": 1}, "slow": true}', "{}", '[{"x": 1, "kind": 1}]']),
        (list[Person], ["[]", '[{"name": "Ana", "age": 7}, {"name": "Bo", "age": 8}]'], ["[1]", '{"name": "Ana"}']),
        (Person | None, ["null", '{"name": "Ana", "age": 7}'], ["1"]),
        (Color, ['"red"', '"blue"'], ['"green"', "null"]),
        (pydantic.TypeAdapter(dict[str, int]), ["{}", '{"a": 1}'], ['{"a": "b"}', "[]"]),
    ],
)  # fmt: skip
def test_a_type_allows_what_it_validates(own: Any, allowed: list[str], refused: list[str]) -> None:
    constraint = Constraint.json_schema(own)
    adapter = own if isinstance(own, pydantic.TypeAdapter) else pydantic.TypeAdapter(own)
    for text in allowed:
        assert constraint.matches(text), text
        if own is not move:  # a function would be called
            adapter.validate_json(text, strict=False)
    for text in refused:
        assert not constraint.matches(text), text


class Open(pydantic.BaseModel, extra="allow"):  # type: ignore[misc, name-defined]
    name: str


def test_the_schema_is_pydantics_own_and_its_objects_are_closed() -> None:
    assert schema_of(Person) == {"additionalProperties": False, **Person.model_json_schema()}
    assert schema_of(Open) == Open.model_json_schema()
    assert not Constraint.json_schema(Tree).matches('{"value": 1, "children": [{"value": 2, "age": 3}]}')
    assert Constraint.json_schema(Open).matches('{"name": "Ana", "age": 3}')


def test_json_schemas_are_no_types() -> None:
    for schema in ({"type": "string"}, "{}", '{"type": "string"}', True, False, None, 5, [1]):
        assert not is_own_type(schema)


class Plain:
    """A class that pydantic cannot describe."""


def of_a_plain(x: Plain) -> None: ...


class Broken(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    """A model whose own code fails."""

    @classmethod
    def model_json_schema(cls, **_: Any) -> dict[str, Any]:
        raise LookupError("no schema today")


MALFORMED = Annotated[str, pydantic.StringConstraints(pattern="(?P=x)")]  # pydantic_core refuses the pattern


@pytest.mark.parametrize("own", [Plain, list[Plain], of_a_plain, print, pydantic.BaseModel, Broken, MALFORMED])
def test_a_type_without_a_json_schema_is_one_clear_error(own: Any) -> None:
    with pytest.raises(DgemmaError, match="has no JSON schema") as error:
        Constraint.json_schema(own)
    assert error.value.exit_code == 2 and error.value.hint


def test_without_pydantic_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "pydantic":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for name in [name for name in sys.modules if name.partition(".")[0] == "pydantic"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(DgemmaError, match="the schema of Tree needs pydantic") as error:
        Constraint.json_schema(Tree)
    assert error.value.exit_code == 2 and "pip install pydantic" in error.value.hint
