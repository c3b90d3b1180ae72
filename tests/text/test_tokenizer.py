"""Tests of the tokenizer: typed text never becomes control tokens, and decoding returns the encoded text."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.text import Tokenizer, load_tokenizer
from tests.text.gemma_like import SPECIAL, UNMARKED, random_text


def test_control_tokens_are_found_marked_or_not(gemma: Tokenizer) -> None:
    assert gemma.special_ids == SPECIAL
    assert UNMARKED <= set(gemma.special_ids)
    assert (gemma.bos_id, gemma.eos_id, gemma.pad_id) == (2, 1, 0)
    assert not gemma.is_control(gemma.encode_control("<table>")[0])


def test_sentencepiece_control_tokens(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["sentencepiece"])
    assert set(tokenizer.special_ids) == set(SPECIAL)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 1, 0)


def test_control_tokens_are_text_when_typed_and_ids_when_written_by_a_template(tokenizer: Tokenizer) -> None:
    for text, id in tokenizer.special_ids.items():
        for typed in (
            text,
            f"a{text}",
            f"{text}b",
            f" {text} ",
            text * 2,
            f"{text[:-1]}{text}",
            f"{text[0]}{text}",
        ):
            ids = tokenizer.encode(typed)
            assert not any(map(tokenizer.is_control, ids)), typed
            assert tokenizer.decode(ids) == typed
        assert tokenizer.encode_control(text) == [id]
        assert tokenizer.decode(tokenizer.encode_control(f"a {text}\n"), keep_special=True) == f"a {text}\n"
        assert tokenizer.decode(tokenizer.encode_control(f"a {text}\n")) == "a \n"


def test_any_text_survives_the_round_trip(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = random_text(rng, list(tokenizer.special_ids))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not any(map(tokenizer.is_control, ids))


def test_ordinary_added_tokens_stay_single_tokens(gemma: Tokenizer) -> None:
    for text in ("\n\n", "<table>", "<b>"):
        assert len(gemma.encode(text)) == 1
        assert len(gemma.encode_control(f"<|turn>{text}<turn|>")) == 3


def test_ignored_mark_makes_a_control_token_plain(tokenizer: Tokenizer) -> None:
    control = next(iter(tokenizer.special_ids))
    marked = f"{control}{control[0]}\ue000{control[1:]}x"
    assert tokenizer.encode_control(marked, ignore=["\ue000"]) == [
        tokenizer.special_ids[control],
        *tokenizer.encode(f"{control}x"),
    ]


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"


def test_merges_that_form_a_control_token_are_avoided(folders: dict[str, Path], tmp_path: Path) -> None:
    raw = json.loads((folders["json"] / "tokenizer.json").read_text())
    model = raw["model"]
    model["vocab"] |= {piece: len(model["vocab"]) + n for n, piece in enumerate(["<e", "os>", "eo"])}
    model["merges"] = [["<", "e"], ["o", "s"], ["os", ">"], ["<e", "os>"], *model["merges"]]
    model["vocab"].setdefault("os", len(model["vocab"]))
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("x<eos>")) == "x<eos>"
    raw["model"]["ignore_merges"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(tmp_path)
    for text in SPECIAL:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_normalization_creates_no_control_token(folders: dict[str, Path], tmp_path: Path) -> None:
    raw = json.loads((folders["json"] / "tokenizer.json").read_text())
    raw["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, raw["normalizer"]]}
    for token in raw["added_tokens"]:
        token["normalized"] = token["content"] == "<|turn>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("＜|turn＞")  # NFKC turns the fullwidth brackets into ASCII
    assert not any(map(tokenizer.is_control, ids))
    assert tokenizer.decode(ids) == "<|turn>"


def test_unknown_characters_without_byte_fallback(folders: dict[str, Path], tmp_path: Path) -> None:
    raw = json.loads((folders["json"] / "tokenizer.json").read_text())
    raw["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(tmp_path)
    assert SPECIAL["<unk>"] in tokenizer.encode("a東b")
    assert SPECIAL["<unk>"] not in tokenizer.encode("a<unk>b")


def test_of_overlapping_control_tokens_the_leftmost_longest_wins(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    raw = json.loads((folders["json"] / "tokenizer.json").read_text())
    ids = {}
    for text in ("<|a>", "<|a><|b>", "<|b>"):
        ids[text] = len(raw["model"]["vocab"])
        raw["model"]["vocab"][text] = ids[text]
        raw["added_tokens"].append(
            {**raw["added_tokens"][0], "id": ids[text], "content": text, "special": True}
        )
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_control("<|a><|b><|b><|a>") == [ids["<|a><|b>"], ids["<|b>"], ids["<|a>"]]
    assert tokenizer.decode(tokenizer.encode("<|a><|b><|b>")) == "<|a><|b><|b>"


def test_truncation_and_padding_in_the_file_are_disabled(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    raw = json.loads((folders["json"] / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    text = "the quick brown fox " * 5
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(text) == load_tokenizer(folders["json"]).encode(text)


def test_named_tokens_come_from_the_config(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(folders["json"] / "tokenizer.json", tmp_path)
    assert load_tokenizer(tmp_path).bos_id == 2
    config = {
        "bos_token": None,
        "eos_token": {"content": "<turn|>"},
        "sep_token": "quick",
        "additional_special_tokens": ["<table>", {"content": "<b>"}],
        "extra_special_tokens": {"x": "</b>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, SPECIAL["<turn|>"])
    assert {"<table>", "<b>", "</b>"} <= set(tokenizer.special_ids)


def test_what_cannot_be_a_control_token_is_not_made_one(folders: dict[str, Path], tmp_path: Path) -> None:
    """Text that the vocabulary lacks, and white space."""
    for kind in ("json", "sentencepiece"):
        folder = tmp_path / kind
        shutil.copytree(folders[kind], folder)
        plain = load_tokenizer(folder)
        config = {"eos_token": "<missing>", "extra_special_tokens": ["\n\n", "<lacking>"]}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(folder)
        assert tokenizer.eos_id is None
        assert tokenizer.special_ids == plain.special_ids
        assert tokenizer.decode(tokenizer.encode_control("a\n\nb")) == "a\n\nb"


def test_ids_outside_the_vocabulary_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size, 10**6, -1, -(2**63)]) == ""  # the last is a picture's key
    assert tokenizer.token(tokenizer.vocab_size) == ""


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"a": 1}', b"version https://git-lfs.github.com/spec/v1\n", b"\xff\x00", None]
)
def test_a_broken_file_is_one_clear_error(
    folders: dict[str, Path], tmp_path: Path, name: str, content: bytes | None
) -> None:
    source = folders["sentencepiece" if name == "tokenizer.model" else "json"]
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    if name == "tokenizer_config.json" and content == b'{"a": 1}':
        assert load_tokenizer(tmp_path).bos_id == 2
        return
    with pytest.raises(DgemmaError, match=name) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.hint and "\n" not in caught.value.message


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DgemmaError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_another_kind_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    raw = json.loads((folders["json"] / "tokenizer.json").read_text())
    for decoder in (
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        None,
    ):
        raw["decoder"] = decoder
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        with pytest.raises(DgemmaError, match="is not a Gemma tokenizer"):
            load_tokenizer(tmp_path)


def test_importing_the_package_imports_no_heavy_library() -> None:
    script = """if True:
        import sys, dgemma_mlx.text
        heavy = {"mlx.core", "mlx_lm", "transformers", "torch", "tokenizers", "sentencepiece", "jinja2"}
        print(sorted(heavy & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"additional_special_tokens": 5}, "additional_special_tokens must be a list, not 5"),
        ({"extra_special_tokens": "<a>"}, "extra_special_tokens must be a list, not '<a>'"),
        ({"bos_token": 2}, "bos_token must be a token, not 2"),
        ({"eos_token": ["<eos>"]}, "eos_token must be a token, not ['<eos>']"),
        ({"pad_token": {"content": 5}}, "pad_token must be a token, not {'content': 5}"),
        ({"unk_token": ""}, "unk_token must be a token, not ''"),
    ],
)
def test_tokens_that_are_none_are_refused(
    folders: dict[str, Path], tmp_path: Path, config: dict[str, object], message: str
) -> None:
    shutil.copy(next(folders["json"].glob("tokenizer.json")), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DgemmaError) as error:
        load_tokenizer(tmp_path)
    assert error.value.message == f"tokenizer_config.json: {message}"
    assert error.value.hint


