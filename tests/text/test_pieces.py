"""A large tokenizer.json: loaded from the cache folder, and given to the library piece by piece, with the same ids."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from platformdirs import user_cache_path

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.text import Tokenizer, load_tokenizer
from dgemma_mlx.text.pieces import LARGE, load_tokenizer_json
from tests.text.gemma_like import CORPUS, SPECIAL

TEXTS = [
    *CORPUS, "", " ", "  a   b ", "\n\n\n", "\x00", "🙂é\u0301 北京", "<0x41> <unk> <|turn>user", "a\r\nb\u2581c",
    "zzz" * 50,
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the user's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return user_cache_path("dgemma-mlx") / "tokenizers"


@pytest.fixture
def large(folders: dict[str, Path], tmp_path: Path) -> Path:
    """The small tokenizer's folder, with a tokenizer.json that is large because of the spaces after it."""
    return enlarged(tmp_path, json.loads((folders["json"] / "tokenizer.json").read_text()), folders["json"])


def enlarged(tmp_path: Path, content: dict[str, Any], source: Path) -> Path:
    folder = tmp_path / "large"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content) + " " * LARGE)
    (folder / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    return folder


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    characters = "".join(CORPUS) + "éü🙂\n\t <>|_0x"
    return ["".join(rng.choices(characters, k=rng.randrange(1, 40))) for _ in range(count)]


def test_ids_are_those_of_the_whole_tokenizer(large: Path, gemma: Tokenizer) -> None:
    for turn in ("derived", "from the cache"):
        tokenizer = load_tokenizer(large)
        assert load_tokenizer_json(large / "tokenizer.json")[1] is not None, turn
        for text in [*TEXTS, *random_texts(60, seed=1)]:
            ids = gemma.encode(text)
            assert tokenizer.encode(text) == ids
            assert tokenizer.encode_control(text) == gemma.encode_control(text)
            assert tokenizer.decode(ids) == gemma.decode(ids)


def test_the_vocabulary_is_whole_before_any_text_is_read(large: Path, gemma: Tokenizer) -> None:
    tokenizer = load_tokenizer(large)
    assert (tokenizer.vocab_size, tokenizer.special_ids) == (gemma.vocab_size, gemma.special_ids)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (gemma.bos_id, gemma.eos_id, gemma.pad_id)
    for id in range(gemma.vocab_size + 2):
        assert tokenizer.token(id) == gemma.token(id)
    assert tokenizer.id_of_bytes(b" the") == gemma.id_of_bytes(b" the")
    assert tokenizer.unwritable_ids == gemma.unwritable_ids


def test_long_texts_and_many_texts_get_all_pieces(large: Path, gemma: Tokenizer) -> None:
    long = "".join(random_texts(12_000, seed=2))
    assert load_tokenizer(large).encode(long) == gemma.encode(long)
    tokenizer = load_tokenizer(large)
    for text in random_texts(300, seed=3):
        assert tokenizer.encode(text) == gemma.encode(text)


def test_threads_may_encode_at_once(large: Path, gemma: Tokenizer) -> None:
    texts = random_texts(200, seed=4)
    tokenizer = load_tokenizer(large)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == [gemma.encode(text) for text in texts]


def test_a_small_file_is_not_cached(folders: dict[str, Path], cache: Path) -> None:
    load_tokenizer(folders["json"])
    assert not cache.exists()


def array_file() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize("damage", [b"", b"nonsense", None, array_file()], ids=["empty", "other", "cut off", "array"])
def test_a_damaged_cache_is_written_again(large: Path, gemma: Tokenizer, cache: Path, damage: bytes | None) -> None:
    load_tokenizer(large)
    (kept,) = cache.iterdir()
    good = kept.read_bytes()
    kept.write_bytes(good[: len(good) // 2] if damage is None else damage)
    assert load_tokenizer(large).encode("the lazy dog") == gemma.encode("the lazy dog")
    assert len(kept.read_bytes()) == len(good)


@pytest.mark.parametrize("content", [{"other": 1}, {"skeleton": 0, "tokens": 0, "merges": 0}], ids=["keys", "values"])
def test_a_cache_that_something_else_wrote_is_done_without(
    large: Path, gemma: Tokenizer, cache: Path, content: dict[str, int]
) -> None:
    load_tokenizer(large)
    (kept,) = cache.iterdir()
    np.savez(kept, **{name: np.full(3, value, np.uint8) for name, value in content.items()})
    for _ in range(2):
        assert load_tokenizer(large).encode("a fox") == gemma.encode("a fox")
    assert kept.stat().st_size > 1000


def test_a_cache_that_cannot_be_written_is_done_without(large: Path, gemma: Tokenizer, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in the folder's place")
    assert load_tokenizer_json(large / "tokenizer.json")[1] is None
    assert load_tokenizer(large).encode("the lazy dog") == gemma.encode("the lazy dog")
    assert cache.is_file()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_in_the_cache_is_not_waited_for(large: Path, gemma: Tokenizer, cache: Path) -> None:
    load_tokenizer(large)
    (kept,) = cache.iterdir()
    kept.unlink()
    os.mkfifo(kept)
    assert load_tokenizer(large).encode("the lazy dog") == gemma.encode("the lazy dog")


def test_another_file_has_another_form(large: Path, folders: dict[str, Path], tmp_path: Path, cache: Path) -> None:
    load_tokenizer(large)
    content = json.loads((large / "tokenizer.json").read_text())
    content["model"]["merges"] = []  # each character remains a token
    tokenizer = load_tokenizer(enlarged(tmp_path, content, folders["json"]))
    assert tokenizer.encode("the") == [tokenizer.id_of_bytes(character) for character in (b"t", b"h", b"e")]
    assert len(list(cache.iterdir())) == 2


def byte_merge(content: dict[str, Any]) -> None:
    """Let the byte-fallback tokens of "🙂" be joined, as no text within the vocabulary says."""
    content["model"]["vocab"]["<0xF0><0x9F>"] = len(content["model"]["vocab"])
    content["model"]["merges"].append(["<0xF0>", "<0x9F>"])


def other_normalizer(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, content["normalizer"]]}


def other_words(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}


def nul(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["\0"] = len(content["model"]["vocab"])


def no_bytes(content: dict[str, Any]) -> None:
    content["model"]["byte_fallback"] = False


@pytest.mark.parametrize("change", [byte_merge, other_normalizer, other_words, nul, no_bytes])
def test_what_needs_more_than_pieces_is_read_by_the_library(
    large: Path, folders: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    content = json.loads((folders["json"] / "tokenizer.json").read_text())
    change(content)
    path = enlarged(tmp_path, content, folders["json"]) / "tokenizer.json"
    whole = tokenizers.Tokenizer.from_file(str(path))
    for _ in range(2):  # the second time, the cache says so
        tokenizer, pieces = load_tokenizer_json(path)
        assert pieces is None
        for text in TEXTS:
            assert tokenizer.encode(text).ids == whole.encode(text).ids


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"model": 3}', '{"model": {"type": "BPE", "byte_fallback": true}}', "\ufffe"]
)
def test_a_damaged_large_file_is_an_error(large: Path, cache: Path, text: str) -> None:
    (large / "tokenizer.json").write_text(text + " " * LARGE, encoding="utf-8")
    with pytest.raises(DgemmaError, match=r"cannot read .*tokenizer\.json"):
        load_tokenizer(large)
    assert list(cache.iterdir()) == []


@pytest.mark.vocabulary
def test_the_real_vocabulary_gives_the_ids_of_the_library(gemma4_folder: Path, public_data: Path) -> None:
    path = gemma4_folder / "tokenizer.json"
    whole, rng = tokenizers.Tokenizer.from_file(str(path)), random.Random(5)
    prose = (public_data / "gemma4" / "gemma-4.inp").read_bytes().decode()
    assert load_tokenizer_json(path)[1] is not None
    checked = 0
    for _ in range(10):
        tokenizer, pieces = load_tokenizer_json(path)
        assert pieces is not None
        for _ in range(20):
            start = rng.randrange(len(prose))
            words = "".join(rng.choices(pieces.tokens, k=6)).replace("▁", " ")
            characters = "".join(chr(rng.randrange(1, 0xD800)) for _ in range(8))
            for text in (prose[start : start + 200], words, characters, rng.choice(list(SPECIAL)) + words):
                pieces.extend(text)
                assert tokenizer.encode(text).ids == whole.encode(text).ids
                checked += 1
    assert checked == 800
