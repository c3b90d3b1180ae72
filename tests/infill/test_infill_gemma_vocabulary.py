"""``fill``, ``edit`` and ``choose`` with Gemma's own vocabulary: texts of many kinds, cut anywhere, byte for byte."""

from __future__ import annotations

import random
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import dgemma_mlx
from dgemma_mlx import Filled, Gap, Model, choose, edit, fill
from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.infill.layout import Layout, characters
from dgemma_mlx.infill.template import Part
from dgemma_mlx.text import Tokenizer
from dgemma_mlx.text.exact import encode_exactly
from tests.model.checkpoint import flat_config, random_tensors, write_checkpoint

pytestmark = pytest.mark.vocabulary

ROOT = Path(__file__).parents[2]
CANVAS, END, PAD = 32, 106, 0
TYPESCRIPT = """\
export async function fetchAll<T extends { id: number }>(urls: readonly string[]): Promise<Map<string, T>> {
  const found = new Map<string, T>();  // `${key}` -> value
  for (const [i, url] of urls.entries()) {
    const response = await fetch(`${url}?page=${i + 1}&q=\\u2581`, { headers: { Accept: "application/json" } });
    if (!response.ok) throw new Error(`HTTP ${response.status}: ${url}`);
    found.set(url, (await response.json()) as T);
  }
  return found;
}
"""
THAI = (
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ จึงตัดคำได้ยาก ตัวอย่างเช่น \u201cน้ำตาล\u201d กับ ๑๒๓ และ ฯลฯ\nกรุงเทพมหานคร อมรรตนโกสินทร์ ๆ "
    "ผู้ใหญ่หาผ้าใหม่\u200bให้สะใภ้ใช้คล้องคอ\n\nใฝ่ใจเอาใส่ห่อ มิหลงใหลใครขอดู 😀 ก็ต้องการ\n"
)
ACCENTS = (
    "Là-bas, l'élève naïf goûte une crème brûlée à Zürich; Ångström, señor, coração.\n"
    "Tiếng Việt: Những người thợ đã về, đường phố vắng lặng. 한국어 텍스트와 が、ぎ、ぐ。\n"
)
TEXTS = {
    "python": (ROOT / "dgemma_mlx" / "infill" / "search.py").read_text(encoding="utf-8"),
    "typescript": TYPESCRIPT,
    "markdown": (ROOT / "docs" / "fill.md").read_text(encoding="utf-8"),
    "crlf": "\ufeff" + (TYPESCRIPT + "a\rb\t\tc\x00d \n").replace("\n", "\r\n").replace("  ", "\t"),
    "thai": THAI,
    "nfd": unicodedata.normalize("NFD", ACCENTS),
}
AWKWARD = ("▁", " ▁", "<unused7>", "<|turn>", "\u200d", "👩‍👩‍👧", "\ufeff", "\x00", "\r", "\ufffd", "  ", "\U0010fffd")
kinds = pytest.mark.parametrize("kind", TEXTS)


def random_parts(rng: random.Random, text: str, span: int) -> list[Part]:
    """Return up to ``span`` characters of a text, with an awkward string in them, cut anywhere into text and gaps."""
    start = rng.randrange(max(len(text) - span, 1))
    piece = text[start : start + span]
    place = rng.randrange(len(piece) + 1)
    piece = piece[:place] + rng.choice(("", *AWKWARD)) + piece[place:]
    cuts = sorted(rng.choices(range(len(piece) + 1), k=rng.randint(1, 3)))
    parts: list[Part] = [piece[: cuts[0]]]
    for begin, end in zip(cuts, [*cuts[1:], len(piece)], strict=True):
        parts += [Gap(size=rng.randint(1, 4)), piece[begin:end]]
    return parts


@pytest.fixture(scope="module")
def writable(gemma4: Tokenizer) -> list[int]:
    return [id for id in range(gemma4.vocab_size) if id not in gemma4.unwritable_ids]


