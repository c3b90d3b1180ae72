"""The pool of prompt caches: what each answer reuses, and what is kept."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import dgemma_mlx
from dgemma_mlx import Done, Model, generate
from dgemma_mlx.generation import prompt_caches, runner
from dgemma_mlx.generation.prompt_caches import PromptCaches

LONG = "Hello there. My name is Ana. " * 6  # more positions than are worth a mark here, and than the sliding window
OTHER = "Sort 7 3 5 and count from 3 to 9. " * 6
WORTH = 64


@pytest.fixture(scope="module")
def model() -> Model:
    return dgemma_mlx.load("demo")


@pytest.fixture(autouse=True)
def few_are_worth_a_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take short prompts for long ones."""
    monkeypatch.setattr(runner, "LEAST_SHARED", WORTH)
    monkeypatch.setattr(prompt_caches, "LEAST_SHARED", WORTH)


def chat(*turns: str, system: str = "") -> list[dict[str, Any]]:
    start = [{"role": "system", "content": system}] if system else []
    return start + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def few(model: Model) -> dict[str, Any]:
    """Options for an answer that is soon written."""
    return {"max_tokens": 8, "generation": model.generation.override(max_denoising_steps=1)}


def answer(model: Model, caches: PromptCaches, messages: list[dict[str, Any]]) -> Done:
    """Answer with a leased cache."""
    with caches.lease(model.encode_prompt(messages)) as cache:
        return generate(model, messages, seed=1, prompt_cache=cache, **few(model))


def test_two_conversations_do_not_evict_each_other(model: Model) -> None:
    caches, turns = PromptCaches(2), {"Ana": ["My name is Ana."], "Bo": ["My name is Bo. What is 2 + 5?"]}
    lengths = dict.fromkeys(turns, 0)
    for _ in range(3):
        for name, so_far in turns.items():
            done = answer(model, caches, chat(*so_far))
            assert done.statistics.cached_tokens >= lengths[name]
            lengths[name] = done.statistics.prompt_tokens
            so_far += [done.text, "And then?"]
    assert caches.kept == 2


def test_an_editor_with_many_variants_of_a_prompt_does_not_evict_a_conversation(model: Model) -> None:
    caches = PromptCaches(3)
    talk = answer(model, caches, chat(OTHER))
    for number in range(5):
        done = answer(model, caches, chat(f"{LONG} What is {number} + 5?"))
        if number > 1:  # the second variant shows where they part
            assert done.statistics.prompt_tokens - done.statistics.cached_tokens < 40
    again = answer(model, caches, chat(OTHER, talk.text, "And then?"))
    assert again.statistics.cached_tokens >= talk.statistics.prompt_tokens


def test_of_unlike_conversations_the_least_recently_used_is_dropped(model: Model) -> None:
    caches, talks = PromptCaches(2), [chat(f"Count from {number} to 9.") for number in (1, 2, 3)]
    first = answer(model, caches, talks[0])
    answer(model, caches, talks[1])
    answer(model, caches, talks[0])
    answer(model, caches, talks[2])
    again = [answer(model, caches, talk).statistics.cached_tokens for talk in (talks[0], talks[1])]
    assert again == [first.statistics.prompt_tokens, 0]


def test_a_common_system_prompt_is_copied_and_its_first_conversation_kept(model: Model) -> None:
    caches = PromptCaches(4)
    talks = [chat(f"What is {number} + 5?", system=LONG) for number in range(4)]
    cached = [answer(model, caches, talk).statistics.cached_tokens for talk in talks]
    assert cached[:2] == [0, 0] and cached[2] == cached[3] > WORTH
    for talk in talks:  # each is still there as a whole, and as it would be encoded afresh
        done = answer(model, caches, talk)
        assert done.statistics.cached_tokens == done.statistics.prompt_tokens
    assert done.tokens == answer(model, PromptCaches(0), talks[-1]).tokens


def test_requests_at_once_do_not_share_a_cache_but_copy_from_a_leased_one(model: Model) -> None:
    caches, prompt = PromptCaches(4), chat("What is 27 + 45?", system=LONG)
    ids = model.encode_prompt(prompt)
    with caches.lease(ids) as one:
        events = dgemma_mlx.stream(model, prompt, seed=1, prompt_cache=one, **few(model))
        next(events)  # encoded, and suspended
        with caches.lease(ids) as other:
            assert other is not one
            found = generate(model, prompt, seed=2, prompt_cache=other, **few(model))
            assert found.statistics.cached_tokens == len(ids)
        *_, done = events
    assert isinstance(done, Done)
    for seed, each in ((1, done), (2, found)):
        assert each.tokens == generate(model, prompt, seed=seed, **few(model)).tokens


def test_what_is_not_leased_stays_within_the_room_and_nothing_is_kept_beyond_it(model: Model) -> None:
    room = [float("inf")]
    caches = PromptCaches(9, room=lambda: room[0])
    for number in range(3):
        answer(model, caches, chat(OTHER, "Fine.", f"What is {number} + 5?"))
    mx.clear_cache()
    before, held = mx.get_active_memory(), caches.nbytes
    assert caches.kept == 3 and held > 1e5
    room[0] = held / 2
    caches.trim()
    assert 0 < caches.nbytes <= room[0]
    room[0] = 0
    caches.trim()
    assert (caches.kept, caches.nbytes) == (0, 0)
    assert before - mx.get_active_memory() >= 0.9 * held


def test_a_conversation_goes_on_where_there_is_room_for_no_other(model: Model) -> None:
    caches, talk = PromptCaches(4, room=lambda: 0), chat("What is 2 + 5?")
    first = answer(model, caches, talk)
    assert answer(model, caches, talk).statistics.cached_tokens == first.statistics.prompt_tokens
    answer(model, caches, chat("Sort 7 3 5"))
    assert caches.kept == 1
    assert answer(model, caches, talk).statistics.cached_tokens == 0


def test_what_is_counted_is_what_is_held(model: Model) -> None:
    mx.clear_cache()
    before, caches = mx.get_active_memory(), PromptCaches(4)
    for number in range(3):
        answer(model, caches, chat(f"What is {number} + 5?", system=LONG))
    assert caches.nbytes == pytest.approx(mx.get_active_memory() - before, rel=0.2)


def test_a_pool_of_none_keeps_nothing_and_an_answer_that_fails_leaves_its_cache_usable(model: Model) -> None:
    none = PromptCaches(0)
    answer(model, none, chat("What is 2 + 5?"))
    assert none.kept == 0
    caches = PromptCaches(1)
    with pytest.raises(ZeroDivisionError), caches.lease([1, 2]):
        raise ZeroDivisionError
    assert caches.kept == 0
    answer(model, caches, chat("What is 2 + 5?"))
    assert answer(model, caches, chat("What is 2 + 5?")).statistics.cached_tokens > 0


def test_nothing_lazy_stays_in_a_cache_that_another_thread_uses(model: Model) -> None:
    from concurrent.futures import ThreadPoolExecutor

    caches, prompt = PromptCaches(4), chat("What is 27 + 45?", system=LONG)
    ids, plain = model.encode_prompt(prompt), generate(model, prompt, seed=1, **few(model))
    with caches.lease(ids) as first:
        generate(model, prompt, seed=1, prompt_cache=first, **few(model))
        with caches.lease(ids) as other:
            assert other.ids == ids  # a copy, with which nothing was computed here
    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(generate, model, prompt, seed=1, prompt_cache=other, **few(model)).result()
    assert done.statistics.cached_tokens == len(ids)
    assert done.tokens == plain.tokens
