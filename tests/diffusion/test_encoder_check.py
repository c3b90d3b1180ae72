"""The encoder's check of open canvases, on the demo model's network and by brute force."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import dgemma_mlx
from dgemma_mlx import Draft, Model, generate, stream
from dgemma_mlx.constrain.constraint import Constraint
from dgemma_mlx.diffusion.encoder_check import EncoderCheck
from dgemma_mlx.diffusion.speed import SPEEDS, CheckRule
from dgemma_mlx.model.cache import PrefixCache

RATIO = 0.3
LONG = "Count from 13 to 40."  # takes two canvases
PROMPT = "Make a JSON object: Simon is 59 years old and lives in Rome."
CERTAIN, OPEN = 0.0, 1.0  # entropies, in nats


@pytest.fixture(scope="module")
def demo() -> Model:
    return dgemma_mlx.load("demo")


@pytest.fixture(scope="module")
def answer(demo: Model) -> list[int]:
    """The model's answer to ``PROMPT`` on a canvas of 32 ids."""
    drafts = [event for event in stream(demo, PROMPT, seed=1, speed="reference") if isinstance(event, Draft)]
    return list(drafts[-1].tokens)


@pytest.fixture(scope="module")
def full(demo: Model) -> list[int]:
    """The first of the two canvases of the model's answer to ``LONG``."""
    drafts = [event for event in stream(demo, LONG, seed=1, speed="reference") if isinstance(event, Draft)]
    return list(next(draft for draft in drafts if draft.finished).tokens)


def prefix(model: Model, prompt: str = PROMPT, rows: int = 1) -> PrefixCache:
    """The encoded prompt."""
    cache = model.network.new_cache()
    model.network.encode(mx.array([list(model.encode_prompt(prompt))] * rows, mx.int32), cache)
    return cache


def check_of(model: Model, cache: PrefixCache, rows: int = 1, max_uncertain: int = 32) -> EncoderCheck:
    return EncoderCheck(model.network, cache, rows, model.generation.eos_token_ids, CheckRule(max_uncertain, RATIO))


def asked(
    check: EncoderCheck, *canvases: list[int], finished: list[bool] | None = None, entropy: float = OPEN,
    first: float = CERTAIN,
) -> Any:
    """The rows that are settled, of canvases whose positions after the ``first`` have one entropy."""
    ids = mx.array(canvases, mx.int32)
    finished = finished or [False] * len(canvases)
    entropies = mx.where(mx.arange(ids.shape[1]) == 0, first, entropy)
    worth = check.worth(ids, mx.broadcast_to(entropies, ids.shape), finished)
    return check(ids, worth, finished).tolist() if worth else None


def expected_next(model: Model, ids: list[int]) -> np.ndarray[Any, Any]:
    """The encoder's probabilities of the token after ``ids``, which are encoded alone."""
    hidden = model.network.encode(mx.array([ids]), model.network.new_cache())
    return np.array(mx.softmax(model.network.logits(hidden[0, -1]), axis=-1)).astype(np.float64)


def judged_one_by_one(model: Model, canvas: list[int]) -> bool:
    """Whether the text is plausible: every position by a pass of its own over what precedes."""
    ids = list(model.encode_prompt(PROMPT))
    ends = [place for place, token in enumerate(canvas) if token in model.generation.eos_token_ids]
    for place in range(1, (ends[0] if ends else len(canvas) - 1) + 1):
        probabilities = expected_next(model, ids + canvas[:place])
        if probabilities[canvas[place]] < RATIO * probabilities.max():
            return False
    return True


def test_a_plausible_answer_is_settled(demo: Model, answer: list[int]) -> None:
    cache = prefix(demo)
    offset, check = cache.offset, check_of(demo, cache)
    assert asked(check, answer) == [True] == [judged_one_by_one(demo, answer)]
    assert not check.is_encoded and check.kept == [False] and cache.offset == offset  # the answer ends here
    assert check.passes == [24]  # a text of 23 ids, in quarters of 32


def test_a_plausible_canvas_that_goes_on_stays_encoded(demo: Model, full: list[int]) -> None:
    cache = prefix(demo, LONG)
    check = check_of(demo, cache)
    assert asked(check, full) == [True] and check.passes == [32]
    fresh = prefix(demo, LONG)
    demo.network.extend(mx.array([full], mx.int32), fresh)
    assert check.is_encoded and check.kept == [True] and cache.offset == fresh.offset
    for mine, theirs in zip(cache.state(), fresh.state(), strict=True):
        np.testing.assert_allclose(np.array(mine.astype(mx.float32)), np.array(theirs.astype(mx.float32)), atol=1e-5)


