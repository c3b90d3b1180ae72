"""Tests that quantized checkpoints give the same results as checkpoints with their weights unpacked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation import memory as memory_module
from dgemma_mlx.generation.memory import DEQUANTIZE_CHOICES, should_dequantize
from dgemma_mlx.model.dequantize import dequantize, dequantized_bytes
from dgemma_mlx.model.experts import QuantizedExpertLinear
from dgemma_mlx.model.text import DiffusionGemma
from tests.model.checkpoint import Tensors, flat_config, load, logits, quantized, random_tensors, write_checkpoint
from tests.model.odd_values import one_line, reported


def mixed(path: str) -> dict[str, Any]:
    """Choose as mlx-vlm does: 4 bits for experts and self-conditioning, 8 bits for the rest."""
    four = "experts" in path or "self_conditioning" in path
    return {"group_size": 64, "bits": 4 if four else 8, "mode": "affine"}


def quantization(choose: Callable[[str], Any], tensors: Tensors, default: dict[str, Any]) -> dict[str, Any]:
    """Return the quantization in config.json: the default, and the modules that differ (without a mode if affine)."""
    entry = dict(default)
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        if tensor.ndim < 2 or (chosen := choose(path)) == default:
            continue
        affine = chosen is not None and chosen["mode"] == "affine"
        entry[path] = False if chosen is None else {k: chosen[k] for k in chosen if k != "mode" or not affine}
    return entry


SCHEMES: dict[str, tuple[dict[str, Any], Callable[[str], Any] | None]] = {
    "affine 4": ({"group_size": 64, "bits": 4, "mode": "affine"}, None),
    "affine 8": ({"group_size": 64, "bits": 8, "mode": "affine"}, None),
    "affine 4, groups of 32": ({"group_size": 32, "bits": 4, "mode": "affine"}, None),
    "affine 6": ({"group_size": 64, "bits": 6, "mode": "affine"}, None),
    "mxfp4": ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, None),
    "mxfp8": ({"group_size": 32, "bits": 8, "mode": "mxfp8"}, None),
    "nvfp4": ({"group_size": 16, "bits": 4, "mode": "nvfp4"}, None),
    "mixed 4 and 8": ({"group_size": 64, "bits": 4, "mode": "affine"}, mixed),
    "mxfp4, the rest affine 8": (
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        lambda path: {"group_size": 32, "bits": 4, "mode": "mxfp4"} if "experts" in path else mixed(path),
    ),
    "some modules left whole": (
        {"group_size": 64, "bits": 8, "mode": "affine"},
        lambda path: None if "router" in path or "layers.1" in path or "embed" in path else mixed("experts"),
    ),
    "one of the experts' two": (
        {"group_size": 64, "bits": 8, "mode": "affine"},
        lambda path: mixed("") if path.endswith("experts.gate_up_proj") else None,
    ),
}  # fmt: skip


def packed_and_whole(folder: Path, scheme: str) -> tuple[DiffusionGemma, DiffusionGemma, Tensors, Tensors]:
    """Return a packed model in float32, the model with these weights unpacked, and the tensors of both."""
    default, choose = SCHEMES[scheme]
    choose = choose or (lambda path: default)
    tensors = random_tensors(flat_config(), mx.bfloat16)
    packed, whole = quantized(tensors, choose)
    config = {**flat_config(), "quantization": quantization(choose, tensors, default)}
    model, _ = load(write_checkpoint(folder / "packed", config, packed), mx.float32)
    return model, load(write_checkpoint(folder / "whole", flat_config(), whole))[0], packed, whole


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_weights_equal_their_unpacked_values(tmp_path: Path, scheme: str) -> None:
    model, unpacked, _, _ = packed_and_whole(tmp_path, scheme)
    expected = logits(unpacked)
    # The values are the same in float32. Only the order of summation differs.
    np.testing.assert_allclose(logits(model), expected, atol=2e-4)
    model.train()
    np.testing.assert_allclose(logits(model), expected, atol=2e-4)


def test_quantized_modules_stay_packed(tmp_path: Path, tensors: Tensors) -> None:
    packed, _ = quantized(tensors, mixed)
    config = {**flat_config(), "quantization": quantization(mixed, tensors, mixed("experts"))}
    model, _ = load(write_checkpoint(tmp_path, config, packed))
    bits = {path: module.bits for path, module in model.named_modules() if "scales" in module}
    assert len(bits) == sum(name.endswith(".scales") for name in packed)
    assert (bits["embed_tokens"], bits["layers.0.experts.down_proj"], bits["layers.2.router.proj"]) == (8, 4, 8)
    assert isinstance(model.layers[0].experts.down_proj, QuantizedExpertLinear)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unpacking_at_load_gives_the_same_numbers(tmp_path: Path, scheme: str) -> None:
    model, expected, packed, whole = packed_and_whole(tmp_path, scheme)
    stems = {name.removesuffix(".scales") for name in packed if name.endswith(".scales")}
    values = sum(tensor.size for name, tensor in whole.items() if name.removesuffix(".weight") in stems)
    assert dequantized_bytes(model) == 4 * values > 0
    dequantize(model)
    assert dequantized_bytes(model) == 0
    assert [(name, a.shape) for name, a in tree_flatten(model.parameters())] == [
        (name, a.shape) for name, a in tree_flatten(expected.parameters())
    ]
    np.testing.assert_allclose(logits(model), logits(expected), atol=2e-4)


@pytest.mark.skipif(mx.metal.is_available(), reason="packed weights are the fast ones on Metal")
def test_weights_are_unpacked_on_request_or_if_there_is_memory(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, _ = quantized(tensors, mixed)
    config = {**flat_config(), "quantization": quantization(mixed, tensors, mixed("experts"))}
    model, _ = load(write_checkpoint(tmp_path, config, packed))
    needed = dequantized_bytes(model)
    for free, roomy in ((2 * needed, True), (2 * needed - 2, False)):
        monkeypatch.setattr(memory_module, "free_memory", lambda free=free: free)
        assert [should_dequantize(needed, choice) for choice in DEQUANTIZE_CHOICES] == [roomy, True, False]
    with pytest.raises(DgemmaError, match="auto, on, off") as caught:
        should_dequantize(needed, "yes")
    assert caught.value.hint and caught.value.exit_code == 2


ODD_QUANTIZATION = [
    {"bits": 8}, {"bits": 5}, {"bits": "4"}, {"bits": 7}, {"bits": -4}, {"bits": 10**18}, {"bits": []}, {"bits": 0},
    {"group_size": 32}, {"group_size": 48}, {"group_size": -64}, {"group_size": 256}, {"group_size": 10**18},
    {"group_size": {}}, {"mode": "mxfp4"}, {"mode": "gguf"}, {"mode": []}, {"mode": 3}, {"mode": True},
    {"model.decoder.layers.1.mlp.up_proj": {"bits": 8}},
    {"model.decoder.layers.1.mlp.up_proj": {"bits": "x"}},
    {"model.decoder.layers.1.experts.gate_up_proj": {"bits": "x"}},
    {"model.decoder.layers.1.experts.gate_up_proj": {"group_size": 64.5, "bits": 4}},
]  # fmt: skip


@pytest.mark.parametrize("change", ODD_QUANTIZATION, ids=str)
def test_quantization_that_does_not_fit(tmp_path: Path, tensors: Tensors, change: dict[str, Any]) -> None:
    default = {"group_size": 64, "bits": 4, "mode": "affine"}
    packed, _ = quantized(tensors, lambda path: default)
    write_checkpoint(tmp_path, {**flat_config(), "quantization": {**default, **change}}, packed)
    error = reported(load, tmp_path)
    assert error
    assert "model.decoder." in error.message
    assert one_line(error)


def test_packed_tensors_without_quantization(tmp_path: Path, tensors: Tensors) -> None:
    packed, _ = quantized(tensors, mixed)
    error = reported(load, write_checkpoint(tmp_path, flat_config(), packed))
    assert error
    assert "the checkpoint has unknown tensors: model.decoder." in error.message
