"""Tokenizer and chat template, compared with transformers: the same ids, also for hostile contents."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.text import ChatTemplate, Tokenizer, encode_chat, load_tokenizer
from tests.text.gemma_like import CONVERSATIONS, SPECIAL, TOOLS, random_text, write_tokenizer_json

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

DEMO = Path(__file__).parents[2] / "dgemma_mlx" / "demo"


@pytest.fixture(scope="module", params=["PreTrainedTokenizerFast", "GemmaTokenizer", "demo"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer and template, which the reference reads with different tokenizer classes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "demo":
        shutil.copytree(
            DEMO, folder, dirs_exist_ok=True, ignore=lambda _, names: [n for n in names if "model" in n]
        )
    else:
        write_tokenizer_json(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(
            json.dumps({**config, "tokenizer_class": request.param})
        )
    return folder


@pytest.fixture
def reference(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def ours(folder: Path) -> tuple[Tokenizer, ChatTemplate]:
    return load_tokenizer(folder), ChatTemplate.load(folder)


def _known_roles(folder: Path, messages: list[dict[str, Any]]) -> bool:
    """Return whether the template supports all messages. The demo's template does not support answers of tools."""
    return "macro literal" in (folder / "chat_template.jinja").read_text() or all(
        m.get("content") for m in messages
    )


def test_ids_and_text_of_chats(folder: Path, reference: Any, ours: tuple[Tokenizer, ChatTemplate]) -> None:
    tokenizer, template = ours
    compared = 0
    choices = list(itertools.product([None, TOOLS], [False, True], [False, True]))
    for messages in filter(lambda messages: _known_roles(folder, messages), CONVERSATIONS):
        for tools, thinking, prompt in choices:
            options: dict[str, Any] = {
                "tools": tools,
                "enable_thinking": thinking,
                "add_generation_prompt": prompt,
                "date": "yes",
            }
            text = reference.apply_chat_template(messages, tokenize=False, **options)
            ids = reference.apply_chat_template(messages, return_dict=False, **options)
            assert template.render(messages, **options) == text
            assert encode_chat(tokenizer, template, messages, **options) == ids
            compared += 1
    assert compared >= 24


def test_ids_of_random_harmless_chats(reference: Any, ours: tuple[Tokenizer, ChatTemplate]) -> None:
    tokenizer, template = ours
    rng = random.Random(7)
    for _ in range(200):
        roles = ["system"] * rng.randrange(2) + ["user", "assistant"] * rng.randrange(3) + ["user"]
        messages = [{"role": role, "content": random_text(rng)} for role in roles]
        if not any(token in message["content"] for message in messages for token in tokenizer.special_ids):
            ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert encode_chat(tokenizer, template, messages) == ids


def test_ids_of_hostile_chats(reference: Any, ours: tuple[Tokenizer, ChatTemplate]) -> None:
    """With ``sanitize_control_tokens``, the reference encodes no control token of user content, as we do."""
    tokenizer, template = ours
    reference.chat_control_tokens = list(tokenizer.special_ids)
    rng = random.Random(8)
    for _ in range(200):
        messages = [{"role": "user", "content": random_text(rng, [*tokenizer.special_ids])}]
        ids = reference.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
        )
        assert encode_chat(tokenizer, template, messages) == ids


def test_ids_of_texts(reference: Any, ours: tuple[Tokenizer, ChatTemplate]) -> None:
    tokenizer, _ = ours
    rng = random.Random(9)
    for _ in range(300):
        text = random_text(rng, list(tokenizer.special_ids))
        assert tokenizer.encode_control(text) == reference.encode(text, add_special_tokens=False)
        text = random_text(rng)
        if not any(token in text for token in tokenizer.special_ids):
            ids = tokenizer.encode(text)
            assert ids == reference.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids) == reference.decode(ids)


def test_names_of_tokens(reference: Any, ours: tuple[Tokenizer, ChatTemplate]) -> None:
    tokenizer, _ = ours
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        reference.bos_token_id,
        reference.eos_token_id,
        reference.pad_token_id,
    )
    assert set(reference.all_special_tokens) <= set(tokenizer.special_ids)
    assert {
        token for token in SPECIAL if reference.convert_tokens_to_ids(token) != reference.unk_token_id
    } - {"<unk>"} <= set(tokenizer.special_ids)


def test_decoding_any_ids(reference: Any, ours: tuple[Tokenizer, ChatTemplate]) -> None:
    """The texts are equal where the bytes are valid UTF-8; elsewhere, the number of U+FFFD may differ."""
    tokenizer, _ = ours
    rng = random.Random(10)
    compared = 0
    for _ in range(500):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(8)]
        text = tokenizer.decode(ids, keep_special=True)
        if "\ufffd" not in text:
            assert text == reference.decode(ids)
            compared += 1
    assert compared > 20
