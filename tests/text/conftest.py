"""Fixtures: small Gemma-like tokenizers, created once per session, and the demo model's tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgemma_mlx.text import Tokenizer, load_tokenizer
from tests.text.gemma_like import write_tokenizer_json, write_tokenizer_model

DEMO = Path(__file__).parents[2] / "dgemma_mlx" / "demo"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint folders by kind of tokenizer: ``json`` (with a chat template), ``sentencepiece``, ``demo``."""
    json_folder, model_folder = tmp_path_factory.mktemp("json"), tmp_path_factory.mktemp("sentencepiece")
    write_tokenizer_json(json_folder)
    write_tokenizer_model(model_folder)
    return {"json": json_folder, "sentencepiece": model_folder, "demo": DEMO}


@pytest.fixture(params=["json", "sentencepiece", "demo"])
def tokenizer(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Tokenizer:
    """Each of the tokenizers in turn."""
    return load_tokenizer(folders[request.param])


@pytest.fixture
def gemma(folders: dict[str, Path]) -> Tokenizer:
    """The byte-fallback BPE tokenizer with Gemma 4's control tokens."""
    return load_tokenizer(folders["json"])
