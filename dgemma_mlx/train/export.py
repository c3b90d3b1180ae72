"""Export of a trained network as a checkpoint folder with the published tensor names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dgemma_mlx.checkpoint.names import source_name
from dgemma_mlx.model.text import DiffusionGemma


def export(
    model: DiffusionGemma, config: Mapping[str, Any], generation: Mapping[str, Any], folder: Path,
    dtype: mx.Dtype = mx.bfloat16,
) -> None:
    """Write ``model.safetensors``, ``config.json`` and ``generation_config.json`` into a folder.

    Args:
        model: The network, without packed weights.
        config: The content of config.json.
        generation: The content of generation_config.json.
        folder: The folder to write; it is created if necessary.
        dtype: The dtype of the stored weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(tree_flatten(model.parameters()))
    tensors = {source_name(name): value.astype(dtype) for name, value in parameters.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
