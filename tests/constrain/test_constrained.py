"""Whole answers under a constraint, of the built-in demo model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import dgemma_mlx
from dgemma_mlx import Committed, Constraint, DgemmaError, Done, Draft, Model, generate, generate_batch, stream
from dgemma_mlx.diffusion.speed import SPEEDS

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
RECORD = Constraint.json_schema(SCHEMA)
PROMPT = "Make a JSON object: Simon is 59 years old and lives in Rome."
OTHERS = ("Sort 5 2 9", "What is the weather?", "Count from 13 to 40.")  # far from JSON


@pytest.fixture(scope="module")
def demo() -> Model:
    return dgemma_mlx.load("demo")


def quick(model: Model, steps: int = 3) -> Any:
    """Parameters for canvases that nobody waits for."""
    return model.generation.override(max_denoising_steps=steps)


@pytest.mark.parametrize("speed", SPEEDS)
def test_what_the_model_would_write_anyway_is_not_changed(demo: Model, speed: str) -> None:
    free = generate(demo, PROMPT, seed=1, speed=speed)
    bound = generate(demo, PROMPT, seed=1, speed=speed, constraint=RECORD)
    assert bound.text == free.text == '{"name": "Simon", "age": 59, "city": "Rome"}'
    assert bound.finish_reason == "stop"
    assert bound.statistics.denoising_steps == free.statistics.denoising_steps


@pytest.mark.parametrize("prompt", OTHERS)
@pytest.mark.parametrize("options", [{}, {"temp": 0.0}, {"trim_canvas": True}, {"verify": "flag"}, {"speed": "fast"}])
def test_everything_matches_whatever_is_asked(demo: Model, prompt: str, options: dict[str, Any]) -> None:
    for seed in range(2):
        done = generate(
            demo, prompt, seed=seed, max_tokens=70, constraint=RECORD, **{"generation": quick(demo), **options}
        )
        Draft202012Validator(SCHEMA).validate(json.loads(done.text))
        assert done.finish_reason == "stop"


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (Constraint.choice(["a▁b", "c▁▁d"]), "a▁b|c▁▁d"), (Constraint.regex("[▁ ]▁{2,4}x"), "[▁ ]▁{2,4}x"),
        (Constraint.json_schema({"enum": ["x▁y"]}), '"x▁y"'),
    ],
)  # fmt: skip
def test_the_character_that_vocabularies_write_for_a_space_is_itself(
    demo: Model, constraint: Constraint, pattern: str
) -> None:
    for seed in range(3):
        assert re.fullmatch(pattern, generate(demo, "x", seed=seed, constraint=constraint, generation=quick(demo)).text)


def test_drafts_match_too_and_canvases_end_in_padding(demo: Model) -> None:
    events = list(stream(demo, "Sort 5 2 9", seed=3, constraint=RECORD, max_tokens=32, generation=quick(demo, 4)))
    drafts = [event for event in events if isinstance(event, Draft)]
    assert len(drafts) > 1
    for draft in drafts:
        ids = list(draft.tokens)
        end = next(place for place, id in enumerate(ids) if id in demo.generation.eos_token_ids)
        assert RECORD.matches(demo.tokenizer.decode(ids[:end]))
        assert set(ids[end:]) <= {demo.generation.pad_token_id, *demo.generation.eos_token_ids}


def test_canvases_in_a_row_make_one_match(demo: Model) -> None:
    """Longer than two canvases of 32; the model, asked to sort, has nothing to write it from."""
    line = Constraint.regex(r"(\([a-z]{5}[0-9]{9}\)){6}")
    events = list(stream(demo, "Sort 5 2 9", seed=0, max_tokens=110, constraint=line, generation=quick(demo, 2)))
    done = events[-1]
    assert isinstance(done, Done) and done.finish_reason == "stop"
    assert line.matches(done.text)
    assert done.statistics.canvases > 2
    assert "".join(event.text for event in events if isinstance(event, Committed)) == done.text


@pytest.mark.parametrize("most", [3, 4, 31, 32, 33, 40, 64, 65])
def test_max_tokens_is_kept_by_the_shortest_way_to_the_end(demo: Model, most: int) -> None:
    """The constraint never ends by itself, and the model wants to count on."""
    numbers = Constraint.regex(r"(1[0-9]|[0-9 ])*\.")
    done = generate(
        demo, "Count from 3 to 60.", seed=0, max_tokens=most, constraint=numbers, generation=quick(demo, 2)
    )
    assert numbers.matches(done.text) and done.finish_reason == "stop"
    assert len(done.tokens) <= most


def test_the_models_own_limit_of_positions_counts_too(demo: Model) -> None:
    positions = len(demo.encode_prompt("Sort 5 2 9")) + 40  # one canvas, and not a second one
    text = replace(demo.config.text, max_position_embeddings=positions)
    small = replace(demo, config=replace(demo.config, text=text))
    done = generate(small, "Sort 5 2 9", seed=0, constraint=Constraint.regex(r"(ab)*c"), generation=quick(demo, 1))
    assert re.fullmatch(r"(ab)*c", done.text) and done.finish_reason == "stop"
    with pytest.raises(DgemmaError, match=r"shortest answer that matches takes .* 32 may be written"):
        generate(small, "Sort 5 2 9", constraint=Constraint.regex("(ab ){40}"))


def test_a_batch_is_answered_as_each_would_be_alone(demo: Model) -> None:
    prompts = [PROMPT, "Sort 5 2 9", "JSON: Ana from Oslo is 7."]
    options: dict[str, Any] = {"constraint": RECORD, "generation": quick(demo, 4)}
    most = [60, 24, 90]
    together = generate_batch(demo, prompts, seeds=[1, 2, 3], max_tokens=most, **options)
    for seed, (prompt, done) in enumerate(zip(prompts, together, strict=True), 1):
        Draft202012Validator(SCHEMA).validate(json.loads(done.text))
        assert done.text == generate(demo, prompt, seed=seed, max_tokens=most[seed - 1], **options).text


def test_a_canvas_that_is_begun_again_matches(demo: Model) -> None:
    hazy = demo.generation.override(t_min=6.0, t_max=6.0, max_denoising_steps=2)
    events = list(stream(demo, "Sort 5 2 9", seed=1, generation=hazy, max_tokens=32, constraint=RECORD))
    assert [event.attempt for event in events if isinstance(event, Draft)] == [0, 0, 1, 1]
    done = events[-1]
    assert isinstance(done, Done)
    Draft202012Validator(SCHEMA).validate(json.loads(done.text))


def test_a_choice_is_the_most_probable_one(demo: Model) -> None:
    for wanted in ("72", "seventy", "7 2"):
        choices = Constraint.choice(["71", wanted, "Rome", "7"])
        assert generate(demo, "What is 27 + 45?", seed=1, constraint=choices).text == ("72" if wanted == "72" else "71")


def test_response_format_is_a_constraint(demo: Model) -> None:
    outer = {"type": "json_schema", "json_schema": {"name": "record", "schema": SCHEMA}}
    same = generate(demo, "Sort 5 2 9", seed=1, max_tokens=50, response_format=outer, generation=quick(demo))
    assert same.tokens == generate(
        demo, "Sort 5 2 9", seed=1, max_tokens=50, constraint=RECORD, generation=quick(demo)
    ).tokens  # fmt: skip
    assert generate(demo, PROMPT, seed=1, response_format={"type": "text"}).text == generate(demo, PROMPT, seed=1).text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_tokens": 5}, "shortest answer that matches takes 16 tokens; 5 may be written"),
        ({"response_format": {"type": "json_object"}}, "exclude"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said_before_anything_is_written(
    demo: Model, options: dict[str, Any], says: str
) -> None:
    for answer in (
        lambda: stream(demo, PROMPT, constraint=RECORD, **options),
        lambda: generate_batch(demo, [PROMPT], constraint=RECORD, **options),
    ):
        with pytest.raises(DgemmaError, match=says) as caught:
            answer()
        assert caught.value.exit_code == 2
