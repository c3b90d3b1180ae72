"""Speed modes, the encoder's check and batches, on the built-in demo model."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import mlx.core as mx
import pytest

import dgemma_mlx
from dgemma_mlx import Committed, DgemmaError, Done, Draft, Model, PromptCache, generate, generate_batch, stream
from dgemma_mlx.diffusion.speed import SPEEDS
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.soft_tokens import SoftTokens
from dgemma_mlx.model.text import DiffusionGemma

COUNT = "Count from 13 to 40."  # takes more than one canvas
PROMPTS = (
    "Sort 5 2 9", COUNT, "What is 27 + 45?", "My name is Ana.", "Count from 3 to 47.", "Reverse: red blue green",
)  # fmt: skip
WORK = ("decoded_positions", "encoder_passes", "encoded_positions")  # of the statistics


@pytest.fixture(scope="module")
def demo() -> Model:
    return dgemma_mlx.load("demo")


def committed(events: Any) -> list[Committed]:
    return [event for event in events if isinstance(event, Committed)]


def hazy(model: Model, steps: int = 2) -> Any:
    """Parameters with which every canvas stays uncertain."""
    return model.generation.override(t_min=6.0, t_max=6.0, max_denoising_steps=steps)


def test_the_default_takes_fewer_steps_for_the_same_answers(demo: Model) -> None:
    steps = dict.fromkeys(SPEEDS, 0)
    for prompt in PROMPTS[:4]:  # the model is sure of these
        answers = {speed: generate(demo, prompt, seed=1, speed=speed) for speed in SPEEDS}
        assert answers["balanced"].text == answers["reference"].text
        default = generate(demo, prompt, seed=1).statistics.denoising_steps
        assert default == answers["balanced"].statistics.denoising_steps
        for speed, answer in answers.items():
            steps[speed] += answer.statistics.denoising_steps
    assert steps["balanced"] < 0.8 * steps["reference"]
    assert steps["fast"] <= steps["balanced"]


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_committed_canvas_says_which_test_it_has_passed(demo: Model, speed: str) -> None:
    events = list(stream(demo, COUNT, seed=1, speed=speed))
    finished = [event for event in events if isinstance(event, Draft) and event.finished]
    for draft, canvas in zip(finished, committed(events), strict=True):
        assert canvas.settled_by == draft.settled_by is not None
        assert not canvas.low_confidence
        assert draft.settled_by == "stable" or speed != "reference"


@pytest.mark.parametrize("speed", SPEEDS)
def test_an_uncertain_canvas_is_begun_again_once_and_never_committed_silently(demo: Model, speed: str) -> None:
    # A long text: the encoder's check would settle a short one.
    events = list(stream(demo, COUNT, seed=1, speed=speed, generation=hazy(demo), max_tokens=32))
    drafts = [event for event in events if isinstance(event, Draft)]
    attempts = [0, 0] if speed == "reference" else [0, 0, 1, 1]
    assert [draft.attempt for draft in drafts] == attempts
    assert [draft.step for draft in drafts] == [1, 2] * (len(attempts) // 2)
    (canvas,) = committed(events)
    assert canvas.low_confidence and canvas.settled_by is None
    assert canvas.steps == len(attempts)
    last = min((draft for draft in drafts if draft.finished), key=lambda draft: draft.mean_entropy)
    assert last.tokens[: len(canvas.tokens)] == canvas.tokens
    done = events[-1]
    assert isinstance(done, Done)
    assert done.statistics.low_confidence == 1
    assert done.statistics.denoising_steps == len(attempts)


def test_of_two_uncertain_attempts_the_more_certain_one_is_committed(demo: Model) -> None:
    config = replace(demo.generation.override(t_min=2.0, t_max=2.0, max_denoising_steps=1), eos_token_ids=())
    chosen = set()
    for seed in (1, 2):
        events = list(stream(demo, "Make a sentence.", seed=seed, generation=config, max_tokens=32))
        first, second = (event for event in events if isinstance(event, Draft))
        best = min(first, second, key=lambda draft: draft.mean_entropy)
        (canvas,) = committed(events)
        assert first.tokens != second.tokens and canvas.tokens == best.tokens
        chosen.add(best.attempt)
    assert chosen == {0, 1}


def test_only_what_is_uncertain_is_begun_again(demo: Model) -> None:
    seen = set()
    for temperature in (1.0, 1.3, 1.6, 2.0):
        config = demo.generation.override(max_denoising_steps=2, t_min=temperature, t_max=temperature)
        events = list(stream(demo, "Sort 71 12 93 44 31 8 67 50", seed=1, generation=config, max_tokens=32))
        (canvas,) = committed(events)
        seen.add((max(event.attempt for event in events if isinstance(event, Draft)), canvas.low_confidence))
    assert {(0, False), (1, True)} <= seen <= {(0, False), (1, False), (1, True)}


def written_by_the_encoder(model: Model, ids: list[int], tokens: list[int]) -> list[int]:
    """The most probable next token at each place of ``tokens``, from one pass over all of it."""
    hidden = model.network.encode(mx.array([ids + tokens]), model.network.new_cache())
    found: Any = mx.argmax(model.network.logits(hidden[0, len(ids) - 1 : -1]), axis=-1).tolist()
    return list(found)


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("endless", [False, True])
def test_flag_tells_where_the_encoder_would_have_written_another_token(
    demo: Model, endless: bool, reused: bool
) -> None:
    """One step a canvas makes mistakes. They are flagged, in a later canvas and with the prompt in the cache too."""
    prompt, config = "Make a sentence.", demo.generation.override(max_denoising_steps=1)
    config = replace(config, eos_token_ids=()) if endless else config
    options: dict[str, Any] = {"seed": 3, "generation": config, "max_tokens": 60, "speed": "reference"}
    if reused:
        options["prompt_cache"] = PromptCache()
        generate(demo, prompt, **options)
    events = list(stream(demo, prompt, verify="flag", **options))
    done = events[-1]
    assert isinstance(done, Done)
    assert done.tokens == generate(demo, prompt, **options).tokens
    expected = written_by_the_encoder(demo, demo.encode_prompt(prompt), list(done.tokens))
    wrong = [place for place, token in enumerate(done.tokens) if token != expected[place]]
    starts = (0, 32) if endless else (0,)
    canvases = zip(starts, committed(events), strict=True)
    assert [start + place for start, canvas in canvases for place in canvas.doubted] == wrong
    assert done.statistics.doubted_tokens == len(wrong) > 0


def test_repair_ends_in_what_the_encoder_would_write(demo: Model) -> None:
    config = demo.generation.override(max_denoising_steps=1)
    attempts = []
    for number in range(12):
        prompt = f"Sort 5 2 {number} 44 31 8 67 {5 * number}"
        events = list(stream(demo, prompt, seed=3, generation=config, verify="repair", speed="reference"))
        done = events[-1]
        assert isinstance(done, Done)
        assert written_by_the_encoder(demo, demo.encode_prompt(prompt), list(done.tokens)) == list(done.tokens)
        assert done.statistics.doubted_tokens == 0
        attempts.append(max(event.attempt for event in events if isinstance(event, Draft)))
        assert done.statistics.denoising_steps == sum(isinstance(event, Draft) for event in events)
    assert max(attempts) > 1


def test_repairs_come_to_an_end(demo: Model) -> None:
    config = demo.generation.override(max_denoising_steps=1)
    events = list(stream(demo, "Make a sentence.", seed=3, generation=config, verify="repair", max_tokens=32))
    attempts = sorted({event.attempt for event in events if isinstance(event, Draft)})
    assert 1 < len(attempts) <= 10  # a first, a second where that is uncertain, eight repairs


def test_nothing_to_repair_is_nothing_changed(demo: Model) -> None:
    plain, checked = (generate(demo, COUNT, seed=1, verify=verify) for verify in ("off", "repair"))
    assert checked.tokens == plain.tokens
    assert checked.statistics.denoising_steps == plain.statistics.denoising_steps


@pytest.mark.parametrize(
    ("speed", "verify"),
    [("reference", "off"), ("reference", "flag"), ("balanced", "off"), ("balanced", "flag"), ("balanced", "repair"),
     pytest.param("reference", "repair", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_prompt_is_answered_in_a_batch_as_it_is_alone(demo: Model, speed: str, verify: str) -> None:
    """Prompts of several lengths, answers of one canvas and of more, rows that end long before others."""
    options: dict[str, Any] = {"speed": speed, "verify": verify}
    limits = [64, 80, 64, 64, 100, 64]
    together = generate_batch(demo, PROMPTS, seeds=range(6), max_tokens=limits, **options)
    for seed, (prompt, limit, found) in enumerate(zip(PROMPTS, limits, together, strict=True)):
        alone = generate(demo, prompt, seed=seed, max_tokens=limit, **options)
        assert (found.tokens, found.text, found.finish_reason, found.seed) == (
            alone.tokens, alone.text, alone.finish_reason, seed
        )  # fmt: skip
        for name in ("prompt_tokens", "canvases", "denoising_steps", "doubted_tokens", *WORK):
            assert getattr(found.statistics, name) == getattr(alone.statistics, name)
    assert len({done.statistics.canvases for done in together}) > 1


def test_rows_of_a_batch_are_begun_again_alone(demo: Model) -> None:
    options: dict[str, Any] = {"generation": demo.generation.override(max_denoising_steps=2, t_min=1.5, t_max=1.5)}
    prompts = ["Make a sentence.", "Sort 5 2 9", "What is 27 + 45?", COUNT]
    together = generate_batch(demo, prompts, seeds=range(4), max_tokens=32, **options)
    alone = [generate(demo, prompt, seed=seed, max_tokens=32, **options) for seed, prompt in enumerate(prompts)]
    assert [done.tokens for done in together] == [done.tokens for done in alone]
    steps = [done.statistics.denoising_steps for done in together]
    assert steps == [done.statistics.denoising_steps for done in alone]
    assert max(steps) > 2 >= min(steps)


def test_a_batch_that_is_cancelled_keeps_what_is_committed(demo: Model) -> None:
    calls = count()
    found = generate_batch(demo, PROMPTS, seeds=range(6), speed="reference", cancelled=lambda: next(calls) > 3)
    reasons = [done.finish_reason for done in found]
    assert "cancelled" in reasons and len(reasons) == 6
    for number, done in enumerate(found):
        alone = generate(demo, PROMPTS[number], seed=number, speed="reference")
        assert alone.tokens[: len(done.tokens)] == done.tokens
        assert done.tokens == alone.tokens or done.finish_reason == "cancelled"


@pytest.mark.parametrize(
    ("options", "said"),
    [({"speed": "warp"}, "speed must be one of reference, balanced, fast, not 'warp'"),
     ({"verify": "hope"}, "verify must be one of off, flag, repair, not 'hope'"),
     ({"seeds": [1]}, "seeds must be one for each of 2 prompts, not 1"),
     ({"max_tokens": [1, 2, 3]}, "max_tokens must be one for each of 2 prompts, not 3"),
     ({"max_tokens": [1, 0]}, "max_tokens must be at least 1, not 0"),
     ({"max_tokens": 1.5}, "max_tokens must be at least 1, not 1.5"),
     ({"seeds": [1, -1]}, "not a seed: -1"),
     ({"seeds": [1, 2**64]}, "not a seed: 18446744073709551616"),
     ({"seeds": [1, "a"]}, "not a seed: 'a'"),
     ({"memory_limit": "1GB"}, "memory_limit must be at least 1, not '1GB'"),
     ({"prefill_step_size": 0}, "prefill_step_size must be at least 1, not 0"),
     ({"temp": float("inf")}, "temp must be a number of at least 0, not inf"),
     ({"temp": 1e-40}, "t_max must be at least 1e-06"),
     ({"trim_canvas": True}, "trim_canvas takes one prompt at a time")],
)  # fmt: skip
def test_bad_options_are_one_clear_error(demo: Model, options: dict[str, Any], said: str) -> None:
    with pytest.raises(DgemmaError, match=said) as error:
        generate_batch(demo, ["Sort 5 2 9", "Sort 7 1 3"], **options)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("prompt", [None, 5, b"Sort 5 2 9"])
def test_what_is_not_a_prompt(demo: Model, prompt: Any) -> None:
    with pytest.raises(DgemmaError, match=r"prompt|message") as error:
        generate(demo, prompt)
    assert error.value.exit_code == 2


def test_one_prompt_is_not_a_batch(demo: Model) -> None:
    with pytest.raises(DgemmaError, match="prompts must be a list of prompts"):
        generate_batch(demo, "Sort 5 2 9")


@pytest.mark.parametrize("dtype", [mx.int8, "int8", 16])
def test_weights_are_floating(dtype: Any) -> None:
    with pytest.raises(DgemmaError, match="dtype must be a floating dtype"):
        dgemma_mlx.load("demo", dtype=dtype)


def test_no_prompts_no_answers(demo: Model) -> None:
    assert generate_batch(demo, []) == []


@pytest.fixture
def decoded_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every canvas that the network decodes."""
    rows: list[int] = []
    embed = DiffusionGemma.decoder_input

    def spy(self: DiffusionGemma, canvas: mx.array, signal: mx.array) -> mx.array:
        rows.append(canvas.shape[0])
        return embed(self, canvas, signal)

    monkeypatch.setattr(DiffusionGemma, "decoder_input", spy)
    return rows


