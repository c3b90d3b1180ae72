"""``dgemma-mlx convert``, compared with mlx-vlm: each loads the other's conversions, and both write the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from dgemma_convert import RECIPES, convert, prepare
from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.names import module_quantization
from dgemma_mlx.checkpoint.shards import open_tensors
from tests.model.checkpoint import Tensors, flat_config, load, random_tensors, write_checkpoint
from tests.oracle import reference
from tests.oracle.peer import (
    DEMO,
    TOKENIZER,
    assert_same_logits,
    mlx_vlm,
    own_mode,
    peer_convert,
)  # fmt: skip

pytestmark = pytest.mark.oracle

TOLERANCE = 1e-3
LAYERS = 8  # more than the six edge layers, which q3 packs differently
PREFIXES = (5, 8, 21)  # shorter than, equal to and longer than the window of 8
ALIKE: dict[str, dict[str, Any]] = {  # recipe -> the options of mlx-vlm for the same conversion
    "q4": {"quantize": True},
    "q8": {"quantize": True, "q_bits": 8},
    "mxfp4": own_mode("mxfp4"),
    "nvfp4": own_mode("nvfp4"),
    "bf16": {},
}


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 checkpoint in the published layout with random weights."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] * 2
    config = flat_config(num_hidden_layers=LAYERS, layer_types=[*kinds[:-1], "full_attention"])
    folder = tmp_path_factory.mktemp("flat") / "source"
    write_checkpoint(folder, config, random_tensors(config, mx.bfloat16), shards=2)
    return with_tokenizer(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers saves it: ``per_layer_config``, tied copies, vision tower, float32."""
    folder = tmp_path_factory.mktemp("saved") / "source"
    widths = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 64)
    reference.write_checkpoint(folder, 1, num_hidden_layers=LAYERS, **widths)
    assert "per_layer_config" in json.loads((folder / "config.json").read_text())["text_config"]
    return with_tokenizer(folder)


def with_tokenizer(folder: Path) -> Path:
    """Add the tokenizer that mlx-vlm needs to convert a checkpoint and to load its processor."""
    for name in TOKENIZER:
        shutil.copy(DEMO / name, folder)
    return folder


def converted(source: Path, output: Path, recipe: str) -> Path:
    target = None
    if recipe == "mixed":
        small, large = (prepare(str(source), recipe=other).bytes_out for other in ("q4-small", "q8"))
        target = small + (large - small) * 3 // 8  # 5.5 bits: a single number of bits cannot meet the target
    return convert(str(source), output, recipe, target_bytes=target).output


def formats(folder: Path) -> dict[str, dict[str, Any]]:
    """Return group size, bits and mode of every packed module of a checkpoint, by module path."""
    quantization = ModelConfig.load(folder).quantization or {}
    paths = [name.removesuffix(".scales") for name in load(folder)[1].text if name.endswith(".scales")]
    return {path: {"mode": "affine", **module_quantization(quantization, path)} for path in paths}


def bits(folder: Path) -> set[int]:
    return {entry["bits"] for entry in formats(folder).values()}


def differing(one: Tensors, other: Tensors) -> list[str]:
    """Return the names that only one of them has, or whose values or dtypes differ."""
    both = one.keys() & other.keys()
    unequal = {n for n in both if one[n].dtype != other[n].dtype or not mx.array_equal(one[n], other[n])}
    return sorted((one.keys() ^ other.keys()) | unequal)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", ["flat", "saved"])
def test_mlx_vlm_gives_our_logits(
    request: pytest.FixtureRequest, tmp_path: Path, layout: str, recipe: str
) -> None:
    output = converted(request.getfixturevalue(layout), tmp_path / "out", recipe)
    wanted = {"q4": {4, 8}, "q8": {8}, "q4-small": {4}, "q3": {3, 4, 8}, "mxfp8": {8}, "bf16": set()}
    assert bits(output) == wanted.get(recipe, bits(output))
    assert recipe != "mixed" or len(bits(output)) > 1
    assert_same_logits(output, PREFIXES, TOLERANCE)


@pytest.mark.parametrize("recipe", ALIKE)
def test_mlx_vlm_writes_the_same_bits(flat: Path, tmp_path: Path, recipe: str) -> None:
    ours = converted(flat, tmp_path / "ours", recipe)
    theirs = peer_convert(flat, tmp_path / "theirs", **ALIKE[recipe])
    assert formats(ours) == formats(theirs)
    assert differing(open_tensors(ours), open_tensors(theirs)) == []


@pytest.mark.parametrize("recipe", ALIKE)
def test_conversions_of_mlx_vlm_are_copied_unchanged(flat: Path, tmp_path: Path, recipe: str) -> None:
    theirs = peer_convert(flat, tmp_path / "theirs", **ALIKE[recipe])
    ours = converted(theirs, tmp_path / "ours", recipe)
    assert formats(ours) == formats(theirs)
    assert differing(open_tensors(ours), open_tensors(theirs)) == []


@pytest.mark.parametrize("recipe", ALIKE)
def test_conversions_of_mlx_vlm_unpacked(flat: Path, tmp_path: Path, recipe: str) -> None:
    """Every value is the unpacked one in float32, rounded once."""
    theirs = peer_convert(flat, tmp_path / "theirs", **ALIKE[recipe])
    ours = converted(theirs, tmp_path / "ours", "bf16")
    values = unpacked(theirs)
    rounded = {name: value.astype(mx.bfloat16) for name, value in values.items()}
    assert differing(load(ours, mx.bfloat16)[1].text, rounded) == []
    assert_same_logits(ours, PREFIXES, TOLERANCE)


def unpacked(folder: Path) -> Tensors:
    """Return the unpacked parameters of a checkpoint in float32."""
    packed, tensors = formats(folder), load(folder, mx.float32)[1].text
    for path, packing in packed.items():
        weight, scales = tensors.pop(f"{path}.weight"), tensors.pop(f"{path}.scales")
        biases = tensors.pop(f"{path}.biases", None)
        tensors[f"{path}.weight"] = mx.dequantize(weight, scales, biases, dtype=mx.float32, **packing)
    return tensors


def test_conversion_of_mlx_vlm_packed_again(flat: Path, tmp_path: Path) -> None:
    theirs = peer_convert(flat, tmp_path / "theirs", quantize=True, q_bits=8)
    ours = converted(theirs, tmp_path / "ours", "q4")
    assert bits(ours) == {4, 8}
    assert_same_logits(ours, PREFIXES, TOLERANCE)


def test_mlx_vlm_finds_tokenizer_and_template(flat: Path, tmp_path: Path) -> None:
    _, processor = mlx_vlm.load(str(converted(flat, tmp_path / "out", "q4")), lazy=True)
    messages = [{"role": "user", "content": "Sort 52, 7, 31"}]
    prompt = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<bos><|turn>user\nSort 52, 7, 31<turn|>\n<|turn>model\n"
