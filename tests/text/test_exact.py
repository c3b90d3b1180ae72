"""Which ids no text encodes to, and text that comes back from its ids byte for byte."""

from __future__ import annotations

import json
import random

import pytest

from dgemma_mlx import DgemmaError
from dgemma_mlx.text import Tokenizer, load_tokenizer
from dgemma_mlx.text.exact import encode_exactly
from tests.text.gemma_like import random_text, write_tokenizer_json


@pytest.fixture(scope="module")
def unlisted(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer with pieces that nothing merges into, which the file does not list as added tokens."""
    folder = tmp_path_factory.mktemp("unlisted")
    write_tokenizer_json(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab |= {piece: len(vocab) + i for i, piece in enumerate(["<unused5>", "<unused6241>", "never merged", "😀"])}
    path.write_text(json.dumps(content))
    return load_tokenizer(folder)


def test_every_id_that_a_text_encodes_to_is_writable_and_no_other(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    seen = set()
    for text in [*map(chr, range(0x3100)), *(random_text(rng, ["▁", "the", "city"]) for _ in range(500))]:
        seen.update(encode_exactly(tokenizer, text))
    assert seen.isdisjoint(tokenizer.unwritable_ids)
    for id in set(range(tokenizer.vocab_size)) - tokenizer.unwritable_ids - seen:  # the others can be written as well
        text = tokenizer.decode([id])
        assert tokenizer.encode(text) == [id] or tokenizer.token(id).startswith("<0x"), tokenizer.token(id)
    assert set(tokenizer.special_ids.values()) <= tokenizer.unwritable_ids


def test_a_byte_token_is_writable_where_a_character_needs_it(tokenizer: Tokenizer) -> None:
    for id in range(tokenizer.vocab_size):
        piece = tokenizer.token(id)
        if piece.startswith("<0x"):
            byte = int(piece[1:-1], 16)
            has_own_token = byte < 0x80 and id not in tokenizer.encode(chr(byte))
            occurs = byte < 0xC0 or 0xC2 <= byte <= 0xF4
            assert (id in tokenizer.unwritable_ids) == (has_own_token or not occurs), piece


def test_unused_tokens_are_control_tokens_whether_or_not_the_file_lists_them(unlisted: Tokenizer) -> None:
    for text in ("<unused5>", "<unused6241>"):
        id = unlisted.special_ids[text]
        assert unlisted.decode([id, *unlisted.encode("a")]) == "a"
        assert id in unlisted.unwritable_ids
        typed = unlisted.encode(f"x {text} y")
        assert id not in typed
        assert unlisted.decode(typed) == f"x {text} y"


def test_pieces_that_nothing_merges_into_are_unwritable(unlisted: Tokenizer) -> None:
    pieces = {unlisted.token(id) for id in unlisted.unwritable_ids - set(unlisted.special_ids.values())}
    assert "never merged" in pieces
    assert not {"😀", "\n\n", "<b>", "▁"} & pieces


def test_texts_come_back_byte_for_byte(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    extra = ["▁", "▁▁", " ▁", "\r", "\r\n", "\ufeff", "\u200b", "\t", "\x00", "A\u030a", "สวัสดี", *tokenizer.special_ids]
    for _ in range(500):
        text = random_text(rng, extra)
        ids = encode_exactly(tokenizer, text)
        assert tokenizer.decode(ids) == text
        assert "▁" in text or ids == tokenizer.encode(text)


def test_what_cannot_come_back_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DgemmaError, match=r"cannot keep '.udc80', character 3") as caught:
        encode_exactly(tokenizer, "ab\udc80")
    assert caught.value.exit_code == 2