def test_only_the_rows_that_are_uncertain_are_denoised_again(demo: Model, decoded_rows: list[int]) -> None:
    two_steps = demo.generation.override(max_denoising_steps=2, t_min=1.5, t_max=1.5)
    prompts = ["Sort 7 3 5", "Make a sentence.", "What is 27 + 45?"]
    options: dict[str, Any] = {"generation": two_steps, "max_tokens": 20}
    alone = [generate(demo, prompt, seed=seed, **options) for seed, prompt in enumerate(prompts)]
    again = [done.statistics.denoising_steps > 2 for done in alone]
    assert 0 < sum(again) < 3
    decoded_rows.clear()
    together = generate_batch(demo, prompts, seeds=[0, 1, 2], **options)
    assert [done.text for done in together] == [done.text for done in alone]
    assert decoded_rows == [3, 3, *[sum(again)] * 2]


def test_only_the_rows_that_the_encoder_doubts_are_repaired(demo: Model, decoded_rows: list[int]) -> None:
    one_step = demo.generation.override(max_denoising_steps=1)
    prompts = ["Sort 7 3 5", "Make a sentence.", "What is 27 + 45?"]
    options: dict[str, Any] = {"generation": one_step, "max_tokens": 20, "verify": "repair", "speed": "reference"}
    alone = [generate(demo, prompt, seed=seed, **options) for seed, prompt in enumerate(prompts)]
    decoded_rows.clear()
    together = generate_batch(demo, prompts, seeds=[0, 1, 2], **options)
    assert [done.text for done in together] == [done.text for done in alone]
    assert sum(decoded_rows) == sum(done.statistics.denoising_steps for done in alone)


