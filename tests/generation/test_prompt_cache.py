"""Reuse of the encoded prefix from turn to turn, and cancelling in every phase."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import dgemma_mlx
from dgemma_mlx import Committed, Done, Draft, Model, PromptCache, generate, stream
from dgemma_mlx.generation.options import Verify
from dgemma_mlx.generation.prompt_cache import _common_prefix
from tests.reuse import decoded


@pytest.fixture(scope="module")
def model() -> Model:
    return dgemma_mlx.load("demo")


def ids_of(model: Model, *turns: str) -> list[int]:
    roles = ("user", "assistant")
    return model.encode_prompt([{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)])


def test_a_conversation_goes_on_from_where_the_models_turn_began(model: Model) -> None:
    prompt_cache = PromptCache()
    first = [{"role": "user", "content": "My name is Ana."}]
    answer = generate(model, first, seed=1, prompt_cache=prompt_cache)
    assert answer.statistics.cached_tokens == 0
    more = [*first, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "What is my name?"}]
    reused = generate(model, more, seed=2, prompt_cache=prompt_cache)
    fresh = generate(model, more, seed=2)
    assert reused.statistics.cached_tokens == len(model.encode_prompt(first))
    assert reused.text == fresh.text
    assert reused.tokens == fresh.tokens


def test_one_document_and_several_questions(model: Model) -> None:
    """The second prompt shows where the prompts part: from the third on, only the question is encoded."""
    prompt_cache = PromptCache()
    document = "My name is Ana. " + "Hello there. " * 30  # far longer than the sliding window
    cached = []
    for question in ("What is my name?", "Sort 7 3 5", "What is 2 + 5?", "Count from 3 to 9."):
        few = model.generation.override(max_denoising_steps=4)
        options = {"seed": 1, "prefill_step_size": 64, "generation": few, "max_tokens": 32}
        found = generate(model, document + question, prompt_cache=prompt_cache, **options)
        assert found.tokens == generate(model, document + question, **options).tokens
        cached.append(found.statistics.cached_tokens)
        length = found.statistics.prompt_tokens
    assert cached[:2] == [0, 0]
    assert length - 30 < cached[2] <= cached[3] < length


def test_asking_again_encodes_nothing(model: Model) -> None:
    """Not even after an answer whose last canvas the encoder's check has left encoded."""
    settled, sentence = set(), "Write a sentence about a small dog."
    for seed, prompt in ((3, "What is 27 + 45?"), *((seed, sentence) for seed in range(3))):
        prompt_cache = PromptCache()
        events = list(stream(model, prompt, seed=seed, prompt_cache=prompt_cache))
        again = generate(model, prompt, seed=seed, prompt_cache=prompt_cache)
        assert again.statistics.cached_tokens == again.statistics.prompt_tokens
        assert isinstance(events[-1], Done) and again.tokens == events[-1].tokens
        settled |= {event.settled_by for event in events if isinstance(event, Committed)}
    assert settled > {"encoder"}


@pytest.mark.parametrize("shared", [0, 1, 30, 63, 64, 65, 150, 199])
def test_what_is_reused_is_what_would_be_encoded_afresh(model: Model, shared: int) -> None:
    rng = np.random.default_rng(shared)
    one = rng.integers(200, 768, 200).tolist()
    other = one[:shared] + rng.integers(200, 768, 200 - shared).tolist()
    other[shared] = one[shared] + 1 if one[shared] < 767 else 200
    prompt_cache = PromptCache()
    cache = prompt_cache.reuse(model.network, one)
    model.network.encode(mx.array([one[:150]]), cache)  # longer than the sliding window of 64
    prompt_cache.append(one[:150], mark="turn")
    model.network.encode(mx.array([one[150:]]), cache)
    prompt_cache.append(one[150:])
    known, logits = decoded(model, prompt_cache, other)
    assert known == (150 if shared >= 150 else 0)
    _, expected = decoded(model, PromptCache(), other)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    back, logits = decoded(model, prompt_cache, one)  # and back again: the mark still holds
    assert back == (150 if shared >= 150 else 0)
    np.testing.assert_allclose(logits, decoded(model, PromptCache(), one)[1], atol=1e-4)


def test_a_mark_in_a_text_that_is_left_is_forgotten(model: Model) -> None:
    """The mark lies in the first of three texts, where the others, which begin alike, have other ids."""
    first, second, end = (np.random.default_rng(i).integers(200, 768, 100).tolist() for i in range(3))
    prompt_cache = PromptCache()
    cache = prompt_cache.reuse(model.network, first)
    model.network.encode(mx.array([first[:80]]), cache)
    prompt_cache.append(first[:80], mark="canvas")
    decoded(model, prompt_cache, second)
    known, logits = decoded(model, prompt_cache, second[:90] + end)
    assert known == 0
    np.testing.assert_allclose(logits, decoded(model, PromptCache(), second[:90] + end)[1], atol=1e-4)


