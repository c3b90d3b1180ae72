"""Mapping between the tensor names of a checkpoint and the parameter paths of ``model.text.DiffusionGemma``.

A tensor name is, for example, ``model.decoder.layers.0.self_attn.q_proj.weight``; its parameter path is
``layers.0.self_attn.q_proj.weight``. Reference: the state dict of transformers ``DiffusionGemmaForBlockDiffusion``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

# Prefixes of tensor names. The decoder's tensors hold the shared weights. The encoder has tensors of its own only for
# the layers' output scalars.
DECODER = "model.decoder."
_ENCODER = "model.encoder.language_model."
_VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_TOWER_PART = re.compile(r"(?:.*\.)??((?:vision_tower|embed_vision)\..+)")
# The names of expert tensors have no ".weight" at the end in published checkpoints, but their parameter paths do.
_BARE_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")


@dataclass
class Weights:
    """The tensors of a checkpoint, separated into text network and vision tower.

    Attributes:
        text: Tensors of the text network, by parameter path.
        vision: Tensors of the vision tower, by their names in the checkpoint.
        names: The name in the checkpoint of each tensor in ``text``, by parameter path.
    """

    text: dict[str, mx.array]
    vision: dict[str, mx.array]
    names: dict[str, str]


def source_name(parameter: str) -> str:
    """Return the name that the tensor of a parameter path has in a published checkpoint."""
    if parameter.endswith(".encoder_layer_scalar"):
        return _ENCODER + parameter.replace(".encoder_layer_scalar", ".layer_scalar")
    name = DECODER + parameter
    stem = name.removesuffix(".weight")
    return stem if _BARE_EXPERTS.search(stem) else name


def vision_name(name: str) -> str | None:
    """Return the published name of a tensor of the vision tower that has another prefix; None for other tensors."""
    found = _TOWER_PART.fullmatch(name)
    return "model.encoder." + found[1] if found else None


def parameter_names(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Assign the tensor names of a checkpoint to parameter paths.

    Returns a dict from parameter path to tensor name, and a list of the vision tower's tensor names. Names that are
    neither become parameter paths unchanged, so that loading reports them as unknown.

    ``save_pretrained`` may write copies of tied tensors for the encoder and the output projection. Such a copy is used
    only where the decoder's own tensor is absent.
    """
    vision: list[str] = []
    text: dict[str, str] = {}
    copies: dict[str, str] = {}
    for name in names:
        if name.startswith(_VISION):
            vision.append(name)
        elif name.startswith(DECODER):
            text[_parameter_path(name.removeprefix(DECODER))] = name
        elif name.startswith(_ENCODER) and name.endswith(".layer_scalar"):
            text[name.removeprefix(_ENCODER).replace(".layer_scalar", ".encoder_layer_scalar")] = name
        elif name.startswith(_ENCODER):
            copies[_parameter_path(name.removeprefix(_ENCODER))] = name
        elif name == "lm_head.weight":
            copies["embed_tokens.weight"] = name
        else:
            text[name] = name  # unknown
    return {**copies, **text}, vision


def remap(tensors: Mapping[str, mx.array]) -> Weights:
    """Separate a checkpoint's tensors, given by their names, into text network and vision tower."""
    names, vision = parameter_names(tensors)
    text = {path: tensors[name] for path, name in names.items()}
    return Weights(text, {name: tensors[name] for name in vision}, names)


def _parameter_path(name: str) -> str:
    """Return the parameter path of a tensor name without its prefix."""
    return name + ".weight" if _BARE_EXPERTS.search(name) else name


def module_quantization(quantization: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the "group_size", "bits" and "mode" of a packed module; keys that are not set are left out.

    ``quantization`` is the object of that name in config.json: values for all modules, and objects with the values of
    single modules. ``path`` is the module's path with or without the prefix ``model.decoder.``

    As in ``mlx.nn.quantize``, a module's own object replaces the common values completely. If it has no mode, the mode
    is affine, even if the common mode is another.
    """
    path = path.removeprefix(DECODER)
    own = next((quantization[name] for name in (path, DECODER + path) if name in quantization), None)
    entry = own if isinstance(own, Mapping) else quantization
    return {name: entry[name] for name in ("group_size", "bits", "mode") if entry.get(name) is not None}


def some_of(names: list[str]) -> str:
    """Join names for an error message: up to three of them, then the number of the others."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
