"""Small checkpoints with random weights, with the tensor names and config layouts of published checkpoints."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.names import Weights
from dgemma_mlx.model.load import load_model
from dgemma_mlx.model.text import DiffusionGemma
from dgemma_mlx.train.demo import CONFIG

Tensors = dict[str, mx.array]
LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention"]
NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2",
)
# The demo model's configuration, in small.
_CONFIG: dict[str, Any] = {
    "architectures": ["DiffusionGemmaForBlockDiffusion"],
    "model_type": "diffusion_gemma",
    "canvas_length": 16,
    "tie_word_embeddings": True,
    "vision_config": None,
    "image_token_id": 90,
    "eos_token_id": [1, 50],
    "text_config": {
        **CONFIG["text_config"],
        "vocab_size": 96,
        "num_hidden_layers": 3,
        "sliding_window": 8,
        "layer_types": LAYER_TYPES,
        "num_experts": 4,
    },
}


def flat_config(**text: Any) -> dict[str, Any]:
    """Return a config.json in the published layout. Keyword arguments replace keys of ``text_config``."""
    config = copy.deepcopy(_CONFIG)
    config["text_config"].update(text)
    return config


def layered_config() -> dict[str, Any]:
    """Return a config.json of the same network as transformers 5.23 writes it.

    It has ``per_layer_config``, and keys with default values are left out.
    """
    config = flat_config()
    text = config["text_config"]
    head_dim, kv_heads = text.pop("global_head_dim"), text.pop("num_global_key_value_heads")
    text["per_layer_config"] = {"2": {"head_dim": head_dim, "num_key_value_heads": kv_heads}}
    del text["final_logit_softcapping"]
    return config


def random_tensors(config: Mapping[str, Any], dtype: mx.Dtype = mx.float32, seed: int = 0) -> Tensors:
    """Return random values for every tensor of an unquantized checkpoint, by its published name."""
    t = config["text_config"]
    M, V, dense, inner, E = (
        t[name] for name in ("hidden_size", "vocab_size", "intermediate_size", "moe_intermediate_size", "num_experts")
    )
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}

    def matrix(name: str, *shape: int) -> None:
        tensors[name] = mx.array(rng.normal(size=shape) * shape[-1] ** -0.5, dtype)

    def near_one(name: str, size: int, scale: float = 1.0) -> None:
        tensors[name] = mx.array(rng.uniform(0.5, 1.5, size) * scale, dtype)

    def mlp(prefix: str) -> None:
        matrix(f"{prefix}.gate_proj.weight", dense, M)
        matrix(f"{prefix}.up_proj.weight", dense, M)
        matrix(f"{prefix}.down_proj.weight", M, dense)

    matrix("model.decoder.embed_tokens.weight", V, M)
    near_one("model.decoder.norm.weight", M)
    mlp("model.decoder.self_conditioning")
    near_one("model.decoder.self_conditioning.pre_norm.weight", M)
    for i, kind in enumerate(t["layer_types"]):
        layer, full = f"model.decoder.layers.{i}", kind == "full_attention"
        D = t["global_head_dim"] if full else t["head_dim"]
        H, Hk = t["num_attention_heads"], t["num_global_key_value_heads" if full else "num_key_value_heads"]
        matrix(f"{layer}.self_attn.q_proj.weight", H * D, M)
        matrix(f"{layer}.self_attn.k_proj.weight", Hk * D, M)
        if not full:
            matrix(f"{layer}.self_attn.v_proj.weight", Hk * D, M)
        matrix(f"{layer}.self_attn.o_proj.weight", M, H * D)
        near_one(f"{layer}.self_attn.q_norm.weight", D, D**-0.5)  # scores near 1 keep rounding errors small
        near_one(f"{layer}.self_attn.k_norm.weight", D)
        mlp(f"{layer}.mlp")
        matrix(f"{layer}.router.proj.weight", E, M)
        near_one(f"{layer}.router.scale", M)
        near_one(f"{layer}.router.per_expert_scale", E)
        matrix(f"{layer}.experts.gate_up_proj", E, 2 * inner, M)
        matrix(f"{layer}.experts.down_proj", E, M, inner)
        for norm in NORMS:
            near_one(f"{layer}.{norm}.weight", M)
        near_one(f"{layer}.layer_scalar", 1)
        near_one(f"model.encoder.language_model.layers.{i}.layer_scalar", 1)
    return tensors


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, mx.array], shards: int = 1
) -> Path:
    """Write config.json and the tensors, in one file or in several files with an index, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), dict(tensors))
        return folder
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        mx.save_safetensors(str(folder / file), part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def quantized(
    tensors: Mapping[str, mx.array], choose: Callable[[str], Mapping[str, Any] | None]
) -> tuple[Tensors, Tensors]:
    """Return the tensors packed as in a converted checkpoint, and the values of the packed tensors in float32.

    ``choose`` returns the ``{"group_size", "bits", "mode"}`` of a module path, or None to leave the module unpacked.
    """
    packed, whole = {}, {}
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        chosen = choose(path) if tensor.ndim > 1 else None
        if chosen is None:
            packed[name], whole[name] = tensor, tensor.astype(mx.float32)
            continue
        parts = dict(zip(("weight", "scales", "biases"), mx.quantize(tensor, **chosen), strict=False))
        packed |= {f"{path}.{part}": array for part, array in parts.items()}
        wide = {k: v.astype(mx.float32) if v.dtype == tensor.dtype else v for k, v in parts.items()}
        unpacked = mx.dequantize(wide["weight"], wide["scales"], wide.get("biases"), **chosen)
        whole[name] = unpacked.astype(mx.float32)
    return packed, whole


def load(folder: Path, dtype: mx.Dtype | None = None) -> tuple[DiffusionGemma, Weights]:
    """Load the network and the tensors of a checkpoint folder."""
    return load_model(folder, ModelConfig.load(folder), dtype)


def logits(model: DiffusionGemma, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the logits of a canvas, (2, C, V), without and with self-conditioning.

    The prompt before the canvas is longer than the sliding window.
    """
    rng = np.random.default_rng(seed)
    ids = mx.array(rng.integers(0, model.config.vocab_size, (1, 29)))
    cache = model.new_cache()
    model.encode(ids[:, :13], cache)
    first = model.decode(ids[:, 13:], cache)
    second = model.decode(ids[:, 13:], cache, first / 0.6)
    return np.array(mx.concatenate([first, second]))
