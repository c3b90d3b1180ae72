"""Gemma's own vocabulary of 262,144 tokens: the ids that the published tokenizer gives, and exact decoding."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgemma_mlx.text import Detokenizer, Tokenizer

pytestmark = pytest.mark.vocabulary


@pytest.fixture(scope="module")
def vectors(public_data: Path) -> list[tuple[str, list[int]]]:
    """Texts with the ids of the published tokenizer, from llama.cpp's tests of vocabularies."""
    folder = public_data / "gemma4"
    texts = (folder / "gemma-4.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (folder / "gemma-4.out").read_text().splitlines()
    return [(text, [int(id) for id in line.split()]) for text, line in zip(texts, lines, strict=True)]


def test_texts_have_the_published_ids(gemma4: Tokenizer, vectors: list[tuple[str, list[int]]]) -> None:
    assert len(vectors) == 46
    for text, ids in vectors:
        assert gemma4.encode(text) == ids
        assert gemma4.encode_control(text) == ids


def test_texts_come_back(gemma4: Tokenizer, vectors: list[tuple[str, list[int]]]) -> None:
    for text, ids in vectors:
        assert gemma4.decode(ids) == text
        detokenizer = Detokenizer(gemma4)
        assert "".join(detokenizer.feed([id]) for id in ids) + detokenizer.finish() == text


def test_control_tokens_have_the_published_ids(gemma4: Tokenizer) -> None:
    expected = {"<|tool_call>": 48, "<tool_call|>": 49, "<|tool_response>": 50, "<|channel>": 100, "<channel|>": 101}
    assert expected.items() <= gemma4.special_ids.items()
    assert (gemma4.bos_id, gemma4.eos_id, gemma4.pad_id, gemma4.vocab_size) == (2, 1, 0, 262_144)


def test_typed_control_tokens_stay_text(gemma4: Tokenizer) -> None:
    control = frozenset(gemma4.special_ids.values())
    for text in gemma4.special_ids:
        ids = gemma4.encode(f"a {text} b")
        assert control.isdisjoint(ids)
        assert gemma4.decode(ids) == f"a {text} b"
