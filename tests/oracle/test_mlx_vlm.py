"""mlx-vlm in both directions: its conversions load here and give its logits, and it loads the demo checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import GenerationConfig, ModelConfig
from tests.model.checkpoint import flat_config, load, random_tensors, write_checkpoint
from tests.oracle.peer import (
    DEMO,
    TOKENIZER,
    Peer,
    assert_same_logits,
    mlx_vlm,
    our_logits,
    own_mode,
    peer_convert,
    some_ids,
)  # fmt: skip

pytestmark = pytest.mark.oracle

TOLERANCE = 1e-4
CONVERSIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "4 bit": {"quantize": True},  # mlx-vlm's default: experts and self-conditioning 4-bit, the rest 8-bit
    "8 bit": {"quantize": True, "q_bits": 8},
    "4 bit in groups of 32": {"quantize": True, "q_group_size": 32},
    "mixed_4_8": {"quantize": True, "quant_predicate": "mixed_4_8"},
    "mxfp4": own_mode("mxfp4"),  # some modules are 8-bit affine, with entries that have no mode
    "mxfp8": own_mode("mxfp8"),
    "nvfp4": own_mode("nvfp4"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 source checkpoint with random weights, and the tokenizer that mlx-vlm needs to convert it."""
    config = flat_config()
    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(folder, config, random_tensors(config, mx.bfloat16), shards=2)
    for name in TOKENIZER:
        shutil.copy(DEMO / name, folder)
    return folder


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions_give_the_logits_of_mlx_vlm(source: Path, tmp_path: Path, conversion: str) -> None:
    peer_convert(source, tmp_path / "mlx", **CONVERSIONS[conversion])
    scales = [name for name in load(tmp_path / "mlx")[1].text if name.endswith(".scales")]
    assert bool(scales) == (conversion != "bf16")
    assert_same_logits(tmp_path / "mlx", (5, 8, 21), TOLERANCE)  # below, equal to and above the window of 8


def test_conversion_keeps_the_settings(source: Path, tmp_path: Path) -> None:
    peer_convert(source, tmp_path / "mlx", quantize=True)
    before, after = ModelConfig.load(source), ModelConfig.load(tmp_path / "mlx")
    assert (after.text, after.canvas_length, after.vision) == (before.text, before.canvas_length, None)
    assert GenerationConfig.load(tmp_path / "mlx", after) == GenerationConfig.load(source, before)


def test_source_checkpoint_reads_the_same(source: Path) -> None:
    assert_same_logits(source, (5, 21), TOLERANCE)


@pytest.mark.parametrize("quantize", [False, True])
def test_mlx_vlm_loads_the_demo(tmp_path: Path, quantize: bool) -> None:
    folder = DEMO
    if quantize:
        folder = peer_convert(DEMO, tmp_path / "mlx", quantize=True)
    assert_same_logits(folder, (12, 100), TOLERANCE)  # shorter and longer than the window of 64


def test_mlx_vlm_reads_the_demos_tokenizer(tmp_path: Path) -> None:
    _, processor = mlx_vlm.load(str(DEMO), lazy=True)
    prompt = "<bos><|turn>user\nSort 52, 7, 31<turn|>\n<|turn>model\n"
    ids = processor.tokenizer.encode(prompt, add_special_tokens=False)
    vocabulary = json.loads((DEMO / "tokenizer.json").read_text())["added_tokens"]
    special = {token["content"]: token["id"] for token in vocabulary}
    assert ids[:2] == [special["<bos>"], special["<|turn>"]]
    assert processor.tokenizer.decode(ids) == prompt


def test_id_of_the_image_token_is_text_without_an_image(source: Path) -> None:
    """mlx-vlm embeds padding instead, also in a committed canvas that happens to contain the id."""
    config, peer = ModelConfig.load(source), Peer(source)
    model, _ = load(source, mx.float32)
    prefix, canvases = some_ids(model, 6, config.canvas_length, None)
    assert config.image_token_id
    prefix[0, 3] = config.image_token_id
    ours = our_logits(model, prefix, canvases)
    assert np.abs(ours - peer.logits(prefix, canvases)).max() > 100 * TOLERANCE
    peer.model.config.image_token_id = None
    assert np.abs(ours - peer.logits(prefix, canvases)).max() <= TOLERANCE