def test_a_text_that_needs_ids_the_model_lacks_is_an_error(tmp_path: Path) -> None:
    _write_demo(tmp_path, lambda file: file["model"]["vocab"].update({"A": 10**6}))
    assert load_tokenizer(tmp_path).encode("A") == [10**6]
    tokenizer = load_tokenizer(tmp_path, 768)
    assert tokenizer.decode(tokenizer.encode("B b")) == "B b"
    for encode in (tokenizer.encode, tokenizer.encode_control):
        with pytest.raises(DgemmaError, match="1,000,000, but the model has only 768 ids"):
            encode("A")


def test_the_first_id_that_the_model_lacks_is_its_number_of_ids(tmp_path: Path) -> None:
    _write_demo(tmp_path, lambda file: file["model"]["vocab"].update({"A": 900}))
    assert load_tokenizer(tmp_path, 901).encode("A") == [900]
    with pytest.raises(DgemmaError, match="the id 900, but the model has only 900 ids"):
        load_tokenizer(tmp_path, 900).encode("A")


@pytest.mark.parametrize(
    "change",
    [{"model": {"continuing_subword_prefix": "(.*)+["}}, {"decoder": {"type": "Replace"}},
     {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
     {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}}],
)  # fmt: skip
def test_settings_on_which_the_library_fails_are_one_error(tmp_path: Path, change: dict[str, Any]) -> None:
    def apply(file: dict[str, Any]) -> None:
        for name, value in change.items():
            file[name] = {**file[name], **value} if name == "model" else value

    _write_demo(tmp_path, apply)
    with pytest.raises(DgemmaError, match="cannot read"):
        load_tokenizer(tmp_path)


def _write_demo(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the demo model's tokenizer with a change."""
    file = json.loads((DEMO_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    change(file)
    (folder / "tokenizer.json").write_text(json.dumps(file))
