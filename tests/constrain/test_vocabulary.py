"""Tests of token automata, whose tokens lead where their bytes lead, and of the search for candidates."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import dgemma_mlx
from dgemma_mlx import Constraint, DgemmaError
from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.constrain.automaton import Automaton, automaton_of
from dgemma_mlx.constrain.candidates import top_ids
from dgemma_mlx.constrain.languages import of_regex
from dgemma_mlx.constrain.tokens import TokenMachine
from dgemma_mlx.constrain.vocabulary import TokenAutomaton
from dgemma_mlx.text import Tokenizer, load_tokenizer
from tests.constrain.small import EOS, PAD, TURN, tokenizer_of

DEMO = Path(dgemma_mlx.__file__).parent / "demo"
RECORD = {
    "type": "object", "properties": {"é": {"type": "string"}, "n": {"type": "number"}}, "required": ["é"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return load_tokenizer(DEMO)


def over(constraint: Constraint, tokenizer: Tokenizer, vocab_size: int = 768) -> TokenMachine:
    return constraint.over(tokenizer, GenerationConfig(eos_token_ids=(1, 106, 50)), vocab_size)


def automata(constraint: Constraint, tokenizer: Tokenizer, vocab_size: int = 768) -> tuple[Automaton, TokenAutomaton]:
    automaton = automaton_of(constraint.machine, 2000)[0]
    return automaton, TokenAutomaton(automaton, tokenizer, (1, 106), 0, vocab_size)


@pytest.mark.parametrize("constraint", [Constraint.json_schema(RECORD), Constraint.regex(".*[é京]?[a-f ]{2}")])
def test_every_token_leads_where_its_bytes_lead(demo: Tokenizer, constraint: Constraint) -> None:
    automaton, token_automaton = automata(constraint, demo)
    classes = token_automaton.classes(np.arange(768, dtype=np.int32))
    for id in range(768):
        _, source, target = token_automaton.transitions(classes[id : id + 1])
        found = dict(zip(source.tolist(), target.tolist(), strict=True))
        text = demo.token_bytes(id)
        targets = {state: automaton.after(state, text) for state in range(automaton.size)} if text else {}
        expected = {state: to for state, to in targets.items() if to >= 0}
        if id in (1, 106):
            expected = dict.fromkeys(np.flatnonzero(automaton.accepting).tolist(), token_automaton.end)
        if id in (0, 1, 106):
            expected[token_automaton.end] = token_automaton.end
        assert found == expected, demo.token(id)


def test_shortest_counts_the_skeleton_tokens_to_the_end(demo: Tokenizer) -> None:
    """From each state some skeleton token leads to a state that is one token nearer to the end."""
    token_automaton = automata(Constraint.json_schema(RECORD), demo)[1]
    index, source, target = token_automaton.transitions(token_automaton.classes(token_automaton.skeleton))
    assert len(index)
    nearest = np.full(token_automaton.end + 1, 1 << 40)
    np.minimum.at(nearest, source, token_automaton.shortest[target])
    assert token_automaton.shortest[token_automaton.end] == 0
    np.testing.assert_array_equal(token_automaton.shortest[: token_automaton.end], nearest[: token_automaton.end] + 1)


def test_ids_of_bytes(demo: Tokenizer) -> None:
    for id in range(768):
        data = demo.token_bytes(id)
        if data:
            other = demo.id_of_bytes(data)
            assert other is not None and demo.token_bytes(other) == data
    assert demo.id_of_bytes(b"") is None
    assert demo.id_of_bytes("▁".encode()) is None  # in the vocabulary it stands for a space
    assert demo.id_of_bytes(b"<eos>") is None
    assert demo.token_bytes(demo.id_of_bytes(b"\xe2") or 0) == b"\xe2"


def test_a_vocabulary_that_cannot_write_the_texts_is_an_error() -> None:
    with pytest.raises(DgemmaError, match="lacks tokens"):
        TokenMachine(of_regex("a|xy"), tokenizer_of("a", "x"), (EOS, TURN), PAD, 5)


def test_a_model_may_have_fewer_tokens_than_its_tokenizer(demo: Tokenizer) -> None:
    token_automaton = automata(Constraint.regex("[a-z]{40}"), demo, 500)[1]
    assert token_automaton.skeleton.max() < 500


def test_equal_constraints_are_compiled_once(demo: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}}
    asked = Constraint.response_format({"type": "json_schema", "json_schema": {"schema": schema}})
    assert asked is not None
    constraints = [Constraint.json_schema(schema), Constraint.json_schema(dict(schema)), asked]
    assert len({id(constraint.machine) for constraint in constraints}) == 1
    assert len({id(over(constraint, demo)) for constraint in constraints}) == 1
    turned = {**schema, "properties": dict(reversed(schema["properties"].items()))}  # other texts match this one
    assert over(Constraint.json_schema(turned), demo) is not over(constraints[0], demo)


def test_a_kept_automaton_belongs_to_one_model(demo: Tokenizer) -> None:
    constraint = Constraint.regex("[a-z]{4}")
    first = over(constraint, demo)
    assert over(constraint, demo) is first
    assert over(constraint, demo, 700) is not first
    assert over(constraint, load_tokenizer(DEMO)) is not first


def test_few_automata_are_kept_and_none_without_its_tokenizer() -> None:
    tokenizer = load_tokenizer(DEMO)
    first = weakref.ref(over(Constraint.regex("a{30}"), tokenizer))
    for length in range(8):
        over(Constraint.regex(f"a{{{length}}}"), tokenizer)
    gc.collect()
    assert first() is None
    last = weakref.ref(over(Constraint.regex("a{7}"), tokenizer))
    assert last() is not None
    del tokenizer
    gc.collect()
    assert last() is None


def test_threads_share_an_automaton(demo: Tokenizer) -> None:
    """All threads compile the same constraint and ask for all classes at the same time."""
    pattern = "([a-z]{1,3} ?){1,9}!"
    ids, begin = np.arange(768, dtype=np.int32), threading.Barrier(4)
    shared, kept = automata(Constraint.regex(pattern), demo)[1], []

    def ask(shift: int) -> tuple[TokenAutomaton, list[str]]:
        begin.wait()
        machine = over(Constraint.regex(pattern), demo)
        kept.append(machine)
        shared.classes(np.roll(ids, shift))
        return shared, transitions(shared)

    def transitions(automaton: TokenAutomaton) -> list[str]:
        return [str(automaton.transitions(automaton.classes(ids[id : id + 1]))[1:]) for id in range(768)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, (0, 100, 300, 500)))
    alone = automata(Constraint.regex(pattern), demo)[1]
    assert all(machine is kept[0] for machine in kept)
    for automaton, each in found:
        assert automaton is found[0][0] and each == transitions(alone)


@pytest.mark.parametrize("size", [5, 64, 700, 5000, 70_001])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_top_ids_are_the_largest(size: int, dtype: mx.Dtype) -> None:
    logits = mx.random.normal((2, 3, size), key=mx.random.key(size)).astype(dtype)
    ids = np.array(top_ids(logits, 8))
    values = np.array(logits.astype(mx.float32))
    assert ids.shape == (2, 3, min(8, size))
    found = np.sort(np.take_along_axis(values, ids, axis=-1), axis=-1)
    np.testing.assert_array_equal(found, np.sort(values, axis=-1)[..., -ids.shape[-1] :])
    assert all(len(set(row)) == len(row) for row in ids.reshape(-1, ids.shape[-1]).tolist())


def test_top_ids_of_nan_and_infinity_are_valid_ids() -> None:
    for value in (mx.nan, -mx.inf, mx.inf):
        ids = np.array(top_ids(mx.full((1, 2, 5000), value), 8))
        assert ((ids >= 0) & (ids < 5000)).all()


def test_states_that_take_long_to_explore_are_left_to_the_beam(demo: Tokenizer) -> None:
    """All states of this schema (JSONSchemaBench, allOfPProp10) take more time than compiling may; few are visited."""
    schema = {
        "type": "object", "maxProperties": 1,
        "allOf": [
            {"anyOf": [
                {"patternProperties": {"^.{1,2}$": True}, "additionalProperties": False},
                {"patternProperties": {"^...*a$": {"type": "integer", "multipleOf": 2.5, "minimum": 15}},
                 "additionalProperties": False},
            ]},
            {"anyOf": [{"not": {"patternProperties": {"^cdeb": False}}},
                       {"not": {"patternProperties": {"^11": {"not": {"multipleOf": 7}}}}}]},
            {"anyOf": [{"not": {"patternProperties": {"^kwjh": False}}},
                       {"not": {"patternProperties": {"7777": {"multipleOf": 30}}}}]},
        ],
        "patternProperties": {"a": {"multipleOf": 10, "not": {"multipleOf": 20}}},
    }  # fmt: skip
    over = Constraint.json_schema(schema).over(demo, GenerationConfig(), 768)
    assert over.shortest(over.start) < 100
