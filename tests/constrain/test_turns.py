"""Machines of a model's turn: thoughts, answers and calls as symbols, against the parser of calls and jsonschema."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from dgemma_mlx import Constraint, DgemmaError
from dgemma_mlx.constrain.call_spelling import DELIMITER
from dgemma_mlx.constrain.languages import of_regex
from dgemma_mlx.constrain.machine import BYTES, Machine
from dgemma_mlx.constrain.terms import UNBOUNDED, Term
from dgemma_mlx.constrain.turns import Turn, calls_of, of_turn
from dgemma_mlx.text.tool_calls import _strict_call
from dgemma_mlx.text.tools import call_text, signatures

ADD = {"properties": {"b": {"type": "integer"}, "a": {"type": "string"}}, "required": ["a"]}
CLOCK = {"name": "clock"}
SCHEMAS: list[dict[str, Any]] = [
    ADD,
    {},
    {"properties": {"zone": {"enum": ["UTC", "", 5, None, "a\"b\\c\n<|\"|>", "ü▁"]}}, "required": ["zone"]},
    {"properties": {"a b": {"type": "boolean"}, "x:y": {"type": "null"}, "ö": {"type": "number"}, "": {"const": 1},
                    "true": {"const": True}, "0": {"const": 1.5}}},
    {"properties": {"to": {"type": "array", "items": {"type": "string", "format": "email"}, "minItems": 1}}},
    {"additionalProperties": {"type": "integer", "minimum": -3, "maximum": 1000}, "minProperties": 1},
    {"properties": {"s": {"pattern": "^[a-c{}\",:]{2,3}$"}}, "required": ["s"], "additionalProperties": True},
    {"properties": {"node": {"$ref": "#/$defs/node"}}, "required": ["node"], "$defs": {"node": {
        "type": "object", "properties": {"v": {"type": ["integer", "null"]}, "next": {"$ref": "#/$defs/node"}},
        "required": ["v"], "additionalProperties": False}}},
    {"allOf": [{"properties": {"p": {"type": "integer"}}}, {"properties": {"q": {"anyOf": [{"type": "string"}]}}}]},
    {"properties": {"d": {"type": "string", "format": "date", "nullable": True},
                    "n": {"multipleOf": 5, "minimum": -100, "maximum": 100}}},
]  # fmt: skip


def turn(*tools: dict[str, Any], **options: Any) -> Machine:
    return of_turn(Turn(calls=calls_of(tools, [tool["name"] for tool in tools]), **options))


def symbols(machine: Machine, text: str) -> list[int]:
    """Return the symbols of a text in which the names of control tokens are these tokens."""
    found: list[int] = []
    while text:
        control = next((number for number, name in enumerate(machine.controls) if text.startswith(name)), None)
        found += text[0].encode() if control is None else [BYTES + control]
        text = text[1 if control is None else len(machine.controls[control]) :]
    return found


def written(machine: Machine, path: list[int]) -> list[str]:
    """Return the text of symbols, split at its control tokens, with these tokens between the pieces."""
    pieces: list[Any] = [b""]
    for symbol in path:
        if symbol < BYTES:
            pieces[-1] += bytes([symbol])
        else:
            pieces += [machine.controls[symbol - BYTES], b""]
    return [piece if isinstance(piece, str) else piece.decode() for piece in pieces]


def completion(machine: Machine, state: Term) -> list[int]:
    """Return the shortest text that ends from a state on."""
    found = []
    while not state.nullable:
        symbol, state = machine.step(state)
        found.append(symbol)
    return found


def walk(machine: Machine, rng: random.Random, most: int = 60) -> list[int]:
    """Return a random text of a machine: random symbols first, then the shortest end."""
    state, path = machine.start, []
    for _ in range(rng.randrange(most)):
        row = machine.row(state)
        if not row.states:
            break
        place = rng.randrange(len(row.states))
        choices = [symbol for symbol in range(machine.terms.size) if row.place[symbol] == place]
        path.append(rng.choice(choices))
        state = row.states[place]
    return path + completion(machine, state)


def accepts(machine: Machine, text: str) -> bool:
    return machine.matches(symbols(machine, text))


def test_a_thought_may_stand_before_what_must_match() -> None:
    machine = of_turn(Turn(Constraint.regex("[0-9]{3}").machine, thinks=True))
    thought = "<|channel>thought\nHm, ü? {\n<channel|>"
    assert [accepts(machine, text) for text in ("123", thought + "123", "<|channel><channel|>123")] == [True] * 3
    for text in ("", thought, thought + "12", thought + thought + "123", "123" + thought, "x<channel|>123",
                 "<|channel>123", thought + " 123"):  # fmt: skip
        assert not accepts(machine, text), text
    assert not machine.matches([*symbols(machine, "<|channel>"), 0xC3, *symbols(machine, "<channel|>123")])  # half an ü
    assert machine.explore(100) is not None  # a thought adds a few states


def test_a_free_answer_holds_thoughts_and_ends_with_calls() -> None:
    machine = turn({"name": "add", "parameters": ADD}, CLOCK, thinks=True)
    call, clock = '<|tool_call>call:add{a:<|"|>x"{}<|"|>,b:3}<tool_call|>', "<|tool_call>call:clock{}<tool_call|>"
    thoughts = "a<|channel>thought\nb<channel|>c<|channel><channel|>"
    for text in ("", "Hi.", thoughts, call, f"Let me see.{call}{clock}{call}"):
        assert accepts(machine, text), text
    for text in (
        "<|channel>a", "<|tool_call>", clock + "Hi.", clock.replace("clock", "time"), clock.replace("{}", ""),
        clock.replace("{}", "{a:1}"), call.replace("<tool_call|>", ""), call.replace(",b:3", ",b:3.5"),
        call.replace(",b:3", ",c:3"), '<|tool_call>call:add{b:3}<tool_call|>', clock.replace("call:", ""),
        "<|tool_call>call:clock{}call:clock{}<tool_call|>", call.replace('<|"|>', '"'),
        "<|channel>" + clock + "<channel|>",
    ):  # fmt: skip
        assert not accepts(machine, text), text


def test_calls_that_must_be_made_stand_first_and_in_place_of_the_answer() -> None:
    clock, thought = "<|tool_call>call:clock{}<tool_call|>", "<|channel>thought\nHm<channel|>"
    must, may = turn(CLOCK, must_call=True), turn(CLOCK, answer=Constraint.choice(["yes"]).machine)
    thinking = turn(CLOCK, must_call=True, thinks=True)
    assert [accepts(must, text) for text in (clock, clock * 3, "", "yes", "a" + clock, thought + clock)] == [
        True, True, False, False, False, False
    ]  # fmt: skip
    assert [accepts(thinking, text) for text in (clock, thought + clock, thought)] == [True, True, False]
    assert [accepts(may, text) for text in (clock, clock * 2, "yes", "", "yes" + clock)] == [True] * 3 + [False] * 2
    assert must.controls == ("<|tool_call>", "<tool_call|>", DELIMITER)


@pytest.mark.parametrize("parameters", SCHEMAS)
def test_every_call_that_is_allowed_is_read_by_the_grammar_and_validates(parameters: dict[str, Any]) -> None:
    [signature] = signatures([{"name": "f.g-h_1", "parameters": parameters}])
    machine, rng = turn({"name": "f.g-h_1", "parameters": parameters}, must_call=True), random.Random(0)
    validator = Draft202012Validator(signature.schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    for _ in range(60):
        pieces = written(machine, walk(machine, rng))
        while len(pieces) > 1:
            end = pieces.index("<tool_call|>")
            inside = pieces[2:end]
            assert pieces[1] == "<|tool_call>" and set(inside[1::2]) <= {DELIMITER}
            name, arguments = _strict_call("\0".join(inside[::4]), inside[2::4], len(inside) // 2 + 1)
            assert name == "f.g-h_1"
            assert not (faults := list(validator.iter_errors(_without_nullable(arguments, parameters)))), faults
            pieces = pieces[end + 1 :]


def _without_nullable(arguments: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """Leave out nulls that only OpenAPI's ``nullable`` allows, which jsonschema does not know."""
    may_be_null = {name for name, schema in parameters.get("properties", {}).items() if schema.get("nullable")}
    return {name: value for name, value in arguments.items() if value is not None or name not in may_be_null}