@pytest.mark.parametrize("verify", ["off", "flag", "repair"])
@pytest.mark.parametrize(("prompt", "steps"), [(COUNT, 48), ("Make a sentence.", 1)])
def test_the_work_that_is_counted_is_the_work_that_is_done(
    demo: Model, monkeypatch: pytest.MonkeyPatch, verify: str, prompt: str, steps: int
) -> None:
    decoded, encoded = [], []
    embed, encode = DiffusionGemma.decoder_input, DiffusionGemma._encode

    def decode_spy(self: DiffusionGemma, canvas: mx.array, signal: mx.array) -> mx.array:
        decoded.append(canvas.size)
        return embed(self, canvas, signal)

    def encode_spy(self: DiffusionGemma, ids: mx.array, *arguments: Any, **named: Any) -> Any:
        encoded.append(ids.size)
        return encode(self, ids, *arguments, **named)

    monkeypatch.setattr(DiffusionGemma, "decoder_input", decode_spy)
    monkeypatch.setattr(DiffusionGemma, "_encode", encode_spy)
    options: dict[str, Any] = {"generation": demo.generation.override(max_denoising_steps=steps), "verify": verify}
    found = generate(demo, prompt, seed=3, max_tokens=70, speed="balanced", **options).statistics
    assert encoded.pop(0) == found.prompt_tokens
    assert (found.denoising_steps, found.decoded_positions) == (len(decoded), sum(decoded))
    assert (found.encoder_passes, found.encoded_positions) == (len(encoded), sum(encoded))
    least = found.canvases - (verify == "off")
    assert found.encoder_passes > least if (verify, steps) == ("repair", 1) else found.encoder_passes == least


