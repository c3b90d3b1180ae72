"""How much memory generating takes, estimated from the configuration."""

from __future__ import annotations

from dgemma_mlx.config import FULL, ModelConfig
from dgemma_mlx.model.attention import SCORE_BYTES

_CACHE_BYTES = 2  # an element of keys and values, bfloat16
_LOGIT_ARRAYS = 4  # float32 arrays of canvas x vocabulary that one denoising step holds at a time


def cache_memory(config: ModelConfig, positions: int) -> int:
    """Bytes of keys and values for a prefix of so many positions."""
    total = 0
    for kind in config.text.layer_types:
        kept = positions if kind == FULL else min(positions, config.text.sliding_window - 1)
        total += 2 * kept * config.text.kv_heads(kind) * config.text.layer_head_dim(kind) * _CACHE_BYTES
    return total


def run_memory(config: ModelConfig, weight_bytes: int, positions: int) -> int:
    """Bytes for weights, cache, one step's logits and attention scores."""
    logits = _LOGIT_ARRAYS * 4 * config.canvas_length * config.text.vocab_size
    return weight_bytes + cache_memory(config, positions) + logits + 2 * SCORE_BYTES
