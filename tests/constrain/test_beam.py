"""Tests of the projection by a beam: it is exact where the beam holds all states, and it always matches."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dgemma_mlx import Constraint
from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.constrain.automaton import automaton_of
from dgemma_mlx.constrain.beam import BeamProjector
from dgemma_mlx.constrain.languages import of_regex
from dgemma_mlx.constrain.machine import BYTES, Machine
from dgemma_mlx.constrain.projection import Projected
from dgemma_mlx.constrain.terms import Term, Terms
from dgemma_mlx.constrain.tokens import TokenMachine
from dgemma_mlx.constrain.visited import Spelling, Visited
from dgemma_mlx.text import load_tokenizer
from dgemma_mlx.text.tokenizer import Tokenizer
from tests.constrain.small import EOS, EXTRA, PAD, REGEXES, TURN, canvases, marginals_of, shares, tokenizer_of

TREE = {
    "$ref": "#/$defs/tree",
    "$defs": {
        "tree": {
            "type": "object", "required": ["v", "kids"], "additionalProperties": False,
            "properties": {
                "v": {"type": "string", "maxLength": 500}, "n": {"type": "number"},
                "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
            },
        }
    },
}  # fmt: skip


def visited_of(machine: Machine, tokenizer: Tokenizer, eos: tuple[int, ...] = (EOS, TURN)) -> Visited:
    return Visited(machine, Spelling(machine, tokenizer, eos, PAD, tokenizer.vocab_size))


def projected(
    visited: Visited, state: Term, room: int, logits: np.ndarray, width: int, uniforms: np.ndarray | None = None
) -> Projected:
    """Project a canvas with logits (C, V) and the whole vocabulary as candidates."""
    C, V = logits.shape
    ids = np.broadcast_to(np.arange(V, dtype=np.int32), (C, V))
    projector = BeamProjector(visited, state, room, width)
    scores = logits[:, projector.skeleton]
    return projector(scores, ids, logits, np.zeros(C) if uniforms is None else uniforms)


@given(data=st.data(), width=st.sampled_from((1, 2, 1000)))
@settings(max_examples=100)
def test_a_beam_of_all_states_equals_all_canvases(data: st.DataObject, width: int) -> None:
    """Argmax, entropy and gap agree with the enumeration of all canvases; a narrow beam's canvases are among them."""
    machine = of_regex(data.draw(st.sampled_from(REGEXES)))
    tokenizer = tokenizer_of("a", "b", *data.draw(st.lists(st.sampled_from(EXTRA), max_size=2, unique=True)))
    visited = visited_of(machine, tokenizer)
    automaton, numbers = automaton_of(machine, 100)
    text = data.draw(st.text("ab", max_size=3)).encode()
    state = machine.after(machine.start, text)
    assume(state is not None)
    assert state is not None
    places = np.array([visited.number(term) for term in numbers])
    visited.spell_out(places)
    needed = dict(zip(numbers.values(), visited.spell[places].tolist(), strict=True))
    length, room = data.draw(st.integers(1, 4)), needed[numbers[state]] + data.draw(st.integers(0, 6))
    sharpness = data.draw(st.sampled_from((0.0, 1.0, 30.0, 400.0)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    logits = sharpness * rng.normal(size=(length, tokenizer.vocab_size))
    every = list(canvases(automaton, tokenizer, text, length, room, needed))
    found = projected(visited, state, room, logits, width, rng.random(length))
    assert tuple(found.argmax.tolist()) in every and tuple(found.sample.tolist()) in every
    assert (found.entropy >= 0).all() and (found.gap >= 0).all()
    if width < 1000:
        return
    share = shares(every, logits)
    assert share[every.index(tuple(found.argmax.tolist()))] == pytest.approx(share.max())
    _, _, entropy = marginals_of(every, logits)
    np.testing.assert_allclose(found.entropy, entropy, atol=1e-9)


def test_samples_have_the_probabilities_of_the_canvases() -> None:
    tokenizer, machine = tokenizer_of("a", "b", "ab"), of_regex("(ab|ba)*")
    visited, rng = visited_of(machine, tokenizer), np.random.default_rng(0)
    logits = rng.normal(size=(3, tokenizer.vocab_size))
    automaton, numbers = automaton_of(machine, 100)
    places = np.array([visited.number(term) for term in numbers])
    visited.spell_out(places)
    needed = dict(zip(numbers.values(), visited.spell[places].tolist(), strict=True))
    every = list(canvases(automaton, tokenizer, b"", 3, 5, needed))
    counts = dict.fromkeys(every, 0)
    for _ in range(3000):
        counts[tuple(projected(visited, machine.start, 5, logits, 1000, rng.random(3)).sample.tolist())] += 1
    np.testing.assert_allclose(np.array(list(counts.values())) / 3000, shares(every, logits), atol=0.03)


@pytest.mark.parametrize("schema", [TREE, {"type": "object"}, {"type": "array", "minItems": 12}])
@pytest.mark.parametrize("sharpness", [0.0, 3.0, 50.0])
def test_answers_of_several_canvases_match_and_end_in_time(schema: Any, sharpness: float) -> None:
    """Random logits, few candidates, several steps a canvas, and room for little more than the shortest answer."""
    tokenizer, constraint = load_tokenizer(DEMO_FOLDER), Constraint.json_schema(schema)
    machine = TokenMachine(constraint.machine, tokenizer, (1, 106), PAD, 768)
    assert not machine.is_exact
    rng, C, k = np.random.default_rng(0), 16, 8
    for extra in (0, 1, 20, 60):
        state: Term | None = machine.start
        text, room = b"", machine.shortest(machine.start) + extra
        while state is not machine.ended:
            assert state is not None and machine.shortest(state) <= room
            projector = machine.projector(state, room)
            for _ in range(2):
                logits = sharpness * rng.normal(size=(C, 768))
                ids = np.stack([rng.permutation(768)[:k] for _ in range(C)]).astype(np.int32)
                scores = np.take_along_axis(logits, ids, axis=1)
                found = projector(logits[:, projector.skeleton], ids, scores, rng.random(C))
            committed = (found.argmax if extra % 2 else found.sample).tolist()[:room]
            state, room = machine.advance(state, committed), room - C
            ends = next((n for n, id in enumerate(committed) if id in (1, 106)), len(committed))
            text += b"".join(tokenizer.token_bytes(id) for id in committed[:ends])
            assert set(committed[ends:]) <= {0, 1, 106}
        assert constraint.matches(text.decode())
        json.loads(text)


def test_a_projection_does_not_depend_on_earlier_answers() -> None:
    """States and tokens of a machine that was used before have other numbers."""
    tokenizer, machine = load_tokenizer(DEMO_FOLDER), Constraint.json_schema(TREE).machine
    rng = np.random.default_rng(1)
    logits, uniforms = 3 * rng.normal(size=(20, 768)), rng.random(20)
    ids = np.stack([rng.permutation(768)[:12] for _ in range(20)]).astype(np.int32)
    used = visited_of(machine, tokenizer, (1, 106))
    for seed in range(3):
        other = np.random.default_rng(seed)
        begin = machine.after(machine.start, b'{"v": "' + b"x" * seed)
        assert begin is not None
        projected(used, begin, 200, 3 * other.normal(size=(20, 768)), 24, other.random(20))
    found = []
    for visited in (visited_of(machine, tokenizer, (1, 106)), used):
        projector = BeamProjector(visited, machine.start, 100)
        for _ in range(2):
            scores = np.take_along_axis(logits, ids, axis=1)
            found.append(projector(logits[:, projector.skeleton], ids, scores, uniforms))
    for fresh, after in zip(found[:2], found[2:], strict=True):
        np.testing.assert_array_equal(fresh.argmax, after.argmax)
        np.testing.assert_array_equal(fresh.sample, after.sample)
        np.testing.assert_allclose(fresh.entropy, after.entropy, atol=1e-9)


def test_control_tokens_are_symbols() -> None:
    """A text with a control token in it, which the characters of its name are not."""
    terms = Terms(BYTES + 1)
    letters, mark = terms.repeat(terms.symbols(0b110 << 96), 1), terms.symbols(1 << BYTES)  # [ab]+ and <turn|>
    machine = Machine(terms, terms.sequence(letters, mark, letters), ["<turn|>"])
    tokenizer = tokenizer_of("a", "b", "<turn|", ">")
    over = TokenMachine(machine, tokenizer, (EOS,), PAD, tokenizer.vocab_size)
    rng = np.random.default_rng(0)
    for room in (4, 5, 9):
        projector = over.projector(machine.start, room)
        logits = rng.normal(size=(10, tokenizer.vocab_size))
        ids = np.broadcast_to(np.arange(tokenizer.vocab_size, dtype=np.int32), logits.shape)
        found = projector(logits[:, projector.skeleton], ids, logits, rng.random(10))
        for canvas in (found.argmax.tolist(), found.sample.tolist()):
            end = canvas.index(EOS)
            assert end < room and canvas.count(TURN) == 1 and set(canvas[:end]) <= {TURN, 3, 4}
            assert 0 < canvas.index(TURN) < end - 1
            assert over.advance(machine.start, canvas) is over.ended
