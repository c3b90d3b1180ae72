"""A checkpoint folder -> the model. Names, quantization and shapes are checked; weights stay lazy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from dgemma_mlx.config import ModelConfig
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.shards import open_tensors
from dgemma_mlx.model.text import DiffusionGemma

_DECODER = "model.decoder."
_ENCODER = "model.encoder.language_model."
_VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_BARE_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
_DAMAGED = "The checkpoint does not match its config.json; fetch or convert it again."


@dataclass
class Weights:
    """A checkpoint's tensors under this package's parameter names; the vision tower's kept aside."""

    text: dict[str, mx.array]
    vision: dict[str, mx.array]
    names: dict[str, str]
    """parameter path -> the tensor's name in the checkpoint"""


def source_name(parameter: str) -> str:
    """A parameter path of ``DiffusionGemma`` -> the name of its tensor in a published checkpoint."""
    if parameter.endswith(".encoder_layer_scalar"):
        return _ENCODER + parameter.replace(".encoder_layer_scalar", ".layer_scalar")
    name = _DECODER + parameter
    stem = name.removesuffix(".weight")
    return stem if _BARE_EXPERTS.search(stem) else name


def parameter_names(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Names in a checkpoint -> (parameter path -> name, the vision tower's names).

    Tied copies that ``save_pretrained`` may write are dropped, or used where the decoder's own tensor is absent.
    """
    vision: list[str] = []
    text: dict[str, str] = {}
    copies: dict[str, str] = {}
    for name in names:
        if name.startswith(_VISION):
            vision.append(name)
        elif name.startswith(_DECODER):
            text[_parameter(name.removeprefix(_DECODER))] = name
        elif name.startswith(_ENCODER) and name.endswith(".layer_scalar"):
            text[name.removeprefix(_ENCODER).replace(".layer_scalar", ".encoder_layer_scalar")] = name
        elif name.startswith(_ENCODER):
            copies[_parameter(name.removeprefix(_ENCODER))] = name
        elif name == "lm_head.weight":
            copies["embed_tokens.weight"] = name
        else:
            text[name] = name  # unknown: reported with the unexpected ones
    return {**copies, **text}, vision


def remap(tensors: Mapping[str, mx.array]) -> Weights:
    """Published names -> parameter paths."""
    names, vision = parameter_names(tensors)
    text = {path: tensors[name] for path, name in names.items()}
    return Weights(text, {name: tensors[name] for name in vision}, names)


def _parameter(name: str) -> str:
    return name + ".weight" if _BARE_EXPERTS.search(name) else name


def load_model(folder: Path, config: ModelConfig, dtype: mx.Dtype | None = None, *,
               strict: bool = True) -> tuple[DiffusionGemma, Weights]:
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
    if not strict:
        known = dict(tree_flatten(model.parameters()))
        weights.text = {path: tensor for path, tensor in weights.text.items() if path in known}
    _check(model, weights)
    if dtype is not None:
        weights.text = {
            name: tensor.astype(dtype) if mx.issubdtype(tensor.dtype, mx.floating) else tensor
            for name, tensor in weights.text.items()
        }
    model.load_weights(list(weights.text.items()))
    model.eval()
    return model, weights


def module_quantization(quantization: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The "group_size", "bits" and "mode" of a packed module, from config.json's ``quantization``.

    As ``mlx.nn.quantize`` reads it, an entry for one module stands for itself: without a mode it is affine,
    whatever the mode of the others. ``path`` is the module's, with or without ``model.decoder.``
    """
    path = path.removeprefix(_DECODER)
    own = next((quantization[name] for name in (path, _DECODER + path) if name in quantization), None)
    entry = own if isinstance(own, Mapping) else quantization
    return {name: entry[name] for name in ("group_size", "bits", "mode") if entry.get(name) is not None}


def _quantize(model: DiffusionGemma, quantization: Mapping[str, Any], weights: Mapping[str, mx.array]) -> None:
    """Replaces the modules whose weights are packed, each with its own group size, bits and mode."""

    def packed(path: str, module: nn.Module) -> nn.Module:
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in weights:
            return module
        chosen = module_quantization(quantization, path)
        try:
            quantized: nn.Module = module.to_quantized(**chosen)
        except (ValueError, TypeError):
            raise DgemmaError(f"config.json: {_DECODER}{path} cannot be quantized as {chosen}", _DAMAGED) from None
        return quantized

    model.update_modules(tree_map_with_path(packed, model.leaf_modules(), is_leaf=nn.Module.is_module))


def _check(model: DiffusionGemma, weights: Weights) -> None:
    """Every parameter has a tensor of its shape and kind, and there is none beside."""
    expected = dict(tree_flatten(model.parameters()))
    if missing := sorted(expected.keys() - weights.text.keys()):
        raise DgemmaError(f"the checkpoint lacks {some_of([source_name(path) for path in missing])}", _DAMAGED)
    if unexpected := sorted(weights.text.keys() - expected.keys()):
        names = [weights.names[path] for path in unexpected]
        raise DgemmaError(f"the checkpoint has unknown tensors: {some_of(names)}", _DAMAGED)
    for path, parameter in expected.items():
        name, tensor = weights.names[path], weights.text[path]
        if tensor.shape != parameter.shape:
            raise DgemmaError(f"{name} has shape {tensor.shape}, config.json asks for {parameter.shape}", _DAMAGED)
        both_floating = all(mx.issubdtype(array.dtype, mx.floating) for array in (tensor, parameter))
        if tensor.dtype != parameter.dtype and not both_floating:
            raise DgemmaError(f"{name} has dtype {tensor.dtype}, not {parameter.dtype}", _DAMAGED)


def some_of(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
