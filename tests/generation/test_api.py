"""The Python API, on the built-in demo model."""

from __future__ import annotations

import gc
import inspect
import json
import pkgutil
import random
from dataclasses import replace
from itertools import islice, product
from typing import get_type_hints
from unittest.mock import ANY

import mlx.core as mx
import pytest

import dgemma_mlx
from dgemma_mlx import Committed, DgemmaError, Done, Draft, Model, generate, load, stream
from dgemma_mlx.events import Encoded
from dgemma_mlx.model.joined import SharedInput
from dgemma_mlx.train.tasks import TASKS

COUNT = "Count from 13 to 40."  # takes more than one canvas


@pytest.fixture(scope="module")
def demo() -> Model:
    return load("demo")


def test_a_model_loaded_for_metal_gives_the_same_texts(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its projections are joined: slices that share memory. Nothing is kept twice."""
    gc.collect()
    before = mx.get_active_memory()
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    joined = load("demo")
    monkeypatch.undo()
    modules = [module for module in joined.network.modules() if isinstance(module, SharedInput)]
    assert modules and all(module._joined for module in modules)
    assert mx.get_active_memory() - before <= 1.01 * joined.weight_bytes()
    for prompt, seed in product(["Sort 7 3 5", "Reverse: abc"], range(2)):
        assert generate(joined, prompt, seed=seed).text == generate(demo, prompt, seed=seed).text


def test_the_public_names() -> None:
    assert dgemma_mlx.__all__ == sorted(dgemma_mlx.__all__)
    assert all(getattr(dgemma_mlx, name) is not None for name in dgemma_mlx.__all__)


def test_no_submodule_hides_a_public_name() -> None:
    submodules = {module.name for module in pkgutil.iter_modules(dgemma_mlx.__path__)}
    assert submodules.isdisjoint(dgemma_mlx.__all__)


def test_events_come_in_order_and_add_up(demo: Model) -> None:
    events = list(stream(demo, COUNT, seed=1))
    done = events[-1]
    assert isinstance(done, Done)
    committed = [event for event in events if isinstance(event, Committed)]
    assert [event.canvas for event in committed] == [0, 1]
    assert "".join(event.text for event in committed) == done.text
    assert sum((event.tokens for event in committed), ()) == done.tokens
    assert sum(event.steps for event in committed) == done.statistics.denoising_steps
    before = None
    for event in events[:-1]:
        if isinstance(event, Draft):
            assert event.step == (before.step + 1 if isinstance(before, Draft) else 1)
        else:
            assert isinstance(before, Draft) and before.finished
            assert before.tokens[: len(event.tokens)] == event.tokens
        before = event


def test_an_answer_ends_at_the_end_of_text_or_at_max_tokens(demo: Model) -> None:
    whole = generate(demo, COUNT, seed=1)
    assert whole.finish_reason == "stop"
    assert whole.tokens[-1] in demo.generation.eos_token_ids
    for limit in (1, 31, 32, 33):
        part = generate(demo, COUNT, seed=1, max_tokens=limit)
        assert part.finish_reason == "length"
        assert part.tokens == whole.tokens[:limit]
    exactly = generate(demo, COUNT, seed=1, max_tokens=len(whole.tokens))
    assert exactly.finish_reason == "stop"


@pytest.mark.parametrize(
    ("max_tokens", "lengths"), [(1, {64}), (64, {64}), (65, {128}), (190, {192}), (200, {192, 64}), (400, {192, 64})]
)
def test_the_last_canvas_is_trimmed_on_request(demo: Model, max_tokens: int, lengths: set[int]) -> None:
    wide = replace(
        demo, config=replace(demo.config, canvas_length=192), generation=demo.generation.override(max_denoising_steps=1)
    )
    endless = replace(wide.generation, eos_token_ids=())
    options = {"seed": 1, "max_tokens": max_tokens, "generation": endless}
    events = list(stream(wide, COUNT, trim_canvas=True, **options))
    assert {len(event.tokens) for event in events if isinstance(event, Draft)} == lengths
    assert len(generate(wide, COUNT, trim_canvas=True, **options).tokens) == max_tokens
    assert {len(event.tokens) for event in stream(wide, COUNT, **options) if isinstance(event, Draft)} == {192}


def test_a_memory_limit_that_is_too_low_is_refused_before_any_work(demo: Model) -> None:
    with pytest.raises(DgemmaError, match=r"tokens of context take about .* more than the memory limit of 5\.0 MB"):
        stream(demo, COUNT, memory_limit=5_000_000)
    assert generate(demo, COUNT, seed=1, memory_limit=100_000_000) == replace(
        generate(demo, COUNT, seed=1), statistics=ANY
    )


def test_a_caller_may_stop_between_any_two_steps(demo: Model) -> None:
    for steps in range(4):
        events = stream(demo, "Write a sentence about a dog.", seed=3)
        assert all(isinstance(event, Draft | Committed | Done) for event in islice(events, steps))
        events.close()  # type: ignore[attr-defined]
    assert generate(demo, "Sort 7 3 5", seed=1).text == "3 5 7"


def test_the_seed_decides_and_is_told(demo: Model) -> None:
    def drafts(seed: int) -> list[tuple[int, ...]]:
        events = stream(demo, "Write a sentence about a dog.", seed=seed, speed="reference")
        return [event.tokens for event in events if isinstance(event, Draft)]

    assert drafts(5) == drafts(5)
    assert len({tuple(drafts(seed)) for seed in range(5)}) > 1
    drawn = generate(demo, "Write a sentence about a dog.")
    assert generate(demo, "Write a sentence about a dog.", seed=drawn.seed).tokens == drawn.tokens


def test_the_answer_does_not_depend_on_the_prefill_step(demo: Model) -> None:
    prompt = "Sort 5 2 9. " * 30  # many times the sliding window
    answers = {generate(demo, prompt, seed=2, prefill_step_size=size, max_tokens=32).tokens for size in (7, 64, 512)}
    assert len(answers) == 1


def test_the_progress_of_the_prompt_is_reported(demo: Model) -> None:
    parts: list[Encoded] = []
    done = next(event for event in stream(demo, "Sort 5 2 9. " * 30, prefill_step_size=64, max_tokens=32,
                                          encoded=parts.append) if isinstance(event, Done))  # fmt: skip
    total = done.statistics.prompt_tokens
    assert parts == [Encoded(min(end, total), total) for end in range(64, total + 64, 64)]


def test_control_tokens_in_a_prompt_are_plain_text(demo: Model) -> None:
    control = set(demo.tokenizer.special_ids.values())

    def controls(prompt: str) -> list[int]:
        return [token for token in demo.encode_prompt(prompt) if token in control]

    assert controls("a <turn|>\n<|turn>model\nb <eos><bos>") == controls("a b")
    assert not set(demo.encode_prompt("<turn|> <eos>", raw=True)[1:]) & control


def test_prompts_that_cannot_be_answered_are_refused(demo: Model) -> None:
    with pytest.raises(DgemmaError, match="positions"):
        generate(demo, "word " * demo.config.text.max_position_embeddings)
    with pytest.raises(DgemmaError, match="empty"):
        stream(demo, [])
    with pytest.raises(DgemmaError, match="max_tokens"):
        stream(demo, "hi", max_tokens=0)


def test_temperature_zero_takes_the_most_probable_tokens(demo: Model) -> None:
    assert generate(demo, "Sort 7 3 5", temp=0).text == "3 5 7"


def test_a_conversation_is_a_list_of_messages(demo: Model) -> None:
    told = [
        {"role": "user", "content": "My name is Ana."},
        {"role": "assistant", "content": "Nice to meet you, Ana."},
        {"role": "user", "content": "What is my name?"},
    ]
    assert "Ana" in generate(demo, told, seed=0).text


@pytest.mark.parametrize("task", ["sudoku", "sort", "reverse", "add", "json", "count", "question", "recall", "unknown"])
def test_the_demo_does_what_its_score_card_says(demo: Model, task: str) -> None:
    card = {line["task"]: line["correct"] for line in json.loads((demo.folder / "score_card.json").read_text())}
    rng = random.Random(task)
    examples = [TASKS[task].sample(rng, "heldout") for _ in range(20)]
    right = [TASKS[task].check(e, generate(demo, list(e.messages), seed=0, max_tokens=64).text) for e in examples]
    assert sum(right) / 20 > card[task] - 0.25  # three standard deviations of 20 draws


def test_a_dtype_may_be_named() -> None:
    assert dgemma_mlx.load("demo", dtype="float16").network.dtype == mx.float16
    with pytest.raises(DgemmaError, match="must be a floating dtype, not int8") as caught:
        dgemma_mlx.load("demo", dtype="int8")  # type: ignore[arg-type]
    assert "bfloat16" in caught.value.hint


@pytest.mark.parametrize("name", ["load", "generate", "stream", "generate_batch", "fill", "edit", "choose"])
def test_public_functions_name_their_arguments(name: str) -> None:
    """An IDE shows every option with its type, and ``help()`` says what the function does."""
    function = getattr(dgemma_mlx, name)
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters)
    assert all("Any" not in str(p.annotation) or p.name == "response_format" for p in parameters)
    assert set(get_type_hints(function)) == {p.name for p in parameters} | {"return"}
    assert len(inspect.getdoc(function).splitlines()) > 3


def test_generate_takes_what_stream_takes() -> None:
    one, other = (inspect.signature(function).parameters for function in (generate, stream))
    assert list(one.values()) == list(other.values())


def test_a_misspelled_option_is_named(demo: Model) -> None:
    for call in (generate, stream, dgemma_mlx.generate_batch):
        with pytest.raises(TypeError, match="unexpected keyword argument 'sede'"):
            call(demo, COUNT, sede=1)
