"""Small vision towers with random weights, and pictures of random pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.vision.tower import VisionTower
from tests.model.checkpoint import Tensors, flat_config, write_checkpoint

SMALL: dict[str, Any] = {
    "model_type": "gemma4_vision", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "position_embedding_size": 128,
    "standardize": True,
}  # fmt: skip


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return the content of an image's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    """Return a picture of random pixels."""
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def vision_config(**change: Any) -> dict[str, Any]:
    """Return a config.json with a small tower. Keyword arguments replace keys of ``vision_config``."""
    return {**flat_config(), "vision_config": {**SMALL, **change}}


def tower_tensors(config: dict[str, Any]) -> Tensors:
    """Return random values for every tensor of the tower of a config.json, by its published name."""
    parsed = ModelConfig.from_dict(config)
    assert parsed.vision is not None
    tensors: Tensors = {}
    tower = VisionTower(parsed.vision, parsed.text.hidden_size)
    for number, (path, value) in enumerate(tree_flatten(tower.parameters())):
        part = "embed_vision" if path.startswith("embedding_projection") else "vision_tower"
        values = mx.random.normal(value.shape, key=mx.random.key(number))
        if path.endswith(("_min", "_max")):
            values = mx.array(-1.0 if path.endswith("_min") else 1.0)
        elif value.ndim > 1:
            values = values * value.shape[-1] ** -0.5
        else:
            values = 1 + 0.2 * values
            values = values * len(values) ** -0.5 if "q_norm" in path else values  # scores near 1, small errors
        tensors[f"model.encoder.{part}.{path}"] = values
    return tensors


def write_tower(folder: Path, config: dict[str, Any], tensors: Tensors | None = None) -> ModelConfig:
    """Write a checkpoint with a tower and without text network, and return its configuration."""
    write_checkpoint(folder, config, tower_tensors(config) if tensors is None else tensors)
    return ModelConfig.load(folder)