@pytest.mark.parametrize("place", [1, 2, 7, 12, 20])
def test_an_implausible_text_is_left_to_the_decoder_and_not_read_again(
    demo: Model, answer: list[int], place: int
) -> None:
    wrong = [*answer[:place], 400, *answer[place + 1 :]]
    cache = prefix(demo)
    offset, check = cache.offset, check_of(demo, cache)
    assert asked(check, wrong) == [False] == [judged_one_by_one(demo, wrong)]
    assert not check.is_encoded and check.kept == [False] and cache.offset == offset
    assert asked(check, answer) is None and check.passes == [24]


def test_the_first_token_is_the_decoders_alone(demo: Model, answer: list[int]) -> None:
    assert asked(check_of(demo, prefix(demo)), answer, first=OPEN) is None  # it is not settled yet
    other = [400, *answer[1:]]
    assert asked(check_of(demo, prefix(demo)), other) == [judged_one_by_one(demo, other)]


def test_rows_are_judged_alone_and_finished_ones_are_left_alone(
    demo: Model, answer: list[int], full: list[int]
) -> None:
    wrong = [*answer[:7], 400, *answer[8:]]
    for finished in ([False, False, False], [False, False, True]):
        check = check_of(demo, prefix(demo, rows=3), rows=3)
        assert asked(check, answer, wrong, wrong, finished=finished) == [True, False, False]
        assert check.passes == [24, 24, 0 if finished[2] else 24] and not check.is_encoded
    check = check_of(demo, prefix(demo, LONG, rows=2), rows=2)
    assert asked(check, full, wrong, finished=[False, True]) == [True, False]
    assert check.is_encoded  # the cache holds what both rows have come to


def test_a_text_with_too_many_uncertain_positions_is_not_worth_a_check(demo: Model, answer: list[int]) -> None:
    length = next(place for place, token in enumerate(answer) if token in demo.generation.eos_token_ids) + 1
    assert asked(check_of(demo, prefix(demo), max_uncertain=length - 2), answer) is None
    assert asked(check_of(demo, prefix(demo), max_uncertain=length - 2), answer, entropy=CERTAIN) is not None
    assert asked(check_of(demo, prefix(demo), max_uncertain=length - 1), answer) is not None


@pytest.mark.parametrize("canvas", ["empty", "padding"])
def test_a_canvas_without_text_is_not_settled(demo: Model, canvas: str) -> None:
    first = demo.generation.eos_token_ids[0] if canvas == "empty" else 0
    settled = asked(check_of(demo, prefix(demo)), [first] + [0] * 31, entropy=CERTAIN)
    # The encoder has no say on the first token, so there is nothing to ask it of an end alone.
    assert settled is None if canvas == "empty" else settled == [False]


def test_an_encoder_that_was_not_trained_to_write_is_not_heard(
    demo: Model, answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = type(demo.network).project
    for planted in ("nothing", "noise"):  # it finds all tokens alike, or others than the decoder
        noise = mx.random.normal((32, demo.network.config.vocab_size), key=mx.random.key(0))
        monkeypatch.setattr(type(demo.network), "project", lambda self, hidden, noise=noise, planted=planted: (
            project(self, hidden) * 0 + (noise[: hidden.shape[1]] if planted == "noise" else 0)
        ))  # fmt: skip
        assert asked(check_of(demo, prefix(demo)), answer) == [False]


@pytest.mark.parametrize("speed", [speed for speed, tests in SPEEDS.items() if tests.check is not None])
def test_generated_texts_that_the_encoder_settles_are_plausible_to_it(demo: Model, speed: str) -> None:
    settled = 0
    for seed in range(12):
        prompt = "Write a sentence about a small dog."
        drafts = [event for event in stream(demo, prompt, seed=seed, speed=speed) if isinstance(event, Draft)]
        if drafts[-1].settled_by != "encoder":
            continue
        settled += 1
        tokens, ids = list(drafts[-1].tokens), list(demo.encode_prompt(prompt))
        end = next(place for place, token in enumerate(tokens) if token in demo.generation.eos_token_ids)
        for place in range(1, end + 1):
            probabilities = expected_next(demo, ids + tokens[:place])
            assert probabilities[tokens[place]] >= RATIO * probabilities.max() - 1e-4
    assert settled > 3


def test_a_constraint_is_not_checked(demo: Model) -> None:
    done = generate(demo, "Say yes or no.", seed=1, constraint=Constraint.regex("yes|no"))
    assert done.text in ("yes", "no") and done.statistics.encoder_passes == 0
