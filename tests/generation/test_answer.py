"""Committing one canvas to an answer: where it is cut, and when the answer ends."""

from __future__ import annotations

import re
from typing import Any

import pytest

import dgemma_mlx
from dgemma_mlx import Constraint, Draft, Model
from dgemma_mlx.constrain.canvas import ConstraintState
from dgemma_mlx.constrain.tokens import TokenMachine
from dgemma_mlx.generation.answer import Answer, call_prefix
from dgemma_mlx.generation.options import GenerationOptions
from dgemma_mlx.generation.pictures import PromptIds
from dgemma_mlx.generation.request import Asked, begin
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
            answer.count_step(4)
        taken.append(answer.commit(draft_of(canvas), (), is_cancelled=False).steps)
    assert taken == [3, 1] and answer.steps == 4


def test_what_is_written_takes_from_the_positions_that_a_constrained_answer_may_still_fill(demo: Model) -> None:
    """Of 15 positions, three are the prompt's: three canvases of four fit, and after the first one two."""
    ends, vocab_size = demo.generation.eos_token_ids, demo.config.text.vocab_size
    machine = TokenMachine(Constraint.regex("[a-z]*").machine, demo.tokenizer, ends, 0, vocab_size)
    answer = answer_of(demo, max_positions=15, constraint=ConstraintState.first(machine))
    rooms = []
    for _ in range(2):
        start = answer.row_start(4)
        assert start is not None
        rooms.append(start.room)
        answer.commit(draft_of(demo.tokenizer.encode("abcd")[:4]), (), is_cancelled=False)
    assert rooms == [12, 8]


CALL = '<|tool_call>call:f{a:<|"|>x<|"|>'


def canvas_of(model: Model, text: str) -> Draft:
    return draft_of(model.tokenizer.encode_control(text))


@pytest.mark.parametrize("end", ["}<tool_call|><turn|>", "}<turn|>", "}<|tool_response>", "<|tool_response>"])
def test_an_answer_that_ends_with_a_call_ends_for_its_sake(demo: Model, end: str) -> None:
    answer = answer_of(demo)
    event = answer.commit(canvas_of(demo, "Well." + CALL + end), (), is_cancelled=False)
    done = answer.done(0, 0.0, 1.0)
    assert done.finish_reason == "tool_calls" and done.text == "Well."
    assert [(call.name, call.arguments, call.id) for call in done.tool_calls] == [("f", {"a": "x"}, "call_0")]
    assert event.tool_calls == done.tool_calls


def test_a_call_in_an_earlier_canvas_counts_and_a_block_that_is_no_call_does_not(demo: Model) -> None:
    answer = answer_of(demo)
    answer.commit(canvas_of(demo, CALL + "}<tool_call|>"), (), is_cancelled=False)
    assert answer.finish_reason is None
    answer.commit(canvas_of(demo, "done<turn|>"), (), is_cancelled=False)
    assert answer.finish_reason == "tool_calls"
    answer = answer_of(demo)
    answer.commit(canvas_of(demo, "<|tool_call>call:f{a}<tool_call|><turn|>"), (), is_cancelled=False)
    assert (answer.finish_reason, answer.parts.text) == ("stop", "call:f{a}")


@pytest.mark.parametrize("end", ["", "}"])
def test_a_call_that_is_cut_off_stays_text(demo: Model, end: str) -> None:
    """Also where nothing but a last brace or the closing token is missing."""
    canvas = canvas_of(demo, CALL + end)
    count = len(canvas.tokens)
    written = CALL.replace("<|tool_call>", "").replace('<|"|>', '"') + end
    for limits, cancelled, reason in (
        ({"max_tokens": count}, False, "length"),
        ({"max_positions": count + 3}, False, "length"),
        ({}, True, "cancelled"),
    ):
        answer = answer_of(demo, **limits)
        event = answer.commit(canvas, (), is_cancelled=cancelled)
        done = answer.done(0, 0.0, 1.0)
        assert (done.finish_reason, done.text, done.tool_calls) == (reason, written, ())
        assert event.text == written
    answer = answer_of(demo, max_tokens=count + 1)
    answer.commit(canvas_of(demo, CALL + end + "<tool_call|><turn|>"), (), is_cancelled=False)
    assert (answer.finish_reason, len(answer.parts.tool_calls)) == ("length", 1)  # the call itself is complete


def test_what_was_written_of_a_call_is_text_when_the_next_canvas_is_cancelled(demo: Model) -> None:
    answer = answer_of(demo)
    assert answer.commit(canvas_of(demo, "Well." + CALL), (), is_cancelled=False).text == "Well."
    done = answer.done(0, 0.0, 1.0)
    assert (done.finish_reason, done.text) == ("cancelled", 'Well.call:f{a:"x"')


def test_ids_of_calls_depend_on_the_prompt_and_the_seed_alone() -> None:
    prefixes = [call_prefix([5, 6], 1), call_prefix([5, 6], 2), call_prefix([56], 1), call_prefix([1, 5, 6], 1)]
    assert len(set(prefixes)) == 4
    assert call_prefix([5, 6], 1) == prefixes[0]
    assert all(re.fullmatch("call_[0-9a-f]{12}_", prefix) for prefix in prefixes)


def test_ids_of_calls_are_those_of_the_prompt_alone_also_in_a_batch(demo: Model) -> None:
    """The same prompt and seed have the same ids next to other prompts as alone."""
    call = demo.tokenizer.encode_control("<|tool_call>call:f{}<tool_call|>")

    def ids(prompts: list[list[int]], seeds: list[int]) -> list[str]:
        asked = [Asked(PromptIds(prompt), None, True) for prompt in prompts]
        runner = begin(demo, asked, seeds, [8] * len(prompts), GenerationOptions())
        return [answer.parser.feed(call).tool_calls[0].id for answer in runner._answers]

    together = ids([[5, 6, 7], [5, 6], [5, 6]], [1, 1, 2])
    assert together == [*ids([[5, 6, 7]], [1]), *ids([[5, 6]], [1]), *ids([[5, 6]], [2])]
    assert len(set(together)) == 3
