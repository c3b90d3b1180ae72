"""The names of a checkpoint's tensors, and the parameter paths of ``DiffusionGemma`` that they stand for.

Reference: the tensor names of transformers ``DiffusionGemmaForBlockDiffusion``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

DECODER = "model.decoder."
_ENCODER = "model.encoder.language_model."
_VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_BARE_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")


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
    name = DECODER + parameter
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
        elif name.startswith(DECODER):
            text[_parameter(name.removeprefix(DECODER))] = name
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


def module_quantization(quantization: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The "group_size", "bits" and "mode" of a packed module, from config.json's ``quantization``.

    As ``mlx.nn.quantize`` reads it, an entry for one module stands for itself: without a mode it is affine,
    whatever the mode of the others. ``path`` is the module's, with or without ``model.decoder.``
    """
    path = path.removeprefix(DECODER)
    own = next((quantization[name] for name in (path, DECODER + path) if name in quantization), None)
    entry = own if isinstance(own, Mapping) else quantization
    return {name: entry[name] for name in ("group_size", "bits", "mode") if entry.get(name) is not None}


def some_of(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
