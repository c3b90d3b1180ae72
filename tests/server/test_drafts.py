"""Drafts as JSON: what is sent, and what a reader makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dgemma_mlx import Draft, Model, load, stream
from dgemma_mlx.server.drafts import Drafts
from dgemma_mlx.server.question import Written
from tests.server.scripted import scripted_model


@pytest.fixture(scope="module")
def demo() -> Model:
    return load("demo")


def drafts_of(model: Model, prompt: str, **options: Any) -> list[Draft]:
    return [event for event in stream(model, prompt, seed=3, **options) if isinstance(event, Draft)]


def read(messages: list[dict[str, Any]]) -> Iterator[list[tuple[Any, ...]]]:
    """Yield the canvas after each message, as a client puts it together."""
    canvas: list[tuple[Any, ...]] = []
    for message in messages:
        cells = list(
            zip(message["tokens"], message["entropy"], message["accepted"], message["kinds"], strict=True)
        )
        canvas = list(canvas)
        for at, cell in zip(message.get("at", range(len(cells))), cells, strict=True):
            canvas[at : at + 1] = [cell]
        yield canvas


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_reader_has_the_whole_canvas_whichever_drafts_it_missed(demo: Model, every: int) -> None:
    drafts = drafts_of(demo, "Sort 7 3 5 9 1 8 2", speed="reference", max_tokens=32)[::every]
    sender = Drafts(demo)
    sent = [sender.draft(draft) for draft in drafts]
    whole = [next(read([Drafts(demo).draft(draft)])) for draft in drafts]
    assert list(read(sent)) == whole
    assert ["at" in message for message in sent] == [False, *[True] * (len(sent) - 1)]
    assert all(len(message["at"]) == len(message["tokens"]) for message in sent if "at" in message)


def test_each_attempt_at_a_canvas_begins_with_a_whole_draft(demo: Model) -> None:
    sender = Drafts(demo)
    tokens, flags, entropy = (263,) * 4, (True,) * 4, (0.0,) * 4
    places = [(0, 0, 1), (0, 0, 2), (0, 1, 1), (0, 1, 2), (1, 0, 1)]
    sent = [
        sender.draft(Draft(canvas, step, 48, tokens, flags, entropy, False, attempt=attempt))
        for canvas, attempt, step in places
    ]
    assert [message.get("at") for message in sent] == [None, [], None, [], None]


def test_control_tokens_have_no_text_and_what_follows_the_end_is_marked(demo: Model) -> None:
    message = Drafts(demo).draft(drafts_of(demo, "Sort 7 3 5")[-1])
    assert "".join(message["tokens"]).startswith("3 5 7")
    end = message["kinds"].index("c")
    assert message["kinds"] == "t" * end + "c" + "e" * (31 - end)


def test_thinking_is_marked_also_in_a_canvas_that_begins_within_it() -> None:
    thought = " ".join(str(number) for number in range(30))
    model = scripted_model(lambda prompt: f"<|channel>thought\n{thought}<channel|>done")
    drafts, sender = [draft for draft in drafts_of(model, "?") if draft.finished], Drafts(model)
    first = sender.draft(drafts[0])
    assert set(first["kinds"]) == {"c", "h"}
    sender.wrote(Written("", "0 1 2"))
    kinds = sender.draft(drafts[1])["kinds"]
    assert kinds.startswith("h") and len(drafts) > 1


def test_a_character_in_several_tokens_has_its_text_at_the_last_one(demo: Model) -> None:
    ids = demo.tokenizer.encode("😀")
    assert len(ids) > 1
    draft = Draft(0, 1, 48, tuple(ids), (True,) * len(ids), (0.001,) * len(ids), False)
    message = Drafts(demo).draft(draft)
    assert message["tokens"] == [""] * (len(ids) - 1) + ["😀"]
    assert message["entropy"] == [0.0] * len(ids)