NAMES = st.from_regex("[A-Za-z_][a-z0-9_.-]{0,3}", fullmatch=True)
NUMBERS = st.integers(-(10**6), 10**6) | st.sampled_from([0.5, -2.25, 1e10])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=30)
@given(arguments=st.dictionaries(NAMES, JSON, max_size=3))
def test_calls_as_the_template_writes_them_are_allowed_where_anything_is(arguments: dict[str, Any]) -> None:
    call = call_text("f", arguments).replace("None", "null")
    machine = turn({"name": "f", "strict": False}, must_call=True)
    assert accepts(machine, call), call


def test_properties_stand_in_the_order_of_the_template() -> None:
    """The template sorts arguments by name, without regard to case."""
    arguments = {"beta": 1, "Alpha": "x", "gamma": [1, 2.5], "delta": {"z": True, "Y": False}}
    schema = {"properties": {
        "beta": {"type": "integer"}, "Alpha": {"type": "string"}, "gamma": {"type": "array"},
        "delta": {"type": "object", "properties": {"z": {}, "Y": {}}, "required": ["z", "Y"]},
    }, "required": list(arguments)}  # fmt: skip
    machine = turn({"name": "f", "parameters": schema}, must_call=True)
    assert accepts(machine, call_text("f", arguments))
    assert call_text("f", arguments).startswith('<|tool_call>call:f{Alpha:<|"|>x<|"|>,beta:1,delta:{Y:false,z:true}')


