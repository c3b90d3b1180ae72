"""A small checkpoint that reads images: the demo's text network with a vision tower of random weights, and pictures."""

from __future__ import annotations

import json
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.checkpoint.vision_config import VisionConfig
from dgemma_mlx.vision.tower import VisionTower

# A picture of the smallest budget, 70 soft tokens, is at most 280 patches.
VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 8,
    "pooling_kernel_size": 2,
    "position_embedding_size": 128,
    "standardize": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
IMAGE_IDS = {"image_token_id": 102, "boi_token_id": 103, "eoi_token_id": 104}
_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
    {%- if message['content'] is string -%}{{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' and message['role'] == 'user' -%}{{- '<|image|>' -}}
            {%- elif part['type'] == 'text' -%}{{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


def tower_tensors(seed: int = 0, text_width: int = 128) -> dict[str, mx.array]:
    """Return random values for every tensor of the tower, by its published name."""
    mx.random.seed(seed)
    tower = VisionTower(VisionConfig.read({"vision_config": VISION}, {"image_processor": _PROCESSOR}), text_width)
    found: dict[str, mx.array] = {}
    for path, array in tree_flatten(tower.parameters()):
        name = f"embed_vision.{path}" if path.startswith("embedding_projection") else f"vision_tower.{path}"
        scale = array.shape[-1] ** -0.5 if array.ndim > 1 else 0.2
        found[f"model.encoder.{name}"] = scale * mx.random.normal(array.shape) + (1 if array.ndim == 1 else 0)
    return found


_PROCESSOR = {"patch_size": VISION["patch_size"], "pooling_kernel_size": 2, "max_soft_tokens": 70}


def write_seeing(folder: Path, seed: int = 0, **vision: Any) -> Path:
    """Write the checkpoint and return its folder. Keyword arguments replace keys of ``vision_config``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_FOLDER / name, folder / name)
    generation = json.loads((DEMO_FOLDER / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "max_denoising_steps": 3}))
    config = json.loads((DEMO_FOLDER / "config.json").read_text())
    config |= {**IMAGE_IDS, "vision_config": {**VISION, **vision}, "vision_soft_tokens_per_image": 70}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": _PROCESSOR}))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    tensors: Any = mx.load(str(DEMO_FOLDER / "model.safetensors"))
    text = {name: tensor for name, tensor in tensors.items() if name.startswith(("model.decoder.", "model.encoder.l"))}
    mx.save_safetensors(str(folder / "model.safetensors"), {**text, **tower_tensors(seed)})
    return folder


def write_blind(folder: Path) -> Path:
    """Write the demo without its vision tower and return the folder."""
    shutil.copytree(DEMO_FOLDER, folder, ignore=shutil.ignore_patterns("model-vision.safetensors", "*.index.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_config": None}))
    return folder


def drawn(seed: int = 0, width: int = 40, height: int = 40) -> Image.Image:
    """Return a picture of noise, whose pixels depend on the seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png(seed: int = 0, width: int = 40, height: int = 40) -> bytes:
    """Return the PNG file of a picture of noise."""
    file = BytesIO()
    drawn(seed, width, height).save(file, "PNG")
    return file.getvalue()
