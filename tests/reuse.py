"""What a canvas is decoded to on top of a prompt cache."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from dgemma_mlx import Model, PromptCache

Logits = np.ndarray[Any, np.dtype[np.float32]]


def decoded(model: Model, memory: PromptCache, ids: list[int]) -> tuple[int, Logits]:
    """Positions reused, and the logits of a canvas after ``ids`` encoded on top of them."""
    cache = memory.reuse(model.network, ids)
    known = cache.offset
    if known < len(ids):
        model.network.encode(mx.array([ids[known:]]), cache)
        memory.append(ids[known:])
    return known, np.array(model.network.decode(mx.arange(32)[None], cache))