def test_deep_recursion_is_followed_without_unrolling() -> None:
    machine = turn({"name": "f", "parameters": SCHEMAS[7]}, must_call=True)
    deep = "node:" + "{next:" * 200 + "{v:1}" + ",v:null}" * 200
    assert accepts(machine, f"<|tool_call>call:f{{{deep}}}<tool_call|>")
    assert not accepts(machine, f"<|tool_call>call:f{{{deep[:-1]}}}<tool_call|>")


def test_parameters_that_cannot_be_held_are_an_error_that_names_the_tool() -> None:
    for parameters, words in (
        ({"properties": {"a": {"pattern": "(?<=b)a"}}}, "tool f: "),
        ({"properties": {"a": False}, "required": ["a"]}, "tool f: no arguments satisfy its parameters"),
    ):
        with pytest.raises(DgemmaError) as error:
            turn({"name": "f", "parameters": parameters})
        assert error.value.message.startswith(words) and error.value.exit_code == 2
        assert '"strict": false' in error.value.hint
        assert turn({"name": "f", "parameters": parameters, "strict": False}).terms is not None


def test_equal_turns_have_one_machine() -> None:
    assert turn({"name": "add", "parameters": ADD}) is turn({"name": "add", "parameters": ADD})
    assert turn({"name": "add", "parameters": ADD}) is not turn({"name": "sum", "parameters": ADD})


def test_forgetting_a_turn_frees_what_was_visited_of_its_answer() -> None:
    answer = of_regex("[ab]{0,2000}c")
    machine = of_turn(Turn(answer=answer, thinks=True))
    assert machine.matches(b"a" * 1000 + b"c")
    visited = len(answer.terms)
    machine.forget()
    assert visited > 1000 > 10 * len(answer.terms)
    assert machine.matches(b"a" * 1000 + b"c")


def test_a_state_within_a_call_costs_the_fewest_symbols_to_its_end() -> None:
    machine = turn({"name": "add", "parameters": ADD}, must_call=True, thinks=True)
    assert machine.terms.least(machine.start) == len(symbols(machine, '<|tool_call>call:add{a:<|"|><|"|>}<tool_call|>'))
    inside = machine.after(machine.start, symbols(machine, "<|channel>thought"))
    assert inside is not None and machine.terms.least(inside) < UNBOUNDED
    assert written(machine, completion(machine, inside))[1] == "<channel|>"
