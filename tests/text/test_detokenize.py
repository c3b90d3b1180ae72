"""Tests of incremental decoding: pieces of any size join to the decoded whole."""

from __future__ import annotations

import random

from dgemma_mlx.text import Detokenizer, Tokenizer
from tests.text.gemma_like import random_text


def _in_pieces(tokenizer: Tokenizer, ids: list[int], rng: random.Random, *, keep_special: bool) -> str:
    detokenizer, text = Detokenizer(tokenizer, keep_special=keep_special), ""
    while ids:
        cut = rng.randrange(1, 4)
        text, ids = text + detokenizer.feed(ids[:cut]), ids[cut:]
    return text + detokenizer.finish()


def test_pieces_join_to_the_whole_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(300):
        ids = tokenizer.encode(random_text(rng))
        assert _in_pieces(tokenizer, ids, rng, keep_special=False) == tokenizer.decode(ids)


def test_pieces_join_for_arbitrary_ids(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    every_byte = [id for id in range(tokenizer.vocab_size) if tokenizer.token(id).startswith("<0x")]
    for _ in range(300):
        ids = [
            rng.choice(every_byte) if rng.random() < 0.6 else rng.randrange(tokenizer.vocab_size)
            for _ in range(30)
        ]
        for keep_special in (False, True):
            whole = tokenizer.decode(ids, keep_special=keep_special)
            assert _in_pieces(tokenizer, ids, rng, keep_special=keep_special) == whole


def test_a_character_is_held_back_until_complete(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦊")
    assert len(ids) == 4
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.feed([id]) for id in ids] == ["", "", "", "🦊"]
    assert detokenizer.finish() == ""


def test_an_incomplete_character_ends_as_one_replacement_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦊")
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.feed(ids[:3]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""
    assert detokenizer.feed(tokenizer.encode("ok")) == "ok"
    assert detokenizer.feed([*ids[:3], *tokenizer.encode("x")]) == "\ufffdx"


def test_leading_spaces_stay(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.feed(tokenizer.encode("  the")) == "  the"
    assert detokenizer.feed(tokenizer.encode(" fox")) == " fox"


def test_control_tokens_add_nothing_even_inside_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦊")
    control = next(iter(tokenizer.special_ids.values()))
    assert Detokenizer(tokenizer).feed([control, *ids[:2], control, *ids[2:], control]) == "🦊"