def test_a_prefix_of_what_was_encoded_goes_back_to_a_mark(model: Model) -> None:
    ids = np.random.default_rng(0).integers(200, 768, 100).tolist()
    prompt_cache = PromptCache()
    decoded(model, prompt_cache, ids)
    known, logits = decoded(model, prompt_cache, ids[:80])
    assert known == 0
    np.testing.assert_allclose(logits, decoded(model, PromptCache(), ids[:80])[1], atol=1e-4)


@pytest.mark.parametrize("verify", ["off", "flag"])  # with "flag" the last canvas is encoded as well
def test_whole_canvases_are_reused_where_the_text_is_tokenized_alike(model: Model, verify: Verify) -> None:
    prompt_cache = PromptCache()
    prompt = [{"role": "user", "content": "Count from 13 to 40."}]
    events = list(stream(model, prompt, seed=1, prompt_cache=prompt_cache, verify=verify))
    canvases = [event for event in events if isinstance(event, Committed)]
    done = events[-1]
    assert isinstance(done, Done)
    assert len(canvases) == 2
    ids = ids_of(model, "Count from 13 to 40.", done.text, "Hi")
    assert ids[done.statistics.prompt_tokens :][: len(done.tokens)] == list(done.tokens)
    assert prompt_cache.reuse(model.network, ids).offset == done.statistics.prompt_tokens + len(canvases[0].tokens)


def test_every_turn_of_a_long_chat_sees_what_it_would_see_afresh(model: Model) -> None:
    """Each turn is longer than the sliding window of 64, and the first is asked again at last."""
    prompt_cache, turns = PromptCache(), ["Hello " * 70]
    few = model.generation.override(max_denoising_steps=2)
    for number in range(3):
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        done = generate(model, messages, seed=number, max_tokens=40, generation=few, prompt_cache=prompt_cache)
        assert (done.statistics.cached_tokens > 64) == (number > 0)
        ids = [*ids_of(model, *turns), *done.tokens]
        _, logits = decoded(model, prompt_cache, ids)
        np.testing.assert_allclose(logits, decoded(model, PromptCache(), ids)[1], atol=1e-4)
        turns += [done.text, f"{number} " * 80]
    known, logits = decoded(model, prompt_cache, ids_of(model, turns[0]))
    assert known == 0  # both marks come after it
    np.testing.assert_allclose(logits, decoded(model, PromptCache(), ids_of(model, turns[0]))[1], atol=1e-4)


def test_another_model_shares_nothing(model: Model) -> None:
    prompt_cache = PromptCache()
    generate(model, "Sort 7 3 5", seed=1, prompt_cache=prompt_cache)
    other = dgemma_mlx.load("demo")
    assert generate(other, "Sort 7 3 5", seed=1, prompt_cache=prompt_cache).statistics.cached_tokens == 0


def test_cancelled_before_the_first_step(model: Model) -> None:
    (done,) = stream(model, "Count from 13 to 40.", seed=1, cancelled=lambda: True)
    assert isinstance(done, Done)
    assert (done.finish_reason, done.text, done.tokens) == ("cancelled", "", ())
    assert done.statistics.denoising_steps == 0


def test_cancelled_within_the_prompt_keeps_what_is_encoded(model: Model) -> None:
    prompt_cache, answers = PromptCache(), iter([False, False, True])
    events = list(stream(model, "Hello " * 60, seed=1, prompt_cache=prompt_cache, prefill_step_size=16,
                         cancelled=lambda: next(answers, True)))  # fmt: skip
    assert [type(event) for event in events] == [Done]
    ids = ids_of(model, "Hello " * 60)
    known, logits = decoded(model, prompt_cache, ids)
    assert known == 32
    np.testing.assert_allclose(logits, decoded(model, PromptCache(), ids)[1], atol=1e-4)


def test_cancelled_within_the_second_canvas_keeps_the_first(model: Model) -> None:
    whole = generate(model, "Count from 13 to 40.", seed=1)
    committed: list[str] = []
    seen: list[Draft] = []
    for event in stream(model, "Count from 13 to 40.", seed=1,
                        cancelled=lambda: bool(seen) and seen[-1].canvas == 1):  # fmt: skip
        if isinstance(event, Draft):
            seen.append(event)
        elif isinstance(event, Committed):
            committed.append(event.text)
        else:
            done = event
    assert done.finish_reason == ("cancelled" if not seen[-1].finished else "stop")
    assert whole.text.startswith(committed[0])
    assert done.text == "".join(committed)
    assert done.statistics.denoising_steps == len(seen)


@pytest.mark.parametrize("length", [0, 1, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("more", [(0, 0), (0, 1), (5, 0), (3, 3), (1500, 2000)])
def test_a_common_prefix_of_any_length(length: int, more: tuple[int, int]) -> None:
    start = [7] * length
    one, other = [*start, *[8] * more[0]], [*start, *[9] * more[1]]
    assert _common_prefix(one, tuple(other)) == length
    assert _common_prefix(one, one) == len(one)
