"""Cancelling is one exception, latched at the first answer that says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import dgemma_mlx
from dgemma_mlx import Committed, Done, Draft, Model, generate_batch, stream
from dgemma_mlx.generation.cancellation import Cancellation, Cancelled

COUNT = "Count from 13 to 40."  # takes more than one canvas


@pytest.fixture(scope="module")
def model() -> Model:
    return dgemma_mlx.load("demo")


class OnceTrue:
    """Answers True to one call only, the ``number``-th, from 0."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, 0

    def __call__(self) -> bool:
        self.calls += 1
        return self.calls == self.number + 1


def test_a_request_stands_once_it_is_made() -> None:
    once = OnceTrue(2)
    cancellation = Cancellation(once)
    assert [cancellation.requested() for _ in range(6)] == [False, False, True, True, True, True]
    assert once.calls == 3  # it is not asked again
    with pytest.raises(Cancelled):
        cancellation.check()


def test_without_a_function_nothing_is_cancelled() -> None:
    Cancellation().check()


def test_a_request_that_is_true_once_ends_the_answer_wherever_it_comes(model: Model) -> None:
    """While the prompt is encoded, between steps, and between canvases; never an answer to a part of the prompt."""
    options: dict[str, Any] = {"seed": 1, "prefill_step_size": 16, "speed": "reference"}
    whole = [event for event in stream(model, COUNT, **options) if not isinstance(event, Done)]
    asked = OnceTrue(-1)
    assert [type(event) for event in stream(model, COUNT, cancelled=asked, **options)][-1] is Done
    assert asked.calls > sum(isinstance(event, Draft) for event in whole)
    for number in range(asked.calls):
        events = list(stream(model, COUNT, cancelled=OnceTrue(number), **options))
        done = events[-1]
        assert isinstance(done, Done)
        before = events[:-1]
        if done.finish_reason == "cancelled" and before and isinstance(before[-1], Committed):
            before[-1] = replace(before[-1], is_last=False)  # as it was cancelled before
        assert before == whole[: len(before)]
        assert done.finish_reason == "cancelled" or before == whole


def test_a_batch_ends_as_a_whole(model: Model) -> None:
    done = generate_batch(model, [COUNT, "Count from 3 to 47."], seeds=[1, 2], speed="reference", cancelled=OnceTrue(3))
    assert [answer.finish_reason for answer in done] == ["cancelled", "cancelled"]
