"""Small checkpoints whose sizes cannot be cut evenly, plain and packed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from tests.model.checkpoint import flat_config, quantized, random_tensors, write_checkpoint

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def uneven_checkpoint(folder: Path, bits: int | None = None, dtype: str = "float32", **sizes: Any) -> Path:
    """Write a checkpoint with the demo's tokenizer, packed to ``bits`` or plain in ``dtype``, and return its folder.

    The dense branch has 5 units of 64 values and an expert 3, which two machines hold as 3 + 2 and 2 + 1.
    """
    text = {"vocab_size": 768, "intermediate_size": 320, "moe_intermediate_size": 192, "num_attention_heads": 8,
            "num_key_value_heads": 4, "num_global_key_value_heads": 2} | sizes  # fmt: skip
    config = flat_config(**text)
    tensors = {name: array.astype(getattr(mx, dtype)) for name, array in random_tensors(config).items()}
    if bits is not None:
        packing = {"group_size": 64, "bits": bits, "mode": "affine"}
        tensors, _ = quantized(tensors, lambda path: None if "router" in path else packing)
        config["quantization"] = packing
    write_checkpoint(folder, config, tensors, shards=2)
    for name in TEXT_FILES:
        shutil.copy(DEMO_FOLDER / name, folder)
    return folder
