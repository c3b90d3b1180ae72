"""Tests of the check that a network stays within the range of float16, on checkpoints that are made to overflow."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import dgemma_mlx
from dgemma_mlx.checkpoint.config import GenerationConfig, ModelConfig
from dgemma_mlx.diffusion.denoiser import Denoiser
from dgemma_mlx.diffusion.sampler import Noise
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.adapter import GROUPS, AdapterConfig, attach
from dgemma_mlx.model.half_precision import (
    LARGEST,
    MARGIN,
    fastest,
    float16_problem,
    lacks_bfloat16,
    refuse_nan,
    require_float16,
)
from dgemma_mlx.model.text import DiffusionGemma
from tests.model.checkpoint import Tensors, flat_config, load, logits, quantized, random_tensors, write_checkpoint

M1, M3 = "applegpu_g13s", "applegpu_g15p"
DECODER = "model.decoder."
LAYER = f"{DECODER}layers.1."


@pytest.mark.parametrize(("architecture", "lacking"), [
    ("applegpu_g13g", True), ("applegpu_g14d", True), (M3, False), ("applegpu_g16s", False), ("applegpu_g17p", False),
    ("x86_64", False), ("", False), ("sm_90", False),
])  # fmt: skip
def test_m1_and_m2_lack_bfloat16(architecture: str, lacking: bool) -> None:
    assert lacks_bfloat16(architecture) == lacking


def checkpoint(folder: Path, factors: dict[str, float]) -> Path:
    """Write a checkpoint in bfloat16 in which the tensors whose names end so are multiplied by these factors."""
    tensors = random_tensors(flat_config(), mx.bfloat16)
    for ending, factor in factors.items():
        found = [name for name in tensors if name.endswith(ending)]
        assert found
        tensors |= {name: tensors[name] * factor for name in found}
    return write_checkpoint(folder, flat_config(), tensors)


def opener(folder: Path) -> Callable[[mx.Dtype | None], DiffusionGemma]:
    """Return a function that opens a checkpoint as a GPU does: None is bfloat16."""
    return lambda dtype: load(folder, dtype or mx.bfloat16)[0]


def test_float16_is_taken_only_where_it_is_faster(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastest(opener(folder), M1, 2).dtype == mx.float16
        assert fastest(opener(folder), M3, 2).dtype == mx.bfloat16
        assert fastest(lambda dtype: load(folder, dtype or mx.float32)[0], M1, 2).dtype == mx.float32


# Where an activation is stored, and a factor on weights that makes it exceed float16 but not bfloat16.
PLACES = {
    "embeddings": {f"{DECODER}embed_tokens.weight": 3e5},
    "queries": {f"{LAYER}self_attn.q_proj.weight": 1e5},
    "keys": {f"{LAYER}self_attn.k_proj.weight": 1e5},
    "values": {f"{LAYER}self_attn.v_proj.weight": 1e5},
    "attention output": {f"{LAYER}self_attn.o_proj.weight": 1e5},
    "gate": {f"{LAYER}mlp.gate_proj.weight": 1e5},
    "product of gate and up": {f"{LAYER}mlp.gate_proj.weight": 1e3, f"{LAYER}mlp.up_proj.weight": 1e3},
    "dense output": {f"{LAYER}mlp.down_proj.weight": 1e6},
    "router": {f"{LAYER}router.proj.weight": 1e5},
    "router's norm": {f"{LAYER}router.scale": 3e5},
    "experts": {f"{LAYER}experts.gate_up_proj": 1e3},
    "expert output": {f"{LAYER}experts.down_proj": 1e6},
    "residual stream after attention": {f"{LAYER}post_attention_layernorm.weight": 4e4},
    "residual stream after the experts": {f"{LAYER}post_feedforward_layernorm.weight": 4e4},
    "residual stream before the factor": {
        f"{LAYER}post_feedforward_layernorm.weight": 4e4, "layers.1.layer_scalar": 1e-4,
    },
    "factor when decoding": {f"{LAYER}layer_scalar": 4e4},
    "factor when encoding": {"model.encoder.language_model.layers.1.layer_scalar": 4e4},
    "self-conditioning": {f"{DECODER}self_conditioning.gate_proj.weight": 1e5},
    "self-conditioning output": {f"{DECODER}self_conditioning.down_proj.weight": 1e6},
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_every_place_that_can_overflow_is_seen(tmp_path: Path, place: str) -> None:
    folder = checkpoint(tmp_path, PLACES[place])
    assert np.isfinite(logits(load(folder, mx.bfloat16)[0])).all()
    half = load(folder, mx.float16)[0]
    problem = float16_problem(half, 2)
    assert problem is not None
    assert re.search("largest number of float16|cannot hold the weights", problem)
    with pytest.warns(RuntimeWarning, match="this model is computed in bfloat16: .*float16"):
        assert fastest(opener(folder), M1, 2).dtype == mx.bfloat16
    with pytest.raises(DgemmaError, match="cannot be computed in float16"):
        require_float16(half, 2)


def test_activations_near_the_limit_are_refused_before_they_overflow(tmp_path: Path) -> None:
    """The check has a margin, because another text may have larger activations."""
    reached = []
    for factor in (3e3, 6e3, 1e4, 2e4):
        folder = checkpoint(tmp_path / str(factor), {f"{LAYER}self_attn.o_proj.weight": factor})
        problem = float16_problem(load(folder, mx.float16)[0], 2)
        reached += re.findall(r"reach ([\d,]+)", problem or "")
    values = [int(value.replace(",", "")) for value in reached]
    assert values
    assert all(LARGEST / MARGIN < value <= LARGEST for value in values)


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    """No text of the check may use it: here it is a row of the embedding table."""
    tensors = random_tensors(flat_config(), mx.bfloat16)
    name = f"{DECODER}embed_tokens.weight"
    tensors[name][7, 3] = -1e5
    folder = write_checkpoint(tmp_path, flat_config(), tensors)
    assert float16_problem(load(folder, mx.float16)[0], 2) == "float16 cannot hold the weights of embed_tokens.weight"


def test_packed_scales_that_float16_cannot_hold_are_named(tmp_path: Path) -> None:
    chosen = {"group_size": 64, "bits": 4, "mode": "affine"}
    tensors: Tensors = random_tensors(flat_config(), mx.bfloat16)
    name = f"{LAYER}mlp.up_proj.weight"
    tensors[name] = tensors[name] * 1e6
    packed, _ = quantized(tensors, lambda path: chosen if "router" not in path else None)
    folder = write_checkpoint(tmp_path, {**flat_config(), "quantization": chosen}, packed)
    problem = float16_problem(load(folder, mx.float16)[0], 2)
    assert problem is not None
    assert problem.startswith("float16 cannot hold the weights of mlp.up_proj.")


@pytest.mark.parametrize("dora", [False, True])
def test_the_check_leaves_the_network_as_it_was(tmp_path: Path, dora: bool) -> None:
    network = load(checkpoint(tmp_path, {}), mx.float16)[0]
    attach(network, AdapterConfig(rank=4, dora=dora, targets=tuple(GROUPS)))
    network.eval()
    modules = dict(network.named_modules())
    before = logits(network)
    assert float16_problem(network, 2) is None
    assert dict(network.named_modules()).keys() == modules.keys()
    assert all(module is modules[path] for path, module in network.named_modules())
    assert np.array_equal(logits(network), before)


def test_an_adapter_that_overflows_is_seen(tmp_path: Path) -> None:
    network = load(checkpoint(tmp_path, {}), mx.float16)[0]
    attach(network, AdapterConfig(rank=4, targets=("q_proj",)))
    network.layers[0].self_attn.q_proj.lora_b = mx.full(network.layers[0].self_attn.q_proj.lora_b.shape, 1e6)
    assert "largest number of float16" in str(float16_problem(network.eval(), 2))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_canvas_that_overflows_later_is_an_error(tmp_path: Path, dtype: mx.Dtype) -> None:
    """A text that the check did not see: no garbage is committed."""
    folder = checkpoint(tmp_path, {})
    network, config = load(folder, dtype)[0], ModelConfig.load(folder)
    weight = network.layers[0].input_layernorm.weight
    network.layers[0].input_layernorm.weight = mx.full(weight.shape, 6e4 if dtype == mx.float16 else 3e38, dtype)
    cache = network.new_cache()
    network.encode(mx.array([[2, 5, 7]]), cache)
    denoiser = Denoiser(network, GenerationConfig().override(max_denoising_steps=2))
    steps = denoiser.denoise(cache, Noise(0), config.canvas_length)
    if dtype == mx.bfloat16:
        with pytest.raises(DgemmaError, match="the model computed NaN in step 1 of canvas 1"):
            next(steps)
        return
    with pytest.raises(DgemmaError, match="exceed the range of float16") as error:
        next(steps)
    assert "--dtype bfloat16" in str(error.value.hint)


def test_other_values_are_not_nan(tmp_path: Path) -> None:
    network = load(checkpoint(tmp_path, {}), mx.float16)[0]
    refuse_nan(network, 0.0, "step 1")
    refuse_nan(network, float("-inf"), "step 1")


def test_the_demo_can_be_computed_in_float16() -> None:
    model = dgemma_mlx.load("demo", dtype=mx.float16)
    floats = {a.dtype for _, a in tree_flatten(model.network.parameters()) if mx.issubdtype(a.dtype, mx.floating)}
    assert floats == {mx.float16}
    assert dgemma_mlx.generate(model, "Sort 7 3 5", seed=1).text == "3 5 7"