@pytest.mark.parametrize("seed", range(3))
def test_the_encoder_passes_of_a_row_are_those_of_the_answer_alone(demo: Model, seed: int) -> None:
    """Whether the other row's canvas is settled by the encoder or not."""
    prompts, seeds = (COUNT, "Write a sentence about a small dog.", "Count from 3 to 47."), [10 * seed, seed, seed + 3]
    together = generate_batch(demo, prompts, seeds=seeds, max_tokens=128)
    for prompt, own, found in zip(prompts, seeds, together, strict=True):
        alone = generate(demo, prompt, seed=own, max_tokens=128)
        assert found.tokens == alone.tokens
        assert [getattr(found.statistics, name) for name in WORK] == [getattr(alone.statistics, name) for name in WORK]


def test_the_encoder_passes_of_a_cancelled_canvas_are_counted(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode = DiffusionGemma._encode

    def encode_spy(self: DiffusionGemma, ids: mx.array, *arguments: Any, **named: Any) -> Any:
        encoded.append(ids.size)
        return encode(self, ids, *arguments, **named)

    monkeypatch.setattr(DiffusionGemma, "_encode", encode_spy)
    prompt = "Count to 38."
    passes = generate(demo, prompt, seed=1).statistics.encoder_passes
    assert passes > 2
    for most in range(1, passes):
        encoded.clear()
        done = generate(demo, prompt, seed=1, cancelled=lambda most=most: len(encoded) > most)
        counted = (done.statistics.encoder_passes, done.statistics.encoded_positions)
        assert (done.finish_reason, *counted) == ("cancelled", len(encoded) - 1, sum(encoded[1:]))


def test_a_prompt_without_a_cache_is_encoded_in_one_call(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[Any] = []
    extend = DiffusionGemma.extend

    def spy(self: DiffusionGemma, ids: mx.array, cache: PrefixCache, soft: SoftTokens | None) -> None:
        shapes.append(ids.shape)
        extend(self, ids, cache, soft)

    monkeypatch.setattr(DiffusionGemma, "extend", spy)
    done = generate(demo, "Sort 7 3 5", seed=1)
    assert shapes == [(1, done.statistics.prompt_tokens)]