def test_the_unwritable_ids_are_those_that_encoding_never_gives(gemma4: Tokenizer, writable: list[int]) -> None:
    control = set(gemma4.special_ids.values())
    assert control <= gemma4.unwritable_ids
    assert [gemma4.special_ids[f"<unused{n}>"] for n in (0, 6241)] == [6, 262_143]
    others = {gemma4.token(id) for id in gemma4.unwritable_ids - control}
    assert {"<0x41>", "<0xC0>", "<0xFF>", "▁::::::::"} <= others
    assert not {"<0xE2>", "<0x96>", "<0x81>", "<0x00>", "\n\n", "<table>", "▁▁"} & others
    for id in random.Random(1).sample(writable, 20_000):
        assert gemma4.encode(gemma4.decode([id])) == [id] or gemma4.token(id).startswith("<0x"), gemma4.token(id)


@kinds
def test_any_cut_comes_back_whatever_is_written_into_the_gaps(
    gemma4: Tokenizer, writable: list[int], kind: str
) -> None:
    rng = random.Random(kind)
    spacing = [id for id in writable if gemma4.token_bytes(id)[:1] == b" "]
    for _ in range(1000):
        parts = random_parts(rng, TEXTS[kind], 120)
        layout = Layout(gemma4, parts, 256, END, PAD)
        lengths = tuple(slot.gap.size or 1 for slot in layout.slots)
        length = layout.length([lengths])
        [(canvas, _)] = layout.rows([lengths], length)
        for slot, (start, end) in zip(layout.slots, layout.spans(lengths), strict=True):
            canvas[start:end] = rng.choices(writable, k=end - start)
            if slot.spaced:
                canvas[start] = rng.choice(spacing)
        gaps, is_cut = layout.texts(canvas, lengths)
        whole = check_kept(parts, gaps, layout.whole(gaps))
        if not is_cut:
            end = layout.used(lengths, length) - 1
            assert canvas[end] == END
            check_ids(gemma4, [*layout.prefix, *canvas[:end]], whole, str(parts[-1]))


def check_kept(parts: list[Part], gaps: tuple[str, ...], whole: str) -> str:
    """Check that the whole text is the text around the gaps, byte for byte, and the gaps' texts. Return it."""
    written = iter(gaps)
    expected = b"".join((part if isinstance(part, str) else next(written)).encode() for part in parts)
    assert whole.encode() == expected
    assert "\ufffd" not in "".join(gaps)
    return whole


def check_ids(tokenizer: Tokenizer, ids: list[int], whole: str, last: str) -> None:
    """Check that ids decode to a text without the white space at the end of its last part."""
    assert tokenizer.decode(ids) == whole[: len(whole) - len(last)] + last.rstrip()


