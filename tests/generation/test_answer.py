"""Committing one canvas to an answer: where it is cut, and when the answer ends."""

from __future__ import annotations

from typing import Any

import pytest

import dgemma_mlx
from dgemma_mlx import Constraint, Draft, Model
from dgemma_mlx.constrain.canvas import ConstraintState
from dgemma_mlx.constrain.vocabulary import TokenAutomaton
from dgemma_mlx.generation.answer import Answer
from dgemma_mlx.text.parts import PartsParser


@pytest.fixture(scope="module")
def demo() -> Model:
    return dgemma_mlx.load("demo")


def answer_of(model: Model, **changes: Any) -> Answer:
    marks = frozenset(model.tokenizer.special_ids.values())
    given: dict[str, Any] = {"prompt_ids": [5, 6, 7], "max_tokens": 100, "max_positions": 1000, **changes}
    return Answer(seed=1, config=model.generation, parser=PartsParser(model.tokenizer), marks=marks, **given)


def draft_of(ids: list[int]) -> Draft:
    return Draft(0, 1, 8, tuple(ids), (True,) * len(ids), (0.0,) * len(ids), finished=True, settled_by="stable")


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("which", [0, -1])
def test_an_end_of_text_id_ends_the_answer_at_every_place_of_the_canvas(demo: Model, place: int, which: int) -> None:
    eos = demo.generation.eos_token_ids[which]
    canvas = demo.tokenizer.encode("abcd")[:4]
    assert len(canvas) == 4
    canvas[place] = eos
    answer = answer_of(demo)
    event = answer.commit(draft_of(canvas), (), is_cancelled=False)
    assert answer.finish_reason == "stop"
    assert answer.tokens == list(event.tokens) == canvas[: place + 1]


def test_doubts_count_up_to_where_the_canvas_is_cut(demo: Model) -> None:
    canvas = demo.tokenizer.encode("abcd")[:4]
    canvas[1] = demo.generation.eos_token_ids[0]
    answer = answer_of(demo)
    assert answer.commit(draft_of(canvas), (0, 1, 2, 3), is_cancelled=False).doubted == (0, 1)
    assert answer.doubted == 2


def test_the_steps_of_a_canvas_are_counted_from_its_own_first_step(demo: Model) -> None:
    answer, canvas = answer_of(demo), demo.tokenizer.encode("abcd")[:4]
    taken = []
    for steps in (3, 1):
        for _ in range(steps):
            answer.count_step()
        taken.append(answer.commit(draft_of(canvas), (), is_cancelled=False).steps)
    assert taken == [3, 1] and answer.steps == 4


def test_what_is_written_takes_from_the_positions_that_a_constrained_answer_may_still_fill(demo: Model) -> None:
    """Of 15 positions, three are the prompt's: three canvases of four fit, and after the first one two."""
    ends, vocab_size = demo.generation.eos_token_ids, demo.config.text.vocab_size
    automaton = TokenAutomaton(Constraint.regex("[a-z]*").automaton, demo.tokenizer, ends, 0, vocab_size)
    answer = answer_of(demo, max_positions=15, constraint=ConstraintState(automaton))
    rooms = []
    for _ in range(2):
        start = answer.row_start(4)
        assert start is not None
        rooms.append(start.room)
        answer.commit(draft_of(demo.tokenizer.encode("abcd")[:4]), (), is_cancelled=False)
    assert rooms == [12, 8]
