"""A tokenizer like Gemma's that can encode any text, with one huge token."""

from __future__ import annotations

import json

import pytest

from dgemma_mlx.text import Tokenizer, load_tokenizer
from tests.text.gemma_like import write_tokenizer_json

HUGE = "<" + "huge" * 480 + ">"  # as long as a full screen


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer_json(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    ordinary = next(token for token in data["added_tokens"] if token["content"] == "<table>")
    size = max([*data["model"]["vocab"].values(), *(token["id"] for token in data["added_tokens"])]) + 1
    data["added_tokens"].append({**ordinary, "id": size, "content": HUGE})
    data["model"]["vocab"][HUGE] = size
    path.write_text(json.dumps(data))
    return load_tokenizer(folder)
