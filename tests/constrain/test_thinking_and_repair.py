"""A constraint after a thought, and a constraint whose canvases the encoder repairs; of the demo model."""

from __future__ import annotations

import json
import re
from typing import Any

import mlx.core as mx
import pytest
from jsonschema import Draft202012Validator

import dgemma_mlx
from dgemma_mlx import Committed, Constraint, Done, Draft, Model, generate, generate_batch, stream
from dgemma_mlx.constrain.canvas import ConstraintState, RowStart
from dgemma_mlx.constrain.turns import Turn, of_turn

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
RECORD = Constraint.json_schema(SCHEMA)
ROW = Constraint.regex("[0-9]( [0-9]){2}")
NUMBERS = Constraint.regex("[0-9]{1,2}( [0-9]{1,2}){7}")
# More states than are considered at once, so that a beam is.
LONG = Constraint.regex("(x?[0-9]){1,40}( y?[0-9]{1,99}){2}(z{0,50}a){0,40}")


@pytest.fixture(scope="module")
def demo() -> Model:
    return dgemma_mlx.load("demo")


def row_start(model: Model, constraint: Constraint, room: int) -> RowStart:
    machine = constraint.over(model.tokenizer, model.generation, model.config.text.vocab_size)
    return RowStart(ConstraintState.first(machine), room)


def in_few_steps(model: Model, steps: int = 2) -> Any:
    return model.generation.override(max_denoising_steps=steps)


@pytest.mark.parametrize("constraint", [ROW, RECORD])
def test_what_follows_a_thought_matches(demo: Model, constraint: Constraint) -> None:
    options: Any = {"constraint": constraint, "thinking": True, "max_tokens": 40, "generation": in_few_steps(demo)}
    together = generate_batch(demo, ["Sort 7 3 5"] * 2, seeds=[0, 1], **options)
    for done in together:
        assert constraint.matches(done.text) and done.finish_reason == "stop"
        text, answer = demo.tokenizer.decode(done.tokens, keep_special=True), re.escape(done.text)
        assert re.fullmatch(rf"(<\|channel>.*<channel\|>)?{answer}<[a-z|]+>(<pad>)*", text, re.DOTALL)
    assert generate(demo, "Sort 7 3 5", seed=1, **options).tokens == together[1].tokens


def test_a_thought_is_written_where_the_model_begins_one(demo: Model) -> None:
    """The prompt's end stands for a model that thinks: the answer begins within the thought."""
    machine = of_turn(Turn(ROW.machine, thinks=True))
    over = Constraint(machine, "it").over(demo.tokenizer, demo.generation, demo.config.text.vocab_size)
    ids = demo.tokenizer.encode_control("<|channel>thought\nSmallest first.\n<channel|>3 5 7<turn|>")
    assert over.advance(over.start, ids) is over.ended
    assert over.advance(over.start, ids[:-6]) is not None
    for wrong in ("<|channel>thought<turn|>", "3 5<turn|>", "<|channel><|channel>", "<channel|>", "<|tool_call>"):
        assert over.advance(over.start, demo.tokenizer.encode_control(wrong)) is None, wrong
    inside = over.advance(over.start, ids[:3])
    assert inside is not None and over.shortest(inside) <= 7  # closes the thought, writes a row, ends


@pytest.mark.parametrize("constraint", [NUMBERS, RECORD, LONG])
def test_a_repaired_canvas_matches(demo: Model, constraint: Constraint) -> None:
    options: Any = {"constraint": constraint, "max_tokens": 40, "generation": in_few_steps(demo, 1)}
    events = list(stream(demo, "Count from 3 to 47.", seed=0, verify="repair", speed="reference", **options))
    done = events[-1]
    assert isinstance(done, Done) and constraint.matches(done.text) and done.finish_reason == "stop"
    assert max(event.attempt for event in events if isinstance(event, Draft)) > 1


def test_repair_ends_in_what_the_encoder_would_write_where_it_matches(demo: Model) -> None:
    """Of canvases that one step has written, every token that is still doubted is one that could not be replaced."""
    replaced = 0
    for number in range(2):
        prompt = f"Sort 5 2 {number} 44 31 8 67 {5 * number}"
        options: Any = {"constraint": NUMBERS, "generation": in_few_steps(demo, 1), "speed": "reference", "seed": 3}
        flagged = generate(demo, prompt, verify="flag", **options)
        events = list(stream(demo, prompt, verify="repair", **options))
        done, committed = events[-1], next(event for event in events if isinstance(event, Committed))
        assert isinstance(done, Done) and NUMBERS.matches(done.text)
        expected = expected_by_the_encoder(demo, demo.encode_prompt(prompt), list(done.tokens))
        doubted = {n: other for n, (id, other) in enumerate(zip(done.tokens, expected, strict=True)) if id != other}
        assert committed.doubted == tuple(doubted)
        assert row_start(demo, NUMBERS, 1024).first_allowed(done.tokens, doubted) is None
        replaced += done.tokens != flagged.tokens
    assert replaced


def expected_by_the_encoder(model: Model, prompt: list[int], written: list[int]) -> list[int]:
    cache = model.network.new_cache()
    hidden = model.network.encode(mx.array([prompt + written], mx.int32), cache)
    expected: Any = mx.argmax(model.network.project(hidden), axis=-1).tolist()
    return expected[0][len(prompt) - 1 : -1]  # type: ignore[no-any-return]


@pytest.mark.parametrize("constraint", [Constraint.regex("(ab|ac){2}"), Constraint.regex("(ab|ac){2}|x{2000}")])
def test_where_another_token_may_stand(demo: Model, constraint: Constraint) -> None:
    a, b, c, d = (demo.tokenizer.id_of_bytes(letter.encode()) for letter in "abcd")
    eos = demo.generation.eos_token_ids[0]
    start, canvas = row_start(demo, constraint, 20), [a, b, a, b, eos, 0]
    others: list[Any] = [
        ({}, None), ({1: c}, 1), ({0: d, 1: a, 3: c}, 3), ({0: b, 2: b}, None), ({1: eos, 4: c}, None), ({3: b}, 3)
    ]  # fmt: skip
    for other, place in others:
        assert start.first_allowed(canvas, other) == place, other  # type: ignore[arg-type]


def test_a_token_that_leaves_too_little_room_may_not_stand(demo: Model) -> None:
    a, b = (demo.tokenizer.id_of_bytes(letter) for letter in (b"a", b"b"))
    assert a is not None and b is not None
    constraint = Constraint.regex("ab|b(ab){9}")
    canvas = [a, b, demo.generation.eos_token_ids[0]]
    assert [row_start(demo, constraint, room).first_allowed(canvas, {0: b}) for room in (3, 40)] == [None, 0]


def test_a_repair_in_a_batch_is_that_of_the_answer_alone(demo: Model) -> None:
    options: Any = {"constraint": RECORD, "verify": "repair", "max_tokens": 60, "generation": in_few_steps(demo, 1)}
    prompts = ["Sort 7 3 5", "JSON: Ana from Oslo is 7."]
    together = generate_batch(demo, prompts, seeds=[1, 2], **options)
    for seed, (prompt, done) in enumerate(zip(prompts, together, strict=True), 1):
        Draft202012Validator(SCHEMA).validate(json.loads(done.text))
        assert done.tokens == generate(demo, prompt, seed=seed, **options).tokens
