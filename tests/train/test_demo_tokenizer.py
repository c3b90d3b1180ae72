"""The demo tokenizer: Gemma's ids and pipeline, lossless text, and the chat format."""

from __future__ import annotations

import json
import random
import runpy
import string
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jinja2.sandbox
import pytest
from tokenizers import Tokenizer

import dgemma_mlx
from dgemma_mlx.train import demo_tokenizer
from dgemma_mlx.train.tasks import TASKS
from tests.text.gemma_like import SPECIAL

SHIPPED = Path(dgemma_mlx.__file__).parent / "demo"
Render = Callable[..., str]
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# The control tokens of Gemma 4 at their ids.
GEMMA_IDS = {token: id for token, id in SPECIAL.items() if token not in ("<mask>", "<|image|>")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "new" / "folder"
    demo_tokenizer.build(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def render(folder: Path) -> Render:
    """Return a function that renders the chat template in the same environment as transformers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = json.dumps
    template = environment.from_string((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    return partial(template.render, bos_token="<bos>")


def random_text(rng: random.Random) -> str:
    """Return random Unicode text without surrogates and without the character that stands for a space."""
    ranges = (range(0x80), range(0x80), range(0x3000), range(0x10000), range(0x10000, 0x110000))
    characters = [chr(rng.choice(rng.choice(ranges))) for _ in range(rng.randint(0, 20))]
    return "".join(c for c in characters if c != demo_tokenizer.SPACE and not 0xD800 <= ord(c) < 0xE000)


def test_shipped_files_are_what_build_writes(folder: Path) -> None:
    for name in FILES:
        assert (SHIPPED / name).read_bytes() == (folder / name).read_bytes(), name


def test_ids_are_gemmas(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(768))
    assert {token: vocab[token] for token in GEMMA_IDS} == GEMMA_IDS
    assert vocab["\n"] == 107
    assert all(vocab[token] < 105 for token in ("<|image|>", "<|image>", "<image|>"))
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    assert special == {*GEMMA_IDS, "<|image|>", "<|image>", "<image|>"}


def test_decoding_restores_any_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(5000):
        text = random_text(rng)
        ids = tokenizer.encode(text).ids
        assert 3 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_decoding_restores_every_unicode_character(tokenizer: Tokenizer) -> None:
    for start in range(0, 0x110000, 0x1000):
        codes = (code for code in range(start, start + 0x1000) if not 0xD800 <= code < 0xE000)
        text = "".join(chr(code) for code in codes if chr(code) != demo_tokenizer.SPACE)
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_printable_ascii_has_its_own_tokens(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.get_vocab()
    for code in range(0x21, 0x7F):
        assert chr(code) in vocab
        assert tokenizer.encode(chr(code)).ids == [vocab[chr(code)]]
    assert tokenizer.encode("\n").ids == [107]


def test_each_digit_is_one_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("17 + 25").tokens == ["1", "7", "▁+", "▁2", "5"]
    rng = random.Random(0)
    for _ in range(200):
        numbers = [rng.randint(0, 10**6) for _ in range(5)]
        text = " ".join(map(str, numbers))
        tokens = tokenizer.encode(text).tokens
        assert len(tokens) == sum(len(str(number)) for number in numbers)
        assert all(token.removeprefix("▁") in list("0123456789") for token in tokens)


def test_a_name_has_the_same_tokens_everywhere(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        name = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 9))).capitalize()
        tokens = tokenizer.encode(name).tokens
        assert tokenizer.encode(f"I am {name}.").tokens == [*tokenizer.encode("I am ").tokens, *tokens, "."]
        assert tokenizer.encode(f'"{name}"}}').tokens == ['"', *tokens, '"}']


@pytest.mark.parametrize("name", list(TASKS))
def test_conversations_are_short(render: Render, tokenizer: Tokenizer, name: str) -> None:
    rng = random.Random(0)
    for split in ("train", "heldout"):
        for _ in range(300):
            example = TASKS[name].sample(rng, split)
            prompt = render(messages=example.messages, add_generation_prompt=True)
            answer = tokenizer.encode(example.answer).ids
            assert tokenizer.decode(answer) == example.answer
            assert len(tokenizer.encode(prompt).ids) <= (128 if name == "recall" else 64)
            assert len(answer) + 1 <= (64 if name == "count" else 34)


def test_plain_chat(render: Render, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "user", "content": " hi\n"},
        {"role": "assistant", "content": "<|channel>thought\nhm<channel|>Hello."},
        {"role": "user", "content": parts},
    ]
    text = render(messages=messages, add_generation_prompt=True)
    assert text == (
        "<bos><|turn>user\nhi<turn|>\n<|turn>model\nHello.<turn|>\n<|turn>user\na<|image|>b<turn|>\n<|turn>model\n"
    )
    assert render(messages=messages[:1]) == "<bos><|turn>user\nhi<turn|>\n"
    ids = tokenizer.encode(render(messages=messages[:1], add_generation_prompt=True)).ids
    user, model = tokenizer.get_vocab()["user"], tokenizer.get_vocab()["model"]
    assert ids[:4] == [2, 105, user, 107]
    assert ids[-5:] == [106, 107, 105, model, 107]


def test_system_turn(render: Render) -> None:
    messages = [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "hi"}]
    user = "<|turn>user\nhi<turn|>\n"
    assert render(messages=messages) == f"<bos><|turn>system\nBe kind.<turn|>\n{user}"
    thinking = render(messages=messages, enable_thinking=True)
    assert thinking == f"<bos><|turn>system\n<|think|>\nBe kind.<turn|>\n{user}"
    thinking = render(messages=messages[1:], enable_thinking=True)
    assert thinking == f"<bos><|turn>system\n<|think|>\n<turn|>\n{user}"
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    with_tools = render(messages=messages, tools=tools)
    assert with_tools.startswith("<bos><|turn>system\nBe kind.<|tool>declaration:clock{")
    assert with_tools.endswith(f"}}<tool|><turn|>\n{user}")


def test_transformers_gives_the_same_ids(folder: Path, render: Render, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<unk>"]) == [0, 1, 2, 3]
    assert (theirs.pad_token, theirs.eos_token, theirs.bos_token) == ("<pad>", "<eos>", "<bos>")
    assert len(theirs) == 768
    rng = random.Random(0)
    for _ in range(500):
        text = random_text(rng)
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text).ids
        assert theirs.decode(tokenizer.encode(text).ids) == text
    for task in TASKS.values():
        messages = list(task.sample(rng, "train").messages)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == tokenizer.encode(render(messages=messages, add_generation_prompt=True)).ids


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.delitem(sys.modules, demo_tokenizer.__name__)  # runpy warns about modules that are already imported
    monkeypatch.setattr(sys, "argv", ["demo_tokenizer", str(tmp_path)])
    runpy.run_module("dgemma_mlx.train.demo_tokenizer", run_name="__main__")
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["bos_token"] == "<bos>"
