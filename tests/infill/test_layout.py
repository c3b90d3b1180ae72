"""Texts with gaps as prefix and canvas."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from dgemma_mlx import DgemmaError, Gap
from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.generation.model import block_length
from dgemma_mlx.infill.layout import Layout
from dgemma_mlx.infill.template import Part, parse_gaps
from dgemma_mlx.text import Tokenizer, load_tokenizer
from tests.text.gemma_like import random_text, write_tokenizer_json, write_tokenizer_model

END, PAD = 106, 0


@pytest.fixture(scope="module", params=["demo", "json", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = DEMO_FOLDER
    if request.param != "demo":
        folder = tmp_path_factory.mktemp("tokenizer")
        (write_tokenizer_json if request.param == "json" else write_tokenizer_model)(folder)
    return load_tokenizer(folder)


def random_parts(rng: random.Random) -> list[Part]:
    """A text cut anywhere, in words and characters too, a gap at each cut."""
    text = "".join(random_text(rng, extra=[" ", "  ", "\n ", "e\u0301", "🙂", "\r\n", "▁", " ▁"]) for _ in "12")[:60]
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(1, 3)))
    parts: list[Part] = [text[: cuts[0]]]
    for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True):
        parts += [Gap(rng.randint(1, 4)), text[start:end]]
    return parts


def test_pinned_text_is_kept_byte_for_byte_at_any_boundary(tokenizer: Tokenizer) -> None:
    """The ids of prefix and canvas, decoded, are the text with its gaps filled, whatever is written into them."""
    rng = random.Random(7)
    ordinary = [id for id in range(tokenizer.vocab_size) if id not in tokenizer.unwritable_ids]
    spacing = [id for id in ordinary if tokenizer.token_bytes(id)[:1] == b" "]
    for _ in range(1000):
        parts = random_parts(rng)
        layout = Layout(tokenizer, parts, 256, END, PAD)
        lengths = tuple(slot.gap.size or 1 for slot in layout.slots)
        length = layout.length([lengths])
        [(ids, free)] = layout.rows([lengths], length)
        canvas = [rng.choice(ordinary) if is_free else id for id, is_free in zip(ids, free, strict=True)]
        for slot, (start, _) in zip(layout.slots, layout.spans(lengths), strict=True):
            if slot.spaced:
                canvas[start] = rng.choice(spacing)
        gaps, is_cut = layout.texts(canvas, lengths)
        assert "\ufffd" not in "".join(gaps)
        whole = layout.whole(gaps)
        texts = [part for part in parts if isinstance(part, str)]
        assert whole.startswith(texts[0])
        assert whole.endswith(texts[-1])
        end = layout.used(lengths, length) - 1
        assert canvas[end] == END
        written = b"".join(tokenizer.token_bytes(id) for id in [*layout.prefix, *canvas[:end]])
        if not is_cut:  # else a gap was given half a character
            assert written.decode() == whole.rstrip() or written.decode() == whole[: len(whole) - len(texts[-1])] + (
                texts[-1].rstrip()
            )


def test_half_characters_are_left_out_of_a_gap(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("\U0010fffd")[:2]
    word, replacement = tokenizer.encode("ab"), tokenizer.encode("\ufffd")
    for ids, text, is_cut in [
        (word, "ab", False), (word + half, "ab", True), (half + word, "ab", True), (half, "", True),
        (word + replacement, "ab", True), (half + half + word, "ab", True),
    ]:  # fmt: skip
        layout = Layout(tokenizer, ["x", Gap(len(ids)), "é\ufffd"], 64, END, PAD)
        assert layout.texts([*ids, *tokenizer.encode("é\ufffd")], (len(ids),)) == ((text,), is_cut)
    layout = Layout(tokenizer, ["x ", Gap(original="c\ufffd"), ""], 64, END, PAD)
    spaced = tokenizer.encode(" a\ufffd")
    assert layout.texts(spaced, (len(spaced),)) == (("a\ufffd",), False)  # it was there before


def test_text_that_a_tokenizer_cannot_keep_is_refused(tokenizer: Tokenizer) -> None:
    for parts in (["\ud800", Gap(1), ""], ["", Gap(1), "a\ud800", Gap(1), ""], ["", Gap(original="\ud800"), ""]):
        with pytest.raises(DgemmaError, match="cannot keep") as caught:
            Layout(tokenizer, parts, 64, END, PAD)
        assert caught.value.exit_code == 2


def test_what_is_free_is_the_gaps(tokenizer: Tokenizer) -> None:
    layout = Layout(tokenizer, parse_gaps("a ___:3___ b ___ c\n"), 64, END, PAD)
    lengths = (3, 5)
    pins = layout.pins([lengths, (1, 1)], 64)
    for row, sizes in enumerate([lengths, (1, 1)]):
        free = np.flatnonzero(np.array(pins.free[row])).tolist()
        assert free == [place for start, end in layout.spans(sizes) for place in range(start, end)]
    ids = pins.ids[0].tolist()
    assert isinstance(ids, list)
    assert END in ids
    assert set(ids[ids.index(END) + 1 :]) == {PAD}


def test_barred_ids_get_no_probability(tokenizer: Tokenizer) -> None:
    layout = Layout(tokenizer, parse_gaps("a ___:2___b___:2___"), 64, END, PAD)
    V = tokenizer.vocab_size + 3
    bias = layout.barred([(2, 2)], 64, V)
    logits = np.array(bias.table[bias.rows])[0]
    spans = layout.spans((2, 2))
    assert [slot.spaced for slot in layout.slots] == [True, False]
    for place in range(64):
        for id in range(V):
            known = id < tokenizer.vocab_size and id not in tokenizer.unwritable_ids
            fits = place != spans[0][0] or tokenizer.token_bytes(id)[:1] == b" "
            assert (logits[place, id] == 0) == (known and fits)


def test_a_long_end_is_cut_and_nothing_ends_it(tokenizer: Tokenizer) -> None:
    layout = Layout(tokenizer, ["x", Gap(2), " words" * 100], 64, END, PAD)
    [(ids, free)] = layout.rows([(2,)], layout.length([(2,)]))
    assert len(ids) == len(free) == 64
    assert END not in ids
    assert layout.used((2,), 64) == 64


def test_gaps_that_do_not_fit_say_what_does(tokenizer: Tokenizer) -> None:
    with pytest.raises(DgemmaError, match="a canvas holds only 32") as caught:
        Layout(tokenizer, ["a", Gap(), " word" * 50, Gap(), "b"], 32, END, PAD)
    assert "32 tokens fit" in caught.value.hint
    assert caught.value.exit_code == 2
    with pytest.raises(DgemmaError, match="take 33 tokens"):
        Layout(tokenizer, ["a", Gap(33), "b"], 32, END, PAD)
    assert Layout(tokenizer, ["a" * 500, Gap(32), "b" * 500], 32, END, PAD).room == 32


@pytest.mark.parametrize(("needed", "length"), [(1, 64), (64, 64), (65, 128), (200, 256), (300, 256)])
def test_a_canvas_has_whole_blocks(needed: int, length: int) -> None:
    assert block_length(needed, 256) == length
    assert block_length(needed, 32) == 32
