"""Words that are written twice where two canvases meet: found, and begun again from other noise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

import dgemma_mlx
from dgemma_mlx import Committed, Draft, Model, stream
from dgemma_mlx.generation.borders import repeats_words
from dgemma_mlx.model.text import DiffusionGemma

C = 32


@pytest.fixture(scope="module")
def demo() -> Model:
    return dgemma_mlx.load("demo")


@pytest.mark.parametrize(
    ("before", "after", "repeats"),
    [
        ("The dog sits near the", " the old tree.", True),
        ("The dog sits near the old", " the old tree.", True),
        ("The dog sits near the", " tree.", False),
        ("The dog sits near the", " there", False),
        ("The dog sits near the", "the", False),  # "thethe" is another fault
        ("1 2 3 4", " 4 5 6", False),
        ("7 + 7", " 7 + 7", False),
        ("", " the", False),
        ("the", "", False),
        ("The dog, the cat,", " the cat, the cow", True),
        ("No no no no", " no no.", False),  # the text repeats itself
        ("He said that that", " that is", False),
        ("Row your boat, row your boat, row your boat,", " row your boat,", False),
    ],
)
def test_whole_words_are_found(demo: Model, before: str, after: str, repeats: bool) -> None:
    encode, decode = demo.tokenizer.encode, demo.tokenizer.decode
    assert repeats_words(encode(before), encode(after), decode) == repeats


def planted(monkeypatch: pytest.MonkeyPatch, canvases: Iterator[list[int]]) -> None:
    """Let the decoder be certain of one canvas after another, one for each of its passes."""

    def project(self: DiffusionGemma, hidden: mx.array) -> mx.array:
        ids = mx.array(next(canvases))
        return mx.broadcast_to(30.0 * (mx.arange(self.config.vocab_size) == ids[:, None]), (1, C, 768))

    monkeypatch.setattr(DiffusionGemma, "project", project)


def canvas_of(model: Model, text: str, end: bool = False) -> list[int]:
    ids = model.tokenizer.encode(text) + [model.tokenizer.special_ids["<turn|>"]] * end
    return (ids + [0] * C)[:C] if end else (model.tokenizer.encode("dog " * C) + ids)[-C:]


@pytest.mark.parametrize("again", [" old tree.", " the old house."])
def test_a_canvas_that_repeats_words_is_begun_again(demo: Model, monkeypatch: pytest.MonkeyPatch, again: str) -> None:
    first = canvas_of(demo, " near the")
    second, third = canvas_of(demo, " the old tree.", end=True), canvas_of(demo, again, end=True)
    planted(monkeypatch, iter([first, second, third]))
    events: list[Any] = list(stream(demo, "Write a sentence about a dog.", seed=1, max_tokens=100))
    assert [(event.canvas, event.attempt) for event in events if isinstance(event, Draft)] == [(0, 0), (1, 0), (1, 1)]
    text = "".join(event.text for event in events if isinstance(event, Committed))
    # Where both attempts repeat words, they are probably meant: the first one stands.
    assert text.endswith(" near the old tree." if again == " old tree." else " near the the old tree.")


def test_the_reference_does_not_begin_again(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = canvas_of(demo, " near the"), canvas_of(demo, " the old tree.", end=True)
    planted(monkeypatch, iter([first, first, second, second]))
    events: list[Any] = list(stream(demo, "Write a sentence.", seed=1, max_tokens=100, speed="reference"))
    assert {event.attempt for event in events if isinstance(event, Draft)} == {0}
