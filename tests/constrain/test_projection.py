"""Tests of the projection: dynamic programming agrees with the enumeration of all canvases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dgemma_mlx import Constraint
from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.constrain.automaton import automaton_of
from dgemma_mlx.constrain.projection import Projected, Projector
from dgemma_mlx.constrain.vocabulary import TokenAutomaton
from dgemma_mlx.text import load_tokenizer
from dgemma_mlx.text.tokenizer import Tokenizer
from tests.constrain import plain
from tests.constrain.small import (
    EOS,
    EXTRA,
    PAD,
    REGEXES,
    TURN,
    automaton_of_regex,
    canvases,
    marginals_of,
    shares,
    tokenizer_of,
)


def token_automaton_of(regex: str, tokenizer: Tokenizer) -> TokenAutomaton:
    return TokenAutomaton(automaton_of_regex(regex), tokenizer, (EOS, TURN), PAD, tokenizer.vocab_size)


def advanced(token_automaton: TokenAutomaton, state: int, ids: list[int]) -> int:
    """Return the state that the transitions of the tokens lead to, or -1."""
    for number in token_automaton.classes(np.array(ids, np.int32)):
        _, source, target = token_automaton.transitions(np.array([number]))
        state = dict(zip(source.tolist(), target.tolist(), strict=True)).get(state, -1)
    return state


def projected(
    token_automaton: TokenAutomaton, state: int, room: int, logits: np.ndarray, uniforms: np.ndarray | None = None
) -> Projected:
    """Project a canvas with logits (C, V) and the whole vocabulary as candidates."""
    C, V = logits.shape
    ids = np.broadcast_to(np.arange(V, dtype=np.int32), (C, V))
    scores = logits[:, token_automaton.skeleton]
    projector = Projector(token_automaton, state, room)
    return projector(scores, ids, logits, np.zeros(C) if uniforms is None else uniforms)


@given(data=st.data())
@settings(max_examples=60)
def test_projection_equals_all_canvases(data: st.DataObject) -> None:
    """Argmax, sample, entropy and gap agree, from any state, with ends, padding and a limit on tokens."""
    regex = data.draw(st.sampled_from(REGEXES))
    tokenizer = tokenizer_of("a", "b", *data.draw(st.lists(st.sampled_from(EXTRA), max_size=2, unique=True)))
    token_automaton = token_automaton_of(regex, tokenizer)
    automaton = automaton_of_regex(regex)
    text = data.draw(st.text("ab", max_size=3)).encode()
    state = automaton.after(0, text)
    assume(state >= 0)
    length, extra = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 6))
    room = int(token_automaton.shortest[state]) + extra
    sharpness = data.draw(st.sampled_from((0.0, 1.0, 30.0, 400.0)))
    seed = data.draw(st.integers(0, 2**32 - 1))
    logits = sharpness * np.random.default_rng(seed).normal(size=(length, tokenizer.vocab_size))

    needed = dict(enumerate(token_automaton.shortest.tolist()))
    every = list(canvases(automaton, tokenizer, text, length, room, needed))
    share = shares(every, logits)
    found = projected(token_automaton, state, room, logits)
    assert tuple(found.argmax.tolist()) in every and tuple(found.sample.tolist()) in every
    assert share[every.index(tuple(found.argmax.tolist()))] == pytest.approx(share.max())
    marginals, own, entropy = marginals_of(every, logits)
    np.testing.assert_allclose(found.entropy, entropy, atol=1e-9)
    first = marginals.argmax(axis=1)
    lead = [min(p[best] - np.delete(p, best).max() for p in (marginals[i], own[i])) for i, best in enumerate(first)]
    np.testing.assert_allclose(found.gap, np.maximum(lead, 0), atol=1e-9)


TEXT = {"type": "string"}
PROPERTIES: tuple[dict[str, Any], ...] = (
    {"name": TEXT, "age": {"type": "integer"}, "tags": {"type": "array", "items": TEXT}},
    {"a": {"type": "string", "maxLength": 9}, "b": {"type": "number"}},
)


@given(data=st.data())
@settings(max_examples=60)
def test_projection_equals_its_plain_form(data: st.DataObject) -> None:
    """On automata and vocabularies that are too large to enumerate, with a part of the vocabulary as candidates."""
    tokenizer, vocab_size = load_tokenizer(DEMO_FOLDER), 768
    properties = data.draw(st.sampled_from(PROPERTIES))
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    automaton = automaton_of(Constraint.json_schema(schema).machine, 2000)[0]
    token_automaton = TokenAutomaton(automaton, tokenizer, (1, 106), 0, vocab_size)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    state = data.draw(st.integers(0, automaton.size))
    C = data.draw(st.integers(1, 40))
    room = int(token_automaton.shortest[state]) + data.draw(st.integers(0, 60))
    k = data.draw(st.integers(1, 40))
    projector = Projector(token_automaton, state, room)
    for _ in range(2):  # the second step has tokens of new classes, and classes without tokens
        logits = data.draw(st.sampled_from((0.0, 1.0, 10.0, 60.0, 2000.0))) * rng.normal(size=(C, vocab_size))
        ids = np.stack([rng.permutation(vocab_size)[:k] for _ in range(C)]).astype(np.int32)
        step = logits[:, token_automaton.skeleton], ids, np.take_along_axis(logits, ids, axis=1), rng.random(C)
        found, expected = projector(*step), plain.project(token_automaton, state, room, *step)
        np.testing.assert_array_equal(found.argmax, expected.argmax)
        np.testing.assert_array_equal(found.sample, expected.sample)
        np.testing.assert_allclose(found.entropy, expected.entropy, atol=1e-9)
        np.testing.assert_allclose(found.gap, expected.gap, atol=1e-9)


def test_a_sample_does_not_depend_on_earlier_answers() -> None:
    """The classes of an automaton that was used before have other numbers."""
    tokenizer = tokenizer_of("a", "b", "aba", "abab", "babab")
    fresh, used = (token_automaton_of("[ab]{2,20}", tokenizer) for _ in range(2))
    rng = np.random.default_rng(0)
    for id in reversed(range(tokenizer.vocab_size)):
        used.classes(np.array([id], np.int32))
    for _ in range(50):
        logits, uniforms = rng.normal(size=(4, tokenizer.vocab_size)), rng.random(4)
        one, other = (projected(each, 0, 9, logits, uniforms) for each in (fresh, used))
        np.testing.assert_array_equal(one.sample, other.sample)


def test_samples_are_drawn_in_proportion() -> None:
    tokenizer = tokenizer_of("a", "b", "ab")
    token_automaton, automaton = token_automaton_of("(ab|ba)*", tokenizer), automaton_of_regex("(ab|ba)*")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, tokenizer.vocab_size))
    every = list(canvases(automaton, tokenizer, b"", 3, 5, dict(enumerate(token_automaton.shortest.tolist()))))
    counts = dict.fromkeys(every, 0)
    draws = 3000
    for _ in range(draws):
        counts[tuple(projected(token_automaton, 0, 5, logits, rng.random(3)).sample.tolist())] += 1
    expected = draws * shares(every, logits)
    squares = (np.array([counts[canvas] for canvas in every]) - expected) ** 2 / expected
    assert len(every) > 10
    assert squares.sum() < len(every) + 5 * np.sqrt(2 * len(every))  # chi square, five deviations above its mean


def test_extreme_logits_still_give_matching_canvases() -> None:
    """Logits that are NaN or infinite, and logits whose probabilities underflow."""
    tokenizer = tokenizer_of("a", "b", "ab")
    token_automaton = token_automaton_of("(ab){3}", tokenizer)
    for value in (np.nan, np.inf, -np.inf):
        found = projected(token_automaton, 0, 9, np.full((8, tokenizer.vocab_size), value))
        for canvas in (found.argmax, found.sample):
            assert advanced(token_automaton, 0, canvas.tolist()) == token_automaton.end
        assert np.isfinite(found.entropy).all()
    logits = np.zeros((200, tokenizer.vocab_size))  # certain of padding, but six positions need other tokens
    logits[:, PAD] = 200.0
    found = projected(token_automaton, 0, 300, logits)
    assert advanced(token_automaton, 0, found.argmax.tolist()) == token_automaton.end
    np.testing.assert_allclose(found.entropy[7:], 0, atol=1e-9)


@pytest.mark.parametrize("room", [4, 5, 6, 8, 11])
def test_a_text_that_never_ends_by_itself_ends_within_its_room(room: int) -> None:
    """Several canvases in a row, with logits that always favor continuing the text."""
    tokenizer = tokenizer_of("a", "b")
    token_automaton = token_automaton_of("a+bb", tokenizer)
    logits = np.zeros((3, tokenizer.vocab_size))
    logits[:, 3] = 50.0
    state, left, text = 0, room, []
    while state != token_automaton.end:
        found = projected(token_automaton, state, left, logits)
        state = advanced(token_automaton, state, found.argmax.tolist())
        text += found.argmax.tolist()
        left -= 3
    end = next(position for position, id in enumerate(text) if id in (EOS, TURN))
    assert text[:end] == [3] * (room - 3) + [4, 4] and end + 1 == room


def test_a_long_canvas_has_more_paths_than_a_float_can_count() -> None:
    """Twelve tokens that are alike at 300 positions make 12^300 paths, above 1e308."""
    tokenizer = tokenizer_of(*"abcdefghijkl")
    logits = np.zeros((300, tokenizer.vocab_size))
    logits[:, [PAD, EOS, TURN]] = -50.0
    found = projected(token_automaton_of("[a-l]*", tokenizer), 0, 1000, logits)
    np.testing.assert_allclose(found.entropy, np.log(12), rtol=1e-6)


def test_a_path_that_is_hardly_ever_taken_stays_possible() -> None:
    """Twelve times "b", where "a" is all but certain, leads to the only state in which "b" may follow."""
    tokenizer = tokenizer_of("a", "b")
    logits = np.zeros((20, tokenizer.vocab_size))
    logits[:, 3], logits[14, 4] = 100.0, 200.0
    found = projected(token_automaton_of("b{0,20}a*", tokenizer), 0, 100, logits)
    assert found.argmax.tolist() == [3] * 20
    np.testing.assert_allclose(found.entropy[14], 100, rtol=1e-6)