@pytest.fixture(scope="module")
def model(gemma4_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A network of random weights with Gemma's vocabulary of 262,144 tokens."""
    config: dict[str, Any] = flat_config(
        vocab_size=262_144, hidden_size=16, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=4096,
    )
    config |= {"canvas_length": CANVAS, "eos_token_id": [1, END], "image_token_id": 258_880}
    folder = write_checkpoint(tmp_path_factory.mktemp("wide"), config, random_tensors(config))
    shutil.copytree(gemma4_folder, folder, dirs_exist_ok=True)
    shutil.copy(DEMO_FOLDER / "generation_config.json", folder)
    return dgemma_mlx.load(str(folder))


def quick(model: Model, seed: int) -> dict[str, Any]:
    return {"seed": seed, "candidates": 1, "generation": model.generation.override(max_denoising_steps=1)}


def check_filled(model: Model, parts: list[Part], filled: Filled) -> None:
    """Check every candidate: the text around the gaps, the ids of the canvas, and what is in the gaps."""
    tokenizer = model.tokenizer
    layout = Layout(tokenizer, parts, CANVAS, END, PAD)
    for candidate, whole in zip(filled.candidates, filled.texts, strict=True):
        check_kept(parts, candidate.texts, whole)
        for start, end in layout.spans(candidate.lengths):
            assert tokenizer.unwritable_ids.isdisjoint(candidate.tokens[start:end])
        used = layout.used(candidate.lengths, len(candidate.tokens))
        [(pinned, free)] = layout.rows([candidate.lengths], len(candidate.tokens))
        assert all(is_free or a == b for a, b, is_free in zip(candidate.tokens, pinned, free, strict=True))
        if not candidate.cut and candidate.tokens[used - 1] == END:
            check_ids(tokenizer, [*layout.prefix, *candidate.tokens[: used - 1]], whole, str(parts[-1]))
    assert filled.text == filled.texts[0]


@kinds
def test_fill_keeps_the_text_around_random_gaps(model: Model, kind: str) -> None:
    rng = random.Random(kind)
    for seed in range(12):
        parts = random_parts(rng, TEXTS[kind], 10)
        check_filled(model, parts, fill(model, parts, raw=True, **quick(model, seed)))


def test_fill_tries_lengths_and_keeps_the_text(model: Model) -> None:
    parts: list[Part] = [THAI[:40], Gap(hint="a word"), THAI[40:50]]
    filled = fill(model, parts, **{**quick(model, 5), "candidates": 3})
    assert len({candidate.lengths for candidate in filled.candidates}) > 1
    check_filled(model, parts, filled)


@kinds
def test_edit_changes_nothing_but_the_part(model: Model, kind: str) -> None:
    lines = TEXTS[kind].split("\n")
    first = next(number for number, line in enumerate(lines, 1) if len(line.strip()) > 10)
    text = "\n".join([*lines[: first - 1], lines[first - 1][:20], *lines[first : first + 2]])
    edited = edit(model, "Change it.", text, lines=(first, first), **quick(model, 1))
    before = "".join(f"{line}\n" for line in lines[: first - 1])
    line = lines[first - 1][:20]
    tail = line[len(line.rstrip("\r\n")) :] + "".join(f"\n{line}" for line in lines[first : first + 2])
    check_filled(model, [before, Gap(original=line.rstrip("\r\n")), tail], edited)
    target = next(c for c in line if c.isalpha())
    begin = text.index(target)
    text = text[: begin + 8].replace(target, "") + target + text[begin + 8 : begin + 40].replace(target, "") + " \n"
    edited = edit(model, "Change it.", text, match=target, **quick(model, 2))
    at = text.index(target)
    check_filled(model, [text[:at], Gap(original=target), text[at + 1 :]], edited)


@kinds
def test_an_edit_of_all_starts_from_the_very_text_and_writes_only_characters(model: Model, kind: str) -> None:
    tokenizer, text = model.tokenizer, TEXTS[kind][:12] + "▁x ▁\u200d \t\n"
    ids = encode_exactly(tokenizer, text.rstrip())
    assert tokenizer.decode(ids).encode() == text.rstrip().encode()
    edited = edit(model, "Change it.", text, strength=0.2, **quick(model, 3))
    [candidate] = edited.candidates
    assert (candidate.texts[0], candidate.cut) == characters(tokenizer, candidate.tokens[: candidate.lengths[0]], text)
    assert edited.text == candidate.texts[0].rstrip() + " \t\n"
    assert tokenizer.unwritable_ids.isdisjoint(candidate.tokens[: candidate.lengths[0]])
    assert "\ufffd" not in edited.text


def test_a_choice_with_the_character_of_spaces_is_not_one_with_a_space(model: Model) -> None:
    one, other = choose(model, "Which?", ["a▁b", "a b"], seed=1)
    assert one.log_probability != other.log_probability
    assert one.probability + other.probability == pytest.approx(1)


def test_a_barred_id_is_never_written_even_if_the_network_prefers_it(model: Model) -> None:
    """The embedding is tied: of unused tokens whose rows are made large, some would win everywhere."""
    table = model.network.embed_tokens
    weight = table.weight
    table.weight = mx.where(mx.arange(262_144)[:, None] < 261_144, weight, 50 * weight)  # the last 1,000 are unused
    try:
        parts: list[Part] = ["a ", Gap(3), " b"]
        check_filled(model, parts, fill(model, parts, raw=True, **quick(model, 1)))
    finally:
        table.weight = weight
