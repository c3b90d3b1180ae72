"""A checkpoint folder -> the model. Names, quantization and shapes are checked; weights stay lazy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from dgemma_mlx.config import ModelConfig
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.shards import open_tensors
from dgemma_mlx.model.text import DiffusionGemma

_DECODER = "model.decoder."
_ENCODER = "model.encoder.language_model."
_VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_BARE_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
_DAMAGED = "The checkpoint does not match its config.json; fetch or convert it again."
_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


@dataclass
class Weights:
    """A checkpoint's tensors under this package's parameter names; the vision tower's kept aside."""

    text: dict[str, mx.array] = field(default_factory=dict)
    vision: dict[str, mx.array] = field(default_factory=dict)


def source_name(parameter: str) -> str:
    """A parameter path of ``DiffusionGemma`` -> the name of its tensor in a published checkpoint."""
    if parameter.endswith(".encoder_layer_scalar"):
        return _ENCODER + parameter.replace(".encoder_layer_scalar", ".layer_scalar")
    name = _DECODER + parameter
    stem = name.removesuffix(".weight")
    return stem if _BARE_EXPERTS.search(stem) else name


def remap(tensors: Mapping[str, mx.array]) -> Weights:
    """Published names -> parameter paths. Tied copies that ``save_pretrained`` may write are dropped,
    or used where the decoder's own tensor is absent."""
    weights = Weights()
    copies: dict[str, mx.array] = {}
    for name, tensor in tensors.items():
        if name.startswith(_VISION):
            weights.vision[name] = tensor
        elif name.startswith(_DECODER):
            weights.text[_parameter(name.removeprefix(_DECODER))] = tensor
        elif name.startswith(_ENCODER) and name.endswith(".layer_scalar"):
            path = name.removeprefix(_ENCODER).replace(".layer_scalar", ".encoder_layer_scalar")
            weights.text[path] = tensor
        elif name.startswith(_ENCODER):
            copies[_parameter(name.removeprefix(_ENCODER))] = tensor
        elif name == "lm_head.weight":
            copies["embed_tokens.weight"] = tensor
        else:
            weights.text[name] = tensor  # unknown: reported with the unexpected ones
    for path, tensor in copies.items():
        weights.text.setdefault(path, tensor)
    return weights


def _parameter(name: str) -> str:
    return name + ".weight" if _BARE_EXPERTS.search(name) else name


def load_model(folder: Path, config: ModelConfig, dtype: mx.Dtype | None = None) -> tuple[DiffusionGemma, Weights]:
    """Builds the network and binds the folder's tensors to it.

    ``dtype`` converts all floating tensors (lazily); by default they stay as stored, except on a machine
    without Metal, where they become float32: MLX's CPU back end is many times slower in bfloat16.
    """
    weights = remap(open_tensors(folder))
    model = DiffusionGemma(config.text)
    if config.quantization is not None:
        _quantize(model, config.quantization, weights.text)
    if dtype is None and mx.default_device() == mx.Device(mx.cpu):
        dtype = mx.float32
    _check(model, weights.text)
    if dtype is not None:
        weights.text = {
            name: tensor.astype(dtype) if mx.issubdtype(tensor.dtype, mx.floating) else tensor
            for name, tensor in weights.text.items()
        }
    model.load_weights(list(weights.text.items()))
    model.eval()
    return model, weights


def _quantize(model: DiffusionGemma, quantization: Mapping[str, Any], weights: Mapping[str, mx.array]) -> None:
    """Replaces the modules whose weights are packed, each with its own group size, bits and mode."""
    overrides = {
        name.removeprefix(_DECODER): value
        for name, value in quantization.items()
        if name not in ("group_size", "bits", "mode")
    }
    default = {name: quantization.get(name) for name in ("group_size", "bits", "mode")}

    def parameters(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in weights:
            return False
        override = overrides.get(path)
        chosen = {**default, **(override if isinstance(override, Mapping) else {})}
        chosen["mode"] = chosen["mode"] or "affine"
        if chosen["mode"] not in _MODES or not all(isinstance(chosen[k], int) for k in ("group_size", "bits")):
            raise DgemmaError(f"config.json: cannot read the quantization of {path}: {chosen}", _DAMAGED)
        return {name: chosen[name] for name in ("group_size", "bits", "mode")}

    try:
        nn.quantize(model, class_predicate=parameters)
    except ValueError as error:
        raise DgemmaError(f"config.json: {error}", _DAMAGED) from None


def _check(model: DiffusionGemma, weights: Mapping[str, mx.array]) -> None:
    """Every parameter has a tensor of its shape and kind, and there is none beside."""
    expected = dict(tree_flatten(model.parameters()))
    if missing := sorted(expected.keys() - weights.keys()):
        raise DgemmaError(f"the checkpoint lacks {_some(missing)}", _DAMAGED)
    if unexpected := sorted(weights.keys() - expected.keys()):
        raise DgemmaError(f"the checkpoint has unknown tensors: {_some(unexpected)}", _DAMAGED)
    for name, parameter in expected.items():
        tensor = weights[name]
        if tensor.shape != parameter.shape:
            raise DgemmaError(
                f"{source_name(name)} has shape {tensor.shape}, config.json asks for {parameter.shape}", _DAMAGED
            )
        packed, whole = parameter.dtype in (mx.uint8, mx.uint32), tensor.dtype in (mx.uint8, mx.uint32)
        if packed != whole:
            raise DgemmaError(f"{source_name(name)} has dtype {tensor.dtype}, not {parameter.dtype}", _DAMAGED)


def _some(names: list[str]) -> str:
    shown = ", ".join(source_name(name) if "model." not in name else name for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
